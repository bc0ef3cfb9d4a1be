// Products of float32 matrices, out (m, n) = a (m, k) @ b (k, n), for sizes at which cuBLAS is slow. products.py
// compiles this file for each tiling and layout, with these macros:
//
// TILE_M, TILE_N: the size of the tile of `out` that a block computes.
// WARPS: the warps of a block. Each computes the whole tile for its own range of k, without waiting for the others; at
// the end, the block adds their results.
// TILE_K, STAGES: a warp has STAGES buffers in shared memory, each for TILE_K values of k.
// PRECISION: 1, 2 or 3 to round the operands to TF32, bfloat16 or float16 and multiply them by tensor cores; or 0.
// LANE_M, LANE_N: the size of the part of the tile that a thread computes, if PRECISION is 0.
// A_BY_COLUMNS, B_BY_COLUMNS: 1 if the matrix is a transposed view.
//
// Sums are made in a fixed order, so that the same input gives the same bits.

typedef long long Index;
typedef unsigned int Word;

#define UNROLL _Pragma("unroll")

constexpr int THREADS = 32 * WARPS, STEP_K = PRECISION > 1 ? 16 : PRECISION ? 8 : 4;
constexpr int PADDING = PRECISION ? 8 : 0;  // so that the threads of a warp read from different banks
constexpr int PITCH_A = A_BY_COLUMNS ? TILE_M + PADDING : TILE_K + 4;
constexpr int PITCH_B = B_BY_COLUMNS ? TILE_K + 4 : TILE_N + PADDING;
constexpr int SIZE_A = (A_BY_COLUMNS ? TILE_K : TILE_M) * PITCH_A, SIZE_B = (B_BY_COLUMNS ? TILE_N : TILE_K) * PITCH_B;
constexpr int PART = TILE_M * TILE_N, PART_SUMS = PART + TILE_N;  // a tile of out, then the sums of b's columns
constexpr int SIZE_AB = SIZE_A + SIZE_B, BUFFERS = WARPS * STAGES * SIZE_AB, RESULTS = WARPS * PART_SUMS;
constexpr int MEMORY = BUFFERS > RESULTS ? BUFFERS : RESULTS;
static_assert(TILE_K % STEP_K == 0 && STAGES > 1 && WARPS <= 32 && 4 * THREADS % TILE_N == 0, "not supported");

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, 1)

// Copies into shared memory ------------------------------------------------------------------------------------------

// to[0 … COUNT - 1] = from[0 … valid - 1], then zeros.
template <int COUNT> __device__ void copy_async(float* to, const float* from, int valid) {
#if __CUDA_ARCH__ >= 800
    Word address = (Word)__cvta_generic_to_shared(to);
    int bytes = 4 * valid;
    if (COUNT == 4) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes));
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes));
#else
    for (int i = 0; i < COUNT; i++) to[i] = i < valid ? from[i] : 0.0f;
#endif
}

__device__ void end_group_of_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;");
#endif
}

template <int PENDING> __device__ void await_copies() {  // of this warp, except for the latest PENDING groups
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
#endif
    __syncwarp();
}

// Copies the tiles of one operand, one after the other along k, for a warp. With K_IN_LINES, a line of the matrix in
// memory is a row of a or a column of b; otherwise, all numbers of a line have the same k. SIZE: TILE_M or TILE_N.
template <int SIZE, int PITCH, bool K_IN_LINES> struct Copier {
    static constexpr int LINES = K_IN_LINES ? SIZE : TILE_K, LENGTH = K_IN_LINES ? TILE_K : SIZE;
    const float* from;  // what this lane copies first
    int step, lines, length;  // elements from line to line; the lines and the numbers of a line that are left
    int to_lane;  // where this lane copies to
    bool wide;

    // The lanes that copy a line together, if each copies `count` numbers at a time.
    __device__ static constexpr int along(int count) { return LENGTH / count < 32 ? LENGTH / count : 32; }

    __device__ Copier(const float* matrix, int step, int rows_left, int k_left, bool wide) : step(step), wide(wide) {
        static_assert(32 % along(4) == 0 && LENGTH % (4 * along(4)) == 0 && LENGTH % along(1) == 0, "a power of two");
        int lane = threadIdx.x % 32, line = wide ? lane / along(4) : lane / along(1);
        int at = wide ? lane % along(4) * 4 : lane % along(1);
        from = matrix + (Index)line * step + at;
        to_lane = line * PITCH + at;
        lines = (K_IN_LINES ? rows_left : k_left) - line;
        length = (K_IN_LINES ? k_left : rows_left) - at;
    }

    template <int COUNT> __device__ void copy_tile(float* to) const {
        constexpr int AT_ONCE = 32 / along(COUNT);  // lines
        const float* line_from = from;
        UNROLL for (int line = 0; line < LINES; line += AT_ONCE) {
            UNROLL for (int i = 0; i < LENGTH; i += along(COUNT) * COUNT) {
                if (AT_ONCE > LINES && to_lane >= LINES * PITCH) break;
                int valid = line < lines ? min(max(length - i, 0), COUNT) : 0;
                copy_async<COUNT>(to + line * PITCH + i, line_from + i, valid);
            }
            line_from += (Index)AT_ONCE * step;
        }
    }

    __device__ void copy_next(float* to) {
        if (wide) copy_tile<4>(to + to_lane);
        else copy_tile<1>(to + to_lane);
        from += K_IN_LINES ? (Index)TILE_K : (Index)TILE_K * step;
        (K_IN_LINES ? length : lines) -= TILE_K;
    }
};

