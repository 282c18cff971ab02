/* Copy whole cache blocks between two arenas (or inside one), in place at the destination.
 *
 *   for i in 0 .. num_copies:  dst block dst_block_ids[i] := src block src_block_ids[i]      block_bytes bytes each
 *   A pair with an id outside its arena: DSA_BAD_SHAPE, and nothing was copied; on CUDA that pair alone is skipped.
 *   CUDA: either arena may be page-locked host memory; the ids are read on the device.
 *   A block may not be a destination twice, nor source of one pair and destination of another when both arenas are
 *   the same: the order of copies is not defined.
 */
#ifndef DSA_BLOCK_COPY_H_
#define DSA_BLOCK_COPY_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_block_copy_params {
    const uint8_t* src;           /* [src_num_blocks] blocks, src_stride_bytes apart */
    uint8_t* dst;                 /* [dst_num_blocks] blocks, dst_stride_bytes apart */
    const int64_t* src_block_ids; /* [num_copies] int64 */
    const int64_t* dst_block_ids; /* [num_copies] int64 */
    int64_t src_stride_bytes;
    int64_t dst_stride_bytes;
    int64_t src_num_blocks;
    int64_t dst_num_blocks;
    int64_t block_bytes; /* any number >= 0, at most either stride */
    int64_t num_copies;
} dsa_block_copy_params;

DSA_API size_t dsa_block_copy_params_size(void);
DSA_API dsa_status dsa_block_copy_cpu(const dsa_block_copy_params* params, const dsa_cpu_options* options);
DSA_API dsa_status dsa_block_copy_cuda(const dsa_block_copy_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_BLOCK_COPY_H_ */
