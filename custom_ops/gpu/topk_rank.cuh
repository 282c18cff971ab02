/* The key of a given rank among keys that a CTA holds in registers or shared memory. */
#ifndef DSA_GPU_TOPK_RANK_CUH_
#define DSA_GPU_TOPK_RANK_CUH_

#include "topk_row.cuh"

namespace dsa {
namespace gpu {
namespace topk {

constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
constexpr uint32_t kFew = 32;

struct FoundBin {
    uint32_t bin;
    uint32_t before; /* keys in the bins before it */
    uint32_t count;
};

/* bins and few are zero between uses, as start_ranking leaves them. */
struct __align__(16) RankShared {
    uint32_t bins[kBins + 32]; /* the last ones take what is not to be counted, one for each lane */
    uint32_t few[kFew]; /* the keys of the last interval */
    uint32_t few_cta[kFew];
    uint32_t num_few;
    FoundBin found[2];
    uint32_t warp_totals[32];
    uint32_t warp_highest[32], warp_lowest[32];
};

/* Where the wanted key is. */
struct Interval {
    uint32_t lowest, highest;
    uint32_t rank;  /* of the wanted key among the keys of the interval, from 1 */
    uint32_t count; /* keys of the interval */

    __device__ __forceinline__ bool contains(uint32_t key) const { return key >= lowest && key <= highest; }
    /* Its keys are all kept, so that `lowest` is as good a threshold as the wanted key. */
    __device__ __forceinline__ bool is_kept() const { return rank == count; }
};

struct Ranked {
    uint32_t key;
    uint32_t ties_kept; /* keys equal to it that are kept, if that is not all of them */
    uint32_t num_ties;
};

/* A barrier must follow. */
template <int kThreads>
__device__ __forceinline__ void start_ranking(RankShared& shared) {
#pragma unroll
    for (int i = 0; i < (kBins / 4 + kThreads - 1) / kThreads; ++i)
        if (kBins / 4 % kThreads == 0 || threadIdx.x < kBins / 4)
            ((uint4*)shared.bins)[threadIdx.x + i * kThreads] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < kFew) shared.few[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.num_few = 0;
}

/* The bins of two ranks (0: none), bin 0 first. Clears the bins; a barrier must come before they count again. */
template <int kThreads>
__device__ __forceinline__ void find_bins(RankShared& shared, uint32_t rank, uint32_t other_rank) {
    constexpr int kEach = kBins / kThreads;
    const uint32_t thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    uint32_t* bins = shared.bins + thread * kEach;
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += bins[i];
    const uint32_t of_warp = __reduce_add_sync(kFullWarp, sum);
    if (lane == 0) shared.warp_totals[warp] = of_warp;
    __syncthreads();
    const uint32_t of_lower = lane < warp ? shared.warp_totals[lane] : 0;
    uint32_t before = __reduce_add_sync(kFullWarp, of_lower);
    const auto holds = [&](uint32_t wanted, uint32_t count) { return before < wanted && wanted <= before + count; };
    if (holds(rank, of_warp) || holds(other_rank, of_warp)) {
        before += warp_inclusive_sum(sum, lane) - sum;
        if (holds(rank, sum) || holds(other_rank, sum)) {
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const uint32_t count = bins[i];
                if (holds(rank, count)) shared.found[0] = FoundBin{thread * kEach + i, before, count};
                if (holds(other_rank, count)) shared.found[1] = FoundBin{thread * kEach + i, before, count};
                before += count;
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEach; ++i) bins[i] = 0;
}

/* Counts the keys of the interval in even bins over low .. high, guesses that keys may exceed: such keys fall into the
 * end bins. Returns the width of a bin as a shift. */
template <int kThreads, class Visit>
__device__ __forceinline__ int count_bins(RankShared& shared, const Visit& visit, const Interval& interval,
                                          uint32_t low, uint32_t high) {
    const int bits = 32 - __clz(high - low);
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
    const uint32_t bins = shared_address(shared.bins), nowhere = kBins + (threadIdx.x & 31);
    visit([&](uint32_t key) {
        const uint32_t bin = (high - min(max(key, low), high)) >> shift;
        add_one(bins + 4 * (interval.contains(key) ? bin : nowhere));
    });
    __syncthreads();
    return shift;
}

__device__ __forceinline__ Interval interval_of(const FoundBin& found, const Interval& from, uint32_t low,
                                                uint32_t high, int shift) {
    Interval to = from;
    if (found.bin != (high - low) >> shift) to.lowest = high - ((found.bin + 1) << shift) + 1;
    if (found.bin != 0) to.highest = high - (found.bin << shift);
    to.rank -= found.before;
    to.count = found.count;
    return to;
}

/* Narrows the interval around the key of its rank until it holds one value, only kept keys, or at most `enough`.
 * visit(f) calls f(key) for every key of this thread. */
template <int kThreads, class Visit>
__device__ __forceinline__ Interval narrow(RankShared& shared, const Visit& visit, Interval interval, uint32_t low,
                                           uint32_t high, uint32_t enough) {
    for (;;) {
        const int shift = count_bins<kThreads>(shared, visit, interval, low, high);
        find_bins<kThreads>(shared, interval.rank, 0u);
        interval = interval_of(shared.found[0], interval, low, high, shift);
        if (interval.count <= enough || interval.lowest == interval.highest || interval.is_kept()) return interval;
        low = interval.lowest;
        high = interval.highest;
        __syncthreads();
    }
}

/* Lists the keys of the interval, at most kFew. Few threads have one: the visit is without a branch, and only a thread
 * with several goes through its keys again. */
template <class Visit>
__device__ __forceinline__ void list_few(RankShared& shared, const Visit& visit, const Interval& interval,
                                         uint32_t cta) {
    uint32_t count = 0, last = 0;
    visit([&](uint32_t key) {
        const bool is_in = interval.contains(key);
        count += is_in;
        last = is_in ? key : last;
    });
    if (count == 0) return;
    uint32_t at = atomicAdd(&shared.num_few, count);
    if (count == 1) {
        shared.few[at] = last;
        shared.few_cta[at] = cta;
        return;
    }
    visit([&](uint32_t key) {
        if (!interval.contains(key)) return;
        shared.few[at] = key;
        shared.few_cta[at++] = cta;
    });
}

/* The key of the interval's rank, whose keys are in `few`; found by every warp alike. */
__device__ __forceinline__ Ranked rank_few(const RankShared& shared, const Interval& interval) {
    const uint32_t lane = threadIdx.x & 31;
    const uint32_t key = shared.few[lane];
    uint32_t above = 0, equal = 0;
    for (uint32_t i = 0; i < interval.count; ++i) {
        const uint32_t other = __shfl_sync(kFullWarp, key, i);
        above += other > key;
        equal += other == key;
    }
    const bool wanted = lane < interval.count && above < interval.rank && interval.rank <= above + equal;
    const int at = __ffs(__ballot_sync(kFullWarp, wanted)) - 1;
    Ranked ranked;
    ranked.key = __shfl_sync(kFullWarp, key, at);
    ranked.ties_kept = interval.rank - __shfl_sync(kFullWarp, above, at);
    ranked.num_ties = __shfl_sync(kFullWarp, equal, at);
    return ranked;
}

/* The key of the interval's rank; or one that as many keys of the interval reach. */
template <int kThreads, class Visit>
__device__ __forceinline__ Ranked key_of_rank(RankShared& shared, const Visit& visit, const Interval& from,
                                              uint32_t low, uint32_t high) {
    const Interval interval = narrow<kThreads>(shared, visit, from, low, high, kFew);
    if (interval.is_kept() || interval.count > kFew) return Ranked{interval.lowest, interval.rank, interval.count};
    list_few(shared, visit, interval, 0u);
    __syncthreads();
    return rank_few(shared, interval);
}

/* Largest and smallest of what the threads bring; a barrier must come between two calls. */
template <int kThreads>
__device__ __forceinline__ void spread_of(RankShared& shared, uint32_t largest, uint32_t smallest, uint32_t* high,
                                          uint32_t* low) {
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    largest = __reduce_max_sync(kFullWarp, largest);
    smallest = __reduce_min_sync(kFullWarp, smallest);
    if (lane == 0) {
        shared.warp_highest[warp] = largest;
        shared.warp_lowest[warp] = smallest;
    }
    __syncthreads();
    *high = __reduce_max_sync(kFullWarp, lane < kThreads / 32 ? shared.warp_highest[lane] : 0u);
    *low = __reduce_min_sync(kFullWarp, lane < kThreads / 32 ? shared.warp_lowest[lane] : ~0u);
}

}  // namespace topk
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_TOPK_RANK_CUH_ */
