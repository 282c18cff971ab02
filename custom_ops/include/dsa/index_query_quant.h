/* Bring index queries into the number format of the index-key cache and fold all factors into the head weights.
 *
 *   c = float32((index_head_dim * index_n_heads)^-0.5)
 *   fp8       v = bfloat16(query), scale = ceil_pow2(max(max |v|, 1e-4) / 448) per (token, head)
 *             quantized = e4m3(v / scale);  folded = (weights * scale) * c
 *   bfloat16  quantized = bfloat16(query);  folded = weights * c
 *   float32   quantized = query;            folded = weights * c
 *
 * Folding is exact up to rounding because relu(a x) = a relu(x) for a > 0.
 * Source: DeepSeek-V3.2 inference code (indexer), rules S26 and S29 of the DSA data flow.
 */
#ifndef DSA_INDEX_QUERY_QUANT_H_
#define DSA_INDEX_QUERY_QUANT_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_index_query_quant_params {
    const void* query;     /* [num_tokens, index_n_heads, index_head_dim] input_format, token stride query_stride */
    const float* weights;  /* [num_tokens, index_n_heads] float32, row stride weights_stride */
    void* quantized;       /* [num_tokens, index_n_heads, index_head_dim] output_format, contiguous */
    float* folded_weights; /* [num_tokens, index_n_heads] float32, contiguous */
    int64_t query_stride;  /* elements */
    int64_t weights_stride;
    int64_t num_tokens;
    int32_t index_n_heads;
    int32_t index_head_dim;
    dsa_format input_format; /* DSA_FLOAT32 or DSA_BFLOAT16 */
    dsa_format output_format;
} dsa_index_query_quant_params;

DSA_API size_t dsa_index_query_quant_params_size(void);
DSA_API dsa_status dsa_index_query_quant_cpu(const dsa_index_query_quant_params* params,
                                             const dsa_cpu_options* options);
DSA_API dsa_status dsa_index_query_quant_cuda(const dsa_index_query_quant_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_INDEX_QUERY_QUANT_H_ */
