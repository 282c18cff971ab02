/* sparse_mla for any format and size on sm_80 and later, in float32 arithmetic.
 *
 * A block attends to one row with kHeads heads and owns up to 512 numbers of their results; kOwn of the heads are a
 * thread's. The row's valid ids are packed in their order and worked off in tiles of 32 cache rows:
 *
 *   stage     rows as they are in the cache, copied to shared memory while the tile before is worked on
 *   gather    a warp per row, decoded to bfloat16 (exact) or float32 in shared memory
 *   score     16 lanes share the dot products of kOwn heads with 4 rows: lane i owns the fours i, i + 16, i + 32, ..
 *   softmax   one or two heads a warp, a lane per row of the tile; running maximum and sum in registers
 *   gather    again, where rows are wider than the shared tile; those are not staged
 *   sum       a thread has 4 numbers of kOwn heads in registers
 *
 * The order of all sums depends on the row's valid ids only: not on kHeads or kOwn, not on the heads beside, not on
 * the width of the shared tile, which is a multiple of the 64 numbers that 16 lanes cover.
 */
#include <math.h>

#include <type_traits>

#include "hopper.cuh"
#include "latent_row.cuh"
#include "sparse_mla_kernels.h"

namespace dsa {
namespace gpu {
namespace {

constexpr int kTileRows = 32; /* a lane per row in the softmax */
constexpr int kScoreLanes = 16;
constexpr int kScoreRows = 4; /* with 8 heads a lane 12 loads feed 128 multiply-adds, with 4 heads 8 feed 64 */
constexpr int kSliceNumbers = 512; /* of a result, owned by a block: 128 threads x 4 */
constexpr int kSumThreads = kSliceNumbers / 4;
constexpr int kTileUnit = 4 * kScoreLanes;
constexpr int kWidestTile = 576; /* 512 + 64 in one piece: 36 KB as bfloat16 */
constexpr int kNarrowTile = 256; /* fits every device */
constexpr int kIdsPerLane = 8; /* ids that a thread looks at in a refill */
constexpr int kFoursInFlight = 5; /* of a lane that decodes a row: 512 + 64 in one go */
constexpr int kScoresStride = kTileRows + 2; /* heads begin in different banks */

/* What shared memory allows. */
constexpr int blocks_per_multiprocessor(dsa_format format) { return format == DSA_FLOAT32 ? 1 : 2; }

constexpr int threads_for(int heads, int own) { return heads / own * kSumThreads; }

struct Attention {
    LatentRows rows;
    const void* query;
    const int32_t* slot_ids;
    const int32_t* counts;
    void* out;
    float* lse;
    int64_t num_blocks; /* of work */
    int32_t num_head_groups;
    int32_t num_slices;
    int32_t num_heads;
    int32_t topk;
    int32_t tile_width; /* numbers of a row in shared memory */
    float softmax_scale;
    bool is_query_bf16;
    bool has_whole_rows; /* tile_width covers a row */
    bool has_query_fours; /* aligned to their size */
    bool is_out_aligned; /* four numbers of a result */
};

template <int kAllHeads, int kOwnHeads, dsa_format kNumberFormat, bool kStaged>
struct Shared {
    static constexpr int kHeads = kAllHeads;
    static constexpr int kOwn = kOwnHeads;
    static constexpr dsa_format kFormat = kNumberFormat;
    static constexpr int kThreads = threads_for(kHeads, kOwn);
    static constexpr int kHeadsPerWarp = kHeads / (kThreads / 32); /* in the softmax */
    static constexpr int kSums = kOwn * kScoreRows;
    static constexpr int kScoreUnroll = kOwn == 8 ? 1 : 3; /* what registers allow */
    static constexpr int kProbabilityStride = kHeads + 4; /* 16-byte rows that start in different banks */
    float4 probabilities[kTileRows][kProbabilityStride / 4]; /* [row][head] */
    float scores[kHeads][kScoresStride];
    float rescale[kHeads];
    float sum[kHeads];
    int32_t warp_counts[kThreads / 32];
    int32_t ids[kIdsPerLane * kThreads + kTileRows];
    /* behind: float4 query[kHeads][tile_width / 4], Four rows[kTileRows][tile_width / 4], rows as they are staged */

