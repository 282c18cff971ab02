/* The k best of a row in one pass over its scores.
 *
 * Candidates (key, position) collect in a buffer in the order of their positions. When it is full, it shrinks to its k
 * best, and the worst of them becomes the floor: a later score enters only above the floor, because equal scores are
 * won by the smaller position. Most scores of a long row fail against the floor at the cost of one comparison.
 *
 * A buffer of capacity c shrinks at most n / (c - k) times and a shrink takes at most 33 passes over the buffer, so the
 * worst row (ascending scores) costs a fixed multiple of the best one.
 *
 *   buffer   [0, count)                 candidates; after a shrink count == k
 *   scores   [0, next)                  all seen: each is in the buffer or ranks behind k others
 *   scores   [next, n)                  not yet read
 */
#ifndef DSA_CPU_TOPK_SELECT_VECTOR_H_
#define DSA_CPU_TOPK_SELECT_VECTOR_H_

#include "simd_int.h"
#include "topk_select.h"

namespace dsa {
namespace DSA_SIMD {

constexpr int64_t kScanVectors = 4; /* scores are tested this many vectors at a time: one branch for all */
constexpr int64_t kScanScores = kScanVectors * kLanes;
constexpr int64_t kSpareCandidates = 4096; /* beyond 2 k, so that small k do not shrink often */

struct Candidates {
    int32_t* keys;      /* [capacity + kLanes] int32 */
    int32_t* positions; /* [capacity + kLanes] int32 */
    int64_t capacity;
    int64_t count;
    int32_t floor; /* once floored, only keys above this one enter */
    bool is_floored;
};

static inline int64_t candidate_capacity(int64_t max_length, int64_t topk) {
    const int64_t wanted = 2 * topk + kSpareCandidates;
    return max_length < wanted ? max_length : wanted;
}

static size_t scratch_bytes(int64_t max_length, int64_t topk) {
    const size_t numbers = 2 * (size_t)(candidate_capacity(max_length, topk) + kLanes);
    return (numbers * sizeof(int32_t) + 63) / 64 * 64;
}

static inline int64_t count_above(const int32_t* keys, int64_t n, int32_t key) {
    const IVec bound = splat_int(key);
    IVec even = splat_int(0);
    IVec odd = splat_int(0);
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        even = count_greater(even, load_int(keys + i), bound);
        odd = count_greater(odd, load_int(keys + i + kLanes), bound);
    }
    int64_t count = reduce_add_int(add_int(even, odd));
    for (; i < n; ++i) count += keys[i] > key;
    return count;
}

static inline int32_t largest_key(const int32_t* keys, int64_t n) {
    IVec largest = splat_int(INT32_MIN);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) largest = max_int(largest, load_int(keys + i));
    int32_t result = reduce_max_int(largest);
    for (; i < n; ++i) result = keys[i] > result ? keys[i] : result;
    return result;
}

/* Who stays: keys above `above`, and the first `ties` of those equal to it. */
struct Cut {
    int32_t above;
    int64_t ties;
};

static inline Cut find_cut(const Candidates& c, int64_t topk) {
    /* At least topk keys are above `low`, fewer are above `high`. */
    int64_t low = c.is_floored ? (int64_t)c.floor - 1 : (int64_t)INT32_MIN - 1;
    int64_t high = largest_key(c.keys, c.count);
    int64_t above_high = 0;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        const int64_t above = count_above(c.keys, c.count, (int32_t)middle);
        if (above == topk) return {(int32_t)middle, 0};
        if (above > topk) {
            low = middle;
        } else {
            high = middle;
            above_high = above;
        }
    }
    return {(int32_t)high, topk - above_high};
}

/* The lowest `count` set bits. */
static inline uint32_t first_bits(uint32_t mask, int64_t count) {
    uint32_t rest = mask;
    for (int64_t i = 0; i < count && rest; ++i) rest &= rest - 1;
    return mask ^ rest;
}

