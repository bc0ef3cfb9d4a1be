// Attention in heads and its gradients, for float32 arrays (N, T, H, size): see ../reference/attention.py. As in
// FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691), scores exist only in tiles, and the backward pass
// computes them again from the logarithms of their sums.
//
// A block has ROWS rows of one side, queries or keys, of one head of one sample. It goes through the other side in tiles
// of COLUMNS rows, which it copies into shared memory. Scores (ROWS, COLUMNS) and sums (ROWS, SIZE) are in registers.
// They are multiplied by ordinary arithmetic (`Exact`), or by tensor cores after rounding (`Tensor`). Sums are made in a
// fixed order, so that the same input gives the same bits.
//
// attention.py puts random.cu and instructions.cu before the templates and the instances that it needs behind them. SIZE
// is at least `size`, a multiple of 4. All rows of the arrays begin at multiples of 16 bytes.

typedef unsigned char Byte;

struct Heads {  // an array: its address, and the elements from one sample, step and head to the next
    Index address, sample, step, head;

    __device__ float* row(int n, int h, int t) const { return (float*)address + n * sample + t * step + h * head; }
};

struct Sizes {  // of an attention, and whether it is causal
    int heads, queries, keys, size, causal;

    __device__ int last_key(int query) const { return causal ? query + keys - queries : keys - 1; }
    __device__ int first_query(int key) const { return causal && key > keys - queries ? key - keys + queries : 0; }
};

struct Dropout {  // word: null if there is none
    const double* word;
    Index first_row;
    Word threshold;
    float kept;

    __device__ Word of_query(const Sizes& sizes, int n, int h, int query) const {
        return row_hash((Word)*word, ((first_row + n) * sizes.heads + h) * sizes.queries + query);
    }
    __device__ Word of_key(int key) const { return column_hash((Word)*word, key); }
    __device__ float factor(Word query, Word key) const { return hash32(query ^ key) >= threshold ? kept : 0.0f; }
};

const float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