    __device__ float4* query() { return (float4*)(this + 1); }
    __device__ Four<kFormat>* rows(int tile_fours) { return (Four<kFormat>*)(query() + kHeads * tile_fours); }
    __device__ uint8_t* staged(int tile_fours) { return (uint8_t*)(rows(tile_fours) + kTileRows * tile_fours); }
    static int64_t bytes(int tile_width, int64_t row_bytes) {
        return sizeof(Shared) + tile_width / 4 * (kHeads * sizeof(float4) + kTileRows * sizeof(Four<kFormat>)) +
               (kStaged ? kTileRows * row_bytes : 0);
    }
};

/* ---- ids ---- */

/* The row's ids, packed: ids[first .. first + pending) are the next ones. */
struct IdQueue {
    const int32_t* slot_ids;
    int32_t count;
    int32_t position; /* first id not looked at */
    int32_t first;
    int32_t pending;
};

/* Looks at kIdsPerLane * kThreads more ids. fewer than kTileRows are pending. */
template <typename Shared>
__device__ void refill(const Attention& call, Shared& shared, IdQueue& queue) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int32_t kept = (int)threadIdx.x < queue.pending ? shared.ids[queue.first + threadIdx.x] : 0;
    const int64_t begin = (int64_t)queue.position + warp * (32 * kIdsPerLane) + lane;
    int32_t ids[kIdsPerLane];
    uint32_t votes[kIdsPerLane];
    int32_t num_valid = 0;
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) ids[i] = begin + 32 * i < queue.count ? queue.slot_ids[begin + 32 * i] : -1;
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
        votes[i] = __ballot_sync(0xFFFFFFFFu, (uint32_t)ids[i] < call.rows.num_slots);
        num_valid += __popc(votes[i]);
    }
    if (lane == 0) shared.warp_counts[warp] = num_valid;
    __syncthreads();
    int32_t place = queue.pending, total = queue.pending;
    for (int i = 0; i < Shared::kThreads / 32; ++i) {
        if (i < warp) place += shared.warp_counts[i];
        total += shared.warp_counts[i];
    }
    if ((int)threadIdx.x < queue.pending) shared.ids[threadIdx.x] = kept;
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
        if (votes[i] >> lane & 1) shared.ids[place + __popc(votes[i] & ((1u << lane) - 1))] = ids[i];
        place += __popc(votes[i]);
    }
    __syncthreads();
    queue.position = min((int64_t)queue.count, (int64_t)queue.position + kIdsPerLane * Shared::kThreads);
    queue.first = 0;
    queue.pending = total;
}

/* The next tile's ids begin at queue.first; returns how many there are. */
template <typename Shared>
__device__ __forceinline__ int next_tile(const Attention& call, Shared& shared, IdQueue& queue) {
    while (queue.pending < kTileRows && queue.position < queue.count) refill(call, shared, queue);
    return min(queue.pending, kTileRows);
}

__device__ __forceinline__ void take_tile(IdQueue& queue, int num_rows) {
    queue.first += num_rows;
    queue.pending -= num_rows;
}

/* ---- load ---- */

/* Lane i finds row i of the tile, so that all addresses are computed at once. */
template <typename Shared>
__device__ __forceinline__ void stage(const Attention& call, Shared& shared, const int32_t* ids, int num_rows) {
    const int row_bytes = (int)call.rows.row_bytes, lane = threadIdx.x % 32;
    uint8_t* staged = shared.staged(call.tile_width / 4);
    const uint8_t* row_of_lane = latent_row(call.rows, lane < num_rows ? ids[lane] : 0);
#pragma unroll 2
    for (int r = threadIdx.x / 32; r < num_rows; r += Shared::kThreads / 32) {
        const uint8_t* row = (const uint8_t*)__shfl_sync(0xFFFFFFFFu, (unsigned long long)row_of_lane, r);
        const uint32_t to = shared_address(staged + r * row_bytes);
#pragma unroll 1
        for (int i = 16 * lane; i < row_bytes; i += 16 * 32) copy_async_16(to + i, row + i);
    }
}

