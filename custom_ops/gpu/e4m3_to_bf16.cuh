/* Products of e4m3 numbers and float32 scales, rounded once to bfloat16, two in a word.
 *
 * The results stand in another order: columns a b c d become (a c) (b d), which unpacking four bytes yields for free.
 */
#ifndef DSA_GPU_E4M3_TO_BF16_CUH_
#define DSA_GPU_E4M3_TO_BF16_CUH_

#include <cuda_runtime.h>
#include <stdint.h>

namespace dsa {
namespace gpu {

/* 16 and 256, to be kernel arguments: multiplied by numbers that the compiler does not know, words are shifted in the
 * multiply pipe, which is idle, and not in the one that moves bits, which is not. */
struct WidenShifts {
    uint32_t sixteen, pow2_8;
};
constexpr WidenShifts kWidenShifts = {16, 256};

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
    uint32_t product;
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u)); /* minus zero */
#endif
    return product;
}

__device__ __forceinline__ uint32_t multiply_add_bf16(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

/* Columns a b c d of two words (a b) (c d) to (a c) (b d) and back. */
__device__ __forceinline__ void exchange_middle(uint32_t& first, uint32_t& second) {
    const uint32_t low = __byte_perm(first, second, 0x5410);
    second = __byte_perm(first, second, 0x7632);
    first = low;
}

/* Bits of a where mask has ones, else those of b. */
__device__ __forceinline__ uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {
    uint32_t selected;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(selected) : "r"(a), "r"(b), "r"(mask));
    return selected;
}

/* Four e4m3 numbers to bfloat16 times 2^-120, by moving bits: (0, 2) and (1, 3). */
__device__ __forceinline__ void widen(const WidenShifts& shifts, uint32_t bytes, uint32_t& even, uint32_t& odd) {
    constexpr uint32_t kMagnitude = 0x07F007F0;
    const uint32_t signs = bytes & 0x80808080;
    even = select_bits(bytes * shifts.sixteen, signs * shifts.pow2_8, kMagnitude);
    odd = select_bits(bytes >> 4, signs, kMagnitude);
}

/* A float32 scale as two bfloat16 numbers in a word, high << 16 | low, for dequantize().
 * Exact scales (bfloat16 numbers below 2^7, which all sensible powers of two are) carry the factor 2^120. */
__device__ __forceinline__ bool is_exact_scale(float scale) {
    return (__float_as_uint(scale) & 0xFFFF) == 0 && scale < 128.0f;
}

__device__ __forceinline__ uint32_t split_scale(float scale, bool are_exact) {
    if (are_exact) return __float_as_uint(scale * 0x1p120f);
    const uint32_t high = pack_bf16(scale, scale) & 0xFFFF0000;
    return high | (pack_bf16(scale - __uint_as_float(high), 0.0f) & 0xFFFF);
}

/* 8 e4m3 numbers times their scale. The general way multiplies by high + low, which differs from the float32 product by
 * less than 2^-16 of it before the one rounding that counts. */
template <bool kAreExact>
__device__ __forceinline__ void dequantize(const WidenShifts& shifts, uint32_t first, uint32_t second,
                                           uint32_t scale, uint32_t (&wide)[4]) {
    widen(shifts, first, wide[0], wide[1]);
    widen(shifts, second, wide[2], wide[3]);
    const uint32_t high = __byte_perm(scale, scale, 0x3232), low = __byte_perm(scale, scale, 0x1010);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (kAreExact) {
            wide[i] = multiply_bf16(wide[i], high);
        } else {
            const uint32_t value = multiply_bf16(wide[i], 0x7B807B80); /* 2^120 */
            wide[i] = multiply_add_bf16(value, high, multiply_bf16(value, low));
        }
    }
}

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_E4M3_TO_BF16_CUH_ */
