/* The inner problem of topk_slots: one row of scores, its k best positions. */
#ifndef DSA_CPU_TOPK_SELECT_H_
#define DSA_CPU_TOPK_SELECT_H_

#include "dsa/common.h"
#include "number_formats.h"

namespace dsa {

struct TopkSelector {
    /* Scratch of one thread for rows of at most max_length scores; a multiple of 64. */
    size_t (*scratch_bytes)(int64_t max_length, int64_t topk);
    /* The topk best of n scores as ascending positions, 0 < topk < n <= max_length. */
    void (*select)(const float* scores, int64_t n, int64_t topk, int32_t* positions, void* scratch);
};

extern const TopkSelector kTopkSelectorScalar;
extern const TopkSelector kTopkSelectorAvx2;
extern const TopkSelector kTopkSelectorAvx512;

/* Integers in the order of rank: -0 equals +0, every NaN is the lowest. Integer arithmetic throughout, because
 * comparing floats would see denormals as zero in the mode that other libraries may have set; without branches, because
 * the signs of scores cannot be predicted. */
static inline int32_t rank_key(float score) {
    const int32_t bits = (int32_t)float_bits(score);
    const int32_t magnitude = bits & 0x7FFFFFFF;
    const int32_t ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
    const int32_t one_zero = ordered + (ordered == -1); /* -0, and nothing else, is -1 */
    const int32_t if_nan = -(int32_t)(magnitude > 0x7F800000);
    return (one_zero & ~if_nan) | (INT32_MIN & if_nan);
}

}  // namespace dsa

#endif /* DSA_CPU_TOPK_SELECT_H_ */
