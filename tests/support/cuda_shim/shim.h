// The parts of CUDA that the kernels need, for a C++ compiler. The threads of a block run one after the other, each on
// its own stack, and switch at __syncthreads.
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

struct Dim { unsigned x, y, z; };
static Dim gridDim, blockDim, blockIdx, threadIdx;

#define __global__
#define __device__ inline
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
static inline void atomicAdd(unsigned long long* at, unsigned long long value) { *at += value; }
static inline unsigned atomicAdd(unsigned* at, unsigned value) { unsigned old = *at; *at += value; return old; }
static inline unsigned atomicInc(unsigned* at, unsigned last) {
    unsigned old = *at;
    *at = old >= last ? 0 : old + 1;
    return old;
}
static inline void __threadfence() {}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename T> static inline T __ldcg(const T* at) { return *at; }

static const int MAX_THREADS = 1024, STACK = 64 * 1024;
struct Thread { Dim index; char* stack; jmp_buf place; bool started, done; };
static Thread threads[MAX_THREADS];
static ucontext_t new_context;
static jmp_buf scheduler;
static Thread* running;
static void (*body)(void**);
static void** arguments;
static const char* error;

static void __syncthreads() {
    if (!running) { error = "a kernel that should not synchronize calls __syncthreads"; return; }
    if (!_setjmp(running->place)) _longjmp(scheduler, 1);
    threadIdx = running->index;
}

// These wait for the whole block, so all of its threads must call them equally often.
static void __syncwarp() { __syncthreads(); }
template <typename T> static T of_thread(T value, int thread) {
    static T given[MAX_THREADS];
    given[running - threads] = value;
    __syncthreads();
    value = given[thread];
    __syncthreads();
    return value;
}
template <typename T> static T __shfl_xor_sync(unsigned, T value, int lanes) {
    return of_thread(value, (int)(running - threads) ^ lanes);
}
static int __ffs(unsigned bits) { return __builtin_ffs(bits); }
static unsigned __ballot_sync(unsigned, bool value) {
    static bool given[MAX_THREADS];
    int self = running - threads, warp = self / 32 * 32;
    given[self] = value;
    __syncthreads();
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= (unsigned)given[warp + lane] << lane;
    __syncthreads();
    return bits;
}
template <typename T> static T __shfl_sync(unsigned, T value, int lane) {
    int self = running - threads;
    return of_thread(value, self - self % 32 + lane % 32);
}

static void enter() {
    threadIdx = running->index;
    body(arguments);
    running->done = true;
    _longjmp(scheduler, 1);
}

static void resume(Thread& thread) {  // until it reaches __syncthreads, or ends
    running = &thread;
    if (_setjmp(scheduler)) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    getcontext(&new_context);
    new_context.uc_stack.ss_sp = thread.stack;
    new_context.uc_stack.ss_size = STACK;
    new_context.uc_link = 0;
    makecontext(&new_context, enter, 0);
    setcontext(&new_context);
}

static const char* run(void (*kernel)(void**), void** args, Dim grid, Dim block, bool synchronizes) {
    int count = block.x * block.y * block.z;
    if (count < 1 || count > MAX_THREADS) return "a block has 1 to 1024 threads";
    gridDim = grid; blockDim = block; body = kernel; arguments = args; error = 0;
    for (unsigned z = 0; z < grid.z; z++) for (unsigned y = 0; y < grid.y; y++) for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        for (int i = 0; i < count; i++) {
            Dim index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
            if (!synchronizes) { running = 0; threadIdx = index; kernel(args); continue; }
            if (!threads[i].stack) threads[i].stack = (char*)malloc(STACK);
            threads[i].index = index; threads[i].started = threads[i].done = false;
        }
        for (int ended = 0; synchronizes && ended < count;) {
            int ended_now = 0;
            for (int i = 0; i < count; i++) {
                if (!threads[i].done) resume(threads[i]);
                ended_now += threads[i].done;
            }
            if (ended_now != 0 && ended_now != count)
                return "some threads of a block wait at __syncthreads, and others have ended";
            ended = ended_now;
        }
        if (error) return error;
    }
    return 0;
}

// What convolutions.cu does by instructions: roundings, products by tensor cores, copies ------------------------------
// precision: 0 for float32, 1 for TF32, 2 for bfloat16, 3 for float16.

static unsigned to_tf32(float x) {  // to the nearest, ties away from zero
    unsigned bits = __float_as_uint(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

static unsigned to_half(float x, int precision) {  // to the nearest, ties to even
    unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u;
    if (precision == 2) return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return 0x7fffu;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;
    if (bits < 0x38800000u) return sign | (unsigned)rintf(__uint_as_float(bits) * 16777216.0f);
    return sign | (bits + 0xfffu + (bits >> 13 & 1) - 0x38000000u) >> 13;
}

static unsigned to_halves(float low, float high, int precision) {
    return to_half(low, precision) | to_half(high, precision) << 16;
}

static float from_half(unsigned bits, int precision) {
    if (precision == 2) return __uint_as_float(bits << 16);
    unsigned exponent = bits >> 10 & 31, mantissa = bits & 0x3ffu;
    float size = exponent == 31 ? __uint_as_float(0x7f800000u | mantissa << 13)
                                : ldexpf(mantissa + (exponent ? 1024 : 0), exponent ? (int)exponent - 25 : -24);
    return bits & 0x8000u ? -size : size;
}

static float rounded(float x, int precision) {
    if (precision == 0) return x;
    return precision == 1 ? __uint_as_float(to_tf32(x)) : from_half(to_half(x, precision), precision);
}

static float product_of_words(unsigned a, unsigned b, int precision) {
    if (precision == 1) return __uint_as_float(a) * __uint_as_float(b);
    return from_half(a & 0xffffu, precision) * from_half(b & 0xffffu, precision) +
           from_half(a >> 16, precision) * from_half(b >> 16, precision);
}

// Every thread of the block must call it. Thread t of a warp has element (t / 4 + 8 (i % 2), t % 4 + 4 (i / 2)) of a in
// a[i], element (t % 4 + 4 i, t / 4) of b in b[i], and element (t / 4 + 8 (i / 2), t % 4 * 2 + i % 2) of the sums.
static void multiply_words(float sum[4], const unsigned a[4], const unsigned b[2], int precision) {
    static unsigned given[2][MAX_THREADS][6];
    static int calls[MAX_THREADS];
    int self = running - threads, warp = self / 32 * 32, row = self % 32 / 4, column = self % 4 * 2;
    auto words = given[calls[self]++ % 2];  // alternating, so that one barrier is enough
    memcpy(words[self], a, 4 * sizeof *a);
    memcpy(words[self] + 4, b, 2 * sizeof *b);
    __syncthreads();
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 8; k++) {
            unsigned left = words[warp + row * 4 + k % 4][i / 2 + k / 4 * 2];
            unsigned right = words[warp + (column + i % 2) * 4 + k % 4][4 + k / 4];
            sum[i] += product_of_words(left, right, precision);
        }
    }
}

// Copies to shared memory, which end at once here.
static void copy(float* to, const float* from, bool wanted) {
    for (int i = 0; i < 4; i++) to[i] = wanted ? from[i] : 0;
}
static void end_copies() {}
template <int latest> void wait_for_copies() {}
