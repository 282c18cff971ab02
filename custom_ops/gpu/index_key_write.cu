#include "dsa/index_key_write.h"

#include "write_parts.cuh"

namespace dsa {
namespace gpu {
namespace {

__global__ void __launch_bounds__(kWriteThreads) index_key_write_kernel(const __grid_constant__ IndexKeyPart part) {
    write_index_key(part, blockIdx.x);
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

dsa_status dsa_index_key_write_cuda(const dsa_index_key_write_params* params, void* stream) {
    using namespace dsa;
    if (params == nullptr) return DSA_NULL_POINTER;
    dsa_status status = check_index_key_write(*params);
    if (status != DSA_OK || params->num_tokens == 0) return status;
    gpu::Device device = {};
    status = gpu::device(&device);
    if (status != DSA_OK) return status;
    /* Bound: the numbers of a token are read once, its key is written; 128 bfloat16 to fp8: 396 bytes. */
    const gpu::IndexKeyPart part = gpu::make_index_key_part(*params);
    return gpu::launch_write(gpu::index_key_write_kernel, part, part.num_blocks, device, (cudaStream_t)stream);
}
