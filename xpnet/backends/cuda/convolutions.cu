// Convolutions of float32 images (N, H, W, channels) as matrix products whose first matrix, the patches, is gathered
// from the images when it is needed. The rows of the patches are the windows of all images, and their columns the
// numbers under a window, (kh, kw, channels), as the rows of the weight (kh·kw·channels, filters).
//
// Each block computes a tile of the result. In steps along the inner axis, it copies tiles of both matrices into shared
// memory, and multiplies them while the loads of the next step are on their way. The products are made by ordinary
// multiplications (`Exact`), or by tensor cores from numbers that were rounded on the way into shared memory
// (`Tensor`). Sums are made in a fixed order, so that the same input gives the same bits.
//
// The file is compiled by itself, in the same ways as kernels.cu, with the instances of the templates that
// convolutions.py appends. Channels and filters must be multiples of 4, and arrays at multiples of 16 bytes, unless a
// kernel says otherwise.

typedef long long Index;
typedef unsigned int Word;

#define KERNEL extern "C" __global__ void

struct alignas(16) Four {
    float x, y, z, w;
};

struct alignas(8) Two {
    float x, y;
};

struct alignas(16) Place {  // of a pixel or of a cell: its row and column, and its distance in elements
    int row, column, offset, unused;
};

struct Windows {  // as in ../reference/windows.py: pairs are (vertical, horizontal)
    int image[2], grid[2], kernel[2], strides[2], dilation[2], before[2];
};

__device__ const int NOWHERE = 1 << 29;  // the row of a place on no image

// The first pixel of a window, which may be outside of the image. The windows of all images are numbered.
__device__ Place first_pixel(const Windows& windows, Word window, Word count, int channels) {
    if (window >= count) return Place{NOWHERE, 0, 0, 0};
    int j = window % (Word)windows.grid[1], i = window / (Word)windows.grid[1] % (Word)windows.grid[0];
    int image = window / ((Word)windows.grid[1] * (Word)windows.grid[0]);
    int row = i * windows.strides[0] - windows.before[0], column = j * windows.strides[1] - windows.before[1];
    int offset = ((image * windows.image[0] + row) * windows.image[1] + column) * channels;
    return Place{row, column, offset, 0};
}

// A column of the patches, relative to the first pixel of the window.
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

__device__ void add(Four& sum, float factor, Four a) {
    sum.x += factor * a.x, sum.y += factor * a.y, sum.z += factor * a.z, sum.w += factor * a.w;
}

__device__ Four load(const float* a, bool wanted) { return wanted ? *(const Four*)a : Four{0, 0, 0, 0}; }

// Rounded operands, as words of shared memory ------------------------------------------------------------------------

enum Precision { FLOAT32, TF32, BFLOAT16, FLOAT16 };

#if defined(__CUDA_ARCH__)
__device__ Word to_tf32(float x) {
    Word bits = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
    return bits;
}

__device__ Word to_halves(float low, float high, Precision precision) {  // two numbers of 16 bits
    Word bits = 0;
#if __CUDA_ARCH__ >= 800
    if (precision == BFLOAT16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#endif
    return bits;
}

__device__ float rounded(float x, Precision precision) {
    if (precision == FLOAT32) return x;
    if (precision == TF32) return __uint_as_float(to_tf32(x));
    Word bits = to_halves(x, 0, precision);
    if (precision == BFLOAT16) return __uint_as_float(bits << 16);
    float result;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(result) : "r"(bits));
    return result;
}

