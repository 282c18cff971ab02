/* Byte layouts of the paged caches. fastdeploy_dsa/cache_layout.py and compressed_cache_layout.py say the same in
 * Python; a test compares them.
 *
 * Latent cache (role "key"): one token, one row.
 *   fp8       kv_lora_rank e4m3 | pad to 4 | float32 scale per 128 numbers (the last group may be shorter)
 *             | qk_rope_head_dim bfloat16 | pad to 4                           512 + 64: 512 + 16 + 128 = 656 bytes
 *   bfloat16  kv_lora_rank + qk_rope_head_dim bfloat16                          1152 bytes
 *   float32   kv_lora_rank + qk_rope_head_dim float32                           2304 bytes
 *   Value of an fp8 number: bfloat16(e4m3 * scale); exact for power-of-two scales.
 *
 * Index-key cache (role "indexer"): one block of block_size tokens.
 *   fp8       block_size x index_head_dim e4m3, then block_size float32 scales  128: 64 * 128 + 64 * 4 = 8448 bytes
 *   bfloat16  block_size x index_head_dim bfloat16
 *   float32   block_size x index_head_dim float32
 *   The fp8 tensor is declared [num_blocks, block_size, 132], yet cache[block][offset] is NOT token `offset`.
 *
 *   Blocks may lie further apart than their bytes (rule S34 of DeepSeek-V4: 8448 bytes of 64 keys, filled up to 8640).
 *
 * Compressed-row cache (roles "key" and "swa" of DeepSeek-V4): one block of block_rows rows of head_dim numbers. The
 * last qk_rope_head_dim of a row are rotated; the others are called its value numbers.
 *   fp8       block_rows x (value numbers e4m3 | rotated numbers bfloat16), then block_rows x (uint8 scale per 64 value
 *             numbers, the last group may be shorter, zeros up to a multiple of 8)
 *             448 + 64, 64 rows: 64 * 576 + 64 * 8 = 37376 bytes, filled up by the caller to 37440, a multiple of 576
 *   bfloat16  block_rows x head_dim bfloat16
 *   float32   block_rows x head_dim float32
 *   Value of an fp8 number: e4m3 * 2^(scale - 127), exact in float32 (2^-127 is a denormal number).
 *
 * Source: DeepSeek-V3.2 (FlashMLA and DeepGEMM cache formats); rules S32 to S35 of DeepSeek-V4.
 */
#ifndef DSA_CACHE_LAYOUT_H_
#define DSA_CACHE_LAYOUT_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    DSA_LATENT_GROUP = 128,           /* numbers that share one scale in a latent row */
    DSA_MAX_FP8_INDEX_HEAD_DIM = 128, /* one scale a token; more dims would need scales inside the head sum */
    DSA_COMPRESSED_GROUP = 64,        /* value numbers that share one scale in a compressed row */
    DSA_COMPRESSED_SCALE_ALIGNMENT = 8 /* the scale bytes of a compressed row are filled up to a multiple of it */
};

/* Byte offsets inside a latent row; -1 for a format or size that has no layout. */
DSA_API int64_t dsa_latent_scale_offset(dsa_format format, int32_t kv_lora_rank);
DSA_API int64_t dsa_latent_rope_offset(dsa_format format, int32_t kv_lora_rank);
DSA_API int64_t dsa_latent_row_bytes(dsa_format format, int32_t kv_lora_rank, int32_t qk_rope_head_dim);

/* Byte offset of the scales inside an index block (fp8), and the bytes of a block; -1 as above. */
DSA_API int64_t dsa_index_scale_offset(dsa_format format, int32_t block_size, int32_t index_head_dim);
DSA_API int64_t dsa_index_block_bytes(dsa_format format, int32_t block_size, int32_t index_head_dim);

/* Of a compressed row: its data bytes (all of it but the scales), its scale bytes (0 unless fp8), and the bytes of a
 * block without what fills it up; -1 as above. The scales of row r begin at block_rows * data bytes + r * scale bytes.
 * qk_rope_head_dim is even and below head_dim; fp8 wants an even head_dim, so that bfloat16 numbers stay aligned. */
DSA_API int64_t dsa_compressed_row_data_bytes(dsa_format format, int32_t head_dim, int32_t qk_rope_head_dim);
DSA_API int64_t dsa_compressed_row_scale_bytes(dsa_format format, int32_t head_dim, int32_t qk_rope_head_dim);
DSA_API int64_t dsa_compressed_block_bytes(dsa_format format, int32_t block_rows, int32_t head_dim,
                                           int32_t qk_rope_head_dim);

#ifdef __cplusplus
}
#endif
#endif /* DSA_CACHE_LAYOUT_H_ */
