/* Write index keys into the paged index-key cache, in place.
 *
 *   slot = slot_mapping[t];  key of slot := pack(key[t])                            slots outside the cache: skipped
 *   fp8: v = bfloat16(key), a = max |v|
 *     scale  ue8m0  ceil_pow2(max(a, 1e-4) / 448)     plain  max(a, 1e-4) / 448
 *     number e4m3(v / scale), round to nearest even, saturating
 *
 * Source: DeepSeek-V3.2 inference code (indexer), rules S27 and S42 of the DSA data flow.
 */
#ifndef DSA_INDEX_KEY_WRITE_H_
#define DSA_INDEX_KEY_WRITE_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_index_key_write_params {
    const void* key;             /* [num_tokens, index_head_dim] input_format, row stride key_stride */
    uint8_t* cache;              /* [num_blocks, block] cache_format, see cache_layout.h */
    const int64_t* slot_mapping; /* [num_tokens] int64: block * block_size + offset; negative: do not write */
    int64_t key_stride;          /* elements */
    int64_t block_stride_bytes;  /* distance of blocks, >= bytes of a block */
    int64_t num_blocks;
    int64_t num_tokens;
    int32_t block_size; /* a multiple of 4 for fp8, so that scales stay aligned */
    int32_t index_head_dim;
    dsa_format input_format; /* DSA_FLOAT32 or DSA_BFLOAT16 */
    dsa_format cache_format;
    dsa_scale_format scale_format; /* fp8 only */
} dsa_index_key_write_params;

DSA_API size_t dsa_index_key_write_params_size(void);
DSA_API dsa_status dsa_index_key_write_cpu(const dsa_index_key_write_params* params, const dsa_cpu_options* options);
DSA_API dsa_status dsa_index_key_write_cuda(const dsa_index_key_write_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_INDEX_KEY_WRITE_H_ */