__device__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ float dot(Four a, Four b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// How a block multiplies ---------------------------------------------------------------------------------------------
// A thread has TALL rows, with WIDE columns of scores and DEEP columns of sums. The LANES threads that share rows are
// neighbors. Tiles are stored for products over their columns (inner) or over their rows (outer), or for both.
//
//   multiply_inner: scores += own tileᵀ         multiply_outer: sums += scores tile

template <int SIZE_, int COLUMNS_> struct Exact {
    static const int SIZE = SIZE_, COLUMNS = COLUMNS_, ROWS = 64, THREADS = 128, LANES = 16;
    static const int TALL = ROWS * LANES / THREADS, WIDE = COLUMNS / LANES, DEEP = SIZE / LANES;
    static const int VECTOR = DEEP < 4 ? DEEP : 4, PITCH = SIZE + 4, SCRATCH_PITCH = COLUMNS + 4;
    static const bool SAME = true;  // both kinds of tiles are stored in the same way
    static const int SCRATCH = ROWS * SCRATCH_PITCH;
    static __device__ constexpr int inner_words(int rows) { return rows * PITCH; }
    static __device__ constexpr int outer_words(int rows) { return rows * PITCH; }

    int lane, first;

    __device__ Exact() : lane(threadIdx.x % LANES), first(threadIdx.x / LANES) {}

    __device__ int row(int i) const { return first + i * (ROWS / TALL); }
    __device__ int column(int j) const { return lane + j * LANES; }
    __device__ int place(int j) const { return (lane + j / VECTOR * LANES) * VECTOR + j % VECTOR; }

    static __device__ void put_inner(Word* tile, int row, int d, Four a) { *(Four*)(tile + row * PITCH + d) = a; }
    static __device__ void put_outer(Word* tile, int row, int d, Four a, Four b) {  // rows `row` and `row` + 1
        put_inner(tile, row, d, a);
        put_inner(tile, row + 1, d, b);
    }

    __device__ void multiply_inner(float (&scores)[TALL][WIDE], const Word* own, const Word* tile) const {
#pragma unroll 4
        for (int d = 0; d < SIZE; d += 4) {
            Four a[TALL], b[WIDE];
#pragma unroll
            for (int i = 0; i < TALL; i++) a[i] = *(const Four*)(own + row(i) * PITCH + d);
#pragma unroll
            for (int j = 0; j < WIDE; j++) b[j] = *(const Four*)(tile + column(j) * PITCH + d);
#pragma unroll
            for (int i = 0; i < TALL; i++) {
#pragma unroll
                for (int j = 0; j < WIDE; j++) scores[i][j] += dot(a[i], b[j]);
            }
        }
    }

    __device__ void multiply_outer(float (&sums)[TALL][DEEP], const float (&scores)[TALL][WIDE], const Word* tile,
                                   float* scratch) const {
        __syncwarp();  // the scratch memory has been read
#pragma unroll
        for (int i = 0; i < TALL; i++) {
#pragma unroll
            for (int j = 0; j < WIDE; j++) scratch[row(i) * SCRATCH_PITCH + column(j)] = scores[i][j];
        }
        __syncwarp();
#pragma unroll 2
        for (int k = 0; k < COLUMNS; k += 4) {
            float b[4][DEEP];
#pragma unroll
            for (int q = 0; q < 4; q++) {
#pragma unroll
                for (int j = 0; j < DEEP; j += VECTOR) get(b[q] + j, tile + (k + q) * PITCH + place(j));
            }
#pragma unroll
            for (int i = 0; i < TALL; i++) {
                Four a = *(const Four*)(scratch + row(i) * SCRATCH_PITCH + k);
#pragma unroll
                for (int j = 0; j < DEEP; j++) {
                    sums[i][j] += a.x * b[0][j] + a.y * b[1][j] + a.z * b[2][j] + a.w * b[3][j];
                }
            }
        }
    }

    static __device__ void get(float* to, const Word* from) {  // VECTOR numbers
        if (VECTOR == 4) {
            Four four = *(const Four*)from;
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        } else if (VECTOR == 2) {
            Two two = *(const Two*)from;
            to[0] = two.x, to[1] = two.y;
        } else {
            to[0] = *(const float*)from;
        }
    }
};

// Words have one number of TF32, or two of 16 bits that are neighbors along the axis of the product. A warp has 16 rows.
// A product of `multiply_words` is over 8 words, in any order that is the same for both matrices: in multiply_inner, a
// thread reads pairs of neighbors, and in multiply_outer, words 0 to 7 are those of the scores that a thread has.
template <Precision precision, int SIZE_, int COLUMNS_> struct Tensor {
    static const int SIZE = SIZE_, COLUMNS = COLUMNS_, ROWS = 64, THREADS = 128, LANES = 4;
    static const int TALL = 2, WIDE = COLUMNS / LANES, DEEP = SIZE / LANES, VECTOR = 2;
    static const int EACH = precision == TF32 ? 1 : 2;  // numbers in a word
    static const bool SAME = EACH == 1;
    static const int INNER_PITCH = SIZE / EACH + 8, OUTER_PITCH = SIZE + 8;
    static const int SCRATCH = 0;
    static __device__ constexpr int inner_words(int rows) { return rows * INNER_PITCH; }
    static __device__ constexpr int outer_words(int rows) { return rows / EACH * OUTER_PITCH; }

    int lane, group, first;

    __device__ Tensor() : lane(threadIdx.x % 4), group(threadIdx.x % 32 / 4), first(threadIdx.x / 32 * 16 + group) {}

    __device__ int row(int i) const { return first + 8 * i; }
    __device__ int column(int j) const { return j / 2 * 8 + lane * 2 + j % 2; }
    __device__ int place(int j) const { return column(j); }

    static __device__ Word word(float a, float b) { return EACH == 1 ? to_tf32(a) : to_halves(a, b, precision); }

    static __device__ void put_inner(Word* tile, int row, int d, Four a) {
        Word* to = tile + row * INNER_PITCH + d / EACH;
        if (EACH == 1) *(Words*)to = Words{word(a.x, 0), word(a.y, 0), word(a.z, 0), word(a.w, 0)};
        else *(WordPair*)to = WordPair{word(a.x, a.y), word(a.z, a.w)};
    }
    static __device__ void put_outer(Word* tile, int row, int d, Four a, Four b) {  // rows `row` and `row` + 1
        Words words = {word(a.x, b.x), word(a.y, b.y), word(a.z, b.z), word(a.w, b.w)};
        *(Words*)(tile + row / EACH * OUTER_PITCH + d) = words;
        if (EACH == 1) put_inner(tile, row + 1, d, b);
    }

    static __device__ void add_product(float* first, float* second, const Word (&a)[4], const Word (&b)[2]) {
        float sums[4] = {first[0], first[1], second[0], second[1]};
        multiply_words(sums, a, b, precision);
        first[0] = sums[0], first[1] = sums[1], second[0] = sums[2], second[1] = sums[3];
    }

    __device__ void multiply_inner(float (&scores)[TALL][WIDE], const Word* own, const Word* tile) const {
#pragma unroll
        for (int step = 0; step < SIZE / EACH; step += 8) {
            WordPair upper = *(const WordPair*)(own + row(0) * INNER_PITCH + step + 2 * lane);
            WordPair lower = *(const WordPair*)(own + row(1) * INNER_PITCH + step + 2 * lane);
            Word a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
            for (int j = 0; j < WIDE; j += 2) {
                WordPair pair = *(const WordPair*)(tile + (4 * j + group) * INNER_PITCH + step + 2 * lane);
                Word b[2] = {pair.x, pair.y};
                add_product(scores[0] + j, scores[1] + j, a, b);
            }
        }
    }

    __device__ void multiply_outer(float (&sums)[TALL][DEEP], const float (&scores)[TALL][WIDE], const Word* tile,
                                   float*) const {
        const int APART = EACH == 1 ? 1 : 4, SPREAD = EACH == 1 ? 2 : 1;  // words of a thread: lane · SPREAD, + APART
#pragma unroll
        for (int step = 0; step < COLUMNS / EACH; step += 8) {
            const int j = step / 4 * EACH;
            Word a[4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                a[i] = word(scores[i][j], scores[i][j + 1]);
                a[i + 2] = EACH == 1 ? word(scores[i][j + 1], 0) : word(scores[i][j + EACH], scores[i][j + 2 * EACH - 1]);
            }
            const Word* from = tile + (step + lane * SPREAD) * OUTER_PITCH + group;
#pragma unroll
            for (int d = 0; d < DEEP; d += 2) {
                Word b[2] = {from[4 * d], from[APART * OUTER_PITCH + 4 * d]};
                add_product(sums[0] + d, sums[1] + d, a, b);
            }
        }
    }
};

// What all kernels do ------------------------------------------------------------------------------------------------

// Copies rows `first` to `first` + ROWS of a head into tiles, with zeros beyond `count` and `size`. A tile may be null.
template <typename Math, int ROWS>
__device__ void load_tile(const Heads& from, int n, int h, int first, int count, int size, Word* inner, Word* outer) {
    const int QUADS = Math::SIZE / 4;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS / 2 * QUADS; i += Math::THREADS) {
        int row = i / QUADS * 2, d = i % QUADS * 4, t = first + row;
        Four a = {0, 0, 0, 0}, b = {0, 0, 0, 0};
        const float* at = from.row(n, h, t) + d;
        if (d < size && t < count) a = *(const Four*)at;
        if (d < size && t + 1 < count) b = *(const Four*)(at + from.step);
        if (inner) {
            Math::put_inner(inner, row, d, a);
            Math::put_inner(inner, row + 1, d, b);
        }
        if (outer && outer != inner) Math::put_outer(outer, row, d, a, b);
    }
}

