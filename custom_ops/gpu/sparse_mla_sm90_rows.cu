#include "sparse_mla_sm90_rows.cuh"

#include <algorithm>

#include "sparse_mla_kernels.h"

namespace dsa {
namespace gpu {
namespace rows {
namespace {

/* Where a consumer thread stands. Warps of one warpgroup share a fragment of 64 rows. */
struct Place {
    int team; /* works on tiles team, team + kTeams, ... */
    int wide; /* warpgroup within the team */
    int warp; /* within the warpgroup */
    int g;    /* fragment row, and g + 8 */
    int c;    /* fragment columns 2 c, 2 c + 1 of every 8 */
};

template <int kWide>
__device__ __forceinline__ Place place_of_thread() {
    /* taken from one lane, so that the compiler sees that a warp agrees and keeps descriptors in uniform registers */
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    const int lane = threadIdx.x & 31;
    return {kWide == 2 ? 0 : warp >> 2, kWide == 2 ? warp >> 2 : 0, warp & 3, lane >> 2, lane & 3};
}

/* ---- load: the rows of a slot, 16 bytes a thread and copy ---- */

/* What a CTA works on: the tiles of a row's first `count` ids, shared out as evenly as whole tiles allow. */
struct Range {
    int32_t first; /* index into the row's ids */
    int32_t num_slots;
    int32_t count;
};

template <int kTileRows, int kSpread>
__device__ __forceinline__ Range range_of(int32_t count, int rank) {
    const int64_t all_tiles = ((int64_t)count + kTileRows - 1) / kTileRows;
    const int32_t first_tile = (int32_t)(all_tiles * rank / kSpread);
    const int32_t num_tiles = (int32_t)(all_tiles * (rank + 1) / kSpread) - first_tile;
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

/* Rows of ids that do not count arrive as zeros and with a zero in `valid`. */
template <typename Memory, int kSlots>
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

/* ---- load: the query ---- */

/* 64 dims j: thread c of a fragment reads bytes 64 j + 16 c .. + 15 of a row at once, four of them for each of four k-steps;
 * the query has its dims in that order. Core matrices of 8 heads x 16 bytes, heads next to one another. */
template <int kHeads>
__device__ __forceinline__ uint32_t query_offset(int step, int c, int half, int head) {
    return (step * 2 + half) * kHeads * 16 + head * 16 + c * 4;
}

__device__ __forceinline__ uint32_t largest_magnitude(const uint4& v) {
    constexpr uint32_t kMagnitude = 0x7FFF7FFF;
    return __vmaxu2(__vmaxu2(v.x & kMagnitude, v.y & kMagnitude), __vmaxu2(v.z & kMagnitude, v.w & kMagnitude));
}

/* Eight latent dims of a head. The lanes of 16 neighbours hold a whole group. */
template <int kHeads, typename Memory>
__device__ __forceinline__ void store_latent_query(Memory& shared, const uint4& v, int head, int piece, float scale_log2) {
    uint32_t largest = largest_magnitude(v);
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2)
        largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, distance));
    largest = max(largest & 0xFFFF, largest >> 16);
    /* the exponent field e of bfloat16; 2^(e - 127) becomes 2^8 */
    const uint32_t exponent = min(max(largest >> 7, 9u), 253u);
    const float factor = __uint_as_float((262 - exponent) << 23);
    if ((piece & 15) == 0)
        shared.query_scales[piece >> 4][head] = __uint_as_float((exponent - 8) << 23) * scale_log2;
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    const int step = piece / 8 * 4 + 2 * (piece & 1), c = (piece >> 1) & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float low = __uint_as_float(words[i] << 16) * factor;
        const float high = __uint_as_float(words[i] & 0xFFFF0000) * factor;
        *(uint32_t*)(shared.query + query_offset<kHeads>(step + (i >> 1), c, i & 1, head)) = pack_f16(low, high);
    }
}

template <int kHeads, typename Memory>
__device__ __forceinline__ void load_query(const Arguments& a, Memory& shared, int64_t token, int first_head) {
    constexpr int kLatentPieces = kLatent / 8, kRopePieces = kRope / 8;
    constexpr int kLoads = kHeads * kLatentPieces / kConsumers;
    const uint8_t* query = a.query + (token * a.num_heads + first_head) * (kWidth * 2);
    const int num_heads = a.num_heads - first_head;
    uint4 latent[kLoads], rope = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int item = threadIdx.x + i * kConsumers, head = item / kLatentPieces;
        latent[i] = make_uint4(0, 0, 0, 0);
        if (head < num_heads) latent[i] = load_16(query + head * (kWidth * 2) + item % kLatentPieces * 16);
    }
    const int rope_head = threadIdx.x / kRopePieces, rope_piece = threadIdx.x % kRopePieces;
    if (rope_head < kHeads && rope_head < num_heads)
        rope = load_16(query + rope_head * (kWidth * 2) + kLatent * 2 + rope_piece * 16);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int item = threadIdx.x + i * kConsumers;
        store_latent_query<kHeads>(shared, latent[i], item / kLatentPieces, item % kLatentPieces, a.scale_log2);
    }
    if (rope_head < kHeads) {
        const int step = kSteps - kRopeSteps + rope_piece / 4 * 2, c = rope_piece & 3;
        const uint32_t words[4] = {rope.x, rope.y, rope.z, rope.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            *(uint32_t*)(shared.query + query_offset<kHeads>(step + (i >> 1), c, i & 1, rope_head)) = words[i];
    }
}

