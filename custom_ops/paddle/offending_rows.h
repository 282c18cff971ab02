/* Which row made an op answer DSA_BAD_SHAPE: looked for only then, so that a good call pays nothing.
 *
 * The bindings check sizes before the call; what is left are values inside tensors, and each function here makes the
 * same comparisons as the op. They return when no row is to blame.
 */
#ifndef DSA_PADDLE_OFFENDING_ROWS_H_
#define DSA_PADDLE_OFFENDING_ROWS_H_

#include <string>

#include "binding.h"

namespace dsa {
namespace binding {

/* "counts: expected 0 to 5 (topk), got 6 in row 2" */
[[noreturn]] static inline void refuse_value(const char* argument, const std::string& expected, int64_t value,
                                             int64_t row) {
    refuse(std::string(argument) + ": expected " + expected + ", got " + std::to_string(value) + " in row " +
           std::to_string(row));
}

/* As check_rows in custom_ops/cpu/paged_rows.h; longest is the op's own limit of lengths, under its name. */
static inline void refuse_offending_context(const Shapes& shapes, const Tensor& request_ids, const Tensor& lengths,
                                            const char* longest_name, int64_t longest, int64_t block_size) {
    const int64_t capacity = shapes["max_blocks"] * block_size;
    for (int64_t t = 0; t < shapes["num_tokens"]; ++t) {
        const int32_t length = address<int32_t>(lengths)[t];
        const int32_t request = address<int32_t>(request_ids)[t];
        if (length <= 0) continue;
        if (length > longest)
            refuse_value("lengths", "at most " + std::to_string(longest) + " (" + longest_name + ")", length, t);
        if (length > capacity) {
            refuse_value("lengths", "at most " + std::to_string(capacity) + " (" +
                         std::to_string(shapes["max_blocks"]) + " blocks a row of block_table, of " +
                         std::to_string(block_size) + " slots)", length, t);
        }
        if (request < 0 || request >= shapes["num_requests"]) {
            refuse_value("request_ids", "a row of block_table, at least 0 and below " +
                         std::to_string(shapes["num_requests"]), request, t);
        }
    }
}

static inline void refuse_offending_count(const Tensor& counts, int32_t topk) {
    for (int64_t t = 0; t < counts.numel(); ++t) {
        const int32_t count = address<int32_t>(counts)[t];
        if (count < 0 || count > topk) refuse_value("counts", "0 to " + std::to_string(topk) + " (topk)", count, t);
    }
}

static inline void refuse_offending_block(const char* argument, const Tensor& block_ids, const char* arena,
                                          int64_t num_blocks) {
    for (int64_t i = 0; i < block_ids.numel(); ++i) {
        const int64_t block = address<int64_t>(block_ids)[i];
        if (block >= 0 && block < num_blocks) continue;
        refuse_value(argument, std::string("a block of ") + arena + ", at least 0 and below " +
                     std::to_string(num_blocks), block, i);
    }
}

}  // namespace binding
}  // namespace dsa

#endif /* DSA_PADDLE_OFFENDING_ROWS_H_ */