// The words of a tile that is stored for both kinds of products, and the part of it for products over its rows.
template <typename Math> __device__ constexpr int words_of_both(int rows) {
    return Math::inner_words(rows) + (Math::SAME ? 0 : Math::outer_words(rows));
}
template <typename Math> __device__ Word* outer_of_both(Word* tile) {
    return Math::SAME ? tile : tile + Math::inner_words(Math::COLUMNS);
}

template <typename Math> __device__ float sum_over_lanes(float value) {
    for (int lanes = Math::LANES / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
    return value;
}

template <typename Math> __device__ float largest_over_lanes(float value) {
    for (int lanes = Math::LANES / 2; lanes > 0; lanes /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, lanes));
    }
    return value;
}

// Row t of an array = the sums of row i of this thread, times `factor`.
template <typename Math>
__device__ void store_sums(const Math& math, float (&sums)[Math::DEEP], float factor, float* to, int size) {
#pragma unroll
    for (int j = 0; j < Math::DEEP; j += Math::VECTOR) {
        if (math.place(j) >= size) continue;
#pragma unroll
        for (int k = j; k < j + Math::VECTOR; k++) sums[k] *= factor;
        put(to + math.place(j), sums + j, Math::VECTOR);
    }
}

__device__ bool counts(const Sizes& sizes, const Byte* mask, int n, int key) {
    return key < sizes.keys && (!mask || mask[(Index)n * sizes.keys + key]);
}