/* ---- score ---- */

/* s += scales of the tokens and of the query times the sums of one group */
template <int kHeads, typename Memory>
__device__ __forceinline__ void add_group(const Memory& shared, float (&s)[kHeads / 2], const float (&sums)[kHeads / 2],
                                          int group, uint32_t row0, uint32_t row8, int c) {
    const float scale0 = load_shared_float(row0 + kScaleOffset + 4 * group);
    const float scale8 = load_shared_float(row8 + kScaleOffset + 4 * group);
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
template <int kHeads, int kWide>
struct ScoreSteps {
    static constexpr int kBuffers = kHeads == 16 && kWide == 2 ? 4 : 3; /* what the registers hold */
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

/* Scores, in units of log2, of the two rows at row0 and row8 (their fragment). */
template <int kHeads, int kWide, typename Memory>
__device__ __forceinline__ void score_tile(const Memory& shared, const Arguments& a, uint32_t row0, uint32_t row8, int c,
                                           float (&s)[kHeads / 2]) {
    using Steps = ScoreSteps<kHeads, kWide>;
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
        add_group<kHeads>(shared, s, done, group, row0, row8, c);
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
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            widen(x[i], fragments[i][0], fragments[i][2]);
            widen(y[i], fragments[i][1], fragments[i][3]);
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

/* Per thread: its heads 8 j + 2 c + e at 2 j + e. */
template <int kHeads>
struct Softmax {
    float reference[kHeads / 4]; /* log2; sums and outputs are relative to it; -inf before the first valid token */
    float sum[kHeads / 4];       /* over this thread's tokens */
};

/* Follows the largest score when it has risen by more than kSlack; the same decision in all threads of a team. */
template <int kHeads, int kTiles>
__device__ __forceinline__ void move_references(Softmax<kHeads>& softmax, const int32_t* maxima, int c,
                                                float (&o)[kTiles][kHeads / 2]) {
    float factor[kHeads / 4];
    bool has_moved = false;
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
        const int2 both = *(const int2*)&maxima[8 * j + 2 * c];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float largest = from_ordered(e ? both.y : both.x);
            float& reference = softmax.reference[2 * j + e];
            factor[2 * j + e] = 1.0f;
            if (largest > reference + kSlack) {
                factor[2 * j + e] = exp2_fast(reference - largest);
                reference = largest;
                has_moved = true;
            }
        }
    }
    if (!__any_sync(~0u, has_moved)) return;
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i) softmax.sum[i] *= factor[i];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int i = 0; i < kHeads / 2; ++i) o[m][i] *= factor[(i >> 2) * 2 + (i & 1)];
}

/* P of the thread's two tokens, neighbours in a k-step, to shared memory. */
template <int kHeads>
__device__ __forceinline__ void store_weights(const float (&s)[kHeads / 2], Softmax<kHeads>& softmax, uint32_t to,
                                              bool are_usual) {
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            /* without a valid token there is no reference, and -inf - 0 weighs nothing */
            const float reference = softmax.reference[2 * j + e] == -INFINITY ? 0.0f : softmax.reference[2 * j + e];
            const float p0 = exp2_fast(s[4 * j + e] - reference);
            const float p8 = exp2_fast(s[4 * j + 2 + e] - reference);
            softmax.sum[2 * j + e] += p0 + p8;
            store_shared_4(to + j * 128 + e * 16, are_usual ? pack_f16(p0, p8) : pack_bf16(p0, p8));
        }
}

