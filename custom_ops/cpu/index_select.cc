#include "dsa/index_select.h"

#include "dispatch.h"
#include "dsa/indexer_logits.h"
#include "dsa/topk_slots.h"
#include "paged_rows.h"

namespace {

/* Rows that are scored before their top-k is taken: more would only push scores out of the caches. */
constexpr int64_t kMaxRowsPerPass = 256;

/* Workspace, each part a multiple of 64 bytes:
 *
 *   logits  [rows_per_pass, logits_stride] float32
 *   scored  [rows_per_pass] int32: lengths with 0 for rows that need no scores
 *   scratch of indexer_logits and topk_slots, one after the other in time
 */
struct Plan {
    int64_t rows_per_pass;
    int64_t logits_stride;
    size_t logits_bytes;
    size_t scored_bytes;
    size_t scratch_bytes;
};

/* Columns of the score rows: a row is never longer than its blocks, whatever max_length says. */
int64_t score_width(const dsa_index_select_params& p) {
    const int64_t capacity = p.max_blocks * p.block_size;
    return p.max_length < capacity ? p.max_length : capacity;
}

size_t round_up_to_line(size_t bytes) { return (bytes + 63) / 64 * 64; }

dsa_indexer_logits_params logits_params(const dsa_index_select_params& p, const Plan& plan) {
    dsa_indexer_logits_params q = {};
    q.index_cache = p.index_cache;
    q.block_table = p.block_table;
    q.block_stride_bytes = p.block_stride_bytes;
    q.logits_stride = plan.logits_stride;
    q.logits_width = score_width(p);
    q.num_blocks = p.num_blocks;
    q.num_tokens = plan.rows_per_pass;
    q.num_requests = p.num_requests;
    q.max_blocks = p.max_blocks;
    q.block_size = p.block_size;
    q.index_n_heads = p.index_n_heads;
    q.index_head_dim = p.index_head_dim;
    q.cache_format = p.cache_format;
    return q;
}

dsa_topk_slots_params topk_params(const dsa_index_select_params& p, const Plan& plan) {
    dsa_topk_slots_params q = {};
    q.block_table = p.block_table;
    q.logits_stride = plan.logits_stride;
    q.logits_width = score_width(p);
    q.num_blocks = p.num_blocks;
    q.num_tokens = plan.rows_per_pass;
    q.num_requests = p.num_requests;
    q.max_blocks = p.max_blocks;
    q.block_size = p.block_size;
    q.topk = p.topk;
    return q;
}

Plan make_plan(const dsa_index_select_params& p, const dsa_cpu_options* options) {
    Plan plan = {};
    /* Rows start on cache lines. */
    plan.logits_stride = (int64_t)(round_up_to_line((size_t)score_width(p) * sizeof(float)) / sizeof(float));
    const int64_t row_bytes = plan.logits_stride * (int64_t)sizeof(float);
    const int64_t affordable = row_bytes > 0 ? p.max_logits_bytes / row_bytes : kMaxRowsPerPass;
    plan.rows_per_pass = affordable < kMaxRowsPerPass ? affordable : kMaxRowsPerPass;
    if (plan.rows_per_pass < 1) plan.rows_per_pass = 1;
    if (plan.rows_per_pass > p.num_tokens) plan.rows_per_pass = p.num_tokens;
    plan.logits_bytes = (size_t)(plan.rows_per_pass * row_bytes);
    plan.scored_bytes = round_up_to_line((size_t)plan.rows_per_pass * sizeof(int32_t));
    const dsa_indexer_logits_params logits = logits_params(p, plan);
    const dsa_topk_slots_params topk = topk_params(p, plan);
    const size_t logits_scratch = dsa_indexer_logits_workspace_bytes(&logits, options);
    const size_t topk_scratch = dsa_topk_slots_workspace_bytes(&topk, options);
    plan.scratch_bytes = logits_scratch > topk_scratch ? logits_scratch : topk_scratch;
    return plan;
}

dsa_status check_sizes(const dsa_index_select_params& p) {
    const dsa_status cache_status = dsa::check_index_cache(p.cache_format, p.num_blocks, p.block_stride_bytes,
                                                           p.block_size, p.index_head_dim);
    if (cache_status != DSA_OK) return cache_status;
    if (!dsa::index_rows_fit(p.num_tokens, p.index_n_heads, p.index_head_dim)) return DSA_BAD_SHAPE;
    if (!dsa::is_count(p.max_length) || !dsa::is_count(p.max_blocks)) return DSA_BAD_SHAPE;
    if (p.max_logits_bytes < 0 || p.topk < 1) return DSA_BAD_SHAPE;
    if (!dsa::product_fits(p.num_tokens, p.topk, (int64_t)sizeof(int32_t))) return DSA_BAD_SHAPE;
    return DSA_OK;
}

dsa_status check(const dsa_index_select_params& p) {
    if (const dsa_status status = check_sizes(p)) return status;
    if (p.num_tokens > 0 && (!p.positions || !p.slot_ids || !p.counts)) return DSA_NULL_POINTER;
    if (p.num_tokens > 0 && (!p.query || !p.folded_weights)) return DSA_NULL_POINTER;
    if (p.num_blocks > 0 && !p.index_cache) return DSA_NULL_POINTER;
    return dsa::check_rows(dsa::paged_rows(p, p.max_length));
}

int64_t number_bytes(dsa_format format) { return format == DSA_FP8 ? 1 : format == DSA_BFLOAT16 ? 2 : 4; }

dsa_status select_rows(const dsa_index_select_params& p, const dsa_cpu_options* options, const Plan& plan,
                       int64_t first_row, int64_t num_rows) {
    uint8_t* workspace = (uint8_t*)p.workspace;
    float* logits = (float*)workspace;
    int32_t* scored = (int32_t*)(workspace + plan.logits_bytes);
    void* scratch = workspace + plan.logits_bytes + plan.scored_bytes;
    for (int64_t i = 0; i < num_rows; ++i)
        scored[i] = p.lengths[first_row + i] > p.topk ? p.lengths[first_row + i] : 0;

    dsa_indexer_logits_params score = logits_params(p, plan);
    const int64_t row_bytes = (int64_t)p.index_n_heads * p.index_head_dim * number_bytes(p.cache_format);
    score.query = (const uint8_t*)p.query + first_row * row_bytes;
    score.folded_weights = p.folded_weights + first_row * p.index_n_heads;
    score.request_ids = p.request_ids + first_row;
    score.lengths = scored;
    score.logits = logits;
    score.workspace = scratch;
    score.workspace_bytes = plan.scratch_bytes;
    score.num_tokens = num_rows;
    if (const dsa_status status = dsa_indexer_logits_cpu(&score, options)) return status;

    dsa_topk_slots_params topk = topk_params(p, plan);
    topk.logits = logits;
    topk.lengths = p.lengths + first_row;
    topk.request_ids = p.request_ids + first_row;
    topk.positions = p.positions + first_row * p.topk;
    topk.slot_ids = p.slot_ids + first_row * p.topk;
    topk.counts = p.counts + first_row;
    topk.workspace = scratch;
    topk.workspace_bytes = plan.scratch_bytes;
    topk.num_tokens = num_rows;
    return dsa_topk_slots_cpu(&topk, options);
}

}  // namespace

