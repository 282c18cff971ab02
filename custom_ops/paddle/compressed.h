/* What the bindings of compressed attention share: caches of compressed rows. */
#ifndef DSA_PADDLE_COMPRESSED_H_
#define DSA_PADDLE_COMPRESSED_H_

#include <string>

#include "binding.h"
#include "compressed_cache.h"

namespace dsa {
namespace binding {

/* rope_dim of rows of head_dim numbers. */
static inline int32_t checked_rope_dim(int64_t rope_dim, int32_t head_dim) {
    if (rope_dim >= 2 && rope_dim < head_dim && rope_dim % 2 == 0) return (int32_t)rope_dim;
    refuse("rope_dim: expected an even number of at least 2 and less than the " + std::to_string(head_dim) +
           " numbers of a row, got " + std::to_string(rope_dim));
}

static inline int32_t checked_block_rows(const char* argument, int64_t block_rows) {
    expect_between(argument, block_rows, 1, kMaxInt32);
    return (int32_t)block_rows;
}

/* fp8 blocks are bytes, at least as many as cache_layout.h says. */
static inline void expect_block_bytes(const char* argument, const Tensor& cache, int64_t least, int64_t unit,
                                      int32_t block_rows, int32_t head_dim) {
    if (least >= 0 && block_bytes(cache) >= least && block_bytes(cache) % unit == 0) return;
    refuse(std::string(argument) + ": expected blocks of at least " + std::to_string(least) + " bytes, a multiple of " +
           std::to_string(unit) + ", for " + std::to_string(block_rows) + " rows of " + std::to_string(head_dim) +
           " numbers, got " + describe(cache));
}

/* A cache of compressed rows: fp8 [num_blocks, block_bytes], else [num_blocks, block_rows, head_dim]. num_blocks and
 * num_bytes are the names of its own sizes; head_dim is known already. */
static inline void expect_row_cache(Shapes* shapes, const char* argument, const Tensor& cache, const char* num_blocks,
                                    int32_t block_rows, int32_t rope_dim, const char* num_bytes = "block_bytes") {
    const int32_t head_dim = shapes->between("head_dim", 1, kMaxCompressedDim);
    shapes->device.expect(argument, cache);
    if (cache.dtype() != DataType::UINT8) {
        shapes->expect(argument, cache, {DataType::UINT8, DataType::BFLOAT16, DataType::FLOAT32},
                       {num_blocks, block_rows, "head_dim"});
        return;
    }
    shapes->expect(argument, cache, {DataType::UINT8}, {num_blocks, num_bytes});
    if (head_dim % 2 != 0) {
        refuse(std::string(argument) + ": expected rows of an even head_dim in an fp8 cache, so that bfloat16 " +
               "numbers are aligned, got " + std::to_string(head_dim));
    }
    const int64_t least = dsa_compressed_block_bytes(DSA_FP8, block_rows, head_dim, rope_dim);
    expect_block_bytes(argument, cache, least, 2, block_rows, head_dim);
}

}  // namespace binding
}  // namespace dsa

#endif /* DSA_PADDLE_COMPRESSED_H_ */
