// The operators of ../reference as CUDA kernels, in plain C++ without headers. A kernel has the name of its operator; one
// that operators.py launches by `by_kernel` also has the names of its arguments. Unless a kernel says otherwise, `n` is the
// number of elements of the result, and `columns` the size of its last axis.
//
// The file is compiled with REAL=float and, if float64 is used, again with REAL=double. Elementwise and row kernels stride
// over their work, so any grid works; end_step, sum_to and clip_scale need a single block, and column sums the grid of
// `launch_column_sums`. The blocks of a reduction need a power of two of threads, at most 256. Sums are made in a fixed
// order, without atomics on floating-point numbers, so that the same input gives the same bits. Numbers that change from
// step to step (`numbers`, `word`) are read from device memory, so that a captured step can be replayed.

typedef REAL real;
typedef long long Index;
typedef unsigned char Byte;
typedef unsigned int Word;

#define KERNEL extern "C" __global__ void
#define FOR_EACH(i, n) \
    for (Index i = blockIdx.x * (Index)blockDim.x + threadIdx.x; i < (n); i += gridDim.x * (Index)blockDim.x)
#define FOR_EACH_ROW(row, rows) for (Index row = blockIdx.x; row < (rows); row += gridDim.x)
#define FOR_EACH_COLUMN(j, columns) for (Index j = threadIdx.x; j < (columns); j += blockDim.x)

__device__ Index quotient(Index i, Index n) {
    return (i | n) <= 0x7fffffff ? (Index)((Word)i / (Word)n) : i / n;  // 64-bit division is several times slower
}

__device__ Index remainder_of(Index i, Index n) { return i - quotient(i, n) * n; }

// Reductions over a block --------------------------------------------------------------------------------------------

struct Add {
    template <typename T> __device__ T operator()(T a, T b) const { return a + b; }
};

struct Largest {  // NaN is larger than any number
    template <typename T> __device__ T operator()(T a, T b) const { return a >= b || a != a ? a : b; }
};

// The result of each group of `size` consecutive threads, a power of two. All threads of the block must call it.
template <typename T, typename Operation> __device__ T over_group(T value, Operation operation, int size) {
    __shared__ T shared[256];
    int place = threadIdx.x % size;
    shared[threadIdx.x] = value;
    __syncthreads();
    for (int half = size / 2; half > 0; half /= 2) {
        if (place < half) shared[threadIdx.x] = operation(shared[threadIdx.x], shared[threadIdx.x + half]);
        __syncthreads();
    }
    T result = shared[threadIdx.x - place];
    __syncthreads();
    return result;
}

template <typename T, typename Operation> __device__ T over_block(T value, Operation operation) {
    return over_group(value, operation, blockDim.x);
}

// The first and the last kernel of a captured step: see StepCells in graphs.py ---------------------------------------
// counters: the row of `table`, the first sample in `order`, the column of `batch_sums`.

struct Numbers {
    double values[8];
};

KERNEL set_numbers(Numbers given, double* out) { FOR_EACH(i, 8) out[i] = given.values[i]; }

// Fills the cells with the numbers of this step, and `indices` with its samples.
KERNEL begin_step(const double* table, Index width, double* cells, const Index* order, Index rows, Index* indices,
                  const Index* counters) {
    FOR_EACH(i, width) cells[i] = table[counters[0] * width + i];
    FOR_EACH(i, rows) indices[i] = order[counters[1] + i];
}