/* ---- weigh: O^T += V^T P^T ---- */

/* Words low: two tokens of dim i and of dim i + 1; kUsual says how (see the top of the header). */
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

/* Slots slot .. slot + 2 kWide - 1 (running numbers) hold the tile; each is given back when its last bytes are in registers.
 * Output tile m has dims first_dim + 2 m (fragment row g) and first_dim + 2 m + 1 (row g + 8). */
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
        if ((step & 1) && (threadIdx.x & 31) == 0) barrier_arrive(shared_address(&shared.free[(slot + (step >> 1)) % kSlots]));
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

template <int kHeads, int kWide, int kSlots, int kTiles, typename Memory>
__device__ __forceinline__ void attend_tiles(const Arguments& a, Memory& shared, const Place& at, int num_tiles,
                                             int first_dim, Softmax<kHeads>& softmax, float (&o)[kTiles][kHeads / 2]) {
    constexpr int kTeams = 2 / kWide, kTeamThreads = 128 * kWide;
    const int barrier = kTeam + at.team;
    const int my_row = (at.warp & 1) * 16 + token_of(at.g); /* of slot 2 wide + warp / 2 of the tile */
    const uint32_t weights = shared_address(shared.weights[at.team]) + (at.wide * 4 + at.warp) * Memory::kWeightStepBytes +
                             (at.g >> 2) * kHeads * 16 + (at.g & 3) * 4 + at.c * 32;
    int turn = 0;
    for (int tile = at.team; tile < num_tiles; tile += kTeams, turn ^= 1) {
        const int slot = tile * 2 * kWide;
#pragma unroll
        for (int i = 0; i < 2 * kWide; ++i)
            barrier_wait(shared_address(&shared.full[(slot + i) % kSlots]), (slot + i) / kSlots & 1);
        const int my_slot = (slot + at.wide * 2 + (at.warp >> 1)) % kSlots;
        const uint32_t row0 = shared_address(shared.ring[my_slot]) + my_row * kRowBytes, row8 = row0 + 8 * kRowBytes;
        const uint32_t valid = *(const uint32_t*)shared.valid[my_slot] >> my_row;
        const bool is_valid0 = valid & 1, is_valid8 = valid >> 8 & 1;
        const bool is_unusual = (is_valid0 && !are_usual_scales(row0)) || (is_valid8 && !are_usual_scales(row8));
        float s[kHeads / 2];
        score_tile<kHeads, kWide>(shared, a, row0, row8, at.c, s);
#pragma unroll
        for (int i = 0; i < kHeads / 2; ++i)
            if (!(i & 2 ? is_valid8 : is_valid0)) s[i] = -INFINITY;
        int32_t* maxima = shared.maxima[at.team][turn];
        raise_maxima<kHeads>(s, maxima, at.c);
        const bool are_usual = !named_barrier_any(barrier, kTeamThreads, is_unusual);
        move_references(softmax, maxima, at.c, o);
        const int team_thread = threadIdx.x % kTeamThreads;
        if (team_thread < kHeads) shared.maxima[at.team][turn ^ 1][team_thread] = ordered(-INFINITY);
        store_weights<kHeads>(s, softmax, weights, are_usual);
        fence_async_proxy();
        named_barrier_sync(barrier, kTeamThreads);
        if (are_usual)
            weigh_tile<true, kHeads, kWide, kSlots>(shared, at, slot, first_dim, o);
        else
            weigh_tile<false, kHeads, kWide, kSlots>(shared, at, slot, first_dim, o);
    }
}

/* ---- merge ---- */

/* The sum of every warp's tokens, and the references of every team. */
template <int kHeads, typename Memory>
__device__ __forceinline__ void publish_sums(Memory& shared, const Place& at, Softmax<kHeads>& softmax) {
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i)
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
            softmax.sum[i] += __shfl_xor_sync(~0u, softmax.sum[i], distance);
    if (at.g != 0) return;
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i) {
        const int head = (i >> 1) * 8 + 2 * at.c + (i & 1);
        shared.warp_sums[threadIdx.x >> 5][head] = softmax.sum[i];
        if (at.wide == 0 && at.warp == 0) shared.references[at.team][head] = softmax.reference[i];
    }
}

