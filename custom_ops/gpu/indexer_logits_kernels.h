/* What the kernels of indexer_logits share: their arguments, checked and narrowed by indexer_logits.cu. */
#ifndef DSA_GPU_INDEXER_LOGITS_KERNELS_H_
#define DSA_GPU_INDEXER_LOGITS_KERNELS_H_

#include <cuda_runtime.h>
#include <stdint.h>

#include "dsa/indexer_logits.h"
#include "launch.h"

namespace dsa {
namespace gpu {

/* The fields of dsa_indexer_logits_params that kernels read; counts fit int32 there. */
struct IndexerLogitsArguments {
    const uint8_t* query;
    const float* folded_weights;
    const uint8_t* index_cache;
    const int32_t* block_table;
    const int32_t* request_ids;
    const int32_t* lengths;
    float* logits;
    int64_t block_stride_bytes;
    int64_t logits_stride;
    int64_t scale_offset; /* bytes, inside a block; fp8 only */
    int32_t num_tokens;
    int32_t num_requests;
    int32_t max_blocks;
    int32_t num_blocks;
    int32_t block_size;
    int32_t index_n_heads;
    int32_t index_head_dim;
    int32_t max_length; /* longer rows are cut */
};

#ifdef __CUDACC__
__device__ __forceinline__ int32_t row_length(const IndexerLogitsArguments& a, int32_t row) {
    const int32_t length = a.lengths[row];
    return length < 0 ? 0 : length < a.max_length ? length : a.max_length;
}

__device__ __forceinline__ bool is_request(const IndexerLogitsArguments& a, int32_t request) {
    return (uint32_t)request < (uint32_t)a.num_requests;
}

__device__ __forceinline__ bool is_block(const IndexerLogitsArguments& a, int32_t block) {
    return (uint32_t)block < (uint32_t)a.num_blocks;
}
#endif

/* Null when the sm_90 kernels take these params, else why not. */
const char* indexer_logits_sm90_refusal(const dsa_indexer_logits_params& p);
dsa_status indexer_logits_sm90(const dsa_indexer_logits_params& p, const IndexerLogitsArguments& a,
                               const Device& device, cudaStream_t stream);

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_INDEXER_LOGITS_KERNELS_H_ */
