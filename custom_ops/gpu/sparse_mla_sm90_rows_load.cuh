/* sparse_mla on Hopper with cache rows as the M dimension: what a CTA reads. Producer warps copy rows into the ring,
 * the consumers bring the query into the order of their fragments.
 */
#ifndef DSA_GPU_SPARSE_MLA_SM90_ROWS_LOAD_CUH_
#define DSA_GPU_SPARSE_MLA_SM90_ROWS_LOAD_CUH_

#include "sparse_mla_sm90_rows.cuh"

namespace dsa {
namespace gpu {
namespace rows {

/* ---- the rows of a slot, 16 bytes a thread and copy ---- */

/* What a CTA works on: the tiles of a row's first `count` ids, shared out as evenly as whole tiles allow. */
struct Range {
    int32_t first; /* index into the row's ids */
    int32_t num_slots;
    int32_t count;
};

template <int kTileRows>
__device__ __forceinline__ Range range_of(int32_t count, int rank, int spread) {
    const int64_t all_tiles = ((int64_t)count + kTileRows - 1) / kTileRows;
    const int32_t first_tile = (int32_t)((uint64_t)(all_tiles * rank) / (uint32_t)spread);
    const int32_t num_tiles = (int32_t)((uint64_t)(all_tiles * (rank + 1)) / (uint32_t)spread) - first_tile;
    return {first_tile * kTileRows, num_tiles * (kTileRows / kSlotRows), count};
}

__device__ __forceinline__ const uint8_t* row_address(const Arguments& a, int32_t id) {
    const int32_t block = id / a.block_size;
    return a.latent_cache + block * a.block_stride_bytes + (int64_t)(id - block * a.block_size) * kRowBytes;
}

/* Lane 8 k + r of a producer warp knows the id of row r of the k-th slot of a batch: four slots wait for their ids only
 * once, and the next four ids are on their way meanwhile. -1 behind the range. */
constexpr int kBatch = 32 / kProducerRows;

__device__ __forceinline__ int32_t load_id(const int32_t* ids, const Range& range, int batch) {
    const uint32_t thread = threadIdx.x - kConsumers;
    const uint32_t slot = batch * kBatch + (thread & 31) / kProducerRows;
    const uint32_t i = range.first + slot * kSlotRows + thread / 32 * kProducerRows + thread % kProducerRows;
    return slot < (uint32_t)range.num_slots && i < (uint32_t)range.count ? __ldg(ids + i) : -1;
}

/* Rows of ids that do not count arrive as zeros and with a zero in `valid`. kFirstSlots: the rest waits until these
 * have arrived, so that the work begins sooner; 0 where memory is the limit. */
template <typename Memory, int kSlots, int kFirstSlots>
__device__ __forceinline__ void produce(const Arguments& a, Memory& shared, const int32_t* ids, const Range& range,
                                        int32_t next_id) {
    const int warp = (threadIdx.x >> 5) - kConsumerWarps;
    const int lane = threadIdx.x & 31;
    const uint32_t ring = shared_address(shared.ring) + warp * kProducerRows * kRowBytes + lane * 16;
    uint32_t valid = 0;
    uint64_t address = 0;
    for (int i = 0; i < range.num_slots; ++i) {
        const int slot = i % kSlots, in_batch = i % kBatch;
        if (in_batch == 0) {
            const int32_t id = next_id;
            next_id = load_id(ids, range, i / kBatch + 1);
            const bool is_valid = (uint32_t)id < (uint32_t)a.num_slots;
            valid = __ballot_sync(~0u, is_valid);
            /* nothing is read through the query's address, it only has to be one */
            address = (uint64_t)(is_valid ? row_address(a, id) : a.query);
        }
        if (i >= kSlots) barrier_wait(shared_address(&shared.free[slot]), (i / kSlots - 1) & 1);
        if (kFirstSlots > 0 && i == kFirstSlots) barrier_wait(shared_address(&shared.full[kFirstSlots - 1]), 0);
        const uint32_t slot_valid = valid >> (in_batch * kProducerRows) & 0xFF;
        if (lane == 0) shared.valid[slot][warp] = (uint8_t)slot_valid;
        const uint32_t to = ring + slot * kSlotBytes;
#pragma unroll
        for (int k = 0; k < (kProducerRows * kPieces + 31) / 32; ++k) {
            /* piece 32 k + lane of the warp's rows lies in the row of lane 0 or in the next one */
            const int row_of_lane_0 = 32 * k / kPieces, piece_of_lane_0 = 32 * k % kPieces;
            const bool is_next = lane >= kPieces - piece_of_lane_0;
            const int from_row = row_of_lane_0 + is_next;
            const uint64_t from = __shfl_sync(~0u, address, in_batch * kProducerRows + from_row) + lane * 16 +
                                  (piece_of_lane_0 - (is_next ? kPieces : 0)) * 16;
            if (from_row < kProducerRows)
                copy_async_16_or_zero(to + k * 512, (const uint8_t*)from, slot_valid >> from_row & 1);
        }
        const uint32_t full = shared_address(&shared.full[slot]);
        copy_async_arrive(full);
        if (lane == 0) barrier_arrive(full); /* for `valid` */
    }
    copy_async_wait_all();
}

/* ---- the query ---- */

/* Asks for the query to be brought into the L2, where the kernel before sees the same bytes, should it be writing
 * them. */
template <int kHeads>
__device__ __forceinline__ void prefetch_query(const Arguments& a, uint32_t token, int first_head, int rank,
                                               int spread) {
    constexpr int kLineBytes = 128;
    const uint8_t* query = a.query + ((int64_t)token * a.num_heads + first_head) * (kWidth * 2);
    const int bytes = min(kHeads, a.num_heads - first_head) * (kWidth * 2);
    for (int i = (rank * kThreads + threadIdx.x) * kLineBytes; i < bytes; i += spread * kThreads * kLineBytes)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(query + i));
}

/* 64 dims j: thread c of a fragment reads bytes 64 j + 16 c .. + 15 of a row at once, four for each of four k-steps;
 * the query has its dims in that order. Core matrices of 8 heads x 16 bytes, heads next to one another. */
template <int kHeads>
__device__ __forceinline__ uint32_t query_offset(int step, int c, int half, int head) {
    return (step * 2 + half) * kHeads * 16 + head * 16 + c * 4;
}

__device__ __forceinline__ uint32_t largest_magnitude(const uint4& v) {
    constexpr uint32_t kMagnitude = 0x7FFF7FFF;
    return __vmaxu2(__vmaxu2(v.x & kMagnitude, v.y & kMagnitude), __vmaxu2(v.z & kMagnitude, v.w & kMagnitude));
}

/* A group of 128 dims of a head. Four neighbouring lanes hold it: lane c the pieces of 8 dims 8 k + 2 c + e, which
 * become the words c of eight k-steps, so that the eight heads of a warp fill all banks with every store. */
constexpr int kPiecesOfLane = 4; /* (k, e): 2 k + e */

template <int kHeads, typename Memory>
__device__ __forceinline__ void store_latent_query(Memory& shared, const uint4 (&v)[kPiecesOfLane], int head, int group,
                                                   int c, float scale_log2) {
    uint32_t largest = __vmaxu2(__vmaxu2(largest_magnitude(v[0]), largest_magnitude(v[1])),
                                __vmaxu2(largest_magnitude(v[2]), largest_magnitude(v[3])));
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2)
        largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, distance));
    largest = max(largest & 0xFFFF, largest >> 16);
    /* the exponent field e of bfloat16; 2^(e - 127) becomes 2^8 */
    const uint32_t exponent = min(max(largest >> 7, 9u), 253u);
    const float factor = __uint_as_float((262 - exponent) << 23);
    if (c == 0) shared.query_scales[group][head] = __uint_as_float((exponent - 8) << 23) * scale_log2;
    uint8_t* to = shared.query + query_offset<kHeads>(group * 8, c, 0, head);