/* exp2 of a difference of references; nothing relative to nothing counts nothing. */
__device__ __forceinline__ float relative_weight(float reference, float common) {
    return reference == -INFINITY ? 0.0f : exp2_fast(reference - common);
}

template <int kHeads, int kWide>
constexpr int kBoxBytes = kWide == 1 ? 2 * 4 * (kHeads / 2) * 128 * 4 : 0;

/* Two teams: each brings its output to the common reference, keeps half of the dims and hands the other half over. The ring
 * is idle by now. The lower four tiles of o are the kept ones afterwards. */
template <int kHeads, typename Memory>
__device__ __forceinline__ void merge_teams(Memory& shared, const Place& at, Softmax<kHeads>& softmax,
                                            float (&o)[8][kHeads / 2]) {
    constexpr int kHalf = 4, kColumns = kHeads / 2;
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i) {
        const int head = (i >> 1) * 8 + 2 * at.c + (i & 1);
        const float other = shared.references[at.team ^ 1][head];
        const float common = fmaxf(other, softmax.reference[i]);
        const float factor = relative_weight(softmax.reference[i], common);
#pragma unroll
        for (int m = 0; m < 2 * kHalf; ++m) {
            o[m][(i >> 1) * 4 + (i & 1)] *= factor;
            o[m][(i >> 1) * 4 + 2 + (i & 1)] *= factor;
        }
        softmax.reference[i] = common;
    }
    float* box = (float*)(shared.ring[0] + Memory::kReceivedBytes);
    float* given = box + at.team * (kHalf * kColumns * 128) + threadIdx.x % 128;
    const float* taken = box + (at.team ^ 1) * (kHalf * kColumns * 128) + threadIdx.x % 128;
#pragma unroll
    for (int m = 0; m < kHalf; ++m)
#pragma unroll
        for (int i = 0; i < kColumns; ++i) given[(m * kColumns + i) * 128] = at.team == 0 ? o[kHalf + m][i] : o[m][i];
    named_barrier_sync(kAllConsumers, kConsumers);
#pragma unroll
    for (int m = 0; m < kHalf; ++m)
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            o[m][i] = (at.team == 0 ? o[m][i] : o[kHalf + m][i]) + taken[(m * kColumns + i) * 128];
}

/* Reference and sum of a head over the whole CTA, in the order of the warps. */
template <int kTeams, typename Memory>
__device__ __forceinline__ float2 sums_of_block(const Memory& shared, int head) {
    float reference = shared.references[0][head];
    if (kTeams == 2) reference = fmaxf(reference, shared.references[1][head]);
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kConsumerWarps; ++warp) {
        const float factor = kTeams == 2 ? relative_weight(shared.references[warp / 4][head], reference) : 1.0f;
        sum += factor * shared.warp_sums[warp][head];
    }
    return make_float2(reference, sum);
}

__device__ __forceinline__ float lse_of(float reference, float sum) {
    return reference == -INFINITY ? -INFINITY : (reference + log2f(sum)) * 0.693147180559945f;
}

template <int kHeads, int kTeams, int kSpread, int kTiles, typename Memory>
__device__ __forceinline__ void send_parts(Memory& shared, int rank, const float (&o)[kTiles][kHeads / 2]) {
    using Share = Shares<kHeads, kSpread>;
    const uint32_t barrier = shared_address(&shared.all_received);
    const int slice = threadIdx.x / Share::kSliceThreads, thread = threadIdx.x % Share::kSliceThreads;
    float4* const here = (float4*)shared.received() + rank * Share::kSliceThreads + thread;
#pragma unroll
    for (int unit = 0; unit < Share::kAllUnits; ++unit) {
        const int owner = unit / Share::kUnits * Share::kSlices + slice;
        float4* const to = here + unit % Share::kUnits * (kSpread * Share::kSliceThreads);
        const int i = unit / 4 * 4 + (unit / 2 & 1), m = unit % 2 * 2;
        const float4 v = make_float4(o[m][i], o[m][i + 2], o[m + 1][i], o[m + 1][i + 2]);
        if (owner == rank)
            *to = v; /* read by this thread itself */
        else
            send_4(remote_address(shared_address(to), owner), v, remote_address(barrier, owner));
    }
    for (int i = threadIdx.x; i < kHeads * Share::kOwners; i += kConsumers) {
        const uint32_t mine = shared_address(&shared.received_sums[rank][i % kHeads]);
        send_2(remote_address(mine, i / kHeads), sums_of_block<kTeams>(shared, i % kHeads),
               remote_address(barrier, i / kHeads));
    }
}

