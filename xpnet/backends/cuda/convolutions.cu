// Convolutions of float32 images (N, H, W, channels) as matrix products whose first matrix, the patches, is gathered
// from the images when it is needed. The rows of the patches are the windows of all images, and their columns the
// numbers under a window, (kh, kw, channels), as the rows of the weight (kh·kw·channels, filters).
//
// Each block computes a tile of the result. In steps along the inner axis, it copies tiles of both matrices into shared
// memory, several steps ahead, and multiplies them by ordinary arithmetic (`Exact`), or by tensor cores after rounding
// (`Tensor`). Sums are made in a fixed order, so that the same input gives the same bits.
//
// convolutions.py puts instructions.cu before the templates and the instances that it needs behind them, and compiles the
// result like kernels.cu. Unless a kernel says otherwise, channels and filters must be multiples of 4, and arrays begin
// at multiples of 16 bytes.

struct alignas(16) Place {  // of a pixel or of a cell: its row and column, and its distance in elements
    int row, column, offset, unused;  // four, so that one instruction loads all
};

struct Windows {  // as in ../reference/windows.py: pairs are (vertical, horizontal)
    int image[2], grid[2], kernel[2], strides[2], dilation[2], before[2];
};

__device__ const int NOWHERE = 1 << 29;  // the row of a place on no image

struct Window {  // by its image, row and column in the grid; the windows of all images are numbered
    int image, i, j;

    __device__ Window(const Windows& windows, Word number) {
        Word row = number / (Word)windows.grid[1];
        j = number - row * windows.grid[1];
        image = row / (Word)windows.grid[0];
        i = row - image * windows.grid[0];
    }
    __device__ void advance(const Windows& windows) {
        if (++j < windows.grid[1]) return;
        j = 0;
        if (++i < windows.grid[0]) return;
        i = 0, image++;
    }
    // Its first pixel, which may be outside of the image.
    __device__ Place first_pixel(const Windows& windows, int channels) const {
        int row = i * windows.strides[0] - windows.before[0], column = j * windows.strides[1] - windows.before[1];
        return Place{row, column, ((image * windows.image[0] + row) * windows.image[1] + column) * channels, 0};
    }
};

__device__ Place first_pixel(const Windows& windows, int window, int count, int channels) {
    return window < count ? Window(windows, window).first_pixel(windows, channels) : Place{NOWHERE, 0, 0, 0};
}

// The place of a column of the patches, relative to the first pixel of the window.
__device__ Place cell_of(const Windows& windows, int column, int channels) {
    int cell = column / channels, a = cell / windows.kernel[1], b = cell % windows.kernel[1];
    if (a >= windows.kernel[0]) return Place{NOWHERE, 0, 0, 0};
    int row = a * windows.dilation[0], across = b * windows.dilation[1];
    return Place{row, across, (row * windows.image[1] + across) * channels + column % channels, 0};
}

__device__ bool on_image(const Windows& windows, Place pixel, Place cell) {
    return ((Word)(pixel.row + cell.row) < (Word)windows.image[0]) &  // not &&, which would be a branch
           ((Word)(pixel.column + cell.column) < (Word)windows.image[1]);
}

__device__ void plus(Four& sum, float factor, Four a) {
    sum.x += factor * a.x, sum.y += factor * a.y, sum.z += factor * a.z, sum.w += factor * a.w;
}

// How a block multiplies its tiles -----------------------------------------------------------------------------------
// The tiles have DEPTH elements along the inner axis, and the result is (ROWS, COLUMNS). INNER_A, INNER_B: whether the
// elements along the inner axis are adjacent in the tile of the first and of the second matrix. Otherwise, those of a
// column of the first are, and those of a row of the second. The pitches let the threads of a warp read different
// banks.

template <int ROWS_, int COLUMNS_, int DEPTH_, int STAGES_, bool INNER_A_, bool INNER_B_, int PAD_INNER, int PAD_OUTER>
struct Tiles {
    static const int ROWS = ROWS_, COLUMNS = COLUMNS_, DEPTH = DEPTH_, STAGES = STAGES_;
    static const bool INNER_A = INNER_A_, INNER_B = INNER_B_;
    static const int A_PITCH = INNER_A ? DEPTH + PAD_INNER : ROWS + PAD_OUTER;
    static const int B_PITCH = INNER_B ? DEPTH + PAD_INNER : COLUMNS + PAD_OUTER;
    static const int B = (INNER_A ? ROWS : DEPTH) * A_PITCH, SIZE = B + (INNER_B ? COLUMNS : DEPTH) * B_PITCH;

