/* compressed_mla for any format and size on sm_80 and later, in float32 arithmetic.
 *
 * A block attends to one row with kHeads heads and owns up to 512 numbers of their results. Slots are worked off in
 * tiles of 32, window slots first; a slot outside its cache keeps its place in the tile and weighs nothing.
 *
 *   gather    a warp per cache row, as float32 numbers into shared memory, up to 512 of a row at a time
 *   score     a lane per cache row, two heads a warp
 *   softmax   the same warps and lanes; running maximum and sum in registers
 *   sum       a thread has two neighbouring numbers of all heads in registers
 */
#include <math.h>

#include "compressed_mla_kernels.h"
#include "compressed_row.cuh"

namespace dsa {
namespace gpu {
namespace {

constexpr int kTileRows = 32; /* a lane per row */
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kHeadsPerWarp = 2;
constexpr int kHeads = kHeadsPerWarp * kWarps;
constexpr int kWidth = 2 * kThreads;     /* numbers of a row in shared memory, and of a result in a block */
constexpr int kRowFours = kWidth / 4 + 1; /* rows begin in different banks */
constexpr int64_t kMaxGrid = 1 << 30;

struct Attention {
    CompressedRows window;
    CompressedRows entries;
    const uint8_t* query;
    const int32_t* window_slots;
    const int32_t* window_counts;
    const int32_t* entry_slots;
    const int32_t* entry_counts;
    const float* sinks;
    uint8_t* out;
    float* lse;
    int64_t num_blocks; /* of work */
    int32_t num_head_groups;
    int32_t num_slices;
    int32_t num_heads;
    int32_t head_dim;
    int32_t window_width;
    int32_t entry_width;
    float softmax_scale;
    bool is_query_bf16;
};

struct Shared {
    float4 rows[kTileRows][kRowFours];
    float4 query[kHeads][kWidth / 4];
    float probabilities[kTileRows][kHeads];
    float rescale[kHeads];
    float inverse[kHeads];
};

/* What a block works on, and how many slots its row has. */
struct Work {
    int64_t token;
    int32_t first_head;
    int32_t slice;
    int32_t window_count;
    int32_t entry_count;
};

/* One slot of the tile. */
struct Row {
    const CompressedRows* rows; /* null: no row */
    CompressedRow row;
};

__device__ __forceinline__ int32_t count_of(const int32_t* counts, int64_t token, int32_t width) {
    return counts == nullptr ? width : max(0, min(__ldg(counts + token), width));
}

__device__ __forceinline__ Row row_of(const Attention& call, const Work& work, int32_t place) {
    if (place >= work.window_count + work.entry_count) return {};
    const bool is_window = place < work.window_count;
    const CompressedRows* rows = is_window ? &call.window : &call.entries;
    const int32_t slot =
        is_window ? __ldg(call.window_slots + work.token * call.window_width + place)
                  : __ldg(call.entry_slots + work.token * call.entry_width + (place - work.window_count));
    if (slot < 0 || slot >= rows->num_slots) return {};
    return {rows, compressed_row(*rows, slot)};
}

/* ---- load ---- */

/* Numbers [begin, begin + kWidth) of the tile's rows; zeros behind the rows and where there is none. */
__device__ void gather(const Attention& call, Shared& shared, const Work& work, int32_t first, int32_t begin) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int r = warp; r < kTileRows; r += kWarps) {
        const Row row = row_of(call, work, first + r);
#pragma unroll
        for (int i = 0; i < kWidth / 4 / 32; ++i) {
            const int d = begin + 4 * (lane + 32 * i);
            shared.rows[r][lane + 32 * i] =
                row.rows == nullptr ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : load_floats(*row.rows, row.row, d);
        }
    }
}

__device__ __forceinline__ float query_number(const Attention& call, int64_t row, int32_t d) {
    if (d >= call.head_dim) return 0.0f;
    const int64_t place = row * call.head_dim + d;
    return call.is_query_bf16 ? bf16_decode(__ldg((const uint16_t*)call.query + place))
                              : __ldg((const float*)call.query + place);
}

__device__ void load_queries(const Attention& call, Shared& shared, const Work& work, int32_t begin) {
    float* query = (float*)shared.query;
#pragma unroll 4
    for (int i = threadIdx.x; i < kHeads * kWidth; i += kThreads) {
        const int32_t head = work.first_head + i / kWidth;
        query[i] = head < call.num_heads
                       ? query_number(call, work.token * call.num_heads + head, begin + i % kWidth)
                       : 0.0f;
    }
}

/* ---- score ---- */

/* This lane's row times the queries of this warp's heads. */
__device__ __forceinline__ void add_products(const Shared& shared, float (&scores)[kHeadsPerWarp]) {
    const int lane = threadIdx.x % 32, first_head = threadIdx.x / 32 * kHeadsPerWarp;
#pragma unroll 8
    for (int i = 0; i < kWidth / 4; ++i) {
        const float4 row = shared.rows[lane][i];
#pragma unroll
        for (int h = 0; h < kHeadsPerWarp; ++h) {
            const float4 q = shared.query[first_head + h][i];
            scores[h] = fmaf(q.x, row.x, scores[h]);
            scores[h] = fmaf(q.y, row.y, scores[h]);
            scores[h] = fmaf(q.z, row.z, scores[h]);
            scores[h] = fmaf(q.w, row.w, scores[h]);
        }
    }
}

__device__ void score_tile(const Attention& call, Shared& shared, const Work& work, int32_t first,
                           float (&scores)[kHeadsPerWarp]) {
    for (int32_t begin = 0; begin < call.head_dim; begin += kWidth) {
        __syncthreads();
        gather(call, shared, work, first, begin);
        if (call.num_slices > 1) load_queries(call, shared, work, begin);
        __syncthreads();
        add_products(shared, scores);
    }
}

/* ---- softmax ---- */

struct Running {
    float max[kHeadsPerWarp];
    float sum[kHeadsPerWarp];
};

__device__ void weigh_tile(const Attention& call, Shared& shared, bool is_row, const float (&scores)[kHeadsPerWarp],
                           Running& running) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < kHeadsPerWarp; ++h) {
        const int head = threadIdx.x / 32 * kHeadsPerWarp + h;
        const float score = is_row ? scores[h] * call.softmax_scale : -INFINITY;
        float max = score;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, step));
        max = fmaxf(max, running.max[h]);
        const float base = max == -INFINITY ? 0.0f : max;
        const float probability = is_row ? expf(score - base) : 0.0f;
        const float rescale = expf(running.max[h] - base);
        float sum = probability;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        running.max[h] = max;
        running.sum[h] = fmaf(running.sum[h], rescale, sum);
        shared.probabilities[lane][head] = probability;
        if (lane == 0) shared.rescale[head] = rescale;
    }
}