#if defined(__CUDA_ARCH__)
#define SHARED_MEMORY(words) extern __shared__ __align__(16) Word memory[]  // the launch asks for it
#else
#define SHARED_MEMORY(words) __shared__ __align__(16) Word memory[words]
#endif

// Forward ------------------------------------------------------------------------------------------------------------
// The largest score so far is subtracted from the scores, and `totals` are the sums of their powers. Block (n · heads + h,
// tile) has a tile of queries; those with the most keys begin first.

template <typename Math> __device__ constexpr int words_of_attend() {
    return Math::inner_words(Math::ROWS) + Math::inner_words(Math::COLUMNS) + Math::outer_words(Math::COLUMNS) +
           Math::SCRATCH;
}

template <typename Math, bool DROPOUT, int WORDS>
__device__ void attend(const Heads& q, const Heads& k, const Heads& v, const Sizes& sizes, const Byte* mask,
                       double scale, const double* word, Index first_row, Word threshold, double kept,
                       const Heads& out, float* log_sums) {
    const int ROWS = Math::ROWS, COLUMNS = Math::COLUMNS, TALL = Math::TALL, WIDE = Math::WIDE, DEEP = Math::DEEP;
    static_assert(WORDS == words_of_attend<Math>(), "attention.py asks for as much");
    SHARED_MEMORY(WORDS);
    Word *own = memory, *k_tile = own + Math::inner_words(ROWS), *v_tile = k_tile + Math::inner_words(COLUMNS);
    float* scratch = (float*)(v_tile + Math::outer_words(COLUMNS));
    const Dropout dropout = {word, first_row, threshold, (float)kept};
    const float factor = scale * LOG2_E;  // of scores, which are in units of log 2
    Math math;
    int n = blockIdx.x / sizes.heads, h = blockIdx.x % sizes.heads, size = sizes.size;
    int first = (gridDim.y - 1 - blockIdx.y) * ROWS, end = min(sizes.keys, sizes.last_key(first + ROWS - 1) + 1);
    load_tile<Math, ROWS>(q, n, h, first, sizes.queries, size, own, 0);
    float sums[TALL][DEEP] = {}, highest[TALL], totals[TALL] = {};
    Word query_noise[TALL];
#pragma unroll
    for (int i = 0; i < TALL; i++) {
        highest[i] = -infinity();
        if (DROPOUT) query_noise[i] = dropout.of_query(sizes, n, h, first + math.row(i));
    }
    for (int first_key = 0; first_key < end; first_key += COLUMNS) {
        __syncthreads();  // the previous tiles have been read
        load_tile<Math, COLUMNS>(k, n, h, first_key, sizes.keys, size, k_tile, 0);
        load_tile<Math, COLUMNS>(v, n, h, first_key, sizes.keys, size, 0, v_tile);
        __syncthreads();
        float scores[TALL][WIDE] = {};
        math.multiply_inner(scores, own, k_tile);
        bool counted[WIDE];
#pragma unroll
        for (int j = 0; j < WIDE; j++) counted[j] = counts(sizes, mask, n, first_key + math.column(j));
#pragma unroll
        for (int i = 0; i < TALL; i++) {
            int last = sizes.last_key(first + math.row(i)) - first_key;
            float largest = highest[i];
#pragma unroll
            for (int j = 0; j < WIDE; j++) {
                scores[i][j] = counted[j] && math.column(j) <= last ? scores[i][j] * factor : -infinity();
                largest = fmaxf(largest, scores[i][j]);
            }
            largest = largest_over_lanes<Math>(largest);
            float shift = largest == -infinity() ? 0.0f : largest, weight = exp2f(highest[i] - shift);
            highest[i] = largest;
            totals[i] *= weight;
#pragma unroll
            for (int j = 0; j < DEEP; j++) sums[i][j] *= weight;
#pragma unroll
            for (int j = 0; j < WIDE; j++) {
                scores[i][j] = exp2f(scores[i][j] - shift);
                totals[i] += scores[i][j];
                if (DROPOUT) {
                    scores[i][j] *= dropout.factor(query_noise[i], dropout.of_key(first_key + math.column(j)));
                }
            }
        }
        math.multiply_outer(sums, scores, v_tile, scratch);
    }
#pragma unroll
    for (int i = 0; i < TALL; i++) {
        int query = first + math.row(i);
        float total = sum_over_lanes<Math>(totals[i]);
        if (query >= sizes.queries) continue;
        bool empty = total == 0;
        store_sums(math, sums[i], empty ? 0.0f : 1 / total, out.row(n, h, query), size);
        if (math.lane == 0) {
            log_sums[(Index)blockIdx.x * sizes.queries + query] =
                empty ? infinity() : (highest[i] + log2f(total)) * LN_2;
        }
    }
}

