// The operators of ../reference as CUDA kernels, in plain C++ without headers. A kernel has the name of its operator;
// one that operators.py launches by `by_kernel` also has the names of its arguments. Unless a kernel says otherwise,
// `n` is the number of elements that its threads stride over, and `columns` the size of the last axis.
//
// The file is compiled with REAL=float and, if float64 is used, again with REAL=double. Sums are made in a fixed order,
// without atomics on floating-point numbers, so that the same input gives the same bits. Numbers that change from step
// to step (`numbers`, `word`) are read from device memory, so that a captured step can be replayed.
//
// Kernels stride over their work, so any grid works, with these exceptions: sum_to and clip_scale need a single block,
// dense_cross_entropy enough threads for all rows, column sums the grid of `launch_column_sums`, and an update that
// ends a step more than `updating` blocks. The blocks of a reduction have a power of two of threads, at most 256.
//
// Most memory-bound kernels load four neighboring elements at a time (WIDTH 4) where addresses and sizes allow that.

typedef REAL real;
typedef long long Index;
typedef unsigned char Byte;
typedef unsigned int Word;

#define KERNEL extern "C" __global__ void
#define FOR_EACH(i, n) FOR_EACH_OF_BLOCK(i, n, blockIdx.x, gridDim.x)
#define FOR_EACH_OF_BLOCK(i, n, block, blocks) \
    for (Index i = (block) * (Index)blockDim.x + threadIdx.x; i < (n); i += (blocks) * (Index)blockDim.x)
#define FOR_EACH_WORD(i, n) /* for n below 2^31, in fewer instructions */ \
    for (Word i = blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += gridDim.x * blockDim.x)
#define FOR_EACH_ROW(row, rows) for (Index row = blockIdx.x; row < (rows); row += gridDim.x)
#define FOR_EACH_COLUMN(j, columns) for (Index j = threadIdx.x; j < (columns); j += blockDim.x)

__device__ Index quotient(Index i, Index n) {
    return (i | n) <= 0x7fffffff ? (Index)((Word)i / (Word)n) : i / n;  // 64-bit division is several times slower
}

__device__ Index remainder_of(Index i, Index n) { return i - quotient(i, n) * n; }

// Division of numbers below 2^31 by n, as a multiplication: see `_divisor` in kernels.py.
struct Divisor {
    Word n, multiplier, shift;
};

__device__ Word operator/(Word i, const Divisor& n) { return (__umulhi(i, n.multiplier) + i) >> n.shift; }

// The sizes of the axes of an array, without the first.
struct Axes {
    Divisor sizes[5];
};

__device__ int pop(Word& i, const Divisor& n) {  // removes the last coordinate from the index i, and returns it
    Word rest = i / n;
    int last = i - rest * n.n;
    i = rest;
    return last;
}

// Neighboring elements, which one instruction loads or stores.
template <typename T, int WIDTH> struct alignas(WIDTH * sizeof(T) < 16 ? WIDTH * sizeof(T) : 16) Vector {
    T at[WIDTH];
};

template <int WIDTH, typename T> __device__ Vector<T, WIDTH> load(const T* from) {
    return *(const Vector<T, WIDTH>*)from;
}

template <int WIDTH, typename T> __device__ void store(T* to, const Vector<T, WIDTH>& vector) {
    *(Vector<T, WIDTH>*)to = vector;
}

// How numbers are stored: as reals, or as the bits of float32 rounded to 16 bits, to the nearest, ties to even.
// masked: the stored product of a number and 0 or 1.

struct Exact {
    typedef real Stored;
    static __device__ real value(Stored x) { return x; }
    static __device__ Stored masked(Stored, real product) { return product; }
};

struct Bfloat16 {
    typedef unsigned short Stored;
    static __device__ float value(Stored x) { return __uint_as_float((Word)x << 16); }
    static __device__ Stored masked(Stored x, float product) { return product == 0 ? 0 : x; }  // without rounding
    static __device__ Stored stored(float x) {
        Word bits = __float_as_uint(x);
        bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        return nan ? bits >> 16 | 0x40 : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    }
};

struct Float16 {
    typedef unsigned short Stored;
    static __device__ float value(Stored x) {
        Word sign = (x & 0x8000u) << 16, exponent = x >> 10 & 31, size = (x & 0x7fffu) << 13;
        if (exponent == 0) size = __float_as_uint((x & 0x3ffu) * 0x1p-24f);
        else size += exponent == 31 ? 0x70000000u : 0x38000000u;  // infinity or NaN, or a normal number
        return __uint_as_float(sign | size);
    }
    static __device__ Stored masked(Stored x, float product) { return product == 0 ? 0 : x; }  // without rounding
    static __device__ Stored stored(float x) {
        Word bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, half;
        bits &= 0x7fffffffu;
        if (bits > 0x7f800000u) half = 0x7e00u;
        else if (bits >= 0x477ff000u) half = 0x7c00u;  // 65520 and more become infinity
        else if (bits < 0x38800000u) half = (Word)rintf(__uint_as_float(bits) * 16777216.0f);  // units of 2^-24
        else half = (bits + 0xfffu + (bits >> 13 & 1) - 0x38000000u) >> 13;
        return sign | half;
    }
};

// Where numbers are stored in 16 bits, or null.
struct Copy {
    unsigned short* to;
    bool bfloat16;

    template <int WIDTH> __device__ void keep(Index at, const Vector<real, WIDTH>& numbers) const {
        Vector<unsigned short, WIDTH> bits;
        for (int k = 0; k < WIDTH; k++) {
            bits.at[k] = bfloat16 ? Bfloat16::stored(numbers.at[k]) : Float16::stored(numbers.at[k]);
        }
        store(to + at, bits);
    }
};

// Whether vectors of four reals can begin here.
__device__ bool aligned(const void* address) { return ((Index)address & 15) == 0; }

template <int WIDTH, typename Function>
__device__ void combine_pair(const real* x, const real* y, Index at, real* out, const Copy& copy, Function function) {
    Vector<real, WIDTH> a = load<WIDTH>(x + at), b = load<WIDTH>(y + at);
    for (int k = 0; k < WIDTH; k++) a.at[k] = function(a.at[k], b.at[k]);
    if (copy.to) copy.keep(at, a);
    else store(out + at, a);
}

// out[i] = function(x[i], y[i]), or copy[i], if that is not null.
template <typename Function>
__device__ void for_each_pair(const real* x, const real* y, Index n, real* out, const Copy& copy, Function function) {
    Index vectors = aligned(x) && aligned(y) && aligned(out) && aligned(copy.to) ? n / 4 : 0;
    FOR_EACH(i, vectors) combine_pair<4>(x, y, 4 * i, out, copy, function);
    FOR_EACH(i, n - 4 * vectors) combine_pair<1>(x, y, 4 * vectors + i, out, copy, function);
}

template <int WIDTH> struct Width {
    static const int value = WIDTH;
};

// work(width, i, j) for each group of width.value elements, of which the first is element i, in column j.
// fits: whether all arrays are aligned.
template <typename Work> __device__ void for_each_in_rows(Index n, Index columns, bool fits, Work work) {
    if (fits && columns % 4 == 0) {
        FOR_EACH(i, n / 4) work(Width<4>(), 4 * i, 4 * remainder_of(i, columns / 4));
    } else {
        FOR_EACH(i, n) work(Width<1>(), i, remainder_of(i, columns));
    }
}

// out[i, j] = function(x[i, j], row[j]).
template <typename Function>
__device__ void for_each_with_row(const real* x, const real* row, Index n, Index columns, real* out,
                                  Function function) {
    bool fits = aligned(x) && aligned(row) && aligned(out);
    for_each_in_rows(n, columns, fits, [=](auto width, Index i, Index j) {
        const int WIDTH = decltype(width)::value;
        Vector<real, WIDTH> a = load<WIDTH>(x + i), b = load<WIDTH>(row + j);
        for (int k = 0; k < WIDTH; k++) a.at[k] = function(a.at[k], b.at[k]);
        store(out + i, a);
    });
}

// Reductions over a block --------------------------------------------------------------------------------------------

struct Add {
    template <typename T> __device__ T operator()(T a, T b) const { return a + b; }
};

struct Largest {  // NaN is larger than any number
    template <typename T> __device__ T operator()(T a, T b) const { return a >= b || a != a ? a : b; }
};

// Waits for the other threads of each group of `size`, a power of two. Those of a warp need not wait for the block.
__device__ void wait_for_group(int size) {
    if (size <= 32) __syncwarp();
    else __syncthreads();
}

// The result of each group of `size` consecutive threads, a power of two. All threads of the block must call it.
template <typename T, typename Operation> __device__ T over_group(T value, Operation operation, int size) {
    __shared__ T shared[256];
    int place = threadIdx.x % size;
    shared[threadIdx.x] = value;
    wait_for_group(size);
    for (int half = size / 2; half > 0; half /= 2) {
        if (place < half) shared[threadIdx.x] = operation(shared[threadIdx.x], shared[threadIdx.x + half]);
        wait_for_group(half);
    }
    wait_for_group(size);
    T result = shared[threadIdx.x - place];
    wait_for_group(size);
    return result;
}

template <typename T, typename Operation> __device__ T over_block(T value, Operation operation) {
    return over_group(value, operation, blockDim.x);
}

// The beginning and the end of captured steps: see StepCells in graphs.py --------------------------------------------

struct Numbers {
    double values[8];
};

KERNEL set_numbers(Numbers given, double* out) { FOR_EACH(i, 8) out[i] = given.values[i]; }

struct Step {
    const double* table;  // in each row the numbers of a step
    double* cells;
    Index width, used;  // of a row: its size, and how many numbers are copied into the cells
    const Index* order;
    Index samples, rows;  // in `order`, and in a step
    Index* indices;
    const double* staged;  // (3, batches)
    double* batch_sums;    // (3, capacity)
    Index batches, capacity;
    Index* counters;  // row of the table, first sample in `order`, column of batch_sums; how many blocks have begun
    Index group, gathered;  // the threads that copy the rows of a sample; the rows of each array in `to`
    Index from[4], to[4];  // the addresses of up to four arrays, and of where the rows of the step's samples are copied
    Index units[4], bytes[4];  // how many units a row has, and their bytes: 1 to 16, or 0 for bytes that become floats
};

