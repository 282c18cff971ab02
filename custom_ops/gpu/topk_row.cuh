/* What the kernels of topk_slots share: the row of a CTA, the order of its scores, and how results are written.
 *
 * Rows need not start on 16 bytes. A row is read as vectors of four scores from the aligned address at or before its
 * start; `place` counts scores from there, so that position = place - skew. Vectors that reach outside the row are read
 * score by score: nothing before the row and nothing from its length on is touched.
 */
#ifndef DSA_GPU_TOPK_ROW_CUH_
#define DSA_GPU_TOPK_ROW_CUH_

#include <cuda_runtime.h>
#include <stdint.h>

#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DSA_TOPK_HOPPER 1
#else
#define DSA_TOPK_HOPPER 0
#endif

namespace dsa {
namespace gpu {
namespace topk {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

/* When the next kernel may start, to wait for this one. What a launch fetches of the next one's code does not last: too
 * early costs more than it hides. */
enum { kNever = 0, kNearTheEnd = 1, kAtOnce = 2, kAfterCollecting = 3 };

struct Problem {
    const float* logits;
    const int32_t* lengths;
    const int32_t* block_table;
    const int32_t* request_ids;
    int32_t* positions;
    int32_t* slot_ids;
    int32_t* counts;
    int64_t logits_stride;
    int32_t max_length; /* logits_width, or the tokens of a whole block table if those are fewer */
    int32_t num_requests;
    int32_t max_blocks;
    int32_t num_blocks;
    int32_t block_size;
    int32_t topk;
    uint32_t block_size_inverse; /* position / block_size = position * inverse >> shift, exact for 31 bits */
    int32_t block_size_shift;
    int32_t ctas_per_row; /* a power of two */
    int32_t ctas_per_row_log2;
    int32_t lets_next_start;
    bool is_aligned; /* all rows start on 16 bytes */
};

/* ---- order of scores as unsigned integers ---- */

/* No score. */
constexpr uint32_t kNoKey = 0;
constexpr uint32_t kNanKey = 1;
constexpr uint32_t kMinusInfinityKey = 0x007FFFFFu;
constexpr uint32_t kPlusZeroKey = 0x80000000u; /* of -0, too: no score has the key below */

__device__ __forceinline__ uint32_t rank_key(float score) {
    const uint32_t bits = __float_as_uint(score);
    uint32_t key = bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
    key += key == kPlusZeroKey - 1;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? kNanKey : key;
}

/* The score that `score >= result` compares with where `rank_key(score) >= key` is meant, NaN apart. */
__device__ __forceinline__ float score_of_key(uint32_t key) {
    if (key < kMinusInfinityKey) key = kMinusInfinityKey;
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

/* ---- rows ---- */

struct Row {
    const float* vectors; /* 16-byte aligned */
    const int32_t* blocks; /* null: wrong request id */
    int32_t skew;
    int32_t length;
    int32_t end; /* place behind the last score */

    __device__ __forceinline__ int32_t num_vectors() const { return (end + 3) >> 2; }
    /* Vectors that lie in the row as a whole. */
    __device__ __forceinline__ int32_t first_whole() const { return (skew + 3) >> 2; }
    __device__ __forceinline__ int32_t end_whole() const { return end >> 2; }
    __device__ __forceinline__ bool has_edges() const { return ((skew | end) & 3) != 0; }
};

/* Loads into registers that keep their value otherwise: no branch whose ends would have to wait for the load. */
__device__ __forceinline__ void load_vector_if(bool wanted, const float* from, float (&scores)[4]) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n}\n"
                 : "+f"(scores[0]), "+f"(scores[1]), "+f"(scores[2]), "+f"(scores[3])
                 : "l"(from), "r"((uint32_t)wanted)
                 : "memory");
}

__device__ __forceinline__ void load_score_if(bool wanted, const float* from, float& score) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.cg.f32 %0, [%1];\n}\n"
                 : "+f"(score)
                 : "l"(from), "r"((uint32_t)wanted)
                 : "memory");
}

__device__ __forceinline__ Row row_of(const Problem& p, int64_t t) {
    Row row;
    const int32_t request = p.request_ids[t];
    const int32_t wanted = p.lengths[t];
    row.length = wanted < 0 ? 0 : wanted < p.max_length ? wanted : p.max_length;
    row.blocks = request >= 0 && request < p.num_requests ? p.block_table + (int64_t)request * p.max_blocks : nullptr;
    const uintptr_t start = (uintptr_t)(p.logits + t * p.logits_stride);
    row.vectors = (const float*)(start & ~(uintptr_t)15);
    row.skew = (int32_t)(start & 15) >> 2;
    row.end = row.skew + row.length;
    return row;
}

