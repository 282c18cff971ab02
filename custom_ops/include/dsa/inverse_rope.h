/* Undo the rotation of attention outputs, in place: their keys are their values, rotated numbers included.
 *
 *   x = x[t][h][head_dim - qk_rope_head_dim ..);  c, s = cos[t], sin[t]
 *   x[2i] := x[2i] c[i] + x[2i+1] s[i],  x[2i+1] := x[2i+1] c[i] - x[2i] s[i]       float32, rounded once to x_format
 *   The other numbers are not touched.
 *
 * Source: DeepSeek-V4 (attention output), rule S28.
 */
#ifndef DSA_INVERSE_ROPE_H_
#define DSA_INVERSE_ROPE_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_inverse_rope_params {
    void* x;          /* [num_tokens, num_heads, head_dim] x_format, contiguous */
    const float* cos; /* [num_tokens, qk_rope_head_dim / 2] float32, contiguous: of the query's position */
    const float* sin; /* as cos */
    int64_t num_tokens;
    int32_t num_heads;
    int32_t head_dim;
    int32_t qk_rope_head_dim; /* even, at most head_dim */
    dsa_format x_format;      /* DSA_FLOAT32 or DSA_BFLOAT16 */
} dsa_inverse_rope_params;

DSA_API size_t dsa_inverse_rope_params_size(void);
DSA_API dsa_status dsa_inverse_rope_cpu(const dsa_inverse_rope_params* params, const dsa_cpu_options* options);
DSA_API dsa_status dsa_inverse_rope_cuda(const dsa_inverse_rope_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_INVERSE_ROPE_H_ */
