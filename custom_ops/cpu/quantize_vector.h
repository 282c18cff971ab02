/* bfloat16 and e4m3 encoding on vectors, bit for bit the functions of number_formats.h.
 *
 * Include it only where simd.h may be included. A row is float32 (const float*) or bfloat16 (const uint16_t*) numbers.
 */
#ifndef DSA_CPU_QUANTIZE_VECTOR_H_
#define DSA_CPU_QUANTIZE_VECTOR_H_

#include "number_formats.h"
#include "simd.h"

namespace dsa {
namespace DSA_SIMD {

static inline Vec load_number(const float* p) { return load(p); }
static inline Vec load_number(const uint16_t* p) { return load_bf16(p); }
static inline float read_number(const float* p) { return *p; }
static inline float read_number(const uint16_t* p) { return bf16_decode(*p); }

#if defined(__AVX512F__)

static inline Vec bf16_round(Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(kept, _mm512_set1_epi32((int)0xFFFF0000u)));
}

/* Lane by lane the larger of |a| and |b|, compared as integers: a NaN is larger than every number and so survives. */
static inline Vec magnitude_max(Vec a, Vec b) {
    const __m512i mask = _mm512_set1_epi32(0x7FFFFFFF);
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a), mask),
                                                _mm512_and_si512(_mm512_castps_si512(b), mask)));
}

static inline float reduce_magnitude_max(Vec magnitudes) {
    return float_from_bits(_mm512_reduce_max_epu32(_mm512_castps_si512(magnitudes)));
}

/* kLanes floats to e4m3 codes */
static inline void store_e4m3(uint8_t* p, Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
    const Vec absolute = _mm512_min_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(kE4m3Max));
    const __mmask16 small = _mm512_cmp_ps_mask(absolute, _mm512_set1_ps(0.015625f), _CMP_LT_OQ);
    const Vec spacing = _mm512_set1_ps(16384.0f);
    const __m512i shifted = _mm512_castps_si512(_mm512_add_ps(absolute, spacing));
    const __m512i denormal = _mm512_sub_epi32(shifted, _mm512_castps_si512(spacing));
    const __m512i normal = _mm512_castps_si512(absolute);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(normal, 20), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(normal, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFFF)));
    const __m512i rebased = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(120 << 3));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
    const __m512i code = _mm512_or_si512(_mm512_mask_mov_epi32(rebased, small, denormal), sign);
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7F))));
}

#else /* AVX2 */

static inline Vec bf16_round(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i kept = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm256_castsi256_ps(_mm256_and_si256(kept, _mm256_set1_epi32((int)0xFFFF0000u)));
}

/* See the AVX-512 version. */
static inline Vec magnitude_max(Vec a, Vec b) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_and_si256(_mm256_castps_si256(a), mask),
                                                _mm256_and_si256(_mm256_castps_si256(b), mask)));
}

static inline float reduce_magnitude_max(Vec magnitudes) {
    const __m256i v = _mm256_castps_si256(magnitudes);
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
    return float_from_bits((uint32_t)_mm_cvtsi128_si32(m));
}

/* kLanes floats to e4m3 codes */
static inline void store_e4m3(uint8_t* p, Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
    const Vec absolute = _mm256_min_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(kE4m3Max));
    const Vec small = _mm256_cmp_ps(absolute, _mm256_set1_ps(0.015625f), _CMP_LT_OQ);
    const Vec spacing = _mm256_set1_ps(16384.0f);
    const __m256i shifted = _mm256_castps_si256(_mm256_add_ps(absolute, spacing));
    const __m256i denormal = _mm256_sub_epi32(shifted, _mm256_castps_si256(spacing));
    const __m256i normal = _mm256_castps_si256(absolute);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(normal, 20), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(normal, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFFF)));
    const __m256i rebased = _mm256_sub_epi32(_mm256_srli_epi32(rounded, 20), _mm256_set1_epi32(120 << 3));
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
    const __m256i code = _mm256_or_si256(_mm256_blendv_epi8(rebased, denormal, _mm256_castps_si256(small)), sign);
    const __m256i kept = _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7F), nan);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}

#endif

/* max |bfloat16(row[i])| over n numbers, 0 when n is 0, NaN when there is one */
template <typename Number>
static inline float row_amax_bf16(const Number* row, int64_t n) {
    Vec running = zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) running = magnitude_max(running, bf16_round(load_number(row + i)));
    uint32_t largest = float_bits(reduce_magnitude_max(running));
    for (; i < n; ++i) {
        const uint32_t magnitude = float_bits(::bf16_round(read_number(row + i))) & 0x7FFFFFFFu;
        if (magnitude > largest) largest = magnitude;
    }
    return float_from_bits(largest);
}

/* codes[i] = e4m3(bfloat16(row[i]) / scale) */
template <typename Number>
static inline void row_to_e4m3(const Number* row, int64_t n, float scale, uint8_t* codes) {
    const Vec divisor = splat(scale);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_e4m3(codes + i, div(bf16_round(load_number(row + i)), divisor));
    for (; i < n; ++i) codes[i] = e4m3_encode(::bf16_round(read_number(row + i)) / scale);
}

/* codes[i] = bfloat16(row[i]) */
template <typename Number>
static inline void row_to_bf16(const Number* row, int64_t n, uint16_t* codes) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_bf16(codes + i, load_number(row + i));
    for (; i < n; ++i) codes[i] = bf16_encode(read_number(row + i));
}

/* values[i] = row[i] */
template <typename Number>
static inline void row_to_float32(const Number* row, int64_t n, float* values) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(values + i, load_number(row + i));
    for (; i < n; ++i) values[i] = read_number(row + i);
}

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_QUANTIZE_VECTOR_H_ */
