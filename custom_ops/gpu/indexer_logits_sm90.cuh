/* Device parts of the sm_90 index scores over an fp8 cache with index_head_dim 128: schedule, loads, products, sums.
 *
 * A warpgroup multiplies 64 keys (M) by the heads of one or more rows (N), both from shared memory, where 128 bytes of a
 * key or of a head are one row of a 128-byte swizzle.
 *
 * Order of the sums of one score, the same in every kernel: four k-steps of 32 dims, each added by the tensor core; lane
 * c of a quad adds heads 8 j + 2 c and 8 j + 2 c + 1 in order of j; (lane 0 + lane 1) + (lane 2 + lane 3); times the scale.
 *
 * Error. A Hopper tensor core aligns the 32 products of a k-step and the accumulator to the largest of them and drops
 * what lies more than 13 bits below it. With A = sum_d |q_d k_d|, which no product and no partial sum exceeds,
 * |dot error| <= 4 steps * 33 terms * 2^-13 * A in the worst case, when every term loses a whole unit; seen are 1.3 * 2^-13 * A
 * at most and 1.3e-4 relative RMS of the scores. The sums over heads are float32: (heads + 3) * 2^-24.
 */
#ifndef DSA_GPU_INDEXER_LOGITS_SM90_CUH_
#define DSA_GPU_INDEXER_LOGITS_SM90_CUH_

#include <cuda.h>
#include <math.h>

#include "hopper.cuh"
#include "indexer_logits_kernels.h"
#include "wgmma.cuh"

namespace dsa {
namespace gpu {

constexpr int kTile = 64;                /* keys of a tile: wgmma's M; a block of the cache holds one or more tiles */
constexpr int kDim = 128;                /* bytes of a key or of a query's head */
constexpr int kTileBytes = kTile * kDim; /* without the scales */
constexpr int kScaleBytes = kTile * 4;
constexpr int kNoRequest = -1;

__device__ __forceinline__ int32_t num_tiles(int32_t length) { return (length + kTile - 1) / kTile; }

/* ---- schedule ---- */

/* Consecutive rows of one request inside a group of kRows rows; rows of length 0 belong to whatever surrounds them. */
struct Run {
    int32_t first_row;
    int32_t num_rows;
    int32_t request;   /* kNoRequest: a wrong id */
    int32_t num_tiles; /* of the longest row; 0: no row has a key */
};

template <int kRows>
struct RowGroup {
    int32_t first_row;
    int32_t lengths[kRows];
    int32_t requests[kRows];

    __device__ __forceinline__ void read(const IndexerLogitsArguments& a, int32_t group) {
        first_row = group * kRows;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const bool is_row = first_row + i < a.num_tokens;
            lengths[i] = is_row ? row_length(a, first_row + i) : 0;
            requests[i] = is_row ? a.request_ids[first_row + i] : 0;
        }
    }

    /* The run that begins at row `begin` of the group. */
    __device__ __forceinline__ Run run(const IndexerLogitsArguments& a, int32_t begin) const {
        int32_t longest = 0, request = 0, end = min(kRows, a.num_tokens - first_row);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (i < begin || i >= end || lengths[i] == 0) continue;
            if (longest == 0) request = requests[i];
            if (requests[i] != request) {
                end = i;
            } else if (lengths[i] > longest) {
                longest = lengths[i];
            }
        }
        return Run{first_row + begin, end - begin, is_request(a, request) ? request : kNoRequest, num_tiles(longest)};
    }

    __device__ __forceinline__ int32_t sum_of_tiles(const IndexerLogitsArguments& a) const {
        int32_t sum = 0;
        for (int32_t begin = 0; begin < min(kRows, a.num_tokens - first_row);) {
            const Run next = run(a, begin);
            sum += next.num_tiles;
            begin += next.num_rows;
        }
        return sum;
    }
};

/* Tiles first_tile .. last_tile - 1 of a run. */
struct Segment {
    Run run;
    int32_t first_tile;
    int32_t last_tile;
};

/* All tiles of all runs form one sequence; this CTA's share of it is walked segment by segment. */
template <int kRows>
struct Walk {
    RowGroup<kRows> rows;
    int32_t begin;     /* row of the group where the next run begins */
    int32_t skip;      /* tiles of what follows that belong to other CTAs */
    int32_t num_tiles; /* still to come */

