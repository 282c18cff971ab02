/* A paged latent cache as the kernels see it: where a slot's row lies and where its parts begin.
 *
 * Functions are static, so that a file compiled for one instruction set never lends its copy to another.
 */
#ifndef DSA_CPU_LATENT_CACHE_H_
#define DSA_CPU_LATENT_CACHE_H_

#include <stdint.h>

#include "sizes.h"

namespace dsa {

struct LatentLayout {
    dsa_format format;
    int32_t kv_lora_rank;
    int32_t qk_rope_head_dim;
    int64_t scale_offset; /* bytes inside a row, fp8 only */
    int64_t rope_offset;
    int64_t row_bytes;
    int64_t block_size;
    int64_t block_stride_bytes;
    int64_t num_slots;
};

/* The layout, or the reason why there is none. Every byte offset of the cache fits int64 afterwards. */
static inline dsa_status make_latent_layout(dsa_format format, int32_t kv_lora_rank, int32_t qk_rope_head_dim,
                                            int64_t num_blocks, int32_t block_size, int64_t block_stride_bytes,
                                            LatentLayout* layout) {
    if (format != DSA_FLOAT32 && format != DSA_BFLOAT16 && format != DSA_FP8) return DSA_BAD_FORMAT;
    if (kv_lora_rank <= 0 || qk_rope_head_dim <= 0 || !is_count(num_blocks) || block_size <= 0) return DSA_BAD_SHAPE;
    if (kv_lora_rank > INT32_MAX - qk_rope_head_dim) return DSA_BAD_SHAPE;
    const int64_t row_bytes = dsa_latent_row_bytes(format, kv_lora_rank, qk_rope_head_dim);
    int64_t block_bytes, cache_bytes;
    if (row_bytes < 0 || __builtin_mul_overflow(row_bytes, (int64_t)block_size, &block_bytes)) return DSA_BAD_SHAPE;
    if (num_blocks > 0 && block_stride_bytes < block_bytes) return DSA_BAD_SHAPE;
    if (__builtin_mul_overflow(num_blocks, block_stride_bytes, &cache_bytes)) return DSA_BAD_SHAPE;
    layout->format = format;
    layout->kv_lora_rank = kv_lora_rank;
    layout->qk_rope_head_dim = qk_rope_head_dim;
    layout->scale_offset = dsa_latent_scale_offset(format, kv_lora_rank);
    layout->rope_offset = dsa_latent_rope_offset(format, kv_lora_rank);
    layout->row_bytes = row_bytes;
    layout->block_size = block_size;
    layout->block_stride_bytes = block_stride_bytes;
    layout->num_slots = num_blocks * block_size; /* below cache_bytes */
    return DSA_OK;
}

static inline int64_t latent_row_offset(const LatentLayout* layout, int64_t slot) {
    return slot / layout->block_size * layout->block_stride_bytes + slot % layout->block_size * layout->row_bytes;
}

}  // namespace dsa

#endif /* DSA_CPU_LATENT_CACHE_H_ */