// Copies the row of a sample. `first` is the first unit of this thread, of a group.
template <typename From, typename To>
__device__ void gather_row(const Step& step, int array, Index sample, Index row, int first) {
    int units = step.units[array], group = step.group;
    const From* from = (const From*)step.from[array] + sample * units;
    To* to = (To*)step.to[array] + row * units;
    for (int i = first; i < units; i += 2 * group) {
        bool second = i + group < units;
        From value = from[i], next = second ? from[i + group] : value;
        to[i] = (To)value;
        if (second) to[i + group] = (To)next;
    }
}

// Stores the samples from order[first] on in `indices`, and copies their rows. This is block number `block` of `blocks`
// that share the work.
__device__ void gather_samples(const Step& step, Index first, int block, int blocks) {
    int group = step.group, groups = blockDim.x / group, place = threadIdx.x % group;
    Index rows = step.samples - first < step.rows ? step.samples - first : step.rows;
    for (Index row = block * groups + threadIdx.x / group; row < rows; row += blocks * groups) {
        Index sample = step.order[first + row];
        if (place == group - 1) step.indices[row] = sample;
        for (int array = 0; array < 4 && row < step.gathered && step.units[array]; array++) {
            Index bytes = step.bytes[array];
            int start = array % 2 ? group - 1 - place : place;  // short rows of two arrays have different threads
            if (bytes == 16) gather_row<Vector<Word, 4>, Vector<Word, 4>>(step, array, sample, row, start);
            else if (bytes == 8) gather_row<Index, Index>(step, array, sample, row, start);
            else if (bytes == 4) gather_row<Word, Word>(step, array, sample, row, start);
            else if (bytes == 1) gather_row<Byte, Byte>(step, array, sample, row, start);
            else gather_row<Byte, float>(step, array, sample, row, start);
        }
    }
}

// Copies a row of the table into the cells. Only one block may call it.
__device__ void fill_cells(const Step& step, Index row) {
    FOR_EACH_COLUMN(i, step.used) step.cells[i] = step.table[row * step.width + i];
}

// Prepares the step at the counters.
KERNEL begin_step(Step step) {
    gather_samples(step, step.counters[1], blockIdx.x, gridDim.x);
    if (blockIdx.x == 0) fill_cells(step, step.counters[0]);
}

// In thread 0, the number of blocks that have called this before, in the last kernel of a step. A block calls it when
// all of its threads have read what `finish_step` changes.
__device__ Word blocks_before(const Step& step) {
    if (!step.counters) return 0;
    __threadfence();
    __syncthreads();
    return threadIdx.x == 0 ? atomicInc((Word*)(step.counters + 3), gridDim.x - 1) : 0;
}

// The last block to call `blocks_before`, which returned `before`, stores the sums of the step, fills the cells for the
// next step, and advances the counters.
__device__ void finish_step(const Step& step, Word before) {
    __shared__ bool last;
    if (!step.counters) return;
    if (threadIdx.x == 0) last = before == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    Index row = step.counters[0], column = step.counters[2], batches = step.batches;
    FOR_EACH_COLUMN(i, 3 * batches) {
        step.batch_sums[i / batches * step.capacity + column + i % batches] = step.staged[i];
    }
    fill_cells(step, row + 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        step.counters[0] = row + 1;
        step.counters[1] += step.rows;
        step.counters[2] = column + batches;
    }
}

// The last kernel of a step that does not end with an update.
KERNEL end_step(Step step) {
    Index next = step.counters[1] + step.rows;
    Word before = blocks_before(step);
    gather_samples(step, next, blockIdx.x, gridDim.x);
    finish_step(step, before);
}

// Gathering rows -----------------------------------------------------------------------------------------------------

// Items of 1, 4 or 8 bytes, whatever their type.
KERNEL gather(const void* a, const Index* rows, Index n, Index size, int item_bytes, void* out) {
    FOR_EACH(i, n) {
        Index from = rows[quotient(i, size)] * size + remainder_of(i, size);
        if (item_bytes == 1) ((Byte*)out)[i] = ((const Byte*)a)[from];
        else if (item_bytes == 4) ((Word*)out)[i] = ((const Word*)a)[from];
        else ((Index*)out)[i] = ((const Index*)a)[from];
    }
}

KERNEL gather_bytes(const Byte* a, const Index* rows, Index n, Index size, real* out) {
    FOR_EACH(i, n) out[i] = (real)a[rows[quotient(i, size)] * size + remainder_of(i, size)];
}

// Sums of rows at equal indices. Block (i, j) computes row i of out, in WIDTH columns for each lane; `by_position`, that of
// the index at position i, if it is the first of its kind. Each of the 8 warps adds, in order, the rows of a part of the
// indices. Lanes compare 32 indices at a time.
template <int WIDTH>
__device__ void add_rows_at_by(const real* grad_rows, const Index* rows, int count, Index columns, bool by_position,
                               real* out) {
    const int BATCH = 4;  // rows that are loaded before they are added
    __shared__ Vector<real, WIDTH> parts[8][32];
    __shared__ bool repeated;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, position = blockIdx.x;
    Index row = by_position ? rows[position] : position, column = (blockIdx.y * (Index)32 + lane) * WIDTH;
    int part = (count + 255) / 256 * 32;  // of the indices, for a warp
    if (threadIdx.x == 0) repeated = false;
    __syncthreads();
    Vector<real, WIDTH> sum = {};
    for (int first = warp * part, step = 0; step < part; first += 32, step += 32) {
        Word found = __ballot_sync(0xffffffff, first + lane < count && rows[first + lane] == row);
        if (by_position && found && first + __ffs(found) - 1 < position) repeated = true;
        while (found) {
            Vector<real, WIDTH> loaded[BATCH] = {};
            for (int b = 0; b < BATCH && found; b++, found &= found - 1) {
                const real* from = grad_rows + (first + __ffs(found) - 1) * columns + column;
                if (column < columns) loaded[b] = load<WIDTH>(from);
            }
            for (int b = 0; b < BATCH; b++) {
                for (int k = 0; k < WIDTH; k++) sum.at[k] += loaded[b].at[k];
            }
        }
    }
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= columns || repeated) return;
    for (int other = 1; other < 8; other++) {
        for (int k = 0; k < WIDTH; k++) sum.at[k] += parts[other][lane].at[k];
    }
    store(out + row * columns + column, sum);
}

KERNEL add_rows_at(const real* grad_rows, const Index* rows, int count, Index columns, int width, int by_position,
                   real* out) {
    if (width == 4) add_rows_at_by<4>(grad_rows, rows, count, columns, by_position != 0, out);
    else add_rows_at_by<1>(grad_rows, rows, count, columns, by_position != 0, out);
}

// Elements -----------------------------------------------------------------------------------------------------------

KERNEL rescale_bytes(const Byte* x, Index n, real scale, real offset, real* out) {
    FOR_EACH(i, n) out[i] = scale * (real)x[i] + offset;
}

KERNEL rescale(const real* x, Index n, real scale, real offset, real* out) {
    FOR_EACH(i, n) out[i] = scale * x[i] + offset;
}

struct PositivePart {  // NaN stays
    __device__ real operator()(real x) const { return x <= 0 ? (real)0 : x; }
};

struct WhereNotZero {
    __device__ real operator()(real grad, real y) const { return grad * (real)(y != 0); }
};

KERNEL relu(const real* x, Index n, real* out, unsigned short* copy, int bfloat16) {
    for_each_pair(x, x, n, out, {copy, bfloat16 != 0}, [](real a, real) { return PositivePart()(a); });
}

KERNEL relu_grad(const real* grad, const real* y, Index n, real* out, unsigned short* copy, int bfloat16) {
    for_each_pair(grad, y, n, out, {copy, bfloat16 != 0}, WhereNotZero());
}

struct Multiply {
    __device__ real operator()(real a, real b) const { return a * b; }
};

KERNEL add_arrays(const real* a, const real* b, Index n, real* out, unsigned short* copy, int bfloat16) {
    for_each_pair(a, b, n, out, {copy, bfloat16 != 0}, Add());
}

KERNEL multiply_arrays(const real* a, const real* b, Index n, real* out, unsigned short* copy, int bfloat16) {
    for_each_pair(a, b, n, out, {copy, bfloat16 != 0}, Multiply());
}

// An operation of `elementwise`: its number in operators.py, how many elements it has, the addresses of its operands and
// of its result. An operand of which it reads only the first element has a step of 0; one without an address is `number`.
struct Operation {
    Index code, n, a, b, out, a_step, b_step;
    double a_number, b_number;
};

struct Operations {
    Operation at[16];
};

__device__ real operand(Index address, Index step, double number, Index i) {
    return address ? ((const real*)address)[i * step] : (real)number;
}

__device__ real result_of(Index code, real a, real b) {
    switch (code) {
        case 0: return a + b;
        case 1: return a - b;
        case 2: return a * b;
        case 3: return a / b;
        case 4: return sqrt(a);
        case 5: return a * a;
        case 6: return -a;
        case 7: return fabs(a);
        case 8: return a != a || a > b ? a : b;
        default: return a != a || a < b ? a : b;
    }
}

// Thread i computes element i of each operation, so an operation may use what earlier ones have written. n is the
// largest number of elements, and out the result that has them.
KERNEL elementwise(Operations operations, int count, Index n, real* out) {
    FOR_EACH(i, n) {
        for (int k = 0; k < count; k++) {
            const Operation& operation = operations.at[k];
            if (i >= operation.n) continue;
            real a = operand(operation.a, operation.a_step, operation.a_number, i);
            real b = operand(operation.b, operation.b_step, operation.b_number, i);
            ((real*)operation.out)[i] = result_of(operation.code, a, b);
        }
    }
}

__device__ real sigmoid_of(real x) { return exp(x < 0 ? x : (real)0) / (1 + exp(-fabs(x))); }

KERNEL sigmoid(const real* x, Index n, real* out) {
    FOR_EACH(i, n) out[i] = sigmoid_of(x[i]);
}

