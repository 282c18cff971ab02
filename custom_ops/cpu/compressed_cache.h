/* A paged cache of compressed rows as the kernels see it: where a slot's row lies and where its parts begin.
 *
 * Functions are static, so that a file compiled for one instruction set never lends its copy to another.
 */
#ifndef DSA_CPU_COMPRESSED_CACHE_H_
#define DSA_CPU_COMPRESSED_CACHE_H_

#include <stdint.h>

#include "sizes.h"

namespace dsa {

struct CompressedLayout {
    dsa_format format;
    int32_t head_dim;
    int32_t qk_rope_head_dim;
    int32_t value_dim;     /* head_dim - qk_rope_head_dim */
    int64_t data_bytes;    /* of a row, without its scales */
    int64_t scale_bytes;   /* of a row, fp8 only */
    int64_t scales_offset; /* inside a block */
    int64_t block_rows;
    int64_t block_stride_bytes;
    int64_t num_slots;
};

constexpr int32_t kMaxCompressedDim = 1 << 24; /* kernels round heads and numbers up to vectors, in int32 */
constexpr int32_t kMaxRatio = 1 << 20;         /* tokens of a window */

/* The layout, or the reason why there is none. Every byte offset of the cache fits int64 afterwards. */
static inline dsa_status make_compressed_layout(dsa_format format, int32_t head_dim, int32_t qk_rope_head_dim,
                                                int64_t num_blocks, int32_t block_rows, int64_t block_stride_bytes,
                                                CompressedLayout* layout) {
    if (format < DSA_FLOAT32 || format > DSA_FP8) return DSA_BAD_FORMAT;
    const int64_t block_bytes = dsa_compressed_block_bytes(format, block_rows, head_dim, qk_rope_head_dim);
    if (block_bytes < 0 || head_dim > kMaxCompressedDim || !is_count(num_blocks)) return DSA_BAD_SHAPE;
    if (num_blocks > 0) {
        if (block_stride_bytes < block_bytes || !product_fits(num_blocks, block_stride_bytes)) return DSA_BAD_SHAPE;
        if (block_stride_bytes % (format == DSA_FLOAT32 ? 4 : 2) != 0) return DSA_BAD_SHAPE;
    }
    layout->format = format;
    layout->head_dim = head_dim;
    layout->qk_rope_head_dim = qk_rope_head_dim;
    layout->value_dim = head_dim - qk_rope_head_dim;
    layout->data_bytes = dsa_compressed_row_data_bytes(format, head_dim, qk_rope_head_dim);
    layout->scale_bytes = dsa_compressed_row_scale_bytes(format, head_dim, qk_rope_head_dim);
    layout->scales_offset = block_rows * layout->data_bytes;
    layout->block_rows = block_rows;
    layout->block_stride_bytes = block_stride_bytes;
    layout->num_slots = num_blocks * block_rows; /* below the bytes of the cache */
    return DSA_OK;
}

/* Byte offsets inside the cache. */
static inline int64_t compressed_row_offset(const CompressedLayout* layout, int64_t slot) {
    return slot / layout->block_rows * layout->block_stride_bytes + slot % layout->block_rows * layout->data_bytes;
}

static inline int64_t compressed_scale_offset(const CompressedLayout* layout, int64_t slot) {
    return slot / layout->block_rows * layout->block_stride_bytes + layout->scales_offset +
           slot % layout->block_rows * layout->scale_bytes;
}

}  // namespace dsa

#endif /* DSA_CPU_COMPRESSED_CACHE_H_ */