// The share of a lane in the tile of its warp -------------------------------------------------------------------------

#if PRECISION

#if __CUDA_ARCH__ >= 800
__device__ Word word_of(float low, float high) {  // one number of TF32, or two of 16 bits, rounded to the nearest
    Word bits;
    if (PRECISION == 1) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(low));
    else if (PRECISION == 2) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
#elif __CUDA_ARCH__  // such a device has no bfloat16
__device__ float rounded(float x, int) {
    if (PRECISION == 1) return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
    float result;
    asm("{.reg .b16 half; cvt.rn.f16.f32 half, %1; cvt.f32.f16 %0, half;}" : "=f"(result) : "f"(x));
    return result;
}
#endif

// Products of 16 × STEP_K by STEP_K × 8 numbers, spread over a warp as mma.m16n8k8 and mma.m16n8k16 expect. A word of
// 16-bit numbers has those at k and k + 4: any order along k is correct that is the same for both matrices.
struct Share {
    static constexpr int COUNT_M = TILE_M / 16, COUNT_N = TILE_N / 8, WORD_K = STEP_K / 2;
    int group, place;
    float total[COUNT_M][COUNT_N][4];

    __device__ Share(int lane) : group(lane / 4), place(lane % 4), total() {}

    __device__ static float of_a(const float* a, int i, int k) {
        return a[A_BY_COLUMNS ? k * PITCH_A + i : i * PITCH_A + k];
    }

    __device__ static float of_b(const float* b, int k, int j) {
        return b[B_BY_COLUMNS ? j * PITCH_B + k : k * PITCH_B + j];
    }

    __device__ int row(int x, int e) const { return 16 * x + group + e / 2 * 8; }
    __device__ int column(int y, int e) const { return 8 * y + 2 * place + e % 2; }

    __device__ void add_products(const float* a, const float* b, int k) {
#if __CUDA_ARCH__ >= 800
        Word p[COUNT_M][4], q[COUNT_N][2];
        UNROLL for (int x = 0; x < COUNT_M; x++) UNROLL for (int e = 0; e < 4; e++) {
            int i = 16 * x + group + e % 2 * 8, at = k + place + e / 2 * WORD_K;
            p[x][e] = word_of(of_a(a, i, at), PRECISION > 1 ? of_a(a, i, at + 4) : 0.0f);
        }
        UNROLL for (int y = 0; y < COUNT_N; y++) UNROLL for (int e = 0; e < 2; e++) {
            int j = 8 * y + group, at = k + place + e * WORD_K;
            q[y][e] = word_of(of_b(b, at, j), PRECISION > 1 ? of_b(b, at + 4, j) : 0.0f);
        }
#define MMA(TYPES)                                                                                                \
    asm("mma.sync.aligned." TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
        : "+f"(t[0]), "+f"(t[1]), "+f"(t[2]), "+f"(t[3])                                                          \
        : "r"(p[x][0]), "r"(p[x][1]), "r"(p[x][2]), "r"(p[x][3]), "r"(q[y][0]), "r"(q[y][1]))
        UNROLL for (int x = 0; x < COUNT_M; x++) UNROLL for (int y = 0; y < COUNT_N; y++) {
            float* t = total[x][y];
            if (PRECISION == 1) MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
            else if (PRECISION == 2) MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
            else MMA("m16n8k16.row.col.f32.f16.f16.f32");
        }
#undef MMA
#else
        for (int x = 0; x < COUNT_M; x++) for (int y = 0; y < COUNT_N; y++) for (int e = 0; e < 4; e++)
            for (int i = k; i < k + STEP_K; i++) {
                total[x][y][e] += rounded(of_a(a, row(x, e), i), PRECISION) * rounded(of_b(b, i, column(y, e)), PRECISION);
            }
#endif
    }

