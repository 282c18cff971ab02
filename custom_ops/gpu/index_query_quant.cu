#include "dsa/index_query_quant.h"

#include "write_parts.cuh"

namespace dsa {
namespace gpu {
namespace {

__global__ void __launch_bounds__(kWriteThreads) index_query_quant_kernel(const __grid_constant__ IndexQueryPart part) {
    write_index_query(part, blockIdx.x);
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

dsa_status dsa_index_query_quant_cuda(const dsa_index_query_quant_params* params, void* stream) {
    using namespace dsa;
    if (params == nullptr) return DSA_NULL_POINTER;
    dsa_status status = check_index_query_quant(*params);
    if (status != DSA_OK || params->num_tokens == 0) return status;
    gpu::Device device = {};
    status = gpu::device(&device);
    if (status != DSA_OK) return status;
    /* Bound: every number is read once and written once; 64 heads of 128 bfloat16 to fp8: 25 KB a token. */
    const gpu::IndexQueryPart part = gpu::make_index_query_part(*params);
    return gpu::launch_write(gpu::index_query_quant_kernel, part, part.num_blocks, device, (cudaStream_t)stream);
}
