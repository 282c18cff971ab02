#include "sparse_mla_sm90_rows.cuh"

#include <algorithm>

#include "clusters.cuh"
#include "sparse_mla_kernels.h"
#include "sparse_mla_sm90_rows_load.cuh"
#include "sparse_mla_sm90_rows_merge.cuh"

namespace dsa {
namespace gpu {
namespace rows {

/* ---- score ---- */

/* The factor that the fragments of K carry under kExact, in [1, 2), and the power of two that is left of the scale. */
struct SplitScale {
    float factor;
    float power;
};

__device__ __forceinline__ SplitScale split_scale(float scale) {
    const uint32_t bits = __float_as_uint(scale);
    if (bits < 0x00800000) return {scale * 0x1p126f, 0x1p-126f}; /* subnormal */
    return {__uint_as_float((bits & 0x007FFFFF) | 0x3F800000), __uint_as_float(bits & 0xFF800000)};
}

/* s += scales of the tokens and of the query times the sums of one group */
template <bool kExact, int kHeads, typename Memory>
__device__ __forceinline__ void add_group(const Memory& shared, float (&s)[kHeads / 2], const float (&sums)[kHeads / 2],
                                          int group, uint32_t row0, uint32_t row8, int c) {
    float scale0 = load_shared_float(row0 + kScaleOffset + 4 * group);
    float scale8 = load_shared_float(row8 + kScaleOffset + 4 * group);
    if (kExact) scale0 = split_scale(scale0).power, scale8 = split_scale(scale8).power;
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
        const float2 q = *(const float2*)&shared.query_scales[group][8 * j + 2 * c];
        s[4 * j] = fmaf(sums[4 * j] * q.x, scale0, s[4 * j]);
        s[4 * j + 1] = fmaf(sums[4 * j + 1] * q.y, scale0, s[4 * j + 1]);
        s[4 * j + 2] = fmaf(sums[4 * j + 2] * q.x, scale8, s[4 * j + 2]);
        s[4 * j + 3] = fmaf(sums[4 * j + 3] * q.y, scale8, s[4 * j + 3]);
    }
}

__device__ __forceinline__ void keep_all(uint32_t (&a)[4][4]) { keep(a[0]), keep(a[1]), keep(a[2]), keep(a[3]); }

/* A tile's scores are computed in steps of 64 dims, the first of them the rope part. Fragments of step i live in buffer
 * i % kBuffers until its products are done, so kBuffers - 1 groups of products are in flight. */
template <bool kExact, int kHeads, int kWide>
struct ScoreSteps {
    static constexpr int kBuffers = kExact ? 1 : kHeads == 32 ? 2 : kWide == 2 ? 4 : 3; /* what the registers hold */
    static constexpr int kSums = kBuffers == 4 ? kGroups : 2; /* accumulators of groups of 128 dims, taken in turn */
    static constexpr int kDone = kBuffers + 2; /* sums of group g are complete before step 2 g + kDone */
    static_assert(kSums == kGroups || kDone <= 2 * kSums + 1, "read before the next group needs the registers");
};

__device__ __forceinline__ void load_rope_fragments(uint32_t row0, uint32_t row8, int c, uint32_t (&k)[4][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint4 x = load_shared_16(row0 + kRopeOffset + 64 * i + 16 * c);
        const uint4 y = load_shared_16(row8 + kRopeOffset + 64 * i + 16 * c);
        k[2 * i][0] = x.x, k[2 * i][1] = y.x, k[2 * i][2] = x.y, k[2 * i][3] = y.y;
        k[2 * i + 1][0] = x.z, k[2 * i + 1][1] = y.z, k[2 * i + 1][2] = x.w, k[2 * i + 1][3] = y.w;
    }
}

/* Scores, in units of log2, of the two rows at row0 and row8 (their fragment). kExact: see the top of the header. */
template <bool kExact, int kHeads, int kWide, typename Memory>
__device__ __forceinline__ void score_tile(const Memory& shared, const Arguments& a, uint32_t row0, uint32_t row8,
                                           int c, float (&s)[kHeads / 2]) {
    using Steps = ScoreSteps<kExact, kHeads, kWide>;
    constexpr int kStepUnits = 2 * kHeads; /* of 16 bytes, as descriptors count */
    constexpr int kLatentSteps = kLatent / 64;
    const uint64_t query = matrix_descriptor(shared_address(shared.query), kHeads * 16, 128, Swizzle::kNone);
    uint32_t k[Steps::kBuffers][4][4];
    float sums[Steps::kSums][kHeads / 2];
    uint4 next0 = load_shared_16(row0 + 16 * c), next8 = load_shared_16(row8 + 16 * c);
    load_rope_fragments(row0, row8, c, k[0]);
    keep_all(k[0]);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kRopeSteps; ++i) wgmma_bf16<0>(s, k[0][i], query + (kLatentSteps * 4 + i) * kStepUnits, i > 0);
    wgmma_commit();
    auto take_group = [&](int group) {
        float(&done)[kHeads / 2] = sums[group % Steps::kSums];
        keep(done);
        if (group == 0) {
            keep(s);
#pragma unroll
            for (int i = 0; i < kHeads / 2; ++i) s[i] *= a.scale_log2;
        }
        add_group<kExact, kHeads>(shared, s, done, group, row0, row8, c);
    };
#pragma unroll
    for (int step = 1; step <= kLatentSteps; ++step) {
        uint32_t(&fragments)[4][4] = k[step % Steps::kBuffers];
        if (step >= Steps::kBuffers) {
            wgmma_wait<Steps::kBuffers - 1>();
            keep_all(fragments);
        }
        if (step >= Steps::kDone && (step - Steps::kDone) % 2 == 0) take_group((step - Steps::kDone) / 2);
        const uint32_t x[4] = {next0.x, next0.y, next0.z, next0.w}, y[4] = {next8.x, next8.y, next8.z, next8.w};
        float factor0 = 1.0f, factor8 = 1.0f;
        if (kExact) {
            factor0 = split_scale(load_shared_float(row0 + kScaleOffset + 4 * ((step - 1) / 2))).factor;
            factor8 = split_scale(load_shared_float(row8 + kScaleOffset + 4 * ((step - 1) / 2))).factor;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            widen(x[i], fragments[i][0], fragments[i][2]);
            widen(y[i], fragments[i][1], fragments[i][3]);
            if (kExact) {
                fragments[i][0] = multiply_as_bf16(fragments[i][0], factor0);
                fragments[i][1] = multiply_as_bf16(fragments[i][1], factor8);
                fragments[i][2] = multiply_as_bf16(fragments[i][2], factor0);
                fragments[i][3] = multiply_as_bf16(fragments[i][3], factor8);
            }
        }
        keep_all(fragments);
        if (step < kLatentSteps) {
            next0 = load_shared_16(row0 + step * 64 + 16 * c);
            next8 = load_shared_16(row8 + step * 64 + 16 * c);
        }
        const int group = (step - 1) / 2;
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < 4; ++i)
            wgmma_f16<0>(sums[group % Steps::kSums], fragments[i], query + (4 * (step - 1) + i) * kStepUnits,
                         (step - 1) % 2 || i > 0);
        wgmma_commit();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
        if (2 * group + Steps::kDone > kLatentSteps) take_group(group);
}

/* ---- softmax over the tokens, which are the rows of the fragments ---- */

/* The largest scores of the warp's 16 tokens go to `maxima`: lanes of equal c halve their heads at every step. */
template <int kHeads>
__device__ __forceinline__ void raise_maxima(const float (&s)[kHeads / 2], int32_t* maxima, int c) {
    constexpr int kColumns = kHeads / 4;
    const int lane = threadIdx.x & 31;
    float largest[kColumns];
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
        largest[2 * j] = fmaxf(s[4 * j], s[4 * j + 2]);
        largest[2 * j + 1] = fmaxf(s[4 * j + 1], s[4 * j + 3]);
    }
    int first = 0;
#pragma unroll
    for (int step = 0; step < 3; ++step) {
        const int distance = 16 >> step;
        const int half = (kColumns >> step) / 2;
        if (half >= 1) {
            const bool takes_upper = (lane & distance) != 0;
#pragma unroll
            for (int i = 0; i < half; ++i) {
                const float given = takes_upper ? largest[i] : largest[i + half];
                const float kept = takes_upper ? largest[i + half] : largest[i];
                largest[i] = fmaxf(kept, __shfl_xor_sync(~0u, given, distance));
            }
            if (takes_upper) first += half;
        } else {
            largest[0] = fmaxf(largest[0], __shfl_xor_sync(~0u, largest[0], distance));
        }
    }
    constexpr int kLeft = kColumns >= 8 ? kColumns / 8 : 1;
    if (kColumns < 8 && (lane & 4)) return; /* its neighbour has the same one */
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
        const int column = first + i;
        atomicMax(&maxima[(column >> 1) * 8 + 2 * c + (column & 1)], ordered(largest[i]));
    }
}

