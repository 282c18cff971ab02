/* Cache rows widened once for all query rows of a call: where they lie in the workspace, and who makes them.
 *
 * The query rows of a prefill step select from the same few contexts, so that a cache row is wanted many times. Widened
 * while it is gathered, it is converted each time; here it is converted once, and gathered as bfloat16.
 */
#ifndef DSA_GPU_SPARSE_MLA_SM90_WIDEN_H_
#define DSA_GPU_SPARSE_MLA_SM90_WIDEN_H_

#include <stddef.h>
#include <stdint.h>

#include "dsa/sparse_mla.h"
#include "launch.h"

namespace dsa {
namespace gpu {

/* A widened row: 512 latent columns in the order of e4m3_to_bf16.cuh, then 64 rotated ones in their own. */
constexpr int kWidenedBytes = 2 * (512 + 64);

struct WidenedRows {
    const uint8_t* rows;            /* [capacity, block_size, kWidenedBytes] */
    const uint32_t* place_of_block; /* [num_blocks]: 1 + where in rows a block is that the call uses */
    const uint32_t* num_places;     /* how many blocks the call uses; null: nothing is widened */
    uint32_t capacity;              /* where num_places is above it nothing is widened, either */
};

/* What widening wants; 0: not for so few query rows. */
size_t widen_workspace_bytes(const dsa_sparse_mla_params& params);

/* Launches what fills the workspace and says where the rows will be. */
dsa_status widen_rows(const dsa_sparse_mla_params& params, const Device& device, WidenedRows* widened,
                      cudaStream_t stream);

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_SPARSE_MLA_SM90_WIDEN_H_ */
