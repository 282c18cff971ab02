/* kv_compress in one launch: the grid's first blocks make entries, the others keep states.
 *
 * A member of a window whose row is in this call is read from kv_score, not from the state that another block may just
 * be writing: the bits are the same. Rows of a request mostly stand together in the order of positions, so in a long
 * call a member is looked for where it would be then; what is not there is searched in all rows.
 *
 *   members   split in order among groups of threads, a thread has kWide neighbouring channels: running maximum, sum
 *             of weights and weighted sum, all in one pass
 *   merge     groups in the order of positions; then the norm, the rotation and the packing of the entry
 *
 * The split depends on sizes alone, so that entries do not depend on how tokens were cut into calls.
 */
#include "dsa/kv_compress.h"

#include <math.h>

#include "compressed_checks.h"
#include "compressed_row.cuh"

namespace dsa {
namespace gpu {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxColumns = 128;    /* threads beside each other: 512 channels of four at a time */
constexpr int kMaxMembers = 256;    /* that are looked up together: two windows of 128 */
constexpr int kMembersInFlight = 4; /* of a thread, which has no more of the narrow ratio's */
constexpr int kMaxSharedDim = 2048; /* wider entries are kept in the workspace and made by one group */
constexpr int kMaxPartialNumbers = 20480; /* of all groups and the entry: 80 KB, which every device has */
constexpr int kMaxSearch = 1024;    /* rows of a call that are searched at once rather than guessed at */
constexpr int kMaxClosing = 128;    /* tokens of a block that makes entries */

struct Compress {
    const float* kv_score;
    const float* ape;
    const float* norm_weight;
    const float* cos;
    const float* sin;
    uint8_t* state_cache;
    const int32_t* state_table;
    const int32_t* positions;
    const int32_t* request_ids;
    const int32_t* lengths;
    const int64_t* entry_slots;
    float* wide_entries; /* [num_tokens, head_dim], null where they fit the shared memory */
    CompressedRows rows; /* of DSA_ENTRY_ROW */
    IndexKeyPart keys;   /* of DSA_ENTRY_INDEX_KEY: where a key lies and how it is scaled */
    int64_t kv_score_stride;
    int64_t state_block_stride_bytes;
    int64_t state_num_blocks;
    int64_t num_entry_slots;
    int64_t num_tokens;
    int64_t num_requests;
    int64_t state_table_width;
    int64_t width; /* C, numbers of half a state row */
    int32_t state_block_tokens;
    int32_t ratio;
    int32_t num_members; /* overlap * ratio */
    int32_t head_dim;
    int32_t half_rope;
    int32_t tokens_per_entry_block;
    int32_t tokens_per_state_block;
    int32_t num_entry_blocks;
    int32_t num_columns; /* threads beside each other */
    int32_t num_groups;
    float eps;
    bool is_index_key;
};

/* A row of this call that is no padding, and whose request and position can be. */
struct Token {
    int32_t request;
    int32_t position; /* -1: skip the row */
};

/* The window that row t closes. */
struct Window {
    int64_t t;
    int64_t slot; /* of its entry, -1: there is none */
    Token token;
    int32_t first; /* position of the first member that exists */
    int32_t num_members;
};

struct Shared {
    Window windows[kMaxClosing]; /* of this block's tokens */
    const float* rows[kMaxMembers]; /* kv at the first channel that the member gives */
    const float* added[kMaxMembers]; /* to its scores: a row of ape where the member is a row of this call, or null */
    int32_t step_rows[kMaxMembers]; /* the member's row of this call, or -1 */
    float warp_sums[kMaxThreads / 32];
    /* behind: float entry[head_dim] and float partial[num_groups][3][head_dim], unless in the workspace */

