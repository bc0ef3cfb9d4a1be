// The shared primitives as CUDA kernels, in plain C++ without headers. base.py has the formula of each, under its name.
//
// Compiled twice, with REAL as float and as double. Every kernel strides over its work, so any grid is right; a block of
// one that reduces must have a power of two of threads, at most 256. Sums go in a fixed order, without atomics on
// floating-point numbers: the same input gives the same bits. Numbers that change from step to step (`numbers`, `word`)
// lie in device memory, so that a recorded step can be played again.

typedef REAL real;
typedef long long Index;
typedef unsigned char Byte;
typedef unsigned int Word;

#define KERNEL extern "C" __global__ void
#define FOR_EACH(i, n) \
    for (Index i = blockIdx.x * (Index)blockDim.x + threadIdx.x; i < (n); i += gridDim.x * (Index)blockDim.x)
#define FOR_EACH_ROW(row, rows) for (Index row = blockIdx.x; row < (rows); row += gridDim.x)
#define FOR_EACH_COLUMN(j, columns) for (Index j = threadIdx.x; j < (columns); j += blockDim.x)

__device__ Index remainder_of(Index i, Index n) {
    return i < 0x7fffffff ? (Index)((Word)i % (Word)n) : i % n;  // 64 bits divide several times slower
}

// Reductions over a block ------------------------------------------------------------------------------------------

struct Add {
    template <typename T> __device__ T operator()(T a, T b) const { return a + b; }
};

struct Largest {  // NaN over all numbers
    template <typename T> __device__ T operator()(T a, T b) const { return a >= b || a != a ? a : b; }
};

template <typename T, typename Operation> __device__ T over_block(T value, Operation operation) {
    __shared__ T shared[256];
    shared[threadIdx.x] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] = operation(shared[threadIdx.x], shared[threadIdx.x + half]);
        __syncthreads();
    }
    T result = shared[0];
    __syncthreads();
    return result;
}

// A step that is played again ---------------------------------------------------------------------------------------
// counters: the row of `table`, the first sample in `order`, the column of `record`.

KERNEL set_numbers(double* numbers, double a, double b, double c, double d, double e, double f, double g, double h) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        double given[8] = {a, b, c, d, e, f, g, h};
        for (int i = 0; i < 8; i++) numbers[i] = given[i];
    }
}

// The numbers of this step, and which samples it takes.
KERNEL begin_step(const double* table, Index width, double* now, const Index* order, Index samples, Index* chosen,
                  const Index* counters) {
    FOR_EACH(i, width) now[i] = table[counters[0] * width + i];
    FOR_EACH(i, samples) chosen[i] = order[counters[1] + i];
}

