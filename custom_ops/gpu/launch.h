/* What the host side of every CUDA op shares: the device's limits, and how a CUDA error becomes a status.
 *
 * A library built for several architectures holds every kernel for each of them; an op asks device() which one it may
 * launch. Functions are static, so that no file lends its copy to another.
 */
#ifndef DSA_GPU_LAUNCH_H_
#define DSA_GPU_LAUNCH_H_

#include <cuda_runtime.h>
#include <stdint.h>
#include <stdlib.h>

#include "dsa/common.h"

/* Whether sm_90a is among the architectures of this build; the build says so, and by default it is. */
#ifndef DSA_HAS_SM90
#define DSA_HAS_SM90 1
#endif

namespace dsa {
namespace gpu {

static inline dsa_status status_of(cudaError_t error) {
    return error == cudaSuccess ? DSA_OK : DSA_CUDA_ERROR + (dsa_status)error;
}

struct Device {
    int32_t ordinal; /* below kMaxDevices */
    int32_t num_multiprocessors;
    int32_t architecture;        /* 80, 89, 90, ... */
    int32_t max_shared_bytes;    /* of a block that asked for it */
    bool has_hopper_instructions; /* wgmma and setmaxnreg, which sm_90a alone has */
};

constexpr int kMaxDevices = 64;

/* The current device. The answers never change, so that threads may race to store the same ones. */
static inline dsa_status device(Device* found) {
    static Device known[kMaxDevices]; /* architecture 0: not asked yet */
    int ordinal = 0;
    cudaError_t error = cudaGetDevice(&ordinal);
    if (error != cudaSuccess) return status_of(error);
    if (ordinal >= kMaxDevices) return DSA_UNSUPPORTED;
    if (__atomic_load_n(&known[ordinal].architecture, __ATOMIC_ACQUIRE) == 0) {
        int major = 0, minor = 0, multiprocessors = 0, shared_bytes = 0;
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
        if (error == cudaSuccess)
            error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
        if (error == cudaSuccess)
            error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
        if (error != cudaSuccess) return status_of(error);
        known[ordinal].ordinal = ordinal;
        known[ordinal].num_multiprocessors = multiprocessors;
        known[ordinal].max_shared_bytes = shared_bytes;
        known[ordinal].has_hopper_instructions = DSA_HAS_SM90 && major == 9 && minor == 0;
        __atomic_store_n(&known[ordinal].architecture, 10 * major + minor, __ATOMIC_RELEASE);
    }
    *found = known[ordinal];
    return found->architecture >= 80 ? DSA_OK : DSA_UNSUPPORTED;
}

/* FASTDEPLOY_DSA_CUDA_DEBUG=1 waits after every launch, so that a kernel's fault is reported by the op that caused it. */
static inline bool is_debugging() {
    static const bool wanted = [] {
        const char* value = getenv("FASTDEPLOY_DSA_CUDA_DEBUG");
        return value != nullptr && value[0] == '1';
    }();
    return wanted;
}

/* To be returned by an op after its last launch. */
static inline dsa_status launched(cudaStream_t stream) {
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess || !is_debugging()) return status_of(error);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    error = cudaStreamIsCapturing(stream, &capture);
    if (error == cudaSuccess && capture == cudaStreamCaptureStatusNone) error = cudaStreamSynchronize(stream);
    return status_of(error);
}

/* Lets a kernel use more than 48 KB of dynamic shared memory. Once per kernel and device is enough, but the call costs
 * less than a launch and has no effect on a stream, so every launch makes it. */
template <typename Kernel>
static inline dsa_status allow_shared_bytes(Kernel* kernel, int32_t bytes) {
    return status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_LAUNCH_H_ */