    __device__ float* entry(const Compress& call, int64_t token) {
        return call.wide_entries != nullptr ? call.wide_entries + token * call.head_dim : (float*)(this + 1);
    }
    __device__ float* partial(const Compress& call, int group) {
        return (float*)(this + 1) + (1 + 3 * (int64_t)group) * call.head_dim;
    }
};

/* ---- states ---- */

__device__ __forceinline__ int32_t load_int(const int32_t* from) { return (int32_t)load_4(from); }

/* kWide numbers; states that an earlier launch wrote are not in the first-level cache as they are in memory. */
template <int kWide>
__device__ __forceinline__ void load_wide(const float* from, float (&numbers)[kWide]) {
    if constexpr (kWide == 4) {
        const uint4 v = load_16(from);
        numbers[0] = __uint_as_float(v.x), numbers[1] = __uint_as_float(v.y);
        numbers[2] = __uint_as_float(v.z), numbers[3] = __uint_as_float(v.w);
    } else {
        numbers[0] = __uint_as_float(load_4(from));
    }
}

template <int kWide>
__device__ __forceinline__ void store_wide(float* to, const float (&numbers)[kWide]) {
    if constexpr (kWide == 4)
        *(float4*)to = make_float4(numbers[0], numbers[1], numbers[2], numbers[3]);
    else
        to[0] = numbers[0];
}

__device__ __forceinline__ Token token_of(const Compress& call, int64_t t) {
    const int32_t length = load_int(call.lengths + t);
    const Token token = {load_int(call.request_ids + t), load_int(call.positions + t)};
    const bool is_there = length > 0 && token.position >= 0 && token.request >= 0 && token.request < call.num_requests;
    return {token.request, is_there ? token.position : -1};
}

/* Null where there is no state. */
__device__ __forceinline__ float* state_row(const Compress& call, int32_t request, int32_t position) {
    const int32_t in_ring = position / call.state_block_tokens, row = position - in_ring * call.state_block_tokens;
    const int64_t block =
        load_int(call.state_table + request * call.state_table_width + in_ring % call.state_table_width);
    if (block < 0 || block >= call.state_num_blocks) return nullptr;
    return (float*)(call.state_cache + block * call.state_block_stride_bytes) + row * 2 * call.width;
}

/* By num_threads threads, of which this one is number `thread`. */
template <int kWide>
__device__ __forceinline__ void write_state(const Compress& call, int64_t t, int thread, int num_threads) {
    const Token token = token_of(call, t);
    if (token.position < 0) return;
    float* state = state_row(call, token.request, token.position);
    if (state == nullptr) return;
    const float* from = call.kv_score + t * call.kv_score_stride;
    const float* ape = call.ape + token.position % call.ratio * call.width;
#pragma unroll 2
    for (int64_t c = (int64_t)thread * kWide; c < call.width; c += (int64_t)num_threads * kWide) {
        float kv[kWide], score[kWide], added[kWide];
        load_wide(from + c, kv);
        load_wide(from + call.width + c, score);
        load_wide(ape + c, added);
#pragma unroll
        for (int i = 0; i < kWide; ++i) score[i] = __fadd_rn(score[i], added[i]);
        store_wide(state + c, kv);
        store_wide(state + call.width + c, score);
    }
}

/* ---- members ---- */

__device__ __forceinline__ int64_t aligned_step_row(const Compress& call, const Window& window, int32_t position) {
    const int64_t row = window.t - (window.token.position - position);
    if (row < 0) return -1;
    const Token there = token_of(call, row);
    return there.position == position && there.request == window.token.request ? row : -1;
}

/* Members [begin, begin + count) of the window into shared memory. Returns whether one has no state. */
__device__ bool find_members(const Compress& call, Shared& shared, const Window& window, int32_t begin, int count) {
    const int32_t first = window.first + begin;
    const bool guesses = call.num_tokens > kMaxSearch;
    bool is_missing = false, is_unresolved = !guesses;
    for (int m = threadIdx.x; m < count; m += blockDim.x) {
        const float* state = state_row(call, window.token.request, first + m);
        const int64_t row = guesses ? aligned_step_row(call, window, first + m) : -1;
        shared.rows[m] = state;
        shared.step_rows[m] = (int32_t)row;
        is_missing |= state == nullptr;
        is_unresolved |= row < 0;
    }
    if (__syncthreads_or(is_unresolved)) {
#pragma unroll 4
        for (int64_t t = threadIdx.x; t < call.num_tokens; t += blockDim.x) {
            const Token token = token_of(call, t);
            const int64_t m = (int64_t)token.position - first;
            const bool is_member = token.position >= 0 && token.request == window.token.request && m >= 0 && m < count;
            if (is_member) atomicMax(&shared.step_rows[m], (int32_t)t);
        }
        __syncthreads();
    }
    for (int m = threadIdx.x; m < count; m += blockDim.x) {
        const int32_t position = first + m;
        const int64_t row = shared.step_rows[m];
        const bool is_newer = position > window.token.position - call.ratio;
        const int64_t channel = is_newer ? call.width - call.head_dim : 0;
        shared.rows[m] = (row < 0 ? shared.rows[m] : call.kv_score + row * call.kv_score_stride) + channel;
        shared.added[m] = row < 0 ? nullptr : call.ape + position % call.ratio * call.width + channel;
    }
    return __syncthreads_or(is_missing);
}

/* ---- weighted sums ---- */

/* Of kWide channels over the members so far. */
template <int kWide>
struct Running {
    float max[kWide], sum[kWide], weighted[kWide];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kWide; ++i) max[i] = -INFINITY, sum[i] = weighted[i] = 0.0f;
    }
    __device__ __forceinline__ void rescale(int i, float new_max) {
        const float factor = expf(max[i] - (new_max == -INFINITY ? 0.0f : new_max));
        max[i] = new_max;
        sum[i] *= factor;
        weighted[i] *= factor;
    }
};