/* ---- sum ---- */

__device__ void add_rows(const Shared& shared, float2 (&out)[kHeads]) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        const float rescale = shared.rescale[h];
        out[h] = make_float2(out[h].x * rescale, out[h].y * rescale);
    }
#pragma unroll 2
    for (int r = 0; r < kTileRows; ++r) {
        const float2 row = ((const float2*)shared.rows[r])[threadIdx.x];
#pragma unroll
        for (int h = 0; h < kHeads; h += 4) {
            const float4 four = *(const float4*)&shared.probabilities[r][h];
            const float weights[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                out[h + i].x = fmaf(weights[i], row.x, out[h + i].x);
                out[h + i].y = fmaf(weights[i], row.y, out[h + i].y);
            }
        }
    }
}

/* ---- store ---- */

/* Where no row was valid the sums are zero, and so is what the sink divides. */
__device__ void finish_heads(const Attention& call, Shared& shared, const Work& work, bool is_empty,
                             const Running& running) {
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int h = 0; h < kHeadsPerWarp; ++h) {
        const int in_block = threadIdx.x / 32 * kHeadsPerWarp + h, head = work.first_head + in_block;
        if (head >= call.num_heads) continue;
        const float divisor = running.sum[h] + expf(__ldg(call.sinks + head) - running.max[h]);
        shared.inverse[in_block] = is_empty ? 0.0f : 1.0f / divisor;
        if (call.lse != nullptr && work.slice == 0)
            call.lse[work.token * call.num_heads + head] =
                is_empty ? -INFINITY : running.max[h] + logf(running.sum[h]);
    }
}

