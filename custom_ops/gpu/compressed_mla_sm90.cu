/* compressed_mla on Hopper, fp8 rows of 448 + 64 numbers: wgmma, 64 heads of a row a block.
 *
 *   consumer g of two warpgroups   S over columns 256 g .. 256 g + 255, exchanged for the other columns' part of rows
 *                                  32 g .. 32 g + 31; their softmax; O[:, 256 g .. 256 g + 255]
 *   two producer warpgroups        gather rows into registers, widen them to bfloat16 into a tile
 *
 * A producer warp has eight rows of every tile and is up to two tiles ahead; warps wait for their own rows only, so
 * that the memory always has something to do. P is relative to a reference that follows the running maximum only in
 * steps above kSlack, so that O is hardly ever rescaled.
 */
#include "compressed_mla_tile.cuh"
#include "wgmma.cuh"

namespace dsa {
namespace gpu {
namespace mla {
namespace {

constexpr int kAllThreads = 2 * kThreads;
constexpr int kConsumerRegisters = 192; /* 256 * 192 + 256 * 64 = 512 * 128, the registers of the launch */
constexpr int kProducerRegisters = 64;
constexpr int kColumns = kDim / 2; /* of a warpgroup */
constexpr int kGroupRows = kRows / 2;
constexpr int kTokenStep = 16 * 128 / 16; /* 16 rows and 128 columns of a tile, as steps of a descriptor */
constexpr int kColumnStep = 2 * kBlockBytes / 16;

struct Shared {
    uint8_t query[kTileBytes];
    uint8_t tiles[2][kTileBytes];
    uint8_t weights[kBlockBytes]; /* P */
    float4 partial_scores[2][kGroupRows / 8][128]; /* what a consumer hands to the other, a thread side by side */
    float maxima[2][kHeads];
    float sums[2][kHeads];
    uint64_t full[2], free[2]; /* [tile % 2] */
    uint8_t valid[2][kWarps];  /* [tile % 2]: a bit per row */
};
static_assert(sizeof(Shared) <= 232448, "the shared memory of a multiprocessor");

/* A thread's two heads: 16 warp + lane / 4 and 8 more. */
struct Softmax {
    float reference[2]; /* log2; what O and sum are relative to */
    float sum[2];       /* over this thread's rows */
};

constexpr uint64_t kDescriptorUpper = (uint64_t)(1024 >> 4) << 32 | (uint64_t)Swizzle::k128 << 62;

__device__ __forceinline__ uint64_t descriptor(uint32_t lower) { return kDescriptorUpper | lower; }

/* K along the 128 bytes: the query, tiles in S, P. */
__device__ __forceinline__ uint32_t row_operand(uint32_t block) {
    return (uint32_t)uniform((int32_t)((block & 0x3FFFF) >> 4 | 1 << 16));
}

/* K along the rows, blocks side by side: tiles in P V. */
__device__ __forceinline__ uint32_t column_operand(uint32_t block) {
    return (uint32_t)uniform((int32_t)((block & 0x3FFFF) >> 4 | (kBlockBytes >> 4) << 16));
}

__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

/* Of the 256 threads that multiply. */
__device__ __forceinline__ void sync_consumers() { named_barrier_sync(1, kThreads); }

/* One of two tiles, and how often it was used. */
struct Turn {
    int buffer = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        parity ^= (uint32_t)buffer;
        buffer ^= 1;
    }
};

/* ---- producers ---- */

__device__ __forceinline__ void produce(const Arguments& a, Shared& shared, const Work& work) {
    const int warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
    Loader<DSA_FP8> loader(a, work);
    Turn turn;
    loader.find(0);
    for (int t = 0; t < work.num_tiles; ++t) {
        const uint32_t to = shared_address(shared.tiles[turn.buffer]);
        loader.load(t, to);
        loader.find(t + 1);
        const uint32_t valid = loader.valid_rows();
        barrier_wait(shared_address(&shared.free[turn.buffer]), turn.parity ^ 1);
        const bool wants_care = loader.store(to);
        if (wants_care) loader.store_carefully(to);
        if (lane == 0) shared.valid[turn.buffer][warp] = (uint8_t)valid;
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.full[turn.buffer]));
        turn.advance();
    }
}

/* ---- products ---- */

/* Of this consumer's columns; all rows, for with fewer the query would be read from shared memory too often. */
__device__ __forceinline__ void compute_partial_scores(float (&s)[32], uint32_t query, uint32_t tile) {
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
        const int step = i / 4 * (kBlockBytes / 16) + 2 * (i % 4);
        wgmma_bf16<0, 0>(s, descriptor(query + step), descriptor(tile + step), i != 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    keep(s);
}

/* Adds what the other consumer has of this one's rows. */
__device__ __forceinline__ void exchange_scores(Shared& shared, const float (&partial)[32], float (&s)[16]) {
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float given[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float first = partial[4 * j + e], second = partial[16 + 4 * j + e];
            given[e] = group == 0 ? second : first;
            s[4 * j + e] = group == 0 ? first : second;
        }
        shared.partial_scores[group][j][thread] = make_float4(given[0], given[1], given[2], given[3]);
    }
    sync_consumers();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float4 other = shared.partial_scores[group ^ 1][j][thread];
        s[4 * j] += other.x, s[4 * j + 1] += other.y, s[4 * j + 2] += other.z, s[4 * j + 3] += other.w;
    }
}

