/* compressed_mla on sm_80 and later: mma.sync, 64 heads of a row a block, eight warps.
 *
 *   warp 4 h + q   S of heads 32 h .. 32 h + 31 and rows 16 q .. 16 q + 15 of a tile, O of the same heads and columns
 *                  128 q .. 128 q + 127
 *
 * Rows of tile t + 1 are on their way while tile t is worked on. With two tiles in shared memory a warp widens its
 * share of the next one as soon as its own products are done; with one tile it waits for all warps first.
 */
#include "compressed_mla_tile.cuh"

namespace dsa {
namespace gpu {
namespace mla {
namespace {

constexpr int kQuarters = 4;
constexpr int kWarpHeads = 32;
constexpr int kWarpRows = kRows / kQuarters;
constexpr int kWarpColumns = kDim / kQuarters;
constexpr int kHeadTiles = kWarpHeads / 16;

template <int kBuffers>
struct MmaShared {
    uint8_t query[kTileBytes];
    uint8_t tiles[kBuffers][kTileBytes];
    uint8_t weights[kBlockBytes]; /* P */
    float maxima[kQuarters][kHeads];
    float sums[kQuarters][kHeads];
    uint8_t valid[kBuffers][kWarps]; /* a bit per row */
};

/* A thread's heads: 16 tile + lane / 4 + 8 half of the warp's, as [tile][half]. */
struct MmaSoftmax {
    float reference[kHeadTiles][2]; /* log2; what O and sum are relative to */
    float sum[kHeadTiles][2];       /* over this thread's rows */
};

using Scores = float[kHeadTiles][kWarpRows / 8][4];
using Output = float[kHeadTiles][kWarpColumns / 8][4];

/* Where this warp's heads begin, and which quarter is its own. */
__device__ __forceinline__ int warp_head() { return threadIdx.x / 128 * kWarpHeads; }
__device__ __forceinline__ int warp_quarter() { return threadIdx.x / 32 % kQuarters; }

/* ---- instructions ---- */

__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void store_shared_4(uint32_t to, uint32_t word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

/* ---- products ---- */

__device__ __forceinline__ void compute_scores(Scores& s, uint32_t query, uint32_t tile) {
    const int lane = threadIdx.x % 32;
    const int head = warp_head() + lane % 16, row = kWarpRows * warp_quarter() + lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i)
#pragma unroll
        for (int j = 0; j < kWarpRows / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[i][j][e] = 0.0f;
#pragma unroll 8
    for (int k = 0; k < kDim / 16; ++k) {
        const uint32_t block = k / 4 * kBlockBytes;
        const int piece = 2 * (k % 4);
        uint32_t b[4];
        load_matrices(b, tile + block + swizzled(row, piece + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < kHeadTiles; ++i) {
            uint32_t a[4];
            load_matrices(a, query + block + swizzled(head + 16 * i, piece + lane / 16));
            multiply_add(s[i][0], a, b[0], b[1]);
            multiply_add(s[i][1], a, b[2], b[3]);
        }
    }
}

__device__ __forceinline__ void add_output(Output& o, uint32_t weights, uint32_t tile) {
    const int lane = threadIdx.x % 32;
    const uint32_t blocks = tile + kWarpColumns / 64 * warp_quarter() * kBlockBytes;
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
        uint32_t a[kHeadTiles][4];
#pragma unroll
        for (int i = 0; i < kHeadTiles; ++i)
            load_matrices(a[i], weights + swizzled(warp_head() + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < kWarpColumns / 16; ++n) {
            uint32_t b[4];
            load_transposed(b, blocks + n / 4 * kBlockBytes + swizzled(16 * k + lane % 16, 2 * (n % 4) + lane / 16));
#pragma unroll
            for (int i = 0; i < kHeadTiles; ++i) {
                multiply_add(o[i][2 * n], a[i], b[0], b[1]);
                multiply_add(o[i][2 * n + 1], a[i], b[2], b[3]);
            }
        }
    }
}

/* ---- softmax ---- */

/* This warp's largest scores of its rows, for the other quarters too. */
template <typename Shared>
__device__ __forceinline__ void find_maxima(Shared& shared, Scores& s, uint32_t valid, float scale_log2) {
    const int lane = threadIdx.x % 32;
    valid >>= 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float max = -INFINITY;
#pragma unroll
            for (int j = 0; j < kWarpRows / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = s[i][j][2 * half + e];
                    score = valid >> (8 * j + e) & 1 ? score * scale_log2 : -INFINITY;
                    max = fmaxf(max, score);
                }
            max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
            max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
            if (lane % 4 == 0) shared.maxima[warp_quarter()][warp_head() + 16 * i + 8 * half + lane / 4] = max;
        }
}

/* Moves the reference where a score exceeds it by too much, and what is relative to it. */
template <typename Shared>
__device__ __forceinline__ void move_reference(const Shared& shared, MmaSoftmax& softmax, Output& o) {
    const int head = warp_head() + threadIdx.x % 32 / 4;
    float factor[kHeadTiles][2];
    bool has_moved = false;
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float max = -INFINITY;
#pragma unroll
            for (int q = 0; q < kQuarters; ++q) max = fmaxf(max, shared.maxima[q][head + 16 * i + 8 * half]);
            factor[i][half] = 1.0f;
            if (max <= softmax.reference[i][half] + kSlack) continue;
            factor[i][half] = exp2_fast(softmax.reference[i][half] - max);
            softmax.reference[i][half] = max;
            softmax.sum[i][half] *= factor[i][half];
            has_moved = true;
        }
    if (!__any_sync(kAllLanes, has_moved)) return;
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i)
#pragma unroll
        for (int n = 0; n < kWarpColumns / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[i][n][e] *= factor[i][e / 2];
}

/* S to P = exp2(S - reference). */
__device__ __forceinline__ void store_weights(uint32_t weights, const Scores& s, MmaSoftmax& softmax) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float reference = softmax.reference[i][half];
            const float shift = reference == -INFINITY ? 0.0f : reference; /* no row yet */
            const int head = warp_head() + 16 * i + 8 * half + lane / 4;
#pragma unroll
            for (int j = 0; j < kWarpRows / 8; ++j) {
                const float low = exp2_fast(s[i][j][2 * half] - shift), high = exp2_fast(s[i][j][2 * half + 1] - shift);
                softmax.sum[i][half] += low + high;
                store_shared_4(weights + swizzled(head, 2 * warp_quarter() + j) + 4 * (lane % 4), pack_bf16(low, high));
            }
        }
}

/* ---- results ---- */

/* The sums of all quarters, in their order; afterwards neither the query nor a tile is in use. */
template <typename Shared>
__device__ __forceinline__ void add_sums(Shared& shared, MmaSoftmax& softmax) {
    const int lane = threadIdx.x % 32, head = warp_head() + lane / 4;
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float& sum = softmax.sum[i][half];
            sum += __shfl_xor_sync(kAllLanes, sum, 1);
            sum += __shfl_xor_sync(kAllLanes, sum, 2);
            if (lane % 4 == 0) shared.sums[warp_quarter()][head + 16 * i + 8 * half] = sum;
        }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = 0.0f;
#pragma unroll
            for (int q = 0; q < kQuarters; ++q) sum += shared.sums[q][head + 16 * i + 8 * half];
            softmax.sum[i][half] = sum;
        }
}