/* Numbers [begin, begin + width) of the tile's rows; zeros behind the rows. */
template <typename Shared>
__device__ __forceinline__ void gather(const Attention& call, Shared& shared, const int32_t* ids, int num_rows,
                                       int begin, int width) {
    const int tile_fours = call.tile_width / 4, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int r = threadIdx.x / 32; r < num_rows; r += Shared::kThreads / 32) {
        const uint8_t* row = latent_row(call.rows, ids[r]);
        Four<Shared::kFormat>* to = shared.rows(tile_fours) + r * tile_fours;
#pragma unroll 1
        for (int first = lane; first < width / 4; first += 32 * kFoursInFlight) {
            Four<Shared::kFormat> fours[kFoursInFlight];
#pragma unroll
            for (int i = 0; i < kFoursInFlight; ++i)
                fours[i] = load_four<Shared::kFormat>(call.rows, row, begin + 4 * (first + 32 * i));
#pragma unroll
            for (int i = 0; i < kFoursInFlight; ++i)
                if (first + 32 * i < width / 4) to[first + 32 * i] = fours[i];
        }
    }
}

/* One staged row into the tile, by a warp; loads without branches, so that they are in flight together. */
__device__ __forceinline__ void decode_row(const LatentRows& rows, const uint8_t* row, int tile_fours, uint2* to,
                                           std::integral_constant<dsa_format, DSA_FP8>) {
    const int lane = threadIdx.x % 32, latent_fours = rows.kv_lora_rank / 4;
    const uint32_t* codes = (const uint32_t*)row;
    const float* scales = (const float*)(row + (int)rows.scale_offset);
    const uint32_t* rope = (const uint32_t*)(row + (int)rows.rope_offset);
    uint32_t four_codes[kFoursInFlight];
    float scale[kFoursInFlight];
#pragma unroll
    for (int i = 0; i < kFoursInFlight; ++i) {
        const int four = min(lane + 32 * i, latent_fours - 1);
        four_codes[i] = codes[four];
        scale[i] = scales[four / (DSA_LATENT_GROUP / 4)];
    }
#pragma unroll
    for (int i = 0; i < kFoursInFlight; ++i) {
        const uint2 pairs = {dequantize_2(four_codes[i], scale[i]), dequantize_2(four_codes[i] >> 16, scale[i])};
        if (lane + 32 * i < latent_fours) to[lane + 32 * i] = pairs;
    }
#pragma unroll 1
    for (int four = latent_fours + lane; four < tile_fours; four += 32) {
        const bool is_rope = 4 * four < rows.width;
        const uint32_t* pairs = rope + (is_rope ? 2 * (four - latent_fours) : 0);
        const uint2 loaded = {pairs[0], pairs[1]};
        to[four] = is_rope ? loaded : uint2{0, 0};
    }
}

template <dsa_format kFormat>
__device__ __forceinline__ void decode_row(const LatentRows& rows, const uint8_t* row, int tile_fours,
                                           Four<kFormat>* to, std::integral_constant<dsa_format, kFormat>) {
    const int lane = threadIdx.x % 32, row_fours = rows.width / 4;
    Four<kFormat> fours[kFoursInFlight];
#pragma unroll
    for (int i = 0; i < kFoursInFlight; ++i) {
        fours[i] = ((const Four<kFormat>*)row)[min(lane + 32 * i, row_fours - 1)];
        if (lane + 32 * i >= row_fours) fours[i] = {};
    }
#pragma unroll
    for (int i = 0; i < kFoursInFlight; ++i)
        if (lane + 32 * i < tile_fours) to[lane + 32 * i] = fours[i];
}