__device__ void store(const Attention& call, const Shared& shared, const Work& work, const float2 (&out)[kHeads]) {
    const int32_t d = work.slice * kWidth + 2 * (int32_t)threadIdx.x;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        if (work.first_head + h >= call.num_heads) return;
        const int64_t place = (work.token * call.num_heads + work.first_head + h) * call.head_dim + d;
        const float numbers[2] = {out[h].x * shared.inverse[h], out[h].y * shared.inverse[h]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (d + i >= call.head_dim) continue;
            if (call.is_query_bf16)
                ((uint16_t*)call.out)[place + i] = (uint16_t)bf16_encode(numbers[i]);
            else
                ((float*)call.out)[place + i] = numbers[i];
        }
    }
}

/* ---- kernel ---- */

__device__ void attend(const Attention& call, Shared& shared, const Work& work) {
    const int lane = threadIdx.x % 32;
    const int32_t count = work.window_count + work.entry_count;
    Running running;
#pragma unroll
    for (int h = 0; h < kHeadsPerWarp; ++h) running.max[h] = -INFINITY, running.sum[h] = 0.0f;
    float2 out[kHeads] = {};
    bool is_empty = true;
    if (call.num_slices == 1) load_queries(call, shared, work, 0);
    for (int32_t first = 0; first < count; first += kTileRows) {
        const bool is_row = row_of(call, work, first + lane).rows != nullptr;
        if (__ballot_sync(kAllLanes, is_row) == 0) continue; /* the same in all warps */
        is_empty = false;
        float scores[kHeadsPerWarp] = {};
        score_tile(call, shared, work, first, scores);
        weigh_tile(call, shared, is_row, scores, running);
        __syncthreads();
        if (call.num_slices > 1) {
            gather(call, shared, work, first, work.slice * kWidth);
            __syncthreads();
        }
        add_rows(shared, out);
    }
    finish_heads(call, shared, work, is_empty, running);
    __syncthreads();
    store(call, shared, work, out);
    __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 1) compressed_mla_generic_kernel(const __grid_constant__ Attention call) {
    extern __shared__ float4 shared_memory[];
    Shared& shared = *(Shared*)shared_memory;
    const int32_t blocks_per_token = call.num_head_groups * call.num_slices;
    for (int64_t number = blockIdx.x; number < call.num_blocks; number += gridDim.x) {
        const int64_t token = number / blocks_per_token;
        const int32_t rest = (int32_t)(number - token * blocks_per_token);
        const Work work = {token, rest / call.num_slices * kHeads, rest % call.num_slices,
                           count_of(call.window_counts, token, call.window_width),
                           count_of(call.entry_counts, token, call.entry_width)};
        attend(call, shared, work);
    }
}

}  // namespace

/* Bound: FLOPs of compressed_mla.h at the rate of float32 FMA; every block of 16 heads decodes its row's rows anew. */
dsa_status compressed_mla_generic(const dsa_compressed_mla_params& p, const CompressedMlaLayouts& layouts,
                                  cudaStream_t stream) {
    Attention call = {};
    call.window = make_compressed_rows(layouts.window, p.window_cache);
    call.entries = make_compressed_rows(layouts.entries, p.entry_cache);
    call.query = (const uint8_t*)p.query;
    call.window_slots = p.window_slots;
    call.window_counts = p.window_counts;
    call.entry_slots = p.entry_slots;
    call.entry_counts = p.entry_counts;
    call.sinks = p.sinks;
    call.out = (uint8_t*)p.out;
    call.lse = p.lse;
    call.num_heads = p.num_heads;
    call.head_dim = p.head_dim;
    call.window_width = p.window_width;
    call.entry_width = p.entry_width;
    call.softmax_scale = p.softmax_scale;
    call.is_query_bf16 = p.query_format == DSA_BFLOAT16;
    call.num_head_groups = (int32_t)(((int64_t)p.num_heads + kHeads - 1) / kHeads);
    call.num_slices = (p.head_dim + kWidth - 1) / kWidth;
    call.num_blocks = p.num_tokens * call.num_head_groups * call.num_slices;
    const dsa_status status = allow_shared_bytes(compressed_mla_generic_kernel, (int32_t)sizeof(Shared));
    if (status != DSA_OK) return status;
    const int64_t grid = call.num_blocks < kMaxGrid ? call.num_blocks : kMaxGrid;
    compressed_mla_generic_kernel<<<(unsigned)grid, kThreads, sizeof(Shared), stream>>>(call);
    return launched(stream);
}

}  // namespace gpu
}  // namespace dsa