/* Members [begin, end) of those in shared memory. */
template <int kWide>
__device__ __forceinline__ void add_members(const Compress& call, const Shared& shared, int begin, int end, int channel,
                                            Running<kWide>& running) {
    for (int m = begin; m < end; m += kMembersInFlight) {
        float kv[kMembersInFlight][kWide], score[kMembersInFlight][kWide];
#pragma unroll
        for (int j = 0; j < kMembersInFlight; ++j) {
            const int member = min(m + j, end - 1);
            const float* row = shared.rows[member] + channel;
            load_wide(row, kv[j]);
            load_wide(row + call.width, score[j]);
        }
#pragma unroll
        for (int j = 0; j < kMembersInFlight; ++j) {
            const float* row = shared.added[min(m + j, end - 1)];
            if (row == nullptr) continue;
            float added[kWide];
            load_wide(row + channel, added);
#pragma unroll
            for (int i = 0; i < kWide; ++i) score[j][i] = __fadd_rn(score[j][i], added[i]);
        }
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
            float max = running.max[i];
#pragma unroll
            for (int j = 0; j < kMembersInFlight; ++j) max = fmaxf(max, score[j][i]);
            running.rescale(i, max);
            const float base = max == -INFINITY ? 0.0f : max;
#pragma unroll
            for (int j = 0; j < kMembersInFlight; ++j) {
                if (m + j >= end) continue;
                const float weight = expf(score[j][i] - base);
                running.sum[i] += weight;
                running.weighted[i] = fmaf(weight, kv[j][i], running.weighted[i]);
            }
        }
    }
}

template <int kWide>
__device__ __forceinline__ void store_partial(float* partial, int32_t head_dim, int channel,
                                              const Running<kWide>& running) {
    store_wide(partial + channel, running.max);
    store_wide(partial + head_dim + channel, running.sum);
    store_wide(partial + 2 * (int64_t)head_dim + channel, running.weighted);
}

/* x[c] of all channels into entry. */
__device__ __forceinline__ void merge_groups(const Compress& call, Shared& shared, float* entry) {
    for (int c = threadIdx.x; c < call.head_dim; c += blockDim.x) {
        Running<1> all;
        all.clear();
        for (int group = 0; group < call.num_groups; ++group) {
            const float* partial = shared.partial(call, group);
            const float max = partial[c];
            all.rescale(0, fmaxf(all.max[0], max));
            const float factor = expf(max - (all.max[0] == -INFINITY ? 0.0f : all.max[0]));
            all.sum[0] = fmaf(partial[call.head_dim + c], factor, all.sum[0]);
            all.weighted[0] = fmaf(partial[2 * call.head_dim + c], factor, all.weighted[0]);
        }
        entry[c] = all.weighted[0] / all.sum[0];
    }
}

/* The weighted sums of a window into entry; the same elements are a thread's own as in the norm. Returns whether a
 * member has no state. */
template <int kWide>
__device__ bool sum_window(const Compress& call, Shared& shared, const Window& window, float* entry) {
    const int column = (int)threadIdx.x % call.num_columns, group = (int)threadIdx.x / call.num_columns;
    const bool has_chunks = window.num_members > kMaxMembers;
    bool is_missing = false;
    for (int first_channel = 0; first_channel < call.head_dim; first_channel += call.num_columns * kWide) {
        const int channel = first_channel + column * kWide;
        Running<kWide> running;
        running.clear();
        for (int32_t begin = 0; begin < window.num_members; begin += kMaxMembers) {
            const int count = min(kMaxMembers, window.num_members - begin);
            if (has_chunks || first_channel == 0) {
                __syncthreads();
                is_missing = find_members(call, shared, window, begin, count);
                if (is_missing) return true;
            }
            const int share = (count + call.num_groups - 1) / call.num_groups;
            if (channel < call.head_dim)
                add_members(call, shared, group * share, min(count, (group + 1) * share), channel, running);
        }
        if (channel >= call.head_dim) continue;
        if (call.wide_entries == nullptr) {
            store_partial(shared.partial(call, group), call.head_dim, channel, running);
        } else {
#pragma unroll
            for (int i = 0; i < kWide; ++i) entry[channel + i] = running.weighted[i] / running.sum[i];
        }
    }
    __syncthreads();
    if (call.wide_entries == nullptr) merge_groups(call, shared, entry);
    return false;
}