// sum += a @ b for matrices of (16, 8) and (8, 8) words, spread over the threads of a warp as PTX describes for
// mma.m16n8k8 and mma.m16n8k16: an element of TF32, or two of 16 bits along the inner axis, in each word.
__device__ void multiply_words(float sum[4], const Word a[4], const Word b[2], Precision precision) {
#if __CUDA_ARCH__ >= 800
#define MMA(TYPES)                                                                                              \
    asm("mma.sync.aligned." TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                      \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if (precision == TF32) MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
    else if (precision == BFLOAT16) MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
    else MMA("m16n8k16.row.col.f32.f16.f16.f32");
#undef MMA
#endif
}
#endif

// The numbers of two neighbors along the inner axis as words: (x of both, …), or only the first for TF32.
template <Precision precision> __device__ void pack(Four first, Four second, Word* words) {
    if (precision == TF32) {
        words[0] = to_tf32(first.x), words[1] = to_tf32(first.y);
        words[2] = to_tf32(first.z), words[3] = to_tf32(first.w);
    } else {
        words[0] = to_halves(first.x, second.x, precision), words[1] = to_halves(first.y, second.y, precision);
        words[2] = to_halves(first.z, second.z, precision), words[3] = to_halves(first.w, second.w, precision);
    }
}

struct alignas(16) FourWords {
    Word words[4];
};

struct alignas(8) TwoWords {
    Word words[2];
};

// How a block multiplies its tiles -----------------------------------------------------------------------------------
// The tiles have DEPTH elements along the inner axis, and the result is (ROWS, COLUMNS). put_a_inner stores four
// elements along the inner axis of one row, put_a_outer those of four rows at one place of it (or at two, if PACK is 2);
// put_b_inner and put_b_outer do the same for the columns of the second matrix.

// Each thread computes TALL rows and WIDE columns, in groups of 4. The threads of a warp are LANES across.
template <int ROWS_, int COLUMNS_, int DEPTH_, int TALL, int WIDE, int LANES> struct Exact {
    static const int ROWS = ROWS_, COLUMNS = COLUMNS_, DEPTH = DEPTH_, PACK = 1;
    static const int ACROSS = COLUMNS / WIDE, THREADS = ROWS / TALL * ACROSS, SIZE = DEPTH * (ROWS + 4 + COLUMNS + 4);
    static const int A_PITCH = ROWS + 4, B_PITCH = COLUMNS + 4, B = DEPTH * A_PITCH;
    float sums[TALL][WIDE];
    int row, column;

    __device__ Exact() {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        column = (warp % (ACROSS / LANES) * LANES + lane % LANES) * 4;
        row = (warp / (ACROSS / LANES) * (32 / LANES) + lane / LANES) * 4;
    }
    // Starts the sums of each column with value(column).
    template <typename Value> __device__ void start(Value value) {
#pragma unroll
        for (int j = 0; j < WIDE; j++) {
            float first = value(column + j / 4 * (ACROSS * 4) + j % 4);
#pragma unroll
            for (int i = 0; i < TALL; i++) sums[i][j] = first;
        }
    }
    static __device__ void put_inner(float* tile, int pitch, int k, int outer, Four value) {
        tile[k * pitch + outer] = value.x, tile[(k + 1) * pitch + outer] = value.y;
        tile[(k + 2) * pitch + outer] = value.z, tile[(k + 3) * pitch + outer] = value.w;
    }
    static __device__ void put_a_inner(float* tile, int k, int r, Four value) { put_inner(tile, A_PITCH, k, r, value); }
    static __device__ void put_b_inner(float* tile, int k, int c, Four value) {
        put_inner(tile + B, B_PITCH, k, c, value);
    }
    static __device__ void put_a_outer(float* tile, int k, int r, Four value, Four) {
        *(Four*)(tile + k * A_PITCH + r) = value;
    }
    static __device__ void put_b_outer(float* tile, int k, int c, Four value, Four) {
        *(Four*)(tile + B + k * B_PITCH + c) = value;
    }
    __device__ void multiply(const float* tile) {
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            Four a[TALL / 4], b[WIDE / 4];
#pragma unroll
            for (int i = 0; i < TALL / 4; i++) a[i] = *(const Four*)(tile + k * A_PITCH + row + i * (ROWS / TALL * 4));
#pragma unroll
            for (int j = 0; j < WIDE / 4; j++) {
                b[j] = *(const Four*)(tile + B + k * B_PITCH + column + j * (ACROSS * 4));
            }
#pragma unroll
            for (int i = 0; i < TALL / 4; i++) {
#pragma unroll
                for (int j = 0; j < WIDE / 4; j++) {
                    add(sums[4 * i] + 4 * j, a[i].x, b[j]), add(sums[4 * i + 1] + 4 * j, a[i].y, b[j]);
                    add(sums[4 * i + 2] + 4 * j, a[i].z, b[j]), add(sums[4 * i + 3] + 4 * j, a[i].w, b[j]);
                }
            }
        }
    }
    static __device__ void add(float* sum, float a, Four b) {
        sum[0] += a * b.x, sum[1] += a * b.y, sum[2] += a * b.z, sum[3] += a * b.w;
    }
    // visit(row, column, sums of 4 columns)
    template <typename Visit> __device__ void each(Visit visit) {
#pragma unroll
        for (int i = 0; i < TALL; i++) {
#pragma unroll
            for (int j = 0; j < WIDE / 4; j++) {
                float* s = sums[i] + 4 * j;
                visit(row + i / 4 * (ROWS / TALL * 4) + i % 4, column + j * (ACROSS * 4), s, 4);
            }
        }
    }
};

