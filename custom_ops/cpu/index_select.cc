#include "dsa/index_select.h"

#include "dispatch.h"
#include "index_select_parts.h"
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

Plan make_plan(const dsa_index_select_params& p, const dsa_cpu_options* options) {
    Plan plan = {};
    plan.logits_stride = dsa::score_stride(p);
    const int64_t row_bytes = plan.logits_stride * (int64_t)sizeof(float);
    const int64_t affordable = row_bytes > 0 ? p.max_logits_bytes / row_bytes : kMaxRowsPerPass;
    plan.rows_per_pass = affordable < kMaxRowsPerPass ? affordable : kMaxRowsPerPass;
    if (plan.rows_per_pass < 1) plan.rows_per_pass = 1;
    if (plan.rows_per_pass > p.num_tokens) plan.rows_per_pass = p.num_tokens;
    plan.logits_bytes = (size_t)(plan.rows_per_pass * row_bytes);
    plan.scored_bytes = dsa::round_up_to_line((size_t)plan.rows_per_pass * sizeof(int32_t));
    const dsa_indexer_logits_params logits = dsa::logits_params(p, plan.rows_per_pass);
    const dsa_topk_slots_params topk = dsa::topk_params(p, plan.rows_per_pass);
    const size_t logits_scratch = dsa_indexer_logits_workspace_bytes(&logits, options);
    const size_t topk_scratch = dsa_topk_slots_workspace_bytes(&topk, options);
    plan.scratch_bytes = logits_scratch > topk_scratch ? logits_scratch : topk_scratch;
    return plan;
}

dsa_status check(const dsa_index_select_params& p) {
    if (const dsa_status status = dsa::check_index_select_sizes(p)) return status;
    if (const dsa_status status = dsa::check_index_select_arrays(p)) return status;
    return dsa::check_rows(dsa::paged_rows(p, p.max_length));
}

dsa_status select_rows(const dsa_index_select_params& p, const dsa_cpu_options* options, const Plan& plan,
                       int64_t first_row, int64_t num_rows) {
    uint8_t* workspace = (uint8_t*)p.workspace;
    float* logits = (float*)workspace;
    int32_t* scored = (int32_t*)(workspace + plan.logits_bytes);
    void* scratch = workspace + plan.logits_bytes + plan.scored_bytes;
    for (int64_t i = 0; i < num_rows; ++i)
        scored[i] = p.lengths[first_row + i] > p.topk ? p.lengths[first_row + i] : 0;

    dsa_indexer_logits_params score = dsa::logits_params(p, plan.rows_per_pass);
    const int64_t row_bytes = (int64_t)p.index_n_heads * p.index_head_dim * dsa::number_bytes(p.cache_format);
    score.query = (const uint8_t*)p.query + first_row * row_bytes;
    score.folded_weights = p.folded_weights + first_row * p.index_n_heads;
    score.request_ids = p.request_ids + first_row;
    score.lengths = scored;
    score.logits = logits;
    score.workspace = scratch;
    score.workspace_bytes = plan.scratch_bytes;
    score.num_tokens = num_rows;
    if (const dsa_status status = dsa_indexer_logits_cpu(&score, options)) return status;

    dsa_topk_slots_params topk = dsa::topk_params(p, plan.rows_per_pass);
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
    if (!params || !options || dsa::check_index_select_sizes(*params)) return 0;
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