/* ---- norm, rotation, packing ---- */

/* The sum of all threads' numbers, in the order of threads' butterflies and then of warps. */
__device__ __forceinline__ float block_sum(Shared& shared, float number) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) number += __shfl_xor_sync(kAllLanes, number, step);
    if (threadIdx.x % 32 == 0) shared.warp_sums[threadIdx.x / 32] = number;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < (int)blockDim.x / 32; ++warp) sum += shared.warp_sums[warp];
    return sum;
}

__device__ void normalise(const Compress& call, Shared& shared, float* entry, bool is_missing) {
    float squares = 0.0f;
    for (int c = threadIdx.x; c < call.head_dim; c += blockDim.x) {
        const float x = is_missing ? NAN : entry[c];
        entry[c] = x;
        squares = fmaf(x, x, squares);
    }
    const float root = sqrtf(block_sum(shared, squares) / (float)call.head_dim + call.eps);
    for (int c = threadIdx.x; c < call.head_dim; c += blockDim.x)
        entry[c] = entry[c] / root * __uint_as_float(load_4(call.norm_weight + c));
    __syncthreads();
}

__device__ void rotate(const Compress& call, int64_t t, float* entry) {
    float* rotated = entry + call.head_dim - 2 * call.half_rope;
    for (int i = threadIdx.x; i < call.half_rope; i += blockDim.x) {
        const float cos = __uint_as_float(load_4(call.cos + t * call.half_rope + i));
        const float sin = __uint_as_float(load_4(call.sin + t * call.half_rope + i));
        const float first = rotated[2 * i], second = rotated[2 * i + 1];
        rotated[2 * i] = __fsub_rn(__fmul_rn(first, cos), __fmul_rn(second, sin));
        rotated[2 * i + 1] = __fadd_rn(__fmul_rn(second, cos), __fmul_rn(first, sin));
    }
    __syncthreads();
}

__device__ void store_entry(const Compress& call, int64_t slot, const float* entry) {
    const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    const uint8_t* numbers = (const uint8_t*)entry;
    if (!call.is_index_key) {
        pack_row(call.rows, numbers, DSA_FLOAT32, compressed_row(call.rows, slot), warp, num_warps);
        return;
    }
    if (warp != 0) return;
    int64_t offset;
    uint8_t* block = index_block(call.keys, slot, &offset);
    const int64_t dim = call.head_dim;
    if (call.keys.cache_format != DSA_FP8) {
        const int64_t number_bytes = call.keys.cache_format == DSA_BFLOAT16 ? 2 : 4;
        convert_row(numbers, DSA_FLOAT32, dim, call.keys.cache_format, block + offset * dim * number_bytes);
        return;
    }
    const float scale = quantize_row(numbers, DSA_FLOAT32, dim, call.keys.rule, block + offset * dim);
    if (threadIdx.x == 0) store_4(block + call.keys.scale_offset + 4 * offset, __float_as_uint(scale));
}

/* The window that row t closes, if it does. */
__device__ __forceinline__ Window window_of(const Compress& call, int64_t t) {
    Window window = {t, load_slot(call.entry_slots + t), token_of(call, t), 0, 0};
    const int32_t position = window.token.position;
    const bool closes = position >= 0 && (position + 1LL) % call.ratio == 0;
    if (!closes || window.slot >= call.num_entry_slots) window.slot = -1;
    window.first = max(0, position - call.num_members + 1);
    window.num_members = position - window.first + 1;
    return window;
}

template <int kWide>
__device__ void make_entry(const Compress& call, Shared& shared, const Window& window) {
    float* entry = shared.entry(call, window.t);
    if ((int)threadIdx.x < call.half_rope) {
        prefetch_line(call.cos + window.t * call.half_rope + threadIdx.x);
        prefetch_line(call.sin + window.t * call.half_rope + threadIdx.x);
    }
    const bool is_missing = sum_window<kWide>(call, shared, window, entry);
    __syncthreads();
    normalise(call, shared, entry, is_missing);
    rotate(call, window.t, entry);
    store_entry(call, window.slot, entry);
    __syncthreads();
}

