/* Index scores of query rows over their whole paged context, read in place (no gather).
 *
 *   b = request_ids[t];  slot(s) = block_table[b][s / block_size] * block_size + s % block_size
 *   logits[t][s] = key_scale(s) * sum_h folded_weights[t][h] * relu(sum_d query[t][h][d] * key(s)[d])
 *                                                                       for 0 <= s < lengths[t], float32
 *   Columns from lengths[t] on are not written. A block id outside the cache: the score is NaN (ranks last).
 *   The order of the sums depends on the shape of one (row, key) pair only: never on num_tokens, on the tile a row
 *   falls into, or on its neighbours.
 *   CUDA on Hopper, fp8: tensor cores keep about 13 bits below the largest product of 32; elsewhere sums are float32.
 *
 * Cost: 2 * index_n_heads * index_head_dim FLOP per score; every key of a context is read once per tile of rows.
 * Source: DeepSeek-V3.2 inference code (indexer), rules S30 to S33 of the DSA data flow.
 */
#ifndef DSA_INDEXER_LOGITS_H_
#define DSA_INDEXER_LOGITS_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_indexer_logits_params {
    const void* query;           /* [num_tokens, index_n_heads, index_head_dim] cache_format (fp8: e4m3), contiguous */
    const float* folded_weights; /* [num_tokens, index_n_heads] float32, contiguous */
    const uint8_t* index_cache;  /* [num_blocks, block] cache_format, see cache_layout.h */
    const int32_t* block_table;  /* [num_requests, max_blocks] int32, contiguous */
    const int32_t* request_ids;  /* [num_tokens] int32: row of block_table; rows with length 0 may hold anything */
    const int32_t* lengths;      /* [num_tokens] int32: visible keys; values <= 0 mean none; at most logits_width and
                                    max_blocks * block_size (more is DSA_BAD_SHAPE on the CPU, clamped
                                    on CUDA; there a wrong request id makes every score NaN) */
    float* logits;               /* [num_tokens, logits_width] float32, row stride logits_stride */
    void* workspace;             /* workspace_bytes, 64-byte aligned */
    size_t workspace_bytes;
    int64_t block_stride_bytes;
    int64_t logits_stride; /* elements */
    int64_t logits_width;
    int64_t num_blocks;
    int64_t num_tokens;
    int64_t num_requests;
    int64_t max_blocks;
    int32_t block_size;
    int32_t index_n_heads;
    int32_t index_head_dim;
    dsa_format cache_format;
} dsa_indexer_logits_params;

DSA_API size_t dsa_indexer_logits_params_size(void);
DSA_API size_t dsa_indexer_logits_workspace_bytes(const dsa_indexer_logits_params* params,
                                                  const dsa_cpu_options* options);
DSA_API dsa_status dsa_indexer_logits_cpu(const dsa_indexer_logits_params* params, const dsa_cpu_options* options);
DSA_API size_t dsa_indexer_logits_cuda_workspace_bytes(const dsa_indexer_logits_params* params);
DSA_API dsa_status dsa_indexer_logits_cuda(const dsa_indexer_logits_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_INDEXER_LOGITS_H_ */
