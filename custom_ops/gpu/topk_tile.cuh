/* Tiles: what a CTA reads at a time, kVectors vectors a thread. A warp's part of a tile is contiguous, vector v of
 * lane l is its vector 32 * v + l; bit 4 * v + i of a mask is score i of a thread's vector v. */
#ifndef DSA_GPU_TOPK_TILE_CUH_
#define DSA_GPU_TOPK_TILE_CUH_

#include "topk_row.cuh"

namespace dsa {
namespace gpu {
namespace topk {

/* The vectors of a CTA: whole groups of eight, so that no two CTAs share 32 places. */
struct Part {
    int32_t first;
    int32_t end;
};

__device__ __forceinline__ Part part_of(const Row& row, int32_t rank, int32_t num_parts_log2) {
    const int32_t vectors = row.num_vectors();
    const int32_t each = (((vectors + (1 << num_parts_log2) - 1) >> num_parts_log2) + 7) & ~7;
    Part part;
    part.first = (int32_t)min((int64_t)rank * each, (int64_t)vectors);
    part.end = min(part.first + each, vectors);
    return part;
}

template <int kVectors>
__device__ __forceinline__ int32_t first_vector_of_thread(const Part& part) {
    return part.first + (int32_t)((threadIdx.x & ~31) * kVectors + (threadIdx.x & 31));
}

/* The vectors of a tile that lie in the row as a whole; the scores of others become 0. `vector` is the thread's first.
 * Returns a bit for each score loaded. The loads are waited for where the scores are used, not here: there must be no
 * branch after which registers would have to be merged. */
template <int kVectors>
__device__ __forceinline__ uint32_t load_whole(const Row& row, const Part& part, int32_t vector,
                                               float (&scores)[kVectors][4]) {
    const uint32_t first = (uint32_t)row.first_whole();
    const uint32_t num_whole = (uint32_t)max(min(part.end, row.end_whole()) - (int32_t)first, 0);
    const float* from = row.vectors + 4 * (int64_t)vector;
    uint32_t valid = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const bool is_whole = (uint32_t)(vector + 32 * v) - first < num_whole;
        scores[v][0] = scores[v][1] = scores[v][2] = scores[v][3] = 0;
        load_vector_if(is_whole, from + 128 * v, scores[v]);
        valid |= is_whole ? 15u << 4 * v : 0;
    }
    return valid;
}

/* All scores of a tile that belong to the part. */
template <int kVectors>
__device__ __forceinline__ uint32_t load_tile(const Row& row, const Part& part, int32_t vector,
                                              float (&scores)[kVectors][4]) {
    uint32_t valid = load_whole<kVectors>(row, part, vector, scores);
    if (!row.has_edges()) return valid;
#pragma unroll
    for (int j = 0; j < 4 * kVectors; ++j) {
        const int32_t place = 4 * (vector + 32 * (j / 4)) + j % 4;
        const bool inside = place < 4 * part.end && place >= row.skew && place < row.end && !(valid >> j & 1);
        load_score_if(inside, row.vectors + place, scores[j / 4][j % 4]);
        valid |= (uint32_t)inside << j;
    }
    return valid;
}

/* The scores of a part that load_whole leaves out are in at most two vectors, the row's first and last: eight threads
 * have one each. */
constexpr int kEdges = 8;

/* The place of this thread's one, or -1. */
__device__ __forceinline__ int32_t edge_place(const Row& row, const Part& part) {
    const int32_t thread = threadIdx.x, last = row.end >> 2;
    const bool is_first = thread < 4;
    const int32_t vector = is_first ? 0 : last;
    const int32_t place = 4 * vector + (thread & 3);
    const bool is_partial = is_first ? row.skew > 0 || last == 0 : last > 0;
    const bool exists = thread < kEdges && is_partial && vector >= part.first && vector < part.end;
    return exists && place >= row.skew && place < row.end ? place : -1;
}

__device__ __forceinline__ int32_t place_in_tile(int32_t vector, int j) { return 4 * (vector + 32 * (j / 4)) + j % 4; }

/* Output places of a warp's scores, which lie vector by vector: first[v] is that of the first chosen one of this
 * thread's vector v. Bit 4 * v + i of `chosen` is score i of vector v. total: of the CTA, may be null. warp_totals as
 * for exclusive_sum. */
template <int kThreads, int kVectors>
__device__ __forceinline__ void places_of(uint32_t chosen, uint32_t* warp_totals,
                                          uint32_t (&first)[kVectors], uint32_t* total) {
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    /* Counts of the four nibbles, one in each byte: a warp's sums stay below 129. */
    uint32_t counts = chosen - (chosen >> 1 & 0x5555);
    counts = (counts & 0x3333) + (counts >> 2 & 0x3333);
    counts = (counts | counts << 8) & 0x00FF00FF;
    counts = (counts | counts << 4) & 0x0F0F0F0F;
    const uint32_t inclusive = warp_inclusive_sum(counts, lane);
    const uint32_t totals = __shfl_sync(kFullWarp, inclusive, 31);
    if (lane == 0) warp_totals[warp] = __dp4a(totals, 0x01010101u, 0u);
    __syncthreads();
    const uint32_t of_lane = lane < kThreads / 32 ? warp_totals[lane] : 0;
    const uint32_t before = __reduce_add_sync(kFullWarp, lane < warp ? of_lane : 0);
    if (total) *total = __reduce_add_sync(kFullWarp, of_lane);
    const uint32_t exclusive = inclusive - counts;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
        first[v] = before + __dp4a(totals, 0x01010101u & ((1u << 8 * v) - 1), 0u) + (exclusive >> 8 * v & 0xFF);
}

}  // namespace topk
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_TOPK_TILE_CUH_ */