// A warp computes TALL rows and WIDE columns.
template <Precision precision, int ROWS_, int COLUMNS_, int DEPTH_, int TALL, int WIDE, bool INNER_A, bool INNER_B>
struct Tensor {
    static const int ROWS = ROWS_, COLUMNS = COLUMNS_, DEPTH = DEPTH_, PACK = precision == TF32 ? 1 : 2;
    static const int ACROSS = COLUMNS / WIDE, THREADS = ROWS / TALL * ACROSS * 32, WORDS = DEPTH / PACK;
    // Pitches for which the threads of a warp read different banks.
    static const int A_PITCH = INNER_A ? WORDS + 4 : ROWS + 8, B_PITCH = INNER_B ? WORDS + 4 : COLUMNS + 8;
    static const int B = (INNER_A ? ROWS : WORDS) * A_PITCH, SIZE = B + (INNER_B ? COLUMNS : WORDS) * B_PITCH;
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
    static __device__ void put_inner(Word* to, Four value) {
        if (PACK == 1) {
            FourWords packed;
            pack<precision>(value, value, packed.words);
            *(FourWords*)to = packed;
        } else {
            *(TwoWords*)to = TwoWords{{to_halves(value.x, value.y, precision), to_halves(value.z, value.w, precision)}};
        }
    }
    static __device__ void put_a_inner(float* tile, int k, int r, Four value) {
        put_inner((Word*)tile + r * A_PITCH + k / PACK, value);
    }
    static __device__ void put_b_inner(float* tile, int k, int c, Four value) {
        put_inner((Word*)tile + B + c * B_PITCH + k / PACK, value);
    }
    static __device__ void put_a_outer(float* tile, int k, int r, Four first, Four second) {
        FourWords packed;
        pack<precision>(first, second, packed.words);
        *(FourWords*)((Word*)tile + k / PACK * A_PITCH + r) = packed;
    }
    static __device__ void put_b_outer(float* tile, int k, int c, Four first, Four second) {
        FourWords packed;
        pack<precision>(first, second, packed.words);
        *(FourWords*)((Word*)tile + B + k / PACK * B_PITCH + c) = packed;
    }
    __device__ void multiply(const float* tile) {
        const Word *a_tile = (const Word*)tile, *b_tile = a_tile + B;
#pragma unroll
        for (int k = 0; k < WORDS; k += 8) {
            Word a[TALL / 16][4], b[WIDE / 8][2];
#pragma unroll
            for (int i = 0; i < TALL / 16; i++) {
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    int r = row + i * 16 + part % 2 * 8 + group, inner = k + part / 2 * 4 + place;
                    a[i][part] = a_tile[INNER_A ? r * A_PITCH + inner : inner * A_PITCH + r];
                }
            }
#pragma unroll
            for (int j = 0; j < WIDE / 8; j++) {
#pragma unroll
                for (int part = 0; part < 2; part++) {
                    int c = column + j * 8 + group, inner = k + part * 4 + place;
                    b[j][part] = b_tile[INNER_B ? c * B_PITCH + inner : inner * B_PITCH + c];
                }
            }
#pragma unroll
            for (int i = 0; i < TALL / 16; i++) {
#pragma unroll
                for (int j = 0; j < WIDE / 8; j++) multiply_words(sums[i][j], a[i], b[j], precision);
            }
        }
    }
    // visit(row, column, sums of 2 columns)
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

