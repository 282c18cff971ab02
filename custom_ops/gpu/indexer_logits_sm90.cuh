/* Device parts of the sm_90 index scores over an fp8 cache with index_head_dim 128: schedule, copies, products, sums.
 *
 * A warpgroup multiplies 64 keys (M) by the heads of one or more rows (N), both from shared memory, where 128 bytes of
 * a key or of a head are one row of a 128-byte swizzle.
 *
 * Order of the sums of one score, the same in every kernel: four k-steps of 32 dims, each added by the tensor core;
 * lane c of a quad starts with its piece of u . k (see "queries") and adds heads 8 j + 2 c and 8 j + 2 c + 1 in order
 * of j; (lane 0 + lane 1) + (lane 2 + lane 3); times the scale.
 *
 * Error. A Hopper tensor core aligns the 32 products of a k-step and the sum so far to the largest of them and drops
 * what lies more than 13 bits below it. No product and no partial sum exceeds A = sum_d |q_d k_d|, so that
 *   |error of a dot| <= 4 steps * 33 terms * 2^-13 * A        (all 132 losses whole and of one sign)
 * and, since sum_d |u_d k_d| <= sum_h |w_h| A_h, |error of a score| <= scale * 132 * 2^-13 * sum_h |w_h| A_h at most.
 * The losses are spread: seen are 1.2e-4 to 1.9e-4 relative RMS and 1.3 * 2^-13 * A at most for one head. Smaller are
 * the rest of u behind its pieces, 2^-16 of it, and the float32 sums over heads, (heads + 5) * 2^-24.
 */
#ifndef DSA_GPU_INDEXER_LOGITS_SM90_CUH_
#define DSA_GPU_INDEXER_LOGITS_SM90_CUH_

#include <cuda.h>
#include <cuda_fp8.h>
#include <math.h>

#include "hopper.cuh"
#include "indexer_logits_kernels.h"
#include "indexer_logits_wgmma.cuh"
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

/* In tiles: going to another run takes as long as kSwitchCost tiles. A run is cut like a sequence of kSwitchCost empty
 * units and its tiles. */
