/* Index scores for any format, number of heads and width: float32 multiply-adds on key tiles in shared memory.
 *
 * One block scores kTileKeys keys for one row at a time. Order of the sums, for one (row, key) pair: a head's products
 * in the order of its dims; kHeadThreads threads add kThreadHeads heads each, their sums are added in order, and so are
 * the head tiles.
 */
#ifndef DSA_GPU_INDEXER_LOGITS_GENERIC_CUH_
#define DSA_GPU_INDEXER_LOGITS_GENERIC_CUH_

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <math.h>

#include "indexer_logits_kernels.h"

namespace dsa {
namespace gpu {

constexpr int kGenericThreads = 256;
constexpr int kTileKeys = 64;
constexpr int kTileHeads = 64;
constexpr int kTileDims = 64;
constexpr int kThreadHeads = 4;
constexpr int kThreadKeys = 4;
constexpr int kKeyThreads = kTileKeys / kThreadKeys; /* 16 threads side by side; the others are head threads */
constexpr int kHeadThreads = kTileHeads / kThreadHeads;
static_assert(kKeyThreads * kHeadThreads == kGenericThreads, "one thread for every 4 x 4 scores");

struct GenericShared {
    float keys[kTileDims][kTileKeys + 1];    /* an odd pitch, so that threads along the dims hit different banks */
    float query[kTileDims][kTileHeads + 4];  /* float4 along the heads */
    float sums[kHeadThreads][kTileKeys + 1];
    const uint8_t* addresses[kTileKeys]; /* of the key's numbers; null: no such block */
    float scales[kTileKeys];
};

template <dsa_format kFormat>
__device__ __forceinline__ float number(const uint8_t* numbers, int64_t i) {
    if (kFormat == DSA_FP8) return (float)reinterpret_cast<const __nv_fp8_e4m3*>(numbers)[i];
    if (kFormat == DSA_BFLOAT16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(numbers)[i]);
    return reinterpret_cast<const float*>(numbers)[i];
}

template <dsa_format kFormat>
__device__ __forceinline__ constexpr int number_bytes() {
    return kFormat == DSA_FP8 ? 1 : kFormat == DSA_BFLOAT16 ? 2 : 4;
}

/* A NaN stays, as in the definition. */
__device__ __forceinline__ float relu(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}

/* Threads below kTileKeys: where the tile's keys are. */
template <dsa_format kFormat>
__device__ __forceinline__ void find_key(const IndexerLogitsArguments& a, GenericShared& shared, int32_t row,
                                         int64_t key, int32_t length) {
    const int32_t request = a.request_ids[row];
    const uint8_t* address = nullptr;
    float scale = 1.0f;
    if (key < length && is_request(a, request)) {
        const int32_t block = a.block_table[(int64_t)request * a.max_blocks + key / a.block_size];
        const int64_t offset = key % a.block_size;
        if (is_block(a, block)) {
            const uint8_t* base = a.index_cache + block * a.block_stride_bytes;
            address = base + offset * a.index_head_dim * number_bytes<kFormat>();
            if (kFormat == DSA_FP8) scale = *reinterpret_cast<const float*>(base + a.scale_offset + offset * 4);
        }
    }
    shared.addresses[threadIdx.x] = address;
    shared.scales[threadIdx.x] = address ? scale : NAN;
}

/* Dims from first_dim and heads from first_head on; zeros behind the last dim and head. */
template <dsa_format kFormat>
__device__ __forceinline__ void load_tiles(const IndexerLogitsArguments& a, GenericShared& shared, int32_t row,
                                           int32_t first_head, int32_t first_dim) {
    const int32_t d = threadIdx.x % kTileDims;
    const bool is_dim = first_dim + d < a.index_head_dim;
    for (int32_t key = threadIdx.x / kTileDims; key < kTileKeys; key += kGenericThreads / kTileDims) {
        const uint8_t* address = shared.addresses[key];
        shared.keys[d][key] = is_dim && address ? number<kFormat>(address, first_dim + d) : 0.0f;
    }
    for (int32_t h = threadIdx.x / kTileDims; h < kTileHeads; h += kGenericThreads / kTileDims) {
        const int64_t head = (int64_t)row * a.index_n_heads + first_head + h;
        const bool is_number = is_dim && first_head + h < a.index_n_heads;
        shared.query[d][h] = is_number ? number<kFormat>(a.query, head * a.index_head_dim + first_dim + d) : 0.0f;
    }
}

__device__ __forceinline__ void multiply_tiles(const GenericShared& shared, int32_t key_thread, int32_t head_thread,
                                               float (&dots)[kThreadHeads][kThreadKeys]) {
#pragma unroll 4
    for (int32_t d = 0; d < kTileDims; ++d) {
        const float4 q = *reinterpret_cast<const float4*>(&shared.query[d][head_thread * kThreadHeads]);
        const float heads[kThreadHeads] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int32_t k = 0; k < kThreadKeys; ++k) {
            const float key = shared.keys[d][key_thread + kKeyThreads * k];
#pragma unroll
            for (int32_t h = 0; h < kThreadHeads; ++h) dots[h][k] = fmaf(heads[h], key, dots[h][k]);
        }
    }
}

/* The weighted sum of the tile's heads, for the key of this thread (threads below kTileKeys). */
__device__ __forceinline__ float weigh(const IndexerLogitsArguments& a, GenericShared& shared, int32_t row,
                                       int32_t first_head, const float (&dots)[kThreadHeads][kThreadKeys]) {
    const int32_t key_thread = threadIdx.x % kKeyThreads;
    const int32_t head_thread = threadIdx.x / kKeyThreads;
#pragma unroll
    for (int32_t k = 0; k < kThreadKeys; ++k) {
        float sum = 0.0f;
#pragma unroll
        for (int32_t h = 0; h < kThreadHeads; ++h) {
            const int32_t head = first_head + head_thread * kThreadHeads + h;
            if (head < a.index_n_heads)
                sum = fmaf(a.folded_weights[(int64_t)row * a.index_n_heads + head], relu(dots[h][k]), sum);
        }
        shared.sums[head_thread][key_thread + kKeyThreads * k] = sum;
    }
    __syncthreads();
    float sum = 0.0f;
    if (threadIdx.x < kTileKeys)
        for (int32_t h = 0; h < kHeadThreads; ++h) sum += shared.sums[h][threadIdx.x];
    return sum;
}

template <dsa_format kFormat>
__global__ void __launch_bounds__(kGenericThreads) indexer_logits_generic_kernel(const IndexerLogitsArguments a) {
    __shared__ GenericShared shared;
    const int64_t key = (int64_t)blockIdx.x * kTileKeys + threadIdx.x;
    for (int32_t row = blockIdx.y; row < a.num_tokens; row += gridDim.y) {
        const int32_t length = row_length(a, row);
        if ((int64_t)blockIdx.x * kTileKeys >= length) continue;
        if (threadIdx.x < kTileKeys) find_key<kFormat>(a, shared, row, key, length);
        float score = 0.0f;
        for (int32_t first_head = 0; first_head < a.index_n_heads; first_head += kTileHeads) {
            float dots[kThreadHeads][kThreadKeys] = {};
            for (int32_t first_dim = 0; first_dim < a.index_head_dim; first_dim += kTileDims) {
                __syncthreads();
                load_tiles<kFormat>(a, shared, row, first_head, first_dim);
                __syncthreads();
                multiply_tiles(shared, threadIdx.x % kKeyThreads, threadIdx.x / kKeyThreads, dots);
            }
            score += weigh(a, shared, row, first_head, dots);
        }
        if (threadIdx.x < kTileKeys && key < length)
            a.logits[row * a.logits_stride + key] = score * shared.scales[threadIdx.x];
        __syncthreads();
    }
}

/* Bound: 2 * heads * dim FLOP a score on the float32 units; a key is decoded once a row (and head tile). */
template <dsa_format kFormat>
static dsa_status indexer_logits_generic(const IndexerLogitsArguments& a, cudaStream_t stream) {
    constexpr int32_t kMaxGridRows = 65535;
    const dim3 grid((uint32_t)((a.max_length + (int64_t)kTileKeys - 1) / kTileKeys),
                    (uint32_t)(a.num_tokens < kMaxGridRows ? a.num_tokens : kMaxGridRows));
    indexer_logits_generic_kernel<kFormat><<<grid, kGenericThreads, 0, stream>>>(a);
    return launched(stream);
}

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_INDEXER_LOGITS_GENERIC_CUH_ */