    static __device__ int a(int k, int row) { return INNER_A ? row * A_PITCH + k : k * A_PITCH + row; }
    static __device__ int b(int k, int column) { return INNER_B ? column * B_PITCH + k : k * B_PITCH + column; }
};

// Each thread computes TALL rows and WIDE columns. The threads of a warp are LANES across.
template <int ROWS, int COLUMNS, int DEPTH, int STAGES, bool INNER_A, bool INNER_B, int TALL, int WIDE, int LANES>
struct Exact : Tiles<ROWS, COLUMNS, DEPTH, STAGES, INNER_A, INNER_B, 4, 0> {
    typedef Tiles<ROWS, COLUMNS, DEPTH, STAGES, INNER_A, INNER_B, 4, 0> T;
    static const int DOWN = ROWS / TALL, ACROSS = COLUMNS / WIDE, THREADS = DOWN * ACROSS;
    float sums[TALL][WIDE];
    int x, y;  // of this thread

    __device__ Exact() {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        x = warp % (ACROSS / LANES) * LANES + lane % LANES;
        y = warp / (ACROSS / LANES) * (32 / LANES) + lane / LANES;
    }
    // The rows and columns of a thread are in groups of 4 where it can load these together, else apart.
    __device__ int row(int i) const { return INNER_A ? y + i * DOWN : (y + i / 4 * DOWN) * 4 + i % 4; }
    __device__ int column(int j) const { return INNER_B ? x + j * ACROSS : (x + j / 4 * ACROSS) * 4 + j % 4; }

    // Starts the sums of each column with value(column).
    template <typename Value> __device__ void start(Value value) {
#pragma unroll
        for (int j = 0; j < WIDE; j++) {
            float first = value(column(j));
#pragma unroll
            for (int i = 0; i < TALL; i++) sums[i][j] = first;
        }
    }
    __device__ void multiply(const float* tile) {
#pragma unroll
        for (int k = 0; k < DEPTH; k += 4) {
            float a[4][TALL], b[4][WIDE];
#pragma unroll
            for (int i = 0; i < TALL; i += INNER_A ? 1 : 4) {
#pragma unroll
                for (int q = 0; q < (INNER_A ? 1 : 4); q++) {
                    Four four = *(const Four*)(tile + T::a(k + q, row(i)));
                    if (INNER_A) a[0][i] = four.x, a[1][i] = four.y, a[2][i] = four.z, a[3][i] = four.w;
                    else a[q][i] = four.x, a[q][i + 1] = four.y, a[q][i + 2] = four.z, a[q][i + 3] = four.w;
                }
            }
#pragma unroll
            for (int j = 0; j < WIDE; j += INNER_B ? 1 : 4) {
#pragma unroll
                for (int q = 0; q < (INNER_B ? 1 : 4); q++) {
                    Four four = *(const Four*)(tile + T::B + T::b(k + q, column(j)));
                    if (INNER_B) b[0][j] = four.x, b[1][j] = four.y, b[2][j] = four.z, b[3][j] = four.w;
                    else b[q][j] = four.x, b[q][j + 1] = four.y, b[q][j + 2] = four.z, b[q][j + 3] = four.w;
                }
            }
#pragma unroll
            for (int q = 0; q < 4; q++) {
#pragma unroll
                for (int i = 0; i < TALL; i++) {
#pragma unroll
                    for (int j = 0; j < WIDE; j++) sums[i][j] += a[q][i] * b[q][j];
                }
            }
        }
    }
    // visit(row, column, sums, width) for every `width` columns.
    template <typename Visit> __device__ void each(Visit visit) {
        const int WIDTH = INNER_B ? 1 : 4;
#pragma unroll
        for (int i = 0; i < TALL; i++) {
#pragma unroll
            for (int j = 0; j < WIDE; j += WIDTH) visit(row(i), column(j), sums[i] + j, WIDTH);
        }
    }
};