size_t dsa_index_select_params_size(void) { return sizeof(dsa_index_select_params); }

size_t dsa_index_select_workspace_bytes(const dsa_index_select_params* params, const dsa_cpu_options* options) {
    if (!params || !options || check_sizes(*params)) return 0;
    const Plan plan = make_plan(*params, options);
    return plan.logits_bytes + plan.scored_bytes + plan.scratch_bytes;
}

dsa_status dsa_index_select_cpu(const dsa_index_select_params* params, const dsa_cpu_options* options) {
    if (!params || !options) return DSA_NULL_POINTER;
    const dsa_index_select_params& p = *params;
    if (const dsa_status status = check(p)) return status;
    if (dsa::resolve_isa(options) == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    const Plan plan = make_plan(p, options);
    const size_t needed = plan.logits_bytes + plan.scored_bytes + plan.scratch_bytes;
    if (p.workspace_bytes < needed) return DSA_WORKSPACE_TOO_SMALL;
    if (needed > 0 && !p.workspace) return DSA_NULL_POINTER;

    for (int64_t first = 0; first < p.num_tokens; first += plan.rows_per_pass) {
        const int64_t left = p.num_tokens - first;
        const int64_t num_rows = left < plan.rows_per_pass ? left : plan.rows_per_pass;
        if (const dsa_status status = select_rows(p, options, plan, first, num_rows)) return status;
    }
    return DSA_OK;
}