/* The owner weighs the parts in the order of the ranks and writes out and lse. */
template <int kHeads, int kSpread, typename Memory>
__device__ __forceinline__ void store_output(const Arguments& a, const Memory& shared, const Place& at, int rank,
                                             int64_t token, int first_head, int first_dim) {
    using Share = Shares<kHeads, kSpread>;
    if ((int)threadIdx.x / Share::kSliceThreads != rank % Share::kSlices) return;
    const int first_unit = rank / Share::kSlices * Share::kUnits;
    constexpr int kDimUnits = Share::kUnits > 1 ? 2 : 1; /* of one head */
#pragma unroll
    for (int i = 0; i < Share::kUnits; i += kDimUnits) {
        const int unit = first_unit + i;
        const int head = unit / 4 * 8 + 2 * at.c + (unit / 2 & 1), dim = first_dim + unit % 2 * 4;
        float4 sum_of[kDimUnits] = {};
        float reference = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kSpread; ++r) reference = fmaxf(reference, shared.received_sums[r][head].x);
#pragma unroll
        for (int r = 0; r < kSpread; ++r) {
            const float2 part = shared.received_sums[r][head];
            const float weight = relative_weight(part.x, reference);
            sum = fmaf(weight, part.y, sum);
#pragma unroll
            for (int d = 0; d < kDimUnits; ++d) {
                const float4 v = ((const float4*)shared.received())[((i + d) * kSpread + r) * Share::kSliceThreads +
                                                                    threadIdx.x % Share::kSliceThreads];
                sum_of[d].x = fmaf(weight, v.x, sum_of[d].x), sum_of[d].y = fmaf(weight, v.y, sum_of[d].y);
                sum_of[d].z = fmaf(weight, v.z, sum_of[d].z), sum_of[d].w = fmaf(weight, v.w, sum_of[d].w);
            }
        }
        if (first_head + head >= a.num_heads) continue;
        const float inverse = reference == -INFINITY ? 0.0f : 1.0f / sum;
        const int64_t index = token * a.num_heads + first_head + head;
        uint32_t packed[2 * kDimUnits];
#pragma unroll
        for (int d = 0; d < kDimUnits; ++d) {
            packed[2 * d] = pack_bf16(sum_of[d].x * inverse, sum_of[d].y * inverse);
            packed[2 * d + 1] = pack_bf16(sum_of[d].z * inverse, sum_of[d].w * inverse);
        }
        uint8_t* to = a.out + (index * kLatent + dim) * 2;
        if constexpr (kDimUnits == 2)
            *(uint4*)to = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        else
            *(uint2*)to = make_uint2(packed[0], packed[1]);
        if (dim == 0 && a.lse != nullptr) a.lse[index] = lse_of(reference, sum);
    }
}

/* No cluster: out and lse straight from the registers. */
template <int kHeads, int kWide, int kTiles, typename Memory>
__device__ __forceinline__ void store_own_output(const Arguments& a, const Memory& shared, const Place& at, int64_t token,
                                                 int first_head, int first_dim, const float (&o)[kTiles][kHeads / 2]) {
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int head = 8 * j + 2 * at.c + e;
            if (first_head + head >= a.num_heads) continue;
            const float2 sums = sums_of_block<2 / kWide>(shared, head);
            const float inverse = sums.x == -INFINITY ? 0.0f : 1.0f / sums.y;
            uint32_t packed[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) packed[m] = pack_bf16(o[m][4 * j + e] * inverse, o[m][4 * j + 2 + e] * inverse);
            const int64_t index = token * a.num_heads + first_head + head;
            *(uint4*)(a.out + (index * kLatent + first_dim) * 2) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
            if (first_dim == 0 && a.lse != nullptr) a.lse[index] = lse_of(sums.x, sums.y);
        }
}