// A warp computes TALL rows and WIDE columns. A step of its instructions is along 8 or 16 elements of the inner axis,
// in any order that is the same for both matrices: each thread reads pairs of neighbors.
template <Precision precision, int ROWS, int COLUMNS, int DEPTH, int STAGES, bool INNER_A, bool INNER_B, int TALL,
          int WIDE>
struct Tensor : Tiles<ROWS, COLUMNS, DEPTH, STAGES, INNER_A, INNER_B, 8, 4> {
    typedef Tiles<ROWS, COLUMNS, DEPTH, STAGES, INNER_A, INNER_B, 8, 4> T;
    static const int ACROSS = COLUMNS / WIDE, THREADS = ROWS / TALL * ACROSS * 32, STEP = precision == TF32 ? 8 : 16;
    float sums[TALL / 16][WIDE / 8][4];
    int row, column, group, place;

    __device__ Tensor() {
        int warp = threadIdx.x / 32;
        group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
        row = warp / ACROSS * TALL, column = warp % ACROSS * WIDE;
    }
    template <typename Value> __device__ void start(Value value) {
#pragma unroll
        for (int j = 0; j < WIDE / 4; j++) {
            float first = value(column + j / 2 * 8 + place * 2 + j % 2);
#pragma unroll
            for (int i = 0; i < TALL / 16; i++) sums[i][j / 2][j % 2] = sums[i][j / 2][j % 2 + 2] = first;
        }
    }
    static __device__ Two pair(const float* tile, int first, int second, bool adjacent) {
        return adjacent ? *(const Two*)(tile + first) : Two{tile[first], tile[second]};
    }
    // Words `place` and `place` + 4 of an operand, from one pair of neighbors (TF32) or two.
    template <typename Pair> static __device__ void words(Pair pair, Word& first, Word& second) {
        Two low = pair(0);
        if (precision == TF32) {
            first = to_tf32(low.x), second = to_tf32(low.y);
        } else {
            Two high = pair(1);
            first = to_halves(low.x, low.y, precision), second = to_halves(high.x, high.y, precision);
        }
    }
    __device__ void multiply(const float* a_tile) {
        const float* b_tile = a_tile + T::B;
#pragma unroll
        for (int step = 0; step < DEPTH; step += STEP) {
            Word a[TALL / 16][4], b[WIDE / 8][2];
            int k = step + place * 2;
#pragma unroll
            for (int i = 0; i < TALL / 16; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int r = row + i * 16 + half * 8 + group;
                    words([=](int p) { return pair(a_tile, T::a(k + 8 * p, r), T::a(k + 8 * p + 1, r), INNER_A); },
                          a[i][half], a[i][half + 2]);
                }
            }
#pragma unroll
            for (int j = 0; j < WIDE / 8; j++) {
                int c = column + j * 8 + group;
                words([=](int p) { return pair(b_tile, T::b(k + 8 * p, c), T::b(k + 8 * p + 1, c), INNER_B); },
                      b[j][0], b[j][1]);
            }
#pragma unroll
            for (int i = 0; i < TALL / 16; i++) {
#pragma unroll
                for (int j = 0; j < WIDE / 8; j++) multiply_words(sums[i][j], a[i], b[j], precision);
            }
        }
    }
    template <typename Visit> __device__ void each(Visit visit) {
#pragma unroll
        for (int i = 0; i < TALL / 16; i++) {
#pragma unroll
            for (int j = 0; j < WIDE / 8; j++) {
                int r = row + i * 16 + group, c = column + j * 8 + place * 2;
                visit(r, c, sums[i][j], 2);
                visit(r + 8, c, sums[i][j] + 2, 2);
            }
        }
    }
};