    __device__ void store(float* part) const {
        UNROLL for (int x = 0; x < COUNT_M; x++) UNROLL for (int y = 0; y < COUNT_N; y++)
            UNROLL for (int e = 0; e < 4; e++) part[row(x, e) * TILE_N + column(y, e)] = total[x][y][e];
    }
};

#else

// Where the tile has row (or column) i of the thread at `place` of PLACES. Rows that lie side by side in shared memory
// are assigned in groups, which are read as vectors.
template <int COUNT, int PLACES, bool SIDE_BY_SIDE> __device__ int position(int i, int place) {
    constexpr int VECTOR = COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
    return SIDE_BY_SIDE ? (i / VECTOR * PLACES + place) * VECTOR + i % VECTOR : i * PLACES + place;
}

// values[q][i]: the number at k + q in row (or column) i of a thread.
template <int COUNT, int PLACES, int PITCH, bool SIDE_BY_SIDE>
__device__ void read(const float* from, int k, int place, float (&values)[4][COUNT]) {
    constexpr int VECTOR = COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
    UNROLL for (int q = 0; SIDE_BY_SIDE && q < 4; q++) {
        UNROLL for (int i = 0; i < COUNT; i += VECTOR) {
            const float* at = from + (k + q) * PITCH + position<COUNT, PLACES, true>(i, place);
            if (VECTOR == 4) {
                float4 v = *(const float4*)at;
                values[q][i] = v.x, values[q][i + 1] = v.y, values[q][i + 2] = v.z, values[q][i + 3] = v.w;
            } else if (VECTOR == 2) {
                float2 v = *(const float2*)at;
                values[q][i] = v.x, values[q][i + 1] = v.y;
            } else values[q][i] = *at;
        }
    }
    UNROLL for (int i = 0; !SIDE_BY_SIDE && i < COUNT; i++) {
        float4 v = *(const float4*)(from + position<COUNT, PLACES, false>(i, place) * PITCH + k);
        values[0][i] = v.x, values[1][i] = v.y, values[2][i] = v.z, values[3][i] = v.w;
    }
}

struct Share {
    static constexpr int LANES_M = TILE_M / LANE_M, LANES_N = TILE_N / LANE_N;
    static_assert(LANES_M * LANES_N == 32, "a tile is shared by the lanes of a warp");
    int place_m, place_n;
    float total[LANE_M][LANE_N];

    __device__ Share(int lane) : place_m(lane / LANES_N), place_n(lane % LANES_N), total() {}

    __device__ void add_products(const float* a, const float* b, int k) {
        float p[4][LANE_M], q[4][LANE_N];
        read<LANE_M, LANES_M, PITCH_A, A_BY_COLUMNS>(a, k, place_m, p);
        read<LANE_N, LANES_N, PITCH_B, !B_BY_COLUMNS>(b, k, place_n, q);
        UNROLL for (int x = 0; x < 4; x++)
            UNROLL for (int i = 0; i < LANE_M; i++)
                UNROLL for (int j = 0; j < LANE_N; j++) total[i][j] += p[x][i] * q[x][j];
    }

    __device__ void store(float* part) const {
        UNROLL for (int i = 0; i < LANE_M; i++)
            UNROLL for (int j = 0; j < LANE_N; j++)
                part[position<LANE_M, LANES_M, A_BY_COLUMNS>(i, place_m) * TILE_N +
                     position<LANE_N, LANES_N, !B_BY_COLUMNS>(j, place_n)] = total[i][j];
    }
};

#endif

// The end of a product -----------------------------------------------------------------------------------------------

