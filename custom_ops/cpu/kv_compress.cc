#include "dsa/kv_compress.h"

#include <math.h>
#include <string.h>

#include "compressed_checks.h"
#include "compressed_row.h"
#include "dispatch.h"
#include "index_key_row.h"
#include "kv_compress_kernels.h"
#include "parallel.h"

namespace dsa {
namespace {

/* Some microseconds of work each, far above the cost of handing out a task. */
constexpr int64_t kStatesPerTask = 16;
constexpr int64_t kClosingRowsPerTask = 4; /* rows that may close a window */
constexpr double kNanosecondsPerState = 1; /* a number that goes into an entry, and its score */
constexpr double kNanosecondsPerMember = 1;
constexpr int64_t kCacheLine = 64;

/* ---- scalar: the definition ---- */

void add_to_scores(const float* kv_score, const float* ape, int64_t width, float* state) {
    for (int64_t i = 0; i < width; ++i) {
        state[i] = kv_score[i];
        state[width + i] = kv_score[width + i] + ape[i];
    }
}

void pool(const CompressMembers& members, float* pooled) {
    for (int32_t c = 0; c < members.head_dim; ++c) {
        float max = -INFINITY;
        for (int64_t i = 0; i < members.num_members; ++i) {
            const float score = members.values[i][members.score_offset + c];
            if (score > max) max = score;
        }
        float weights = 0.0f, sum = 0.0f;
        for (int64_t i = 0; i < members.num_members; ++i) {
            const float weight = expf(members.values[i][members.score_offset + c] - max);
            weights += weight;
            sum += weight * members.values[i][c];
        }
        pooled[c] = sum / weights;
    }
}

void normalize(const float* weight, int32_t head_dim, float eps, float* row) {
    float sum = 0.0f;
    for (int32_t i = 0; i < head_dim; ++i) sum += row[i] * row[i];
    const float factor = 1.0f / sqrtf(sum / (float)head_dim + eps);
    for (int32_t i = 0; i < head_dim; ++i) row[i] = row[i] * factor * weight[i];
}

constexpr KvCompressKernels kScalarKernels = {add_to_scores, pool, normalize};

const KvCompressKernels* kernels_for(dsa_isa isa) {
#if DSA_X86
    if (isa >= DSA_ISA_AVX512) return &kv_compress_avx512;
    if (isa == DSA_ISA_AVX2) return &kv_compress_avx2;
#else
    (void)isa;
#endif
    return &kScalarKernels;
}

/* ---- the op ---- */

struct KvCompress {
    const dsa_kv_compress_params* params;
    CompressedLayout layout; /* of the entries, if they are rows */
    IndexKeyFormat key_format;
    const KvCompressKernels* kernels;
    const RowCodec* codec;
};

dsa_status check_rows(const dsa_kv_compress_params& p) {
    for (int64_t t = 0; t < p.num_tokens; ++t) {
        if (p.lengths[t] <= 0) continue;
        if (p.positions[t] < 0) return DSA_BAD_SHAPE;
        if (p.request_ids[t] < 0 || p.request_ids[t] >= p.num_requests) return DSA_BAD_SHAPE;
    }
    return DSA_OK;
}

/* Null without a state slot. */
float* state_of(const dsa_kv_compress_params& p, int32_t request, int64_t position) {
    const int64_t column = position / p.state_block_tokens % p.state_table_width;
    const int32_t block = p.state_table[request * p.state_table_width + column];
    if (block < 0 || block >= p.state_num_blocks) return nullptr;
    const int64_t width = 2 * (int64_t)p.overlap * p.head_dim;
    uint8_t* states = (uint8_t*)p.state_cache + block * p.state_block_stride_bytes;
    return (float*)states + position % p.state_block_tokens * width;
}

void store_state(const KvCompress& call, int64_t t) {
    const dsa_kv_compress_params& p = *call.params;
    if (p.lengths[t] <= 0) return;
    float* state = state_of(p, p.request_ids[t], p.positions[t]);
    if (state == nullptr) return;
    const int64_t width = (int64_t)p.overlap * p.head_dim;
    const float* ape = p.ape + p.positions[t] % p.ratio * width;
    call.kernels->add_to_scores(p.kv_score + t * p.kv_score_stride, ape, width, state);
}

/* The members of the window that ends at position; false when one has no state. */
bool find_members(const dsa_kv_compress_params& p, int32_t request, int64_t position, const float** values,
                  CompressMembers* members) {
    const int64_t first = position - (int64_t)p.overlap * p.ratio + 1;
    const int64_t first_newer = position - p.ratio + 1;
    *members = {values, 0, (int64_t)p.overlap * p.head_dim, p.head_dim};
    for (int64_t q = first < 0 ? 0 : first; q <= position; ++q) {
        const float* state = state_of(p, request, q);
        if (state == nullptr) return false;
        values[members->num_members++] = state + (p.overlap == 2 && q >= first_newer ? p.head_dim : 0);
    }
    return true;
}

void rotate_pairs(const float* cos, const float* sin, int32_t num_pairs, float* x) {
    for (int32_t i = 0; i < num_pairs; ++i) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
}

void store_entry(const KvCompress& call, const float* row, int64_t slot) {
    const dsa_kv_compress_params& p = *call.params;
    if (p.entry_kind == DSA_ENTRY_ROW) {
        write_compressed_row(call.layout, *call.codec, row, DSA_FLOAT32,
                             p.entry_cache + compressed_row_offset(&call.layout, slot),
                             p.entry_cache + compressed_scale_offset(&call.layout, slot));
    } else {
        uint8_t* block = p.entry_cache + slot / p.entry_block_rows * p.entry_block_stride_bytes;
        write_index_key(call.key_format, *call.codec, row, DSA_FLOAT32, block, slot % p.entry_block_rows);
    }
}

struct ThreadScratch {
    const float** values; /* [overlap * ratio] */
    float* row;           /* [head_dim] */
};

void close_window(const KvCompress& call, int64_t t, const ThreadScratch& scratch) {
    const dsa_kv_compress_params& p = *call.params;
    const int32_t num_pairs = p.qk_rope_head_dim / 2;
    CompressMembers members;
    if (find_members(p, p.request_ids[t], p.positions[t], scratch.values, &members)) {
        call.kernels->pool(members, scratch.row);
        call.kernels->normalize(p.norm_weight, p.head_dim, p.eps, scratch.row);
        rotate_pairs(p.cos + t * num_pairs, p.sin + t * num_pairs, num_pairs,
                     scratch.row + p.head_dim - p.qk_rope_head_dim);
    } else {
        for (int32_t i = 0; i < p.head_dim; ++i) scratch.row[i] = NAN;
    }
    store_entry(call, scratch.row, p.entry_slots[t]);
}

bool closes_window(const dsa_kv_compress_params& p, int64_t t) {
    if (p.lengths[t] <= 0 || ((int64_t)p.positions[t] + 1) % p.ratio != 0) return false;
    return p.entry_slots[t] >= 0 && p.entry_slots[t] < p.entry_num_blocks * p.entry_block_rows;
}

int64_t round_up(int64_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

int64_t values_bytes(const dsa_kv_compress_params& p) {
    return round_up((int64_t)p.overlap * p.ratio * (int64_t)sizeof(float*));
}

int64_t thread_bytes(const dsa_kv_compress_params& p) { return values_bytes(p) + round_up((int64_t)p.head_dim * 4); }

int64_t ceil_divide(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

/* Threads that may close windows; how many do follows from the rows, which nobody reads before the call. */
int32_t most_threads(const dsa_kv_compress_params& p, const dsa_cpu_options* options) {
    const int64_t tasks = ceil_divide(p.num_tokens, kClosingRowsPerTask);
    const int32_t threads = thread_count(options);
    return tasks < threads ? (int32_t)tasks : threads;
}

/* body(t, thread) for every row, rows_per_task at a time. */
template <typename Body>
void for_each_row(const dsa_kv_compress_params& p, int64_t rows_per_task, int32_t threads, const Body& body) {
    parallel_for(ceil_divide(p.num_tokens, rows_per_task), threads, [&](int64_t task, int32_t thread) {
        const int64_t begin = task * rows_per_task;
        const int64_t end = begin + rows_per_task < p.num_tokens ? begin + rows_per_task : p.num_tokens;
        for (int64_t t = begin; t < end; ++t) body(t, thread);
    });
}

/* Bound: the bytes of kv_compress.h. */
void run(const KvCompress& call, const dsa_cpu_options* options) {
    const dsa_kv_compress_params& p = *call.params;
    const double state_numbers = (double)p.num_tokens * p.overlap * p.head_dim;
    for_each_row(p, kStatesPerTask, threads_for(state_numbers * kNanosecondsPerState, options),
                 [&](int64_t t, int32_t) { store_state(call, t); });
    int64_t num_entries = 0;
    for (int64_t t = 0; t < p.num_tokens; ++t) num_entries += closes_window(p, t);
    const double member_numbers = (double)num_entries * p.overlap * p.ratio * p.head_dim;
    const int32_t threads = threads_for(member_numbers * kNanosecondsPerMember, options);
    for_each_row(p, kClosingRowsPerTask, threads, [&](int64_t t, int32_t thread) {
        uint8_t* memory = (uint8_t*)p.workspace + thread * thread_bytes(p);
        if (closes_window(p, t)) close_window(call, t, {(const float**)memory, (float*)(memory + values_bytes(p))});
    });
}

}  // namespace
}  // namespace dsa

size_t dsa_kv_compress_params_size(void) { return sizeof(dsa_kv_compress_params); }

size_t dsa_kv_compress_workspace_bytes(const dsa_kv_compress_params* params, const dsa_cpu_options* options) {
    using namespace dsa;
    CompressedLayout layout;
    if (params == nullptr || options == nullptr) return 0;
    const dsa_status status = check_kv_compress(*params, &layout);
    if (status != DSA_OK && status != DSA_NULL_POINTER) return 0;
    return (size_t)(most_threads(*params, options) * thread_bytes(*params));
}

dsa_status dsa_kv_compress_cpu(const dsa_kv_compress_params* params, const dsa_cpu_options* options) {
    using namespace dsa;
    if (params == nullptr || options == nullptr) return DSA_NULL_POINTER;
    const dsa_kv_compress_params& p = *params;
    KvCompress call = {};
    const dsa_status status = check_kv_compress(p, &call.layout);
    if (status != DSA_OK) return status;
    const dsa_isa isa = resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    if (p.num_tokens == 0) return DSA_OK;
    if (p.workspace_bytes < (size_t)(most_threads(p, options) * thread_bytes(p))) return DSA_WORKSPACE_TOO_SMALL;
    if (p.workspace == nullptr) return DSA_NULL_POINTER;
    const dsa_status row_status = check_rows(p);
    if (row_status != DSA_OK) return row_status;
    call.params = params;
    call.key_format = {p.entry_format, p.scale_format, p.entry_block_rows, p.head_dim};
    call.kernels = kernels_for(isa);
    call.codec = row_codec(isa);
    run(call, options);
    return DSA_OK;
}