// Multiplies `steps` pairs of tiles. fetch(step, tile) begins to copy those of a step.
template <typename Product, typename Fetch> __device__ void multiply_tiles(Product& product, int steps, Fetch fetch) {
    const int STAGES = Product::STAGES;
    __shared__ Four shared[STAGES][(Product::SIZE + 3) / 4];
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) fetch(step, (float*)shared[step]);
        end_copies();
    }
    for (int step = 0; step < steps; step++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // also because all threads must have read the tiles that are overwritten next
        int next = step + STAGES - 1;
        if (next < steps) fetch(next, (float*)shared[next % STAGES]);
        end_copies();
        product.multiply((const float*)shared[step % STAGES]);
    }
}

// out = patches @ weight + bias --------------------------------------------------------------------------------------
// Then out = max(out, 0) with `relu`, and out · [mask ≠ 0] with `mask`.  Both bias and mask may be null.
//
// If the tiles of the second matrix are INNER, `weight` is (kh·kw, columns, channels): the gradient of the images is a
// convolution of the gradient of the result with the transposed weight, for windows with negative dilation.

template <typename Product>
__device__ void convolve(const float* images, const float* weight, const float* bias, int relu, const float* mask,
                         int count, int channels, int columns, const Windows& windows, float* out) {
    const int ROWS = Product::ROWS, COLUMNS = Product::COLUMNS, DEPTH = Product::DEPTH, THREADS = Product::THREADS;
    const bool TRANSPOSED = Product::INNER_B;
    const int QUADS = DEPTH / 4, A_ROWS = THREADS / QUADS, A_LOADS = (ROWS + A_ROWS - 1) / A_ROWS;
    const int B_QUADS = TRANSPOSED ? QUADS : COLUMNS / 4, B_ROWS = THREADS / B_QUADS;
    const int B_OUTER = TRANSPOSED ? COLUMNS : DEPTH, B_LOADS = (B_OUTER + B_ROWS - 1) / B_ROWS;
    int thread = threadIdx.x, first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
    int inner = thread % QUADS * 4, a_row = thread / QUADS, b_quad = thread % B_QUADS * 4, b_row = thread / B_QUADS;
    int depth = windows.kernel[0] * windows.kernel[1] * channels;

    Place pixels[A_LOADS];
#pragma unroll
    for (int i = 0; i < A_LOADS; i++) {
        pixels[i] = first_pixel(windows, first_row + a_row + i * A_ROWS, count, channels);
    }
    int cell = 0, a = 0, b = 0, channel = inner;  // of this thread's column of the patches

    auto fetch = [&](int step, float* tile) {
        for (; channel >= channels; channel -= channels, cell++) {
            if (++b == windows.kernel[1]) b = 0, a++;
        }
        Place at = {a * windows.dilation[0], b * windows.dilation[1], 0, 0};
        at.offset = (at.row * windows.image[1] + at.column) * channels + channel;
        bool inside = a < windows.kernel[0];
#pragma unroll
        for (int i = 0; i < A_LOADS; i++) {
            int row = a_row + i * A_ROWS;
            if (ROWS % A_ROWS && row >= ROWS) break;
            bool wanted = inside & on_image(windows, pixels[i], at);
            copy(tile + Product::a(inner, row), images + (pixels[i].offset + at.offset), wanted);
        }
#pragma unroll
        for (int i = 0; i < B_LOADS; i++) {
            int outer = b_row + i * B_ROWS;
            if (B_OUTER % B_ROWS && outer >= B_OUTER) break;
            if (TRANSPOSED) {
                int c = first_column + outer;
                const float* from = weight + ((Index)cell * columns + c) * channels + channel;
                copy(tile + Product::B + Product::b(b_quad, outer), from, inside & (c < columns));
            } else {
                int k = step * DEPTH + outer, c = first_column + b_quad;
                const float* from = weight + (Index)k * columns + c;
                copy(tile + Product::B + Product::b(outer, b_quad), from, (k < depth) & (c < columns));
            }
        }
        channel += DEPTH;
    };

    Product product;
    product.start([&](int c) { return bias && first_column + c < columns ? bias[first_column + c] : 0; });
    multiply_tiles(product, (depth + DEPTH - 1) / DEPTH, fetch);
    product.each([&](int r, int c, float* sums, int width) {
        r += first_row, c += first_column;
        if (r >= count || c >= columns) return;
        Index at = (Index)r * columns + c;
#pragma unroll
        for (int j = 0; j < width; j++) {
            if (relu) sums[j] = sums[j] <= 0 ? 0 : sums[j];  // NaN stays
            if (mask) sums[j] *= mask[at + j] != 0 ? 1 : 0;  // NaN for infinity · 0
        }
        put(out + at, sums, width);
    });
}

