#include "dsa/common.h"

#include "dispatch.h"

/* Defined for a library with the CUDA kernels; this file itself is C++ all the same. */
#if defined(DSA_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

int32_t dsa_has_cuda(void) {
#if defined(DSA_WITH_CUDA)
    return 1;
#else
    return 0;
#endif
}

static constexpr int32_t kLastCudaError = 999; /* cudaErrorUnknown */

static const char* cuda_error_text(int32_t error) {
#if defined(DSA_WITH_CUDA)
    return cudaGetErrorString((cudaError_t)error);
#else
    (void)error;
    return "CUDA error";
#endif
}

const char* dsa_status_text(dsa_status status) {
    switch (status) {
        case DSA_OK: return "ok";
        case DSA_NULL_POINTER: return "a pointer that may not be null is null";
        case DSA_BAD_SHAPE: return "a size is out of range or does not fit the others";
        case DSA_BAD_FORMAT: return "a number format this op does not take";
        case DSA_WORKSPACE_TOO_SMALL: return "the workspace is too small";
        case DSA_UNSUPPORTED: return "not supported on this device";
        default: break;
    }
    const int32_t error = status - DSA_CUDA_ERROR;
    return error > 0 && error <= kLastCudaError ? cuda_error_text(error) : "unknown status";
}

dsa_isa dsa_cpu_isa(void) {
#if DSA_X86
    /* __builtin_cpu_supports also asks whether the operating system saves the registers. */
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return DSA_ISA_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return DSA_ISA_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? DSA_ISA_AVX512_BF16 : DSA_ISA_AVX512;
#else
    return DSA_ISA_SCALAR;
#endif
}

size_t dsa_cpu_options_size(void) { return sizeof(dsa_cpu_options); }