KERNEL softplus(const real* x, Index n, real* out) {
    FOR_EACH(i, n) out[i] = (x[i] > 0 ? x[i] : (real)0) + log1p(exp(-fabs(x[i])));
}

template <int WIDTH> __device__ void gelu_by(const real* x, Index at, real* out, real* slope) {
    Vector<real, WIDTH> value = load<WIDTH>(x + at), derivative;
    for (int k = 0; k < WIDTH; k++) {
        real a = value.at[k], near = a < -40 ? (real)-40 : a > 40 ? (real)40 : a;  // beyond them φ is 0
        real phi = (real)0.5 * erfc(a * (real)-0.70710678118654752);
        derivative.at[k] = near * exp((real)-0.5 * near * near) * (real)0.39894228040143268 + phi;
        value.at[k] = (a < -40 ? near : a) * phi;
    }
    store(out + at, value);
    store(slope + at, derivative);
}

KERNEL gelu(const real* x, Index n, real* out, real* slope) {
    Index vectors = aligned(x) && aligned(out) && aligned(slope) ? n / 4 : 0;
    FOR_EACH(i, vectors) gelu_by<4>(x, 4 * i, out, slope);
    FOR_EACH(i, n - 4 * vectors) gelu_by<1>(x, 4 * vectors + i, out, slope);
}

// Rotates pairs of elements that are `half` apart, by the angles of their step. n: the number of pairs.
KERNEL rotate_pairs(const real* x, const real* cosines, const real* sines, Index n, Index steps, Index heads,
                    Index half, real* out) {
    FOR_EACH(i, n) {
        Index row = quotient(i, half), place = i - row * half, first = 2 * row * half + place, second = first + half;
        Index angle = remainder_of(quotient(row, heads), steps) * half + place;
        real a = x[first], b = x[second];
        out[first] = a * cosines[angle] - b * sines[angle];
        out[second] = a * sines[angle] + b * cosines[angle];
    }
}

KERNEL add_to_rows(const real* row, Index n, Index columns, real* out) {
    for_each_with_row(out, row, n, columns, out, Add());
}

KERNEL add_to_rows_relu(const real* a, const real* row, Index n, Index columns, real* out) {
    for_each_with_row(a, row, n, columns, out, [](real x, real y) { return PositivePart()(x + y); });
}

template <typename Follows>
__device__ void scale_shift_then(const real* x, const real* center, const real* scale, const real* shift, Index n,
                                 Index columns, real* out, Follows follows) {
    bool fits = aligned(x) && aligned(center) && aligned(scale) && aligned(shift) && aligned(out);
    for_each_in_rows(n, columns, fits, [=](auto width, Index i, Index j) {
        const int WIDTH = decltype(width)::value;
        Vector<real, WIDTH> value = load<WIDTH>(x + i), m = load<WIDTH>(center + j);
        Vector<real, WIDTH> a = load<WIDTH>(scale + j), b = load<WIDTH>(shift + j);
        for (int k = 0; k < WIDTH; k++) value.at[k] = follows((value.at[k] - m.at[k]) * a.at[k] + b.at[k]);
        store(out + i, value);
    });
}

KERNEL scale_shift(const real* x, const real* center, const real* scale, const real* shift, Index n, Index columns,
                   real* out) {
    scale_shift_then(x, center, scale, shift, n, columns, out, [](real a) { return a; });
}

KERNEL scale_shift_relu(const real* x, const real* center, const real* scale, const real* shift, Index n, Index columns,
                        real* out) {
    scale_shift_then(x, center, scale, shift, n, columns, out, PositivePart());
}

KERNEL combine(const real* g, const real* a, const real* x, const real* center, const real* b, const real* c, Index n,
               Index columns, real* out) {
    bool fits = aligned(g) && aligned(a) && aligned(x) && aligned(center) && aligned(b) && aligned(c) && aligned(out);
    for_each_in_rows(n, columns, fits, [=](auto width, Index i, Index j) {
        const int WIDTH = decltype(width)::value;
        Vector<real, WIDTH> grad = load<WIDTH>(g + i), value = load<WIDTH>(x + i), m = load<WIDTH>(center + j);
        Vector<real, WIDTH> row_a = load<WIDTH>(a + j), row_b = load<WIDTH>(b + j), row_c = load<WIDTH>(c + j);
        for (int k = 0; k < WIDTH; k++) {
            grad.at[k] = grad.at[k] * row_a.at[k] + (value.at[k] - m.at[k]) * row_b.at[k] + row_c.at[k];
        }
        store(out + i, grad);
    });
}

// Rows ---------------------------------------------------------------------------------------------------------------
// A block computes one row at a time, unless a kernel says otherwise.

// out = z - max(z). Returns Σ e^out.
__device__ real shift_and_sum(const real* z, Index columns, real* out) {
    real largest = z[0], sum = 0;
    FOR_EACH_COLUMN(j, columns) largest = Largest()(largest, z[j]);
    largest = over_block(largest, Largest());
    FOR_EACH_COLUMN(j, columns) {
        out[j] = z[j] - largest;
        sum += exp(out[j]);
    }
    return over_block(sum, Add());
}

KERNEL softmax(const real* x, Index rows, Index columns, real* out) {
    FOR_EACH_ROW(i, rows) {
        real* y = out + i * columns;
        real sum = shift_and_sum(x + i * columns, columns, y);
        FOR_EACH_COLUMN(j, columns) y[j] = exp(y[j]) / sum;
    }
}

KERNEL log_softmax(const real* x, Index rows, Index columns, real* out) {
    FOR_EACH_ROW(i, rows) {
        real* y = out + i * columns;
        real log_sum = log(shift_and_sum(x + i * columns, columns, y));
        FOR_EACH_COLUMN(j, columns) y[j] -= log_sum;
    }
}

// The target of class k is `share`, plus `confidence` if k is the label.
KERNEL cross_entropy(const real* logits, const Index* labels, Index rows, Index columns, real confidence, real share,
                     real* losses, real* grad) {
    FOR_EACH_ROW(i, rows) {
        real* g = grad + i * columns;
        Index label = labels[i];
        real sum = shift_and_sum(logits + i * columns, columns, g);
        real shifted = 0;
        if (share != 0) {  // 0 · ∞ would be NaN
            FOR_EACH_COLUMN(j, columns) shifted += g[j];
            shifted = over_block(shifted, Add());
        }
        if (threadIdx.x == 0) {
            real log_sum = log(sum);
            real loss = confidence * (log_sum - g[label]);
            losses[i] = share != 0 ? loss + share * (columns * log_sum - shifted) : loss;
        }
        __syncthreads();  // g[label] has been read
        FOR_EACH_COLUMN(j, columns) g[j] = exp(g[j]) / sum - share - (j == label ? confidence : (real)0);
    }
}

// correct[0] += the rows whose largest number is at the label; correct[1] += all rows. If several numbers are the
// largest, the first one counts. A row with NaN is not correct. n: the number of rows, one for each thread.
KERNEL count_correct(const real* outputs, const Index* labels, Index n, Index columns, unsigned long long* correct) {
    Index count = 0;
    FOR_EACH(i, n) {
        const real* y = outputs + i * columns;
        Index best = 0;
        for (Index j = 1; j < columns; j++) {
            if (!(y[j] <= y[best]) && y[best] == y[best]) best = j;  // stays at NaN
        }
        count += best == labels[i] && y[best] == y[best];
    }
    count = over_block(count, Add());
    if (threadIdx.x == 0) {
        atomicAdd(correct, (unsigned long long)count);  // of integers, whose sum is the same in any order
        if (blockIdx.x == 0) atomicAdd(correct + 1, (unsigned long long)n);
    }
}

struct Scored {
    real score;
    int index;
};

struct FirstLargest {  // NaN is larger than any number
    __device__ Scored operator()(Scored a, Scored b) const {
        bool first = a.score > b.score || a.score != a.score || (a.score == b.score && a.index < b.index);
        return first ? a : b;
    }
};

struct LossAndHits {
    double loss;
    Index hits;
};

struct AddBoth {
    __device__ LossAndHits operator()(LossAndHits a, LossAndHits b) const { return {a.loss + b.loss, a.hits + b.hits}; }
};

// The sum of term(j) over the columns of a row: the part of thread `place` of a group. The sum over the group has the
// same bits as that over a block of `lanes` threads, a power of two: each thread adds what several threads of that
// block would, in the order of `over_group`.
template <typename Term> __device__ real over_lanes(Index place, int group, int lanes, Index columns, Term term) {
    real sums[8];  // of parts that wait for their other half
    int depth = 0, lane = 0, count = lanes / group;  // at most 256
    for (int i = 0; i < count; i++) {
        real sum = 0;
        for (Index j = place + lane * group; j < columns; j += lanes) sum += term(j);
        for (int k = i; k & 1; k >>= 1) sum = sums[--depth] + sum;
        sums[depth++] = sum;
        int bit = count / 2;  // the next lane is i + 1 with its bits in reversed order
        for (; lane & bit; bit /= 2) lane ^= bit;
        lane |= bit;
    }
    return sums[0];
}

// The sum of 8 terms in the order of `over_lanes`.
__device__ real over_terms(const real (&terms)[8]) {
    real halves[4], quarters[2];
    for (int k = 0; k < 4; k++) halves[k] = terms[k] + terms[k + 4];
    for (int k = 0; k < 2; k++) quarters[k] = halves[k] + halves[k + 2];
    return quarters[0] + quarters[1];
}