    __device__ __forceinline__ bool next(const IndexerLogitsArguments& a, Segment& segment) {
        while (num_tiles > 0 && rows.first_row < a.num_tokens) {
            while (begin < min(kRows, a.num_tokens - rows.first_row)) {
                const Run run = rows.run(a, begin);
                begin += run.num_rows;
                if (skip >= run.num_tiles) {
                    skip -= run.num_tiles;
                    continue;
                }
                segment.run = run;
                segment.first_tile = skip;
                segment.last_tile = min(run.num_tiles, skip + num_tiles);
                num_tiles -= segment.last_tile - segment.first_tile;
                skip = 0;
                return true;
            }
            begin = 0;
            rows.read(a, rows.first_row / kRows + 1);
        }
        return false;
    }
};

template <int kRows>
struct ScheduleShared {
    int32_t warp_sums[32];
    RowGroup<kRows> rows; /* where the share begins */
    int32_t skip;
};

/* The share of this CTA: equal numbers of tiles, in order. Called by all kThreads threads of the CTA, or by any whole warp
 * for itself (kThreads 32), which is faster while groups are few. */
template <int kRows, int kThreads>
__device__ __forceinline__ Walk<kRows> schedule(const IndexerLogitsArguments& a, ScheduleShared<kRows>& shared) {
    const int32_t thread = threadIdx.x % kThreads, lane = threadIdx.x % 32, warp = thread / 32;
    const int32_t num_groups = (a.num_tokens + kRows - 1) / kRows;
    const int32_t per_thread = (num_groups + kThreads - 1) / kThreads;
    const int32_t first_group = min(thread * per_thread, num_groups);
    const int32_t last_group = min(first_group + per_thread, num_groups);
    RowGroup<kRows> rows;
    int32_t own = 0;
#pragma unroll 1
    for (int32_t group = last_group - 1; group >= first_group; --group) { /* ends with the first, where most begin */
        rows.read(a, group);
        own += rows.sum_of_tiles(a);
    }

    int32_t until = own; /* inclusive prefix sum */
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int32_t other = __shfl_up_sync(~0u, until, step);
        if (lane >= step) until += other;
    }
    uint32_t total = __shfl_sync(~0u, until, 31);
    if (kThreads > 32) {
        if (lane == 31) shared.warp_sums[warp] = until;
        __syncthreads();
        total = 0;
#pragma unroll
        for (int w = 0; w < kThreads / 32; ++w) {
            const int32_t sum = shared.warp_sums[w];
            if (w < warp) until += sum;
            total += sum;
        }
    }
    const uint32_t share = total / gridDim.x, rest = total % gridDim.x; /* the first `rest` CTAs take one more */
    const int32_t first = share * blockIdx.x + min(blockIdx.x, rest);
    const int32_t num_tiles = share + (blockIdx.x < rest);
    int32_t skip = first - (until - own);
    const bool begins_here = skip >= 0 && first < until;
    if (begins_here) {
#pragma unroll 1
        for (int32_t group = first_group; group < last_group - 1;) {
            const int32_t tiles = rows.sum_of_tiles(a);
            if (skip < tiles) break;
            skip -= tiles;
            rows.read(a, ++group);
        }
    }
    if (kThreads > 32) {
        if (begins_here) {
            shared.rows = rows;
            shared.skip = skip;
        }
        __syncthreads();
        return Walk<kRows>{shared.rows, 0, shared.skip, num_tiles};
    }
    const int source = __ffs(__ballot_sync(~0u, begins_here)) - 1; /* -1: no tiles, and then nobody looks at the rows */
    rows.first_row = __shfl_sync(~0u, rows.first_row, source);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        rows.lengths[i] = __shfl_sync(~0u, rows.lengths[i], source);
        rows.requests[i] = __shfl_sync(~0u, rows.requests[i], source);
    }
    return Walk<kRows>{rows, 0, __shfl_sync(~0u, skip, source), num_tiles};
}

#ifndef V_ABL
#define V_ABL 1
#endif
#ifndef V_RELU
#define V_RELU 0
#endif
#if V_RELU == 0
constexpr float kWeightFactor = 0.5f;
__device__ __forceinline__ float scaled_relu(float x) { return x + fabsf(x); }
#elif V_RELU == 1
constexpr float kWeightFactor = 1.0f;
__device__ __forceinline__ float scaled_relu(float x) { return relu(x); }
#elif V_RELU == 2
constexpr float kWeightFactor = 1.0f;
__device__ __forceinline__ float scaled_relu(float x) { return fmaxf(x, 0.0f); }
#else
constexpr float kWeightFactor = 1.0f;
__device__ __forceinline__ float scaled_relu(float x) { return x; }
#endif

/* ---- keys ---- */

