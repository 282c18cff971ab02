/* Write latent rows into the paged latent cache, in place.
 *
 *   slot = slot_mapping[t];  cache row of slot := pack(latent[t], rope[t])         slots outside the cache: skipped
 *   fp8 scale of a group: v = bfloat16(latent), a = max |v|
 *     ue8m0  ceil_pow2(max(a / 448, 1e-4))          plain  max(a / 448, 2^-126)
 *   number: e4m3(v / scale), round to nearest even, saturating; rope: bfloat16, unquantised; padding bytes: 0.
 *   A group with a NaN or an infinity reads back as NaN throughout. A slot may not appear twice: either token may win.
 *
 * Source: DeepSeek-V3.2 inference code (kv cache of FlashMLA's sparse decode), rules S28 and S41 of the DSA data flow.
 */
#ifndef DSA_MLA_CACHE_WRITE_H_
#define DSA_MLA_CACHE_WRITE_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_mla_cache_write_params {
    const void* latent;          /* [num_tokens, kv_lora_rank] input_format, row stride latent_stride */
    const void* rope;            /* [num_tokens, qk_rope_head_dim] input_format, row stride rope_stride */
    uint8_t* cache;              /* [num_blocks, block_size, row] cache_format, see cache_layout.h */
    const int64_t* slot_mapping; /* [num_tokens] int64: block * block_size + offset; negative: do not write */
    int64_t latent_stride;       /* elements */
    int64_t rope_stride;         /* elements */
    int64_t block_stride_bytes;  /* distance of blocks, >= block_size * row bytes */
    int64_t num_blocks;
    int64_t num_tokens;
    int32_t block_size;
    int32_t kv_lora_rank;
    int32_t qk_rope_head_dim;
    dsa_format input_format; /* DSA_FLOAT32 or DSA_BFLOAT16 */
    dsa_format cache_format;
    dsa_scale_format scale_format; /* fp8 only */
} dsa_mla_cache_write_params;

DSA_API size_t dsa_mla_cache_write_params_size(void);
DSA_API dsa_status dsa_mla_cache_write_cpu(const dsa_mla_cache_write_params* params, const dsa_cpu_options* options);
DSA_API dsa_status dsa_mla_cache_write_cuda(const dsa_mla_cache_write_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_MLA_CACHE_WRITE_H_ */
