// Products of float32 matrices, out (m, n) = a (m, k) @ b (k, n), for sizes at which cuBLAS is slow. products.py compiles
// this file for each tiling and layout, with these macros:
//
// TILE_M, TILE_N: the part of `out` that a block computes.  TILE_K: the k that it holds in shared memory at a time, in each
// of STAGES buffers.  SHARE_M, SHARE_N: the part that a thread computes, or a warp with TF32.  SLICES: the groups of
// threads that share the k of a buffer, all for the same part of `out`.  TF32: 1 to round the operands and multiply by
// tensor cores.  A_BY_COLUMNS, B_BY_COLUMNS: 1 for a transposed view.  CLUSTER: the blocks that share the k of a tile, and
// add their parts through shared memory, from compute capability 9.0 on; 0 for none.
//
// Each sum is made in a fixed order, so that the same input gives the same bits.

typedef long long Index;
typedef unsigned int Word;

#define UNROLL _Pragma("unroll")

constexpr int SHARES_M = TILE_M / SHARE_M, SHARES_N = TILE_N / SHARE_N, WIDTH = TF32 ? 32 : 1;  // threads of a share
constexpr int GROUP = SHARES_M * SHARES_N * WIDTH, THREADS = GROUP * SLICES, SLICE_K = TILE_K / SLICES;
constexpr int STEP_K = TF32 ? 8 : 4, PADDING = TF32 ? 8 : 0;  // so that the threads of a warp read from different banks
constexpr int PITCH_A = A_BY_COLUMNS ? TILE_M + PADDING : TILE_K + 4, SIZE_A = (A_BY_COLUMNS ? TILE_K : TILE_M) * PITCH_A;
constexpr int PITCH_B = B_BY_COLUMNS ? TILE_K + 4 : TILE_N + PADDING, SIZE_B = (B_BY_COLUMNS ? TILE_N : TILE_K) * PITCH_B;
constexpr int PART = TILE_M * TILE_N, PART_SUMS = PART + TILE_N;  // behind the part of out that of the sums of b's columns
constexpr int BUFFERS = STAGES * (SIZE_A + SIZE_B), RESULTS = SLICES * PART_SUMS;
constexpr int MEMORY = BUFFERS > RESULTS ? BUFFERS : RESULTS;
static_assert(SLICE_K % STEP_K == 0 && GROUP >= TILE_N && THREADS <= 1024, "a tiling that the kernel does not support");

#if __CUDA_ARCH__ >= 900 && CLUSTER
#define KERNEL extern "C" __global__ void __cluster_dims__(1, 1, CLUSTER) __launch_bounds__(THREADS)
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#endif

// Copies into shared memory ------------------------------------------------------------------------------------------

// to[0 … COUNT - 1] = from[0 … valid - 1], then zeros.
template <int COUNT> __device__ void copy(float* to, const float* from, int valid) {
#if __CUDA_ARCH__ >= 800
    Word address = (Word)__cvta_generic_to_shared(to);
    if (COUNT == 4) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(4 * valid));
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(4 * valid));
#else
    for (int i = 0; i < COUNT; i++) to[i] = i < valid ? from[i] : 0.0f;
#endif
}

__device__ void end_of_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;");
#endif
}

template <int PENDING> __device__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
#endif
    __syncthreads();
}

// Copies (LINES, LENGTH) numbers, `step` apart from line to line, of which (lines, length) are those of the matrix.
template <int LINES, int LENGTH, int PITCH, int COUNT>
__device__ void copy_lines(float* to, const float* from, int step, int lines, int length) {
    constexpr int PER_LINE = LENGTH / COUNT;
    UNROLL for (int first = 0; first < LINES * PER_LINE; first += THREADS) {
        int i = first + threadIdx.x, line = i / PER_LINE, at = i % PER_LINE * COUNT;
        if (LINES * PER_LINE % THREADS && i >= LINES * PER_LINE) break;
        int valid = line < lines ? min(max(length - at, 0), COUNT) : 0;
        copy<COUNT>(to + line * PITCH + at, valid ? from + (Index)line * step + at : from, valid);
    }
}

template <int LINES, int LENGTH, int PITCH>
__device__ void copy_tile(float* to, const float* from, int step, int lines, int length, bool wide) {
    if (wide) copy_lines<LINES, LENGTH, PITCH, 4>(to, from, step, lines, length);
    else copy_lines<LINES, LENGTH, PITCH, 1>(to, from, step, lines, length);
}

// The share of a thread or a warp in a tile --------------------------------------------------------------------------

#if TF32