// cross_entropy with grad multiplied by `scale`, and count_correct, which is added to `correct` unless that is null.
// `group` threads compute a row, and add as the `lanes` threads of cross_entropy do. If there are as many lanes as
// columns, a thread has at most 8 of these, which it keeps in registers. A single block also stores the sum of all
// losses in loss_sum.
KERNEL cross_entropy_sums(const real* logits, const Index* labels, Index rows, Index columns, int group, int lanes,
                          real confidence, real share, real scale, real* losses, real* grad, double* loss_sum,
                          unsigned long long* correct) {
    Index place = threadIdx.x % group, groups = blockDim.x / group;
    LossAndHits sums = {0, 0};
    for (Index first = blockIdx.x * groups; first < rows; first += gridDim.x * groups) {
        Index i = first + threadIdx.x / group, end = columns;
        if (i >= rows) i = end = 0;  // nothing to do but to wait at the barriers
        const real* z = logits + i * columns;
        real* g = grad + i * columns;
        Index label = labels[i];
        Scored best = {z[0], 0};
        real total, shifted = 0;
        if (columns <= lanes) {
            real differences[8] = {}, powers[8] = {};
            for (int k = 0, j = place; k < 8; k++, j += group) {
                if (j >= end) break;
                differences[k] = z[j];
                best = FirstLargest()(best, Scored{z[j], j});
            }
            best = over_group(best, FirstLargest(), group);
            for (int k = 0, j = place; k < 8; k++, j += group) {
                if (j >= end) break;
                differences[k] -= best.score;
                powers[k] = exp(differences[k]);
            }
            total = over_group(over_terms(powers), Add(), group);
            if (share != 0) shifted = over_group(over_terms(differences), Add(), group);
            for (int k = 0, j = place; k < 8; k++, j += group) {
                if (j < end) g[j] = (powers[k] / total - share - (j == label ? confidence : (real)0)) * scale;
            }
        } else {
            for (Index j = place; j < end; j += group) best = FirstLargest()(best, Scored{z[j], (int)j});
            best = over_group(best, FirstLargest(), group);
            for (Index j = place; j < end; j += group) g[j] = exp(z[j] - best.score);
            total = over_lanes(place, group, lanes, end, [=](Index j) { return g[j]; });
            total = over_group(total, Add(), group);
            if (share != 0) {
                shifted = over_lanes(place, group, lanes, end, [=](Index j) { return z[j] - best.score; });
                shifted = over_group(shifted, Add(), group);
            }
            for (Index j = place; j < end; j += group) {
                g[j] = (g[j] / total - share - (j == label ? confidence : (real)0)) * scale;
            }
        }
        if (place == 0 && end > 0) {
            real log_total = log(total), loss = confidence * (log_total - (z[label] - best.score));
            if (share != 0) loss += share * (columns * log_total - shifted);  // 0 · ∞ would be NaN
            losses[i] = loss;
            sums.loss += loss;
            sums.hits += best.index == label && best.score == best.score;
        }
    }
    sums = over_block(sums, AddBoth());
    if (threadIdx.x != 0) return;
    if (gridDim.x == 1) *loss_sum = sums.loss;
    if (!correct) return;
    atomicAdd(correct, (unsigned long long)sums.hits);  // of integers, whose sum is the same in any order
    if (blockIdx.x == 0) atomicAdd(correct + 1, (unsigned long long)rows);
}

// The last Dense layer of a classifier with its loss, for few classes: cross_entropy with the logits h @ weight + row,
// whose gradient is multiplied by `scale`; count_correct, which is added to `correct` unless that is null; and grad_h =
// grad @ weightᵀ unless grad_h is null, 0 where h is 0 if `masked`. A block has 256 threads, and `warps` of its warps
// compute a row. At first, the lanes of a warp share the columns of h (`depth`); later, each class has two lanes.
const int MOST_CLASSES = 16;

template <typename T> __device__ T other_lane(T value, int distance) {
    return __shfl_xor_sync(0xffffffff, value, distance);
}

// Adds 2 · COUNT sums over two lanes, of which each keeps one half.
template <int COUNT> __device__ void halve_sums(real (&sums)[MOST_CLASSES], int lane) {
    bool upper = lane & 2 * COUNT;
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
        real given = upper ? sums[c] : sums[c + COUNT];
        sums[c] = (upper ? sums[c + COUNT] : sums[c]) + other_lane(given, 2 * COUNT);
    }
}

// The sum of sums[c] over the lanes of a warp, in lanes 2c and 2c + 1.
__device__ real class_sum(real (&sums)[MOST_CLASSES], int lane) {
    halve_sums<8>(sums, lane);
    halve_sums<4>(sums, lane);
    halve_sums<2>(sums, lane);
    halve_sums<1>(sums, lane);
    return sums[0] + other_lane(sums[0], 1);
}

// The sum over all classes, from the two lanes of each.
__device__ real over_classes(real value) {
    for (int distance = 2; distance < 32; distance *= 2) value += other_lane(value, distance);
    return value;
}

KERNEL dense_cross_entropy(const real* h, const real* weight, const real* row, const Index* labels, Index rows,
                           int depth, int classes, int warps, real confidence, real share, real scale, real* losses,
                           real* grad, unsigned long long* correct, real* grad_h, int masked) {
    __shared__ real parts[8][MOST_CLASSES];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % warps, c = lane / 2;
    Index i = blockIdx.x * (Index)(8 / warps) + warp / warps;
    int end = i < rows ? depth : 0;  // the warps of a row that is missing only wait for the others
    const real* x = h + i * depth;
    real sums[MOST_CLASSES] = {};
#pragma unroll 4
    for (int k = 32 * part + lane; k < end; k += 32 * warps) {
        real value = x[k];
#pragma unroll
        for (int m = 0; m < MOST_CLASSES; m++) sums[m] += value * (m < classes ? weight[k * classes + m] : (real)0);
    }
    real logit = class_sum(sums, lane);
    if (warps > 1) {
        parts[warp][c] = logit;
        __syncthreads();
        logit = 0;
        for (int other = warp - part; other < warp - part + warps; other++) logit += parts[other][c];
    }
    bool used = end > 0 && c < classes;
    if (used && row) logit += row[c];
    int label = end > 0 ? labels[i] : 0;
    real of_first = __shfl_sync(0xffffffff, logit, 0);
    Scored best = {used ? logit : of_first, used ? c : 0};
    for (int distance = 2; distance < 32; distance *= 2) {
        best = FirstLargest()(best, Scored{other_lane(best.score, distance), other_lane(best.index, distance)});
    }
    real difference = used ? logit - best.score : (real)0, power = used ? exp(difference) : (real)0;
    real total = over_classes(power), shifted = share != 0 ? over_classes(difference) : (real)0;
    real gradient = used ? (power / total - share - (c == label ? confidence : (real)0)) * scale : (real)0;
    real of_label = __shfl_sync(0xffffffff, difference, 2 * label);
    if (used && part == 0 && lane % 2 == 0) grad[i * classes + c] = gradient;
    if (end > 0 && part == 0 && lane == 0) {
        real log_total = log(total), loss = confidence * (log_total - of_label);
        losses[i] = share != 0 ? loss + share * (classes * log_total - shifted) : loss;  // 0 · ∞ would be NaN
        bool hit = best.index == label && best.score == best.score;
        if (correct && hit) atomicAdd(correct, 1ull);  // of integers, whose sum is the same in any order
        if (correct && i == 0) atomicAdd(correct + 1, (unsigned long long)rows);
    }
    if (!grad_h) return;
    real gradients[MOST_CLASSES];
#pragma unroll
    for (int m = 0; m < MOST_CLASSES; m++) gradients[m] = __shfl_sync(0xffffffff, gradient, 2 * m);
#pragma unroll 4
    for (int k = 32 * part + lane; k < end; k += 32 * warps) {
        real sum = 0;
#pragma unroll
        for (int m = 0; m < MOST_CLASSES; m++) sum += gradients[m] * (m < classes ? weight[k * classes + m] : (real)0);
        grad_h[i * depth + k] = masked ? WhereNotZero()(sum, x[k]) : sum;
    }
}

// out = (x - μ) / σ in each row, with σ = √(variance + epsilon).
KERNEL normalize_rows(const real* x, Index rows, Index columns, double epsilon, real* out, real* sigma) {
    FOR_EACH_ROW(i, rows) {
        const real* row = x + i * columns;
        double sum = 0, squares = 0;
        FOR_EACH_COLUMN(j, columns) sum += row[j];
        double mean = over_block(sum, Add()) / columns;
        FOR_EACH_COLUMN(j, columns) squares += (row[j] - mean) * (row[j] - mean);
        double deviation = sqrt(over_block(squares, Add()) / columns + epsilon);
        FOR_EACH_COLUMN(j, columns) out[i * columns + j] = (row[j] - mean) / deviation;
        if (threadIdx.x == 0) sigma[i] = deviation;
    }
}

// out = (g - mean(g) - x̂ · mean(g · x̂)) / σ in each row, with x̂ = normal. out may be grad.
KERNEL normalize_rows_grad(const real* grad, const real* normal, const real* sigma, Index rows, Index columns,
                           real* out) {
    FOR_EACH_ROW(i, rows) {
        const real *g = grad + i * columns, *x = normal + i * columns;
        double sum = 0, products = 0, first = g[0];
        FOR_EACH_COLUMN(j, columns) {
            sum += g[j];
            products += (g[j] - first) * x[j];  // mean(first · x̂) is 0, but not for a rounded x̂
        }
        double mean = over_block(sum, Add()) / columns, slope = over_block(products, Add()) / columns;
        FOR_EACH_COLUMN(j, columns) out[i * columns + j] = (g[j] - mean - x[j] * slope) / sigma[i];
    }
}

// out = x / σ in each row, with σ = √(mean(x²) + epsilon).
KERNEL scale_rows(const real* x, Index rows, Index columns, double epsilon, real* out, real* sigma) {
    FOR_EACH_ROW(i, rows) {
        const real* row = x + i * columns;
        double squares = 0;
        FOR_EACH_COLUMN(j, columns) squares += (double)row[j] * row[j];
        double size = sqrt(over_block(squares, Add()) / columns + epsilon);
        FOR_EACH_COLUMN(j, columns) out[i * columns + j] = row[j] / size;
        if (threadIdx.x == 0) sigma[i] = size;
    }
}

// out = (g - x̂ · mean(g · x̂)) / σ in each row, with x̂ = normal. out may be grad.
KERNEL scale_rows_grad(const real* grad, const real* normal, const real* sigma, Index rows, Index columns, real* out) {
    FOR_EACH_ROW(i, rows) {
        const real *g = grad + i * columns, *x = normal + i * columns;
        double products = 0;
        FOR_EACH_COLUMN(j, columns) products += (double)g[j] * x[j];
        double slope = over_block(products, Add()) / columns;
        FOR_EACH_COLUMN(j, columns) out[i * columns + j] = (g[j] - x[j] * slope) / sigma[i];
    }
}