/* As gather, of whole rows that were staged. */
template <typename Shared>
__device__ __forceinline__ void decode_staged(const Attention& call, Shared& shared, int num_rows) {
    const int tile_fours = call.tile_width / 4, row_bytes = (int)call.rows.row_bytes;
    const uint8_t* staged = shared.staged(tile_fours);
    Four<Shared::kFormat>* rows = shared.rows(tile_fours);
#pragma unroll 1
    for (int r = threadIdx.x / 32; r < num_rows; r += Shared::kThreads / 32)
        decode_row(call.rows, staged + r * row_bytes, tile_fours, rows + r * tile_fours,
                   std::integral_constant<dsa_format, Shared::kFormat>());
}

__device__ __noinline__ float query_number(const Attention& call, int64_t row, int d) {
    if (d >= call.rows.width) return 0.0f;
    const int64_t place = row * call.rows.width + d;
    if (!call.is_query_bf16) return __ldg((const float*)call.query + place);
    return __uint_as_float((uint32_t)__ldg((const uint16_t*)call.query + place) << 16);
}

/* Numbers d .. d + 3 of a query as float32; zeros behind it. */
__device__ __forceinline__ float4 query_four(const Attention& call, int64_t row, int d) {
    if (!call.has_query_fours)
        return make_float4(query_number(call, row, d), query_number(call, row, d + 1), query_number(call, row, d + 2),
                           query_number(call, row, d + 3));
    if (d >= call.rows.width) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const int64_t place = (row * call.rows.width + d) / 4;
    return call.is_query_bf16 ? as_floats(__ldg((const uint2*)call.query + place))
                              : __ldg((const float4*)call.query + place);
}

/* Numbers [begin, begin + tile_width) of the queries; zeros behind them and for heads that do not exist. */
template <typename Shared>
__device__ void load_queries(const Attention& call, Shared& shared, int64_t token, int first_head, int begin) {
    const int tile_fours = call.tile_width / 4;
    float4* query = shared.query();
#pragma unroll 2
    for (int i = threadIdx.x; i < Shared::kHeads * tile_fours; i += Shared::kThreads) {
        const int head = i / tile_fours;
        query[i] = first_head + head < call.num_heads
                       ? query_four(call, token * call.num_heads + first_head + head,
                                    begin + 4 * (i - head * tile_fours))
                       : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
}

/* ---- score ---- */

/* Products of this lane's fours of the tile, added to sums. */
template <typename Shared>
__device__ __forceinline__ void add_products(const Attention& call, Shared& shared,
                                             float (&sums)[Shared::kSums]) {
    const int tile_fours = call.tile_width / 4;
    const int part = threadIdx.x / kScoreLanes;
    const int first_row = part % (kTileRows / kScoreRows) * kScoreRows;
    const int first_head = part / (kTileRows / kScoreRows) * Shared::kOwn;
    const float4* query = shared.query() + first_head * tile_fours;
    const Four<Shared::kFormat>* rows = shared.rows(tile_fours) + first_row * tile_fours;
#pragma unroll (Shared::kScoreUnroll)
    for (int i = threadIdx.x % kScoreLanes; i < tile_fours; i += kScoreLanes) {
        float4 row[kScoreRows];
#pragma unroll
        for (int r = 0; r < kScoreRows; ++r) row[r] = as_floats(rows[r * tile_fours + i]);
#pragma unroll
        for (int h = 0; h < Shared::kOwn; ++h) {
            const float4 q = query[h * tile_fours + i];
#pragma unroll
            for (int r = 0; r < kScoreRows; ++r) {
                float& sum = sums[h * kScoreRows + r];
                sum = fmaf(q.x, row[r].x, sum);
                sum = fmaf(q.y, row[r].y, sum);
                sum = fmaf(q.z, row[r].z, sum);
                sum = fmaf(q.w, row[r].w, sum);
            }
        }
    }
}

/* Passes the half of 2 * kHalf sums that the lane at this distance keeps, and adds what it passes in turn. */
template <int kHalf, int kSums>
__device__ __forceinline__ void exchange_half(float (&sums)[kSums], int distance) {
    const bool is_upper = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
        const float given = is_upper ? sums[i] : sums[i + kHalf];
        const float kept = is_upper ? sums[i + kHalf] : sums[i];
        sums[i] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, distance);
    }
}