/* References (log2; sums and outputs of a team are relative to them; -inf before the first valid token) live in shared
 * memory between tiles, a thread's sums in registers: heads 8 j + 2 c + e at 2 j + e.
 * A reference follows the largest score when that has risen by more than kSlack, in all threads of a team alike. */
template <int kHeads, int kTiles>
__device__ __forceinline__ void move_references(const float* references, const int32_t* maxima, int c,
                                                float (&reference)[kHeads / 4], float (&sums)[kHeads / 4],
                                                float (&o)[kTiles][kHeads / 2]) {
    float factor[kHeads / 4];
    bool has_moved = false;
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
        const int2 largest = *(const int2*)&maxima[8 * j + 2 * c];
        const float2 old = *(const float2*)&references[8 * j + 2 * c];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float candidate = from_ordered(e ? largest.y : largest.x), current = e ? old.y : old.x;
            const bool moves = candidate > current + kSlack;
            factor[2 * j + e] = moves ? exp2_fast(current - candidate) : 1.0f;
            reference[2 * j + e] = moves ? candidate : current;
            has_moved |= moves;
        }
    }
    if (!__any_sync(~0u, has_moved)) return;
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i) sums[i] *= factor[i];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int i = 0; i < kHeads / 2; ++i) o[m][i] *= factor[(i >> 2) * 2 + (i & 1)];
}

