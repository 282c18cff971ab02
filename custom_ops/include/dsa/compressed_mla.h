/* Attention of query rows over window rows and compressed entries, with a sink: prefill, decode and verify rows alike.
 *
 *   ids = window_slots[t][0 .. window_counts[t]) that lie inside the window cache, then
 *         entry_slots[t][0 .. entry_counts[t]) that lie inside the entry cache;  row_i = its head_dim numbers, key and
 *         value in one
 *   z_i = softmax_scale * (query[t][h] . row_i);  m = max z;  l = sum exp(z_i - m)
 *   out[t][h] = sum_i exp(z_i - m) row_i / (l + exp(sinks[h] - m));  lse[t][h] = m + ln l         float32 sums
 *   The sink changes neither lse nor is it scaled: -inf is no sink, +inf gives out = 0.
 *   No id: out = 0 and lse = -inf. Repeated ids count repeatedly.
 *   The order of the sums depends on the row's valid ids only, never on num_tokens or on the row's neighbours. On CUDA
 *   it depends on the row's ids and counts, and on the kernel, which is chosen by num_tokens, num_heads and the widths
 *   unless batch_invariant is set (rules S72, S73 of the DSA data flow).
 *   CUDA, bfloat16 queries over a bfloat16 or fp8 cache: exp(z_i - m) enters the sum of out rounded to bfloat16 or
 *   finer; all sums are float32. Elsewhere everything is float32.
 *
 * Cost per row: (window + entry counts) * num_heads * 4 * head_dim FLOP, as many rows read.
 * Source: DeepSeek-V4 (window and compressed attention), rules S25 to S27.
 */
#ifndef DSA_COMPRESSED_MLA_H_
#define DSA_COMPRESSED_MLA_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_compressed_mla_params {
    const void* query;            /* [num_tokens, num_heads, head_dim] query_format, contiguous */
    const uint8_t* window_cache;  /* [window_num_blocks, block] cache_format, see cache_layout.h */
    const int32_t* window_slots;  /* [num_tokens, window_width] int32, contiguous; ids outside the cache are skipped */
    const int32_t* window_counts; /* [num_tokens] int32: leading slots to look at, 0 .. window_width (else DSA_BAD_SHAPE
                                     on the CPU, clamped on CUDA); may be null: window_width for every row */
    const uint8_t* entry_cache;   /* [entry_num_blocks, block] cache_format; not looked at where there are no blocks */
    const int32_t* entry_slots;   /* [num_tokens, entry_width] int32, as window_slots; not looked at for width 0 */
    const int32_t* entry_counts;  /* [num_tokens] int32, as window_counts; may be null */
    const float* sinks;           /* [num_heads] float32 */
    void* out;                    /* [num_tokens, num_heads, head_dim] query_format, contiguous */
    float* lse;                   /* [num_tokens, num_heads] float32, natural logarithm; may be null */
    void* workspace;              /* workspace_bytes, 64-byte aligned */
    size_t workspace_bytes;
    int64_t window_block_stride_bytes; /* as in compressed_row_write.h */
    int64_t entry_block_stride_bytes;
    int64_t window_num_blocks; /* window_num_blocks * window_block_rows < 2^31 */
    int64_t entry_num_blocks;  /* entry_num_blocks * entry_block_rows < 2^31 */
    int64_t num_tokens;
    int32_t window_block_rows;
    int32_t entry_block_rows;
    int32_t window_width; /* >= 0 */
    int32_t entry_width;  /* >= 0; window_width + entry_width >= 1 */
    int32_t num_heads;
    int32_t head_dim;
    int32_t qk_rope_head_dim; /* even, below head_dim: says where the rotated numbers of fp8 rows begin */
    float softmax_scale;
    int32_t batch_invariant; /* CUDA: not 0 asks for the one kernel that serves any num_tokens; no meaning on the CPU */
    dsa_format query_format; /* DSA_FLOAT32 or DSA_BFLOAT16 */
    dsa_format cache_format; /* of both caches */
} dsa_compressed_mla_params;

DSA_API size_t dsa_compressed_mla_params_size(void);
DSA_API size_t dsa_compressed_mla_workspace_bytes(const dsa_compressed_mla_params* params,
                                                  const dsa_cpu_options* options);
DSA_API dsa_status dsa_compressed_mla_cpu(const dsa_compressed_mla_params* params, const dsa_cpu_options* options);
DSA_API size_t dsa_compressed_mla_cuda_workspace_bytes(const dsa_compressed_mla_params* params);
DSA_API dsa_status dsa_compressed_mla_cuda(const dsa_compressed_mla_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_COMPRESSED_MLA_H_ */
