/* Write rows into a paged cache of compressed rows (window rows and entries of DeepSeek-V4), in place.
 *
 *   slot = slot_mapping[t];  cache row of slot := pack(rows[t])                    slots outside the cache: skipped
 *   fp8: of the value numbers of a group, v = bfloat16(row), a = max |v|
 *     scale   ceil_pow2(max(a, 1e-4) / 448), stored as exponent + 127, at most 254
 *     number  e4m3(v / scale), round to nearest even, saturating;  rotated numbers: bfloat16;  scale padding: 0
 *     NaN and infinities read back as what they are; the rest of their group is worthless.
 *   bfloat16: rounded to nearest even;  float32: as they are.
 *   A slot may not appear twice: either row may win. Bytes that fill up a block are not touched.
 *
 * Source: DeepSeek-V4 (fp8 rows of FlashMLA, scales at the tail of each block), rules S17, S32, S33 and S35.
 */
#ifndef DSA_COMPRESSED_ROW_WRITE_H_
#define DSA_COMPRESSED_ROW_WRITE_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_compressed_row_write_params {
    const void* rows;            /* [num_tokens, head_dim] input_format, row stride row_stride; rotated numbers last */
    uint8_t* cache;              /* [num_blocks, block] cache_format, see cache_layout.h */
    const int64_t* slot_mapping; /* [num_tokens] int64: block * block_rows + offset; negative: do not write */
    int64_t row_stride;          /* elements */
    int64_t block_stride_bytes;  /* distance of blocks, >= dsa_compressed_block_bytes; fp8, bfloat16: a multiple of 2,
                                    float32: of 4 */
    int64_t num_blocks;
    int64_t num_tokens;
    int32_t block_rows;
    int32_t head_dim;
    int32_t qk_rope_head_dim; /* even, below head_dim */
    dsa_format input_format;  /* DSA_FLOAT32 or DSA_BFLOAT16 */
    dsa_format cache_format;
} dsa_compressed_row_write_params;

DSA_API size_t dsa_compressed_row_write_params_size(void);
DSA_API dsa_status dsa_compressed_row_write_cpu(const dsa_compressed_row_write_params* params,
                                                const dsa_cpu_options* options);
DSA_API dsa_status dsa_compressed_row_write_cuda(const dsa_compressed_row_write_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_COMPRESSED_ROW_WRITE_H_ */