/* P of the thread's two tokens, neighbours in a k-step, to shared memory. */
template <int kHeads>
__device__ __forceinline__ void store_weights(const float (&s)[kHeads / 2], const float (&references)[kHeads / 4],
                                              float (&sums)[kHeads / 4], uint32_t to, bool are_usual) {
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            /* without a valid token there is no reference, and -inf - 0 weighs nothing */
            const float reference = references[2 * j + e] == -INFINITY ? 0.0f : references[2 * j + e];
            const float p0 = exp2_fast(s[4 * j + e] - reference);
            const float p8 = exp2_fast(s[4 * j + 2 + e] - reference);
            sums[2 * j + e] += p0 + p8;
            store_shared_4(to + j * 128 + e * 16, are_usual ? pack_f16(p0, p8) : pack_bf16(p0, p8));
        }
}

/* ---- weigh: O^T += V^T P^T ---- */

/* Two dims of two tokens to a word per dim, the tokens side by side; kUsual: see the top of the header. */
template <bool kUsual>
__device__ __forceinline__ void widen_scaled(uint32_t bytes, float scale0, float scale8, uint32_t& first,
                                             uint32_t& second) {
    widen(bytes, first, second);
    if (kUsual) {
        const uint32_t scales = pack_f16(scale0, scale8);
        first = multiply_f16(first, scales);
        second = multiply_f16(second, scales);
    } else {
        const float2 x = unpack_f16(first), y = unpack_f16(second);
        first = pack_bf16(x.x * scale0, x.y * scale8);
        second = pack_bf16(y.x * scale0, y.y * scale8);
    }
}

template <bool kUsual, int kColumns>
__device__ __forceinline__ void weigh(float (&o)[kColumns], const uint32_t (&v)[4], uint64_t weights) {
    if (kUsual)
        wgmma_f16<0>(o, v, weights, 1);
    else
        wgmma_bf16<0>(o, v, weights, 1);
}

/* What a thread reads of a k-step: kDims neighbouring dims of the four tokens of its fragment columns. */
template <int kDims>
struct Values {
    uint32_t bytes[4][kDims / 4]; /* tokens t, t + 8, t + 1, t + 9 */
    float scales[4];
};

template <int kDims>
__device__ __forceinline__ void load_values(Values<kDims>& v, uint32_t token_row, int first_dim) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = token_row + ((i >> 1) + (i & 1) * 8) * kRowBytes;
        v.scales[i] = load_shared_float(row + kScaleOffset + 4 * (first_dim >> 7));
        if constexpr (kDims == 16) {
            const uint4 x = load_shared_16(row + first_dim);
            v.bytes[i][0] = x.x, v.bytes[i][1] = x.y, v.bytes[i][2] = x.z, v.bytes[i][3] = x.w;
        } else {
            const uint2 x = load_shared_8(row + first_dim);
            v.bytes[i][0] = x.x, v.bytes[i][1] = x.y;
        }
    }
}

/* Slots slot .. slot + 2 kWide - 1 (running numbers) hold the tile; each is given back when its last bytes are in
 * registers. Output tile m has dims first_dim + 2 m (fragment row g) and first_dim + 2 m + 1 (row g + 8). */