#pragma unroll
    for (int i = 0; i < kPiecesOfLane; ++i) {
        const uint32_t words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float low = __uint_as_float(words[w] << 16) * factor;
            const float high = __uint_as_float(words[w] & 0xFFFF0000) * factor;
            *(uint32_t*)(to + query_offset<kHeads>(2 * i + (w >> 1), 0, w & 1, 0)) = pack_f16(low, high);
        }
    }
}

/* Warps take eight heads of a group at a time. */
template <int kHeads, typename Memory>
__device__ __forceinline__ void load_query(const Arguments& a, Memory& shared, uint32_t token, int first_head) {
    constexpr int kRopePieces = kRope / 8;
    constexpr int kLoads = kHeads / 8 * kGroups / kConsumerWarps;
    const uint8_t* query = a.query + ((int64_t)token * a.num_heads + first_head) * (kWidth * 2);
    const int num_heads = a.num_heads - first_head;
    const int warp = threadIdx.x / 32, c = threadIdx.x % 4, head_of_eight = threadIdx.x % 32 / 4;
    uint4 latent[kLoads][kPiecesOfLane], rope = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
        const int item = warp + n * kConsumerWarps, group = item % kGroups, head = item / kGroups * 8 + head_of_eight;
        const uint8_t* from = query + head * (kWidth * 2) + group * 256 + c * 32;
#pragma unroll
        for (int i = 0; i < kPiecesOfLane; ++i) {
            latent[n][i] = make_uint4(0, 0, 0, 0);
            if (head < num_heads) latent[n][i] = load_16(from + (i >> 1) * 128 + (i & 1) * 16);
        }
    }
    const int rope_head = threadIdx.x / kRopePieces, rope_piece = threadIdx.x % kRopePieces;
    if (rope_head < kHeads && rope_head < num_heads)
        rope = load_16(query + rope_head * (kWidth * 2) + kLatent * 2 + rope_piece * 16);
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
        const int item = warp + n * kConsumerWarps;
        store_latent_query<kHeads>(shared, latent[n], item / kGroups * 8 + head_of_eight, item % kGroups, c,
                                   a.scale_log2);
    }
    if (rope_head < kHeads) {
        const int step = kSteps - kRopeSteps + rope_piece / 4 * 2, rope_c = rope_piece & 3;
        const uint32_t words[4] = {rope.x, rope.y, rope.z, rope.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            *(uint32_t*)(shared.query + query_offset<kHeads>(step + (i >> 1), rope_c, i & 1, rope_head)) = words[i];
    }
}

}  // namespace rows
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_SPARSE_MLA_SM90_ROWS_LOAD_CUH_ */