/* Shrinks to the topk best, in place: what is written never overtakes what is read. */
static void keep_best(Candidates* c, int64_t topk) {
    const Cut cut = find_cut(*c, topk);
    const IVec bound = splat_int(cut.above);
    const IVec lanes = lane_numbers();
    int64_t ties = cut.ties;
    int64_t kept = 0;
    for (int64_t i = 0; i < c->count; i += kLanes) {
        const IVec keys = load_int(c->keys + i);
        const IVec positions = load_int(c->positions + i);
        uint32_t stays = greater_mask(keys, bound);
        if (ties > 0) {
            const uint32_t tied = first_bits(equal_mask(keys, bound), ties);
            ties -= __builtin_popcount(tied);
            stays |= tied;
        }
        if (c->count - i < kLanes) stays &= greater_mask(splat_int((int32_t)(c->count - i)), lanes);
        store_packed(c->keys + kept, stays, keys);
        store_packed(c->positions + kept, stays, positions);
        kept += __builtin_popcount(stays);
    }
    c->count = kept;
    c->floor = cut.above;
    c->is_floored = true;
}

/* A cheap test that every key above the floor passes (and some NaN): (bits ^ flip) < bound as int32. For floats of one
 * sign, order of value is order of bits; the flip also puts the other sign on the right side. */
struct Sieve {
    IVec flip;
    IVec bound;
};

static inline Sieve sieve_above(int32_t floor) {
    if (floor >= 0) return {splat_int(-1), splat_int(~floor)};
    /* No key is -1 (it would be -0, whose key is 0), but -0 must pass when the floor is there. */
    const int32_t bits = (floor == -1 ? -2 : floor) ^ 0x7FFFFFFF;
    return {splat_int(INT32_MIN), splat_int((int32_t)((uint32_t)bits ^ 0x80000000u))};
}

/* Takes scores[first, n) in until the buffer is full; returns the first position not yet read. */
static int64_t scan_above(Candidates* c, const float* scores, int64_t first, int64_t n) {
    const Sieve sieve = sieve_above(c->floor);
    const IVec floor = splat_int(c->floor);
    const IVec lanes = lane_numbers();
    int64_t next = first;
    for (; next + kScanScores <= n && c->count + kScanScores <= c->capacity; next += kScanScores) {
        uint32_t passes[kScanVectors];
        uint32_t any = 0;
        for (int v = 0; v < kScanVectors; ++v) {
            const IVec bits = load_int(scores + next + v * kLanes);
            passes[v] = greater_mask(sieve.bound, xor_int(bits, sieve.flip));
            any |= passes[v];
        }
        if (!any) continue;
        for (int v = 0; v < kScanVectors; ++v) {
            if (!passes[v]) continue;
            const int64_t position = next + v * kLanes;
            const IVec keys = rank_keys(load_int(scores + position));
            const uint32_t enters = greater_mask(keys, floor);
            store_packed(c->keys + c->count, enters, keys);
            store_packed(c->positions + c->count, enters, add_int(lanes, splat_int((int32_t)position)));
            c->count += __builtin_popcount(enters);
        }
    }
    for (; next < n && n - next < kScanScores && c->count < c->capacity; ++next) {
        const int32_t key = rank_key(scores[next]);
        c->keys[c->count] = key;
        c->positions[c->count] = (int32_t)next;
        c->count += key > c->floor;
    }
    return next;
}

/* The first scores of a row all enter. */
static inline void fill(Candidates* c, const float* scores, int64_t n) {
    const int64_t count = n < c->capacity ? n : c->capacity;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store_int(c->keys + i, rank_keys(load_int(scores + i)));
        store_int(c->positions + i, add_int(lane_numbers(), splat_int((int32_t)i)));
    }
    for (; i < count; ++i) {
        c->keys[i] = rank_key(scores[i]);
        c->positions[i] = (int32_t)i;
    }
    c->count = count;
}

static void select(const float* scores, int64_t n, int64_t topk, int32_t* positions, void* scratch) {
    Candidates c = {};
    c.capacity = candidate_capacity(n, topk);
    c.keys = (int32_t*)scratch;
    c.positions = c.keys + c.capacity + kLanes;
    fill(&c, scores, n);
    int64_t next = c.count;
    if (c.count > topk) keep_best(&c, topk);
    while (next < n) {
        next = scan_above(&c, scores, next, n);
        if (c.count > topk) keep_best(&c, topk);
    }
    memcpy(positions, c.positions, (size_t)topk * sizeof(int32_t));
}

constexpr TopkSelector kTopkSelector = {scratch_bytes, select};

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_TOPK_SELECT_VECTOR_H_ */