template <int kSwitchCost>
__device__ __forceinline__ int32_t cost(const Run& run) {
    return run.num_tiles == 0 ? 0 : kSwitchCost + run.num_tiles;
}

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

    /* The cost of all runs. */
    template <int kSwitchCost>
    __device__ __forceinline__ int32_t sum_of_costs(const IndexerLogitsArguments& a) const {
        int32_t sum = 0;
        for (int32_t begin = 0; begin < min(kRows, a.num_tokens - first_row);) {
            const Run next = run(a, begin);
            sum += cost<kSwitchCost>(next);
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

/* The units of all runs form one sequence; this CTA's share of it is walked segment by segment. */
template <int kRows, int kSwitchCost>
struct Walk {
    RowGroup<kRows> rows;
    int32_t begin;     /* row of the group where the next run begins */
    int32_t skip;      /* units of what follows that belong to other CTAs */
    int32_t num_units; /* still to come */

    __device__ __forceinline__ bool next(const IndexerLogitsArguments& a, Segment& segment) {
        while (num_units > 0 && rows.first_row < a.num_tokens) {
            while (num_units > 0 && begin < min(kRows, a.num_tokens - rows.first_row)) {
                const Run run = rows.run(a, begin);
                begin += run.num_rows;
                const int32_t units = cost<kSwitchCost>(run);
                if (skip >= units) {
                    skip -= units;
                    continue;
                }
                segment.run = run;
                const int32_t last = min(units, skip + num_units);
                segment.first_tile = max(skip - kSwitchCost, 0);
                segment.last_tile = last - kSwitchCost;
                num_units -= last - skip;
                skip = 0;
                if (segment.first_tile < segment.last_tile) return true;
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

/* The share of this CTA: equal numbers of units, in order. Called by all kThreads threads of the CTA, or by any whole
 * warp for itself (kThreads 32), which is faster while groups are few. */
template <int kRows, int kSwitchCost, int kThreads>
__device__ __forceinline__ Walk<kRows, kSwitchCost> schedule(const IndexerLogitsArguments& a,
                                                             ScheduleShared<kRows>& shared) {
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
        own += rows.template sum_of_costs<kSwitchCost>(a);
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
    const int32_t num_units = share + (blockIdx.x < rest);
    int32_t skip = first - (until - own);
    const bool begins_here = skip >= 0 && first < until;
    if (begins_here) {
#pragma unroll 1
        for (int32_t group = first_group; group < last_group - 1;) {
            const int32_t units = rows.template sum_of_costs<kSwitchCost>(a);
            if (skip < units) break;
            skip -= units;
            rows.read(a, ++group);
        }
    }
    if (kThreads > 32) {
        if (begins_here) {
            shared.rows = rows;
            shared.skip = skip;
        }
        __syncthreads();
        return {shared.rows, 0, shared.skip, num_units};
    }
    const int source = __ffs(__ballot_sync(~0u, begins_here)) - 1; /* -1: no units, and then nobody looks at the rows */
    rows.first_row = __shfl_sync(~0u, rows.first_row, source);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        rows.lengths[i] = __shfl_sync(~0u, rows.lengths[i], source);
        rows.requests[i] = __shfl_sync(~0u, rows.requests[i], source);
    }
    return {rows, 0, __shfl_sync(~0u, skip, source), num_units};
}

/* ---- keys ---- */

/* A box of a tensor map from (0, second, third) on. The barrier must expect the bytes of the whole box. */
__device__ __forceinline__ void copy_box(uint32_t to_shared, const CUtensorMap& map, int32_t second, int32_t third,
                                         uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
        :
        : "r"(to_shared), "l"(&map), "r"(0), "r"(second), "r"(third), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void copy_async_4_or_zero(uint32_t to_shared, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to_shared), "l"(from), "r"(valid ? 4 : 0)
                 : "memory");
}

/* A ring's barriers: what has been filled for the n-th time may be read, what has been read n times may be filled
 * again. */
template <int kSlots>
struct RingBarriers {
    uint64_t full[kSlots];
    uint64_t empty[kSlots];

    /* One thread; a barrier of the CTA must follow. */
    __device__ __forceinline__ void begin(uint32_t num_fillers, uint32_t num_readers) {
#pragma unroll 1
        for (int i = 0; i < kSlots; ++i) {
            barrier_init(shared_address(&full[i]), num_fillers);
            barrier_init(shared_address(&empty[i]), num_readers);
        }
        barrier_init_fence();
    }
    __device__ __forceinline__ uint32_t filled(uint32_t position) { return shared_address(&full[position % kSlots]); }
    __device__ __forceinline__ void await_empty(uint32_t position) {
        if (position >= kSlots) barrier_wait(shared_address(&empty[position % kSlots]), (position / kSlots + 1) % 2);
    }
    __device__ __forceinline__ void await_full(uint32_t position) {
        barrier_wait(filled(position), position / kSlots % 2);
    }
    /* A warp no longer reads what is at this position. */
    __device__ __forceinline__ void release(uint32_t position) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&empty[position % kSlots]));
    }
};

/* Tiles of keys on their way from the filling warp to the warpgroups. */
template <int kStages>
struct KeyRing {
    uint8_t tiles[kStages][kTileBytes]; /* first: 1024-byte aligned */
    float scales[kStages][kTile];
    RingBarriers<kStages> barriers;

    /* The filling warp: tile `position` of all that pass through the ring is part `part` of `block`. NaN as scales
     * makes NaN of whatever the tile holds. */
    __device__ __forceinline__ void fill(const IndexerLogitsArguments& a, const CUtensorMap& cache, uint32_t position,
                                         int32_t block, int32_t part) {
        const uint32_t stage = position % kStages, barrier = barriers.filled(position), lane = threadIdx.x % 32;
        const bool is_there = is_block(a, block);
        barriers.await_empty(position);
        if (!is_there) {
            for (int i = lane; i < kTile; i += 32) scales[stage][i] = NAN;
            fence_async_proxy(); /* before a later copy to the same place */
        }
        __syncwarp();
        if (lane != 0) return;
        if (!is_there) {
            barrier_arrive(barrier);
            return;
        }
        barrier_arrive_expect(barrier, kTileBytes + kScaleBytes);
        copy_box(shared_address(tiles[stage]), cache, part * kTile, block, barrier);
        const int64_t offset = block * a.block_stride_bytes + a.scale_offset + part * kScaleBytes;
        copy_bulk(shared_address(scales[stage]), a.index_cache + offset, kScaleBytes, barrier);
    }
};

/* Block ids of a segment's tiles, read by a warp 32 at a time and one batch ahead. */
struct TileIds {
    const int32_t* row; /* of block_table; null: no request */
    int32_t first, count, parts;
    int32_t batch[2];

    __device__ __forceinline__ TileIds(const IndexerLogitsArguments& a, const Segment& segment, bool is_segment)
        : row(nullptr),
          first(segment.first_tile),
          count(is_segment ? segment.last_tile - segment.first_tile : 0),
          parts(a.block_size / kTile) {
        if (is_segment && segment.run.request != kNoRequest)
            row = a.block_table + (int64_t)segment.run.request * a.max_blocks;
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

/* ---- queries ----
 *
 * relu(x) = (x + |x|) / 2, and the part without the absolute value is linear in the key:
 *   2 sum_h w_h relu(x_h) = u . k + sum_h w_h |x_h|,   u = sum_h w_h q_h.
 * An absolute value is free in a multiply-add, so that a head costs one instruction instead of two, and u . k takes a
 * few more columns of the product. u is split into kPieces e4m3 numbers, each holding what the former left over times
 * kPieceStep: five bits a piece. */

constexpr int kPieces = 4;
constexpr float kPieceStep = 16.0f;

/* Columns of the product of kRows rows of kHeads heads: the heads, then column 8 (row / 2) + 2 piece + row % 2, so that
 * lane c of a quad holds piece c of every row. */
template <int kRows, int kHeads>
struct Columns {
    static constexpr int kCount = kRows * kHeads + (kRows + 1) / 2 * 8;
    static constexpr int kBytes = kCount * kDim;

    __device__ __forceinline__ static int piece(int row, int piece) {
        return kRows * kHeads + row / 2 * 8 + piece * 2 + row % 2;
    }
};

/* Where 16 bytes of a column lie: 128 bytes a column, swizzled in groups of 8. */
__device__ __forceinline__ int column_offset(int column, int sixteen) {
    return column * kDim + (sixteen ^ column % 8) * 16;
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

/* The exponent of the power of two that u is multiplied by, so that no number of it leaves e4m3: |u_d| <= 448
 * sum_h |w_h|. Weights with a sum below 2^-109 lose u . k, which is then below 2^-90 |k|. A whole warp. */
template <int kHeads>
__device__ __forceinline__ int piece_exponent(const float* row_weights) {
    float sum = 0.0f;
#pragma unroll
    for (int first = 0; first < kHeads; first += 32) sum += fabsf(row_weights[first + threadIdx.x % 32]);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const int exponent = (__float_as_int(448.0f * sum) >> 23 & 255) - 127; /* 448 sum < 2^(exponent + 1) */
    return 7 - max(exponent, -100);
}

/* The pieces of u for one row, whose heads are columns from `first_column` on; exponent: piece_exponent. A whole
 * warpgroup: threads 4 i .. 4 i + 3 take dims 4 i .. 4 i + 3, each a quarter of the heads and then one piece. */
template <int kHeads>
__device__ __forceinline__ void fold_heads(const float* row_weights, int exponent, uint8_t* query, int first_column,
                                           int piece_column) {
    const int piece = threadIdx.x % 4, dim_word = threadIdx.x % 128 / 4;
    float u[4] = {};
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i) {
        const int head = 4 * i + piece;
        const int offset = column_offset(first_column + head, dim_word / 4) + dim_word % 4 * 4;
        const uint32_t word = *reinterpret_cast<const uint32_t*>(query + offset);
        const float weight = row_weights[head];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(word >> 16 * pair), __NV_E4M3);
            const float2 numbers = __half22float2(__half2(halves));
            u[2 * pair] = fmaf(weight, numbers.x, u[2 * pair]);
            u[2 * pair + 1] = fmaf(weight, numbers.y, u[2 * pair + 1]);
        }
    }
    const float factor = power_of_two(exponent);
#pragma unroll
    for (int d = 0; d < 4; ++d) {
        u[d] += __shfl_xor_sync(~0u, u[d], 1);
        u[d] += __shfl_xor_sync(~0u, u[d], 2);
        u[d] *= factor;
    }
    uint32_t own = 0;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
        uint32_t word = 0;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const __nv_fp8x2_storage_t numbers =
                __nv_cvt_float2_to_fp8x2(make_float2(u[2 * pair], u[2 * pair + 1]), __NV_SATFINITE, __NV_E4M3);
            const float2 taken = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(numbers, __NV_E4M3)));
            u[2 * pair] = (u[2 * pair] - taken.x) * kPieceStep;
            u[2 * pair + 1] = (u[2 * pair + 1] - taken.y) * kPieceStep;
            word |= (uint32_t)numbers << 16 * pair;
        }
        if (p == piece) own = word;
    }
    *reinterpret_cast<uint32_t*>(query + column_offset(piece_column, dim_word / 4) + dim_word % 4 * 4) = own;
}