__device__ Four rounded(Four a, Precision precision) {
    return Four{rounded(a.x, precision), rounded(a.y, precision), rounded(a.z, precision), rounded(a.w, precision)};
}

// For few channels and cells: each thread computes 4 columns of PIXELS rows. channels may be any number.
template <int PIXELS, Precision precision>
__device__ void convolve_few(const float* images, const float* weight, const float* bias, int relu, const float* mask,
                             int count, int channels, int columns, const Windows& windows, float* out) {
    __shared__ Four shared[1024];
    int depth = windows.kernel[0] * windows.kernel[1] * channels, quads = columns / 4;
    for (int i = threadIdx.x; i < depth * quads; i += blockDim.x) {
        shared[i] = rounded(((const Four*)weight)[i], precision);
    }
    __syncthreads();
    int groups = blockDim.x / quads, quad = threadIdx.x % quads;
    int first = (blockIdx.x * groups + threadIdx.x / quads) * PIXELS;
    if ((int)threadIdx.x >= groups * quads) return;
    Place pixels[PIXELS];
    Four start = bias ? ((const Four*)bias)[quad] : Four{0, 0, 0, 0}, sums[PIXELS];
    Window window(windows, first);
#pragma unroll
    for (int p = 0; p < PIXELS; p++, window.advance(windows)) {
        pixels[p] = window.first_pixel(windows, channels);
        if (first + p >= count) pixels[p].row = NOWHERE;
        sums[p] = start;
    }
    int k = 0;
    for (int a = 0; a < windows.kernel[0]; a++) {
        for (int b = 0; b < windows.kernel[1]; b++) {
            Place cell = {a * windows.dilation[0], b * windows.dilation[1], 0, 0};
            cell.offset = (cell.row * windows.image[1] + cell.column) * channels;
            for (int c = 0; c < channels; c++, k++) {
                Four w = shared[k * quads + quad];
#pragma unroll
                for (int p = 0; p < PIXELS; p++) {
                    float x = on_image(windows, pixels[p], cell) ? images[pixels[p].offset + cell.offset + c] : 0;
                    plus(sums[p], rounded(x, precision), w);
                }
            }
        }
    }
#pragma unroll
    for (int p = 0; p < PIXELS; p++) {
        if (first + p >= count) break;
        Four s = sums[p];
        if (relu) s = Four{s.x <= 0 ? 0 : s.x, s.y <= 0 ? 0 : s.y, s.z <= 0 ? 0 : s.z, s.w <= 0 ? 0 : s.w};
        Index at = (Index)(first + p) * quads + quad;
        if (mask) {
            Four m = ((const Four*)mask)[at];
            s = Four{s.x * (m.x != 0), s.y * (m.y != 0), s.z * (m.z != 0), s.w * (m.w != 0)};
        }
        ((Four*)out)[at] = s;
    }
}

// weight_grad = patchesᵀ @ grad, and the sums of the columns of grad -------------------------------------------------
// Block (i, j, k) computes tile (i, j) of part k, which is for `part_rows` rows of grad. parts (parts, depth + 1,
// columns): the last row is for the sums. A single part is stored as the result; else add_convolution_parts follows.
// With `add`, the products are added to what weight_grad contains.

