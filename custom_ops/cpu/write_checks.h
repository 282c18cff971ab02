/* Which params the ops that write a cache format accept; the CPU and the CUDA version of an op refuse the same ones.
 *
 * Functions are static, so that a file compiled for one instruction set never lends its copy to another.
 */
#ifndef DSA_CPU_WRITE_CHECKS_H_
#define DSA_CPU_WRITE_CHECKS_H_

#include "dsa/index_key_write.h"
#include "dsa/index_query_quant.h"
#include "dsa/mla_cache_write.h"
#include "latent_cache.h"

namespace dsa {

static inline bool is_input_format(dsa_format format) { return format == DSA_FLOAT32 || format == DSA_BFLOAT16; }

static inline bool is_scale_format(dsa_scale_format format) {
    return format == DSA_SCALE_UE8M0 || format == DSA_SCALE_PLAIN;
}

/* Fills layout, too. */
static inline dsa_status check_mla_cache_write(const dsa_mla_cache_write_params& p, LatentLayout* layout) {
    if (!is_input_format(p.input_format)) return DSA_BAD_FORMAT;
    const dsa_status status = make_latent_layout(p.cache_format, p.kv_lora_rank, p.qk_rope_head_dim, p.num_blocks,
                                                 p.block_size, p.block_stride_bytes, layout);
    if (status != DSA_OK) return status;
    if (p.cache_format == DSA_FP8 && !is_scale_format(p.scale_format)) return DSA_BAD_FORMAT;
    if (!is_count(p.num_tokens)) return DSA_BAD_SHAPE;
    if (!rows_fit(p.num_tokens, p.latent_stride, p.kv_lora_rank)) return DSA_BAD_SHAPE;
    if (!rows_fit(p.num_tokens, p.rope_stride, p.qk_rope_head_dim)) return DSA_BAD_SHAPE;
    if (p.num_tokens == 0) return DSA_OK;
    if (p.latent == nullptr || p.rope == nullptr || p.slot_mapping == nullptr) return DSA_NULL_POINTER;
    return p.cache == nullptr && p.num_blocks > 0 ? DSA_NULL_POINTER : DSA_OK;
}

static inline dsa_status check_index_key_write(const dsa_index_key_write_params& p) {
    if (!is_input_format(p.input_format)) return DSA_BAD_FORMAT;
    if (p.cache_format == DSA_FP8 && !is_scale_format(p.scale_format)) return DSA_BAD_FORMAT;
    const dsa_status cache_status =
        check_index_cache(p.cache_format, p.num_blocks, p.block_stride_bytes, p.block_size, p.index_head_dim);
    if (cache_status != DSA_OK) return cache_status;
    if (!is_count(p.num_tokens)) return DSA_BAD_SHAPE;
    if (!rows_fit(p.num_tokens, p.key_stride, p.index_head_dim)) return DSA_BAD_SHAPE;
    if (p.num_tokens == 0) return DSA_OK;
    if (p.key == nullptr || p.slot_mapping == nullptr) return DSA_NULL_POINTER;
    return p.cache == nullptr && p.num_blocks > 0 ? DSA_NULL_POINTER : DSA_OK;
}

static inline dsa_status check_index_query_quant(const dsa_index_query_quant_params& p) {
    if (!is_input_format(p.input_format)) return DSA_BAD_FORMAT;
    if (p.output_format < DSA_FLOAT32 || p.output_format > DSA_FP8) return DSA_BAD_FORMAT;
    if (!index_rows_fit(p.num_tokens, p.index_n_heads, p.index_head_dim)) return DSA_BAD_SHAPE;
    const int64_t query_width = (int64_t)p.index_n_heads * p.index_head_dim;
    if (!rows_fit(p.num_tokens, p.query_stride, query_width)) return DSA_BAD_SHAPE;
    if (!rows_fit(p.num_tokens, p.weights_stride, p.index_n_heads)) return DSA_BAD_SHAPE;
    if (p.num_tokens == 0) return DSA_OK;
    if (p.query == nullptr || p.weights == nullptr) return DSA_NULL_POINTER;
    return p.quantized == nullptr || p.folded_weights == nullptr ? DSA_NULL_POINTER : DSA_OK;
}

}  // namespace dsa

#endif /* DSA_CPU_WRITE_CHECKS_H_ */