// Copies the sums of this step, staged (3, batches), into batch_sums (3, capacity), and advances the counters.
KERNEL end_step(const double* staged, Index batches, double* batch_sums, Index capacity, Index rows, Index* counters) {
    FOR_EACH_COLUMN(i, 3 * batches) batch_sums[i / batches * capacity + counters[2] + i % batches] = staged[i];
    __syncthreads();
    if (threadIdx.x == 0) {
        counters[0] += 1;
        counters[1] += rows;
        counters[2] += batches;
    }
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

// Elements -----------------------------------------------------------------------------------------------------------

KERNEL rescale_bytes(const Byte* x, Index n, real scale, real offset, real* out) {
    FOR_EACH(i, n) out[i] = scale * (real)x[i] + offset;
}

KERNEL rescale(const real* x, Index n, real scale, real offset, real* out) {
    FOR_EACH(i, n) out[i] = scale * x[i] + offset;
}

KERNEL relu(const real* x, Index n, real* out) {
    FOR_EACH(i, n) out[i] = x[i] <= 0 ? (real)0 : x[i];  // NaN stays
}

KERNEL relu_grad(const real* grad, const real* y, Index n, real* out) {
    FOR_EACH(i, n) out[i] = grad[i] * (real)(y[i] != 0);
}

KERNEL sigmoid(const real* x, Index n, real* out) {
    FOR_EACH(i, n) out[i] = exp(x[i] < 0 ? x[i] : (real)0) / (1 + exp(-fabs(x[i])));
}

KERNEL softplus(const real* x, Index n, real* out) {
    FOR_EACH(i, n) out[i] = (x[i] > 0 ? x[i] : (real)0) + log1p(exp(-fabs(x[i])));
}

KERNEL add_to_rows(const real* row, Index n, Index columns, real* out) {
    FOR_EACH(i, n) out[i] += row[remainder_of(i, columns)];
}

KERNEL add_to_rows_relu(const real* a, const real* row, Index n, Index columns, real* out) {
    FOR_EACH(i, n) {
        real sum = a[i] + row[remainder_of(i, columns)];
        out[i] = sum <= 0 ? (real)0 : sum;  // NaN stays
    }
}

KERNEL scale_shift(const real* x, const real* center, const real* scale, const real* shift, Index n, Index columns,
                   real* out) {
    FOR_EACH(i, n) {
        Index j = remainder_of(i, columns);
        out[i] = (x[i] - center[j]) * scale[j] + shift[j];
    }
}

KERNEL combine(const real* g, const real* a, const real* x, const real* center, const real* b, const real* c, Index n,
               Index columns, real* out) {
    FOR_EACH(i, n) {
        Index j = remainder_of(i, columns);
        out[i] = g[i] * a[j] + (x[i] - center[j]) * b[j] + c[j];
    }
}

// Rows, one block for each -------------------------------------------------------------------------------------------

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

// correct[0] += the rows whose largest number is at the label; correct[1] += all rows. Of equals the first counts. A row
// with NaN is not correct.
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

// The sum of term(j) over the columns of a row: the part of thread `place` of a group. The sum over the group has the same
// bits as that of a block with `lanes` threads, a power of two: each thread adds what several threads of that block would,
// in the order of `over_group`.
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

// cross_entropy with grad multiplied by `scale`, and count_correct, which is added to `correct` unless that is null.
// `group` threads compute a row, and add as the `lanes` threads of cross_entropy do. A single block also stores the sum
// of all losses in loss_sum.
KERNEL cross_entropy_sums(const real* logits, const Index* labels, Index rows, Index columns, int group, int lanes,
                          real confidence, real share, real scale, real* losses, real* grad, double* loss_sum,
                          unsigned long long* correct) {
    Index place = threadIdx.x % group, groups = blockDim.x / group, hits = 0;
    double sum = 0;
    for (Index first = blockIdx.x * groups; first < rows; first += gridDim.x * groups) {
        Index i = first + threadIdx.x / group, end = columns;
        if (i >= rows) i = end = 0;  // nothing to do but to wait at the barriers
        const real* z = logits + i * columns;
        real* g = grad + i * columns;
        Scored best = {z[0], 0};
        for (Index j = place; j < end; j += group) best = FirstLargest()(best, Scored{z[j], (int)j});
        best = over_group(best, FirstLargest(), group);
        for (Index j = place; j < end; j += group) g[j] = exp(z[j] - best.score);
        real total = over_lanes(place, group, lanes, end, [=](Index j) { return g[j]; }), shifted = 0;
        total = over_group(total, Add(), group);
        if (share != 0) {
            shifted = over_lanes(place, group, lanes, end, [=](Index j) { return z[j] - best.score; });
            shifted = over_group(shifted, Add(), group);
        }
        Index label = labels[i];
        for (Index j = place; j < end; j += group) {
            g[j] = (g[j] / total - share - (j == label ? confidence : (real)0)) * scale;
        }
        if (place == 0 && end > 0) {
            real log_total = log(total), loss = confidence * (log_total - (z[label] - best.score));
            if (share != 0) loss += share * (columns * log_total - shifted);  // 0 · ∞ would be NaN
            losses[i] = loss;
            sum += loss;
            hits += best.index == label && best.score == best.score;
        }
    }
    hits = over_block(hits, Add());
    if (gridDim.x == 1) sum = over_block(sum, Add());
    if (threadIdx.x != 0) return;
    if (gridDim.x == 1) *loss_sum = sum;
    if (!correct) return;
    atomicAdd(correct, (unsigned long long)hits);  // of integers, whose sum is the same in any order
    if (blockIdx.x == 0) atomicAdd(correct + 1, (unsigned long long)rows);
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

// Sums over the rows: blocks of 32 × 8 threads, each of which sums part_rows rows of 32 columns ----------------------

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
    return sum;  // complete in the threads whose threadIdx.y is 0
}

// Stores the sums of each part in parts (parts, columns); those of a single part in out.
__device__ void store_sums(double sum, Index columns, double* parts, real* out) {
    Index j = blockIdx.x * 32 + threadIdx.x;
    if (threadIdx.y || j >= columns) return;
    if (gridDim.y == 1) out[j] = sum;
    else parts[blockIdx.y * columns + j] = sum;
}

KERNEL sum_rows(const real* a, Index rows, Index columns, Index part_rows, double* parts, real* out) {
    double sum = down_column(rows, columns, part_rows, [=](Index i, Index j) { return (double)a[i * columns + j]; });
    store_sums(sum, columns, parts, out);
}

KERNEL relu_grad_sum_rows(const real* grad, const real* y, Index rows, Index columns, Index part_rows, double* parts,
                          real* out, real* sums) {
    double sum = down_column(rows, columns, part_rows, [=](Index i, Index j) {
        Index at = i * columns + j;
        out[at] = grad[at] * (real)(y[at] != 0);
        return (double)out[at];
    });
    store_sums(sum, columns, parts, sums);
}

KERNEL sum_products(const real* a, const real* b, const real* center, Index rows, Index columns, Index part_rows,
                    double* parts, real* out) {
    double sum = down_column(rows, columns, part_rows, [=](Index i, Index j) {
        return (double)a[i * columns + j] * ((double)b[i * columns + j] - center[j]);
    });
    store_sums(sum, columns, parts, out);
}

KERNEL add_parts(const double* parts, Index count, Index columns, real* out) {
    FOR_EACH(j, columns) {
        double sum = 0;
        for (Index k = 0; k < count; k++) sum += parts[k * columns + j];
        out[j] = sum;
    }
}

// parts (parts, 2, columns) = Σ d and Σ d² with d = x - x[0]. x[0] is close enough to the mean for one pass.
KERNEL sum_powers(const real* x, Index rows, Index columns, Index part_rows, double* parts) {
    double sum = down_column(rows, columns, part_rows, [=](Index i, Index j) {
        return (double)x[i * columns + j] - x[j];
    });
    double squares = down_column(rows, columns, part_rows, [=](Index i, Index j) {
        double d = (double)x[i * columns + j] - x[j];
        return d * d;
    });
    Index j = blockIdx.x * 32 + threadIdx.x;
    if (threadIdx.y || j >= columns) return;
    parts[2 * blockIdx.y * columns + j] = sum;
    parts[(2 * blockIdx.y + 1) * columns + j] = squares;
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

__device__ int pop(Word& i, int n) {  // removes the last coordinate, of n values, from the index i, and returns it
    int last = i % (Word)n;
    i /= (Word)n;
    return last;
}

// The pixel under cell `a` of window i along one axis. It may be outside of the image.
__device__ int pixel_under(const Windows& windows, int axis, int i, int a) {
    return i * windows.strides[axis] + a * windows.dilation[axis] - windows.before[axis];
}

// The window whose cell `a` covers pixel h along one axis, or -1.
__device__ int window_over(const Windows& windows, int axis, int h, int a) {
    int offset = h + windows.before[axis] - a * windows.dilation[axis], stride = windows.strides[axis];
    if (offset < 0 || offset % stride) return -1;
    return offset / stride < windows.grid[axis] ? offset / stride : -1;
}

// out[pixel] = Σ term(window, cell) over all cells of windows that cover the pixel, in each channel. `distance` is that
// of neighboring pixels of out in elements, because out may be some channels of larger images.
template <typename Term>
__device__ void sum_over_cells(const Windows& windows, Word n, int channels, Index distance, real* out, Term term) {
    FOR_EACH(element, n) {
        Word image = element;
        int c = pop(image, channels), w = pop(image, windows.image[1]), h = pop(image, windows.image[0]);
        real sum = 0;
        for (int a = 0; a < windows.kernel[0]; a++) {
            int i = window_over(windows, 0, h, a);
            for (int b = 0; b < windows.kernel[1] && i >= 0; b++) {
                int j = window_over(windows, 1, w, b);
                Index window = ((Index)image * windows.grid[0] + i) * windows.grid[1] + j;
                if (j >= 0) sum += term(window, a * windows.kernel[1] + b, c);
            }
        }
        out[(((Index)image * windows.image[0] + h) * windows.image[1] + w) * distance + c] = sum;
    }
}

// visit(pixel, cell) for every pixel on the image under this window.
template <typename Visit>
__device__ void pixels_under(const Windows& windows, Word image, int i, int j, Visit visit) {
    for (int a = 0; a < windows.kernel[0]; a++) {
        int h = pixel_under(windows, 0, i, a);
        for (int b = 0; b < windows.kernel[1] && 0 <= h && h < windows.image[0]; b++) {
            int w = pixel_under(windows, 1, j, b);
            Index pixel = ((Index)image * windows.image[0] + h) * windows.image[1] + w;
            if (0 <= w && w < windows.image[1]) visit(pixel, a * windows.kernel[1] + b);
        }
    }
}

KERNEL im2col(const real* images, Index distance, Word n, Windows windows, int channels, real* out) {
    FOR_EACH(element, n) {
        Word image = element;
        int c = pop(image, channels), b = pop(image, windows.kernel[1]), a = pop(image, windows.kernel[0]);
        int j = pop(image, windows.grid[1]), i = pop(image, windows.grid[0]);
        int h = pixel_under(windows, 0, i, a), w = pixel_under(windows, 1, j, b);
        bool on_image = 0 <= h && h < windows.image[0] && 0 <= w && w < windows.image[1];
        Index pixel = ((Index)image * windows.image[0] + h) * windows.image[1] + w;
        out[element] = on_image ? images[pixel * distance + c] : (real)0;
    }
}

KERNEL col2im(const real* patches, Word n, Windows windows, int channels, Index distance, real* images) {
    int cells = windows.kernel[0] * windows.kernel[1];
    sum_over_cells(windows, n, channels, distance, images, [=](Index window, int cell, int c) {
        return patches[(window * cells + cell) * channels + c];
    });
}

// `choice` has elements of 1 or 4 bytes.
KERNEL max_pool(const real* x, Word n, Windows windows, int channels, real* out, void* choice, int choice_bytes) {
    FOR_EACH(element, n) {
        Word image = element;
        int c = pop(image, channels), j = pop(image, windows.grid[1]), i = pop(image, windows.grid[0]), chosen = -1;
        real best = 0;
        pixels_under(windows, image, i, j, [&](Index pixel, int cell) {
            real value = x[pixel * channels + c];
            if (chosen < 0 || (!(value <= best) && best == best)) {  // NaN wins; of equals the first
                best = value;
                chosen = cell;
            }
        });
        out[element] = best;
        if (choice_bytes == 1) ((Byte*)choice)[element] = chosen;
        else ((int*)choice)[element] = chosen;
    }
}

KERNEL max_pool_grad(const real* grad, const void* choice, int choice_bytes, Word n, Windows windows, int channels,
                     real* out) {
    sum_over_cells(windows, n, channels, channels, out, [=](Index window, int cell, int c) {
        Index i = window * channels + c;
        int chosen = choice_bytes == 1 ? ((const Byte*)choice)[i] : ((const int*)choice)[i];
        return chosen == cell ? grad[i] : (real)0;
    });
}

KERNEL sum_pool(const real* x, Word n, Windows windows, int channels, real* out) {
    FOR_EACH(element, n) {
        Word image = element;
        int c = pop(image, channels), j = pop(image, windows.grid[1]), i = pop(image, windows.grid[0]);
        double sum = 0;
        pixels_under(windows, image, i, j, [&](Index pixel, int) { sum += x[pixel * channels + c]; });
        out[element] = sum;
    }
}

KERNEL sum_pool_grad(const real* grad, Word n, Windows windows, int channels, real* out) {
    sum_over_cells(windows, n, channels, channels, out, [=](Index window, int, int c) {
        return grad[window * channels + c];
    });
}

// Random numbers: the hash of ../reference/random.py, bit for bit ----------------------------------------------------

__device__ Word hash32(Word h) {
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    return h ^ h >> 16;
}

__device__ Word random_word(Word word, Index row, Index column) {
    Word row_hash = hash32(hash32((Word)(row >> 32) ^ word) ^ (Word)row);
    return hash32(row_hash ^ hash32((Word)column ^ hash32(word ^ 0x9E3779B9u)));
}

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
// mask: 0 for a frozen element, 1 for a trained one, 2 with weight decay.  numbers: what decay multiplies the weight
// by, what part of the weight it adds to the gradient, then the optimizer's own.  gate: 0 for no update at all.

template <typename Rule>
__device__ void update(real* w, const real* g, const Byte* mask, Index n, const double* numbers, const double* gate,
                       Rule rule) {
    if (gate && *gate == 0) return;
    real shrink = numbers[0], decay = numbers[1];
    FOR_EACH(i, n) {
        if (!mask[i]) continue;
        real weight = w[i], gradient = g[i];
        if (mask[i] == 2) {
            gradient += decay * weight;
            weight *= shrink;
        }
        w[i] = weight - rule(i, gradient);
    }
}

KERNEL sgd(real* w, const real* g, const Byte* mask, Index n, const double* numbers, const double* gate) {
    real rate = numbers[2];
    update(w, g, mask, n, numbers, gate, [=](Index i, real gradient) { return rate * gradient; });
}

KERNEL momentum(real* w, const real* g, real* v, const Byte* mask, Index n, const double* numbers,
                const double* gate) {
    real rate = numbers[2], mu = numbers[3];
    bool nesterov = numbers[4] != 0;
    update(w, g, mask, n, numbers, gate, [=](Index i, real gradient) {
        v[i] = mu * v[i] + gradient;
        return rate * (nesterov ? gradient + mu * v[i] : v[i]);
    });
}

KERNEL adagrad(real* w, const real* g, real* s, const Byte* mask, Index n, const double* numbers, const double* gate) {
    real rate = numbers[2], epsilon = numbers[3];
    update(w, g, mask, n, numbers, gate, [=](Index i, real gradient) {
        s[i] += gradient * gradient;
        return rate * (gradient / (sqrt(s[i]) + epsilon));
    });
}

KERNEL rmsprop(real* w, const real* g, real* s, const Byte* mask, Index n, const double* numbers, const double* gate) {
    real rate = numbers[2], rho = numbers[3], rest = 1 - numbers[3], epsilon = numbers[4];
    update(w, g, mask, n, numbers, gate, [=](Index i, real gradient) {
        s[i] = rho * s[i] + rest * (gradient * gradient);
        return rate * (gradient / (sqrt(s[i]) + epsilon));
    });
}

// rate and epsilon include both bias corrections.
KERNEL adam(real* w, const real* g, real* m, real* s, const Byte* mask, Index n, const double* numbers,
            const double* gate) {
    real rate = numbers[2], rest1 = 1 - numbers[3], beta2 = numbers[4], rest2 = 1 - numbers[4], epsilon = numbers[5];
    update(w, g, mask, n, numbers, gate, [=](Index i, real gradient) {
        m[i] += rest1 * (gradient - m[i]);
        s[i] = beta2 * s[i] + rest2 * (gradient * gradient);
        return rate * (m[i] / (sqrt(s[i]) + epsilon));
    });
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

// Half precision: float32 rounded to the nearest, ties to even -------------------------------------------------------

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
        else if (bits >= 0x477ff000u) half = 0x7c00u;  // 65520 and more become infinity
        else if (bits < 0x38800000u) half = (Word)rintf(__uint_as_float(bits) * 16777216.0f);  // units of 2^-24
        else half = (bits + 0xfffu + (bits >> 13 & 1) - 0x38000000u) >> 13;
        out[i] = sign | half;
    }
}
