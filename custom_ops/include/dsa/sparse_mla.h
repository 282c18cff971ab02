/* Attention of query rows over their selected slots of the paged latent cache: prefill, decode and verify rows alike.
 *
 *   ids = slot_ids[t][0 .. counts[t]) that lie inside the cache;  row_i = 576 (kv_lora_rank + qk_rope_head_dim) numbers
 *   z_i = softmax_scale * (query[t][h] . row_i);  m = max z;  l = sum exp(z_i - m)
 *   out[t][h] = sum_i exp(z_i - m) / l * row_i[0 .. kv_lora_rank);  lse[t][h] = m + ln l          float32 sums
 *   No id: out = 0 and lse = -inf. Repeated ids count repeatedly.
 *   The order of the sums depends on the row's valid ids only, never on num_tokens or on the row's neighbours. On CUDA
 *   it depends on the row's slot_ids and count, and on the kernel, which is chosen by num_tokens, num_heads and topk
 *   unless batch_invariant is set (rules S72, S73).
 *   CUDA, bfloat16 queries over an fp8 cache: exp(z_i - m) enters the sum of out rounded to bfloat16 or finer, scores
 *   may use e4m3 * scale unrounded; all sums are float32. Elsewhere everything is float32.
 *   From 512 query rows on, the workspace may hold up to 256 MiB of widened cache rows and 64 MiB that say where they are;
 *   they change no bit of a result.
 *
 * Cost per row: counts * num_heads * 2 * (2 * kv_lora_rank + qk_rope_head_dim) FLOP, counts * row bytes read.
 * Source: DeepSeek-V3.2 technical report, rules S67 to S73 of the DSA data flow.
 */
#ifndef DSA_SPARSE_MLA_H_
#define DSA_SPARSE_MLA_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_sparse_mla_params {
    const void* query;           /* [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim] query_format, contiguous */
    const uint8_t* latent_cache; /* [num_blocks, block_size, row] cache_format, see cache_layout.h */
    const int32_t* slot_ids;     /* [num_tokens, topk] int32, contiguous; ids outside the cache are skipped */
    const int32_t* counts;       /* [num_tokens] int32: leading ids to look at, 0 .. topk (else DSA_BAD_SHAPE on
                                    the CPU, clamped on CUDA); may be null: topk for every row */
    void* out;                   /* [num_tokens, num_heads, kv_lora_rank] query_format, contiguous */
    float* lse;                  /* [num_tokens, num_heads] float32, natural logarithm; may be null */
    void* workspace;             /* workspace_bytes, 64-byte aligned */
    size_t workspace_bytes;
    int64_t block_stride_bytes;
    int64_t num_blocks; /* num_blocks * block_size < 2^31 */
    int64_t num_tokens;
    int32_t block_size;
    int32_t num_heads;
    int32_t kv_lora_rank;
    int32_t qk_rope_head_dim;
    int32_t topk; /* width of slot_ids, >= 1 */
    float softmax_scale;
    int32_t batch_invariant; /* CUDA: not 0 asks for the one kernel that serves any num_tokens; no meaning on the CPU */
    dsa_format query_format; /* DSA_FLOAT32 or DSA_BFLOAT16 */
    dsa_format cache_format;
} dsa_sparse_mla_params;

DSA_API size_t dsa_sparse_mla_params_size(void);
DSA_API size_t dsa_sparse_mla_workspace_bytes(const dsa_sparse_mla_params* params, const dsa_cpu_options* options);
DSA_API dsa_status dsa_sparse_mla_cpu(const dsa_sparse_mla_params* params, const dsa_cpu_options* options);
DSA_API size_t dsa_sparse_mla_cuda_workspace_bytes(const dsa_sparse_mla_params* params);
DSA_API dsa_status dsa_sparse_mla_cuda(const dsa_sparse_mla_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_SPARSE_MLA_H_ */