/* ---- kernel ---- */

/* What the first num_entry_blocks blocks do. */
template <int kWide>
__device__ __forceinline__ void make_entries(const Compress& call, Shared& shared) {
    const int64_t first = (int64_t)blockIdx.x * call.tokens_per_entry_block;
    const int count = (int)min((int64_t)call.tokens_per_entry_block, call.num_tokens - first);
    bool closes = false;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const Window window = window_of(call, first + i);
        shared.windows[i] = window;
        closes |= window.slot >= 0;
    }
    if (!__syncthreads_or(closes)) return;
    for (int i = 0; i < count; ++i)
        if (shared.windows[i].slot >= 0) make_entry<kWide>(call, shared, shared.windows[i]);
}

template <int kWide>
__device__ __forceinline__ void keep_states(const Compress& call) {
    const int64_t first = (int64_t)(blockIdx.x - call.num_entry_blocks) * call.tokens_per_state_block;
    const int threads_per_token = (int)blockDim.x / call.tokens_per_state_block;
    const int64_t own = first + threadIdx.x / threads_per_token;
    if ((int)threadIdx.x / threads_per_token < call.tokens_per_state_block && own < call.num_tokens)
        write_state<kWide>(call, own, threadIdx.x % threads_per_token, threads_per_token);
}

template <int kWide>
__global__ void __launch_bounds__(kMaxThreads, 1) kv_compress_kernel(const __grid_constant__ Compress call) {
    extern __shared__ float4 shared_memory[];
    const bool makes_entries = (int)blockIdx.x < call.num_entry_blocks;
    if (makes_entries && (int)threadIdx.x < call.head_dim) prefetch_line(call.norm_weight + threadIdx.x);
    wait_for_inputs();
    if (makes_entries)
        make_entries<kWide>(call, *(Shared*)shared_memory);
    else
        keep_states<kWide>(call);
}

/* ---- launch ---- */

/* Four numbers at a time. */
bool has_fours(const dsa_kv_compress_params& p) {
    const int64_t addresses = (int64_t)(uintptr_t)p.kv_score | (int64_t)(uintptr_t)p.ape |
                              (int64_t)(uintptr_t)p.state_cache | p.state_block_stride_bytes |
                              (p.num_tokens > 1 ? p.kv_score_stride * 4 : 0);
    return addresses % 16 == 0 && p.head_dim % 4 == 0;
}

int round_up_to_warp(int threads) { return (threads + 31) / 32 * 32; }

Compress make_call(const dsa_kv_compress_params& p, const CompressedLayout& layout) {
    Compress call = {};
    call.kv_score = p.kv_score, call.ape = p.ape, call.norm_weight = p.norm_weight;
    call.cos = p.cos, call.sin = p.sin;
    call.state_cache = (uint8_t*)p.state_cache;
    call.state_table = p.state_table;
    call.positions = p.positions, call.request_ids = p.request_ids, call.lengths = p.lengths;
    call.entry_slots = p.entry_slots;
    call.kv_score_stride = p.kv_score_stride;
    call.state_block_stride_bytes = p.state_block_stride_bytes;
    call.state_num_blocks = p.state_num_blocks;
    call.num_entry_slots = p.entry_num_blocks * p.entry_block_rows;
    call.num_tokens = p.num_tokens;
    call.num_requests = p.num_requests;
    call.state_table_width = p.state_table_width;
    call.width = (int64_t)p.overlap * p.head_dim;
    call.state_block_tokens = p.state_block_tokens;
    call.ratio = p.ratio;
    call.num_members = p.overlap * p.ratio;
    call.head_dim = p.head_dim;
    call.half_rope = p.qk_rope_head_dim / 2;
    call.eps = p.eps;
    call.is_index_key = p.entry_kind == DSA_ENTRY_INDEX_KEY;
    if (!call.is_index_key) {
        call.rows = make_compressed_rows(layout, p.entry_cache);
        return call;
    }
    call.keys.cache = p.entry_cache;
    call.keys.block_stride_bytes = p.entry_block_stride_bytes;
    call.keys.scale_offset = dsa_index_scale_offset(p.entry_format, p.entry_block_rows, p.head_dim);
    call.keys.num_slots = call.num_entry_slots;
    call.keys.block_size = make_divisor(p.entry_block_rows);
    call.keys.rule = index_scale_rule(p.scale_format);
    call.keys.cache_format = p.entry_format;
    return call;
}