/* Two instructions of 128 columns, since 256 would need more registers than the launch gives a thread. */
__device__ __forceinline__ void start_output(float (&o)[128], uint32_t weights, uint32_t values) {
    float(&left)[64] = *(float(*)[64]) & o[0];
    float(&right)[64] = *(float(*)[64]) & o[64];
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
        wgmma_bf16<0, 1>(left, descriptor(weights + 2 * k), descriptor(values + k * kTokenStep), 1);
        wgmma_bf16<0, 1>(right, descriptor(weights + 2 * k), descriptor(values + kColumnStep + k * kTokenStep), 1);
    }
    wgmma_commit();
}

/* ---- softmax ---- */

/* This warpgroup's largest scores of its rows, for the other one too. */
__device__ __forceinline__ void find_maxima(Shared& shared, float (&s)[16], float (&largest)[2], uint32_t valid,
                                            float scale_log2) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    valid >>= 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (!(valid >> (8 * j + e) & 1)) s[4 * j + e] = s[4 * j + 2 + e] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float max = s[2 * i];
#pragma unroll
        for (int j = 0; j < 4; ++j) max = fmaxf(max, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
        largest[i] = max * scale_log2;
        if (lane % 4 == 0) shared.maxima[group][16 * warp + lane / 4 + 8 * i] = largest[i];
    }
}

/* Moves the reference where a score exceeds it by too much, and what is relative to it. No product may be in flight. */
__device__ __forceinline__ void move_reference(const Shared& shared, const float (&largest)[2], Softmax& softmax,
                                               float (&o)[128]) {
    const int group = threadIdx.x / 128, head = 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float max = fmaxf(largest[i], shared.maxima[group ^ 1][head + 8 * i]);
        factor[i] = 1.0f;
        if (max <= softmax.reference[i] + kSlack) continue;
        factor[i] = exp2_fast(softmax.reference[i] - max);
        softmax.reference[i] = max;
        softmax.sum[i] *= factor[i];
    }
    if (!__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
    for (int n = 0; n < 128; ++n) o[n] *= factor[n / 2 % 2];
}

/* S to P = exp2(S - reference). */
__device__ __forceinline__ void store_weights(Shared& shared, const float (&s)[16], Softmax& softmax,
                                              float scale_log2) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    uint32_t p[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float shift = softmax.reference[i] == -INFINITY ? 0.0f : softmax.reference[i]; /* no row yet */
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float low = exp2_fast(fmaf(s[4 * j + 2 * i], scale_log2, -shift));
            const float high = exp2_fast(fmaf(s[4 * j + 2 * i + 1], scale_log2, -shift));
            softmax.sum[i] += low + high;
            p[j / 2][2 * (j % 2) + i] = pack_bf16(low, high);
        }
    }
    const uint32_t block = shared_address(shared.weights);
#pragma unroll
    for (int k = 0; k < 2; ++k)
        store_matrices(block + swizzled(16 * warp + lane % 16, 4 * group + 2 * k + lane / 16), p[k][0], p[k][1],
                       p[k][2], p[k][3]);
}

/* ---- results ---- */

/* The sums of both warpgroups; afterwards neither the query nor a tile is in use. */
__device__ __forceinline__ void add_sums(Shared& shared, Softmax& softmax) {
    const int group = threadIdx.x / 128, head = 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        softmax.sum[i] += __shfl_xor_sync(kAllLanes, softmax.sum[i], 1);
        softmax.sum[i] += __shfl_xor_sync(kAllLanes, softmax.sum[i], 2);
        if (threadIdx.x % 4 == 0) shared.sums[group][head + 8 * i] = softmax.sum[i];
    }
    sync_consumers();
#pragma unroll
    for (int i = 0; i < 2; ++i) softmax.sum[i] = shared.sums[0][head + 8 * i] + shared.sums[1][head + 8 * i];
}

__device__ __forceinline__ void finish(const Arguments& a, Shared& shared, const Work& work, const Softmax& softmax,
                                       const float (&o)[128]) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int head = work.first_head + 16 * warp + lane / 4;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool is_there = head + 8 * i < a.num_heads;
        const float sink = is_there ? __ldg(a.sinks + head + 8 * i) : 0.0f;
        inverse[i] = inverse_of(softmax.sum[i], softmax.reference[i], sink);
        if (a.lse != nullptr && group == 0 && lane % 4 == 0 && is_there)
            a.lse[work.token * a.num_heads + head + 8 * i] = lse_of(softmax.sum[i], softmax.reference[i]);
    }
    const uint32_t staged = shared_address(shared.query) + group * (kBlocks / 2) * kBlockBytes;