__device__ void put(float* to, const float* values, int width) {
    if (width == 4) *(Four*)to = Four{values[0], values[1], values[2], values[3]};
    else *(Two*)to = Two{values[0], values[1]};
}

// out = patches @ weight + bias --------------------------------------------------------------------------------------
// With TRANSPOSED, `weight` is (kh·kw, columns, channels): the gradient of the images is a convolution of the gradient
// of the result with the transposed weight, for windows with negative dilation.

template <typename Product, bool TRANSPOSED>
__device__ void convolve(const float* images, const float* weight, const float* bias, int relu, int count, int channels,
                         int columns, const Windows& windows, float* out) {
    const int ROWS = Product::ROWS, COLUMNS = Product::COLUMNS, DEPTH = Product::DEPTH, THREADS = Product::THREADS;
    const int QUADS = DEPTH / 4, A_ROWS = THREADS / QUADS, A_LOADS = (ROWS + A_ROWS - 1) / A_ROWS;
    const int B_QUADS = TRANSPOSED ? QUADS : COLUMNS / 4, B_ROWS = THREADS / B_QUADS;
    const int PACK = TRANSPOSED ? 1 : Product::PACK;  // elements of the inner axis that are stored together
    const int B_OUTER = TRANSPOSED ? COLUMNS : DEPTH / PACK, B_LOADS = (B_OUTER + B_ROWS - 1) / B_ROWS;
    __shared__ Four shared[2][(Product::SIZE + 3) / 4];
    int thread = threadIdx.x, first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
    int inner = thread % QUADS * 4, a_row = thread / QUADS, b_quad = thread % B_QUADS, b_row = thread / B_QUADS;
    int depth = windows.kernel[0] * windows.kernel[1] * channels;

    Place pixels[A_LOADS];
#pragma unroll
    for (int i = 0; i < A_LOADS; i++) {
        int r = a_row + i * A_ROWS;
        pixels[i] = first_pixel(windows, r < ROWS && a_row < A_ROWS ? first_row + r : count, count, channels);
    }
    int cell = 0, a = 0, b = 0, channel = inner;  // of this thread's column of the patches
    Four a_values[A_LOADS], b_values[B_LOADS][PACK];

    auto fetch = [&](int step) {
        for (; channel >= channels; channel -= channels, cell++) {
            if (++b == windows.kernel[1]) b = 0, a++;
        }
        Place at = {a * windows.dilation[0], b * windows.dilation[1], 0, 0};
        at.offset = (at.row * windows.image[1] + at.column) * channels + channel;
        bool inside = a < windows.kernel[0];
#pragma unroll
        for (int i = 0; i < A_LOADS; i++) {
            a_values[i] = load(images + (pixels[i].offset + at.offset), inside & on_image(windows, pixels[i], at));
        }
#pragma unroll
        for (int i = 0; i < B_LOADS; i++) {
#pragma unroll
            for (int half = 0; half < PACK; half++) {
                int outer = b_row + i * B_ROWS;
                bool mine = outer < B_OUTER && b_row < B_ROWS;
                if (TRANSPOSED) {
                    int c = first_column + outer;
                    b_values[i][half] = load(weight + ((Index)cell * columns + c) * channels + channel,
                                             mine & inside & (c < columns));
                } else {
                    int k = step * DEPTH + outer * PACK + half, c = first_column + b_quad * 4;
                    b_values[i][half] = load(weight + (Index)k * columns + c, mine & (k < depth) & (c < columns));
                }
            }
        }
        channel += DEPTH;
    };
    auto store = [&](float* tile) {
#pragma unroll
        for (int i = 0; i < A_LOADS; i++) {
            int r = a_row + i * A_ROWS;
            if (r < ROWS && a_row < A_ROWS) Product::put_a_inner(tile, inner, r, a_values[i]);
        }
#pragma unroll
        for (int i = 0; i < B_LOADS; i++) {
            int outer = b_row + i * B_ROWS;
            if (outer >= B_OUTER || b_row >= B_ROWS) continue;
            if (TRANSPOSED) Product::put_b_inner(tile, b_quad * 4, outer, b_values[i][0]);
            else Product::put_b_outer(tile, outer * PACK, b_quad * 4, b_values[i][0], b_values[i][PACK - 1]);
        }
    };

    Product product;
    product.start([&](int c) { return bias && first_column + c < columns ? bias[first_column + c] : 0; });
    int steps = (depth + DEPTH - 1) / DEPTH;
    fetch(0);
    store((float*)shared[0]);
    __syncthreads();
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) fetch(step + 1);
        product.multiply((const float*)shared[step % 2]);
        if (step + 1 < steps) store((float*)shared[(step + 1) % 2]);
        __syncthreads();
    }
    product.each([&](int r, int c, float* sums, int width) {
        r += first_row, c += first_column;
        if (r >= count || c >= columns) return;
#pragma unroll
        for (int j = 0; j < width; j++) sums[j] = relu && sums[j] <= 0 ? 0 : sums[j];  // NaN stays
        put(out + (Index)r * columns + c, sums, width);
    });
}