// The tile of `out` that begins at (i0, j0), and what is done with its elements: + row[j], relu, · [mask ≠ 0]. sums: of
// the columns of b. Each of row, mask and sums may be null.
struct Result {
    float *out, *sums;
    const float* mask;
    int i0, j0, m, n, step;  // step: from one row of out to the next
    bool biased, relu, wide;
    float bias[4];  // of the columns of this thread, which are the same in each of its rows

    __device__ void load_bias(const float* row, int column) {
        biased = row;
        UNROLL for (int q = 0; q < 4; q++) bias[q] = row && j0 + column + q < n ? row[j0 + column + q] : 0.0f;
    }

    // Four elements of row r from column c on. Row TILE_M is that of the sums.
    __device__ void store(float4 v, int r, int c) const {
        int i = i0 + r, j = j0 + c;
        float values[4] = {v.x, v.y, v.z, v.w};
        if (r == TILE_M) {
            UNROLL for (int q = 0; q < 4; q++) if (j + q < n) sums[j + q] = values[q];
            return;
        }
        if (i >= m || j >= n) return;
        UNROLL for (int q = 0; q < 4; q++) {
            if (biased) values[q] += bias[q];
            if (relu) values[q] = values[q] <= 0 ? 0.0f : values[q];  // NaN stays
        }
        Index at = (Index)i * step + j, mask_at = (Index)i * n + j;
        if (wide && j + 4 <= n) {
            if (mask) {
                float4 y = *(const float4*)(mask + mask_at);
                values[0] *= (float)(y.x != 0), values[1] *= (float)(y.y != 0);
                values[2] *= (float)(y.z != 0), values[3] *= (float)(y.w != 0);
            }
            *(float4*)(out + at) = make_float4(values[0], values[1], values[2], values[3]);
        } else {
            UNROLL for (int q = 0; q < 4; q++) {
                if (j + q < n) out[at + q] = mask ? values[q] * (float)(mask[mask_at + q] != 0) : values[q];
            }
        }
    }
};

__device__ float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// The number of blocks that have drawn a ticket before this one, which then sees everything that they have written.
__device__ Word draw(Word* ticket) {
#if __CUDA_ARCH__
    Word number;
    asm volatile("fence.acq_rel.gpu;\natom.relaxed.gpu.global.add.u32 %0, [%1], 1;\nfence.acq_rel.gpu;"
                 : "=r"(number) : "l"(ticket) : "memory");
    return number;
#else
    return atomicAdd(ticket, 1u);
#endif
}

// Whether this block is the last one of its tile; `count` blocks call it, each after having written its part.
__device__ bool is_last(Word* ticket, Word count) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        last = draw(ticket) == count - 1;
        if (last) *ticket = 0;  // for the next kernel
    }
    __syncthreads();
    return last;
}