template <bool kUsual, int kHeads, int kWide, int kSlots, int kTiles, typename Memory>
__device__ __forceinline__ void weigh_tile(Memory& shared, const Place& at, int slot, int first_dim,
                                           float (&o)[kTiles][kHeads / 2]) {
    constexpr int kDims = 2 * kTiles;
    constexpr int kTileSteps = 4 * kWide;
    const uint64_t weights =
        matrix_descriptor(shared_address(shared.weights[at.team]), kHeads * 16, 128, Swizzle::kNone);
    auto row_of_step = [&](int step) {
        const uint32_t ring = shared_address(shared.ring[(slot + (step >> 1)) % kSlots]);
        return ring + ((step & 1) * 16 + token_of(at.c)) * kRowBytes;
    };
    /* of fragments, as in ScoreSteps; unusual scales need the registers for floats */
    constexpr int kBuffers = !kUsual ? 1 : kTiles == 8 || kHeads == 32 ? 2 : 4;
    uint32_t a[kBuffers][kTiles][4];
    Values<kDims> values;
    load_values(values, row_of_step(0), first_dim);
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) {
        uint32_t(&v)[kTiles][4] = a[step % kBuffers];
        if (step >= kBuffers) {
            wgmma_wait<kBuffers - 1>();
#pragma unroll
            for (int m = 0; m < kTiles; ++m) keep(v[m]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int z = 0; z < kDims / 4; ++z) {
                const uint32_t x = values.bytes[2 * h][z], y = values.bytes[2 * h + 1][z];
                const float scale0 = values.scales[2 * h], scale8 = values.scales[2 * h + 1];
                widen_scaled<kUsual>(__byte_perm(x, y, 0x5140), scale0, scale8, v[2 * z][2 * h], v[2 * z][2 * h + 1]);
                widen_scaled<kUsual>(__byte_perm(x, y, 0x7362), scale0, scale8, v[2 * z + 1][2 * h],
                                     v[2 * z + 1][2 * h + 1]);
            }
        if (step + 1 < kTileSteps) load_values(values, row_of_step(step + 1), first_dim);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) keep(v[m]);
        wgmma_begin();
#pragma unroll
        for (int m = 0; m < kTiles; ++m) weigh<kUsual>(o[m], v[m], weights + step * (2 * kHeads));
        wgmma_commit();
        if ((step & 1) && (threadIdx.x & 31) == 0)
            barrier_arrive(shared_address(&shared.free[(slot + (step >> 1)) % kSlots]));
    }
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) keep(o[m]);
}

/* ---- the loop over tiles ---- */

__device__ __forceinline__ bool are_usual_scales(uint32_t row) {
    const uint4 v = load_shared_16(row + kScaleOffset);
    return is_usual_scale(__uint_as_float(v.x)) && is_usual_scale(__uint_as_float(v.y)) &&
           is_usual_scale(__uint_as_float(v.z)) && is_usual_scale(__uint_as_float(v.w));
}

/* Scores of the warp's 16 tokens of the tile in slots slot .. (running numbers), -inf where the id does not count. Says
 * whether one that counts has unusual scales. */
template <bool kExact, int kHeads, int kWide, int kSlots, typename Memory>
__device__ __forceinline__ bool score_valid(const Memory& shared, const Arguments& a, const Place& at, int slot,
                                            float (&s)[kHeads / 2]) {
    const int my_slot = (slot + at.wide * 2 + (at.warp >> 1)) % kSlots;
    const int my_row = (at.warp & 1) * 16 + token_of(at.g);
    const uint32_t row0 = shared_address(shared.ring[my_slot]) + my_row * kRowBytes, row8 = row0 + 8 * kRowBytes;
    const uint32_t valid = *(const uint32_t*)shared.valid[my_slot] >> my_row;
    const bool is_valid0 = valid & 1, is_valid8 = valid >> 8 & 1;
    const bool is_unusual = (is_valid0 && !are_usual_scales(row0)) || (is_valid8 && !are_usual_scales(row8));
    score_tile<kExact, kHeads, kWide>(shared, a, row0, row8, at.c, s);
#pragma unroll
    for (int i = 0; i < kHeads / 2; ++i)
        if (!(i & 2 ? is_valid8 : is_valid0)) s[i] = -INFINITY;
    return is_unusual;
}