__device__ Four rounded(Four a, Precision precision) {
    return Four{rounded(a.x, precision), rounded(a.y, precision), rounded(a.z, precision), rounded(a.w, precision)};
}

// For few channels and cells: each thread computes 4 columns of PIXELS rows. channels may be any number.
template <int PIXELS, Precision precision>
__device__ void convolve_few(const float* images, const float* weight, const float* bias, int relu, int count,
                             int channels, int columns, const Windows& windows, float* out) {
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
#pragma unroll
    for (int p = 0; p < PIXELS; p++) {
        pixels[p] = first_pixel(windows, first + p, count, channels);
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
                    x = rounded(x, precision);
                    add(sums[p], x, w);
                }
            }
        }
    }
#pragma unroll
    for (int p = 0; p < PIXELS; p++) {
        if (first + p >= count) break;
        Four s = sums[p];
        if (relu) s = Four{s.x <= 0 ? 0 : s.x, s.y <= 0 ? 0 : s.y, s.z <= 0 ? 0 : s.z, s.w <= 0 ? 0 : s.w};
        ((Four*)out)[(Index)(first + p) * quads + quad] = s;
    }
}

// weight_grad = patchesᵀ @ grad, and the sums of the columns of grad -------------------------------------------------
// Block (i, j, k) computes tile (i, j) of part k, which is for `part_rows` rows of grad. parts (parts, depth + 1,
// columns): the last row is for the sums. If there are several parts, the last block of a tile, by its ticket, adds them;
// without tickets, add_convolution_parts does it.

// Adds the parts of some elements, 4 at a time, in their order.
__device__ Four sum_of_parts(const float* parts, Index from, Index size, int count) {
    Four sum = {0, 0, 0, 0};
#pragma unroll 8
    for (int k = 0; k < count; k++) {
        Four part = *(const Four*)(parts + k * size + from);
        add(sum, 1, part);
    }
    return sum;
}