/* This thread's factors for some rows, halved: [row][2 j + e] is head 8 j + 2 (lane % 4) + e, the last one its piece of
 * u. */
template <int kRows, int kHeads>
__device__ __forceinline__ void own_weights(const float* shared_weights, const int (&exponents)[kRows],
                                            float (&weights)[kRows][kHeads / 4 + 1]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int j = 0; j < kHeads / 8; ++j) {
            const float2 pair =
                *reinterpret_cast<const float2*>(shared_weights + row * kHeads + 8 * j + threadIdx.x % 4 * 2);
            weights[row][2 * j] = 0.5f * pair.x;
            weights[row][2 * j + 1] = 0.5f * pair.y;
        }
        const int pieces_exponent = 4 * (threadIdx.x % 4); /* kPieceStep is 2^4 */
        weights[row][kHeads / 4] = power_of_two(-exponents[row] - 1 - pieces_exponent);
    }
}

/* ---- products and sums ---- */

/* The lower half of the descriptor of a tile that lies swizzled at a shared address. The upper half is the same for
 * all: kept apart, because additions of 64 bits cost twice as many instructions. */
__device__ __forceinline__ uint32_t descriptor_low(uint32_t address) {
    return (uint32_t)matrix_descriptor(address, 16, 8 * kDim, Swizzle::k128);
}