/* Many tokens: a block per window's worth of them, for one of them closes it. Few: nobody waits for another. */
void divide(Compress& call, int num_threads, const Device& device) {
    const int64_t some = 4 * (int64_t)device.num_multiprocessors;
    const int64_t closing = call.ratio < kMaxClosing ? call.ratio : kMaxClosing;
    call.tokens_per_entry_block = (int32_t)(call.num_tokens > some ? closing : 1);
    int32_t tokens = 1;
    while (2 * tokens <= num_threads / 32 && call.num_tokens > some * tokens) tokens *= 2;
    call.tokens_per_state_block = tokens;
    call.num_entry_blocks =
        (int32_t)((call.num_tokens + call.tokens_per_entry_block - 1) / call.tokens_per_entry_block);
}

/* Bound: 16 * C bytes a row for the states, and 8 * head_dim a member of an entry, which mostly come from the L2 cache
 * when the row of the member is in this call. */
template <int kWide>
dsa_status launch(Compress call, const Device& device, cudaStream_t stream) {
    const int columns = round_up_to_warp((call.head_dim + kWide - 1) / kWide);
    call.num_columns = columns < kMaxColumns ? columns : kMaxColumns;
    const int by_threads = kMaxThreads / call.num_columns, by_bytes = (kMaxPartialNumbers / call.head_dim - 1) / 3;
    const int most_groups = by_threads < by_bytes ? by_threads : by_bytes < 1 ? 1 : by_bytes;
    const int groups = (call.num_members + kMembersInFlight - 1) / kMembersInFlight;
    call.num_groups = call.wide_entries != nullptr ? 1 : groups < most_groups ? groups : most_groups;
    const int threads = call.num_columns * call.num_groups;
    divide(call, threads, device);
    const int64_t state_blocks = (call.num_tokens + call.tokens_per_state_block - 1) / call.tokens_per_state_block;
    if (call.num_entry_blocks + state_blocks > INT32_MAX) return DSA_UNSUPPORTED;
    const int64_t numbers = call.wide_entries != nullptr ? 0 : (1 + 3 * (int64_t)call.num_groups) * call.head_dim;
    const int32_t bytes = (int32_t)(sizeof(Shared) + numbers * sizeof(float));
    auto* kernel = kv_compress_kernel<kWide>;
    const dsa_status status = allow_shared_bytes(kernel, bytes);
    if (status != DSA_OK) return status;
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(call.num_entry_blocks + state_blocks));
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = device.architecture >= 90 ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, call);
    return error == cudaSuccess ? launched(stream) : status_of(error);
}

int64_t workspace_bytes(const dsa_kv_compress_params& p) {
    int64_t bytes = 0;
    if (p.head_dim <= kMaxSharedDim) return 0;
    return __builtin_mul_overflow(p.num_tokens, (int64_t)p.head_dim * 4, &bytes) ? -1 : bytes;
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

size_t dsa_kv_compress_cuda_workspace_bytes(const dsa_kv_compress_params* params) {
    dsa::CompressedLayout layout;
    if (params == nullptr || dsa::check_kv_compress(*params, &layout) != DSA_OK) return 0;
    const int64_t bytes = dsa::gpu::workspace_bytes(*params);
    return bytes < 0 ? 0 : (size_t)bytes;
}

dsa_status dsa_kv_compress_cuda(const dsa_kv_compress_params* params, void* stream) {
    using namespace dsa;
    if (params == nullptr) return DSA_NULL_POINTER;
    const dsa_kv_compress_params& p = *params;
    CompressedLayout layout;
    dsa_status status = check_kv_compress(p, &layout);
    if (status != DSA_OK) return status;
    const int64_t needed = gpu::workspace_bytes(p);
    if (needed < 0) return DSA_BAD_SHAPE;
    if (needed > 0 && p.workspace_bytes < (size_t)needed) return DSA_WORKSPACE_TOO_SMALL;
    if (p.num_tokens == 0) return DSA_OK;
    if (needed > 0 && p.workspace == nullptr) return DSA_NULL_POINTER;
    gpu::Device device = {};
    status = gpu::device(&device);
    if (status != DSA_OK) return status;
    gpu::Compress call = gpu::make_call(p, layout);
    if (needed > 0) call.wide_entries = (float*)p.workspace;
    return gpu::has_fours(p) ? gpu::launch<4>(call, device, (cudaStream_t)stream)
                             : gpu::launch<1>(call, device, (cudaStream_t)stream);
}