// Gradients ----------------------------------------------------------------------------------------------------------
// P = exp(scale · q kᵀ - log_sums), with factors M of dropout, and dS = P ∘ (M ∘ (grad vᵀ) - D) with D_t = grad_t·out_t:
// attend_query_grad stores D in `products` (N, H, T), and grad_q = scale · dS k. attend_key_grads follows it, and stores
// grad_k = scale · dSᵀ q and grad_v = (M ∘ P)ᵀ grad.

template <typename Math> __device__ constexpr int words_of_query_grad() {
    return 2 * Math::inner_words(Math::ROWS) + words_of_both<Math>(Math::COLUMNS) + Math::inner_words(Math::COLUMNS) +
           Math::SCRATCH;
}

// Block (n · heads + h, tile) has a tile of queries.
template <typename Math, bool DROPOUT, int WORDS>
__device__ void attend_query_grad(const Heads& q, const Heads& k, const Heads& v, const Sizes& sizes,
                                  const Byte* mask, double scale, const double* word, Index first_row,
                                  Word threshold, double kept, const Heads& out, const float* log_sums,
                                  const Heads& grad, const Heads& grad_q, float* products) {
    const int ROWS = Math::ROWS, COLUMNS = Math::COLUMNS, TALL = Math::TALL, WIDE = Math::WIDE, DEEP = Math::DEEP;
    static_assert(WORDS == words_of_query_grad<Math>(), "attention.py asks for as much");
    SHARED_MEMORY(WORDS);
    Word *own_q = memory, *own_grad = own_q + Math::inner_words(ROWS), *k_tile = own_grad + Math::inner_words(ROWS);
    Word *v_tile = k_tile + words_of_both<Math>(COLUMNS);
    float* scratch = (float*)(v_tile + Math::inner_words(COLUMNS));
    const Dropout dropout = {word, first_row, threshold, (float)kept};
    const float factor = scale * LOG2_E;  // of scores, which are in units of log 2
    Math math;
    int n = blockIdx.x / sizes.heads, h = blockIdx.x % sizes.heads, size = sizes.size;
    int first = (gridDim.y - 1 - blockIdx.y) * ROWS, end = min(sizes.keys, sizes.last_key(first + ROWS - 1) + 1);
    Index numbers = (Index)blockIdx.x * sizes.queries;  // the place of this head in log_sums and products
    load_tile<Math, ROWS>(q, n, h, first, sizes.queries, size, own_q, 0);
    load_tile<Math, ROWS>(grad, n, h, first, sizes.queries, size, own_grad, 0);
    float sums[TALL][DEEP] = {}, logs[TALL], own_products[TALL];
    Word query_noise[TALL];
#pragma unroll
    for (int i = 0; i < TALL; i++) {
        int query = first + math.row(i);
        bool exists = query < sizes.queries;
        float product = 0;
        for (int d = 4 * math.lane; d < size && exists; d += 4 * Math::LANES) {
            product += dot(*(const Four*)(grad.row(n, h, query) + d), *(const Four*)(out.row(n, h, query) + d));
        }
        own_products[i] = sum_over_lanes<Math>(product);
        logs[i] = exists ? log_sums[numbers + query] * LOG2_E : infinity();
        if (exists && math.lane == 0) products[numbers + query] = own_products[i];
        if (DROPOUT) query_noise[i] = dropout.of_query(sizes, n, h, query);
    }
    for (int first_key = 0; first_key < end; first_key += COLUMNS) {
        __syncthreads();  // the previous tiles have been read
        load_tile<Math, COLUMNS>(k, n, h, first_key, sizes.keys, size, k_tile, outer_of_both<Math>(k_tile));
        load_tile<Math, COLUMNS>(v, n, h, first_key, sizes.keys, size, v_tile, 0);
        __syncthreads();
        float scores[TALL][WIDE] = {}, grads[TALL][WIDE] = {};
        math.multiply_inner(scores, own_q, k_tile);
        math.multiply_inner(grads, own_grad, v_tile);
#pragma unroll
        for (int j = 0; j < WIDE; j++) {
            int key = first_key + math.column(j);
            bool counted = counts(sizes, mask, n, key);
            Word key_noise = DROPOUT ? dropout.of_key(key) : 0;
#pragma unroll
            for (int i = 0; i < TALL; i++) {
                bool used = counted && key <= sizes.last_key(first + math.row(i));
                float p = used ? exp2f(scores[i][j] * factor - logs[i]) : 0.0f;
                if (DROPOUT) grads[i][j] *= dropout.factor(query_noise[i], key_noise);
                grads[i][j] = p * (grads[i][j] - own_products[i]);
            }
        }
        math.multiply_outer(sums, grads, outer_of_both<Math>(k_tile), scratch);
    }
#pragma unroll
    for (int i = 0; i < TALL; i++) {
        int query = first + math.row(i);
        if (query < sizes.queries) store_sums(math, sums[i], scale, grad_q.row(n, h, query), size);
    }
}