// Normalized rows with gamma and beta, each of which may be null. Each of the 8 warps of a block computes a row at a time.
// If the rows are not `centered`, their mean counts as 0.

__device__ double over_warp(double value) {
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
    return value;
}

// work(row, columns) for each row of this warp. A warp without a row makes the same calls, but without columns: in the
// emulation of the tests, shuffles wait for the whole block.
template <typename Work> __device__ void for_each_row_of_warp(Index rows, Index columns, Work work) {
    for (Index first = blockIdx.x * (Index)8; first < rows; first += gridDim.x * (Index)8) {
        Index row = first + threadIdx.x / 32;
        if (row < rows) work(row, columns);
        else work((Index)0, (Index)0);
    }
}

#define FOR_EACH_OF_WARP(j, columns, width) \
    for (Index j = threadIdx.x % 32 * width; j < (columns); j += 32 * width)

template <int WIDTH>
__device__ void normalize_and_scale_by(const real* x, bool centered, Index rows, Index columns, double epsilon,
                                       const real* gamma, const real* beta, real* normal, real* sigma, real* out) {
    for_each_row_of_warp(rows, columns, [=](Index row, Index end) {
        Index start = row * columns;
        double origin = centered ? (double)x[start] : 0.0, sum = 0, squares = 0;  // so that equal numbers give 0
        FOR_EACH_OF_WARP(j, end, WIDTH) {
            Vector<real, WIDTH> values = load<WIDTH>(x + start + j);
            for (int k = 0; k < WIDTH; k++) sum += values.at[k] - origin;
        }
        double mean = centered ? over_warp(sum) / columns : 0.0;
        FOR_EACH_OF_WARP(j, end, WIDTH) {
            Vector<real, WIDTH> values = load<WIDTH>(x + start + j);
            for (int k = 0; k < WIDTH; k++) squares += (values.at[k] - origin - mean) * (values.at[k] - origin - mean);
        }
        double size = sqrt(over_warp(squares) / columns + epsilon), inverse = 1 / size;
        FOR_EACH_OF_WARP(j, end, WIDTH) {
            Vector<real, WIDTH> values = load<WIDTH>(x + start + j), factors, terms;
            if (gamma) factors = load<WIDTH>(gamma + j);
            if (beta) terms = load<WIDTH>(beta + j);
            for (int k = 0; k < WIDTH; k++) values.at[k] = (values.at[k] - origin - mean) * inverse;
            store(normal + start + j, values);
            for (int k = 0; k < WIDTH && gamma; k++) values.at[k] *= factors.at[k];
            for (int k = 0; k < WIDTH && beta; k++) values.at[k] += terms.at[k];
            store(out + start + j, values);
        }
        if (end > 0 && threadIdx.x % 32 == 0) sigma[row] = size;
    });
}

KERNEL normalize_and_scale(const real* x, int centered, Index rows, Index columns, int width, double epsilon,
                           const real* gamma, const real* beta, real* normal, real* sigma, real* out) {
    if (width == 4) {
        normalize_and_scale_by<4>(x, centered != 0, rows, columns, epsilon, gamma, beta, normal, sigma, out);
    } else {
        normalize_and_scale_by<1>(x, centered != 0, rows, columns, epsilon, gamma, beta, normal, sigma, out);
    }
}

// The gradient of x, with h = grad · gamma: out = (h - mean(h) - x̂ · mean(h · x̂)) / σ.
template <int WIDTH>
__device__ void normalize_and_scale_grad_by(const real* grad, bool centered, Index rows, Index columns,
                                            const real* gamma, const real* normal, const real* sigma, real* out) {
    for_each_row_of_warp(rows, columns, [=](Index row, Index end) {
        Index start = row * columns;
        auto scaled = [=](Index j) {
            Vector<real, WIDTH> h = load<WIDTH>(grad + start + j), factors;
            if (gamma) factors = load<WIDTH>(gamma + j);
            for (int k = 0; k < WIDTH && gamma; k++) h.at[k] *= factors.at[k];
            return h;
        };
        double sum = 0, products = 0, origin = 0;
        if (centered) origin = grad[start] * (gamma ? gamma[0] : (real)1);
        FOR_EACH_OF_WARP(j, end, WIDTH) {
            Vector<real, WIDTH> h = scaled(j), unit = load<WIDTH>(normal + start + j);
            for (int k = 0; k < WIDTH; k++) {
                sum += h.at[k];
                products += (h.at[k] - origin) * unit.at[k];  // mean(origin · x̂) is 0, but not for a rounded x̂
            }
        }
        double mean = centered ? over_warp(sum) / columns : 0.0, slope = over_warp(products) / columns;
        double inverse = 1 / (double)sigma[row];
        FOR_EACH_OF_WARP(j, end, WIDTH) {
            Vector<real, WIDTH> h = scaled(j), unit = load<WIDTH>(normal + start + j);
            for (int k = 0; k < WIDTH; k++) h.at[k] = (h.at[k] - mean - unit.at[k] * slope) * inverse;
            store(out + start + j, h);
        }
    });
}

KERNEL normalize_and_scale_grad(const real* grad, int centered, Index rows, Index columns, int width,
                                const real* gamma, const real* normal, const real* sigma, real* out) {
    if (width == 4) {
        normalize_and_scale_grad_by<4>(grad, centered != 0, rows, columns, gamma, normal, sigma, out);
    } else {
        normalize_and_scale_grad_by<1>(grad, centered != 0, rows, columns, gamma, normal, sigma, out);
    }
}

// Sums over the rows -------------------------------------------------------------------------------------------------
// Each thread sums every blockDim.y-th of part_rows rows, of WIDTH columns. The block that finishes last of those with
// the same columns adds the sums of all parts in their order. `tickets` counts the finished blocks; it is 0 between
// kernels. A block has 256 threads, of which a power of two, at most 32, side by side.

template <int COUNT> struct alignas(COUNT % 2 ? 8 : 16) Sums {
    double at[COUNT];
    __device__ void operator+=(const Sums& others) {
        for (int k = 0; k < COUNT; k++) at[k] += others.at[k];
    }
};

// The sums over threadIdx.y, complete where that is 0. All threads of the block must call it.
template <int COUNT> __device__ Sums<COUNT> over_thread_rows(Sums<COUNT> sums) {
    __shared__ Sums<COUNT> of_warps[8][32];
    int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int lanes = blockDim.x; lanes < 32; lanes *= 2) {
        for (int k = 0; k < COUNT; k++) sums.at[k] += __shfl_xor_sync(0xffffffff, sums.at[k], lanes);
    }
    if (thread % 32 < blockDim.x) of_warps[thread / 32][threadIdx.x] = sums;
    __syncthreads();
    for (int warp = 1; warp < 8 && thread < blockDim.x; warp++) sums += of_warps[warp][threadIdx.x];
    __syncthreads();
    return sums;
}

// Whether all other blocks with the same columns have stored their parts, which can then be read.
__device__ bool is_last_block(Word* ticket) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) last = atomicInc(ticket, gridDim.y - 1) == gridDim.y - 1;
    __syncthreads();
    __threadfence();
    return last;
}

// finish(j, sums) with the sums of add(i, j, load(i, j), sums) over all rows i, for columns j to j + WIDTH - 1.
template <int WIDTH, int COUNT, typename Load, typename AddRow, typename Finish>
__device__ void sum_over_rows(Index rows, Index columns, Index part_rows, double* parts, Word* tickets, Load load,
                              AddRow add, Finish finish) {
    const int BATCH = 4;  // rows that are loaded before they are added
    Index vector = blockIdx.x * (Index)blockDim.x + threadIdx.x, vectors = gridDim.x * (Index)blockDim.x;
    Index j = vector * WIDTH, first = blockIdx.y * part_rows, step = blockDim.y;
    Index end = first + part_rows < rows ? first + part_rows : rows;
    if (j >= columns) end = 0;
    Sums<COUNT> sums = {};
    for (Index i = first + threadIdx.y; i < end; i += BATCH * step) {
        decltype(load(i, j)) loaded[BATCH];
        for (int b = 0; b < BATCH; b++) {
            if (i + b * step < end) loaded[b] = load(i + b * step, j);
        }
        for (int b = 0; b < BATCH; b++) {
            if (i + b * step < end) add(i + b * step, j, loaded[b], sums);
        }
    }
    sums = over_thread_rows(sums);
    if (gridDim.y > 1) {
        Sums<COUNT>* part_sums = (Sums<COUNT>*)parts;
        if (threadIdx.y == 0) {
            part_sums[blockIdx.y * vectors + vector] = sums;
            __threadfence();
        }
        if (!is_last_block(tickets + blockIdx.x)) return;
        sums = Sums<COUNT>();
        for (int i = threadIdx.y; i < gridDim.y; i += blockDim.y) sums += part_sums[i * vectors + vector];
        sums = over_thread_rows(sums);
    }
    if (threadIdx.y == 0 && j < columns) finish(j, sums);
}

template <int WIDTH> __device__ void store_sums(real* to, const Sums<WIDTH>& sums) {
    for (int k = 0; k < WIDTH; k++) to[k] = sums.at[k];
}

// Calls a template with the width 4 or 1.
#define WITH_WIDTH(width, function, ...) \
    do { \
        if (width == 4) function<4>(__VA_ARGS__); \
        else function<1>(__VA_ARGS__); \
    } while (0)

// Calls a function with the width 8 or 1, and with the class of numbers of 16 bits.
template <typename Function> __device__ void in_16_bits(int bfloat16, int width, Function function) {
    if (bfloat16 && width == 8) function(Width<8>(), Bfloat16());
    else if (bfloat16) function(Width<1>(), Bfloat16());
    else if (width == 8) function(Width<8>(), Float16());
    else function(Width<1>(), Float16());
}