/* Two barriers of the team a tile: all maxima are there (and the old P is used up); P is there. */
template <int kHeads, int kWide, int kSlots, int kTiles, typename Memory>
__device__ __forceinline__ void attend_tiles(const Arguments& a, Memory& shared, const Place& at, int num_slots,
                                             float (&sums)[kHeads / 4], float (&o)[kTiles][kHeads / 2]) {
    const int first_dim = first_dim_of<kWide>(at);
    constexpr int kTeamThreads = 128 * kWide;
    const int barrier = kTeam + at.team;
    const uint32_t weights = shared_address(shared.weights[at.team]) +
                             (at.wide * 4 + at.warp) * Memory::kWeightStepBytes + (at.g >> 2) * kHeads * 16 +
                             (at.g & 3) * 4 + at.c * 32;
    constexpr int kRound = 4; /* slots of one tile a team */
    for (int slot = at.team * 2 * kWide; slot < num_slots; slot += kRound) {
        const int turn = slot / kRound & 1;
#pragma unroll
        for (int i = 0; i < 2 * kWide; ++i)
            barrier_wait(shared_address(&shared.full[(slot + i) % kSlots]), (slot + i) / kSlots & 1);
        float s[kHeads / 2];
        const bool is_unusual = score_valid<false, kHeads, kWide, kSlots>(shared, a, at, slot, s);
        int32_t* maxima = shared.maxima[at.team][turn];
        raise_maxima<kHeads>(s, maxima, at.c);
        const bool are_usual = !named_barrier_any(barrier, kTeamThreads, is_unusual);
        /* A team knows only now, at a barrier it needs anyway, that a tile has unusual scales. The maxima, which serve
         * as references, are good enough. The place is taken anew because the usual path needs every register. */
        if (__builtin_expect(!are_usual, 0))
            score_valid<true, kHeads, kWide, kSlots>(shared, a, place_of_thread<kWide>(), slot, s);
        float reference[kHeads / 4];
        move_references<kHeads>(shared.references[at.team], maxima, at.c, reference, sums, o);
        const int team_thread = threadIdx.x % kTeamThreads;
        if (team_thread < kHeads) shared.maxima[at.team][turn ^ 1][team_thread] = ordered(-INFINITY);
        store_weights<kHeads>(s, reference, sums, weights, are_usual);
        fence_async_proxy();
        named_barrier_sync(barrier, kTeamThreads);
        if (at.g == 0 && at.wide == 0 && at.warp == 0) { /* everybody has read the old ones */
#pragma unroll
            for (int j = 0; j < kHeads / 8; ++j)
                *(float2*)&shared.references[at.team][8 * j + 2 * at.c] =
                    make_float2(reference[2 * j], reference[2 * j + 1]);
        }
        if (__builtin_expect(are_usual, 1))
            weigh_tile<true, kHeads, kWide, kSlots>(shared, at, slot, first_dim, o);
        else
            weigh_tile<false, kHeads, kWide, kSlots>(shared, at, slot, first_dim, o);
    }
}