template <dsa_format kFormat, typename Shared>
__device__ __forceinline__ void finish(const Arguments& a, Shared& shared, const Work& work, const MmaSoftmax& softmax,
                                       const Output& o) {
    const int lane = threadIdx.x % 32;
    const uint32_t staged = shared_address(shared.query) + kWarpColumns / 64 * warp_quarter() * kBlockBytes;
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int in_block = warp_head() + 16 * i + 8 * half + lane / 4, head = work.first_head + in_block;
            const float sum = softmax.sum[i][half], reference = softmax.reference[i][half];
            const bool is_there = head < a.num_heads;
            const float inverse = inverse_of(sum, reference, is_there ? __ldg(a.sinks + head) : 0.0f);
            if (a.lse != nullptr && warp_quarter() == 0 && lane % 4 == 0 && is_there)
                a.lse[work.token * a.num_heads + head] = lse_of(sum, reference);
#pragma unroll
            for (int n = 0; n < kWarpColumns / 8; ++n)
                store_shared_4(staged + n / 8 * kBlockBytes + swizzled(in_block, n % 8) + 4 * (lane % 4),
                               pack_bf16(o[i][n][2 * half] * inverse, o[i][n][2 * half + 1] * inverse));
        }
    __syncthreads();
    store_output<kFormat>(a, work, shared_address(shared.query));
}

/* What another launch merges. */
__device__ __forceinline__ void leave_part(const Arguments& a, const Work& work, const MmaSoftmax& softmax,
                                           const Output& o) {
    const int lane = threadIdx.x % 32;
    const int64_t first = (work.item * a.num_splits + work.split) * kHeads + warp_head() + lane / 4;
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t head = first + 16 * i + 8 * half;
            if (warp_quarter() == 0 && lane % 4 == 0)
                a.part_sums[head] = make_float2(softmax.reference[i][half], softmax.sum[i][half]);
            float* values = a.part_values + head * kDim + kWarpColumns * warp_quarter() + 2 * (lane % 4);
#pragma unroll
            for (int n = 0; n < kWarpColumns / 8; ++n)
                *(float2*)(values + 8 * n) = make_float2(o[i][n][2 * half], o[i][n][2 * half + 1]);
        }
}

