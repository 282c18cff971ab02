/* What the bindings over index keys share: the shape of their cache, and queries that fit it. */
#ifndef DSA_PADDLE_INDEX_CACHE_H_
#define DSA_PADDLE_INDEX_CACHE_H_

#include <string>

#include "binding.h"

namespace dsa {
namespace binding {

/* Fixes the sizes num_blocks and block_size. A block_size other than 0 is the user's: of fp8 blocks that are filled up,
 * [num_blocks, block_bytes]. */
static inline void expect_index_blocks(Shapes* shapes, const char* argument, const Tensor& cache, int64_t block_size) {
    if (cache.defined() && cache.dims().size() == 2 && block_size != 0) {
        shapes->expect(argument, cache, {DataType::UINT8}, {"num_blocks", "block_bytes"});
        expect_between("block_size", block_size, 1, kMaxInt32);
        shapes->give("block_size", argument, cache, block_size);
        return;
    }
    shapes->expect(argument, cache, {DataType::UINT8, DataType::BFLOAT16, DataType::FLOAT32},
                   {"num_blocks", "block_size", "index_row"});
    const int32_t shown = shapes->positive("block_size");
    if (block_size != 0 && block_size != shown) {
        refuse("block_size: expected " + std::to_string(shown) + " as in " + argument + ", " + describe(cache) +
               ", got " + std::to_string(block_size));
    }
}

/* An index-key cache, [num_blocks, block_size, row] or filled up as above: the block must be what cache_layout.h says
 * for the head size. */
static inline void expect_index_cache(Shapes* shapes, const char* argument, const Tensor& cache,
                                      int64_t given_block_size = 0) {
    expect_index_blocks(shapes, argument, cache, given_block_size);
    const int32_t block_size = shapes->positive("block_size");
    const int32_t index_head_dim = shapes->positive("index_head_dim");
    const dsa_format format = format_of(cache);
    if (format == DSA_FP8) {
        if (index_head_dim > DSA_MAX_FP8_INDEX_HEAD_DIM) {
            refuse(std::string(argument) + ": expected index_head_dim of at most " +
                   std::to_string(DSA_MAX_FP8_INDEX_HEAD_DIM) +
                   " in an fp8 cache, because a token has one scale, got " + std::to_string(index_head_dim));
        }
        if (block_size % 4 != 0) {
            refuse(std::string(argument) + ": expected block_size to be a multiple of 4 in an fp8 cache, " +
                   "so that its scales are aligned, got " + std::to_string(block_size) + " in " + describe(cache));
        }
    }
    const int64_t expected = dsa_index_block_bytes(format, block_size, index_head_dim);
    const bool is_filled_up = cache.dims().size() == 2;
    if (block_bytes(cache) == expected) return;
    if (is_filled_up && block_bytes(cache) > expected && block_bytes(cache) % 4 == 0) return;
    refuse(std::string(argument) + ": expected blocks of " + std::to_string(expected) + " bytes" +
           (is_filled_up ? ", filled up to a multiple of 4," : "") + " for block_size " +
           std::to_string(block_size) + " and index_head_dim " + std::to_string(index_head_dim) + ", got " +
           std::to_string(block_bytes(cache)) + " bytes in " + describe(cache));
}

static inline void expect_index_row_fits(const Shapes& shapes) {
    const int64_t heads = shapes.positive("index_n_heads");
    const int64_t dim = shapes.positive("index_head_dim");
    if (heads * dim <= kMaxIndexRow) return;
    refuse("query: expected index_n_heads * index_head_dim of at most " + std::to_string(kMaxIndexRow) + ", got " +
           std::to_string(heads) + " * " + std::to_string(dim));
}

/* Index queries, their head weights, and a cache in the format of the queries. */
static inline void expect_index_query(Shapes* shapes, const Tensor& query, const Tensor& folded_weights,
                                      const Tensor& index_cache, int64_t block_size) {
    shapes->expect("query", query, {DataType::UINT8, DataType::BFLOAT16, DataType::FLOAT32},
                   {"num_tokens", "index_n_heads", "index_head_dim"});
    shapes->expect("folded_weights", folded_weights, {DataType::FLOAT32}, {"num_tokens", "index_n_heads"});
    expect_index_cache(shapes, "index_cache", index_cache, block_size);
    expect_index_row_fits(*shapes);
    if (index_cache.dtype() == query.dtype()) return;
    refuse(std::string("query: expected ") + dtype_name(index_cache.dtype()) + " like index_cache, got " +
           describe(query));
}

}  // namespace binding
}  // namespace dsa

#endif /* DSA_PADDLE_INDEX_CACHE_H_ */
