#include "compressed_checks.h"
#include "compressed_mla_kernels.h"
#include "compressed_row.h"
#include "dispatch.h"

namespace dsa {
namespace {

/* Appends the slots that lie inside a cache, each with bit set. */
int32_t append_ids(const int32_t* slots, int32_t count, int64_t num_slots, int32_t bit, int32_t num_ids,
                   int32_t* ids) {
    for (int32_t i = 0; i < count; ++i) {
        ids[num_ids] = slots[i] | bit;
        num_ids += slots[i] >= 0 && slots[i] < num_slots;
    }
    return num_ids;
}

int32_t collect_ids(const RowAttention& base, int64_t token, int32_t* ids) {
    const CompressedMla& call = static_cast<const CompressedMla&>(base);
    const dsa_compressed_mla_params& p = *call.params;
    const int32_t window_count = p.window_counts == nullptr ? p.window_width : p.window_counts[token];
    const int32_t entry_count = p.entry_counts == nullptr ? p.entry_width : p.entry_counts[token];
    const int32_t num_ids =
        append_ids(p.window_slots + token * p.window_width, window_count, call.window.num_slots, 0, 0, ids);
    return append_ids(p.entry_slots + token * p.entry_width, entry_count, call.entries.num_slots, kEntryBit, num_ids,
                      ids);
}

void read_row(const RowAttention& base, int32_t id, float* row) {
    const CompressedRow found = compressed_row_of(static_cast<const CompressedMla&>(base), id);
    read_compressed_row(*found.layout, found.data, found.scales, row);
}

const RowAttentionKernels* kernels_for(const dsa_compressed_mla_params& p, dsa_isa isa) {
#if DSA_X86
    if (isa == DSA_ISA_SCALAR) return nullptr;
    if (isa == DSA_ISA_AVX2) return &compressed_mla_avx2;
    const bool is_bf16 = p.query_format == DSA_BFLOAT16 && p.cache_format != DSA_FLOAT32;
    return isa == DSA_ISA_AVX512_BF16 && is_bf16 ? &compressed_mla_avx512_bf16 : &compressed_mla_avx512;
#else
    (void)p;
    (void)isa;
    return nullptr;
#endif
}

dsa_status make_call(const dsa_compressed_mla_params& p, dsa_isa isa, CompressedMla* call) {
    const dsa_status status = check_compressed_mla_shape(p, &call->window, &call->entries);
    if (status != DSA_OK) return status;
    call->params = &p;
    call->query = p.query;
    call->sinks = p.sinks;
    call->out = p.out;
    call->lse = p.lse;
    call->workspace = p.workspace;
    call->num_tokens = p.num_tokens;
    call->num_heads = p.num_heads;
    call->max_ids = p.window_width + p.entry_width;
    call->value_dim = p.head_dim;
    call->key_only_dim = 0;
    call->softmax_scale = p.softmax_scale;
    call->query_format = p.query_format;
    call->kernels = kernels_for(p, isa);
    call->collect_ids = collect_ids;
    call->read_row = read_row;
    return set_row_widths(call) ? DSA_OK : DSA_BAD_SHAPE;
}

dsa_status check_arrays(const dsa_compressed_mla_params& p, size_t workspace_bytes) {
    const dsa_status status = check_compressed_mla_arrays(p);
    if (status != DSA_OK || p.num_tokens == 0) return status;
    if (p.workspace_bytes < workspace_bytes) return DSA_WORKSPACE_TOO_SMALL;
    if (p.workspace == nullptr) return DSA_NULL_POINTER;
    const bool fit = counts_fit(p.window_counts, p.num_tokens, p.window_width) &&
                     counts_fit(p.entry_counts, p.num_tokens, p.entry_width);
    return fit ? DSA_OK : DSA_BAD_SHAPE;
}

}  // namespace
}  // namespace dsa

size_t dsa_compressed_mla_params_size(void) { return sizeof(dsa_compressed_mla_params); }

size_t dsa_compressed_mla_workspace_bytes(const dsa_compressed_mla_params* params, const dsa_cpu_options* options) {
    return dsa::row_attention_op_workspace_bytes(params, options, dsa::make_call);
}

dsa_status dsa_compressed_mla_cpu(const dsa_compressed_mla_params* params, const dsa_cpu_options* options) {
    return dsa::run_row_attention_op(params, options, dsa::make_call, dsa::check_arrays);
}