namespace {

/* ---- kernel ---- */

/* As the spread of CTAs without a cluster, which keep their parts in the workspace: Arguments::spread is how many. */
constexpr int kKept = 0;

template <int kSpread>
constexpr int kCtasOfCluster = kSpread == kKept ? 1 : kSpread;

/* Blocks of a row: num_parts parts of kHeads heads, each of kSpread CTAs that share the row's tiles as evenly as whole
 * tiles allow. A cluster is one (row, part). The launch overlaps the end of the kernel before, which may still be
 * writing what this one reads. */
template <int kHeads, int kWide, int kSlots, int kSpread, bool kOwnBuffer>
__global__ void __launch_bounds__(kThreads, 1) attend(const __grid_constant__ Arguments a) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    using Memory = Shared<kHeads, kWide, kSlots, kCtasOfCluster<kSpread>, kOwnBuffer>;
    constexpr int kTileRows = 64 * kWide;
    extern __shared__ __align__(128) uint8_t memory[];
    Memory& shared = *(Memory*)memory;
    const int spread = kSpread == kKept ? a.spread : kSpread;
    const int rank = kSpread == kKept ? (int)(blockIdx.x % (uint32_t)spread) : kSpread == 1 ? 0 : (int)cluster_rank();
    const uint32_t unit = blockIdx.x / (uint32_t)spread;
    const uint32_t token = unit / (uint32_t)a.num_parts;
    const int first_head = unit % (uint32_t)a.num_parts * kHeads;
    const int32_t* ids = a.slot_ids + (int64_t)token * a.topk;
    const bool is_producer = threadIdx.x >= kConsumers;
    Range range = range_of<kTileRows>(a.topk, rank, spread);
    prefetch_query<kHeads>(a, token, first_head, rank, spread);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kSlots; ++i) {
            barrier_init(shared_address(&shared.full[i]), kProducerWarps * 33); /* every thread's copies, `valid` */
            barrier_init(shared_address(&shared.free[i]), 4 * kWide);
        }
        barrier_init(shared_address(&shared.all_received), 1);
        barrier_init_fence();
    }
    if (threadIdx.x < Memory::kTeams * kHeads) {
        shared.maxima[threadIdx.x / kHeads][0][threadIdx.x % kHeads] = ordered(-INFINITY);
        shared.references[threadIdx.x / kHeads][threadIdx.x % kHeads] = -INFINITY;
    }
    wait_for_previous_kernel();
    /* most rows are full: their first ids need not wait for the count */
    int32_t id = is_producer ? load_id(ids, range, 0) : 0;
    const int32_t count = a.counts == nullptr ? a.topk : min(max(__ldg(a.counts + token), 0), a.topk);
    __syncthreads();
    if (kSpread > 1 && threadIdx.x == 0) expect_parts<kHeads, kCtasOfCluster<kSpread>>(shared);
    if (kSpread > 1 && kOwnBuffer) cluster_arrive_relaxed(); /* what is sent must wait until every CTA has started */
    if (count != a.topk) {
        range = range_of<kTileRows>(count, rank, spread);
        if (is_producer) id = load_id(ids, range, 0);
    }
    if (is_producer) {
        give_registers<kProducerRegisters>();
        produce<Memory, kSlots, kHeads == 32 ? 4 : 0>(a, shared, ids, range, id);
        if (kSpread > 1 && !kOwnBuffer) cluster_arrive_relaxed();
        if (kSpread > 1) cluster_wait();
    } else {
        take_registers<kConsumerRegisters>();
        constexpr int kTiles = 8 / kWide; /* of 64 output dims, per warpgroup */
        float o[kTiles][kHeads / 2];
        float sums[kHeads / 4]; /* of the weights of this thread's tokens */
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int i = 0; i < kHeads / 2; ++i) o[m][i] = 0.0f;
#pragma unroll
        for (int i = 0; i < kHeads / 4; ++i) sums[i] = 0.0f;
        load_query<kHeads>(a, shared, token, first_head);
        fence_async_proxy();
        named_barrier_sync(kAllConsumers, kConsumers);
        attend_tiles<kHeads, kWide, kSlots>(a, shared, place_of_thread<kWide>(), range.num_slots, sums, o);
        const Place at = place_of_thread<kWide>(); /* anew: the loop needs every register */
        let_next_kernel_start();
        publish_sums<kHeads>(shared, at, sums);
        named_barrier_sync(kAllConsumers, kConsumers);
        /* this CTA's ring is idle: what was read from it has arrived, so there is nothing to release */
        if (kSpread > 1 && !kOwnBuffer) cluster_arrive_relaxed();
        if constexpr (kWide == 1) merge_teams<kHeads>(shared, at, o);
        const int kept_dim = first_kept_dim<kWide>(at);
        if constexpr (kSpread == kKept) {
            store_part<kHeads, 2 / kWide>(a, shared, o);
        } else if constexpr (kSpread == 1) {
            store_own_output<kHeads, kWide>(a, shared, at, token, first_head, kept_dim, o);
        } else {
            cluster_wait();
            send_parts<kHeads, 2 / kWide, kSpread>(shared, rank, o);
            if (rank >= Shares<kHeads, kSpread>::kOwners) return;
            barrier_wait_cluster(shared_address(&shared.all_received), 0);
            store_output<kHeads, kSpread>(a, shared, at, rank, token, first_head, kept_dim);
        }
    }
#endif
}

/* A block: one unit of one (row, part). */
template <int kHeads, int kWide>
__global__ void __launch_bounds__(kConsumers) merge_parts(const __grid_constant__ Arguments a) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    wait_for_previous_kernel();
    let_next_kernel_start();
    merge_unit<kHeads, kWide>(a, blockIdx.x / kUnitsOfThread<kHeads>, (int)(blockIdx.x % kUnitsOfThread<kHeads>));
#endif
}

/* ---- launch ---- */

/* Clusters of `cluster` CTAs, started while the kernel before ends. */
template <typename Kernel>
cudaError_t launch_overlapping(Kernel* kernel, int64_t num_blocks, int threads, int32_t shared_bytes, int cluster,
                               const Arguments& a, cudaStream_t stream) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = (unsigned)cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)num_blocks);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cluster > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, a);
}

/* Bound: the cache rows, 656 bytes a token and part. From random places they come out of memory at 2.8 TB/s at most,
 * and into one multiprocessor at 18 bytes a cycle. Tensor cores: 68 products of 13 (16 heads) or 16 (32) cycles per 64
 * tokens; the conversion of the rows, twice each, takes about as long. */