template <typename Number> struct SumRows {
    typedef typename Number::Stored Stored;

    template <int WIDTH>
    static __device__ void by(const Stored* a, Index rows, Index columns, Index part_rows, double* parts, Word* tickets,
                              real* out) {
        auto load_row = [=](Index i, Index j) { return load<WIDTH>(a + i * columns + j); };
        auto add = [](Index, Index, const Vector<Stored, WIDTH>& x, Sums<WIDTH>& sums) {
            for (int k = 0; k < WIDTH; k++) sums.at[k] += Number::value(x.at[k]);
        };
        auto finish = [=](Index j, const Sums<WIDTH>& sums) { store_sums(out + j, sums); };
        sum_over_rows<WIDTH, WIDTH>(rows, columns, part_rows, parts, tickets, load_row, add, finish);
    }
};

KERNEL sum_rows(const real* a, Index rows, Index columns, Index part_rows, int width, double* parts, Word* tickets,
                real* out) {
    WITH_WIDTH(width, SumRows<Exact>::by, a, rows, columns, part_rows, parts, tickets, out);
}

KERNEL sum_rows_in_16_bits(const unsigned short* a, int bfloat16, Index rows, Index columns, Index part_rows, int width,
                           double* parts, Word* tickets, real* out) {
    in_16_bits(bfloat16, width, [=](auto width, auto number) {
        SumRows<decltype(number)>::template by<decltype(width)::value>(a, rows, columns, part_rows, parts, tickets,
                                                                       out);
    });
}

template <int WIDTH> struct Pair {
    Vector<real, WIDTH> a, b;
};

template <int WIDTH> __device__ Pair<WIDTH> load_pair(const real* a, const real* b) {
    return {load<WIDTH>(a), load<WIDTH>(b)};
}

template <typename Number> struct ReluGradSumRows {
    typedef typename Number::Stored Stored;

    template <int WIDTH>
    static __device__ void by(const Stored* grad, const Stored* y, Index rows, Index columns, Index part_rows,
                              double* parts, Word* tickets, Stored* out, real* sums) {
        struct Loaded {
            Vector<Stored, WIDTH> grad, y;
        };
        auto load_row = [=](Index i, Index j) {
            return Loaded{load<WIDTH>(grad + i * columns + j), load<WIDTH>(y + i * columns + j)};
        };
        auto add = [=](Index i, Index j, Loaded& row, Sums<WIDTH>& sums) {
            for (int k = 0; k < WIDTH; k++) {
                real g = WhereNotZero()(Number::value(row.grad.at[k]), Number::value(row.y.at[k]));
                sums.at[k] += g;
                row.grad.at[k] = Number::masked(row.grad.at[k], g);
            }
            store(out + i * columns + j, row.grad);
        };
        auto finish = [=](Index j, const Sums<WIDTH>& total) { store_sums(sums + j, total); };
        sum_over_rows<WIDTH, WIDTH>(rows, columns, part_rows, parts, tickets, load_row, add, finish);
    }
};

KERNEL relu_grad_sum_rows(const real* grad, const real* y, Index rows, Index columns, Index part_rows, int width,
                          double* parts, Word* tickets, real* out, real* sums) {
    WITH_WIDTH(width, ReluGradSumRows<Exact>::by, grad, y, rows, columns, part_rows, parts, tickets, out, sums);
}

KERNEL relu_grad_sum_rows_in_16_bits(const unsigned short* grad, const unsigned short* y, int bfloat16, Index rows,
                                     Index columns, Index part_rows, int width, double* parts, Word* tickets,
                                     unsigned short* out, real* sums) {
    in_16_bits(bfloat16, width, [=](auto width, auto number) {
        ReluGradSumRows<decltype(number)>::template by<decltype(width)::value>(grad, y, rows, columns, part_rows, parts,
                                                                               tickets, out, sums);
    });
}

// `center` of the sums of products may be null, for 0.
__device__ real center_at(const real* center, Index j) { return center ? center[j] : (real)0; }

template <int WIDTH>
__device__ void sum_products_by(const real* a, const real* b, const real* center, Index rows, Index columns,
                                Index part_rows, double* parts, Word* tickets, real* out) {
    auto load_row = [=](Index i, Index j) { return load_pair<WIDTH>(a + i * columns + j, b + i * columns + j); };
    auto add = [=](Index, Index j, const Pair<WIDTH>& x, Sums<WIDTH>& sums) {
        for (int k = 0; k < WIDTH; k++) sums.at[k] += (double)x.a.at[k] * ((double)x.b.at[k] - center_at(center, j + k));
    };
    auto finish = [=](Index j, const Sums<WIDTH>& sums) { store_sums(out + j, sums); };
    sum_over_rows<WIDTH, WIDTH>(rows, columns, part_rows, parts, tickets, load_row, add, finish);
}

KERNEL sum_products(const real* a, const real* b, const real* center, Index rows, Index columns, Index part_rows,
                    int width, double* parts, Word* tickets, real* out) {
    WITH_WIDTH(width, sum_products_by, a, b, center, rows, columns, part_rows, parts, tickets, out);
}

template <int WIDTH>
__device__ void sum_rows_and_products_by(const real* a, const real* b, const real* center, Index rows, Index columns,
                                         Index part_rows, double* parts, Word* tickets, real* sums, real* products) {
    auto load_row = [=](Index i, Index j) { return load_pair<WIDTH>(a + i * columns + j, b + i * columns + j); };
    auto add = [=](Index, Index j, const Pair<WIDTH>& x, Sums<2 * WIDTH>& totals) {
        for (int k = 0; k < WIDTH; k++) {
            totals.at[k] += x.a.at[k];
            totals.at[WIDTH + k] += (double)x.a.at[k] * ((double)x.b.at[k] - center_at(center, j + k));
        }
    };
    auto finish = [=](Index j, const Sums<2 * WIDTH>& totals) {
        for (int k = 0; k < WIDTH; k++) {
            sums[j + k] = totals.at[k];
            products[j + k] = totals.at[WIDTH + k];
        }
    };
    sum_over_rows<WIDTH, 2 * WIDTH>(rows, columns, part_rows, parts, tickets, load_row, add, finish);
}

KERNEL sum_rows_and_products(const real* a, const real* b, const real* center, Index rows, Index columns,
                             Index part_rows, int width, double* parts, Word* tickets, real* sums, real* products) {
    WITH_WIDTH(width, sum_rows_and_products_by, a, b, center, rows, columns, part_rows, parts, tickets, sums, products);
}

// By Σ d and Σ d² with d = x - x[0]. x[0] is close enough to the mean for one pass.
template <int WIDTH>
__device__ void moments_by(const real* x, Index rows, Index columns, Index part_rows, double* parts, Word* tickets,
                           real* mean, real* variance) {
    auto load_row = [=](Index i, Index j) { return load<WIDTH>(x + i * columns + j); };
    auto add = [=](Index, Index j, const Vector<real, WIDTH>& value, Sums<2 * WIDTH>& sums) {
        for (int k = 0; k < WIDTH; k++) {
            double d = (double)value.at[k] - x[j + k];
            sums.at[k] += d;
            sums.at[WIDTH + k] += d * d;
        }
    };
    auto finish = [=](Index j, const Sums<2 * WIDTH>& sums) {
        for (int k = 0; k < WIDTH; k++) {
            double d = sums.at[k] / rows, spread = sums.at[WIDTH + k] / rows - d * d;
            mean[j + k] = x[j + k] + d;
            variance[j + k] = spread < 0 ? 0 : spread;
        }
    };
    sum_over_rows<WIDTH, 2 * WIDTH>(rows, columns, part_rows, parts, tickets, load_row, add, finish);
}

KERNEL moments(const real* x, Index rows, Index columns, Index part_rows, int width, double* parts, Word* tickets,
               real* mean, real* variance) {
    WITH_WIDTH(width, moments_by, x, rows, columns, part_rows, parts, tickets, mean, variance);
}

// out = Σ x in double, by a single block.
KERNEL sum_to(const real* x, Index n, double* out) {
    double sum = 0;
    FOR_EACH_COLUMN(i, n) sum += x[i];
    sum = over_block(sum, Add());
    if (threadIdx.x == 0) *out = sum;
}

// Windows over images ------------------------------------------------------------------------------------------------

struct Windows {  // as in ../reference/windows.py: pairs are (vertical, horizontal)
    int image[2], grid[2], kernel[2], strides[2], dilation[2], before[2];
};

// The pixel under cell `a` of window i along one axis. It may be outside of the image.
__device__ int pixel_under(const Windows& windows, int axis, int i, int a) {
    return i * windows.strides[axis] + a * windows.dilation[axis] - windows.before[axis];
}

// The window whose cell `a` covers pixel h along one axis, or -1.
__device__ int window_over(const Windows& windows, int axis, int h, int a) {
    int i = h + windows.before[axis] - a * windows.dilation[axis], stride = windows.strides[axis];
    if (i < 0) return -1;
    if (stride > 1) {
        if (i % stride) return -1;
        i /= stride;
    }
    return i < windows.grid[axis] ? i : -1;
}

__device__ bool on_image(const Windows& windows, int h, int w) {
    return 0 <= h && h < windows.image[0] && 0 <= w && w < windows.image[1];
}

// The kernels below count in vectors of `width` channels. axes: of the array that a kernel makes, with the number of
// vectors as the last one. All arrays have fewer than 2^31 elements.

// out[pixel] = Σ term(window, cell, first channel) over all cells of windows that cover the pixel. distance: the
// elements from one pixel of out to the next, since out may be some channels of larger images.
template <int WIDTH, typename Term>
__device__ void sum_over_cells(const Windows& windows, const Axes& axes, Word n, Word distance, real* out, Term term) {
    const int BATCH = 3;  // cells whose terms are loaded before they are added
    FOR_EACH_WORD(element, n) {
        Word image = element;
        int c = WIDTH * pop(image, axes.sizes[4]);
        Word pixel = image;
        int w = pop(image, axes.sizes[3]), h = pop(image, axes.sizes[2]);
        Vector<real, WIDTH> sum = {};
        for (int a = 0; a < windows.kernel[0]; a++) {
            int i = window_over(windows, 0, h, a);
            for (int first = 0; first < windows.kernel[1] && i >= 0; first += BATCH) {
                Vector<real, WIDTH> terms[BATCH] = {};
                for (int b = first; b < first + BATCH; b++) {
                    int j = b < windows.kernel[1] ? window_over(windows, 1, w, b) : -1;
                    Word window = (image * windows.grid[0] + i) * windows.grid[1] + j;
                    if (j >= 0) terms[b - first] = term(window, a * windows.kernel[1] + b, c);
                }
                for (int b = 0; b < BATCH; b++) {
                    for (int k = 0; k < WIDTH; k++) sum.at[k] += terms[b].at[k];
                }
            }
        }
        store(out + pixel * distance + c, sum);
    }
}

