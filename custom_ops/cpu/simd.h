/* A thin layer over AVX2 and AVX-512 float vectors, so that a kernel is written once and compiled per instruction set.
 *
 * Include it only from files compiled for one of the two (their names end in _avx2.cc, _avx512.cc or
 * _avx512_bf16.cc). All names live in namespace DSA_SIMD, which differs per file kind: the linker can never merge an
 * AVX-512 copy of an inline function into AVX2 code. For the same reason kernels use no standard-library templates.
 *
 *   Vec   kLanes float32 lanes (8 or 16)
 */
#ifndef DSA_CPU_SIMD_H_
#define DSA_CPU_SIMD_H_

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* GCC 12's own header, _mm512_undefined: GCC bug 105593 */
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#include <stdint.h>

#include "number_formats.h"

#if defined(__AVX512BF16__)
#define DSA_SIMD avx512_bf16
#elif defined(__AVX512F__)
#define DSA_SIMD avx512
#elif defined(__AVX2__)
#define DSA_SIMD avx2
#else
#error "simd.h is for files compiled with AVX2 or AVX-512"
#endif

namespace dsa {
namespace DSA_SIMD {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;

static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec splat(float value) { return _mm512_set1_ps(value); }
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); } /* a * b + c */
/* If either is NaN, the result is b: put the value that may be NaN second to keep it. */
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec absolute(Vec v) { return _mm512_abs_ps(v); }
static inline float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
static inline float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
/* v in the first `count` lanes, 0 in the others; count > 0 */
static inline Vec keep_lanes(Vec v, int64_t count) {
    return count >= kLanes ? v : _mm512_maskz_mov_ps((__mmask16)((1u << count) - 1u), v);
}
/* Lane i of the result is the sum of the lanes of v[i]; every i adds its lanes in the same order. */
static inline Vec reduce_add_each(const Vec (&v)[kLanes]) {
    Vec pairs[8], quads[4], halves[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        pairs[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        quads[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        halves[i] = add(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                        _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xDD));
    return add(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88), _mm512_shuffle_f32x4(halves[0], halves[1], 0xDD));
}

static inline Vec round_to_even(Vec v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* v * 2^n for integral n within the exponent range */
static inline Vec scale_by_pow2(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }

/* kLanes packed numbers to float32 */
static inline Vec load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline void store_bf16(uint16_t* p, Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
static inline Vec load_e4m3(const uint8_t* p) {
    /* Through float16, whose conversion ignores the denormals-are-zero mode that other libraries may have set:
     * the seven lower bits of e4m3, moved up by seven, are the same number times 2^-8 in float16. */
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
    const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7F));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m256i half = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7F));
    const Vec value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
    return _mm512_mask_mov_ps(value, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)));
}
/* 2 * kLanes codes other than NaN, each number times 2^-8; faster than load_e4m3. */
static inline void load_finite_e4m3(const uint8_t* p, Vec* low, Vec* high) {
    /* Sign extension puts the sign into bit 15 as well as bit 14, where it has to go. */
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
    const __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16((short)0xBFFF));
    *low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    *high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}
/* Whether any of 4 * kLanes codes is NaN. */
static inline bool has_e4m3_nan(const uint8_t* p) {
    const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(0x7F));
    return _mm512_cmpeq_epi8_mask(magnitude, _mm512_set1_epi8(0x7F)) != 0;
}

#else /* AVX2 */

constexpr int kLanes = 8;
using Vec = __m256;

static inline Vec zero() { return _mm256_setzero_ps(); }
static inline Vec splat(float value) { return _mm256_set1_ps(value); }
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); } /* a * b + c */
/* If either is NaN, the result is b: put the value that may be NaN second to keep it. */
static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec absolute(Vec v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
static inline float reduce_max(Vec v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static inline float reduce_add(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
/* v in the first `count` lanes, 0 in the others; count > 0 */
static inline Vec keep_lanes(Vec v, int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int32_t kept = count < kLanes ? (int32_t)count : kLanes;
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(kept), lanes)));
}
/* See the AVX-512 version. */
static inline Vec reduce_add_each(const Vec (&v)[kLanes]) {
    Vec pairs[4], quads[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        pairs[i] = add(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
        quads[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return add(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}

static inline Vec round_to_even(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* v * 2^n for integral n; two factors, so that results down to the smallest denormals are right */
static inline Vec scale_by_pow2(Vec v, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

/* kLanes packed numbers to float32 */
static inline Vec load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline void store_bf16(uint16_t* p, Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    _mm_storeu_si128((__m128i*)p, packed);
}
static inline Vec load_e4m3(const uint8_t* p) {
    /* Through float16, see the AVX-512 version. */
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p));
    const __m128i magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7F));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
    const __m128i half = _mm_or_si128(_mm_slli_epi16(magnitude, 7), sign);
    const __m256i nan = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F)));
    const Vec value = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
    return _mm256_blendv_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), _mm256_castsi256_ps(nan));
}
/* See the AVX-512 versions. */
static inline void load_finite_e4m3(const uint8_t* p, Vec* low, Vec* high) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xBFFF));
    *low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    *high = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
}
static inline bool has_e4m3_nan(const uint8_t* p) {
    const __m256i magnitude = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi8(0x7F));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(0x7F))) != 0;
}

#endif

/* exp(v) for v <= 0 (a softmax numerator): relative error below 2^-22; 0 below -103.97, NaN and -inf as expected. */
static inline Vec exp_nonpositive(Vec v) {
    const Vec clamped = max(splat(-104.0f), v); /* a NaN in v is kept: it stands second */
    const Vec n = round_to_even(mul(clamped, splat(1.44269504088896f)));
    Vec r = fma(n, splat(-0.693145751953125f), clamped); /* ln 2 in two parts, the first exact in few bits */
    r = fma(n, splat(-1.42860682030941723e-6f), r);
    Vec p = splat(1.98756915e-4f); /* minimax polynomial of degree 5 for (exp(r) - 1 - r) / r^2 on +-ln2/2 (Cephes) */
    p = fma(p, r, splat(1.39819995e-3f));
    p = fma(p, r, splat(8.33345205e-3f));
    p = fma(p, r, splat(4.16657962e-2f));
    p = fma(p, r, splat(1.66666655e-1f));
    p = fma(p, r, splat(5.00000000e-1f));
    p = fma(mul(p, r), r, add(r, splat(1.0f)));
    return scale_by_pow2(p, n);
}

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_SIMD_H_ */