template <int kHeads, int kWide, int kSlots, int kSpread, bool kOwnBuffer>
dsa_status launch(const Arguments& a, int64_t num_tokens, const Device& device, cudaStream_t stream) {
    constexpr int kCluster = kCtasOfCluster<kSpread>;
    constexpr int32_t kBytes = sizeof(Shared<kHeads, kWide, kSlots, kCluster, kOwnBuffer>);
    static_assert(kBytes <= 232448, "the shared memory of a multiprocessor");
    static_assert(kSlots >= 4, "a tile of two warpgroups, or one of each team");
    static_assert(Shares<kHeads, kCluster>::kBytes + kBoxBytes<kHeads, kWide> <= kSlots * kSlotBytes, "the idle ring");
    if (device.max_shared_bytes < kBytes) return DSA_UNSUPPORTED;
    const int64_t num_blocks = num_tokens * a.num_parts * (kSpread == kKept ? a.spread : kSpread);
    if (num_blocks > INT32_MAX) return DSA_UNSUPPORTED;
    auto* kernel = attend<kHeads, kWide, kSlots, kSpread, kOwnBuffer>;
    dsa_status status = allow_shared_bytes(kernel, kBytes);
    if (status == DSA_OK && kSpread > 8)
        status = status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    if (status != DSA_OK) return status;
    const cudaError_t error = launch_overlapping(kernel, num_blocks, kThreads, kBytes, kCluster, a, stream);
    return error != cudaSuccess ? status_of(error) : launched(stream);
}

/* Bound: what the CTAs kept, 64 or 32 KB each of at most one a multiprocessor: 8.4 MB, which the L2 still has. */
template <int kHeads, int kWide, int kSlots>
dsa_status launch_keeping_parts(const Arguments& a, int64_t num_tokens, const Device& device, cudaStream_t stream) {
    const dsa_status status = launch<kHeads, kWide, kSlots, kKept, false>(a, num_tokens, device, stream);
    if (status != DSA_OK) return status;
    const int64_t num_blocks = num_tokens * a.num_parts * kUnitsOfThread<kHeads>;
    const cudaError_t error =
        launch_overlapping(merge_parts<kHeads, kWide>, num_blocks, kConsumers, 0, 1, a, stream);
    return error != cudaSuccess ? status_of(error) : launched(stream);
}

Arguments arguments_of(const dsa_sparse_mla_params& params, int32_t heads) {
    Arguments a = {};
    a.query = (const uint8_t*)params.query;
    a.latent_cache = params.latent_cache;
    a.slot_ids = params.slot_ids;
    a.counts = params.counts;
    a.out = (uint8_t*)params.out;
    a.lse = params.lse;
    a.block_stride_bytes = params.block_stride_bytes;
    a.num_slots = (int32_t)(params.num_blocks * params.block_size);
    a.block_size = params.block_size;
    a.num_heads = params.num_heads;
    a.num_parts = (params.num_heads + heads - 1) / heads;
    a.topk = params.topk;
    a.scale_log2 = params.softmax_scale * 1.44269504088896f;
    return a;
}

/* How a row is cut: heads of a part, CTAs that share its slots, as a cluster or keeping their parts. */
struct Plan {
    int32_t heads;
    int32_t spread;
    bool keeps_parts;
};

/* Measured on an H200 of 132 multiprocessors: how many clusters run at once, and what a CTA's work costs. */
struct Spread {
    int32_t ctas;
    int32_t clusters_at_once;
};
constexpr Spread kSpreads[] = {{1, 132}, {2, 66}, {3, 38}, {4, 29}, {6, 16}, {8, 14}, {16, 6}};
constexpr int32_t kMeasuredMultiprocessors = 132;

/* The same on any device: as many for its size, and no more than it says. 0: not one. */
int64_t rows_at_once(const Spread& spread, const Device& device) {
    if (spread.ctas == 1) return device.num_multiprocessors;
    const int64_t expected = (int64_t)spread.clusters_at_once * device.num_multiprocessors / kMeasuredMultiprocessors;
    return std::min<int64_t>(expected, clusters_at_once(device, spread.ctas));
}

struct Cost { /* microseconds */
    int32_t heads;
    int32_t largest_cluster;
    double start_and_merge;
    double step; /* 128 tokens */
    double start_and_keep; /* with the other kernel, which takes longer the more CTAs kept something */
    double keeping_step;
    double keeping_cta;
};
constexpr Cost kCosts[] = {{16, 16, 5.9, 2.75, 5.7, 2.6, 0.026}, {32, 2, 8.2, 3.65, 4.7, 3.75, 0.045}};
constexpr int32_t kStepTokens = 128;

int64_t units_of(const dsa_sparse_mla_params& params, int32_t heads, int64_t num_rows) {
    return num_rows * ((params.num_heads + heads - 1) / heads);
}

