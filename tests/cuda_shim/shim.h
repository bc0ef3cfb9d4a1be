// What kernels.cu takes for granted, for a C++ compiler: the threads of a block run one after the other, and take turns
// where they meet (__syncthreads), each on a stack of its own.
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

static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline void atomicAdd(unsigned long long* at, unsigned long long value) { *at += value; }

static const int MOST = 1024, STACK = 64 * 1024;
struct Thread { Dim index; char* stack; jmp_buf place; bool begun, done; };
static Thread threads[MOST];
static ucontext_t starter, fresh;
static jmp_buf scheduler;
static Thread* running;
static void (*body)(void**);
static void** arguments;
static const char* trouble;

static void __syncthreads() {
    if (!running) { trouble = "a kernel that was said to run without meetings calls __syncthreads"; return; }
    if (!_setjmp(running->place)) _longjmp(scheduler, 1);
    threadIdx = running->index;
}

static void enter() {
    threadIdx = running->index;
    body(arguments);
    running->done = true;
    _longjmp(scheduler, 1);
}

static void go_on(Thread& thread) {  // until it meets the others, or ends
    running = &thread;
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = thread.stack;
    fresh.uc_stack.ss_size = STACK;
    fresh.uc_link = 0;
    makecontext(&fresh, enter, 0);
    setcontext(&fresh);
}

static const char* run(void (*kernel)(void**), void** given, Dim grid, Dim block, bool meets) {
    int count = block.x * block.y * block.z;
    if (count < 1 || count > MOST) return "a block has 1 to 1024 threads";
    gridDim = grid; blockDim = block; body = kernel; arguments = given; trouble = 0;
    for (unsigned z = 0; z < grid.z; z++) for (unsigned y = 0; y < grid.y; y++) for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        for (int i = 0; i < count; i++) {
            Dim index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
            if (!meets) { running = 0; threadIdx = index; kernel(given); continue; }
            if (!threads[i].stack) threads[i].stack = (char*)malloc(STACK);
            threads[i].index = index; threads[i].begun = threads[i].done = false;
        }
        for (int ended = 0; meets && ended < count;) {
            int ended_now = 0;
            for (int i = 0; i < count; i++) {
                if (!threads[i].done) go_on(threads[i]);
                ended_now += threads[i].done;
            }
            if (ended_now != 0 && ended_now != count) return "some threads of a block meet, and others have ended";
            ended = ended_now;
        }
        if (trouble) return trouble;
    }
    return 0;
}