// Whether this is the last block with this ticket, which sees what the others have written. Resets the ticket.
__device__ bool last_block(int* ticket, int blocks) {
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(ticket, 1) == blocks - 1;
        if (last) *ticket = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// Element (row, column) of the result: a row of weight_grad, or after its last the sums.
__device__ void put_result(float* weight_grad, float* sums, int depth, int columns, int row, int column, Four value) {
    if (row < depth) *(Four*)(weight_grad + (Index)row * columns + column) = value;
    if (row < depth || !sums) return;
    sums += column;  // which may be at any address
    sums[0] = value.x, sums[1] = value.y, sums[2] = value.z, sums[3] = value.w;
}

template <typename Product>
__device__ void convolve_weight_grad(const float* images, const float* grad, int count, int part_rows, int channels,
                                     int columns, const Windows& windows, float* parts, int* tickets,
                                     float* weight_grad, float* sums) {
    const int ROWS = Product::ROWS, COLUMNS = Product::COLUMNS, DEPTH = Product::DEPTH, THREADS = Product::THREADS;
    const int PACK = Product::PACK, A_QUADS = ROWS / 4, B_QUADS = COLUMNS / 4;
    const int A_COUNT = A_QUADS * DEPTH / PACK, B_COUNT = B_QUADS * DEPTH / PACK;  // loads of a tile
    const int A_LOADS = (A_COUNT + THREADS - 1) / THREADS, B_LOADS = (B_COUNT + THREADS - 1) / THREADS;
    static_assert(THREADS % B_QUADS == 0, "a thread must load the same columns of grad in every step");
    __shared__ Four shared[2][(Product::SIZE + 3) / 4];
    __shared__ Place cells[A_QUADS], pixels[2][DEPTH];
    int thread = threadIdx.x, first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
    int depth = windows.kernel[0] * windows.kernel[1] * channels;
    int begin = blockIdx.z * part_rows, end = begin + part_rows < count ? begin + part_rows : count;
    int column = first_column + thread % B_QUADS * 4;
    bool has_sums = sums && blockIdx.x == 0;

    for (int i = thread; i < A_QUADS; i += THREADS) cells[i] = cell_of(windows, first_row + 4 * i, channels);
    auto find_pixels = [&](int step) {
        for (int i = thread; i < DEPTH; i += THREADS) {
            pixels[step % 2][i] = first_pixel(windows, begin + step * DEPTH + i, end, channels);
        }
    };
    Four a_values[A_LOADS][PACK], b_values[B_LOADS][PACK], column_sums = {0, 0, 0, 0};
    auto fetch = [&](int step) {
#pragma unroll
        for (int i = 0; i < A_LOADS; i++) {
            int at = thread + i * THREADS;
            Place cell = cells[at % A_QUADS];
#pragma unroll
            for (int half = 0; half < PACK; half++) {
                Place pixel = at < A_COUNT ? pixels[step % 2][at / A_QUADS * PACK + half] : Place{NOWHERE, 0, 0, 0};
                a_values[i][half] = load(images + (pixel.offset + cell.offset), on_image(windows, pixel, cell));
            }
        }
#pragma unroll
        for (int i = 0; i < B_LOADS; i++) {
            int at = thread + i * THREADS;
#pragma unroll
            for (int half = 0; half < PACK; half++) {
                int row = begin + step * DEPTH + at / B_QUADS * PACK + half;
                bool wanted = (at < B_COUNT) & (row < end) & (column < columns);
                Four value = load(grad + (Index)row * columns + column, wanted);
                b_values[i][half] = value;
                if (has_sums) add(column_sums, 1, value);
            }
        }
    };
    auto store = [&](float* tile) {
#pragma unroll
        for (int i = 0; i < A_LOADS; i++) {
            int at = thread + i * THREADS, inner = at / A_QUADS * PACK, outer = at % A_QUADS * 4;
            if (at < A_COUNT) Product::put_a_outer(tile, inner, outer, a_values[i][0], a_values[i][PACK - 1]);
        }
#pragma unroll
        for (int i = 0; i < B_LOADS; i++) {
            int at = thread + i * THREADS, inner = at / B_QUADS * PACK, outer = at % B_QUADS * 4;
            if (at < B_COUNT) Product::put_b_outer(tile, inner, outer, b_values[i][0], b_values[i][PACK - 1]);
        }
    };

    Product product;
    product.start([](int) { return 0; });
    int steps = end > begin ? (end - begin + DEPTH - 1) / DEPTH : 0;
    find_pixels(0);
    find_pixels(1);
    __syncthreads();
    fetch(0);
    store((float*)shared[0]);
    __syncthreads();
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) fetch(step + 1);
        find_pixels(step + 2);
        product.multiply((const float*)shared[step % 2]);
        if (step + 1 < steps) store((float*)shared[(step + 1) % 2]);
        __syncthreads();
    }

    bool single = gridDim.z == 1;
    Index size = (Index)(depth + 1) * columns;
    float* own = parts + blockIdx.z * size;
    product.each([&](int r, int c, float* values, int width) {
        r += first_row, c += first_column;
        if (r >= depth || c >= columns) return;
        put((single ? weight_grad : own) + (Index)r * columns + c, values, width);
    });
    if (has_sums) {
        Four* threads = shared[0];
        threads[thread] = column_sums;
        __syncthreads();
        if (thread < B_QUADS && column < columns) {
            for (int i = thread + B_QUADS; i < THREADS; i += B_QUADS) add(column_sums, 1, threads[i]);
            float* to = (single ? sums : own + (Index)depth * columns) + column;
            to[0] = column_sums.x, to[1] = column_sums.y, to[2] = column_sums.z, to[3] = column_sums.w;
        }
    }
    if (single || !tickets || !last_block(tickets + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z)) return;
    int rows = has_sums ? ROWS + 1 : ROWS;  // the last for the sums
    for (int i = thread; i < rows * B_QUADS; i += THREADS) {
        int r = i / B_QUADS == ROWS ? depth : first_row + i / B_QUADS, c = first_column + i % B_QUADS * 4;
        if ((r >= depth && i / B_QUADS != ROWS) || c >= columns) continue;
        Four sum = sum_of_parts(parts, (Index)r * columns + c, size, gridDim.z);
        put_result(weight_grad, sums, depth, columns, r, c, sum);
    }
}