/* Dims from 0 and keys from `key` on of `block`, swizzled. The barrier must expect kTileBytes. */
__device__ __forceinline__ void copy_tile(uint32_t to_shared, const CUtensorMap& cache, int32_t key, int32_t block,
                                          uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
            to_shared),
        "l"(&cache), "r"(0), "r"(key), "r"(block), "r"(barrier)
        : "memory");
}

/* Tiles of keys on their way from one filling warp to the warps that multiply them. */
template <int kStages, int kReaderWarps>
struct KeyRing {
    uint8_t tiles[kStages][kTileBytes]; /* first in shared memory: 1024-byte aligned */
    float scales[kStages][kTile];
    uint64_t full[kStages];
    uint64_t empty[kStages];
    int32_t is_valid[kStages]; /* 0 where the block id is outside the cache */

    /* One thread; a barrier of the CTA must follow. */
    __device__ __forceinline__ void begin() {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(shared_address(&full[i]), 1);
            barrier_init(shared_address(&empty[i]), kReaderWarps);
        }
        barrier_init_fence();
    }

    /* One thread: tile `position` of all that pass through the ring is part `part` of `block`. */
    __device__ __forceinline__ void fill(const IndexerLogitsArguments& a, const CUtensorMap& cache, uint32_t position,
                                         int32_t block, int32_t part) {
        const uint32_t stage = position % kStages, barrier = shared_address(&full[stage]);
        if (position >= kStages) barrier_wait(shared_address(&empty[stage]), (position / kStages + 1) % 2);
        is_valid[stage] = is_block(a, block);
        if (!is_block(a, block)) {
            barrier_arrive(barrier);
            return;
        }
        barrier_arrive_expect(barrier, kTileBytes + kScaleBytes);
        copy_tile(shared_address(tiles[stage]), cache, part * kTile, block, barrier);
        copy_bulk(shared_address(scales[stage]),
                  a.index_cache + block * a.block_stride_bytes + a.scale_offset + part * kScaleBytes, kScaleBytes, barrier);
    }

    __device__ __forceinline__ void await(uint32_t position) {
        barrier_wait(shared_address(&full[position % kStages]), position / kStages % 2);
    }

    /* A warp no longer reads the tile. */
    __device__ __forceinline__ void release(uint32_t position) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&empty[position % kStages]));
    }
};

/* Block ids of a segment's tiles, read by a warp 32 at a time and one batch ahead. */
struct TileIds {
    const int32_t* row; /* of block_table; null: no request */
    int32_t first, count, parts;
    int32_t batch[2];

    __device__ __forceinline__ TileIds(const IndexerLogitsArguments& a, const Segment& segment)
        : row(segment.run.request == kNoRequest ? nullptr : a.block_table + (int64_t)segment.run.request * a.max_blocks),
          first(segment.first_tile),
          count(segment.last_tile - segment.first_tile),
          parts(a.block_size / kTile) {
        batch[0] = load(threadIdx.x % 32);
        batch[1] = load(threadIdx.x % 32 + 32);
    }
    __device__ __forceinline__ int32_t load(int32_t i) const {
        if (!row || i >= count) return -1;
        return __ldg(row + (parts == 1 ? first + i : (first + i) / parts)); /* a division costs as much as a load */
    }
    /* In order: i = 0, 1, 2, ... The whole warp calls it. */
    __device__ __forceinline__ int32_t block(int32_t i) {
        const int32_t id = __shfl_sync(~0u, batch[0], i % 32);
        if (i % 32 == 31) {
            batch[0] = batch[1];
            batch[1] = load(i + 33 + threadIdx.x % 32);
        }
        return id;
    }
    __device__ __forceinline__ int32_t part(int32_t i) const { return parts == 1 ? 0 : (first + i) % parts; }
};

/* The key of a tile whose score a thread stores: see reduce_quad. */
__device__ __forceinline__ int32_t own_key() {
    const int32_t thread = threadIdx.x % 128;
    return thread / 32 * 16 + thread % 32 / 4 + thread % 2 * 8;
}

/* ---- queries ---- */

/* Rows of queries, head by head 128 bytes, swizzled in groups of 8; zeros where there is no head or no row. `query` is
 * 1024-byte aligned. The caller waits for the copies, fences and synchronises. */
template <int kRows, int kHeads, int kThreads>
__device__ __forceinline__ void load_queries(const IndexerLogitsArguments& a, const Run& run, uint8_t* query) {
    constexpr int kPieces = kRows * kHeads * 8;
    const uint32_t to = shared_address(query);
#pragma unroll
    for (int first = 0; first < kPieces; first += kThreads) {
        const int i = first + threadIdx.x;
        if (kPieces % kThreads != 0 && i >= kPieces) break;
        const int piece = i % 8, column = i / 8;
        const int row = column / kHeads, head = column % kHeads;
        const bool is_head = row < run.num_rows && head < a.index_n_heads;
        const int64_t index = is_head ? (int64_t)(run.first_row + row) * a.index_n_heads + head : 0;
        copy_async_16_or_zero(to + column * kDim + (piece ^ column % 8) * 16, a.query + index * kDim + piece * 16, is_head);
    }
}

