// The parts of CUDA that kernels.cu needs, for a C++ compiler. The threads of a block run one after the other, each on its
// own stack, and switch at __syncthreads.
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
static inline void atomicAdd(unsigned long long* at, unsigned long long value) { *at += value; }
static inline unsigned atomicAdd(unsigned* at, unsigned value) { unsigned old = *at; *at += value; return old; }
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

// All warps of a block have to call it equally often, because it waits for the whole block.
static void __syncwarp() { __syncthreads(); }

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
            if (ended_now != 0 && ended_now != count) return "some threads of a block wait at __syncthreads, and others have ended";
            ended = ended_now;
        }
        if (error) return error;
    }
    return 0;
}