/* Adds up the 16 lanes' sums; each lane is left with kLeft of them. */
template <typename Shared>
__device__ __forceinline__ void store_scores(Shared& shared, float (&sums)[Shared::kSums]) {
    constexpr int kSums = Shared::kSums, kLeft = kSums / kScoreLanes;
    static_assert(kScoreLanes == 16 && kLeft >= 1, "four halvings");
    const int part = threadIdx.x / kScoreLanes, first = threadIdx.x % kScoreLanes * kLeft;
    exchange_half<kSums / 2>(sums, 8);
    exchange_half<kSums / 4>(sums, 4);
    exchange_half<kSums / 8>(sums, 2);
    exchange_half<kSums / 16>(sums, 1);
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
        const int head = part / (kTileRows / kScoreRows) * Shared::kOwn + (first + i) / kScoreRows;
        shared.scores[head][part % (kTileRows / kScoreRows) * kScoreRows + (first + i) % kScoreRows] = sums[i];
    }
}

/* Scores of rows that are not staged. */
template <typename Shared>
__device__ void gather_and_score(const Attention& call, Shared& shared, const int32_t* ids, int num_rows,
                                 int64_t token, int first_head) {
    float sums[Shared::kSums] = {};
    for (int begin = 0; begin < call.rows.width; begin += call.tile_width) {
        if (begin > 0) __syncthreads();
        gather(call, shared, ids, num_rows, begin, call.tile_width);
        if (!call.has_whole_rows) load_queries(call, shared, token, first_head, begin);
        __syncthreads();
        add_products(call, shared, sums);
    }
    store_scores(shared, sums);
}

/* ---- softmax ---- */

/* Of a warp's heads. */
template <typename Shared>
struct Running {
    float max[Shared::kHeadsPerWarp];
    float sum[Shared::kHeadsPerWarp];
};

template <typename Shared>
__device__ __forceinline__ void softmax(const Attention& call, Shared& shared, int num_rows, Running<Shared>& running) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < Shared::kHeadsPerWarp; ++i) {
        const int head = threadIdx.x / 32 * Shared::kHeadsPerWarp + i;
        const float score = lane < num_rows ? shared.scores[head][lane] * call.softmax_scale : -INFINITY;
        float max = score;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, step));
        max = fmaxf(max, running.max[i]);
        const float base = max == -INFINITY ? 0.0f : max;
        const float probability = lane < num_rows ? expf(score - base) : 0.0f;
        const float rescale = expf(running.max[i] - base);
        float sum = probability;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        running.max[i] = max;
        running.sum[i] = fmaf(running.sum[i], rescale, sum);
        ((float*)shared.probabilities[lane])[head] = probability;
        if (lane == 0) shared.rescale[head] = rescale;
    }
}

/* ---- sum ---- */

__device__ __forceinline__ void add_scaled(float4& out, float factor, const float4& row) {
    out.x = fmaf(factor, row.x, out.x);
    out.y = fmaf(factor, row.y, out.y);
    out.z = fmaf(factor, row.z, out.z);
    out.w = fmaf(factor, row.w, out.w);
}

/* Numbers 4 * column .. + 3 of kOwn heads, from the fours that start at rows; column counts from the tile's begin. */
template <typename Shared>
__device__ __forceinline__ void add_rows(const Attention& call, Shared& shared, int num_rows, int column,
                                         float4 (&out)[Shared::kOwn]) {
    const int tile_fours = call.tile_width / 4;
    const int first_head = threadIdx.x / kSumThreads * Shared::kOwn;
    const Four<Shared::kFormat>* rows = shared.rows(tile_fours) + column;
#pragma unroll 4
    for (int r = 0; r < num_rows; ++r) {
        const float4 row = as_floats(rows[r * tile_fours]);
#pragma unroll
        for (int h = 0; h < Shared::kOwn; h += 4) {
            const float4 four = shared.probabilities[r][(first_head + h) / 4];
            add_scaled(out[h], four.x, row);
            add_scaled(out[h + 1], four.y, row);
            add_scaled(out[h + 2], four.z, row);
            add_scaled(out[h + 3], four.w, row);
        }
    }
}