__device__ float rounded(float x) {  // to TF32, to the nearest
#if __CUDA_ARCH__ >= 800
    Word bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
#else
    return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
#endif
}

struct Share {  // of a warp: products of 16 × 8 by 8 × 8 numbers, in the order that mma.m16n8k8 expects
    static constexpr int COUNT_M = SHARE_M / 16, COUNT_N = SHARE_N / 8;
    int i0, j0, group, lane;
    float total[COUNT_M][COUNT_N][4];

    __device__ Share(int place)
        : i0(place / 32 / SHARES_N * SHARE_M), j0(place / 32 % SHARES_N * SHARE_N), group(place % 32 / 4),
          lane(place % 4), total() {}

    __device__ static float of_a(const float* a, int i, int k) { return rounded(a[A_BY_COLUMNS ? k * PITCH_A + i : i * PITCH_A + k]); }
    __device__ static float of_b(const float* b, int k, int j) { return rounded(b[B_BY_COLUMNS ? j * PITCH_B + k : k * PITCH_B + j]); }

    __device__ int row(int x, int e) const { return i0 + 16 * x + group + e / 2 * 8; }
    __device__ int column(int y, int e) const { return j0 + 8 * y + 2 * lane + e % 2; }

    __device__ void add_products(const float* a, const float* b, int k) {
#if __CUDA_ARCH__ >= 800
        float p[COUNT_M][4], q[COUNT_N][2];
        UNROLL for (int x = 0; x < COUNT_M; x++)
            UNROLL for (int e = 0; e < 4; e++) p[x][e] = of_a(a, i0 + 16 * x + group + e % 2 * 8, k + lane + e / 2 * 4);
        UNROLL for (int y = 0; y < COUNT_N; y++)
            UNROLL for (int e = 0; e < 2; e++) q[y][e] = of_b(b, k + lane + 4 * e, j0 + 8 * y + group);
        UNROLL for (int x = 0; x < COUNT_M; x++) UNROLL for (int y = 0; y < COUNT_N; y++) {
            float* t = total[x][y];
            asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(t[0]), "+f"(t[1]), "+f"(t[2]), "+f"(t[3])
                : "r"(__float_as_uint(p[x][0])), "r"(__float_as_uint(p[x][1])), "r"(__float_as_uint(p[x][2])),
                  "r"(__float_as_uint(p[x][3])), "r"(__float_as_uint(q[y][0])), "r"(__float_as_uint(q[y][1])));
        }
#else
        for (int x = 0; x < COUNT_M; x++) for (int y = 0; y < COUNT_N; y++) for (int e = 0; e < 4; e++)
            for (int i = k; i < k + 8; i++) total[x][y][e] += of_a(a, row(x, e), i) * of_b(b, i, column(y, e));
#endif
    }

    __device__ void store(float* part) const {
        UNROLL for (int x = 0; x < COUNT_M; x++) UNROLL for (int y = 0; y < COUNT_N; y++)
            UNROLL for (int e = 0; e < 4; e++) part[row(x, e) * TILE_N + column(y, e)] = total[x][y][e];
    }
};

#else

// The row (or column) i of the thread at `place` of PLACES. Those that lie side by side in shared memory are read as
// vectors.
template <int COUNT, int PLACES, bool SIDE_BY_SIDE> __device__ int position(int i, int place) {
    constexpr int VECTOR = COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
    return SIDE_BY_SIDE ? (i / VECTOR * PLACES + place) * VECTOR + i % VECTOR : i * PLACES + place;
}

// The numbers of four k, from k on, in the rows (or columns) of a thread.
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

struct Share {  // of a thread
    int place_m, place_n;
    float total[SHARE_M][SHARE_N];

    __device__ Share(int place) : place_m(place / SHARES_N), place_n(place % SHARES_N), total() {}

    __device__ void add_products(const float* a, const float* b, int k) {
        float p[4][SHARE_M], q[4][SHARE_N];
        read<SHARE_M, SHARES_M, PITCH_A, A_BY_COLUMNS>(a, k, place_m, p);
        read<SHARE_N, SHARES_N, PITCH_B, !B_BY_COLUMNS>(b, k, place_n, q);
        UNROLL for (int x = 0; x < 4; x++)
            UNROLL for (int i = 0; i < SHARE_M; i++)
                UNROLL for (int j = 0; j < SHARE_N; j++) total[i][j] += p[x][i] * q[x][j];
    }

    __device__ void store(float* part) const {
        UNROLL for (int i = 0; i < SHARE_M; i++)
            UNROLL for (int j = 0; j < SHARE_N; j++)
                part[position<SHARE_M, SHARES_M, A_BY_COLUMNS>(i, place_m) * TILE_N +
                     position<SHARE_N, SHARES_N, !B_BY_COLUMNS>(j, place_n)] = total[i][j];
    }
};