// Adds the parts: blocks of 32 × 8 threads, each of which adds an eighth of the parts of 4 elements.
KERNEL add_convolution_parts(const float* parts, int count, int depth, int columns, float* weight_grad, float* sums) {
    __shared__ Four shared[8][32];
    Index size = (Index)(depth + 1) * columns, at = (blockIdx.x * (Index)32 + threadIdx.x) * 4;
    int each = (count + 7) / 8, first = threadIdx.y * each, last = first + each < count ? first + each : count;
    if (at < size && first < last) {
        shared[threadIdx.y][threadIdx.x] = sum_of_parts(parts + first * size, at, size, last - first);
    } else {
        shared[threadIdx.y][threadIdx.x] = Four{0, 0, 0, 0};
    }
    __syncthreads();
    if (threadIdx.y || at >= size) return;
    Four sum = shared[0][threadIdx.x];
    for (int k = 1; k < 8; k++) {
        Four part = shared[k][threadIdx.x];
        add(sum, 1, part);
    }
    put_result(weight_grad, sums, depth, columns, at / columns, at % columns, sum);
}

// For patches of CELLS columns: each thread adds the products of all of these with 4 columns of grad. channels may be
// any number. A block has THREADS threads, and block (0, 0, k) computes part k.
template <int CELLS, int THREADS, Precision precision>
__device__ void convolve_weight_grad_few(const float* images, const float* grad, int count, int part_rows, int channels,
                                         int columns, const Windows& windows, float* parts, int* tickets,
                                         float* weight_grad, float* sums) {
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
    for (int row = lane < lanes ? begin + lane : end; row < end; row += lanes) {
        Place pixel = first_pixel(windows, row, end, channels);
        Four g = ((const Four*)grad)[(Index)row * quads + quad];
        add(results[CELLS], 1, g);
        g = rounded(g, precision);
#pragma unroll
        for (int k = 0; k < CELLS; k++) {
            float x = on_image(windows, pixel, cells[k]) ? images[pixel.offset + cells[k].offset] : 0;
            add(results[k], rounded(x, precision), g);
        }
    }
    bool single = gridDim.z == 1;
    Index size = (Index)(CELLS + 1) * columns;
    float* own = parts + blockIdx.z * size;
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
            else if (at < CELLS * columns) weight_grad[at] = sum;
            else if (sums) sums[at - CELLS * columns] = sum;
        }
        __syncthreads();
    }
    if (single || !tickets || !last_block(tickets, gridDim.z)) return;
    // The threads divide the parts of each 4 elements, and then add what they have.
    int many = (CELLS + 1) * quads, shares = THREADS / many;
    if (shares < 1) shares = 1;
    int each = (gridDim.z + shares - 1) / shares;
    for (int i = thread; i < many * shares; i += THREADS) {
        int share = i / many, from = share * each, to = from + each < (int)gridDim.z ? from + each : gridDim.z;
        Four none = {0, 0, 0, 0};
        shared[i] = from < to ? sum_of_parts(parts + from * size, i % many * 4, size, to - from) : none;
    }
    __syncthreads();
    for (int i = thread; i < many; i += THREADS) {
        Four sum = shared[i];
        for (int share = 1; share < shares; share++) {
            Four part = shared[share * many + i];
            add(sum, 1, part);
        }
        put_result(weight_grad, sums, CELLS, columns, i * 4 / columns, i * 4 % columns, sum);
    }
}
