/* The kernels of sparse_mla on CUDA; sparse_mla.cu checks the params and chooses one.
 *
 * A launcher gets checked params with num_tokens > 0 and returns the status of its launch.
 */
#ifndef DSA_GPU_SPARSE_MLA_KERNELS_H_
#define DSA_GPU_SPARSE_MLA_KERNELS_H_

#include "dsa/sparse_mla.h"
#include "launch.h"

namespace dsa {
namespace gpu {

/* Any format, any sizes, sm_80 and later, float32 arithmetic. */
dsa_status sparse_mla_generic(const dsa_sparse_mla_params& params, const Device& device, cudaStream_t stream);

/* Hopper, bfloat16 query, fp8 cache, 512 + 64 numbers a row, any num_heads. */

/* Cache rows as the M dimension of the products, heads in parts of 16 or 32 as N; a row's slots are spread over a
 * cluster, whose parts are merged inside the kernel, or over CTAs that keep their parts in the workspace for a second
 * kernel. For few rows or few heads. The spread depends on topk and on num_rows_hint: how many rows are expected to
 * share the device (params.num_tokens, or a fixed number where the result must not depend on it; then has_workspace is
 * false). Where it is true, the workspace is as large as the function below says. */
dsa_status sparse_mla_sm90_rows(const dsa_sparse_mla_params& params, const Device& device, int64_t num_rows_hint,
                                bool has_workspace, cudaStream_t stream);
size_t sparse_mla_sm90_rows_workspace_bytes(const dsa_sparse_mla_params& params, const Device& device);

/* 64 heads as the M dimension. For many rows with 33 heads and more. With a workspace, which is as large as the function
 * below says, cache rows that many query rows use are widened once. */
dsa_status sparse_mla_sm90_heads(const dsa_sparse_mla_params& params, const Device& device, bool has_workspace,
                                 cudaStream_t stream);
size_t sparse_mla_sm90_heads_workspace_bytes(const dsa_sparse_mla_params& params);

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_SPARSE_MLA_KERNELS_H_ */