// The grid is (tiles along m, tiles along n, parts of k).
//
// a_step, b_step, out_step: the elements from one line of a matrix in memory to the next.
// wide_a, wide_b, wide_out: whether all lines begin at multiples of 16 bytes; wide_out is about `mask`, too.
// part_k: the size of a part of k, a multiple of 4.
// parts (tiles, parts, PART_SUMS), tickets (tiles): memory, used if there are several parts. Tickets are 0 between
// kernels.
// row, relu, mask, sums: see `Result`.
KERNEL product(const float* a, const float* b, int m, int n, int k, int a_step, int b_step, int wide_a, int wide_b,
               int part_k, float* parts, Word* tickets, const float* row, int relu, const float* mask, float* sums,
               float* out, int out_step, int wide_out) {
#if __CUDA_ARCH__
    extern __shared__ __align__(16) float memory[];  // of MEMORY numbers, which the launch has to ask for
#else
    __shared__ __align__(16) float memory[MEMORY];
#endif
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int i0 = blockIdx.x * TILE_M, j0 = blockIdx.y * TILE_N, block_k = min(part_k, k - (int)blockIdx.z * part_k);
    int warp_k = (block_k + 4 * WARPS - 1) / (4 * WARPS) * 4, chunks = (warp_k + TILE_K - 1) / TILE_K;
    int k0 = blockIdx.z * part_k + warp * warp_k, length = min(warp_k, block_k - warp * warp_k);  // of this warp
    a += A_BY_COLUMNS ? (Index)k0 * a_step + i0 : (Index)i0 * a_step + k0;
    b += B_BY_COLUMNS ? (Index)j0 * b_step + k0 : (Index)k0 * b_step + j0;
    Copier<TILE_M, PITCH_A, !A_BY_COLUMNS> copier_a(a, a_step, m - i0, length, wide_a);
    Copier<TILE_N, PITCH_B, B_BY_COLUMNS> copier_b(b, b_step, n - j0, length, wide_b);
    float *buffers = memory + warp * STAGES * SIZE_AB, *end = buffers + STAGES * SIZE_AB, *to = buffers;
    auto copy_next = [&]() {
        copier_a.copy_next(to);
        copier_b.copy_next(to + SIZE_A);
        to = to + SIZE_AB < end ? to + SIZE_AB : buffers;
    };
    #pragma unroll 1
    for (int chunk = 0; chunk < STAGES - 1; chunk++) {
        if (chunk < chunks) copy_next();
        end_group_of_copies();
    }

    bool summing = sums && blockIdx.x == 0;
    int quads = (summing ? PART_SUMS : PART) / 4, count = gridDim.z;
    Result result = {out, sums, mask, i0, j0, m, n, out_step, false, relu != 0, wide_out != 0};
    result.load_bias(row, 4 * threadIdx.x % TILE_N);
    constexpr int COLUMNS = (TILE_N + 31) / 32;
    float columns[COLUMNS] = {};  // sums of columns of b
    Share share(lane);
    const float* tile_a = buffers;
    #pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
        await_copies<STAGES - 2>();
        if (chunk + STAGES - 1 < chunks) copy_next();
        end_group_of_copies();
        const float* tile_b = tile_a + SIZE_A;
        UNROLL for (int at = 0; at < TILE_K; at += STEP_K) share.add_products(tile_a, tile_b, at);
        UNROLL for (int c = 0; summing && c < COLUMNS; c++) {
            int j = lane + 32 * c;
            UNROLL for (int at = 0; at < TILE_K; at++) {
                if (j < TILE_N) columns[c] += tile_b[B_BY_COLUMNS ? j * PITCH_B + at : at * PITCH_B + j];
            }
        }
        tile_a = tile_a + SIZE_AB < end ? tile_a + SIZE_AB : buffers;
    }
    __syncthreads();  // all buffers have been read

    share.store(memory + warp * PART_SUMS);
    UNROLL for (int c = 0; summing && c < COLUMNS; c++) {
        if (lane + 32 * c < TILE_N) memory[warp * PART_SUMS + PART + lane + 32 * c] = columns[c];
    }
    __syncthreads();

    auto over_warps = [&](int e) {
        float4 sum = *(const float4*)(memory + e);
        UNROLL for (int w = 1; w < WARPS; w++) sum = plus(sum, *(const float4*)(memory + w * PART_SUMS + e));
        return sum;
    };
    int tile = blockIdx.x * gridDim.y + blockIdx.y;
    parts += (Index)tile * count * PART_SUMS;
    for (int e = 4 * threadIdx.x; e < 4 * quads; e += 4 * THREADS) {
        float4 sum = over_warps(e);
        if (count == 1) result.store(sum, e / TILE_N, e % TILE_N);
        else *(float4*)(parts + (Index)blockIdx.z * PART_SUMS + e) = sum;
    }
    if (count == 1 || !is_last(tickets + tile, count)) return;
    int groups = max(1, min(count, THREADS / quads));  // each of which adds every groups-th part
    for (int i = threadIdx.x; i < quads * groups; i += THREADS) {
        int group = i / quads, e = 4 * (i % quads);
        float4 sum = __ldcg((const float4*)(parts + (Index)group * PART_SUMS + e));
        #pragma unroll 16
        for (int k = group + groups; k < count; k += groups) {
            sum = plus(sum, __ldcg((const float4*)(parts + (Index)k * PART_SUMS + e)));
        }
        if (groups == 1) result.store(sum, e / TILE_N, e % TILE_N);
        else *(float4*)(memory + 4 * i) = sum;
    }
    if (groups == 1) return;
    __syncthreads();
    for (int i = threadIdx.x; i < quads; i += THREADS) {
        float4 sum = *(const float4*)(memory + 4 * i);
        for (int group = 1; group < groups; group++) {
            sum = plus(sum, *(const float4*)(memory + 4 * (group * quads + i)));
        }
        result.store(sum, 4 * i / TILE_N, 4 * i % TILE_N);
    }
}
