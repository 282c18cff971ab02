/* Which clusters of CTAs the current device can hold.
 *
 * A cluster lies inside one group of multiprocessors. Groups differ in size, from chip to chip and on one chip, and a
 * slice of a device has fewer: a plan with clusters asks here before it is launched.
 */
#ifndef DSA_GPU_CLUSTERS_CUH_
#define DSA_GPU_CLUSTERS_CUH_

#include <stdlib.h>

#include "launch.h"

namespace dsa {
namespace gpu {

constexpr int32_t kMaxClusterCtas = 16;

namespace {

/* Never launched. With all the shared memory there is, each of its CTAs has a multiprocessor to itself, so that any
 * other kernel's cluster of as many CTAs finds room where one of these does. */
__global__ void whole_multiprocessors_kernel() {}

}  // namespace

/* FASTDEPLOY_DSA_CUDA_MAX_CLUSTER=N stands for a device that holds no cluster of more than N CTAs. */
static inline int32_t largest_allowed_cluster() {
    static const int32_t allowed = [] {
        const char* value = getenv("FASTDEPLOY_DSA_CUDA_MAX_CLUSTER");
        return value == nullptr ? kMaxClusterCtas : (int32_t)strtol(value, nullptr, 10);
    }();
    return allowed;
}

/* Clusters of `ctas` CTAs with a multiprocessor each that run at once; 0: not one of them fits, or nothing is known. */
static inline int32_t ask_clusters_at_once(const Device& device, int32_t ctas) {
    if (device.architecture < 90 || ctas > largest_allowed_cluster()) return 0;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = (unsigned)ctas, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)ctas);
    config.blockDim = dim3(32);
    config.dynamicSmemBytes = (size_t)device.max_shared_bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    auto* kernel = whole_multiprocessors_kernel;
    int count = 0;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_bytes);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    if (error == cudaSuccess) return count;
    cudaGetLastError(); /* a size that the device refuses is an answer, not a failure of the op */
    return 0;
}

/* The same, asked once per device: no stream is involved, so that the first call may be captured like any other. The
 * answers never change, so that threads may race to store the same ones. */
static inline int32_t clusters_at_once(const Device& device, int32_t ctas) {
    static int32_t known[kMaxDevices][kMaxClusterCtas + 1]; /* 0: not asked yet; else one more than the answer */
    if (ctas > kMaxClusterCtas) return 0;
    int32_t* entry = &known[device.ordinal][ctas];
    int32_t answer = __atomic_load_n(entry, __ATOMIC_RELAXED);
    if (answer == 0) {
        answer = 1 + ask_clusters_at_once(device, ctas);
        __atomic_store_n(entry, answer, __ATOMIC_RELAXED);
    }
    return answer - 1;
}

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_CLUSTERS_CUH_ */
