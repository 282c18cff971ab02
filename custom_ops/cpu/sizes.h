/* Bounds of the sizes a caller chooses, so that no product of them overflows: neither an offset nor a workspace.
 *
 *   counts and widths        at most INT32_MAX
 *   numbers of an index row  index_n_heads * index_head_dim, at most kMaxIndexRow
 *   arrays                   the product of their sizes and bytes fits int64
 *
 * Functions are static, so that a file compiled for one instruction set never lends its copy to another.
 */
#ifndef DSA_CPU_SIZES_H_
#define DSA_CPU_SIZES_H_

#include <stdint.h>

#include "dsa/cache_layout.h"

namespace dsa {

constexpr int64_t kMaxIndexRow = (int64_t)1 << 30; /* kernels round heads and numbers up to vectors, in int32 */

static inline bool is_count(int64_t size) { return size >= 0 && size <= INT32_MAX; }

/* Whether the product of sizes, none of them negative, fits int64. */
static inline bool product_fits(int64_t a, int64_t b, int64_t c = 1, int64_t d = 1) {
    int64_t product;
    return !__builtin_mul_overflow(a, b, &product) && !__builtin_mul_overflow(product, c, &product) &&
           !__builtin_mul_overflow(product, d, &product);
}

/* Rows of float32 or smaller numbers, stride numbers apart. The stride of a single row means nothing. */
static inline bool rows_fit(int64_t num_rows, int64_t stride, int64_t width) {
    return num_rows <= 1 || (stride >= width && product_fits(num_rows, stride, (int64_t)sizeof(float)));
}

/* Index queries [num_tokens, index_n_heads, index_head_dim] and their weights. */
static inline bool index_rows_fit(int64_t num_tokens, int32_t index_n_heads, int32_t index_head_dim) {
    if (!is_count(num_tokens) || index_n_heads <= 0 || index_head_dim <= 0) return false;
    const int64_t row = (int64_t)index_n_heads * index_head_dim;
    return row <= kMaxIndexRow && product_fits(num_tokens, row, (int64_t)sizeof(float));
}

static inline dsa_status check_index_cache(dsa_format format, int64_t num_blocks, int64_t block_stride_bytes,
                                           int32_t block_size, int32_t index_head_dim) {
    if (format < DSA_FLOAT32 || format > DSA_FP8) return DSA_BAD_FORMAT;
    const int64_t block_bytes = dsa_index_block_bytes(format, block_size, index_head_dim);
    if (block_bytes < 0 || !is_count(num_blocks)) return DSA_BAD_SHAPE;
    if (num_blocks == 0) return DSA_OK;
    if (block_stride_bytes < block_bytes || !product_fits(num_blocks, block_stride_bytes)) return DSA_BAD_SHAPE;
    return DSA_OK;
}

}  // namespace dsa

#endif /* DSA_CPU_SIZES_H_ */