// The figures of this step, staged (3, columns), into record (3, capacity); then everything moves on.
KERNEL end_step(const double* staged, Index columns, double* record, Index capacity, Index samples, Index* counters) {
    FOR_EACH_COLUMN(i, 3 * columns) {
        record[i / columns * capacity + counters[2] + i % columns] = staged[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        counters[0] += 1;
        counters[1] += samples;
        counters[2] += columns;
    }
}

// Rows picked from a matrix -----------------------------------------------------------------------------------------

template <typename From, typename To>
__device__ void pick_rows(const From* a, const Index* rows, Index count, Index size, To* out) {
    FOR_EACH(i, count * size) {
        Index row = i < 0x7fffffff ? (Index)((Word)i / (Word)size) : i / size;
        out[i] = (To)a[rows[row] * size + (i - row * size)];
    }
}

KERNEL gather_1(const Byte* a, const Index* rows, Index count, Index size, Byte* out) {
    pick_rows(a, rows, count, size, out);
}
KERNEL gather_4(const Word* a, const Index* rows, Index count, Index size, Word* out) {
    pick_rows(a, rows, count, size, out);
}
KERNEL gather_8(const Index* a, const Index* rows, Index count, Index size, Index* out) {
    pick_rows(a, rows, count, size, out);
}
KERNEL gather_bytes(const Byte* a, const Index* rows, Index count, Index size, real* out) {
    pick_rows(a, rows, count, size, out);
}

// Every element by itself -------------------------------------------------------------------------------------------

KERNEL rescale_bytes(const Byte* x, Index n, real scale, real offset, real* out) {
    FOR_EACH(i, n) out[i] = scale * (real)x[i] + offset;
}

KERNEL rescale(const real* x, Index n, real scale, real offset, real* out) {
    FOR_EACH(i, n) out[i] = scale * x[i] + offset;
}

KERNEL add_to_rows(real* a, const real* row, Index n, Index columns) {
    FOR_EACH(i, n) a[i] += row[remainder_of(i, columns)];
}

KERNEL relu(const real* x, Index n, real* out) {
    FOR_EACH(i, n) out[i] = x[i] <= 0 ? (real)0 : x[i];  // NaN stays
}

KERNEL relu_grad(const real* grad, const real* y, Index n, real* out) {
    FOR_EACH(i, n) out[i] = y[i] != 0 ? grad[i] : (real)0;
}

KERNEL sigmoid(const real* x, Index n, real* out) {
    FOR_EACH(i, n) out[i] = exp(x[i] < 0 ? x[i] : (real)0) / (1 + exp(-fabs(x[i])));
}

KERNEL softplus(const real* x, Index n, real* out) {
    FOR_EACH(i, n) out[i] = (x[i] > 0 ? x[i] : (real)0) + log1p(exp(-fabs(x[i])));
}

// Rows: a block each ------------------------------------------------------------------------------------------------

__device__ real largest_of(const real* z, Index columns) {
    real largest = z[0];
    FOR_EACH_COLUMN(j, columns) largest = Largest()(largest, z[j]);
    return over_block(largest, Largest());
}

// out = z shifted by its largest, and the sum of its exponentials.
__device__ real shift_and_sum(const real* z, Index columns, real* out) {
    real largest = largest_of(z, columns), sum = 0;
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

// Of targets that are `rest` for every class and `share` more for the label.
KERNEL cross_entropy(const real* logits, const Index* labels, Index rows, Index classes, real share, real rest,
                     real* losses, real* grad) {
    FOR_EACH_ROW(i, rows) {
        real* g = grad + i * classes;
        Index label = labels[i];
        real sum = shift_and_sum(logits + i * classes, classes, g);
        real shifted = 0;
        if (rest != 0) {  // 0 · ∞ would be NaN
            FOR_EACH_COLUMN(j, classes) shifted += g[j];
            shifted = over_block(shifted, Add());
        }
        if (threadIdx.x == 0) {
            real log_sum = log(sum);
            real loss = share * (log_sum - g[label]);
            losses[i] = rest != 0 ? loss + rest * (classes * log_sum - shifted) : loss;
        }
        __syncthreads();  // g[label] has been read
        FOR_EACH_COLUMN(j, classes) g[j] = exp(g[j]) / sum - rest - (j == label ? share : (real)0);
    }
}

// hits[0] += rows whose largest number, of equals the first, is the label's; hits[1] += rows. NaN counts as largest.
KERNEL count_hits(const real* outputs, const Index* labels, Index rows, Index classes, unsigned long long* hits) {
    Index count = 0;
    FOR_EACH(i, rows) {
        const real* y = outputs + i * classes;
        Index best = 0;
        for (Index j = 1; j < classes; j++) {
            if (!(y[j] <= y[best]) && y[best] == y[best]) best = j;
        }
        count += best == labels[i];
    }
    count = over_block(count, Add());
    if (threadIdx.x == 0) {
        atomicAdd(hits, (unsigned long long)count);  // of integers: in any order the same
        if (blockIdx.x == 0) atomicAdd(hits + 1, (unsigned long long)rows);
    }
}

// out = (x - μ) / σ along each row, σ = √(variance + epsilon).
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

// out = (h - mean(h) - x̂ · mean(h · x̂)) / σ along each row. out may be h.
KERNEL normalize_rows_grad(const real* h, const real* normal, const real* sigma, Index rows, Index columns, real* out) {
    FOR_EACH_ROW(i, rows) {
        const real *g = h + i * columns, *x = normal + i * columns;
        double sum = 0, products = 0;
        FOR_EACH_COLUMN(j, columns) {
            sum += g[j];
            products += (double)g[j] * x[j];
        }
        double mean = over_block(sum, Add()) / columns, slope = over_block(products, Add()) / columns;
        FOR_EACH_COLUMN(j, columns) out[i * columns + j] = (g[j] - mean - x[j] * slope) / sigma[i];
    }
}

// Columns: blocks of 32 × 8 threads, each for 32 columns and part_rows of the rows --------------------------------------

template <typename Term> __device__ double down_column(Index rows, Index columns, Index part_rows, Term term) {
    __shared__ double shared[8][32];
    Index j = blockIdx.x * 32 + threadIdx.x, first = blockIdx.y * part_rows;
    Index end = first + part_rows < rows ? first + part_rows : rows;
    double sum = 0;
    if (j < columns) {
        for (Index i = first + threadIdx.y; i < end; i += 8) sum += term(i, j);
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0) {
        for (int k = 1; k < 8; k++) sum += shared[k][threadIdx.x];
    }
    __syncthreads();
    return sum;  // whole where threadIdx.y is 0
}

#define IN_FIRST_ROW(j, columns) \
    for (Index j = blockIdx.x * 32 + threadIdx.x; j < (columns) && threadIdx.y == 0; j = (columns))

// parts (parts, columns): the sums of each part; of a single one, straight to out.
__device__ void hand_over(double sum, Index columns, double* parts, real* out) {
    IN_FIRST_ROW(j, columns) {
        if (gridDim.y == 1) out[j] = sum;
        else parts[blockIdx.y * columns + j] = sum;
    }
}

KERNEL sum_rows(const real* a, Index rows, Index columns, Index part_rows, double* parts, real* out) {
    double sum = down_column(rows, columns, part_rows, [=](Index i, Index j) { return (double)a[i * columns + j]; });
    hand_over(sum, columns, parts, out);
}

KERNEL sum_products(const real* a, const real* b, const real* center, Index rows, Index columns, Index part_rows,
                    double* parts, real* out) {
    double sum = down_column(rows, columns, part_rows, [=](Index i, Index j) {
        return (double)a[i * columns + j] * ((double)b[i * columns + j] - center[j]);
    });
    hand_over(sum, columns, parts, out);
}

KERNEL add_parts(const double* parts, Index count, Index columns, real* out) {
    FOR_EACH(j, columns) {
        double sum = 0;
        for (Index k = 0; k < count; k++) sum += parts[k * columns + j];
        out[j] = sum;
    }
}

// parts (parts, 2, columns): Σ d and Σ d² of d = x - x[0], which is so near the mean that one pass loses no digits.
KERNEL sum_powers(const real* x, Index rows, Index columns, Index part_rows, double* parts) {
    double sum = down_column(rows, columns, part_rows, [=](Index i, Index j) {
        return (double)x[i * columns + j] - x[j];
    });
    double squares = down_column(rows, columns, part_rows, [=](Index i, Index j) {
        double d = (double)x[i * columns + j] - x[j];
        return d * d;
    });
    IN_FIRST_ROW(j, columns) {
        parts[2 * blockIdx.y * columns + j] = sum;
        parts[(2 * blockIdx.y + 1) * columns + j] = squares;
    }
}

KERNEL moments(const double* parts, Index count, const real* x, Index rows, Index columns, real* mean, real* variance) {
    FOR_EACH(j, columns) {
        double sum = 0, squares = 0;
        for (Index k = 0; k < count; k++) {
            sum += parts[2 * k * columns + j];
            squares += parts[(2 * k + 1) * columns + j];
        }
        sum /= rows;
        double spread = squares / rows - sum * sum;
        mean[j] = x[j] + sum;
        variance[j] = spread < 0 ? 0 : spread;
    }
}

KERNEL scale_shift(const real* x, const real* scale, const real* shift, Index n, Index columns, real* out) {
    FOR_EACH(i, n) {
        Index j = remainder_of(i, columns);
        out[i] = x[i] * scale[j] + shift[j];
    }
}

KERNEL combine(const real* g, const real* a, const real* x, const real* b, const real* c, Index n, Index columns,
               real* out) {
    FOR_EACH(i, n) {
        Index j = remainder_of(i, columns);
        out[i] = g[i] * a[j] + x[i] * b[j] + c[j];
    }
}

// Σ x in double, by a single block.
KERNEL sum_to(const real* x, Index n, double* out) {
    double sum = 0;
    FOR_EACH_COLUMN(i, n) sum += x[i];
    sum = over_block(sum, Add());
    if (threadIdx.x == 0) *out = sum;
}

// Windows over images: the geometry is that of sliding.py ---------------------------------------------------------------
// A pixel of the images lies `pixel` elements after the one before, so that the images may be some channels of others.

#define WINDOWS                                                                                                     \
    int height, int width, int rows, int columns, int kh, int kw, int stride_v, int stride_h, int dilation_v, \
        int dilation_h, int before_v, int before_h

__device__ int take(Word& i, int n) {  // the last coordinate of element i, and i without it
    int last = i % (Word)n;
    i /= (Word)n;
    return last;
}

#define GEOMETRY \
    height, width, rows, columns, kh, kw, stride_v, stride_h, dilation_v, dilation_h, before_v, before_h

// The window whose cell `a` lies on pixel h along one axis, or -1.
__device__ int window_over(int h, int a, int windows, int stride, int dilation, int before) {
    int place = h + before - a * dilation;
    if (place < 0 || place % stride) return -1;
    return place / stride < windows ? place / stride : -1;
}

// visit(window, cell) for every cell of a window that lies on this pixel.
template <typename Visit> __device__ void cells_over(Word image, int h, int w, WINDOWS, Visit visit) {
    for (int a = 0; a < kh; a++) {
        int i = window_over(h, a, rows, stride_v, dilation_v, before_v);
        for (int b = 0; b < kw && i >= 0; b++) {
            int j = window_over(w, b, columns, stride_h, dilation_h, before_h);
            if (j >= 0) visit(((Index)image * rows + i) * columns + j, a * kw + b);
        }
    }
}

// visit(pixel, cell) for every pixel on the image under this window.
template <typename Visit> __device__ void pixels_under(Word image, int i, int j, WINDOWS, Visit visit) {
    for (int a = 0; a < kh; a++) {
        int h = i * stride_v + a * dilation_v - before_v;
        for (int b = 0; b < kw && 0 <= h && h < height; b++) {
            int w = j * stride_h + b * dilation_h - before_h;
            if (0 <= w && w < width) visit(((Index)image * height + h) * width + w, a * kw + b);
        }
    }
}

KERNEL patches(const real* x, Index pixel, Word n, WINDOWS, int channels, real* out) {
    FOR_EACH(element, n) {
        Word rest = element;
        int c = take(rest, channels), b = take(rest, kw), a = take(rest, kh), j = take(rest, columns);
        int i = take(rest, rows);
        int h = i * stride_v + a * dilation_v - before_v, w = j * stride_h + b * dilation_h - before_h;
        bool on_image = 0 <= h && h < height && 0 <= w && w < width;
        out[element] = on_image ? x[(((Index)rest * height + h) * width + w) * pixel + c] : (real)0;
    }
}

KERNEL fold(const real* patches, Word n, WINDOWS, int channels, Index pixel, real* out) {
    FOR_EACH(element, n) {
        Word rest = element;
        int c = take(rest, channels), w = take(rest, width), h = take(rest, height);
        real sum = 0;
        cells_over(rest, h, w, GEOMETRY, [&](Index window, int cell) {
            sum += patches[(window * kh * kw + cell) * channels + c];
        });
        out[(((Index)rest * height + h) * width + w) * pixel + c] = sum;
    }
}

template <typename Choice>
__device__ void pick_largest(const real* x, Word n, WINDOWS, int channels, real* out, Choice* choice) {
    FOR_EACH(element, n) {
        Word rest = element;
        int c = take(rest, channels), j = take(rest, columns), i = take(rest, rows);
        real best = 0;
        int chosen = -1;
        pixels_under(rest, i, j, GEOMETRY, [&](Index pixel, int cell) {
            real value = x[pixel * channels + c];
            if (chosen < 0 || (!(value <= best) && best == best)) {  // NaN over all; of equals the first
                best = value;
                chosen = cell;
            }
        });
        out[element] = best;
        choice[element] = chosen;
    }
}

template <typename Choice>
__device__ void hand_back(const real* grad, const Choice* choice, Word n, WINDOWS, int channels, real* out) {
    FOR_EACH(element, n) {
        Word rest = element;
        int c = take(rest, channels), w = take(rest, width), h = take(rest, height);
        real sum = 0;
        cells_over(rest, h, w, GEOMETRY, [&](Index window, int cell) {
            if (choice[window * channels + c] == cell) sum += grad[window * channels + c];
        });
        out[element] = sum;
    }
}

KERNEL max_pool_1(const real* x, Word n, WINDOWS, int channels, real* out, Byte* choice) {
    pick_largest(x, n, GEOMETRY, channels, out, choice);
}
KERNEL max_pool_4(const real* x, Word n, WINDOWS, int channels, real* out, int* choice) {
    pick_largest(x, n, GEOMETRY, channels, out, choice);
}
KERNEL unpool_max_1(const real* grad, const Byte* choice, Word n, WINDOWS, int channels, real* out) {
    hand_back(grad, choice, n, GEOMETRY, channels, out);
}
KERNEL unpool_max_4(const real* grad, const int* choice, Word n, WINDOWS, int channels, real* out) {
    hand_back(grad, choice, n, GEOMETRY, channels, out);
}

KERNEL sum_pool(const real* x, Word n, WINDOWS, int channels, real* out) {
    FOR_EACH(element, n) {
        Word rest = element;
        int c = take(rest, channels), j = take(rest, columns), i = take(rest, rows);
        double sum = 0;
        pixels_under(rest, i, j, GEOMETRY, [&](Index pixel, int cell) { sum += x[pixel * channels + c]; });
        out[element] = sum;
    }
}

KERNEL unpool_sum(const real* grad, Word n, WINDOWS, int channels, real* out) {
    FOR_EACH(element, n) {
        Word rest = element;
        int c = take(rest, channels), w = take(rest, width), h = take(rest, height);
        real sum = 0;
        cells_over(rest, h, w, GEOMETRY, [&](Index window, int cell) { sum += grad[window * channels + c]; });
        out[element] = sum;
    }
}

// Noise: base.py's hash, bit for bit --------------------------------------------------------------------------------------

__device__ Word mix(Word h) {
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    return h ^ h >> 16;
}

__device__ Word noise(Word word, Index row, Index column) {
    Word by_row = mix(mix((Word)(row >> 32) ^ word) ^ (Word)row);
    return mix(by_row ^ mix((Word)column ^ mix(word ^ 0x9E3779B9u)));
}

KERNEL random_bits(const double* word, Index first_row, Index n, Index columns, Word* out) {
    FOR_EACH(i, n) {
        Index row = i / columns;
        out[i] = noise((Word)*word, first_row + row, i - row * columns);
    }
}

KERNEL dropout_mask(const double* word, Index first_row, Index n, Index columns, Word least, real kept, real* out) {
    FOR_EACH(i, n) {
        Index row = i / columns;
        out[i] = noise((Word)*word, first_row + row, i - row * columns) >= least ? kept : (real)0;
    }
}

// Updates of the flat vectors: the formulas are in optimizers.py ----------------------------------------------------------
// roles: 0 leaves an element alone, 1 trains it, 2 decays it too.  numbers: what decay shrinks the weight by, what it
// adds of the weight to the gradient, then the optimiser's own.  gate: where it holds 0, nothing is updated.

template <typename Rule>
__device__ void update(real* w, const real* g, const Byte* roles, Index n, const double* numbers, const double* gate,
                       Rule rule) {
    if (gate && *gate == 0) return;
    real shrink = numbers[0], decay = numbers[1];
    FOR_EACH(i, n) {
        if (!roles[i]) continue;
        real weight = w[i], gradient = g[i];
        if (roles[i] == 2) {
            gradient += decay * weight;
            weight *= shrink;
        }
        w[i] = weight - rule(i, gradient);
    }
}

KERNEL sgd(real* w, const real* g, const Byte* roles, Index n, const double* numbers, const double* gate) {
    real rate = numbers[2];
    update(w, g, roles, n, numbers, gate, [=](Index i, real gradient) { return rate * gradient; });
}

KERNEL momentum(real* w, const real* g, real* v, const Byte* roles, Index n, const double* numbers,
                const double* gate) {
    real rate = numbers[2], mu = numbers[3];
    bool ahead = numbers[4] != 0;
    update(w, g, roles, n, numbers, gate, [=](Index i, real gradient) {
        v[i] = mu * v[i] + gradient;
        return rate * (ahead ? gradient + mu * v[i] : v[i]);
    });
}

KERNEL adagrad(real* w, const real* g, real* s, const Byte* roles, Index n, const double* numbers, const double* gate) {
    real rate = numbers[2], epsilon = numbers[3];
    update(w, g, roles, n, numbers, gate, [=](Index i, real gradient) {
        s[i] += gradient * gradient;
        return rate * (gradient / (sqrt(s[i]) + epsilon));
    });
}

KERNEL rmsprop(real* w, const real* g, real* s, const Byte* roles, Index n, const double* numbers, const double* gate) {
    real rate = numbers[2], rho = numbers[3], rest = 1 - numbers[3], epsilon = numbers[4];
    update(w, g, roles, n, numbers, gate, [=](Index i, real gradient) {
        s[i] = rho * s[i] + rest * (gradient * gradient);
        return rate * (gradient / (sqrt(s[i]) + epsilon));
    });
}

// With both corrections in rate and epsilon.
KERNEL adam(real* w, const real* g, real* m, real* s, const Byte* roles, Index n, const double* numbers,
            const double* gate) {
    real rate = numbers[2], rest1 = 1 - numbers[3], beta2 = numbers[4], rest2 = 1 - numbers[4], epsilon = numbers[5];
    update(w, g, roles, n, numbers, gate, [=](Index i, real gradient) {
        m[i] += rest1 * (gradient - m[i]);
        s[i] = beta2 * s[i] + rest2 * (gradient * gradient);
        return rate * (m[i] / (sqrt(s[i]) + epsilon));
    });
}

// The norm of the gradient of what is trained: parts (blocks, 2), Σ g² and Σ (g / 1e150)² of those too large to square.
KERNEL square_parts(const real* g, const Byte* roles, Index n, double* parts) {
    double small = 0, large = 0;
    FOR_EACH(i, n) {
        if (!roles[i]) continue;
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

KERNEL scale_trained(real* g, const Byte* roles, Index n, const double* scale) {
    if (*scale == 1) return;
    FOR_EACH(i, n) {
        if (roles[i]) g[i] *= *scale;
    }
}

// Halves: float32 rounded to the nearest, ties to even ------------------------------------------------------------------------

KERNEL to_bfloat16(const float* x, Index n, unsigned short* out) {
    FOR_EACH(i, n) {
        Word bits = __float_as_uint(x[i]);
        bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        out[i] = nan ? bits >> 16 | 0x40 : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    }
}

KERNEL to_float16(const float* x, Index n, unsigned short* out) {
    FOR_EACH(i, n) {
        Word bits = __float_as_uint(x[i]), sign = bits >> 16 & 0x8000u, half;
        bits &= 0x7fffffffu;
        if (bits > 0x7f800000u) half = 0x7e00u;
        else if (bits >= 0x477ff000u) half = 0x7c00u;  // from 65520 on, infinity
        else if (bits < 0x38800000u) half = (Word)rintf(__uint_as_float(bits) * 16777216.0f);  // subnormal: units of 2^-24
        else half = (bits + 0xfffu + (bits >> 13 & 1) - 0x38000000u) >> 13;
        out[i] = sign | half;
    }
}