/* ---- kernel ---- */

/* Blocks of a row: num_parts parts of kHeads heads, each of kSpread CTAs that share the row's tiles as evenly as whole
 * tiles allow. A cluster is one (row, part). */
template <int kHeads, int kWide, int kSlots, int kSpread, bool kOwnBuffer>
__global__ void __launch_bounds__(kThreads, 1) attend(const __grid_constant__ Arguments a) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    using Memory = Shared<kHeads, kWide, kSlots, kSpread, kOwnBuffer>;
    constexpr int kTileRows = 64 * kWide;
    extern __shared__ __align__(128) uint8_t memory[];
    Memory& shared = *(Memory*)memory;
    const int rank = kSpread == 1 ? 0 : (int)cluster_rank();
    const uint32_t unit = blockIdx.x / kSpread;
    const int64_t token = unit / (uint32_t)a.num_parts;
    const int first_head = unit % (uint32_t)a.num_parts * kHeads;
    const int32_t* ids = a.slot_ids + token * a.topk;
    const bool is_producer = threadIdx.x >= kConsumers;
    /* most rows are full: their first ids need not wait for the count */
    Range range = range_of<kTileRows, kSpread>(a.topk, rank);
    int32_t id = is_producer ? load_id(ids, range, 0) : 0;
    const int32_t count = a.counts == nullptr ? a.topk : min(max(__ldg(a.counts + token), 0), a.topk);
    if (threadIdx.x < kSlots) {
        barrier_init(shared_address(&shared.full[threadIdx.x]), kProducerWarps * 33);
        barrier_init(shared_address(&shared.free[threadIdx.x]), 4 * kWide);
    }
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&shared.all_received), 1);
        using Share = Shares<kHeads, kSpread>;
        barrier_arrive_expect(shared_address(&shared.all_received), Share::kOutputBytes + Share::kSumBytes);
    }
    barrier_init_fence();
    if (threadIdx.x < Memory::kTeams * kHeads) shared.maxima[threadIdx.x / kHeads][0][threadIdx.x % kHeads] = ordered(-INFINITY);
    __syncthreads();
    if (kSpread > 1 && kOwnBuffer) cluster_arrive_relaxed(); /* what is sent must wait until every CTA has started */
    if (count != a.topk) {
        range = range_of<kTileRows, kSpread>(count, rank);
        if (is_producer) id = load_id(ids, range, 0);
    }
    if (is_producer) {
        give_registers<kProducerRegisters>();
        produce<Memory, kSlots>(a, shared, ids, range, id);
        if (kSpread > 1 && !kOwnBuffer) cluster_arrive_relaxed();
        if (kSpread > 1) cluster_wait();
    } else {
        take_registers<kConsumerRegisters>();
        constexpr int kTiles = 8 / kWide; /* of 64 output dims, per warpgroup */
        const Place at = place_of_thread<kWide>();
        const int first_dim = (at.wide * 4 + at.warp) * (16 * kTiles) + at.g * (2 * kTiles);
        float o[kTiles][kHeads / 2];
        Softmax<kHeads> softmax;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int i = 0; i < kHeads / 2; ++i) o[m][i] = 0.0f;
