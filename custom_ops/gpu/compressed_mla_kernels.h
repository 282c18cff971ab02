/* The kernels of compressed_mla on CUDA; compressed_mla.cu checks the params and chooses one.
 *
 * A launcher gets checked params with num_tokens > 0 and returns the status of its launch.
 */
#ifndef DSA_GPU_COMPRESSED_MLA_KERNELS_H_
#define DSA_GPU_COMPRESSED_MLA_KERNELS_H_

#include "compressed_cache.h"
#include "dsa/compressed_mla.h"
#include "launch.h"

namespace dsa {
namespace gpu {

struct CompressedMlaLayouts {
    CompressedLayout window;
    CompressedLayout entries;
};

/* Any format, any sizes, sm_80 and later, float32 arithmetic; needs no workspace. */
dsa_status compressed_mla_generic(const dsa_compressed_mla_params& params, const CompressedMlaLayouts& layouts,
                                  cudaStream_t stream);

/* bfloat16 queries over rows of 512 numbers, of fp8 ones 448 + 64; products on the tensor cores, 64 heads of a row a
 * block. A row's tiles are dealt out to num_splits blocks; more than one leave parts in the workspace, which a second
 * launch merges. DSA_UNSUPPORTED, before anything is launched, where a kernel does not fit the device or the sizes. */
constexpr int32_t kMlaTileRows = 64;
constexpr int32_t kMlaHeads = 64;
constexpr int32_t kMlaHeadDim = 512;
constexpr int32_t kMlaRopeDim = 64;

/* Bytes that the parts of num_splits blocks a row take. */
int64_t compressed_mla_parts_bytes(int64_t num_tokens, int32_t num_heads, int32_t num_splits);

/* sm_80 and later, bfloat16 or fp8 rows: mma.sync. */
dsa_status compressed_mla_mma(const dsa_compressed_mla_params& params, const CompressedMlaLayouts& layouts,
                              int32_t num_splits, const Device& device, cudaStream_t stream);

/* Hopper, fp8 rows: wgmma. */
dsa_status compressed_mla_sm90(const dsa_compressed_mla_params& params, const CompressedMlaLayouts& layouts,
                               int32_t num_splits, const Device& device, cudaStream_t stream);

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_COMPRESSED_MLA_KERNELS_H_ */