// visit(pixel, cell) for every pixel on the image under this window.
template <typename Visit>
__device__ void pixels_under(const Windows& windows, Word image, int i, int j, Visit visit) {
    for (int a = 0; a < windows.kernel[0]; a++) {
        int h = pixel_under(windows, 0, i, a);
        for (int b = 0; b < windows.kernel[1] && 0 <= h && h < windows.image[0]; b++) {
            int w = pixel_under(windows, 1, j, b);
            Word pixel = (image * windows.image[0] + h) * windows.image[1] + w;
            if (0 <= w && w < windows.image[1]) visit(pixel, a * windows.kernel[1] + b);
        }
    }
}

// Each thread makes COUNT neighboring vectors.
template <int WIDTH, int COUNT>
__device__ void im2col_by(const real* images, Word distance, Word n, const Windows& windows, const Axes& axes,
                          real* out) {
    FOR_EACH_WORD(group, n) {
        Vector<real, WIDTH * COUNT> values = {};
        for (int m = 0; m < COUNT; m++) {
            Word image = COUNT * group + m;
            int c = WIDTH * pop(image, axes.sizes[4]), b = pop(image, axes.sizes[3]), a = pop(image, axes.sizes[2]);
            int j = pop(image, axes.sizes[1]), i = pop(image, axes.sizes[0]);
            int h = pixel_under(windows, 0, i, a), w = pixel_under(windows, 1, j, b);
            Word pixel = (image * windows.image[0] + h) * windows.image[1] + w;
            if (!on_image(windows, h, w)) continue;
            Vector<real, WIDTH> vector = load<WIDTH>(images + pixel * distance + c);
            for (int k = 0; k < WIDTH; k++) values.at[m * WIDTH + k] = vector.at[k];
        }
        store(out + WIDTH * COUNT * group, values);
    }
}

KERNEL im2col(const real* images, Word distance, Word n, Windows windows, Axes axes, int width, real* out) {
    if (width == 4) im2col_by<4, 1>(images, distance, n, windows, axes, out);
    else im2col_by<1, 1>(images, distance, n, windows, axes, out);
}

// im2col for channels that cannot be loaded as vectors: only the stores are grouped. n: the number of groups.
KERNEL im2col_of_few(const real* images, Word distance, Word n, Windows windows, Axes axes, real* out) {
    im2col_by<1, 4>(images, distance, n, windows, axes, out);
}

template <int WIDTH>
__device__ void col2im_by(const real* patches, Word n, const Windows& windows, const Axes& axes, Word distance,
                          real* images) {
    int cells = windows.kernel[0] * windows.kernel[1], channels = WIDTH * axes.sizes[4].n;
    sum_over_cells<WIDTH>(windows, axes, n, distance, images, [=](Word window, int cell, int c) {
        return load<WIDTH>(patches + (window * cells + cell) * channels + c);
    });
}

KERNEL col2im(const real* patches, Word n, Windows windows, Axes axes, int width, Word distance, real* images) {
    WITH_WIDTH(width, col2im_by, patches, n, windows, axes, distance, images);
}

// out: the largest number of x + row under each window, after ReLU if `relu`. choice: its cell. row may be null.
template <int WIDTH, typename Choice>
__device__ void max_pool_by(const real* x, const real* row, bool relu, Word n, const Windows& windows, const Axes& axes,
                            real* out, Choice* choice) {
    const int BATCH = 4;  // cells whose pixels are loaded before they are compared
    int channels = WIDTH * axes.sizes[4].n;
    FOR_EACH_WORD(element, n) {
        Word image = element;
        int c = WIDTH * pop(image, axes.sizes[4]), j = pop(image, axes.sizes[3]), i = pop(image, axes.sizes[2]);
        Vector<real, WIDTH> best = {}, bias = {};
        Vector<Choice, WIDTH> chosen = {};
        if (row) bias = load<WIDTH>(row + c);
        int cells = windows.kernel[0] * windows.kernel[1], a = 0, b = 0;
        bool none = true;
        for (int first = 0; first < cells; first += BATCH) {
            Vector<real, WIDTH> values[BATCH];
            bool covered[BATCH];
            for (int m = 0; m < BATCH; m++) {
                int h = pixel_under(windows, 0, i, a), w = pixel_under(windows, 1, j, b);
                Word pixel = (image * windows.image[0] + h) * windows.image[1] + w;
                covered[m] = first + m < cells && on_image(windows, h, w);
                if (covered[m]) values[m] = load<WIDTH>(x + pixel * channels + c);
                if (++b == windows.kernel[1]) b = 0, a++;
            }
            for (int m = 0; m < BATCH; m++) {
                for (int k = 0; k < WIDTH && covered[m]; k++) {
                    real value = row ? values[m].at[k] + bias.at[k] : values[m].at[k];  // -0 + 0 would be 0
                    // NaN wins; of equal numbers, the first.
                    if (none || (!(value <= best.at[k]) && best.at[k] == best.at[k])) {
                        best.at[k] = value;
                        chosen.at[k] = first + m;
                    }
                }
                none = none && !covered[m];
            }
        }
        for (int k = 0; k < WIDTH && relu; k++) best.at[k] = PositivePart()(best.at[k]);
        store(out + WIDTH * element, best);
        store(choice + WIDTH * element, chosen);
    }
}

// `choice` has elements of 1 or 4 bytes.
KERNEL max_pool(const real* x, const real* row, int relu, Word n, Windows windows, Axes axes, int width, real* out,
                void* choice, int choice_bytes) {
    if (choice_bytes == 1) WITH_WIDTH(width, max_pool_by, x, row, relu, n, windows, axes, out, (Byte*)choice);
    else WITH_WIDTH(width, max_pool_by, x, row, relu, n, windows, axes, out, (int*)choice);
}

// grad · [y ≠ 0], or grad if y is null.
template <int WIDTH> __device__ Vector<real, WIDTH> masked(const real* grad, const real* y, Word at) {
    Vector<real, WIDTH> g = load<WIDTH>(grad + at);
    if (y) {
        Vector<real, WIDTH> mask = load<WIDTH>(y + at);
        for (int k = 0; k < WIDTH; k++) g.at[k] = WhereNotZero()(g.at[k], mask.at[k]);
    }
    return g;
}

template <int WIDTH, typename Choice>
__device__ Vector<real, WIDTH> where_chosen(const Vector<real, WIDTH>& grad, const Vector<Choice, WIDTH>& chosen,
                                            int cell) {
    Vector<real, WIDTH> result;
    for (int k = 0; k < WIDTH; k++) result.at[k] = chosen.at[k] == cell ? grad.at[k] : (real)0;
    return result;
}

template <int WIDTH, typename Choice>
__device__ void max_pool_grad_by(const real* grad, const real* y, const Choice* choice, Word n, const Windows& windows,
                                 const Axes& axes, real* out) {
    int channels = WIDTH * axes.sizes[4].n;
    sum_over_cells<WIDTH>(windows, axes, n, channels, out, [=](Word window, int cell, int c) {
        Word at = window * channels + c;
        return where_chosen(masked<WIDTH>(grad, y, at), load<WIDTH>(choice + at), cell);
    });
}

// The gradient of max_pool with respect to x, of its ReLU if y, what that returned, is given.
KERNEL max_pool_grad(const real* grad, const real* y, const void* choice, int choice_bytes, Word n, Windows windows,
                     Axes axes, int width, real* out) {
    if (choice_bytes == 1) WITH_WIDTH(width, max_pool_grad_by, grad, y, (const Byte*)choice, n, windows, axes, out);
    else WITH_WIDTH(width, max_pool_grad_by, grad, y, (const int*)choice, n, windows, axes, out);
}

template <int WIDTH, typename Choice>
__device__ void adjacent_max_pool_grad_by(const real* grad, const real* y, const Choice* choice, Word n,
                                          const Windows& windows, const Axes& axes, real* out) {
    int channels = WIDTH * axes.sizes[4].n;
    FOR_EACH_WORD(element, n) {
        Word image = element;
        int c = WIDTH * pop(image, axes.sizes[4]), j = pop(image, axes.sizes[3]), i = pop(image, axes.sizes[2]);
        Vector<real, WIDTH> g = {};
        Vector<Choice, WIDTH> chosen = {};
        if (i < windows.grid[0] && j < windows.grid[1]) {
            Word at = ((image * windows.grid[0] + i) * windows.grid[1] + j) * channels + c;
            g = masked<WIDTH>(grad, y, at);
            chosen = load<WIDTH>(choice + at);
        }
        pixels_under(windows, image, i, j, [&](Word pixel, int cell) {
            store(out + pixel * channels + c, where_chosen(g, chosen, cell));
        });
    }
}

// max_pool_grad for windows without gaps, overlap or padding. n and axes include windows that the grid leaves out
// because they are only partly on the image.
KERNEL adjacent_max_pool_grad(const real* grad, const real* y, const void* choice, int choice_bytes, Word n,
                              Windows windows, Axes axes, int width, real* out) {
    const Byte* choices = (const Byte*)choice;
    if (choice_bytes == 1) WITH_WIDTH(width, adjacent_max_pool_grad_by, grad, y, choices, n, windows, axes, out);
    else WITH_WIDTH(width, adjacent_max_pool_grad_by, grad, y, (const int*)choice, n, windows, axes, out);
}

