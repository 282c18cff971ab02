#include "dsa/index_select.h"

#include "index_select_parts.h"
#include "launch.h"

namespace dsa {
namespace gpu {
namespace {

/* Workspace, each part a multiple of 64 bytes:
 *
 *   logits  [rows_per_pass, logits_stride] float32
 *   scored  [rows_per_pass] int32: lengths with 0 for rows that need no scores
 *   scratch of indexer_logits and topk_slots, one after the other in time
 *
 * Rows are split by host numbers alone, so that the launches of a captured graph fit whatever the lengths become.
 */
struct Plan {
    int64_t rows_per_pass;
    int64_t logits_stride;
    size_t logits_bytes;
    size_t scored_bytes;
    size_t scratch_bytes;

    size_t bytes() const { return logits_bytes + scored_bytes + scratch_bytes; }
};

bool needs_scores(const dsa_index_select_params& p) { return score_width(p) > p.topk; }

/* Scoring the short ones of a few rows takes less than a launch to leave them out; nobody reads those scores. */
constexpr int64_t kFewScores = 1 << 15;

bool leaves_out_short_rows(const dsa_index_select_params& p, int64_t num_rows) {
    return num_rows * p.topk > kFewScores;
}

Plan make_plan(const dsa_index_select_params& p) {
    Plan plan = {};
    plan.logits_stride = score_stride(p);
    const int64_t row_bytes = plan.logits_stride * (int64_t)sizeof(float);
    /* No upper bound but the budget: rows are what the device runs side by side. */
    const int64_t affordable = row_bytes > 0 && needs_scores(p) ? p.max_logits_bytes / row_bytes : p.num_tokens;
    plan.rows_per_pass = affordable < p.num_tokens ? affordable : p.num_tokens;
    if (plan.rows_per_pass < 1 && p.num_tokens > 0) plan.rows_per_pass = 1;
    if (needs_scores(p)) {
        plan.logits_bytes = (size_t)(plan.rows_per_pass * row_bytes);
        plan.scored_bytes = round_up_to_line((size_t)plan.rows_per_pass * sizeof(int32_t));
        const dsa_indexer_logits_params logits = logits_params(p, plan.rows_per_pass);
        plan.scratch_bytes = dsa_indexer_logits_cuda_workspace_bytes(&logits);
    }
    const dsa_topk_slots_params topk = topk_params(p, plan.rows_per_pass);
    const size_t topk_scratch = dsa_topk_slots_cuda_workspace_bytes(&topk);
    if (plan.scratch_bytes < topk_scratch) plan.scratch_bytes = topk_scratch;
    return plan;
}

dsa_status check(const dsa_index_select_params& p) {
    if (const dsa_status status = check_index_select_sizes(p)) return status;
    if (const dsa_status status = check_index_select_arrays(p)) return status;
    if (!is_count(p.num_requests) || p.block_size <= 0) return DSA_BAD_SHAPE;
    if (!product_fits(p.num_requests, p.max_blocks, (int64_t)sizeof(int32_t))) return DSA_BAD_SHAPE;
    if (p.num_blocks > INT32_MAX / p.block_size) return DSA_BAD_SHAPE;
    if (p.num_tokens > 0 && (!p.request_ids || !p.lengths)) return DSA_NULL_POINTER;
    if (p.num_requests > 0 && p.max_blocks > 0 && !p.block_table) return DSA_NULL_POINTER;
    return DSA_OK;
}

__global__ void scored_lengths_kernel(const int32_t* lengths, int32_t* scored, int64_t num_rows, int32_t topk) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < num_rows) scored[i] = lengths[i] > topk ? lengths[i] : 0;
}

dsa_status select_rows(const dsa_index_select_params& p, const Plan& plan, int64_t first_row, int64_t num_rows,
                       cudaStream_t stream) {
    uint8_t* workspace = (uint8_t*)p.workspace;
    float* logits = (float*)workspace;
    void* scratch = workspace + plan.logits_bytes + plan.scored_bytes;
    if (needs_scores(p)) {
        const int32_t* scored = p.lengths + first_row;
        if (leaves_out_short_rows(p, num_rows)) {
            int32_t* long_lengths = (int32_t*)(workspace + plan.logits_bytes);
            constexpr int32_t kThreads = 256;
            scored_lengths_kernel<<<(unsigned)((num_rows + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
                scored, long_lengths, num_rows, p.topk);
            if (const dsa_status status = launched(stream)) return status;
            scored = long_lengths;
        }

        dsa_indexer_logits_params score = logits_params(p, plan.rows_per_pass);
        const int64_t row_bytes = (int64_t)p.index_n_heads * p.index_head_dim * number_bytes(p.cache_format);
        score.query = (const uint8_t*)p.query + first_row * row_bytes;
        score.folded_weights = p.folded_weights + first_row * p.index_n_heads;
        score.request_ids = p.request_ids + first_row;
        score.lengths = scored;
        score.logits = logits;
        score.workspace = scratch;
        score.workspace_bytes = plan.scratch_bytes;
        score.num_tokens = num_rows;
        if (const dsa_status status = dsa_indexer_logits_cuda(&score, stream)) return status;
    }

    dsa_topk_slots_params topk = topk_params(p, plan.rows_per_pass);
    topk.logits = needs_scores(p) ? logits : p.folded_weights; /* else some address: no row is read */
    topk.lengths = p.lengths + first_row;
    topk.request_ids = p.request_ids + first_row;
    topk.positions = p.positions + first_row * p.topk;
    topk.slot_ids = p.slot_ids + first_row * p.topk;
    topk.counts = p.counts + first_row;
    topk.workspace = scratch;
    topk.workspace_bytes = plan.scratch_bytes;
    topk.num_tokens = num_rows;
    return dsa_topk_slots_cuda(&topk, stream);
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

size_t dsa_index_select_cuda_workspace_bytes(const dsa_index_select_params* params) {
    if (!params || dsa::check_index_select_sizes(*params)) return 0;
    return dsa::gpu::make_plan(*params).bytes();
}

dsa_status dsa_index_select_cuda(const dsa_index_select_params* params, void* stream) {
    if (!params) return DSA_NULL_POINTER;
    const dsa_index_select_params& p = *params;
    if (const dsa_status status = dsa::gpu::check(p)) return status;
    const dsa::gpu::Plan plan = dsa::gpu::make_plan(p);
    if (p.workspace_bytes < plan.bytes()) return DSA_WORKSPACE_TOO_SMALL;
    if (plan.bytes() > 0 && !p.workspace) return DSA_NULL_POINTER;

    for (int64_t first = 0; first < p.num_tokens; first += plan.rows_per_pass) {
        const int64_t left = p.num_tokens - first;
        const int64_t num_rows = left < plan.rows_per_pass ? left : plan.rows_per_pass;
        const dsa_status status = dsa::gpu::select_rows(p, plan, first, num_rows, (cudaStream_t)stream);
        if (status != DSA_OK) return status;
    }
    return DSA_OK;
}
