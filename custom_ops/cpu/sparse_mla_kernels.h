/* What the files of sparse_mla share: the validated call, the parts of the vector algorithm, one table of kernels per
 * instruction set.
 *
 * A row's valid ids, in their order, are cut into chunks of kKeysPerChunk. A chunk is attended to by itself (partial
 * result with its own maximum); partial results are merged from the first chunk to the last. Neither the cut nor the
 * order knows anything but the row, so every schedule over threads gives the same bits.
 */
#ifndef DSA_CPU_SPARSE_MLA_KERNELS_H_
#define DSA_CPU_SPARSE_MLA_KERNELS_H_

#include "dsa/sparse_mla.h"
#include "latent_cache.h"

namespace dsa {

/* 128 rows of 512 + 64 float32 are 288 KiB: they stay in an L2 cache of 1 MiB with the queries and results of 16
 * heads, and 2048 keys still give 16 tasks. */
constexpr int32_t kKeysPerChunk = 128;
constexpr int32_t kPadFloats = 16; /* a multiple of the lanes of every instruction set */

struct SparseMla {
    const dsa_sparse_mla_params* params;
    LatentLayout layout;
    int32_t latent_width;   /* kv_lora_rank rounded up to kPadFloats; the pad of a decoded row is zero */
    int32_t row_width;      /* latent_width + qk_rope_head_dim, each rounded up */
    int32_t bf16_row_width; /* row_width rounded up to 2 * kPadFloats */
};

/* Softmax over a part of a row's keys, for several heads. */
struct SparseMlaPartial {
    float* max; /* [num_heads] float32: m, the largest z */
    float* sum; /* [num_heads] float32: sum exp(z - m) */
    float* out; /* [num_heads, latent_width] float32: sum exp(z - m) * row */
};

struct SlotRange {
    const int32_t* slot_ids;
    int32_t size;
};

struct SparseMlaKernels {
    /* query [num_heads, row_width] float32 := heads [head_begin, head_begin + num_heads) of a token, padded */
    void (*load_query)(const SparseMla& call, int64_t token, int32_t head_begin, int32_t num_heads, float* query);
    /* keys [kKeysPerChunk, row_width] float32 := the rows of slots, decoded and padded */
    void (*load_keys)(const SparseMla& call, const SlotRange& slots, float* keys);
    /* partial := the softmax over keys; probabilities [num_heads, kKeysPerChunk] float32 is scratch. Rows of next are
     * brought into the L2 cache meanwhile. */
    void (*attend)(const SparseMla& call, const float* query, const float* keys, int32_t num_heads, int32_t num_keys,
                   const SlotRange& next, float* probabilities, const SparseMlaPartial& partial);
    void (*merge)(const SparseMla& call, int32_t num_heads, const SparseMlaPartial& from,
                  const SparseMlaPartial& into);
    /* out and lse of heads [head_begin, head_begin + num_heads) of a token */
    void (*store)(const SparseMla& call, int64_t token, int32_t head_begin, int32_t num_heads,
                  const SparseMlaPartial& partial);
};

extern const SparseMlaKernels sparse_mla_avx2;
extern const SparseMlaKernels sparse_mla_avx512;
extern const SparseMlaKernels sparse_mla_avx512_bf16; /* bfloat16 queries, and a cache of bfloat16 or fp8 numbers */

}  // namespace dsa

#endif /* DSA_CPU_SPARSE_MLA_KERNELS_H_ */
