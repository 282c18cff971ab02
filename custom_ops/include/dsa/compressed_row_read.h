/* Read rows of a paged cache of compressed rows, as float32.
 *
 *   out[i] = unpack(cache row of slot_ids[i]);  slots outside the cache: zeros
 *   fp8: e4m3 * 2^(scale - 127) and the rotated numbers as they are, exact.
 *
 * Source: DeepSeek-V4 (fp8 rows of FlashMLA, scales at the tail of each block), rules S32, S33 and S35.
 */
#ifndef DSA_COMPRESSED_ROW_READ_H_
#define DSA_COMPRESSED_ROW_READ_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_compressed_row_read_params {
    const uint8_t* cache;       /* [num_blocks, block] cache_format, see cache_layout.h */
    const int64_t* slot_ids;    /* [num_rows] int64: block * block_rows + offset */
    float* out;                 /* [num_rows, head_dim] float32, contiguous */
    int64_t block_stride_bytes; /* as in compressed_row_write.h */
    int64_t num_blocks;
    int64_t num_rows;
    int32_t block_rows;
    int32_t head_dim;
    int32_t qk_rope_head_dim; /* even, below head_dim */
    dsa_format cache_format;
} dsa_compressed_row_read_params;

DSA_API size_t dsa_compressed_row_read_params_size(void);
DSA_API dsa_status dsa_compressed_row_read_cpu(const dsa_compressed_row_read_params* params,
                                               const dsa_cpu_options* options);
DSA_API dsa_status dsa_compressed_row_read_cuda(const dsa_compressed_row_read_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_COMPRESSED_ROW_READ_H_ */