/* ---- kernel ---- */

template <dsa_format kFormat, int kBuffers>
__global__ void __launch_bounds__(kThreads, 1) compressed_mla_mma_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    MmaShared<kBuffers>& shared = *(MmaShared<kBuffers>*)memory;
    const uint32_t query = shared_address(shared.query), tiles = shared_address(shared.tiles[0]);
    const uint32_t weights = shared_address(shared.weights);
    wait_for_previous_launch();
    const Work work = work_of(a, blockIdx.x);
    /* bfloat16 rows are copied to where they will be used. */
    constexpr bool kLoadsEarly = kBuffers == 2 || kFormat == DSA_FP8;
    Loader<kFormat> loader(a, work);
    const auto store_next = [&](int buffer) {
        const uint32_t to = tiles + buffer * kTileBytes;
        if (loader.store(to)) loader.store_carefully(to);
        const uint32_t valid = loader.valid_rows();
        if (threadIdx.x % 32 == 0) shared.valid[buffer][threadIdx.x / 32] = (uint8_t)valid;
    };
    Query heads;
    loader.find(0);
    heads.load(a, work);
    loader.load(0, tiles);
    loader.find(1);
    heads.store<kFormat>(a, query);
    store_next(0);
    MmaSoftmax softmax;
    Output o;
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) softmax.reference[i][half] = -INFINITY, softmax.sum[i][half] = 0.0f;
#pragma unroll
        for (int n = 0; n < kWarpColumns / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[i][n][e] = 0.0f;
    }
    for (int t = 0; t < work.num_tiles; ++t) {
        const int buffer = t % kBuffers, next = (t + 1) % kBuffers;
        const uint32_t tile = tiles + buffer * kTileBytes;
        __syncthreads();
        if (kLoadsEarly) loader.load(t + 1, tiles + next * kTileBytes);
        if (kLoadsEarly) loader.find(t + 2);
        Scores s;
        compute_scores(s, query, tile);
        find_maxima(shared, s, *(const volatile uint16_t*)&shared.valid[buffer][2 * warp_quarter()], a.scale_log2);
        __syncthreads();
        move_reference(shared, softmax, o);
        store_weights(weights, s, softmax);
        __syncthreads();
        add_output(o, weights, tile);
        if (kBuffers == 1) __syncthreads();
        if (!kLoadsEarly) loader.load(t + 1, tiles);
        if (!kLoadsEarly) loader.find(t + 2);
        store_next(next);
    }
    let_next_launch_start();
    add_sums(shared, softmax);
    if (a.num_splits == 1)
        finish<kFormat>(a, shared, work, softmax, o);
    else
        leave_part(a, work, softmax, o);
}

/* Bound: 4 * 64 * 512 * count FLOP for 64 heads of a row on the tensor cores; the shared memory is busier, with three
 * loads of 512 bytes to four products in the scores. */
template <dsa_format kFormat, int kBuffers>
dsa_status launch_with(const Arguments& a, const Device& device, cudaStream_t stream) {
    auto* kernel = compressed_mla_mma_kernel<kFormat, kBuffers>;
    constexpr int32_t kBytes = sizeof(MmaShared<kBuffers>);
    const dsa_status status = allow_shared_bytes(kernel, kBytes);
    if (status != DSA_OK) return status;
    const int64_t num_blocks = a.num_tokens * a.num_parts * a.num_splits;
    const cudaError_t error = launch_following(kernel, a, num_blocks, kThreads, kBytes, device, stream);
    if (error != cudaSuccess) return status_of(error);
    return a.num_splits == 1 ? launched(stream) : merge_parts(a, kFormat, device, stream);
}

template <dsa_format kFormat>
dsa_status launch(const Arguments& a, const Device& device, cudaStream_t stream) {
    if (device.max_shared_bytes >= (int32_t)sizeof(MmaShared<2>)) return launch_with<kFormat, 2>(a, device, stream);
    if (device.max_shared_bytes >= (int32_t)sizeof(MmaShared<1>)) return launch_with<kFormat, 1>(a, device, stream);
    return DSA_UNSUPPORTED;
}

}  // namespace
}  // namespace mla

dsa_status compressed_mla_mma(const dsa_compressed_mla_params& p, const CompressedMlaLayouts& layouts,
                              int32_t num_splits, const Device& device, cudaStream_t stream) {
    using namespace mla;
    const Arguments a = make_arguments(p, layouts, num_splits);
    if (a.num_tokens * a.num_parts * a.num_splits > INT32_MAX) return DSA_UNSUPPORTED;
    return p.cache_format == DSA_FP8 ? launch<DSA_FP8>(a, device, stream) : launch<DSA_BFLOAT16>(a, device, stream);
}

}  // namespace gpu
}  // namespace dsa
