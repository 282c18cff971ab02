/* How the kernels of row_attention_vector.h read a latent cache. */
#ifndef DSA_CPU_SPARSE_MLA_VECTOR_H_
#define DSA_CPU_SPARSE_MLA_VECTOR_H_

#include "row_attention_vector.h"
#include "sparse_mla_kernels.h"

namespace dsa {
namespace DSA_SIMD {

/* Whether a group is full, has no NaN, and as its scale a power of two far from overflow and from denormal products, so
 * that the products are bfloat16 numbers without rounding and the scale may be multiplied by 2^8. */
static inline bool is_exact_group(const uint8_t* codes, int32_t n, float scale) {
    if (n != DSA_LATENT_GROUP || (float_bits(scale) & 0x7FFFFFu) != 0) return false;
    if (!(__builtin_fabsf(scale) < 0x1p119f && __builtin_fabsf(scale) > 0x1p-119f)) return false;
    bool has_nan = false;
#pragma GCC unroll 4
    for (int32_t i = 0; i < DSA_LATENT_GROUP; i += 4 * kLanes) has_nan |= has_e4m3_nan(codes + i);
    return !has_nan;
}

/* n <= DSA_LATENT_GROUP numbers that share a scale */
static inline void load_fp8_group(const uint8_t* codes, int32_t n, float scale, float* values) {
    if (is_exact_group(codes, n, scale)) {
        const Vec factor = splat(scale * 256.0f);
#pragma GCC unroll 8
        for (int32_t i = 0; i < DSA_LATENT_GROUP; i += 2 * kLanes) {
            Vec low, high;
            load_finite_e4m3(codes + i, &low, &high);
            store(values + i, mul(low, factor));
            store(values + i + kLanes, mul(high, factor));
        }
        return;
    }
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(values + i, bf16_round(mul(load_e4m3(codes + i), splat(scale))));
    for (; i < n; ++i) values[i] = ::bf16_round(e4m3_decode(codes[i]) * scale);
}

static inline void load_fp8_latent(const LatentLayout& layout, const uint8_t* row, float* values) {
    for (int32_t begin = 0; begin < layout.kv_lora_rank; begin += DSA_LATENT_GROUP) {
        const int32_t rest = layout.kv_lora_rank - begin;
        float scale;
        memcpy(&scale, row + layout.scale_offset + begin / DSA_LATENT_GROUP * 4, sizeof scale);
        load_fp8_group(row + begin, rest < DSA_LATENT_GROUP ? rest : (int32_t)DSA_LATENT_GROUP, scale, values + begin);
    }
}

struct LatentRows {
    static const uint8_t* address(const SparseMla& call, int32_t slot) {
        return call.params->latent_cache + latent_row_offset(&call.layout, slot);
    }

    static RowMemory memory(const RowAttention& base, int32_t slot) {
        const SparseMla& call = static_cast<const SparseMla&>(base);
        const uint8_t* row = address(call, slot);
        return {row, call.layout.row_bytes, row};
    }

    static void load(const RowAttention& base, int32_t slot, float* key) {
        const SparseMla& call = static_cast<const SparseMla&>(base);
        const LatentLayout& layout = call.layout;
        const uint8_t* row = address(call, slot);
        const uint8_t* row_rope = row + layout.rope_offset;
        float* key_rope = key + call.value_width;
        const int32_t rope_width = call.row_width - call.value_width;
        if (layout.format == DSA_FLOAT32) {
            load_padded((const float*)row, layout.kv_lora_rank, key, call.value_width);
            load_padded((const float*)row_rope, layout.qk_rope_head_dim, key_rope, rope_width);
            return;
        }
        if (layout.format == DSA_BFLOAT16) {
            load_padded((const uint16_t*)row, layout.kv_lora_rank, key, call.value_width);
        } else {
            load_fp8_latent(layout, row, key);
            clear(key + layout.kv_lora_rank, key_rope);
        }
        load_padded((const uint16_t*)row_rope, layout.qk_rope_head_dim, key_rope, rope_width);
    }
};

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_SPARSE_MLA_VECTOR_H_ */
