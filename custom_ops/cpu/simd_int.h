/* int32 lanes and lane masks beside simd.h, under the same rules. A mask is a number with one bit per lane.
 *
 *   IVec  kLanes int32 lanes
 */
#ifndef DSA_CPU_SIMD_INT_H_
#define DSA_CPU_SIMD_INT_H_

#include "simd.h"

namespace dsa {
namespace DSA_SIMD {

#if defined(__AVX512F__)

using IVec = __m512i;

static inline IVec splat_int(int32_t value) { return _mm512_set1_epi32(value); }
static inline IVec load_int(const void* p) { return _mm512_loadu_si512(p); }
static inline void store_int(int32_t* p, IVec v) { _mm512_storeu_si512(p, v); }
static inline IVec add_int(IVec a, IVec b) { return _mm512_add_epi32(a, b); }
static inline IVec xor_int(IVec a, IVec b) { return _mm512_xor_si512(a, b); }
static inline IVec max_int(IVec a, IVec b) { return _mm512_max_epi32(a, b); }
static inline IVec lane_numbers() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
static inline int32_t reduce_add_int(IVec v) { return _mm512_reduce_add_epi32(v); }
static inline int32_t reduce_max_int(IVec v) { return _mm512_reduce_max_epi32(v); }
/* GCC 12 can spill a widened mask with a 16-bit store and read 32 bits back; from a general register it cannot. */
static inline uint32_t lane_bits(__mmask16 mask) {
    uint32_t bits = mask;
    __asm__("" : "+r"(bits));
    return bits;
}
static inline uint32_t greater_mask(IVec a, IVec b) { return lane_bits(_mm512_cmpgt_epi32_mask(a, b)); }
static inline uint32_t equal_mask(IVec a, IVec b) { return lane_bits(_mm512_cmpeq_epi32_mask(a, b)); }
/* counts + 1 in the lanes where a > b */
static inline IVec count_greater(IVec counts, IVec a, IVec b) {
    return _mm512_mask_add_epi32(counts, _mm512_cmpgt_epi32_mask(a, b), counts, _mm512_set1_epi32(1));
}
/* The lanes named by mask, packed to the front; writes kLanes numbers, those behind the packed ones are arbitrary.
 * Through a register: compressing straight into memory is microcoded on Zen 4. */
static inline void store_packed(int32_t* p, uint32_t mask, IVec v) {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32((__mmask16)mask, v));
}
/* rank_key of topk_select.h on the bits of floats */
static inline IVec rank_keys(IVec bits) {
    const IVec magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
    const __mmask16 negative_zero = _mm512_cmpeq_epi32_mask(bits, _mm512_set1_epi32(INT32_MIN));
    const IVec flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7FFFFFFF));
    const IVec ordered = _mm512_mask_mov_epi32(_mm512_xor_si512(bits, flip), nan, _mm512_set1_epi32(INT32_MIN));
    return _mm512_mask_mov_epi32(ordered, negative_zero, _mm512_setzero_si512());
}

#else /* AVX2 */

using IVec = __m256i;

static inline IVec splat_int(int32_t value) { return _mm256_set1_epi32(value); }
static inline IVec load_int(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void store_int(int32_t* p, IVec v) { _mm256_storeu_si256((__m256i*)p, v); }
static inline IVec add_int(IVec a, IVec b) { return _mm256_add_epi32(a, b); }
static inline IVec xor_int(IVec a, IVec b) { return _mm256_xor_si256(a, b); }
static inline IVec max_int(IVec a, IVec b) { return _mm256_max_epi32(a, b); }
static inline IVec lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
static inline int32_t reduce_add_int(IVec v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
static inline int32_t reduce_max_int(IVec v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}
static inline uint32_t lane_bits(IVec lanes) { return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(lanes)); }
static inline uint32_t greater_mask(IVec a, IVec b) { return lane_bits(_mm256_cmpgt_epi32(a, b)); }
static inline uint32_t equal_mask(IVec a, IVec b) { return lane_bits(_mm256_cmpeq_epi32(a, b)); }
/* counts + 1 in the lanes where a > b */
static inline IVec count_greater(IVec counts, IVec a, IVec b) {
    return _mm256_sub_epi32(counts, _mm256_cmpgt_epi32(a, b));
}
/* The lanes named by mask, packed to the front; writes kLanes numbers, those behind the packed ones are arbitrary.
 * The order of lanes is built four lanes at a time: nibble n lists the set bits of n from the lowest. */
static inline void store_packed(int32_t* p, uint32_t mask, IVec v) {
    static const uint8_t kSetBits[16][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}, {1, 0, 0, 0}, {0, 1, 0, 0},
                                            {2, 0, 0, 0}, {0, 2, 0, 0}, {1, 2, 0, 0}, {0, 1, 2, 0},
                                            {3, 0, 0, 0}, {0, 3, 0, 0}, {1, 3, 0, 0}, {0, 1, 3, 0},
                                            {2, 3, 0, 0}, {0, 2, 3, 0}, {1, 2, 3, 0}, {0, 1, 2, 3}};
    int32_t low, high;
    memcpy(&low, kSetBits[mask & 15u], sizeof low);
    memcpy(&high, kSetBits[mask >> 4], sizeof high);
    const __m128i low_order = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(low));
    const __m128i high_order = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(high));
    const __m128i upper = _mm256_extracti128_si256(v, 1);
    const __m128 low_lanes = _mm_permutevar_ps(_mm_castsi128_ps(_mm256_castsi256_si128(v)), low_order);
    const __m128 high_lanes = _mm_permutevar_ps(_mm_castsi128_ps(upper), high_order);
    _mm_storeu_ps((float*)p, low_lanes);
    _mm_storeu_ps((float*)(p + __builtin_popcount(mask & 15u)), high_lanes);
}
/* rank_key of topk_select.h on the bits of floats */
static inline IVec rank_keys(IVec bits) {
    const IVec magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    const IVec nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
    const IVec negative_zero = _mm256_cmpeq_epi32(bits, _mm256_set1_epi32(INT32_MIN));
    const IVec flip = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(0x7FFFFFFF));
    const IVec ordered = _mm256_blendv_epi8(_mm256_xor_si256(bits, flip), _mm256_set1_epi32(INT32_MIN), nan);
    return _mm256_andnot_si256(negative_zero, ordered);
}

#endif

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_SIMD_INT_H_ */