#pragma unroll
        for (int i = 0; i < kHeads / 4; ++i) softmax.reference[i] = -INFINITY, softmax.sum[i] = 0.0f;
        load_query<kHeads>(a, shared, token, first_head);
        fence_async_proxy();
        named_barrier_sync(kAllConsumers, kConsumers);
        attend_tiles<kHeads, kWide, kSlots>(a, shared, at, range.num_slots / (kTileRows / kSlotRows), first_dim, softmax, o);
        publish_sums<kHeads>(shared, at, softmax);
        named_barrier_sync(kAllConsumers, kConsumers);
        /* this CTA's ring is idle: what was read from it has arrived, so there is nothing to release */
        if (kSpread > 1 && !kOwnBuffer) cluster_arrive_relaxed();
        int kept_dim = first_dim;
        if constexpr (kWide == 1) {
            merge_teams<kHeads>(shared, at, softmax, o);
            kept_dim += 8 * at.team;
        }
        if constexpr (kSpread == 1) {
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

/* ---- launch ---- */

/* Bound: 656 bytes of a token per CTA and part; the tensor cores need 68 * 13 cycles per 64 tokens at 16 heads. */
template <int kHeads, int kWide, int kSlots, int kSpread, bool kOwnBuffer>
dsa_status launch(const Arguments& a, int64_t num_tokens, const Device& device, cudaStream_t stream) {
    constexpr int32_t kBytes = sizeof(Shared<kHeads, kWide, kSlots, kSpread, kOwnBuffer>);
    static_assert(kBytes <= 232448, "the shared memory of a multiprocessor");
    static_assert(kSlots >= 4, "a tile of two warpgroups, or one of each team");
    static_assert(Shares<kHeads, kSpread>::kBytes + kBoxBytes<kHeads, kWide> <= kSlots * kSlotBytes, "the idle ring");
    if (device.max_shared_bytes < kBytes) return DSA_UNSUPPORTED;
    const int64_t num_blocks = num_tokens * a.num_parts * kSpread;
    if (num_blocks > INT32_MAX) return DSA_UNSUPPORTED;
    auto* kernel = attend<kHeads, kWide, kSlots, kSpread, kOwnBuffer>;
    dsa_status status = allow_shared_bytes(kernel, kBytes);
    if (status == DSA_OK && kSpread > 8)
        status = status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    if (status != DSA_OK) return status;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kSpread, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)num_blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = kSpread > 1 ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, a);
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

/* How a row is cut: heads of a part, CTAs of a cluster. */
struct Plan {
    int32_t heads;
    int32_t spread;
};

/* As many CTAs as the device has multiprocessors, if the row has tiles for them. */
Plan choose_plan(const dsa_sparse_mla_params& params, const Device& device, int64_t num_rows_hint) {
    constexpr int32_t kTileRows = 128;
    Plan plan = {params.num_heads > 16 ? 32 : 16, 1};
    const int64_t units = num_rows_hint * ((params.num_heads + plan.heads - 1) / plan.heads);
    const int64_t tiles = ((int64_t)params.topk + kTileRows - 1) / kTileRows;
    while (plan.spread < 16 && 2 * plan.spread * units <= device.num_multiprocessors && plan.spread < tiles)
        plan.spread *= 2;
    return plan;
}

/* Long loops take the larger ring; with 8 CTAs and more a row of 2048 ids fits into the smaller one anyway. */
template <int kHeads, int kWide>
dsa_status launch_spread(int spread, const Arguments& a, int64_t num_tokens, const Device& device, cudaStream_t stream) {
    constexpr int kLong = kHeads == 16 ? 9 : 8, kShort = kHeads == 16 ? 8 : 5;
    switch (spread) {
        case 1: return launch<kHeads, kWide, kLong, 1, false>(a, num_tokens, device, stream);
        case 2: return launch<kHeads, kWide, kLong, 2, false>(a, num_tokens, device, stream);
        case 3: return launch<kHeads, kWide, kLong, 3, false>(a, num_tokens, device, stream);
        case 6: return launch<kHeads, kWide, kLong, 6, false>(a, num_tokens, device, stream);
        case 7: return launch<kHeads, kWide, kLong, 7, false>(a, num_tokens, device, stream);
        case 4: return launch<kHeads, kWide, kLong, 4, false>(a, num_tokens, device, stream);
        case 8: return launch<kHeads, kWide, kLong, 8, false>(a, num_tokens, device, stream);
        case 11: return launch<kHeads, kWide, kLong, 11, false>(a, num_tokens, device, stream);
        default: return launch<kHeads, kWide, kShort, 16, true>(a, num_tokens, device, stream);
    }
}

}  // namespace
}  // namespace rows

dsa_status sparse_mla_sm90_rows(const dsa_sparse_mla_params& params, const Device& device, int64_t num_rows_hint,
                                cudaStream_t stream) {
    using namespace rows;
    if (!device.has_hopper_instructions) return DSA_UNSUPPORTED;
    const Plan plan = choose_plan(params, device, std::max<int64_t>(num_rows_hint, 1));
    const Arguments a = arguments_of(params, plan.heads);
    if (plan.heads == 16) return launch_spread<16, 1>(plan.spread, a, params.num_tokens, device, stream);
    return launch_spread<32, 2>(plan.spread, a, params.num_tokens, device, stream);
}

}  // namespace gpu
}  // namespace dsa