/* Halves of the weights, [row][head], zeros where there is no head or no row: relu(x) is taken as (x + |x|) / 2; halving
 * is exact. The caller synchronises. */
template <int kRows, int kHeads, int kThreads>
__device__ __forceinline__ void load_weights(const IndexerLogitsArguments& a, const Run& run, float* weights) {
#pragma unroll
    for (int first = 0; first < kRows * kHeads; first += kThreads) {
        const int i = first + threadIdx.x;
        if (kRows * kHeads % kThreads != 0 && i >= kRows * kHeads) break;
        const int row = i / kHeads, head = i % kHeads;
        const bool is_weight = row < run.num_rows && head < a.index_n_heads;
        weights[i] = is_weight ? kWeightFactor * __ldg(a.folded_weights + (int64_t)(run.first_row + row) * a.index_n_heads + head) : 0.0f;
    }
}

/* This thread's heads of some rows: [row][2 j + e] is head 8 j + 2 (lane % 4) + e. */
template <int kRows, int kHeads>
__device__ __forceinline__ void own_weights(const float* shared_weights, float (&weights)[kRows][kHeads / 4]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int j = 0; j < kHeads / 8; ++j) {
            const float2 pair =
                *reinterpret_cast<const float2*>(shared_weights + row * kHeads + 8 * j + threadIdx.x % 4 * 2);
            weights[row][2 * j] = pair.x;
            weights[row][2 * j + 1] = pair.y;
        }
    }
}

/* ---- products and sums ---- */

/* d = keys x queries: 64 keys at `keys`, 2 kCount heads at `query`, shared addresses. Waits for the result. */
template <int kCount>
__device__ __forceinline__ void multiply(float (&d)[kCount], uint32_t keys, uint32_t query) {
    const uint64_t key_descriptor = matrix_descriptor(keys, 16, 8 * kDim, Swizzle::k128);
    const uint64_t query_descriptor = matrix_descriptor(query, 16, 8 * kDim, Swizzle::k128);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) wgmma_e4m3(d, key_descriptor + step * 2, query_descriptor + step * 2, step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep(d);
}

/* sums[row][i]: this lane's heads of the row, key lane / 4 + 8 i. weights: halves. */
template <int kRows, int kHeads>
__device__ __forceinline__ void weigh(const float (&d)[kRows * kHeads / 2], const float (&weights)[kRows][kHeads / 4],
                                      float (&sums)[kRows][2]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = 0.0f;
#pragma unroll
    for (int j = 0; j < kHeads / 8 / V_ABL; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    sums[row][i] = fmaf(scaled_relu(d[(row * kHeads / 8 + j) * 4 + i * 2 + e]), weights[row][j * 2 + e],
                                        sums[row][i]);
            }
        }
    }
}

/* A store without a branch: ptxas serialises products that are in flight around one. */
__device__ __forceinline__ void store_if(bool wanted, float* to, float value) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.f32 [%1], %2;\n}\n" ::"r"((int)wanted), "l"(to),
                 "f"(value)
                 : "memory");
}

/* Adds the four lanes of a quad. Lane c gets key lane / 4 + 8 (c % 2). */
__device__ __forceinline__ float reduce_quad(const float (&sums)[2]) {
    const bool odd = threadIdx.x % 2;
    const float pair = (odd ? sums[1] : sums[0]) + __shfl_xor_sync(~0u, odd ? sums[0] : sums[1], 1);
    return pair + __shfl_xor_sync(~0u, pair, 2);
}

/* The same sums for two rows with one shuffle less: lane c gets row c / 2. */
__device__ __forceinline__ float reduce_quad(const float (&first)[2], const float (&second)[2]) {
    const bool odd = threadIdx.x % 2, upper = threadIdx.x % 4 / 2;
    const float a = (odd ? first[1] : first[0]) + __shfl_xor_sync(~0u, odd ? first[0] : first[1], 1);
    const float b = (odd ? second[1] : second[0]) + __shfl_xor_sync(~0u, odd ? second[0] : second[1], 1);
    return (upper ? b : a) + __shfl_xor_sync(~0u, upper ? a : b, 2);
}

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_INDEXER_LOGITS_SM90_CUH_ */