__device__ __forceinline__ uint64_t descriptor(uint32_t low) {
    return (matrix_descriptor(0, 16, 8 * kDim, Swizzle::k128) & ~(uint64_t)0xFFFFFFFF) | low;
}

/* d = keys x queries: 64 keys, 2 kCount heads, given by descriptor_low. Waits for the result. */
template <int kCount>
__device__ __forceinline__ void multiply(float (&d)[kCount], uint32_t keys, uint32_t query) {
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step)
        wgmma_e4m3(d, descriptor(keys + step * 2), descriptor(query + step * 2), step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep(d);
}

/* sums[row][i]: this lane's heads of the row, key lane / 4 + 8 i. */
template <int kRows, int kHeads>
__device__ __forceinline__ void weigh(const float (&d)[Columns<kRows, kHeads>::kCount / 2],
                                      const float (&weights)[kRows][kHeads / 4 + 1], float (&sums)[kRows][2]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            sums[row][i] = weights[row][kHeads / 4] * d[(kRows * kHeads / 8 + row / 2) * 4 + i * 2 + row % 2];
    }
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    sums[row][i] = fmaf(fabsf(d[(row * kHeads / 8 + j) * 4 + i * 2 + e]), weights[row][j * 2 + e],
                                        sums[row][i]);
            }
        }
    }
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