#endif

// The end of a product -----------------------------------------------------------------------------------------------

// What is done with each element: + row[j], then relu, or · [mask ≠ 0]. Pointers may be null.
struct Result {
    float *out, *sums;
    const float *row, *mask;
    int m, n, step;  // step: from one row of out to the next
    bool relu, wide;

    __device__ float element(float value, int i, int j) const {
        if (row) value += row[j];
        if (relu) value = value <= 0 ? 0.0f : value;  // NaN stays
        if (mask) value *= (float)(mask[(Index)i * n + j] != 0);
        return value;
    }

    // Four elements of a tile, at row r and column c of the tile that begins at (i, j).
    __device__ void store(float4 v, int i, int j, int r, int c) const {
        bool of_sums = r == TILE_M;
        if (!of_sums && i + r >= m) return;
        float values[4] = {v.x, v.y, v.z, v.w};
        int left = n - j - c;
        i += r, j += c;
        if (of_sums) {
            UNROLL for (int q = 0; q < 4; q++) if (q < left) sums[j + q] = values[q];
            return;
        }
        float* to = out + (Index)i * step + j;
        UNROLL for (int q = 0; q < 4; q++) if (q < left) values[q] = element(values[q], i, j + q);
        if (wide && left >= 4) *(float4*)to = make_float4(values[0], values[1], values[2], values[3]);
        else UNROLL for (int q = 0; q < 4; q++) if (q < left) to[q] = values[q];
    }
};

__device__ float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Whether this block is the last one of its tile; `count` blocks call it, each after having written its part.
__device__ bool is_last(Word* ticket, Word count) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(ticket, 1u) == count - 1;
        if (last) *ticket = 0;  // for the next product
    }
    __syncthreads();
    __threadfence();
    return last;
}