template <typename Shared>
__device__ __forceinline__ void add_tile(const Attention& call, Shared& shared, const int32_t* ids, int num_rows,
                                         int slice, float4 (&out)[Shared::kOwn]) {
    const int column = threadIdx.x % kSumThreads;
    const int first_head = threadIdx.x / kSumThreads * Shared::kOwn;
#pragma unroll
    for (int h = 0; h < Shared::kOwn; ++h) {
        const float rescale = shared.rescale[first_head + h];
        out[h] = {out[h].x * rescale, out[h].y * rescale, out[h].z * rescale, out[h].w * rescale};
    }
    if (call.has_whole_rows) {
        if (4 * column < call.rows.kv_lora_rank) add_rows(call, shared, num_rows, column, out);
        return;
    }
    const int width = min(call.tile_width, kSliceNumbers);
    for (int begin = 0; begin < kSliceNumbers; begin += width) {
        gather(call, shared, ids, num_rows, slice * kSliceNumbers + begin, width);
        __syncthreads();
        if (4 * column >= begin && 4 * column < begin + width)
            add_rows(call, shared, num_rows, column - begin / 4, out);
        __syncthreads();
    }
}

/* ---- store ---- */

__device__ __forceinline__ uint32_t pair_of(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *(const uint32_t*)&pair;
}

/* Numbers [number, number + 4) of a result row that has kv_lora_rank. */
__device__ __forceinline__ void store_four(const Attention& call, int64_t row, int number, float4 four) {
    const int32_t rank = call.rows.kv_lora_rank;
    const int64_t place = row * rank + number;
    if (call.is_out_aligned && number + 4 <= rank) {
        if (call.is_query_bf16)
            *(uint2*)((uint16_t*)call.out + place) = {pair_of(four.x, four.y), pair_of(four.z, four.w)};
        else
            *(float4*)((float*)call.out + place) = four;
        return;
    }
    const float numbers[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (number + i >= rank) return;
        if (call.is_query_bf16)
            ((__nv_bfloat16*)call.out)[place + i] = __float2bfloat16_rn(numbers[i]);
        else
            ((float*)call.out)[place + i] = numbers[i];
    }
}

template <typename Shared>
__device__ void store(const Attention& call, Shared& shared, int64_t token, int first_head, int slice, bool is_empty,
                      const Running<Shared>& running, const float4 (&out)[Shared::kOwn]) {
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int i = 0; i < Shared::kHeadsPerWarp; ++i) {
            const int head = threadIdx.x / 32 * Shared::kHeadsPerWarp + i;
            shared.sum[head] = is_empty ? 1.0f : running.sum[i];
            if (call.lse != nullptr && slice == 0 && first_head + head < call.num_heads)
                call.lse[token * call.num_heads + first_head + head] =
                    is_empty ? -INFINITY : running.max[i] + logf(running.sum[i]);
        }
    }
    __syncthreads();
    const int number = slice * kSliceNumbers + (int)threadIdx.x % kSumThreads * 4;
    if (number >= call.rows.kv_lora_rank) return;
#pragma unroll
    for (int h = 0; h < Shared::kOwn; ++h) {
        const int head = threadIdx.x / kSumThreads * Shared::kOwn + h;
        if (first_head + head >= call.num_heads) return;
        const float inverse = 1.0f / shared.sum[head];
        store_four(call, token * call.num_heads + first_head + head, number,
                   {out[h].x * inverse, out[h].y * inverse, out[h].z * inverse, out[h].w * inverse});
    }
}

/* ---- kernel ---- */

/* What a block works on. */
struct Work {
    int64_t token;
    int first_head;
    int slice;
};

