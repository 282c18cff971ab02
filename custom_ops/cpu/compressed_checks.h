/* Which params the ops of compressed attention accept; the CPU and the CUDA version of an op refuse the same ones. The
 * values inside arrays and the workspace are the caller's of these functions to check.
 *
 * Functions are static, so that a file compiled for one instruction set never lends its copy to another.
 */
#ifndef DSA_CPU_COMPRESSED_CHECKS_H_
#define DSA_CPU_COMPRESSED_CHECKS_H_

#include <math.h>

#include "compressed_cache.h"
#include "dsa/compressed_mla.h"
#include "dsa/compressed_row_read.h"
#include "dsa/compressed_row_write.h"
#include "dsa/inverse_rope.h"
#include "dsa/kv_compress.h"

namespace dsa {

static inline bool is_plain_format(dsa_format format) { return format == DSA_FLOAT32 || format == DSA_BFLOAT16; }

/* These functions fill layout, too. */
static inline dsa_status check_compressed_row_write(const dsa_compressed_row_write_params& p,
                                                    CompressedLayout* layout) {
    if (!is_plain_format(p.input_format)) return DSA_BAD_FORMAT;
    const dsa_status status = make_compressed_layout(p.cache_format, p.head_dim, p.qk_rope_head_dim, p.num_blocks,
                                                     p.block_rows, p.block_stride_bytes, layout);
    if (status != DSA_OK) return status;
    if (!is_count(p.num_tokens) || !rows_fit(p.num_tokens, p.row_stride, p.head_dim)) return DSA_BAD_SHAPE;
    if (p.num_tokens == 0) return DSA_OK;
    if (p.rows == nullptr || p.slot_mapping == nullptr) return DSA_NULL_POINTER;
    return p.cache == nullptr && p.num_blocks > 0 ? DSA_NULL_POINTER : DSA_OK;
}

static inline dsa_status check_compressed_row_read(const dsa_compressed_row_read_params& p, CompressedLayout* layout) {
    const dsa_status status = make_compressed_layout(p.cache_format, p.head_dim, p.qk_rope_head_dim, p.num_blocks,
                                                     p.block_rows, p.block_stride_bytes, layout);
    if (status != DSA_OK) return status;
    if (!is_count(p.num_rows) || !product_fits(p.num_rows, p.head_dim, 4)) return DSA_BAD_SHAPE;
    if (p.num_rows == 0) return DSA_OK;
    if (p.slot_ids == nullptr || p.out == nullptr) return DSA_NULL_POINTER;
    return p.cache == nullptr && p.num_blocks > 0 ? DSA_NULL_POINTER : DSA_OK;
}

static inline dsa_status check_entry_cache(const dsa_kv_compress_params& p, CompressedLayout* layout) {
    if (p.entry_kind == DSA_ENTRY_ROW)
        return make_compressed_layout(p.entry_format, p.head_dim, p.qk_rope_head_dim, p.entry_num_blocks,
                                      p.entry_block_rows, p.entry_block_stride_bytes, layout);
    if (p.entry_kind != DSA_ENTRY_INDEX_KEY) return DSA_BAD_FORMAT;
    const dsa_status status = check_index_cache(p.entry_format, p.entry_num_blocks, p.entry_block_stride_bytes,
                                                p.entry_block_rows, p.head_dim);
    if (status != DSA_OK) return status;
    if (p.qk_rope_head_dim <= 0 || p.qk_rope_head_dim % 2 != 0) return DSA_BAD_SHAPE;
    if (p.head_dim <= p.qk_rope_head_dim || p.head_dim > kMaxCompressedDim) return DSA_BAD_SHAPE;
    const int64_t alignment = p.entry_format == DSA_BFLOAT16 ? 2 : 4;
    return p.entry_num_blocks > 0 && p.entry_block_stride_bytes % alignment != 0 ? DSA_BAD_SHAPE : DSA_OK;
}

/* layout means something for DSA_ENTRY_ROW only. */
static inline dsa_status check_kv_compress(const dsa_kv_compress_params& p, CompressedLayout* layout) {
    if (p.scale_format != DSA_SCALE_UE8M0 && p.scale_format != DSA_SCALE_PLAIN) return DSA_BAD_FORMAT;
    const dsa_status status = check_entry_cache(p, layout);
    if (status != DSA_OK) return status;
    if (p.overlap != 1 && p.overlap != 2) return DSA_BAD_SHAPE;
    if (p.ratio <= 0 || p.ratio > kMaxRatio || p.state_block_tokens <= 0) return DSA_BAD_SHAPE;
    if (!(p.eps >= 0) || !isfinite(p.eps)) return DSA_BAD_SHAPE;
    const int64_t width = 2 * (int64_t)p.overlap * p.head_dim;
    if (!is_count(p.num_tokens) || !is_count(p.num_requests) || !is_count(p.state_num_blocks)) return DSA_BAD_SHAPE;
    if (!is_count(p.state_table_width) || p.state_table_width == 0) return DSA_BAD_SHAPE;
    if (!rows_fit(p.num_tokens, p.kv_score_stride, width) || !product_fits(p.ratio, width, 4)) return DSA_BAD_SHAPE;
    if (!product_fits(p.num_tokens, p.qk_rope_head_dim, 4)) return DSA_BAD_SHAPE;
    if (!product_fits(p.num_requests, p.state_table_width, 4)) return DSA_BAD_SHAPE;
    if (p.state_num_blocks > 0) {
        if (!product_fits(p.state_num_blocks, p.state_block_stride_bytes)) return DSA_BAD_SHAPE;
        if (p.state_block_stride_bytes < p.state_block_tokens * width * 4) return DSA_BAD_SHAPE;
        if (p.state_block_stride_bytes % 4 != 0) return DSA_BAD_SHAPE;
    }
    if (p.num_tokens == 0) return DSA_OK;
    const void* needed[] = {p.kv_score, p.ape,         p.norm_weight, p.cos,        p.sin,
                            p.state_table, p.positions, p.request_ids, p.lengths, p.entry_slots};
    for (const void* pointer : needed)
        if (pointer == nullptr) return DSA_NULL_POINTER;
    if (p.state_cache == nullptr && p.state_num_blocks > 0) return DSA_NULL_POINTER;
    return p.entry_cache == nullptr && p.entry_num_blocks > 0 ? DSA_NULL_POINTER : DSA_OK;
}

/* The sizes of compressed_mla; the workspace queries know no more. */
static inline dsa_status check_compressed_mla_shape(const dsa_compressed_mla_params& p, CompressedLayout* window,
                                                    CompressedLayout* entries) {
    constexpr int32_t kMaxWidth = 1 << 30; /* both widths and what a kernel rounds them up to fit int32 */
    if (!is_plain_format(p.query_format)) return DSA_BAD_FORMAT;
    dsa_status status = make_compressed_layout(p.cache_format, p.head_dim, p.qk_rope_head_dim, p.window_num_blocks,
                                               p.window_block_rows, p.window_block_stride_bytes, window);
    if (status == DSA_OK)
        status = make_compressed_layout(p.cache_format, p.head_dim, p.qk_rope_head_dim, p.entry_num_blocks,
                                        p.entry_block_rows, p.entry_block_stride_bytes, entries);
    if (status != DSA_OK) return status;
    if (window->num_slots > INT32_MAX || entries->num_slots > INT32_MAX) return DSA_BAD_SHAPE;
    if (p.window_width < 0 || p.entry_width < 0) return DSA_BAD_SHAPE;
    const int64_t width = (int64_t)p.window_width + p.entry_width;
    if (width < 1 || width > kMaxWidth || !is_count(p.num_tokens) || p.num_heads <= 0) return DSA_BAD_SHAPE;
    if (p.head_dim > (1 << 30) / p.num_heads) return DSA_BAD_SHAPE;
    if (!product_fits(p.head_dim, p.num_heads, p.num_tokens, 4)) return DSA_BAD_SHAPE;
    return product_fits(width, p.num_heads, p.num_tokens, 4) ? DSA_OK : DSA_BAD_SHAPE; /* bounds the tasks too */
}

static inline dsa_status check_compressed_mla_arrays(const dsa_compressed_mla_params& p) {
    if (p.num_tokens == 0) return DSA_OK;
    if (p.query == nullptr || p.sinks == nullptr || p.out == nullptr) return DSA_NULL_POINTER;
    if (p.window_slots == nullptr && p.window_width > 0) return DSA_NULL_POINTER;
    if (p.entry_slots == nullptr && p.entry_width > 0) return DSA_NULL_POINTER;
    if (p.window_cache == nullptr && p.window_num_blocks > 0) return DSA_NULL_POINTER;
    return p.entry_cache == nullptr && p.entry_num_blocks > 0 ? DSA_NULL_POINTER : DSA_OK;
}

static inline dsa_status check_inverse_rope(const dsa_inverse_rope_params& p) {
    if (!is_plain_format(p.x_format)) return DSA_BAD_FORMAT;
    if (!is_count(p.num_tokens) || p.num_heads <= 0 || p.head_dim <= 0) return DSA_BAD_SHAPE;
    if (p.head_dim > (1 << 30) / p.num_heads) return DSA_BAD_SHAPE;
    if (p.qk_rope_head_dim <= 0 || p.qk_rope_head_dim % 2 != 0 || p.qk_rope_head_dim > p.head_dim)
        return DSA_BAD_SHAPE;
    if (!product_fits(p.num_tokens, p.num_heads, p.head_dim, 4)) return DSA_BAD_SHAPE;
    if (p.num_tokens == 0) return DSA_OK;
    return p.x == nullptr || p.cos == nullptr || p.sin == nullptr ? DSA_NULL_POINTER : DSA_OK;
}

}  // namespace dsa

#endif /* DSA_CPU_COMPRESSED_CHECKS_H_ */
