/* Long rows, topk up to kMaxCandidateTopk: a sample of the row gives two scores, one that a few more than topk reach
 * and one that a few less exceed. Scores above both are kept at once, as bits; those between are collected, and the
 * threshold is found among them. The row is read once.
 *
 *   sample     the same scores in every CTA of the row
 *   collect    each CTA: bits of the sure scores of its part, keys and places of the uncertain ones in any order
 *   exchange   every CTA gets the uncertain keys of all (clusters only)
 *   rank       every CTA finds the threshold and, from the CTAs before it, its first output place
 *   write      the kept ones become bits too; their prefix sum is the order of positions
 *
 * Nothing depends on the order in which scores were collected. Where the guess was wrong or the uncertain too many
 * (long runs of equal scores), all CTAs of the row see it from the same counts and select by digits instead.
 *
 * A row is latency, not bandwidth: about 5 cycles for every instruction of a thread, whatever it waits for. Hence code
 * without branches, no thread more than a tile needs, and no fence that waits for global memory.
 */
#ifndef DSA_GPU_TOPK_SAMPLED_CUH_
#define DSA_GPU_TOPK_SAMPLED_CUH_

#include "topk_radix.cuh"
#include "topk_rank.cuh"
#include "topk_short.cuh"

namespace dsa {
namespace gpu {
namespace topk {

constexpr int32_t kMaxCandidateTopk = 4096;
constexpr int kSampleVectors = 512;
constexpr int kSamples = 4 * kSampleVectors;
constexpr uint32_t kGatheredKeys = 8192; /* of a row shared by CTAs */
constexpr uint32_t kTooMany = ~0u;

struct __align__(16) SampledShared {
    uint64_t barrier; /* of the exchange */
    RankShared rank;
    RadixShared radix;
    uint32_t warp_totals[32];
    uint32_t num_uncertain;
    uint32_t num_sure;
    uint32_t counts[kMaxCtasPerRow]; /* written by every CTA: uncertain ones | sure ones << 16 */
    uint32_t above[kMaxCtasPerRow];
    uint32_t equal[kMaxCtasPerRow];
    uint32_t above_before;
    uint32_t verdict[2]; /* threshold, ties kept in the row */
};

/* Sizes of the dynamic shared memory behind SampledShared, in words, multiples of four:
 *
 *   bits        of a part's places, bit place % 32 of word place / 32, whole tiles
 *   uncertain   two words each: score, as bits of float32, and place
 *   table       block ids
 *   staged      positions in output order; in clusters they take the place of `gathered`
 *   gathered    uncertain keys of the row; only in clusters
 */
struct Room {
    int32_t bits;
    int32_t capacity;
    int32_t table;
    int32_t staged;
    int32_t gathered;
};

/* What a CTA found in its part. Places count from the part's first. */
struct Found {
    uint32_t* bits;
    uint2* uncertain; /* score, place */
    uint32_t count;