/* ---- results ---- */

__device__ __forceinline__ int32_t block_index(const Problem& p, int32_t position) {
    return (int32_t)((uint64_t)(uint32_t)position * p.block_size_inverse >> p.block_size_shift);
}

__device__ __forceinline__ int32_t slot_in_block(const Problem& p, int32_t block, int32_t index, int32_t position) {
    return (uint32_t)block < (uint32_t)p.num_blocks ? block * p.block_size + (position - index * p.block_size) : -1;
}

__device__ __forceinline__ int32_t slot_of(const Problem& p, const Row& row, int32_t position) {
    if (!row.blocks) return -1;
    const int32_t index = block_index(p, position);
    return slot_in_block(p, __ldg(row.blocks + index), index, position);
}

/* Block ids that a CTA may need, copied to shared memory while it does something else. */
constexpr int kMaxTableEntries = 2048;

struct Table {
    int32_t* entries;
    int32_t first;
    bool is_used;
};

__device__ __forceinline__ void copy_word_async(void* to_shared, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to_shared)), "l"(from) : "memory");
}

/* For positions first .. last, where `room` entries are enough. Wait with copy_async_wait_all and a barrier. */
template <int kThreads>
__device__ __forceinline__ Table start_table(const Problem& p, const Row& row, int32_t first, int32_t last,
                                             int32_t room, int32_t* entries) {
    Table table;
    table.entries = entries;
    table.first = block_index(p, first);
    const int32_t count = block_index(p, last) - table.first + 1;
    table.is_used = row.blocks && count <= room;
    if (table.is_used)
        for (int32_t i = threadIdx.x; i < count; i += kThreads)
            copy_word_async(entries + i, row.blocks + table.first + i);
    return table;
}

__device__ __forceinline__ int32_t slot_of(const Problem& p, const Row& row, const Table& table, int32_t position) {
    if (!table.is_used) return slot_of(p, row, position);
    const int32_t index = block_index(p, position);
    return slot_in_block(p, table.entries[index - table.first], index, position);
}

/* Writes the positions staged in output order, which fill the row. */
template <int kThreads>
__device__ __forceinline__ void write_staged(const Problem& p, const Row& row, int64_t t, const Table& table,
                                             const int32_t* staged) {
    int32_t* positions = p.positions + t * p.topk;
    int32_t* slots = p.slot_ids + t * p.topk;
    if (threadIdx.x == 0) p.counts[t] = p.topk;
    if ((p.topk & 3) == 0 && (((uintptr_t)positions | (uintptr_t)slots) & 15) == 0) {
        for (int32_t i = threadIdx.x; i < p.topk / 4; i += kThreads) {
            const int4 four = ((const int4*)staged)[i];
            ((int4*)positions)[i] = four;
            ((int4*)slots)[i] = make_int4(slot_of(p, row, table, four.x), slot_of(p, row, table, four.y),
                                          slot_of(p, row, table, four.z), slot_of(p, row, table, four.w));
        }
        return;
    }
    for (int32_t i = threadIdx.x; i < p.topk; i += kThreads) {
        positions[i] = staged[i];
        slots[i] = slot_of(p, row, table, staged[i]);
    }
}

/* A row that keeps all its positions; `thread` of `num_threads` may span CTAs. */
__device__ __forceinline__ void write_whole_row(const Problem& p, const Row& row, int64_t t, int32_t thread,
                                                int32_t num_threads) {
    int32_t* positions = p.positions + t * p.topk;
    int32_t* slots = p.slot_ids + t * p.topk;
    for (int64_t i = thread; i < p.topk; i += num_threads) {
        const bool kept = i < row.length;
        positions[i] = kept ? (int32_t)i : -1;
        slots[i] = kept ? slot_of(p, row, (int32_t)i) : -1;
    }
    if (thread == 0) p.counts[t] = row.length;
}

/* ---- shared memory without branches: a branch around each of many stores costs more than the stores ---- */

__device__ __forceinline__ void add_one(uint32_t address) {
    asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address) : "memory");
}

__device__ __forceinline__ void store_if(bool wanted, uint32_t address, uint32_t value) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p st.shared.u32 [%0], %1;\n}\n" ::"r"(address),
                 "r"(value), "r"((uint32_t)wanted)
                 : "memory");
}

