#include <cuda_runtime.h>
#include <stdint.h>

namespace dsa {
namespace gpu {

/* For callers without the headers of CUDA: the device that this thread's launches go to, -1 if CUDA does not say. */
int32_t current_device() {
    int ordinal = -1;
    if (cudaGetDevice(&ordinal) == cudaSuccess) return ordinal;
    cudaGetLastError(); /* the op meets the same error, and reports it */
    return -1;
}

}  // namespace gpu
}  // namespace dsa
