/* Rows that fit the registers of a CTA: no guess, no candidates. */
#ifndef DSA_GPU_TOPK_SHORT_CUH_
#define DSA_GPU_TOPK_SHORT_CUH_

#include "topk_rank.cuh"
#include "topk_tile.cuh"

namespace dsa {
namespace gpu {
namespace topk {

struct ShortShared {
    RankShared rank;
    uint32_t warp_totals[32];
    uint32_t edges[kEdges];
    int32_t table[kMaxTableEntries];
};

/* Selects the best topk < row.length of a row that fits a tile; staged has room for topk positions. */
template <int kThreads, int kVectors>
__device__ __forceinline__ void select_short(const Problem& p, const Row& row, int64_t t, ShortShared& shared,
                                             int32_t* staged) {
    const Part part = {0, row.num_vectors()};
    const int32_t vector = first_vector_of_thread<kVectors>(part);
    float scores[kVectors][4];
    const uint32_t valid = load_whole<kVectors>(row, part, vector, scores);
    const int32_t at_edge = edge_place(row, part);
    float edge = 0;
    load_score_if(at_edge >= 0, row.vectors + at_edge, edge);
    const Table table = start_table<kThreads>(p, row, 0, row.length - 1, kMaxTableEntries, shared.table);
    start_ranking<kThreads>(shared.rank);
    uint32_t keys[4 * kVectors], largest = 0, smallest = ~0u;
#pragma unroll
    for (int j = 0; j < 4 * kVectors; ++j) keys[j] = valid >> j & 1 ? rank_key(scores[j / 4][j % 4]) : kNoKey;
    if (row.has_edges()) {
        if (threadIdx.x < kEdges) shared.edges[threadIdx.x] = at_edge >= 0 ? rank_key(edge) : kNoKey;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 4 * kVectors; ++j) {
            const int32_t of = vector + 32 * (j / 4);
            if (!(valid >> j & 1) && (of == 0 || of == row.end >> 2)) keys[j] = shared.edges[(of > 0 ? 4 : 0) + j % 4];
        }
    }
#pragma unroll
    for (int j = 0; j < 4 * kVectors; ++j) {
        largest = max(largest, keys[j]);
        smallest = min(smallest, keys[j] - 1); /* no key: the largest number */
    }
    uint32_t high, low;
    spread_of<kThreads>(shared.rank, largest, smallest, &high, &low);
    ++low;
    const auto visit = [&](const auto& use) {
#pragma unroll
        for (int j = 0; j < 4 * kVectors; ++j) use(keys[j]);
    };
    const Interval all = {low, high, (uint32_t)p.topk, 0};
    const Ranked threshold = key_of_rank<kThreads>(shared.rank, visit, all, low, high);
#if DSA_TOPK_HOPPER
    if (p.lets_next_start == kNearTheEnd) let_next_kernel_start();
#endif

    uint32_t chosen = 0;
#pragma unroll
    for (int j = 0; j < 4 * kVectors; ++j) chosen |= (uint32_t)(keys[j] >= threshold.key) << j;
    uint32_t first[kVectors];
    if (threshold.ties_kept < threshold.num_ties) {
        uint32_t tied = 0;
#pragma unroll
        for (int j = 0; j < 4 * kVectors; ++j) tied |= (uint32_t)(keys[j] == threshold.key) << j;
        places_of<kThreads, kVectors>(tied, shared.warp_totals, first, nullptr);
#pragma unroll
        for (int j = 0; j < 4 * kVectors; ++j)
            if (tied >> j & 1 && first[j / 4]++ >= threshold.ties_kept) chosen &= ~(1u << j);
        __syncthreads();
    }
    places_of<kThreads, kVectors>(chosen, shared.warp_totals, first, nullptr);
#pragma unroll
    for (int j = 0; j < 4 * kVectors; ++j)
    {
        const bool is_chosen = chosen >> j & 1;
        store_if(is_chosen, shared_address(staged) + 4 * first[j / 4], place_in_tile(vector, j) - row.skew);
        first[j / 4] += is_chosen;
    }
    copy_async_wait_all();
    __syncthreads();
    write_staged<kThreads>(p, row, t, table, staged);
}

template <int kThreads, int kVectors>
__global__ __launch_bounds__(kThreads, 1024 / kThreads) void topk_short_kernel(const __grid_constant__ Problem p) {
    __shared__ ShortShared shared;
    extern __shared__ int4 staged_memory[]; /* [topk] int32 */
#if DSA_TOPK_HOPPER
    wait_for_previous_kernel();
    if (p.lets_next_start == kAtOnce) let_next_kernel_start();
#endif
    const int64_t t = blockIdx.x;
    const Row row = row_of(p, t);
    if (row.length <= p.topk) {
        write_whole_row(p, row, t, threadIdx.x, kThreads);
        return;
    }
    select_short<kThreads, kVectors>(p, row, t, shared, (int32_t*)staged_memory);
}

}  // namespace topk
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_TOPK_SHORT_CUH_ */
