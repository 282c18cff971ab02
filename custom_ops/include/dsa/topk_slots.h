/* Exact, deterministic top-k of score rows, as positions and as cache slots.
 *
 *   n = min(topk, max(lengths[t], 0));  the n positions s < lengths[t] with the largest logits[t][s]
 *   Order of rank: larger score first; -0 equals +0; NaN below -inf; equal scores: smaller position first.
 *   positions[t] = those positions ascending, then -1;  counts[t] = n
 *   slot_ids[t][i] = block_table[request_ids[t]][p / block_size] * block_size + p % block_size for p = positions[t][i],
 *                    -1 where p is -1 or its block id is outside the cache
 *   lengths[t] <= topk: the row is 0, 1, .. lengths[t] - 1 and the logits are not read.
 *   Columns from lengths[t] on are never read.
 *   CUDA: longer lengths are clamped; a wrong request id makes every slot id of the row -1.
 *
 * Source: rules S34 to S39 and S64 of the DSA data flow.
 */
#ifndef DSA_TOPK_SLOTS_H_
#define DSA_TOPK_SLOTS_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_topk_slots_params {
    const float* logits;        /* [num_tokens, logits_width] float32, row stride logits_stride */
    const int32_t* lengths;     /* [num_tokens] int32, at most logits_width and max_blocks * block_size */
    const int32_t* block_table; /* [num_requests, max_blocks] int32, contiguous */
    const int32_t* request_ids; /* [num_tokens] int32; rows with length 0 may hold anything */
    int32_t* positions;         /* [num_tokens, topk] int32, contiguous */
    int32_t* slot_ids;          /* [num_tokens, topk] int32, contiguous */
    int32_t* counts;            /* [num_tokens] int32 */
    void* workspace;            /* workspace_bytes, 64-byte aligned */
    size_t workspace_bytes;
    int64_t logits_stride; /* elements */
    int64_t logits_width;
    int64_t num_blocks; /* of the cache; num_blocks * block_size < 2^31 */
    int64_t num_tokens;
    int64_t num_requests;
    int64_t max_blocks;
    int32_t block_size;
    int32_t topk; /* >= 1 */
} dsa_topk_slots_params;

DSA_API size_t dsa_topk_slots_params_size(void);
DSA_API size_t dsa_topk_slots_workspace_bytes(const dsa_topk_slots_params* params, const dsa_cpu_options* options);
DSA_API dsa_status dsa_topk_slots_cpu(const dsa_topk_slots_params* params, const dsa_cpu_options* options);
DSA_API size_t dsa_topk_slots_cuda_workspace_bytes(const dsa_topk_slots_params* params);
DSA_API dsa_status dsa_topk_slots_cuda(const dsa_topk_slots_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_TOPK_SLOTS_H_ */
