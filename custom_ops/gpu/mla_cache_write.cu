#include "dsa/mla_cache_write.h"

#include "write_parts.cuh"

namespace dsa {
namespace gpu {
namespace {

__global__ void __launch_bounds__(kWriteThreads) mla_cache_write_kernel(const __grid_constant__ LatentPart part) {
    write_latent(part, blockIdx.x);
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

dsa_status dsa_mla_cache_write_cuda(const dsa_mla_cache_write_params* params, void* stream) {
    using namespace dsa;
    if (params == nullptr) return DSA_NULL_POINTER;
    LatentLayout layout;
    dsa_status status = check_mla_cache_write(*params, &layout);
    if (status != DSA_OK || params->num_tokens == 0) return status;
    gpu::Device device = {};
    status = gpu::device(&device);
    if (status != DSA_OK) return status;
    /* Bound: the numbers of a token are read once, its row is written; 512 + 64 bfloat16 to fp8: 1816 bytes. */
    const gpu::LatentPart part = gpu::make_latent_part(*params, layout);
    return gpu::launch_write(gpu::mla_cache_write_kernel, part, part.num_blocks, device, (cudaStream_t)stream);
}