template <typename Product>
__device__ void convolve_weight_grad(const float* images, const float* grad, int count, int part_rows, int channels,
                                     int columns, const Windows& windows, float* parts, float* weight_grad,
                                     float* sums, int add) {
    const int ROWS = Product::ROWS, COLUMNS = Product::COLUMNS, DEPTH = Product::DEPTH, THREADS = Product::THREADS;
    const int STAGES = Product::STAGES, A_QUADS = ROWS / 4, B_QUADS = COLUMNS / 4;
    const int A_COUNT = A_QUADS * DEPTH, B_COUNT = B_QUADS * DEPTH;  // copies of a step
    const int A_LOADS = (A_COUNT + THREADS - 1) / THREADS, B_LOADS = (B_COUNT + THREADS - 1) / THREADS;
    static_assert(THREADS % B_QUADS == 0, "a thread must add the same columns of grad in every step");
    __shared__ Place cells[A_QUADS], pixels[STAGES][DEPTH];
    __shared__ Four thread_sums[THREADS];
    int thread = threadIdx.x, first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
    int depth = windows.kernel[0] * windows.kernel[1] * channels;
    int begin = blockIdx.z * part_rows, end = begin + part_rows < count ? begin + part_rows : count;
    int column = first_column + thread % B_QUADS * 4;
    bool has_sums = sums && blockIdx.x == 0;

    auto find_pixels = [&](int step) {
        for (int i = thread; i < DEPTH; i += THREADS) {
            pixels[step % STAGES][i] = first_pixel(windows, begin + step * DEPTH + i, end, channels);
        }
    };
    for (int i = thread; i < A_QUADS; i += THREADS) cells[i] = cell_of(windows, first_row + 4 * i, channels);
    for (int step = 0; step < STAGES; step++) find_pixels(step);
    __syncthreads();
    Four column_sums = {0, 0, 0, 0};
    auto fetch = [&](int step, float* tile) {
#pragma unroll
        for (int i = 0; i < A_LOADS; i++) {
            int at = thread + i * THREADS, k = at / A_QUADS;
            if (A_COUNT % THREADS && at >= A_COUNT) break;
            Place cell = cells[at % A_QUADS], pixel = pixels[step % STAGES][k];
            bool wanted = on_image(windows, pixel, cell);
            copy(tile + Product::a(k, at % A_QUADS * 4), images + (pixel.offset + cell.offset), wanted);
        }
#pragma unroll
        for (int i = 0; i < B_LOADS; i++) {
            int at = thread + i * THREADS, k = at / B_QUADS, row = begin + step * DEPTH + k;
            if (B_COUNT % THREADS && at >= B_COUNT) break;
            bool wanted = (row < end) & (column < columns);
            copy(tile + Product::B + Product::b(k, at % B_QUADS * 4), grad + (Index)row * columns + column, wanted);
        }
        if (step >= STAGES - 1) find_pixels(step + 1);  // the next step that is fetched
    };
    struct WithSums : Product {  // also adds the columns of the tiles of grad
        Four* column_sums;
        __device__ void multiply(const float* tile) {
            Product::multiply(tile);
            if (!column_sums) return;
            for (int k = threadIdx.x / B_QUADS; k < DEPTH; k += THREADS / B_QUADS) {
                plus(*column_sums, 1, *(const Four*)(tile + Product::B + Product::b(k, threadIdx.x % B_QUADS * 4)));
            }
        }
    } product;
    product.column_sums = has_sums ? &column_sums : 0;
    product.start([](int) { return 0; });
    multiply_tiles(product, end > begin ? (end - begin + DEPTH - 1) / DEPTH : 0, fetch);

    bool single = gridDim.z == 1;
    float* own = parts + blockIdx.z * (Index)(depth + 1) * columns;
    product.each([&](int r, int c, float* values, int width) {
        r += first_row, c += first_column;
        if (r >= depth || c >= columns) return;
        float* to = (single ? weight_grad : own) + (Index)r * columns + c;
#pragma unroll
        for (int j = 0; j < width; j++) values[j] += add && single ? to[j] : 0;
        put(to, values, width);
    });
    if (!has_sums) return;
    thread_sums[thread] = column_sums;
    __syncthreads();
    if (thread >= B_QUADS || column >= columns) return;
    for (int i = thread + B_QUADS; i < THREADS; i += B_QUADS) plus(column_sums, 1, thread_sums[i]);
    float* to = (single ? sums : own + (Index)depth * columns) + column;  // sums may be at any address
    to[0] = column_sums.x, to[1] = column_sums.y, to[2] = column_sums.z, to[3] = column_sums.w;
}

