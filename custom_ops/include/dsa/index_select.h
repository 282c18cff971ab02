/* indexer_logits followed by topk_slots, row block by row block, so that the scores of at most max_logits_bytes exist
 * at a time. Results are bit for bit those of the two ops; rows with lengths[t] <= topk need no scores. Wrong values
 * on CUDA: as the two ops.
 *
 * Source: rules S51 to S56 and S61 of the DSA data flow.
 */
#ifndef DSA_INDEX_SELECT_H_
#define DSA_INDEX_SELECT_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_index_select_params {
    const void* query;           /* [num_tokens, index_n_heads, index_head_dim] cache_format (fp8: e4m3), contiguous */
    const float* folded_weights; /* [num_tokens, index_n_heads] float32, contiguous */
    const uint8_t* index_cache;  /* [num_blocks, block] cache_format, see cache_layout.h */
    const int32_t* block_table;  /* [num_requests, max_blocks] int32, contiguous */
    const int32_t* request_ids;  /* [num_tokens] int32; rows with length 0 may hold anything */
    const int32_t* lengths;      /* [num_tokens] int32, at most max_length and max_blocks * block_size */
    int32_t* positions;          /* [num_tokens, topk] int32, contiguous; -1 after the last */
    int32_t* slot_ids;           /* [num_tokens, topk] int32, contiguous; -1 after the last */
    int32_t* counts;             /* [num_tokens] int32 */
    void* workspace;             /* workspace_bytes, 64-byte aligned */
    size_t workspace_bytes;
    int64_t max_logits_bytes; /* budget for scores; at least one row is always scored at a time */
    int64_t max_length;       /* the largest of lengths, or more; sizes the score rows (up to a full block table) */
    int64_t block_stride_bytes;
    int64_t num_blocks; /* num_blocks * block_size < 2^31 */
    int64_t num_tokens;
    int64_t num_requests;
    int64_t max_blocks;
    int32_t block_size;
    int32_t index_n_heads;
    int32_t index_head_dim;
    int32_t topk; /* >= 1 */
    dsa_format cache_format;
} dsa_index_select_params;

DSA_API size_t dsa_index_select_params_size(void);
DSA_API size_t dsa_index_select_workspace_bytes(const dsa_index_select_params* params,
                                                const dsa_cpu_options* options);
DSA_API dsa_status dsa_index_select_cpu(const dsa_index_select_params* params, const dsa_cpu_options* options);
DSA_API size_t dsa_index_select_cuda_workspace_bytes(const dsa_index_select_params* params);
DSA_API dsa_status dsa_index_select_cuda(const dsa_index_select_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_INDEX_SELECT_H_ */
