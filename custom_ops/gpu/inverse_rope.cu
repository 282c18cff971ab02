#include "dsa/inverse_rope.h"

#include <type_traits>

#include "compressed_checks.h"
#include "write_parts.cuh"

namespace dsa {
namespace gpu {
namespace {

struct Rotation {
    uint8_t* x;
    const float* cos;
    const float* sin;
    int64_t num_units;      /* of all heads of all tokens */
    int64_t row_bytes;      /* of a head */
    int64_t rope_offset;    /* bytes inside it */
    Divisor units_per_head; /* of the rotated numbers */
    Divisor num_heads;
    int32_t num_blocks; /* of the grid */
};

/* Each step rounded, as on the CPU. */
__device__ __forceinline__ float2 rotate_back(float first, float second, float cos, float sin) {
    return make_float2(__fadd_rn(__fmul_rn(first, cos), __fmul_rn(second, sin)),
                       __fsub_rn(__fmul_rn(second, cos), __fmul_rn(first, sin)));
}

__device__ __forceinline__ uint32_t rotate_back_pair(uint32_t pair, float cos, float sin) {
    const float2 y = rotate_back(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u), cos, sin);
    return bf16_pair(y.x, y.y);
}

/* kPairs pairs are a unit: four of bfloat16 are 16 bytes, as are two of float32. One pair has any alignment. */
template <int kPairs>
__device__ __forceinline__ void rotate_unit(uint8_t* x, const float* cos, const float* sin,
                                            std::integral_constant<dsa_format, DSA_BFLOAT16>) {
    if constexpr (kPairs == 1) {
        const uint32_t pair = ((const uint16_t*)x)[0] | (uint32_t)((const uint16_t*)x)[1] << 16;
        store_4(x, rotate_back_pair(pair, cos[0], sin[0]));
    } else {
        const uint4 v = load_16(x);
        const uint4 c = load_16(cos), s = load_16(sin);
        *(uint4*)x = {rotate_back_pair(v.x, __uint_as_float(c.x), __uint_as_float(s.x)),
                      rotate_back_pair(v.y, __uint_as_float(c.y), __uint_as_float(s.y)),
                      rotate_back_pair(v.z, __uint_as_float(c.z), __uint_as_float(s.z)),
                      rotate_back_pair(v.w, __uint_as_float(c.w), __uint_as_float(s.w))};
    }
}

template <int kPairs>
__device__ __forceinline__ void rotate_unit(uint8_t* x, const float* cos, const float* sin,
                                            std::integral_constant<dsa_format, DSA_FLOAT32>) {
    float* numbers = (float*)x;
    if constexpr (kPairs == 1) {
        const float2 y = rotate_back(numbers[0], numbers[1], cos[0], sin[0]);
        numbers[0] = y.x, numbers[1] = y.y;
    } else {
        const uint4 v = load_16(x);
        const float2 first = rotate_back(__uint_as_float(v.x), __uint_as_float(v.y), cos[0], sin[0]);
        const float2 second = rotate_back(__uint_as_float(v.z), __uint_as_float(v.w), cos[1], sin[1]);
        *(float4*)numbers = make_float4(first.x, first.y, second.x, second.y);
    }
}

template <int kPairs, dsa_format kFormat>
__global__ void __launch_bounds__(kWriteThreads) inverse_rope_kernel(const __grid_constant__ Rotation call) {
    constexpr int64_t kUnitBytes = 2 * kPairs * (kFormat == DSA_BFLOAT16 ? 2 : 4);
    wait_for_inputs();
    const int64_t stride = (int64_t)call.num_blocks * kWriteThreads;
    for (int64_t i = (int64_t)blockIdx.x * kWriteThreads + threadIdx.x; i < call.num_units; i += stride) {
        const int64_t head = call.units_per_head.quotient(i), token = call.num_heads.quotient(head);
        const int64_t unit = i - head * call.units_per_head.divisor;
        const int64_t angle = (token * call.units_per_head.divisor + unit) * kPairs;
        rotate_unit<kPairs>(call.x + head * call.row_bytes + call.rope_offset + unit * kUnitBytes, call.cos + angle,
                            call.sin + angle, std::integral_constant<dsa_format, kFormat>());
    }
}

/* Bound: the rotated numbers are read and written once; 128 heads of 64 bfloat16: 32 KiB a token. */
template <int kPairs, dsa_format kFormat>
dsa_status launch(const dsa_inverse_rope_params& p, Rotation call, const Device& device, cudaStream_t stream) {
    call.units_per_head = make_divisor(p.qk_rope_head_dim / 2 / kPairs);
    call.num_units = p.num_tokens * p.num_heads * call.units_per_head.divisor;
    const int64_t blocks = (call.num_units + kWriteThreads - 1) / kWriteThreads;
    call.num_blocks = (int32_t)(blocks < kMaxWriteBlocks ? blocks : kMaxWriteBlocks);
    return launch_write(inverse_rope_kernel<kPairs, kFormat>, call, call.num_blocks, device, stream);
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

dsa_status dsa_inverse_rope_cuda(const dsa_inverse_rope_params* params, void* stream) {
    using namespace dsa;
    using namespace dsa::gpu;
    if (params == nullptr) return DSA_NULL_POINTER;
    const dsa_inverse_rope_params& p = *params;
    dsa_status status = check_inverse_rope(p);
    if (status != DSA_OK || p.num_tokens == 0) return status;
    Device found = {};
    status = device(&found);
    if (status != DSA_OK) return status;
    const int64_t number_bytes = input_bytes(p.x_format);
    Rotation call = {};
    call.x = (uint8_t*)p.x;
    call.cos = p.cos;
    call.sin = p.sin;
    call.row_bytes = p.head_dim * number_bytes;
    call.rope_offset = (p.head_dim - p.qk_rope_head_dim) * number_bytes;
    call.num_heads = make_divisor(p.num_heads);
    const int64_t starts = (int64_t)(uintptr_t)p.x | call.row_bytes | call.rope_offset |
                           p.qk_rope_head_dim * number_bytes | (int64_t)(uintptr_t)p.cos | (int64_t)(uintptr_t)p.sin |
                           p.qk_rope_head_dim / 2 * 4;
    const cudaStream_t on = (cudaStream_t)stream;
    const bool is_wide = starts % 16 == 0;
    if (p.x_format == DSA_BFLOAT16)
        return is_wide ? launch<4, DSA_BFLOAT16>(p, call, found, on) : launch<1, DSA_BFLOAT16>(p, call, found, on);
    return is_wide ? launch<2, DSA_FLOAT32>(p, call, found, on) : launch<1, DSA_FLOAT32>(p, call, found, on);
}