/* The plan with the least estimated time. Parts are kept only where all CTAs run at once. */
Plan choose_plan(const dsa_sparse_mla_params& params, const Device& device, int64_t num_rows_hint, bool may_keep) {
    const int64_t steps = ((int64_t)params.topk + kStepTokens - 1) / kStepTokens;
    Plan best = {16, 1, false};
    double best_time = INFINITY;
    const auto consider = [&](const Plan& plan, double time) {
        if (time < best_time) best = plan, best_time = time;
    };
    for (const Cost& cost : kCosts) {
        if (cost.heads == 32 && params.num_heads <= 16) continue;
        const int64_t units = units_of(params, cost.heads, num_rows_hint);
        for (const Spread& spread : kSpreads) {
            const int64_t at_once = rows_at_once(spread, device);
            if (spread.ctas > cost.largest_cluster || at_once == 0) continue;
            const double waves = (double)((units + at_once - 1) / at_once);
            const double cta_steps = (double)((steps + spread.ctas - 1) / spread.ctas);
            consider({cost.heads, spread.ctas, false}, waves * (cost.start_and_merge + cta_steps * cost.step));
        }
        const int64_t most = std::min(steps, device.num_multiprocessors / units);
        if (!may_keep || most < 2) continue;
        const int64_t cta_steps = (steps + most - 1) / most;
        const int64_t spread = (steps + cta_steps - 1) / cta_steps; /* no more than these steps need */
        consider({cost.heads, (int32_t)spread, true}, cost.start_and_keep + (double)cta_steps * cost.keeping_step +
                                                          (double)(units * spread) * cost.keeping_cta);
    }
    return best;
}

int64_t kept_ctas(const dsa_sparse_mla_params& params, const Plan& plan) {
    return plan.keeps_parts ? units_of(params, plan.heads, params.num_tokens) * plan.spread : 0;
}

int64_t kept_output_bytes(const dsa_sparse_mla_params& params, const Plan& plan) {
    return kept_ctas(params, plan) * plan.heads * kLatent * (int64_t)sizeof(float);
}

/* The rings fill the shared memory; at 16 CTAs a row of 2048 ids needs 4 slots, and what arrives has its own buffer. */
dsa_status launch_plan(const Plan& plan, const Arguments& a, int64_t num_tokens, const Device& device,
                       cudaStream_t stream) {
    if (plan.keeps_parts)
        return plan.heads == 16 ? launch_keeping_parts<16, 1, 9>(a, num_tokens, device, stream)
                                : launch_keeping_parts<32, 2, 8>(a, num_tokens, device, stream);
    switch (plan.heads * 100 + plan.spread) {
        case 1601: return launch<16, 1, 9, 1, false>(a, num_tokens, device, stream);
        case 1602: return launch<16, 1, 9, 2, false>(a, num_tokens, device, stream);
        case 1603: return launch<16, 1, 9, 3, false>(a, num_tokens, device, stream);
        case 1604: return launch<16, 1, 9, 4, false>(a, num_tokens, device, stream);
        case 1606: return launch<16, 1, 9, 6, false>(a, num_tokens, device, stream);
        case 1608: return launch<16, 1, 9, 8, false>(a, num_tokens, device, stream);
        case 1616: return launch<16, 1, 8, 16, true>(a, num_tokens, device, stream);
        case 3201: return launch<32, 2, 8, 1, false>(a, num_tokens, device, stream);
        case 3202: return launch<32, 2, 8, 2, false>(a, num_tokens, device, stream);
        default: return DSA_UNSUPPORTED;
    }
}

}  // namespace
}  // namespace rows

size_t sparse_mla_sm90_rows_workspace_bytes(const dsa_sparse_mla_params& params, const Device& device) {
    using namespace rows;
    const Plan plan = choose_plan(params, device, std::max<int64_t>(params.num_tokens, 1), true);
    const int64_t sums = kept_ctas(params, plan) * plan.heads * (int64_t)sizeof(float2);
    return (size_t)(kept_output_bytes(params, plan) + sums);
}

dsa_status sparse_mla_sm90_rows(const dsa_sparse_mla_params& params, const Device& device, int64_t num_rows_hint,
                                bool has_workspace, cudaStream_t stream) {
    using namespace rows;
    if (!device.has_hopper_instructions) return DSA_UNSUPPORTED;
    const Plan plan = choose_plan(params, device, std::max<int64_t>(num_rows_hint, 1), has_workspace);
    Arguments a = arguments_of(params, plan.heads);
    a.spread = plan.spread;
    a.outputs = (float4*)params.workspace;
    a.sums = (float2*)((uint8_t*)params.workspace + kept_output_bytes(params, plan));
    return launch_plan(plan, a, params.num_tokens, device, stream);
}

}  // namespace gpu
}  // namespace dsa