/* The row's tiles, each staged while the one before is worked on. Returns whether there were none. */
template <typename Shared>
__device__ __forceinline__ bool attend_staged(const Attention& call, Shared& shared, IdQueue& queue,
                                              Running<Shared>& running, float4 (&out)[Shared::kOwn]) {
    int num_rows = next_tile(call, shared, queue);
    const bool is_empty = num_rows == 0;
    stage(call, shared, shared.ids + queue.first, num_rows);
    take_tile(queue, num_rows);
    while (num_rows > 0) {
        copy_async_wait_all();
        __syncthreads();
        decode_staged(call, shared, num_rows);
        __syncthreads();
        const int num_next = next_tile(call, shared, queue);
        stage(call, shared, shared.ids + queue.first, num_next);
        take_tile(queue, num_next);
        float sums[Shared::kSums] = {};
        add_products(call, shared, sums);
        store_scores(shared, sums);
        __syncthreads();
        softmax(call, shared, num_rows, running);
        __syncthreads();
        add_tile(call, shared, nullptr, num_rows, 0, out);
        num_rows = num_next;
    }
    return is_empty;
}

template <typename Shared>
__device__ __forceinline__ bool attend_gathered(const Attention& call, Shared& shared, const Work& work,
                                                IdQueue& queue, Running<Shared>& running, float4 (&out)[Shared::kOwn]) {
    bool is_empty = true;
    while (const int num_rows = next_tile(call, shared, queue)) {
        is_empty = false;
        const int32_t* ids = shared.ids + queue.first;
        gather_and_score(call, shared, ids, num_rows, work.token, work.first_head);
        __syncthreads();
        softmax(call, shared, num_rows, running);
        __syncthreads();
        add_tile(call, shared, ids, num_rows, work.slice, out);
        __syncthreads();
        take_tile(queue, num_rows);
    }
    return is_empty;
}

template <int kHeads, int kOwn, dsa_format kFormat, bool kStaged>
__global__ void __launch_bounds__(threads_for(kHeads, kOwn), blocks_per_multiprocessor(kFormat))
    sparse_mla_generic_kernel(const __grid_constant__ Attention call) {
    using SharedMemory = Shared<kHeads, kOwn, kFormat, kStaged>;
    extern __shared__ float4 shared_memory[];
    SharedMemory& shared = *(SharedMemory*)shared_memory;
    const int32_t blocks_per_token = call.num_head_groups * call.num_slices;
    for (int64_t number = blockIdx.x; number < call.num_blocks; number += gridDim.x) {
        const int64_t token = number / blocks_per_token;
        const int rest = (int)(number - token * blocks_per_token);
        const Work work = {token, rest / call.num_slices * kHeads, rest % call.num_slices};
        const int32_t count = call.counts == nullptr ? call.topk : max(0, min(call.counts[token], call.topk));
        IdQueue queue = {call.slot_ids + token * call.topk, count, 0, 0, 0};
        Running<SharedMemory> running = {};
        for (float& max : running.max) max = -INFINITY;
        float4 out[kOwn] = {};
        if (call.has_whole_rows) load_queries(call, shared, token, work.first_head, 0);
        bool is_empty;
        if constexpr (kStaged)
            is_empty = attend_staged(call, shared, queue, running, out);
        else
            is_empty = attend_gathered(call, shared, work, queue, running, out);
        store(call, shared, token, work.first_head, work.slice, is_empty, running, out);
        __syncthreads();
    }
}

/* ---- launch ---- */

constexpr int64_t kMaxGrid = 1 << 30;

int round_up(int value, int unit) { return (int)(((int64_t)value + unit - 1) / unit * unit); }

/* Bound: FLOPs of sparse_mla.h at the rate of float32 FMA; shared memory is as busy, with 12 loads of 16 bytes (8 for
 * bfloat16 rows) to 128 multiply-adds in the scores. */
