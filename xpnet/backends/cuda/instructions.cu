// What kernels for tensor cores share: vectors of numbers, and instructions of newer devices, which
// tests/support/cuda_shim/shim.h replaces by functions.

typedef long long Index;
typedef unsigned int Word;

#define KERNEL extern "C" __global__ void

struct alignas(16) Four {
    float x, y, z, w;
};

struct alignas(8) Two {
    float x, y;
};

struct alignas(16) Words {
    Word x, y, z, w;
};

struct alignas(8) WordPair {
    Word x, y;
};

// Stores 4, 2 or 1 neighbors.
__device__ void put(float* to, const float* values, int width) {
    if (width == 4) *(Four*)to = Four{values[0], values[1], values[2], values[3]};
    else if (width == 2) *(Two*)to = Two{values[0], values[1]};
    else *to = *values;
}

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
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if (precision == TF32) MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
    else if (precision == BFLOAT16) MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
    else MMA("m16n8k16.row.col.f32.f16.f16.f32");
#undef MMA
#endif
}

// Copies four numbers to shared memory, or zeros if they are not wanted. The copy may last until wait_for_copies.
__device__ void copy(float* to, const float* from, bool wanted) {
#if __CUDA_ARCH__ >= 800
    asm volatile("{.reg .u64 to; .reg .u32 place; cvta.to.shared.u64 to, %0; cvt.u32.u64 place, to;\n"
                 "cp.async.ca.shared.global [place], [%1], 16, %2;}" ::"l"(to), "l"(from), "r"(wanted ? 16 : 0));
#else
    *(Four*)to = wanted ? *(const Four*)from : Four{0, 0, 0, 0};
#endif
}

// Ends a group of copies.
__device__ void end_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;");
#endif
}

// Waits for all copies of this thread but those of the latest groups.
template <int latest> __device__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(latest) : "memory");
#endif
}
#endif