__device__ __forceinline__ void store_pair_if(bool wanted, uint32_t address, uint32_t first, uint32_t second) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p st.shared.v2.u32 [%0], {%1, %2};\n}\n" ::"r"(address),
                 "r"(first), "r"(second), "r"((uint32_t)wanted)
                 : "memory");
}

/* What atomicAdd does, for one lane, without the code that looks for other lanes. */
__device__ __forceinline__ uint32_t add_shared(uint32_t* word, uint32_t value) {
    uint32_t before;
    asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(shared_address(word)), "r"(value) : "memory");
    return before;
}

/* ---- warps and CTAs ---- */

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value, uint32_t lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = __shfl_up_sync(kFullWarp, value, step);
        if (lane >= (uint32_t)step) value += below;
    }
    return value;
}

/* Sum over the threads before this one; every warp leaves its total in warp_totals, which must not be in use and must
 * not be written again before the next barrier. */
template <int kThreads>
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t value, uint32_t* warp_totals, uint32_t* total) {
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint32_t inclusive = warp_inclusive_sum(value, lane);
    if (lane == 31) warp_totals[warp] = inclusive;
    __syncthreads();
    const uint32_t of_lane = lane < kThreads / 32 ? warp_totals[lane] : 0;
    const uint32_t before = __reduce_add_sync(kFullWarp, lane < warp ? of_lane : 0);
    if (total) *total = __reduce_add_sync(kFullWarp, of_lane);
    return before + inclusive - value;
}

/* ---- clusters: nothing where a row has one CTA ---- */

template <bool kClustered>
__device__ __forceinline__ void row_arrive() {
#if DSA_TOPK_HOPPER
    if (kClustered) {
        __syncwarp();
        cluster_arrive();
    }
#endif
}

template <bool kClustered>
__device__ __forceinline__ void row_wait() {
#if DSA_TOPK_HOPPER
    if (kClustered) cluster_wait();
#endif
}

/* Barrier among the CTAs of a row; without a cluster, among the threads of the CTA. */
template <bool kClustered>
__device__ __forceinline__ void row_sync() {
    if (kClustered) {
        row_arrive<kClustered>();
        row_wait<kClustered>();
    } else {
        __syncthreads();
    }
}

/* Address of a word in the shared memory of another CTA of the cluster. */
__device__ __forceinline__ uint32_t remote_word(const uint32_t* word, uint32_t rank) {
#if DSA_TOPK_HOPPER
    return remote_address(shared_address(word), rank);
#else
    return 0;
#endif
}

__device__ __forceinline__ uint32_t load_remote_word(const uint32_t* word, uint32_t rank) {
    uint32_t value = 0;
#if DSA_TOPK_HOPPER
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote_word(word, rank)) : "memory");
#endif
    return value;
}

/* Arrives and makes nothing visible: the first barrier of a cluster only says that the CTA runs. */
template <bool kClustered>
__device__ __forceinline__ void row_arrive_relaxed() {
#if DSA_TOPK_HOPPER
    if (kClustered) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

/* Stores a word in another CTA and counts it at that CTA's barrier: no fence, as a release by all threads would be. */
__device__ __forceinline__ void store_async_word(uint32_t remote, uint32_t value, uint32_t remote_barrier) {
#if DSA_TOPK_HOPPER
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote), "r"(value),
                 "r"(remote_barrier)
                 : "memory");
#endif
}

__device__ __forceinline__ void store_async_words(uint32_t remote, uint4 four, uint32_t remote_barrier) {
#if DSA_TOPK_HOPPER
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];"
                 :
                 : "r"(remote), "r"(four.x), "r"(four.y), "r"(four.z), "r"(four.w), "r"(remote_barrier)
                 : "memory");
#endif
}

/* One arrival at the barrier of another CTA, which then expects so many more bytes. Relaxed: what store_async sends is
 * seen by whoever waits for its bytes, and a release would wait for all earlier stores. */
__device__ __forceinline__ void arrive_expect_remote(uint32_t remote_barrier, uint32_t bytes) {
#if DSA_TOPK_HOPPER
    asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(remote_barrier),
                 "r"(bytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void store_remote_word(uint32_t remote, uint32_t value) {
#if DSA_TOPK_HOPPER
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(value) : "memory");
#endif
}

}  // namespace topk
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_TOPK_ROW_CUH_ */
