#include "dsa/topk_slots.h"

#include "dispatch.h"
#include "paged_rows.h"
#include "parallel.h"
#include "topk_select.h"

namespace {

using dsa::TopkSelector;

size_t scalar_scratch_bytes(int64_t, int64_t) { return 0; }

int64_t count_above(const float* scores, int64_t n, int32_t key) {
    int32_t count = 0;
    for (int64_t s = 0; s < n; ++s) count += dsa::rank_key(scores[s]) > key;
    return count;
}

void scalar_select(const float* scores, int64_t n, int64_t topk, int32_t* positions, void*) {
    /* At least topk keys are above `low`, fewer are above `high`: in the end `high` is the topk-th largest key. */
    int64_t low = (int64_t)INT32_MIN - 1;
    int64_t high = INT32_MAX;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (count_above(scores, n, (int32_t)middle) >= topk)
            low = middle;
        else
            high = middle;
    }
    int64_t ties = topk - count_above(scores, n, (int32_t)high);
    int64_t count = 0;
    for (int64_t s = 0; s < n && count < topk; ++s) {
        const int32_t key = dsa::rank_key(scores[s]);
        if (key < high || (key == high && ties-- <= 0)) continue; /* equal scores: the smaller position first */
        positions[count++] = (int32_t)s;
    }
}

const TopkSelector* topk_selector(dsa_isa isa) {
#if DSA_X86
    if (isa >= DSA_ISA_AVX512) return &dsa::kTopkSelectorAvx512;
    if (isa == DSA_ISA_AVX2) return &dsa::kTopkSelectorAvx2;
#else
    (void)isa;
#endif
    return &dsa::kTopkSelectorScalar;
}

int64_t num_threads(const dsa_topk_slots_params& p, const dsa_cpu_options* options) {
    const int64_t threads = dsa::thread_count(options);
    return threads < p.num_tokens ? threads : p.num_tokens;
}

size_t thread_bytes(const dsa_topk_slots_params& p, dsa_isa isa) {
    return p.logits_width > p.topk ? topk_selector(isa)->scratch_bytes(p.logits_width, p.topk) : 0;
}

dsa_status check_sizes(const dsa_topk_slots_params& p) {
    if (p.topk < 1 || !dsa::is_count(p.logits_width) || !dsa::is_count(p.num_tokens)) return DSA_BAD_SHAPE;
    if (!dsa::product_fits(p.num_tokens, p.topk, (int64_t)sizeof(int32_t))) return DSA_BAD_SHAPE;
    if (!dsa::rows_fit(p.num_tokens, p.logits_stride, p.logits_width)) return DSA_BAD_SHAPE;
    return DSA_OK;
}

dsa_status check(const dsa_topk_slots_params& p) {
    if (const dsa_status status = check_sizes(p)) return status;
    if (p.num_tokens > 0 && (!p.positions || !p.slot_ids || !p.counts)) return DSA_NULL_POINTER;
    if (p.num_tokens > 0 && p.logits_width > 0 && !p.logits) return DSA_NULL_POINTER;
    return dsa::check_rows(dsa::paged_rows(p, p.logits_width));
}

/* Time of the call on one thread: a pass over the scores of long rows, and the output. */
double estimated_nanoseconds(const dsa_topk_slots_params& p) {
    double nanoseconds = 0;
    for (int64_t t = 0; t < p.num_tokens; ++t)
        nanoseconds += p.topk + (p.lengths[t] > p.topk ? 0.5 * p.lengths[t] : 0);
    return nanoseconds;
}

void write_slots(const dsa_topk_slots_params& p, const int32_t* blocks, const int32_t* positions, int64_t count,
                 int32_t* slots) {
    const uint32_t block_size = (uint32_t)p.block_size;
    /* Positions ascend, so a new quotient is needed only when one leaves its block. */
    uint32_t first = 0;
    int64_t base = -1;
    uint32_t end = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t position = (uint32_t)positions[i];
        if (position >= end) {
            const uint32_t index = position / block_size;
            const int32_t block = blocks[index];
            first = index * block_size;
            end = first + block_size;
            base = block >= 0 && block < p.num_blocks ? (int64_t)block * block_size : -1;
        }
        slots[i] = base < 0 ? -1 : (int32_t)(base + (position - first));
    }
}

void write_row(const dsa_topk_slots_params& p, const TopkSelector& selector, int64_t t, void* scratch) {
    const int64_t topk = p.topk;
    const int64_t length = p.lengths[t] > 0 ? p.lengths[t] : 0;
    const int64_t count = length < topk ? length : topk;
    int32_t* positions = p.positions + t * topk;
    int32_t* slots = p.slot_ids + t * topk;
    if (length > topk) {
        selector.select(p.logits + t * p.logits_stride, length, topk, positions, scratch);
    } else {
        for (int64_t i = 0; i < count; ++i) positions[i] = (int32_t)i;
    }
    if (count > 0) write_slots(p, p.block_table + p.request_ids[t] * p.max_blocks, positions, count, slots);
    for (int64_t i = count; i < topk; ++i) positions[i] = slots[i] = -1;
    p.counts[t] = (int32_t)count;
}

}  // namespace

const TopkSelector dsa::kTopkSelectorScalar = {scalar_scratch_bytes, scalar_select};

size_t dsa_topk_slots_params_size(void) { return sizeof(dsa_topk_slots_params); }

size_t dsa_topk_slots_workspace_bytes(const dsa_topk_slots_params* params, const dsa_cpu_options* options) {
    if (!params || !options || check_sizes(*params)) return 0;
    const dsa_isa isa = dsa::resolve_isa(options);
    return isa == DSA_ISA_AUTO ? 0 : (size_t)num_threads(*params, options) * thread_bytes(*params, isa);
}

dsa_status dsa_topk_slots_cpu(const dsa_topk_slots_params* params, const dsa_cpu_options* options) {
    if (!params || !options) return DSA_NULL_POINTER;
    const dsa_topk_slots_params& p = *params;
    if (const dsa_status status = check(p)) return status;
    const dsa_isa isa = dsa::resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    const size_t needed = dsa_topk_slots_workspace_bytes(params, options);
    if (p.workspace_bytes < needed) return DSA_WORKSPACE_TOO_SMALL;
    if (needed > 0 && !p.workspace) return DSA_NULL_POINTER;

    const TopkSelector& selector = *topk_selector(isa);
    const size_t scratch_bytes = thread_bytes(p, isa);
    const int32_t threads = dsa::threads_for(estimated_nanoseconds(p), options);
    dsa::parallel_for(p.num_tokens, threads, [&](int64_t t, int32_t thread) {
        write_row(p, selector, t, (uint8_t*)p.workspace + (size_t)thread * scratch_bytes);
    });
    return DSA_OK;
}
