/* The second launch of compressed_mla, where blocks share a row: parts in the order of the splits, and the sink. */
#include "compressed_mla_tile.cuh"

namespace dsa {
namespace gpu {
namespace mla {
namespace {

constexpr int kMergeThreads = kDim / 4; /* four columns a thread */

/* A block merges one head of a row. */
template <dsa_format kFormat>
__global__ void __launch_bounds__(kMergeThreads) compressed_mla_merge_kernel(const __grid_constant__ Arguments a) {
    const uint32_t token = blockIdx.x / (uint32_t)a.num_heads, head = blockIdx.x - token * (uint32_t)a.num_heads;
    const int64_t item = (int64_t)token * a.num_parts + head / kHeads;
    const int64_t first = item * a.num_splits * kHeads + head % kHeads;
    const int column = 4 * threadIdx.x;
    let_next_launch_start();
    wait_for_previous_launch();
    const float sink = __ldg(a.sinks + head);
    float largest = -INFINITY;
    for (int split = 0; split < a.num_splits; ++split)
        largest = fmaxf(largest, __uint_as_float(load_4(&a.part_sums[first + split * kHeads].x)));
    float sum = 0.0f;
    float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int split = 0; split < a.num_splits; ++split) {
        const uint2 part = load_8(a.part_sums + first + split * kHeads);
        const uint4 v = load_16(a.part_values + (first + split * kHeads) * kDim + column);
        const float reference = __uint_as_float(part.x);
        const float weight = reference == -INFINITY ? 0.0f : exp2f(reference - largest);
        sum = fmaf(__uint_as_float(part.y), weight, sum);
        values.x = fmaf(__uint_as_float(v.x), weight, values.x);
        values.y = fmaf(__uint_as_float(v.y), weight, values.y);
        values.z = fmaf(__uint_as_float(v.z), weight, values.z);
        values.w = fmaf(__uint_as_float(v.w), weight, values.w);
    }
    const float inverse = inverse_of(sum, largest, sink);
    const int64_t row = (int64_t)token * a.num_heads + head;
    if (a.lse != nullptr && threadIdx.x == 0) a.lse[row] = lse_of(sum, largest);
    if (is_exchanged<kFormat>(column / 64)) {
        const float second = values.y;
        values.y = values.z, values.z = second;
    }
    *(uint2*)(a.out + (row * kDim + column) * 2) = {pack_bf16(values.x * inverse, values.y * inverse),
                                                    pack_bf16(values.z * inverse, values.w * inverse)};
}

}  // namespace

/* Bound: 2048 bytes a head and split, from the L2 cache. */
dsa_status merge_parts(const Arguments& a, dsa_format format, const Device& device, cudaStream_t stream) {
    auto* kernel = format == DSA_FP8 ? compressed_mla_merge_kernel<DSA_FP8> : compressed_mla_merge_kernel<DSA_BFLOAT16>;
    const cudaError_t error =
        launch_following(kernel, a, a.num_tokens * a.num_heads, kMergeThreads, 0, device, stream);
    return error == cudaSuccess ? launched(stream) : status_of(error);
}

}  // namespace mla
}  // namespace gpu
}  // namespace dsa