#if __CUDA_ARCH__ >= 900 && CLUSTER
__device__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ float4 read_of_block(const float* own, int rank) {  // the same place in the shared memory of another block
    Word address = (Word)__cvta_generic_to_shared(own);
    float4 v;
    asm volatile("{.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address), "r"(rank) : "memory");
    return v;
}
#endif

// The grid is (tiles along m, tiles along n, parts of k). a_step, b_step: from one line of a matrix in memory to the
// next.  wide_a, wide_b, wide_out: whether their lines begin at multiples of 16 bytes.  part_k: the k of each part, a
// multiple of 4.  parts: (tiles, parts, PART_SUMS); tickets: a 0 for each tile, and each rank in its clusters. Both are
// used if there are several parts. The parts of a cluster are consecutive.
// row, mask, sums: see `Result`, or null.
KERNEL product(const float* a, const float* b, int m, int n, int k, int a_step, int b_step, int wide_a, int wide_b,
               int part_k, float* parts, Word* tickets, const float* row, int relu, const float* mask, float* sums,
               float* out, int out_step, int wide_out) {
    __shared__ __align__(16) float memory[MEMORY];
    int slice = threadIdx.x / GROUP, place = threadIdx.x % GROUP;
    int i0 = blockIdx.x * TILE_M, j0 = blockIdx.y * TILE_N, k0 = blockIdx.z * part_k, length = min(part_k, k - k0);
    int chunks = (length + TILE_K - 1) / TILE_K;
    bool summing = sums && blockIdx.x == 0;
    a += A_BY_COLUMNS ? (Index)k0 * a_step + i0 : (Index)i0 * a_step + k0;
    b += B_BY_COLUMNS ? (Index)j0 * b_step + k0 : (Index)k0 * b_step + j0;

    auto load = [&](int chunk) {
        float *to_a = memory + chunk % STAGES * (SIZE_A + SIZE_B), *to_b = to_a + SIZE_A;
        int at = chunk * TILE_K, left = length - at;
        if (A_BY_COLUMNS) copy_tile<TILE_K, TILE_M, PITCH_A>(to_a, a + (Index)at * a_step, a_step, left, m - i0, wide_a);
        else copy_tile<TILE_M, TILE_K, PITCH_A>(to_a, a + at, a_step, m - i0, left, wide_a);
        if (B_BY_COLUMNS) copy_tile<TILE_N, TILE_K, PITCH_B>(to_b, b + at, b_step, n - j0, left, wide_b);
        else copy_tile<TILE_K, TILE_N, PITCH_B>(to_b, b + (Index)at * b_step, b_step, left, n - j0, wide_b);
    };

    Share share(place);
    float column = 0;  // the sum of one column of b
    UNROLL for (int chunk = 0; chunk < STAGES - 1; chunk++) {
        if (chunk < chunks) load(chunk);
        end_of_copies();
    }
    for (int chunk = 0; chunk < chunks; chunk++) {
        wait_for_copies<STAGES - 2>();
        if (chunk + STAGES - 1 < chunks) load(chunk + STAGES - 1);
        end_of_copies();
        const float *tile_a = memory + chunk % STAGES * (SIZE_A + SIZE_B), *tile_b = tile_a + SIZE_A;
        int first = slice * SLICE_K, left = length - chunk * TILE_K - first;
        UNROLL for (int at = 0; at < SLICE_K; at += STEP_K) {
            if (at < left) share.add_products(tile_a, tile_b, first + at);
        }
        if (summing && place < TILE_N) {
            for (int at = first; at < first + SLICE_K; at++) {
                column += tile_b[B_BY_COLUMNS ? place * PITCH_B + at : at * PITCH_B + place];
            }
        }
    }
    __syncthreads();  // all buffers have been read

    int size = summing ? PART_SUMS : PART;
    share.store(memory + slice * PART_SUMS);
    if (summing && place < TILE_N) memory[slice * PART_SUMS + PART + place] = column;
    __syncthreads();

    Result result = {out, sums, row, mask, m, n, out_step, relu != 0, wide_out != 0};
    auto over_slices = [&](int e) {
        float4 sum = *(const float4*)(memory + e);
        UNROLL for (int s = 1; s < SLICES; s++) sum = plus(sum, *(const float4*)(memory + s * PART_SUMS + e));
        return sum;
    };
#if __CUDA_ARCH__ >= 900 && CLUSTER
    constexpr int RANKS = CLUSTER;
    for (int e = 4 * threadIdx.x; SLICES > 1 && e < size; e += 4 * THREADS) *(float4*)(memory + e) = over_slices(e);
    cluster_barrier();
    auto over_cluster = [&](int e) {
        float4 all[CLUSTER], sum;
        UNROLL for (int rank = 0; rank < CLUSTER; rank++) all[rank] = read_of_block(memory + e, rank);
        sum = all[0];
        UNROLL for (int rank = 1; rank < CLUSTER; rank++) sum = plus(sum, all[rank]);
        return sum;
    };
#else
    constexpr int RANKS = 1;
    auto over_cluster = over_slices;
#endif
    // The blocks of a cluster share the elements of the tile.
    int rank = blockIdx.z % RANKS, part = blockIdx.z / RANKS, count = gridDim.z / RANKS;
    int per_rank = (size / 4 + RANKS - 1) / RANKS, first = rank * per_rank, quads = min(per_rank, size / 4 - first);
    int tile = blockIdx.x * gridDim.y + blockIdx.y;
    parts += (Index)tile * count * PART_SUMS + 4 * first;
    for (int i = threadIdx.x; i < quads; i += THREADS) {
        int e = 4 * (first + i);
        float4 sum = over_cluster(e);
        if (count == 1) result.store(sum, i0, j0, e / TILE_N, e % TILE_N);
        else *(float4*)(parts + (Index)part * PART_SUMS + 4 * i) = sum;
    }
#if __CUDA_ARCH__ >= 900 && CLUSTER
    cluster_barrier();  // no other block reads this one's memory any more
#endif
    if (count == 1 || !is_last(tickets + tile * RANKS + rank, count)) return;
    int groups = max(1, min(count, THREADS / max(1, quads))); // each of which adds every groups-th part
    for (int i = threadIdx.x; i < quads * groups; i += THREADS) {
        int group = i / quads, e = 4 * (i % quads);
        float4 sum = __ldcg((const float4*)(parts + (Index)group * PART_SUMS + e));
        #pragma unroll 16
        for (int k = group + groups; k < count; k += groups) {
            sum = plus(sum, __ldcg((const float4*)(parts + (Index)k * PART_SUMS + e)));
        }
        if (groups == 1) result.store(sum, i0, j0, (4 * first + e) / TILE_N, (4 * first + e) % TILE_N);
        else *(float4*)(memory + 4 * i) = sum;
    }
    if (groups == 1) return;
    __syncthreads();
    for (int i = threadIdx.x; i < quads; i += THREADS) {
        float4 sum = *(const float4*)(memory + 4 * i);
        for (int group = 1; group < groups; group++) sum = plus(sum, *(const float4*)(memory + 4 * (group * quads + i)));
        result.store(sum, i0, j0, 4 * (first + i) / TILE_N, 4 * (first + i) % TILE_N);
    }
}
