/* Selection that reads the row again for every digit of the keys: any topk, any length, no room for candidates. The
 * kernels with candidates fall back to it where their guess fails; alone it serves topk beyond their room.
 *
 * The CTAs of a cluster share a row: each has a contiguous part, digits are counted together.
 */
#ifndef DSA_GPU_TOPK_RADIX_CUH_
#define DSA_GPU_TOPK_RADIX_CUH_

#include "topk_tile.cuh"

namespace dsa {
namespace gpu {
namespace topk {

constexpr int kMaxCtasPerRow = 16;
constexpr int kDigits = 256;
constexpr int kRadixVectors = 4; /* of a thread */

struct RadixShared {
    uint32_t bins[2][kDigits]; /* the other CTAs read one while the other is cleared */
    uint32_t around[2];        /* scores above the threshold, scores equal to it; of this CTA */
    uint32_t warp_totals[32];
    uint32_t digit, before;
};

/* One warp-wide count of equal digits where a whole warp agrees (long runs of close scores), else one each. */
__device__ __forceinline__ void count_digit(uint32_t* bins, bool counts, uint32_t digit, uint32_t lane) {
    const uint32_t active = __ballot_sync(kFullWarp, counts);
    if (active == 0) return;
    const uint32_t first = __shfl_sync(kFullWarp, digit, __ffs(active) - 1);
    const uint32_t agree = __ballot_sync(kFullWarp, counts && digit == first);
    if (lane == 0) atomicAdd(&bins[first], __popc(agree));
    if (counts && digit != first) atomicAdd(&bins[digit], 1u);
}

/* Finds the digit of the rank-th largest; all threads return it, and rank becomes the rank among keys of this digit. */
template <int kThreads, bool kClustered>
__device__ uint32_t merge_digits(RadixShared& shared, int pass, int num_ctas, uint32_t* rank) {
    row_sync<kClustered>();
    uint32_t count = 0;
    const uint32_t digit = kDigits - 1 - threadIdx.x; /* thread 0 has the largest */
    if (threadIdx.x < kDigits) {
        if (kClustered) {
            for (int cta = 0; cta < num_ctas; ++cta) count += load_remote_word(&shared.bins[pass & 1][digit], cta);
        } else {
            count = shared.bins[pass & 1][digit];
        }
        shared.bins[~pass & 1][digit] = 0;
    }
    const uint32_t before = exclusive_sum<kThreads>(count, shared.warp_totals, nullptr);
    if (before < *rank && *rank <= before + count) {
        shared.digit = digit;
        shared.before = before;
    }
    __syncthreads();
    *rank -= shared.before;
    return shared.digit;
}

/* Scores above a threshold and equal to it. */
struct Around {
    uint32_t above, equal;               /* of this CTA */
    uint32_t above_before, equal_before; /* of the CTAs before it */
    uint32_t row_above, row_equal;
};

template <int kThreads, bool kClustered>
__device__ Around count_around(const Row& row, const Part& part, int32_t cta, int num_ctas, uint32_t threshold,
                               RadixShared& shared) {
    const uint32_t lane = threadIdx.x & 31;
    __syncthreads();
    if (threadIdx.x < 2) shared.around[threadIdx.x] = 0;
    uint32_t above = 0, equal = 0;
    int32_t vector = first_vector_of_thread<kRadixVectors>(part);
    for (int32_t base = part.first; base < part.end;
         base += kThreads * kRadixVectors, vector += kThreads * kRadixVectors) {
        float scores[kRadixVectors][4];
        const uint32_t valid = load_tile<kRadixVectors>(row, part, vector, scores);
#pragma unroll
        for (int j = 0; j < 4 * kRadixVectors; ++j) {
            const uint32_t key = valid >> j & 1 ? rank_key(scores[j / 4][j % 4]) : kNoKey;
            above += key > threshold;
            equal += key == threshold;
        }
    }
    above = __reduce_add_sync(kFullWarp, above);
    equal = __reduce_add_sync(kFullWarp, equal);
    __syncthreads();
    if (lane == 0) {
        atomicAdd(&shared.around[0], above);
        atomicAdd(&shared.around[1], equal);
    }
    row_sync<kClustered>();
    const bool there = lane < num_ctas;
    above = there ? kClustered ? load_remote_word(&shared.around[0], lane) : shared.around[0] : 0;
    equal = there ? kClustered ? load_remote_word(&shared.around[1], lane) : shared.around[1] : 0;
    Around around;
    around.above = __shfl_sync(kFullWarp, above, cta);
    around.equal = __shfl_sync(kFullWarp, equal, cta);
    around.above_before = __reduce_add_sync(kFullWarp, lane < cta ? above : 0);
    around.equal_before = __reduce_add_sync(kFullWarp, lane < cta ? equal : 0);
    around.row_above = __reduce_add_sync(kFullWarp, above);
    around.row_equal = __reduce_add_sync(kFullWarp, equal);
    row_sync<kClustered>(); /* the counts may change again, or the CTA leave */
    return around;
}

/* The topk-th largest key. */
template <int kThreads, bool kClustered>
__device__ uint32_t key_by_digits(const Problem& p, const Row& row, const Part& part, int num_ctas,
                                  RadixShared& shared) {
    const uint32_t thread = threadIdx.x, lane = thread & 31;
    uint32_t rank = (uint32_t)p.topk, threshold = 0;
    __syncthreads(); /* the memory may have served something else */
    if (thread < kDigits) shared.bins[0][thread] = 0;
    __syncthreads();
    for (int pass = 0; pass < 4; ++pass) {
        const int shift = 24 - 8 * pass;
        uint32_t* bins = shared.bins[pass & 1];
        int32_t vector = first_vector_of_thread<kRadixVectors>(part);
        for (int32_t base = part.first; base < part.end;
             base += kThreads * kRadixVectors, vector += kThreads * kRadixVectors) {
            float scores[kRadixVectors][4];
            const uint32_t valid = load_tile<kRadixVectors>(row, part, vector, scores);
#pragma unroll
            for (int j = 0; j < 4 * kRadixVectors; ++j) {
                const uint32_t key = rank_key(scores[j / 4][j % 4]);
                const bool counts = (valid >> j & 1) && (pass == 0 || (key ^ threshold) >> (shift + 8) == 0);
                count_digit(bins, counts, key >> shift & (kDigits - 1), lane);
            }
        }
        threshold |= merge_digits<kThreads, kClustered>(shared, pass, num_ctas, &rank) << shift;
    }
    row_sync<kClustered>(); /* nobody reads the bins of others any more */
    return threshold;
}

/* Writes positions and slots of the row's best topk < row.length. plateau: a key that may be the topk-th largest, so
 * that the search for it can be left out; or kNoKey. */
template <int kThreads, bool kClustered>
__device__ __noinline__ void select_by_digits(const Problem& p, const Row row, int64_t t, int32_t cta, uint32_t plateau,
                                              RadixShared& shared) {
    const int num_ctas = kClustered ? p.ctas_per_row : 1;
    const Part part = part_of(row, cta, kClustered ? p.ctas_per_row_log2 : 0);
    const uint32_t topk = (uint32_t)p.topk;
    Around around = {};
    uint32_t threshold = plateau;
    if (plateau != kNoKey) around = count_around<kThreads, kClustered>(row, part, cta, num_ctas, threshold, shared);
    if (around.row_above >= topk || around.row_above + around.row_equal < topk) {
        threshold = key_by_digits<kThreads, kClustered>(p, row, part, num_ctas, shared);
        around = count_around<kThreads, kClustered>(row, part, cta, num_ctas, threshold, shared);
    }
    const uint32_t row_ties = topk - around.row_above;
    uint32_t ties_left = row_ties > around.equal_before ? min(row_ties - around.equal_before, around.equal) : 0;
    uint32_t left = around.above + ties_left;
    const int64_t output = t * p.topk + around.above_before + min(around.equal_before, row_ties);
    int32_t* positions = p.positions + output;
    int32_t* slots = p.slot_ids + output;
    if (cta == 0 && threadIdx.x == 0) p.counts[t] = p.topk;

    int32_t vector = first_vector_of_thread<kRadixVectors>(part);
    uint32_t written = 0;
    for (int32_t base = part.first; written < left && base < part.end; base += kThreads * kRadixVectors) {
        float scores[kRadixVectors][4];
        const uint32_t valid = load_tile<kRadixVectors>(row, part, vector, scores);
        uint32_t chosen = 0, tied = 0, first[kRadixVectors], total;
#pragma unroll
        for (int j = 0; j < 4 * kRadixVectors; ++j) {
            const uint32_t key = valid >> j & 1 ? rank_key(scores[j / 4][j % 4]) : kNoKey;
            chosen |= (uint32_t)(key > threshold) << j;
            tied |= (uint32_t)(key == threshold) << j;
        }
        __syncthreads();
        if (ties_left > 0) {
            places_of<kThreads, kRadixVectors>(tied, shared.warp_totals, first, &total);
#pragma unroll
            for (int j = 0; j < 4 * kRadixVectors; ++j)
                if (tied >> j & 1 && first[j / 4]++ < ties_left) chosen |= 1u << j;
            ties_left -= min(total, ties_left);
            __syncthreads();
        }
        places_of<kThreads, kRadixVectors>(chosen, shared.warp_totals, first, &total);
#pragma unroll
        for (int j = 0; j < 4 * kRadixVectors; ++j) {
            if (!(chosen >> j & 1)) continue;
            const uint32_t place = written + first[j / 4]++;
            const int32_t position = place_in_tile(vector, j) - row.skew;
            positions[place] = position;
            slots[place] = slot_of(p, row, position);
        }
        written += total;
        vector += kThreads * kRadixVectors;
    }
}

}  // namespace topk
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_TOPK_RADIX_CUH_ */
