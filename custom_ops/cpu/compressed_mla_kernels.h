/* What the files of compressed_mla share: the validated call, and one table of kernels per instruction set. */
#ifndef DSA_CPU_COMPRESSED_MLA_KERNELS_H_
#define DSA_CPU_COMPRESSED_MLA_KERNELS_H_

#include "compressed_cache.h"
#include "dsa/compressed_mla.h"
#include "row_attention.h"

namespace dsa {

/* An id is a slot of the window cache, or a slot of the entry cache with the sign bit set. */
struct CompressedMla : RowAttention {
    const dsa_compressed_mla_params* params;
    CompressedLayout window;
    CompressedLayout entries;
};

constexpr int32_t kEntryBit = INT32_MIN;

struct CompressedRow {
    const CompressedLayout* layout;
    const uint8_t* data;
    const uint8_t* scales;
};

static inline CompressedRow compressed_row_of(const CompressedMla& call, int32_t id) {
    const bool is_entry = id < 0;
    const CompressedLayout* layout = is_entry ? &call.entries : &call.window;
    const uint8_t* cache = is_entry ? call.params->entry_cache : call.params->window_cache;
    const int64_t slot = id & INT32_MAX;
    return {layout, cache + compressed_row_offset(layout, slot), cache + compressed_scale_offset(layout, slot)};
}

extern const RowAttentionKernels compressed_mla_avx2;
extern const RowAttentionKernels compressed_mla_avx512;
extern const RowAttentionKernels compressed_mla_avx512_bf16; /* bfloat16 queries, caches of bfloat16 or fp8 numbers */

}  // namespace dsa

#endif /* DSA_CPU_COMPRESSED_MLA_KERNELS_H_ */