#pragma unroll
    for (int n = 0; n < 128; n += 8) {
        uint32_t v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = pack_bf16(o[n + 2 * e] * inverse[e % 2], o[n + 2 * e + 1] * inverse[e % 2]);
        store_matrices(staged + n / 32 * kBlockBytes + swizzled(16 * warp + lane % 16, n / 4 % 8 + lane / 16), v[0],
                       v[1], v[2], v[3]);
    }
    sync_consumers();
    store_output<DSA_FP8>(a, work, shared_address(shared.query));
}

/* What another launch merges. */
__device__ __forceinline__ void leave_part(const Arguments& a, const Work& work, const Softmax& softmax,
                                           const float (&o)[128]) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int64_t first = (work.item * a.num_splits + work.split) * kHeads + 16 * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (group == 0 && lane % 4 == 0)
            a.part_sums[first + 8 * i] = make_float2(softmax.reference[i], softmax.sum[i]);
        float* values = a.part_values + (first + 8 * i) * kDim + group * kColumns + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < 32; ++j) *(float2*)(values + 8 * j) = make_float2(o[4 * j + 2 * i], o[4 * j + 2 * i + 1]);
    }
}

/* ---- kernel ---- */

__device__ __forceinline__ void consume(const Arguments& a, Shared& shared, const Work& work) {
    const int group = threadIdx.x / 128;
    const uint32_t query = shared_address(shared.query), weights = shared_address(shared.weights);
    Query heads;
    heads.load(a, work);
    heads.store<DSA_FP8>(a, query);
    fence_async_proxy();
    sync_consumers();
    Softmax softmax = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float o[128];
#pragma unroll
    for (int n = 0; n < 128; ++n) o[n] = 0.0f;
    Turn turn;
    for (int t = 0; t < work.num_tiles; ++t) {
        const uint32_t tile = shared_address(shared.tiles[turn.buffer]);
        barrier_wait(shared_address(&shared.full[turn.buffer]), turn.parity);
        const uint32_t columns = group * (kBlocks / 2) * kBlockBytes;
        float partial[32], s[16], largest[2];
        compute_partial_scores(partial, row_operand(query + columns), row_operand(tile + columns));
        exchange_scores(shared, partial, s);
        find_maxima(shared, s, largest, *(const volatile uint32_t*)&shared.valid[turn.buffer][4 * group], a.scale_log2);
        sync_consumers();
        move_reference(shared, largest, softmax, o);
        store_weights(shared, s, softmax, a.scale_log2);
        fence_async_proxy();
        sync_consumers();
        start_output(o, row_operand(weights), column_operand(tile + columns));
        wgmma_wait<0>();
        keep(o);
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&shared.free[turn.buffer]));
        turn.advance();
    }
    let_next_launch_start();
    add_sums(shared, softmax);
    if (a.num_splits == 1)
        finish(a, shared, work, softmax, o);
    else
        leave_part(a, work, softmax, o);
}

__global__ void __launch_bounds__(kAllThreads, 1) compressed_mla_sm90_kernel(const __grid_constant__ Arguments a) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *(Shared*)memory;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared_address(&shared.full[i]), kWarps);
            barrier_init(shared_address(&shared.free[i]), kWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    wait_for_previous_launch();
    const Work work = work_of(a, blockIdx.x);
    if (threadIdx.x >= kThreads) {
        give_registers<kProducerRegisters>();
        produce(a, shared, work);
    } else {
        take_registers<kConsumerRegisters>();
        consume(a, shared, work);
    }
#endif
}

}  // namespace
}  // namespace mla

/* Bound: 4 * 64 * 512 * count FLOP for 64 heads of a row on the tensor cores, 32 cycles of a multiprocessor a slot; 584
 * bytes a slot read. */
dsa_status compressed_mla_sm90(const dsa_compressed_mla_params& p, const CompressedMlaLayouts& layouts,
                               int32_t num_splits, const Device& device, cudaStream_t stream) {
    using namespace mla;
    if (!device.has_hopper_instructions || device.max_shared_bytes < (int32_t)sizeof(Shared)) return DSA_UNSUPPORTED;
    if (p.cache_format != DSA_FP8) return DSA_UNSUPPORTED;
    const Arguments a = make_arguments(p, layouts, num_splits);
    const int64_t num_blocks = a.num_tokens * a.num_parts * a.num_splits;
    if (num_blocks > INT32_MAX) return DSA_UNSUPPORTED;
    const dsa_status status = allow_shared_bytes(compressed_mla_sm90_kernel, (int32_t)sizeof(Shared));
    if (status != DSA_OK) return status;
    const cudaError_t error = launch_following(compressed_mla_sm90_kernel, a, num_blocks, kAllThreads,
                                               (int32_t)sizeof(Shared), device, stream);
    if (error != cudaSuccess) return status_of(error);
    return num_splits == 1 ? launched(stream) : merge_parts(a, DSA_FP8, device, stream);
}

}  // namespace gpu
}  // namespace dsa