    __device__ __forceinline__ uint32_t key(uint32_t i) const { return rank_key(__uint_as_float(uncertain[i].x)); }
};

/* ---- sample ---- */

/* Keys above `high` are in, keys below `low` are out. */
struct Guess {
    uint32_t low, high;
    uint32_t highest; /* of the sample */
    uint32_t plateau; /* a key that many scores of the sample have, where low is; else kNoKey */
};

/* Ranks in the sample that enclose that of the threshold by four standard deviations; high 0: none. */
__device__ __forceinline__ void sample_ranks(int32_t topk, int32_t length, uint32_t* low, uint32_t* high) {
    const float expected = (float)kSamples * (float)topk / (float)length;
    const float margin = 4.0f * sqrtf(expected) + 4.0f;
    *low = (uint32_t)fminf(ceilf(expected + margin), (float)kSamples);
    *high = (uint32_t)fmaxf(expected - margin, 0.0f);
}

/* Vectors spread evenly over the row, with a fixed jitter against periodic scores; none reaches outside the row. */
__device__ __forceinline__ int32_t sample_vector(const Row& row, uint32_t i) {
    const uint32_t whole = (uint32_t)((row.length - 3) >> 2);
    const uint32_t first = (uint32_t)(row.skew + 3) >> 2;
    const uint32_t jitter = i * 2654435769u >> 23; /* below 512 */
    return (int32_t)(first + __umulhi(i << 23 | jitter << 14, whole)); /* i: 9 bits */
}

template <int kThreads, int kEach>
__device__ __forceinline__ Guess guess_from_sample(const Problem& p, const Row& row, SampledShared& shared,
                                                   const float (&scores)[kEach][4]) {
    uint32_t rank_low, rank_high;
    sample_ranks(p.topk, row.length, &rank_low, &rank_high);
    uint32_t keys[4 * kEach], largest = 0;
#pragma unroll
    for (int i = 0; i < 4 * kEach; ++i) {
        keys[i] = rank_key(scores[i / 4][i % 4]);
        largest = max(largest, keys[i]);
    }
    /* The smallest maximum of some groups of 32 lies near the best tenth of the sample. */
    const uint32_t group = __reduce_max_sync(kFullWarp, keys[0]);
    Guess guess;
    uint32_t low;
    spread_of<kThreads>(shared.rank, largest, group, &guess.highest, &low);
    const uint32_t width = guess.highest - low;
    low = low > width ? low - width : kNoKey + 1;
    const auto visit = [&](const auto& use) {
#pragma unroll
        for (int i = 0; i < 4 * kEach; ++i) use(keys[i]);
    };
    const Interval all = {kNoKey + 1, ~0u, rank_low, 0};
    const int shift = count_bins<kThreads>(shared.rank, visit, all, low, guess.highest);
    find_bins<kThreads>(shared.rank, rank_low, rank_high);
    const uint32_t enough = rank_low / 8 + 8;
    Interval interval = interval_of(shared.rank.found[0], all, low, guess.highest, shift);
    const uint32_t high_bin = shared.rank.found[1].bin;
    guess.high = rank_high == 0 || high_bin == 0 ? ~0u : guess.highest - (high_bin << shift);
    /* Scores above score_of_key(high) must be those with larger keys: not so below -inf, nor where no score has it. */
    guess.high = max(guess.high, kMinusInfinityKey);
    if (guess.high == kPlusZeroKey - 1) guess.high = kPlusZeroKey;
    if (interval.count > enough && interval.lowest != interval.highest) {
        __syncthreads();
        interval = narrow<kThreads>(shared.rank, visit, interval, interval.lowest, interval.highest, enough);
    }
    guess.plateau = interval.count > enough ? interval.lowest : kNoKey;
    guess.low = rank_low < kSamples ? interval.lowest : kNoKey + 1;
    return guess;
}

/* ---- collect ---- */

/* Bits of a warp's part of a tile, all of them: two lanes have the two halves of every byte. */
template <int kTileVectors>
__device__ __forceinline__ void store_bits(uint8_t* bytes, uint32_t mask) {
    const uint32_t lane = threadIdx.x & 31;
    const uint32_t other = __shfl_xor_sync(kFullWarp, mask, 1);
    const uint32_t even = lane & 1 ? other : mask, odd = lane & 1 ? mask : other;
    /* The even lane stores vectors 0 and, of four, 2; the odd one vectors 1 and 3. */
    static_assert(kTileVectors == 2 || kTileVectors == 4, "");
    const uint32_t two = lane & 1 ? (even >> 4 & 0x0F0F) | (odd & 0xF0F0) : (even & 0x0F0F) | (odd & 0x0F0F) << 4;
    uint8_t* first = bytes + (lane >> 1) + (lane & 1 ? 16 : 0);
    first[0] = (uint8_t)two;
    if (kTileVectors == 4) first[32] = (uint8_t)(two >> 8);
}

/* Scores that decide: sure above `high`, else uncertain from `low` on. all: NaN, too, is uncertain. */
struct Limits {
    float low, high;
    bool all;
};

/* One tile: bits of its sure scores, whose number is returned, and its uncertain ones behind those found before. Where
 * those do not fit, they are only counted. One prefix sum of the lanes' counts: a ballot for each score would wait for
 * the population count unit. */
template <int kTileVectors>
__device__ __forceinline__ uint32_t collect(SampledShared& shared, const Found& found, uint32_t capacity,
                                            uint32_t vector, const float (&scores)[kTileVectors][4], uint32_t valid,
                                            const Limits& limits) {
    const uint32_t lane = threadIdx.x & 31;
    uint32_t reach = 0, sure = 0;
#pragma unroll
    for (int j = 0; j < 4 * kTileVectors; ++j) {
        if (scores[j / 4][j % 4] >= limits.low || limits.all) reach |= 1u << j;
        if (scores[j / 4][j % 4] > limits.high) sure |= 1u << j;
    }
    sure &= valid;
    store_bits<kTileVectors>((uint8_t*)found.bits + (vector >> 5) * 16, sure);
    const uint32_t uncertain = reach & valid & ~sure;
    if (!__any_sync(kFullWarp, uncertain)) return __popc(sure);
    const uint32_t count = __popc(uncertain);
    const uint32_t inclusive = warp_inclusive_sum(count, lane);
    const uint32_t total = __shfl_sync(kFullWarp, inclusive, 31);
    uint32_t at = 0;
    if (lane == 0) at = add_shared(&shared.num_uncertain, total);
    at = __shfl_sync(kFullWarp, at, 0);
    if (at + total > capacity) return __popc(sure);
    uint32_t next = shared_address(found.uncertain + at + inclusive - count);
#pragma unroll
    for (int j = 0; j < 4 * kTileVectors; ++j) {
        const bool is_uncertain = uncertain >> j & 1;
        store_pair_if(is_uncertain, next, __float_as_uint(scores[j / 4][j % 4]), place_in_tile(vector, j));
        next += is_uncertain ? (uint32_t)sizeof(uint2) : 0;
    }
    return __popc(sure);
}

/* A score that no tile has. */
struct Edge {
    int32_t place; /* -1: none */
    float score;
    bool is_sure;
};

__device__ __forceinline__ void collect_edge(SampledShared& shared, const Found& found, uint32_t capacity,
                                             const Part& part, const Limits& limits, Edge& edge) {
    if (edge.place < 0) return;
    edge.is_sure = edge.score > limits.high;
    if (edge.is_sure) add_shared(&shared.num_sure, 1);
    if (edge.is_sure || !(edge.score >= limits.low || limits.all)) return;
    const uint32_t at = add_shared(&shared.num_uncertain, 1);
    if (at < capacity) found.uncertain[at] = make_uint2(__float_as_uint(edge.score), edge.place - 4 * part.first);
}

/* A CTA's part, a tile at a time; the first is loaded already. */
template <int kThreads, int kTileVectors, bool kLoadsAhead>
__device__ __forceinline__ void collect_part(SampledShared& shared, const Row& row, const Part& part,
                                             const Found& found, uint32_t capacity, const Guess& guess,
                                             float (&scores)[kTileVectors][4], uint32_t valid, int32_t vector,
                                             Edge& edge) {
    const Limits limits = {score_of_key(guess.low), score_of_key(guess.high), guess.low <= kNanKey};
    uint32_t sure = 0;
    for (int32_t base = part.first;;) {
        base += kThreads * kTileVectors;
        const int32_t next_vector = vector + kThreads * kTileVectors;
        float next_scores[kTileVectors][4];
        uint32_t next_valid = 0;
        if (kLoadsAhead && base < part.end) next_valid = load_whole<kTileVectors>(row, part, next_vector, next_scores);
        sure += collect(shared, found, capacity, (uint32_t)(vector - part.first), scores, valid, limits);
        if (base >= part.end) break;
        if (!kLoadsAhead) next_valid = load_whole<kTileVectors>(row, part, next_vector, next_scores);
        vector = next_vector;
        valid = next_valid;
#pragma unroll
        for (int j = 0; j < 4 * kTileVectors; ++j) scores[j / 4][j % 4] = next_scores[j / 4][j % 4];
    }
    if (row.has_edges()) collect_edge(shared, found, capacity, part, limits, edge);
    sure = __reduce_add_sync(kFullWarp, sure);
    if ((threadIdx.x & 31) == 0 && sure > 0) add_shared(&shared.num_sure, sure);
}

/* ---- exchange ---- */

/* Stores the keys of this CTA at gather + first of every CTA of the row, four at a time; what follows the last is never
 * looked at. */
template <int kThreads>
__device__ __forceinline__ void push_keys(const Found& mine, uint32_t* gather, uint32_t first, uint32_t cta,
                                          uint32_t num_ctas_log2, uint32_t barrier) {
#if DSA_TOPK_HOPPER
    /* Pairs of a destination and four keys, dealt to the threads: neighbours send the same keys, and begin with
     * different destinations in every CTA. */
    const uint32_t num_pairs = (mine.count + 3) / 4 << num_ctas_log2;
    for (uint32_t pair = threadIdx.x; pair < num_pairs; pair += kThreads) {
        const uint32_t to = (pair + cta) & ((1u << num_ctas_log2) - 1), i = (pair >> num_ctas_log2) * 4;
        const uint4 two = *(const uint4*)(mine.uncertain + i), next = *(const uint4*)(mine.uncertain + i + 2);
        const uint4 four = make_uint4(rank_key(__uint_as_float(two.x)), rank_key(__uint_as_float(two.z)),
                                      rank_key(__uint_as_float(next.x)), rank_key(__uint_as_float(next.z)));
        store_async_words(remote_word(gather + first, to) + 4 * i, four, remote_address(barrier, to));
    }
#endif
}

/* The uncertain keys of the whole row, as every CTA has them. */
struct Gathered {
    const uint32_t* keys;
    uint32_t num_ctas_log2;
    uint32_t region;      /* keys of a CTA start at a multiple of it; 0: they do not fit, or follow each other */
    uint32_t sure;        /* of all */
    uint32_t sure_before; /* of the CTAs before this one */
};

/* false: the guess was wrong, or too many keys are uncertain. `meanwhile` is done while the others arrive. */
template <int kThreads, class Meanwhile>
__device__ __forceinline__ bool exchange(const Problem& p, SampledShared& shared, const Found& mine, uint32_t capacity,
                                         uint32_t* gather, uint32_t cta, const Meanwhile& meanwhile,
                                         Gathered* gathered) {
    const uint32_t thread = threadIdx.x, lane = thread & 31;
    const uint32_t num_ctas = p.ctas_per_row, region = kGatheredKeys >> p.ctas_per_row_log2;
    row_wait<true>(); /* the others run and have barriers */
#if DSA_TOPK_HOPPER
    const bool fits = mine.count <= capacity, sends = mine.count <= min(region, capacity);
    const uint32_t barrier = shared_address(&shared.barrier);
    if (thread < num_ctas) {
        const uint32_t remote_barrier = remote_address(barrier, thread);
        arrive_expect_remote(remote_barrier, sends ? (mine.count + 3) / 4 * 16 + 4 : 4);
        store_async_word(remote_word(shared.counts + cta, thread),
                         fits ? mine.count | min(shared.num_sure, 0xFFFEu) << 16 : kTooMany, remote_barrier);
    }
    if (sends) push_keys<kThreads>(mine, gather, cta * region, cta, p.ctas_per_row_log2, barrier);
    meanwhile();
    barrier_wait_cluster(barrier, 0);
#endif
    const uint32_t both = lane < num_ctas ? shared.counts[lane] : 0;
    if (__any_sync(kFullWarp, both == kTooMany)) return false;
    const uint32_t count = both & 0xFFFF, sure = both >> 16;
    const uint32_t total = __reduce_add_sync(kFullWarp, count);
    gathered->keys = gather;
    gathered->num_ctas_log2 = p.ctas_per_row_log2;
    gathered->region = region;
    gathered->sure = __reduce_add_sync(kFullWarp, sure);
    gathered->sure_before = __reduce_add_sync(kFullWarp, lane < cta ? sure : 0);
    if (gathered->sure >= (uint32_t)p.topk || gathered->sure + total < (uint32_t)p.topk) return false;
    if (__any_sync(kFullWarp, count > region)) {
        if (total > kGatheredKeys) return false;
        gathered->region = 0;
    }
    return true;
}

/* Calls visit_region(cta, visit) for every CTA of which this warp looks at keys; visit(use) calls use(key) for those of
 * this thread, and with kNoKey: several at a time, so that they wait for shared memory together. */
constexpr int kVisited = 4;

template <int kThreads, class VisitRegion>
__device__ __forceinline__ void visit_regions(const SampledShared& shared, const Gathered& gathered,
                                              const VisitRegion& visit_region) {
    constexpr uint32_t kWarps = kThreads / 32, kWarpsLog2 = kWarps == 8 ? 3 : 4;
    static_assert(kWarps == 1 << kWarpsLog2, "");
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    /* With fewer CTAs than warps, several warps share one's keys. */
    const uint32_t ctas_log2 = gathered.num_ctas_log2;
    const uint32_t sharing_log2 = kWarpsLog2 > ctas_log2 ? kWarpsLog2 - ctas_log2 : 0;
    const uint32_t start = (warp & ((1u << sharing_log2) - 1)) * 32 + lane;
    for (uint32_t cta = warp >> sharing_log2; cta < 1u << ctas_log2; cta += kWarps >> sharing_log2) {
        const uint32_t count = shared.counts[cta] & 0xFFFF;
        const uint32_t* keys = gathered.keys + cta * gathered.region;
        visit_region(cta, [&](const auto& use) {
            for (uint32_t first = start; first - lane < count; first += kVisited * 32 << sharing_log2) {
                uint32_t some[kVisited];
#pragma unroll
                for (int n = 0; n < kVisited; ++n) {
                    const uint32_t i = first + (n * 32 << sharing_log2);
                    some[n] = i < count ? keys[i] : kNoKey;
                }
#pragma unroll
                for (int n = 0; n < kVisited; ++n) use(some[n]);
            }
        });
    }
}

/* The keys of all CTAs alike. */
template <int kThreads, class Use>
__device__ __forceinline__ void visit_gathered(const SampledShared& shared, const Gathered& gathered, const Use& use) {
    visit_regions<kThreads>(shared, gathered, [&](uint32_t, const auto& visit) { visit(use); });
}

/* ---- rank ---- */

/* What this CTA keeps of the scores equal to the threshold, and where its output starts. */
struct Share {
    uint32_t threshold;
    uint32_t ties_kept;
    uint32_t num_ties;
    uint32_t first_output;
};

/* Counts the keys of every CTA above the threshold and equal to it. */
template <int kThreads>
__device__ __forceinline__ void count_shares(SampledShared& shared, const Gathered& gathered, uint32_t threshold) {
    if (threadIdx.x < kMaxCtasPerRow) shared.above[threadIdx.x] = shared.equal[threadIdx.x] = 0;
    __syncthreads();
    visit_regions<kThreads>(shared, gathered, [&](uint32_t owner, const auto& visit) {
        uint32_t above = 0, equal = 0;
        visit([&](uint32_t key) {
            above += key > threshold;
            equal += key == threshold;
        });
        if (above > 0) atomicAdd(&shared.above[owner], above);
        if (equal > 0) atomicAdd(&shared.equal[owner], equal);
    });
    __syncthreads();
}

__device__ __forceinline__ Share share_of_counts(const SampledShared& shared, const Gathered& gathered, uint32_t cta,
                                                 uint32_t threshold, uint32_t ties_kept) {
    const uint32_t lane = threadIdx.x & 31;
    const uint32_t tied_before = __reduce_add_sync(kFullWarp, lane < cta ? shared.equal[lane & 15] : 0);
    const uint32_t above_before = __reduce_add_sync(kFullWarp, lane < cta ? shared.above[lane & 15] : 0);
    Share share;
    share.threshold = threshold;
    share.num_ties = shared.equal[cta];
    share.ties_kept = min(ties_kept > tied_before ? ties_kept - tied_before : 0, share.num_ties);
    share.first_output = gathered.sure_before + above_before + min(tied_before, ties_kept);
    return share;
}

/* The interval holds one value, and more than kFew keys, of which some are kept. */
template <int kThreads>
__device__ __noinline__ Share share_of_ties(SampledShared& shared, const Gathered gathered, uint32_t cta,
                                            const Interval interval) {
    count_shares<kThreads>(shared, gathered, interval.lowest);
    return share_of_counts(shared, gathered, cta, interval.lowest, interval.rank);
}

/* Where one CTA has more keys than its region takes (the best scores lie close together), sending them to all would
 * take long: it gets those of the others, finds the threshold alone, and tells. */
template <int kThreads>
__device__ __noinline__ Share share_from_leader(const Problem& p, SampledShared& shared, const Found mine,
                                                uint32_t* gather, uint32_t cta, Gathered gathered, const Guess guess) {
    const uint32_t thread = threadIdx.x, lane = thread & 31, num_ctas = p.ctas_per_row;
    const uint32_t count = lane < num_ctas ? shared.counts[lane] & 0xFFFF : 0;
    const uint32_t leader = __ffs(__ballot_sync(kFullWarp, count == __reduce_max_sync(kFullWarp, count))) - 1;
    const uint32_t to = remote_word(gather + __reduce_add_sync(kFullWarp, lane < cta ? count : 0), leader);
    for (uint32_t i = thread; i < mine.count; i += kThreads) store_remote_word(to + 4 * i, mine.key(i));
    row_sync<true>();
    if (cta == leader) {
        const uint32_t total = __reduce_add_sync(kFullWarp, count);
        const auto visit = [&](const auto& use) {
            for (uint32_t i = thread; i < total; i += kThreads) use(gather[i]);
        };
        const Interval interval = {guess.low, guess.high, (uint32_t)p.topk - gathered.sure, 0};
        const Ranked ranked = key_of_rank<kThreads>(shared.rank, visit, interval, guess.low,
                                                    min(guess.high, max(guess.highest, guess.low)));
        if (thread < kMaxCtasPerRow) shared.above[thread] = shared.equal[thread] = 0;
        __syncthreads();
        const uint32_t* keys = gather;
        for (uint32_t owner = 0; owner < num_ctas; ++owner) {
            const uint32_t num_keys = shared.counts[owner] & 0xFFFF;
            uint32_t above = 0, equal = 0;
            for (uint32_t i = thread; i < num_keys; i += kThreads) {
                above += keys[i] > ranked.key;
                equal += keys[i] == ranked.key;
            }
            if (above > 0) atomicAdd(&shared.above[owner], above);
            if (equal > 0) atomicAdd(&shared.equal[owner], equal);
            keys += num_keys;
        }
        __syncthreads();
        for (uint32_t other = thread >> 5; other < num_ctas; other += kThreads / 32) {
            const uint32_t word = lane < 16 ? shared.above[lane] : shared.equal[lane - 16];
            if (other != cta)
                store_remote_word(remote_word(lane < 16 ? shared.above + lane : shared.equal + lane - 16, other), word);
            if (lane < 2)
                store_remote_word(remote_word(shared.verdict + lane, other), lane ? ranked.ties_kept : ranked.key);
        }
    }
    row_sync<true>();
    return share_of_counts(shared, gathered, cta, shared.verdict[0], shared.verdict[1]);
}

/* Some of the interval's keys, at most kFew, are kept. */
template <int kThreads>
__device__ __noinline__ Share share_of_few(SampledShared& shared, const Gathered gathered, uint32_t cta,
                                           const Interval interval) {
    const uint32_t lane = threadIdx.x & 31;
    uint32_t above = 0;
    visit_regions<kThreads>(shared, gathered, [&](uint32_t owner, const auto& visit) {
        if (owner < cta) visit([&](uint32_t key) { above += key > interval.highest; });
        list_few(shared.rank, visit, interval, owner);
    });
    above = __reduce_add_sync(kFullWarp, above);
    if (lane == 0 && above > 0) add_shared(&shared.above_before, above);
    __syncthreads();
    const Ranked ranked = rank_few(shared.rank, interval);
    const uint32_t key = shared.rank.few[lane]; /* kNoKey where there is none */
    const uint32_t owner = shared.rank.few_cta[lane];
    const uint32_t tied_before = __popc(__ballot_sync(kFullWarp, key == ranked.key && owner < cta));
    above = shared.above_before + __popc(__ballot_sync(kFullWarp, key > ranked.key && owner < cta));
    Share share;
    share.threshold = ranked.key;
    share.num_ties = __popc(__ballot_sync(kFullWarp, key == ranked.key && owner == cta));
    share.ties_kept = min(ranked.ties_kept > tied_before ? ranked.ties_kept - tied_before : 0, share.num_ties);
    share.first_output = gathered.sure_before + above + min(tied_before, ranked.ties_kept);
    return share;
}

template <int kThreads>
__device__ __forceinline__ Share rank_gathered(const Problem& p, SampledShared& shared, const Gathered& gathered,
                                               uint32_t cta, const Guess& guess) {
    const uint32_t lane = threadIdx.x & 31;
    const auto visit = [&](const auto& use) { visit_gathered<kThreads>(shared, gathered, use); };
    Interval interval = {guess.low, guess.high, (uint32_t)p.topk - gathered.sure, 0};
    interval = narrow<kThreads>(shared.rank, visit, interval, guess.low, min(guess.high, max(guess.highest, guess.low)),
                                kFew);
    if (interval.is_kept()) {
        uint32_t above = 0;
        visit_regions<kThreads>(shared, gathered, [&](uint32_t owner, const auto& visit) {
            if (owner < cta) visit([&](uint32_t key) { above += key >= interval.lowest; });
        });
        above = __reduce_add_sync(kFullWarp, above);
        if (lane == 0 && above > 0) add_shared(&shared.above_before, above);
        __syncthreads();
        return Share{interval.lowest, 0, 0, gathered.sure_before + shared.above_before};
    }
    if (interval.count > kFew) return share_of_ties<kThreads>(shared, gathered, cta, interval);
    return share_of_few<kThreads>(shared, gathered, cta, interval);
}

template <int kThreads>
__device__ __forceinline__ Share rank_alone(const Problem& p, SampledShared& shared, const Found& mine,
                                            const Guess& guess) {
    const auto visit = [&](const auto& use) {
        for (uint32_t base = threadIdx.x; base < mine.count; base += kVisited * kThreads) {
            uint32_t some[kVisited];
#pragma unroll
            for (int n = 0; n < kVisited; ++n)
                some[n] = base + n * kThreads < mine.count ? mine.key(base + n * kThreads) : kNoKey;
#pragma unroll
            for (int n = 0; n < kVisited; ++n) use(some[n]);
        }
    };
    const Interval interval = {guess.low, guess.high, (uint32_t)p.topk - shared.num_sure, 0};
    const Ranked ranked = key_of_rank<kThreads>(shared.rank, visit, interval, guess.low,
                                                min(guess.high, max(guess.highest, guess.low)));
    return Share{ranked.key, ranked.ties_kept, ranked.num_ties, 0};
}

/* ---- write ---- */

/* The place of the last score kept of those equal to the threshold: the rank-th of their places from below. */
template <int kThreads>
__device__ __noinline__ uint32_t last_tie(SampledShared& shared, const Found mine, const Share share) {
    __syncthreads();
    start_ranking<kThreads>(shared.rank);
    __syncthreads();
    const auto visit = [&](const auto& use) {
        for (uint32_t i = threadIdx.x; i < mine.count; i += kThreads)
            use(mine.key(i) == share.threshold ? ~mine.uncertain[i].y : kNoKey);
    };
    const Interval interval = {1u << 31, ~0u, share.ties_kept, 0};
    return ~key_of_rank<kThreads>(shared.rank, visit, interval, interval.lowest, interval.highest).key;
}

/* Calls act(order, place) for every bit: order counts the bits at smaller places. Returns their number. */
template <int kThreads, class Act>
__device__ __forceinline__ uint32_t in_order(SampledShared& shared, const uint32_t* bits, uint32_t num_words,
                                             const Act& act) {
    const uint32_t thread = threadIdx.x;
    if (num_words <= kThreads) {
        /* Every thread has at most a word: 8, 16 or 32 bits, so that as many as possible have some. */
        const uint32_t split_log2 = 4 * num_words <= kThreads ? 3 : 2 * num_words <= kThreads ? 4 : 5;
        const uint32_t first = thread << split_log2;
        uint32_t left = first < 32 * num_words ? bits[first >> 5] >> (first & 31) : 0;
        left &= 0xFFFFFFFFu >> (32 - (1u << split_log2));
        uint32_t total, order = exclusive_sum<kThreads>(__popc(left), shared.warp_totals, &total);
        for (; left != 0; left &= left - 1) act(order++, first + __ffs(left) - 1);
        return total;
    }
    const uint32_t each = (num_words + kThreads - 1) / kThreads;
    const uint32_t begin = min(thread * each, num_words), end = min(begin + each, num_words);
    uint32_t sum = 0;
    for (uint32_t word = begin; word < end; ++word) sum += __popc(bits[word]);
    uint32_t total, order = exclusive_sum<kThreads>(sum, shared.warp_totals, &total);
    for (uint32_t word = begin; word < end; ++word)
        for (uint32_t left = bits[word]; left != 0; left &= left - 1) act(order++, 32 * word + __ffs(left) - 1);
    return total;
}

template <int kThreads, bool kClustered>
__device__ __forceinline__ void write_selected(const Problem& p, const Row& row, int64_t t, SampledShared& shared,
                                               const Found& mine, const Part& part, const Edge& edge,
                                               const Share& share, const Table& table, int32_t* staged) {
    uint32_t end_of_ties = ~0u;
    if (share.ties_kept < share.num_ties)
        end_of_ties = share.ties_kept > 0 ? last_tie<kThreads>(shared, mine, share) + 1 : 0;
    for (uint32_t i = threadIdx.x; i < mine.count; i += kThreads) {
        const uint2 one = mine.uncertain[i];
        const uint32_t key = rank_key(__uint_as_float(one.x)), place = one.y;
        if (key > share.threshold || (key == share.threshold && place < end_of_ties))
            atomicOr(&mine.bits[place >> 5], 1u << (place & 31));
    }
    if (edge.is_sure) atomicOr(&mine.bits[(edge.place >> 5) - (part.first >> 3)], 1u << (edge.place & 31));
    copy_async_wait_all();
    __syncthreads();
    const uint32_t num_words = (uint32_t)(part.end - part.first + 7) >> 3;
    const int32_t first = 4 * part.first - row.skew;
    const uint32_t count = in_order<kThreads>(
        shared, mine.bits, num_words, [&](uint32_t order, uint32_t place) { staged[order] = first + (int32_t)place; });
    __syncthreads();
    if (kClustered) {
        int32_t* positions = p.positions + t * p.topk + share.first_output;
        int32_t* slots = p.slot_ids + t * p.topk + share.first_output;
        for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
            const int32_t position = staged[i];
            positions[i] = position;
            slots[i] = slot_of(p, row, table, position);
        }
        if (threadIdx.x == 0 && share.first_output == 0) p.counts[t] = p.topk;
    } else {
        write_staged<kThreads>(p, row, t, table, staged);
    }
}

/* ---- kernels ---- */

/* kCtas: of a multiprocessor. With four, their warps hide the loads, and a tile ahead would need too many registers. */
template <int kThreads, int kTileVectors, bool kClustered, int kCtas>
__global__ __launch_bounds__(kThreads, kCtas) void topk_sampled_kernel(const __grid_constant__ Problem p,
                                                                       const __grid_constant__ Room room) {
    if (kClustered && !DSA_TOPK_HOPPER) return; /* never launched */
    extern __shared__ __align__(16) uint8_t memory[];
    SampledShared& shared = *(SampledShared*)memory;
    Found mine;
    mine.bits = (uint32_t*)(memory + sizeof(SampledShared));
    mine.uncertain = (uint2*)(mine.bits + room.bits);
    int32_t* entries = (int32_t*)(mine.uncertain + room.capacity);
    int32_t* staged = entries + room.table;
    uint32_t* gather = (uint32_t*)(staged + room.staged);

    const int32_t thread = threadIdx.x;
    const int32_t num_ctas = kClustered ? p.ctas_per_row : 1;
    const int32_t cta = kClustered ? blockIdx.x & (num_ctas - 1) : 0;
    const int64_t t = kClustered ? blockIdx.x >> p.ctas_per_row_log2 : blockIdx.x;
#if DSA_TOPK_HOPPER
    wait_for_previous_kernel();
#endif
    const Row row = row_of(p, t);
    if (row.length <= p.topk) {
        write_whole_row(p, row, t, cta * kThreads + thread, num_ctas * kThreads);
        return;
    }
#if DSA_TOPK_HOPPER
    if (kClustered && thread == 0) {
        barrier_init(shared_address(&shared.barrier), num_ctas);
        barrier_init_fence();
    }
    __syncwarp();
#endif
    row_arrive_relaxed<kClustered>();
    const Part part = part_of(row, cta, kClustered ? p.ctas_per_row_log2 : 0);
    /* Short rows: all scores are uncertain. */
    const bool sampled = row.length > 2 * kSamples || row.length > room.capacity;

    constexpr int kEach = kSampleVectors / kThreads;
    float sample[kEach][4] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        load_vector_if(sampled, row.vectors + 4 * (int64_t)sample_vector(row, thread + i * kThreads), sample[i]);
    float scores[kTileVectors][4];
    const int32_t vector = first_vector_of_thread<kTileVectors>(part);
    const uint32_t valid = load_whole<kTileVectors>(row, part, vector, scores);
    Edge edge = {edge_place(row, part), 0, false};
    load_score_if(edge.place >= 0, row.vectors + edge.place, edge.score);
    start_ranking<kThreads>(shared.rank);
    if (thread == 0) shared.num_sure = shared.num_uncertain = shared.above_before = 0;
    __syncthreads();

    Guess guess = {kNoKey + 1, ~0u, 0xFF800000u, kNoKey};
    if (sampled) guess = guess_from_sample<kThreads, kEach>(p, row, shared, sample);
    collect_part<kThreads, kTileVectors, (kCtas < 4)>(shared, row, part, mine, room.capacity, guess, scores, valid,
                                                      vector, edge);
    __syncthreads();
#if DSA_TOPK_HOPPER
    if (p.lets_next_start == kAfterCollecting) let_next_kernel_start();
#endif
    mine.count = shared.num_uncertain;
    Gathered gathered = {};
    Table table;
    const auto start = [&] {
        table = start_table<kThreads>(p, row, max(4 * part.first - row.skew, 0),
                                      max(min(4 * part.end, row.end) - row.skew - 1, 0), room.table, entries);
    };
    bool good;
    if (kClustered) {
        good = exchange<kThreads>(p, shared, mine, room.capacity, gather, cta, start, &gathered);
    } else {
        start();
        const uint32_t sure = shared.num_sure, topk = (uint32_t)p.topk;
        good = mine.count <= (uint32_t)room.capacity && sure < topk && sure + mine.count >= topk;
    }
    if (!good) {
        select_by_digits<kThreads, kClustered>(p, row, t, cta, guess.plateau, shared.radix);
        return;
    }
    Share share;
    if (!kClustered)
        share = rank_alone<kThreads>(p, shared, mine, guess);
    else if (gathered.region > 0)
        share = rank_gathered<kThreads>(p, shared, gathered, cta, guess);
    else
        share = share_from_leader<kThreads>(p, shared, mine, gather, cta, gathered, guess);
    /* The gathered keys are not needed any more. */
    write_selected<kThreads, kClustered>(p, row, t, shared, mine, part, edge, share, table,
                                         kClustered ? (int32_t*)gather : staged);
}

/* topk beyond kMaxCandidateTopk. */
template <int kThreads, bool kClustered>
__global__ __launch_bounds__(kThreads, 1) void topk_digits_kernel(const __grid_constant__ Problem p) {
    if (kClustered && !DSA_TOPK_HOPPER) return; /* never launched */
    __shared__ RadixShared shared;
    const int32_t num_ctas = kClustered ? p.ctas_per_row : 1;
    const int32_t cta = kClustered ? blockIdx.x & (num_ctas - 1) : 0;
    const int64_t t = kClustered ? blockIdx.x >> p.ctas_per_row_log2 : blockIdx.x;
#if DSA_TOPK_HOPPER
    wait_for_previous_kernel();
#endif
    const Row row = row_of(p, t);
    if (row.length <= p.topk) {
        write_whole_row(p, row, t, cta * kThreads + threadIdx.x, num_ctas * kThreads);
        return;
    }
    select_by_digits<kThreads, kClustered>(p, row, t, cta, kNoKey, shared);
}

}  // namespace topk
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_TOPK_SAMPLED_CUH_ */