template <int WIDTH>
__device__ void sum_pool_by(const real* x, Word n, const Windows& windows, const Axes& axes, real* out) {
    int channels = WIDTH * axes.sizes[4].n;
    FOR_EACH_WORD(element, n) {
        Word image = element;
        int c = WIDTH * pop(image, axes.sizes[4]), j = pop(image, axes.sizes[3]), i = pop(image, axes.sizes[2]);
        Sums<WIDTH> sums = {};
        pixels_under(windows, image, i, j, [&](Word pixel, int) {
            Vector<real, WIDTH> values = load<WIDTH>(x + pixel * channels + c);
            for (int k = 0; k < WIDTH; k++) sums.at[k] += values.at[k];
        });
        store_sums(out + WIDTH * element, sums);
    }
}

KERNEL sum_pool(const real* x, Word n, Windows windows, Axes axes, int width, real* out) {
    WITH_WIDTH(width, sum_pool_by, x, n, windows, axes, out);
}

template <int WIDTH>
__device__ void sum_pool_grad_by(const real* grad, Word n, const Windows& windows, const Axes& axes, real* out) {
    int channels = WIDTH * axes.sizes[4].n;
    sum_over_cells<WIDTH>(windows, axes, n, channels, out, [=](Word window, int, int c) {
        return load<WIDTH>(grad + window * channels + c);
    });
}

KERNEL sum_pool_grad(const real* grad, Word n, Windows windows, Axes axes, int width, real* out) {
    WITH_WIDTH(width, sum_pool_grad_by, grad, n, windows, axes, out);
}

// Random numbers -----------------------------------------------------------------------------------------------------

KERNEL random_bits(const double* word, Index first_row, Index n, Index columns, Word* out) {
    FOR_EACH(i, n) out[i] = random_word((Word)*word, first_row + quotient(i, columns), remainder_of(i, columns));
}

KERNEL dropout_mask(const double* word, Index first_row, Index n, Index columns, Word threshold, real kept, real* out) {
    FOR_EACH(i, n) {
        Word bits = random_word((Word)*word, first_row + quotient(i, columns), remainder_of(i, columns));
        out[i] = bits >= threshold ? kept : (real)0;
    }
}

// Updates of the flat vectors, whose formulas are in optimizers.py ---------------------------------------------------
// mask: 0 for a frozen element, 1 for a trained one, 2 for one with weight decay; null if all are 1.  numbers: the
// factor of the weight and the part of the weight that is added to the gradient, both for weight decay; then the
// optimizer's own.  gate: 0 for no update at all. The first `updating` blocks update. If the update is the last kernel
// of a captured step, the others gather the samples of the next one; otherwise, step.counters is null.  copy: the new
// weights in 16 bits, or null.

// Updates WIDTH weights from w[at] on, and as many elements of `first` and `second` unless these are null.
template <int WIDTH, typename Rule>
__device__ void update_group(real* w, const real* g, real* first, real* second, const Byte* mask, Index at, real shrink,
                             real decay, const Copy& copy, Rule rule) {
    Vector<real, WIDTH> weights = load<WIDTH>(w + at), gradients = load<WIDTH>(g + at), a = {}, b = {};
    Vector<Byte, WIDTH> kinds;
    if (mask) kinds = load<WIDTH>(mask + at);
    if (first) a = load<WIDTH>(first + at);
    if (second) b = load<WIDTH>(second + at);
    for (int k = 0; k < WIDTH; k++) {
        if (mask && !kinds.at[k]) continue;
        real weight = weights.at[k], gradient = gradients.at[k];
        if (mask && kinds.at[k] == 2) {
            gradient += decay * weight;
            weight *= shrink;
        }
        weights.at[k] = weight - rule(gradient, a.at[k], b.at[k]);
    }
    store(w + at, weights);
    if (copy.to) copy.keep(at, weights);
    if (first) store(first + at, a);
    if (second) store(second + at, b);
}

template <typename Rule>
__device__ void update(real* w, const real* g, real* first, real* second, const Byte* mask, Index n,
                       const double* numbers, const double* gate, const Copy& copy, int updating, const Step& step,
                       Rule rule) {
    real shrink = numbers[0], decay = numbers[1];
    bool skipped = gate && *gate == 0;
    Index next = step.counters ? step.counters[1] + step.rows : 0;
    Word before = blocks_before(step);
    if (blockIdx.x >= updating) {
        gather_samples(step, next, blockIdx.x - updating, gridDim.x - updating);
    } else if (!skipped) {
        bool vectors = aligned(w) && aligned(g) && aligned(first) && aligned(second) && aligned(mask);
        vectors = vectors && aligned(copy.to);
        Index whole = vectors ? n / 4 * 4 : 0;
        FOR_EACH_OF_BLOCK(i, whole / 4, blockIdx.x, updating) {
            update_group<4>(w, g, first, second, mask, 4 * i, shrink, decay, copy, rule);
        }
        FOR_EACH_OF_BLOCK(i, n - whole, blockIdx.x, updating) {
            update_group<1>(w, g, first, second, mask, whole + i, shrink, decay, copy, rule);
        }
    }
    finish_step(step, before);
}

KERNEL sgd(real* w, const real* g, const Byte* mask, Index n, const double* numbers, const double* gate,
           unsigned short* copy, int bfloat16, int updating, Step step) {
    real rate = numbers[2];
    auto rule = [=](real gradient, real&, real&) { return rate * gradient; };
    update(w, g, 0, 0, mask, n, numbers, gate, {copy, bfloat16 != 0}, updating, step, rule);
}

KERNEL momentum(real* w, const real* g, real* v, const Byte* mask, Index n, const double* numbers, const double* gate,
                unsigned short* copy, int bfloat16, int updating, Step step) {
    real rate = numbers[2], mu = numbers[3];
    bool nesterov = numbers[4] != 0;
    auto rule = [=](real gradient, real& v, real&) {
        v = mu * v + gradient;
        return rate * (nesterov ? gradient + mu * v : v);
    };
    update(w, g, v, 0, mask, n, numbers, gate, {copy, bfloat16 != 0}, updating, step, rule);
}

KERNEL adagrad(real* w, const real* g, real* s, const Byte* mask, Index n, const double* numbers, const double* gate,
               unsigned short* copy, int bfloat16, int updating, Step step) {
    real rate = numbers[2], epsilon = numbers[3];
    auto rule = [=](real gradient, real& s, real&) {
        s += gradient * gradient;
        return rate * (gradient / (sqrt(s) + epsilon));
    };
    update(w, g, s, 0, mask, n, numbers, gate, {copy, bfloat16 != 0}, updating, step, rule);
}

KERNEL rmsprop(real* w, const real* g, real* s, const Byte* mask, Index n, const double* numbers, const double* gate,
               unsigned short* copy, int bfloat16, int updating, Step step) {
    real rate = numbers[2], rho = numbers[3], rest = 1 - numbers[3], epsilon = numbers[4];
    auto rule = [=](real gradient, real& s, real&) {
        s = rho * s + rest * (gradient * gradient);
        return rate * (gradient / (sqrt(s) + epsilon));
    };
    update(w, g, s, 0, mask, n, numbers, gate, {copy, bfloat16 != 0}, updating, step, rule);
}

// rate and epsilon include both bias corrections.
KERNEL adam(real* w, const real* g, real* m, real* s, const Byte* mask, Index n, const double* numbers,
            const double* gate, unsigned short* copy, int bfloat16, int updating, Step step) {
    real rate = numbers[2], rest1 = 1 - numbers[3], beta2 = numbers[4], rest2 = 1 - numbers[4], epsilon = numbers[5];
    auto rule = [=](real gradient, real& m, real& s) {
        m += rest1 * (gradient - m);
        s = beta2 * s + rest2 * (gradient * gradient);
        return rate * (m / (sqrt(s) + epsilon));
    };
    update(w, g, m, s, mask, n, numbers, gate, {copy, bfloat16 != 0}, updating, step, rule);
}

// For the norm of the trained gradient: parts (blocks, 2) = Σ g², and Σ (g / 1e150)² of elements above 1e100.
KERNEL square_parts(const real* g, const Byte* mask, Index n, double* parts) {
    double small = 0, large = 0;
    FOR_EACH(i, n) {
        if (!mask[i]) continue;
        double value = g[i];
        if (value > 1e100 || value < -1e100) large += value / 1e150 * (value / 1e150);
        else small += value * value;
    }
    small = over_block(small, Add());
    large = over_block(large, Add());
    if (threadIdx.x == 0) {
        parts[2 * blockIdx.x] = small;
        parts[2 * blockIdx.x + 1] = large;
    }
}

KERNEL clip_scale(const double* parts, Index count, double limit, double* scale) {
    double small = 0, large = 0;
    FOR_EACH_COLUMN(i, count) {
        small += parts[2 * i];
        large += parts[2 * i + 1];
    }
    small = over_block(small, Add());
    large = over_block(large, Add());
    if (threadIdx.x == 0) {
        double norm = hypot(sqrt(small), 1e150 * sqrt(large));
        *scale = norm > limit ? limit / norm : 1.0;
    }
}

KERNEL scale_trained(real* g, const Byte* mask, Index n, const double* scale) {
    if (*scale == 1) return;
    FOR_EACH(i, n) {
        if (mask[i]) g[i] *= *scale;
    }
}

// Rounding to 16 bits ------------------------------------------------------------------------------------------------

template <typename Number> __device__ void round_all(const float* x, Index n, unsigned short* out) {
    Index vectors = aligned(x) && aligned(out) ? n / 4 : 0;
    FOR_EACH(i, vectors) {
        Vector<float, 4> numbers = load<4>(x + 4 * i);
        Vector<unsigned short, 4> rounded;
        for (int k = 0; k < 4; k++) rounded.at[k] = Number::stored(numbers.at[k]);
        store(out + 4 * i, rounded);
    }
    FOR_EACH(i, n - 4 * vectors) out[4 * vectors + i] = Number::stored(x[4 * vectors + i]);
}

KERNEL to_bfloat16(const float* x, Index n, unsigned short* out) { round_all<Bfloat16>(x, n, out); }

KERNEL to_float16(const float* x, Index n, unsigned short* out) { round_all<Float16>(x, n, out); }
