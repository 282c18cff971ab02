/* Queries and keys that are bfloat16 numbers meet in vdpbf16ps, twice the rate of float32; the rest is AVX-512.
 * Include it once from a file compiled for AVX512_BF16. */
#ifndef DSA_CPU_ROW_ATTENTION_BF16_H_
#define DSA_CPU_ROW_ATTENTION_BF16_H_

#include "row_attention_vector.h"

namespace dsa {
namespace DSA_SIMD {

/* keys [kKeysPerChunk, row_width] float32, then the same rows as [kKeysPerChunk, bf16_row_width] bfloat16 */
static inline uint16_t* bf16_keys(const RowAttention& call, const float* keys) {
    return (uint16_t*)(keys + (int64_t)kKeysPerChunk * call.row_width);
}

/* Exact, because the numbers of a row are bfloat16 numbers already (denormal ones become zero here and would do so in
 * the product). codes may begin where row begins. */
static inline void narrow_row(const RowAttention& call, const float* row, uint16_t* codes) {
    int32_t d = 0;
    for (; d + 2 * kLanes <= call.row_width; d += 2 * kLanes)
        _mm512_storeu_si512(codes + d, (__m512i)_mm512_cvtne2ps_pbh(load(row + d + kLanes), load(row + d)));
    if (d < call.row_width) _mm512_storeu_si512(codes + d, (__m512i)_mm512_cvtne2ps_pbh(zero(), load(row + d)));
}

static void load_query_bf16(const RowAttention& call, int64_t token, int32_t head_begin, int32_t num_heads,
                            float* query) {
    load_query(call, token, head_begin, num_heads, query);
    /* In place: a row of codes ends before the next row of numbers begins. */
    for (int64_t h = 0; h < num_heads; ++h)
        narrow_row(call, query + h * call.row_width, (uint16_t*)query + h * call.bf16_row_width);
}

template <typename Rows>
static void load_keys_bf16(const RowAttention& call, const IdRange& ids, float* keys) {
    uint16_t* codes = bf16_keys(call, keys);
    load_each_key<Rows>(call, ids, keys, [&](const float* key, int32_t j) {
        narrow_row(call, key, codes + (int64_t)j * call.bf16_row_width);
    });
}

/* Bound: the score part at two FMA a lane and cycle, the rest as in attend. */
template <typename Rows>
static void attend_bf16(const RowAttention& call, const float* query, const float* keys, int32_t num_heads,
                        int32_t num_keys, const IdRange& next, float* probabilities,
                        const RowAttentionPartial& partial) {
    score<Rows>(call, (const uint16_t*)query, bf16_keys(call, keys), call.bf16_row_width, num_heads, num_keys, next,
          probabilities);
    softmax(call, num_heads, num_keys, probabilities, partial);
    weigh(call, probabilities, keys, num_heads, num_keys, partial.out);
}

template <typename Rows>
constexpr RowAttentionKernels kBf16Kernels = {load_query_bf16, load_keys_bf16<Rows>, attend_bf16<Rows>, merge,
                                              store_result};

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_ROW_ATTENTION_BF16_H_ */