template <typename Math> __device__ constexpr int words_of_key_grads() {
    return 2 * Math::inner_words(Math::ROWS) + 2 * words_of_both<Math>(Math::COLUMNS) + Math::SCRATCH;
}

// Block (n · heads + h, tile) has a tile of keys.
template <typename Math, bool DROPOUT, int WORDS>
__device__ void attend_key_grads(const Heads& q, const Heads& k, const Heads& v, const Sizes& sizes,
                                 const Byte* mask, double scale, const double* word, Index first_row, Word threshold,
                                 double kept, const float* log_sums, const Heads& grad, const float* products,
                                 const Heads& grad_k, const Heads& grad_v) {
    const int ROWS = Math::ROWS, COLUMNS = Math::COLUMNS, TALL = Math::TALL, WIDE = Math::WIDE, DEEP = Math::DEEP;
    static_assert(WORDS == words_of_key_grads<Math>(), "attention.py asks for as much");
    SHARED_MEMORY(WORDS);
    Word *own_k = memory, *own_v = own_k + Math::inner_words(ROWS), *q_tile = own_v + Math::inner_words(ROWS);
    Word *grad_tile = q_tile + words_of_both<Math>(COLUMNS);
    float* scratch = (float*)(grad_tile + words_of_both<Math>(COLUMNS));
    const Dropout dropout = {word, first_row, threshold, (float)kept};
    const float factor = scale * LOG2_E;  // of scores, which are in units of log 2
    Math math;
    int n = blockIdx.x / sizes.heads, h = blockIdx.x % sizes.heads, size = sizes.size;
    int first = blockIdx.y * ROWS;
    Index numbers = (Index)blockIdx.x * sizes.queries;  // the place of this head in log_sums and products
    load_tile<Math, ROWS>(k, n, h, first, sizes.keys, size, own_k, 0);
    load_tile<Math, ROWS>(v, n, h, first, sizes.keys, size, own_v, 0);
    float k_sums[TALL][DEEP] = {}, v_sums[TALL][DEEP] = {};
    bool counted[TALL];
    Word key_noise[TALL];
#pragma unroll
    for (int i = 0; i < TALL; i++) {
        counted[i] = counts(sizes, mask, n, first + math.row(i));
        if (DROPOUT) key_noise[i] = dropout.of_key(first + math.row(i));
    }
    int begin = sizes.first_query(first) / COLUMNS * COLUMNS;
    for (int first_query = begin; first_query < sizes.queries; first_query += COLUMNS) {
        __syncthreads();  // the previous tiles have been read
        load_tile<Math, COLUMNS>(q, n, h, first_query, sizes.queries, size, q_tile, outer_of_both<Math>(q_tile));
        load_tile<Math, COLUMNS>(grad, n, h, first_query, sizes.queries, size, grad_tile,
                                 outer_of_both<Math>(grad_tile));
        __syncthreads();
        float scores[TALL][WIDE] = {}, grads[TALL][WIDE] = {};
        math.multiply_inner(scores, own_k, q_tile);
        math.multiply_inner(grads, own_v, grad_tile);
#pragma unroll
        for (int j = 0; j < WIDE; j++) {
            int query = first_query + math.column(j), last = sizes.last_key(query) - first;
            bool exists = query < sizes.queries;
            float log = exists ? log_sums[numbers + query] * LOG2_E : 0.0f;
            float product = exists ? products[numbers + query] : 0.0f;
            Word query_noise = DROPOUT ? dropout.of_query(sizes, n, h, query) : 0;
#pragma unroll
            for (int i = 0; i < TALL; i++) {
                bool used = exists && counted[i] && math.row(i) <= last;
                float p = used ? exp2f(scores[i][j] * factor - log) : 0.0f;
                float dropped = DROPOUT ? dropout.factor(query_noise, key_noise[i]) : 1.0f;
                scores[i][j] = p * dropped;
                grads[i][j] = p * (grads[i][j] * dropped - product);
            }
        }
        math.multiply_outer(v_sums, scores, outer_of_both<Math>(grad_tile), scratch);
        math.multiply_outer(k_sums, grads, outer_of_both<Math>(q_tile), scratch);
    }
#pragma unroll
    for (int i = 0; i < TALL; i++) {
        int key = first + math.row(i);
        if (key >= sizes.keys) continue;
        store_sums(math, k_sums[i], scale, grad_k.row(n, h, key), size);
        store_sums(math, v_sums[i], 1, grad_v.row(n, h, key), size);
    }
}
