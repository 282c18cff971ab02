/* What the ops over query rows of paged contexts share: the shape of the paging and the check of every row. */
#ifndef DSA_CPU_PAGED_ROWS_H_
#define DSA_CPU_PAGED_ROWS_H_

#include "sizes.h"

namespace dsa {

struct PagedRows {
    const int32_t* block_table; /* [num_requests, max_blocks] */
    const int32_t* request_ids; /* [num_tokens] */
    const int32_t* lengths;     /* [num_tokens] */
    int64_t num_tokens;
    int64_t num_requests;
    int64_t max_blocks;
    int64_t num_blocks;
    int32_t block_size;
    int64_t max_length; /* no row may be longer */
};

/* Of the params of an op; the fields have the same names in all of them. */
template <typename Params>
static inline PagedRows paged_rows(const Params& p, int64_t max_length) {
    PagedRows rows = {};
    rows.block_table = p.block_table;
    rows.request_ids = p.request_ids;
    rows.lengths = p.lengths;
    rows.num_tokens = p.num_tokens;
    rows.num_requests = p.num_requests;
    rows.max_blocks = p.max_blocks;
    rows.num_blocks = p.num_blocks;
    rows.block_size = p.block_size;
    rows.max_length = max_length;
    return rows;
}

/* Sizes and pointers first, then every row: nothing is written before all of them are known to be good. */
static inline dsa_status check_rows(const PagedRows& r) {
    if (!is_count(r.num_tokens) || !is_count(r.num_requests) || r.block_size <= 0) return DSA_BAD_SHAPE;
    if (!is_count(r.max_blocks) || !is_count(r.max_length)) return DSA_BAD_SHAPE;
    if (!product_fits(r.num_requests, r.max_blocks, (int64_t)sizeof(int32_t))) return DSA_BAD_SHAPE;
    if (r.num_blocks < 0 || r.num_blocks > INT32_MAX / r.block_size) return DSA_BAD_SHAPE; /* slots are int32 */
    if (r.num_tokens > 0 && (!r.request_ids || !r.lengths)) return DSA_NULL_POINTER;
    if (r.num_requests > 0 && r.max_blocks > 0 && !r.block_table) return DSA_NULL_POINTER;

    const int64_t capacity = r.max_blocks * r.block_size;
    const int64_t longest = r.max_length < capacity ? r.max_length : capacity;
    for (int64_t t = 0; t < r.num_tokens; ++t) {
        if (r.lengths[t] <= 0) continue;
        if (r.lengths[t] > longest) return DSA_BAD_SHAPE;
        if (r.request_ids[t] < 0 || r.request_ids[t] >= r.num_requests) return DSA_BAD_SHAPE;
    }
    return DSA_OK;
}

}  // namespace dsa

#endif /* DSA_CPU_PAGED_ROWS_H_ */