template <int kHeads, int kOwn, dsa_format kFormat, bool kStaged>
dsa_status launch_kernel(Attention call, int64_t num_tokens, cudaStream_t stream) {
    auto* kernel = sparse_mla_generic_kernel<kHeads, kOwn, kFormat, kStaged>;
    const int32_t bytes =
        (int32_t)Shared<kHeads, kOwn, kFormat, kStaged>::bytes(call.tile_width, call.rows.row_bytes);
    call.num_head_groups = (call.num_heads + kHeads - 1) / kHeads;
    call.num_blocks = num_tokens * call.num_head_groups * call.num_slices;
    const dsa_status status = allow_shared_bytes(kernel, bytes);
    if (status != DSA_OK) return status;
    const int64_t grid = call.num_blocks < kMaxGrid ? call.num_blocks : kMaxGrid;
    kernel<<<(unsigned)grid, threads_for(kHeads, kOwn), (size_t)bytes, stream>>>(call);
    return launched(stream);
}

/* Rows are staged where they are aligned and both forms of them fit the shared memory. */
template <int kHeads, int kOwn, dsa_format kFormat>
dsa_status launch(Attention call, int64_t num_tokens, const Device& device, cudaStream_t stream) {
    const int64_t most = device.max_shared_bytes;
    const int whole_width = round_up(call.rows.width, kTileUnit);
    const bool can_stage = call.rows.width <= kWidestTile && call.rows.has_sixteens &&
                           Shared<kHeads, kOwn, kFormat, true>::bytes(whole_width, call.rows.row_bytes) <= most;
    call.tile_width = call.rows.width <= kWidestTile ? whole_width : kWidestTile;
    if (Shared<kHeads, kOwn, kFormat, false>::bytes(call.tile_width, 0) > most) call.tile_width = kNarrowTile;
    call.has_whole_rows = call.tile_width >= call.rows.width;
    return can_stage ? launch_kernel<kHeads, kOwn, kFormat, true>(call, num_tokens, stream)
                     : launch_kernel<kHeads, kOwn, kFormat, false>(call, num_tokens, stream);
}

/* 16 heads share what a block gathers; 8, with half the work for a thread, serve rows that leave the device idle. */
template <dsa_format kFormat>
dsa_status launch_heads(const Attention& call, int64_t num_tokens, const Device& device, cudaStream_t stream) {
    const int64_t blocks_of_16 = num_tokens * ((call.num_heads + 15) / 16) * call.num_slices;
    if (call.num_heads <= 8 || blocks_of_16 < device.num_multiprocessors)
        return launch<8, 4, kFormat>(call, num_tokens, device, stream);
    return launch<16, 8, kFormat>(call, num_tokens, device, stream);
}

}  // namespace

dsa_status sparse_mla_generic(const dsa_sparse_mla_params& p, const Device& device, cudaStream_t stream) {
    LatentLayout layout;
    const dsa_status status = make_latent_layout(p.cache_format, p.kv_lora_rank, p.qk_rope_head_dim, p.num_blocks,
                                                 p.block_size, p.block_stride_bytes, &layout);
    if (status != DSA_OK) return status;
    Attention call = {};
    call.rows = make_latent_rows(layout, p.latent_cache);
    call.query = p.query;
    call.slot_ids = p.slot_ids;
    call.counts = p.counts;
    call.out = p.out;
    call.lse = p.lse;
    call.num_slices = (p.kv_lora_rank + kSliceNumbers - 1) / kSliceNumbers;
    call.num_heads = p.num_heads;
    call.topk = p.topk;
    call.softmax_scale = p.softmax_scale;
    call.is_query_bf16 = p.query_format == DSA_BFLOAT16;
    call.has_query_fours = call.rows.width % 4 == 0 && (uintptr_t)p.query % 16 == 0;
    call.is_out_aligned = p.kv_lora_rank % 4 == 0 && (uintptr_t)p.out % 16 == 0;
    switch (p.cache_format) {
        case DSA_FP8: return launch_heads<DSA_FP8>(call, p.num_tokens, device, stream);
        case DSA_BFLOAT16: return launch_heads<DSA_BFLOAT16>(call, p.num_tokens, device, stream);
        default: return launch_heads<DSA_FLOAT32>(call, p.num_tokens, device, stream);
    }
}

}  // namespace gpu
}  // namespace dsa
