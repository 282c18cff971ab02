/* What the CPU and the CUDA version of index_select have in common: sizes, checks, and the params of the two ops.
 *
 * Functions are static, so that a file compiled for one instruction set never lends its copy to another.
 */
#ifndef DSA_CPU_INDEX_SELECT_PARTS_H_
#define DSA_CPU_INDEX_SELECT_PARTS_H_

#include "dsa/index_select.h"
#include "dsa/indexer_logits.h"
#include "dsa/topk_slots.h"
#include "sizes.h"

namespace dsa {

static inline size_t round_up_to_line(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Columns of the score rows: a row is never longer than its blocks, whatever max_length says. */
static inline int64_t score_width(const dsa_index_select_params& p) {
    const int64_t capacity = p.max_blocks * p.block_size;
    return p.max_length < capacity ? p.max_length : capacity;
}

/* Score rows start on cache lines. */
static inline int64_t score_stride(const dsa_index_select_params& p) {
    return (int64_t)(round_up_to_line((size_t)score_width(p) * sizeof(float)) / sizeof(float));
}

/* Sizes alone; the arrays are the caller's. */
static inline dsa_indexer_logits_params logits_params(const dsa_index_select_params& p, int64_t num_rows) {
    dsa_indexer_logits_params q = {};
    q.index_cache = p.index_cache;
    q.block_table = p.block_table;
    q.block_stride_bytes = p.block_stride_bytes;
    q.logits_stride = score_stride(p);
    q.logits_width = score_width(p);
    q.num_blocks = p.num_blocks;
    q.num_tokens = num_rows;
    q.num_requests = p.num_requests;
    q.max_blocks = p.max_blocks;
    q.block_size = p.block_size;
    q.index_n_heads = p.index_n_heads;
    q.index_head_dim = p.index_head_dim;
    q.cache_format = p.cache_format;
    return q;
}

static inline dsa_topk_slots_params topk_params(const dsa_index_select_params& p, int64_t num_rows) {
    dsa_topk_slots_params q = {};
    q.block_table = p.block_table;
    q.logits_stride = score_stride(p);
    q.logits_width = score_width(p);
    q.num_blocks = p.num_blocks;
    q.num_tokens = num_rows;
    q.num_requests = p.num_requests;
    q.max_blocks = p.max_blocks;
    q.block_size = p.block_size;
    q.topk = p.topk;
    return q;
}

static inline dsa_status check_index_select_sizes(const dsa_index_select_params& p) {
    const dsa_status cache_status =
        check_index_cache(p.cache_format, p.num_blocks, p.block_stride_bytes, p.block_size, p.index_head_dim);
    if (cache_status != DSA_OK) return cache_status;
    if (!index_rows_fit(p.num_tokens, p.index_n_heads, p.index_head_dim)) return DSA_BAD_SHAPE;
    if (!is_count(p.max_length) || !is_count(p.max_blocks)) return DSA_BAD_SHAPE;
    if (p.max_logits_bytes < 0 || p.topk < 1) return DSA_BAD_SHAPE;
    return product_fits(p.num_tokens, p.topk, (int64_t)sizeof(int32_t)) ? DSA_OK : DSA_BAD_SHAPE;
}

static inline dsa_status check_index_select_arrays(const dsa_index_select_params& p) {
    if (p.num_tokens > 0 && (!p.positions || !p.slot_ids || !p.counts)) return DSA_NULL_POINTER;
    if (p.num_tokens > 0 && (!p.query || !p.folded_weights)) return DSA_NULL_POINTER;
    return p.num_blocks > 0 && !p.index_cache ? DSA_NULL_POINTER : DSA_OK;
}

static inline int64_t number_bytes(dsa_format format) {
    return format == DSA_FP8 ? 1 : format == DSA_BFLOAT16 ? 2 : 4;
}

}  // namespace dsa

#endif /* DSA_CPU_INDEX_SELECT_PARTS_H_ */