// For patches of CELLS columns: each thread adds the products of all of these with 4 columns of grad, of PIXELS rows at
// a time. channels may be any number. A block has THREADS threads, and block (0, 0, k) computes part k.
template <int CELLS, int THREADS, int PIXELS, Precision precision>
__device__ void convolve_weight_grad_few(const float* images, const float* grad, int count, int part_rows, int channels,
                                         int columns, const Windows& windows, float* parts, float* weight_grad,
                                         float* sums, int add) {
    __shared__ Four shared[THREADS * 9];  // of 9 rows of the results of all threads
    __shared__ Place cells[CELLS];
    int thread = threadIdx.x, quads = columns / 4, lanes = THREADS / quads;
    int quad = thread % quads, lane = thread / quads;
    int begin = blockIdx.z * part_rows, end = begin + part_rows < count ? begin + part_rows : count;
    if (thread < CELLS) cells[thread] = cell_of(windows, thread, channels);
    __syncthreads();
    Four results[CELLS + 1];
#pragma unroll
    for (int k = 0; k <= CELLS; k++) results[k] = Four{0, 0, 0, 0};
    for (int row = lane < lanes ? begin + lane * PIXELS : end; row < end; row += lanes * PIXELS) {
        Place pixels[PIXELS];
        Four g[PIXELS];
        Window window(windows, row);
#pragma unroll
        for (int p = 0; p < PIXELS; p++, window.advance(windows)) {
            pixels[p] = window.first_pixel(windows, channels);
            if (row + p >= end) pixels[p].row = NOWHERE;
            g[p] = row + p < end ? ((const Four*)grad)[(Index)(row + p) * quads + quad] : Four{0, 0, 0, 0};
        }
#pragma unroll
        for (int p = 0; p < PIXELS; p++) {
            plus(results[CELLS], 1, g[p]);
            g[p] = rounded(g[p], precision);
        }
#pragma unroll
        for (int k = 0; k < CELLS; k++) {
#pragma unroll
            for (int p = 0; p < PIXELS; p++) {
                float x = on_image(windows, pixels[p], cells[k]) ? images[pixels[p].offset + cells[k].offset] : 0;
                plus(results[k], rounded(x, precision), g[p]);
            }
        }
    }
    bool single = gridDim.z == 1;
    float* own = parts + blockIdx.z * (Index)(CELLS + 1) * columns;
#pragma unroll
    for (int first = 0; first <= CELLS; first += 9) {
#pragma unroll
        for (int k = 0; k < 9; k++) {
            if (first + k <= CELLS && lane < lanes) shared[(lane * 9 + k) * quads + quad] = results[first + k];
        }
        __syncthreads();
        int height = CELLS + 1 - first < 9 ? CELLS + 1 - first : 9;
        for (int i = thread; i < height * columns; i += THREADS) {
            float sum = 0;
#pragma unroll 8
            for (int l = 0; l < lanes; l++) sum += ((const float*)shared)[l * 9 * columns + i];
            int at = first * columns + i;
            if (!single) own[at] = sum;
            else if (at < CELLS * columns) weight_grad[at] = add ? weight_grad[at] + sum : sum;
            else if (sums) sums[at - CELLS * columns] = sum;
        }
        __syncthreads();
    }
}

// Adds the parts: blocks of 8 × 32 threads, each of which adds a 32nd of the parts of 4 elements.
__device__ void add_convolution_parts(const float* parts, int count, int depth, int columns, float* weight_grad,
                                      float* sums, int add) {
    __shared__ Four shared[32][8];
    Index size = (Index)(depth + 1) * columns, at = (blockIdx.x * (Index)8 + threadIdx.x) * 4;
    Four sum = {0, 0, 0, 0};
    if (at < size) {
#pragma unroll 8
        for (int k = threadIdx.y; k < count; k += 32) plus(sum, 1, *(const Four*)(parts + k * size + at));
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || at >= size) return;
    for (int k = 1; k < 32; k++) plus(sum, 1, shared[k][threadIdx.x]);
    Index from_sums = at - (Index)depth * columns;
    if (from_sums < 0) {
        Four* to = (Four*)(weight_grad + at);
        if (add) plus(sum, 1, *to);
        *to = sum;
    } else if (sums) {
        sums += from_sums;
        sums[0] = sum.x, sums[1] = sum.y, sums[2] = sum.z, sums[3] = sum.w;
    }
}
