#include <string.h>

#include "dispatch.h"
#include "number_formats.h"
#include "sparse_mla_kernels.h"

namespace dsa {
namespace {

int32_t collect_ids(const RowAttention& base, int64_t token, int32_t* ids) {
    const SparseMla& call = static_cast<const SparseMla&>(base);
    const dsa_sparse_mla_params& p = *call.params;
    const int32_t count = p.counts == nullptr ? p.topk : p.counts[token];
    const int32_t* slot_ids = p.slot_ids + token * p.topk;
    int32_t num_ids = 0;
    for (int32_t i = 0; i < count; ++i) {
        ids[num_ids] = slot_ids[i];
        num_ids += slot_ids[i] >= 0 && slot_ids[i] < call.layout.num_slots;
    }
    return num_ids;
}

float read_number(const uint8_t* numbers, dsa_format format, int64_t i) {
    float value;
    uint16_t code;
    if (format == DSA_FLOAT32) {
        memcpy(&value, numbers + 4 * i, 4);
        return value;
    }
    memcpy(&code, numbers + 2 * i, 2);
    return bf16_decode(code);
}

void read_row(const RowAttention& base, int32_t slot, float* key) {
    const SparseMla& call = static_cast<const SparseMla&>(base);
    const LatentLayout& layout = call.layout;
    const uint8_t* row = call.params->latent_cache + latent_row_offset(&layout, slot);
    const bool is_fp8 = layout.format == DSA_FP8;
    for (int32_t i = 0; i < layout.kv_lora_rank; ++i) {
        if (is_fp8) {
            const float scale = read_number(row + layout.scale_offset, DSA_FLOAT32, i / DSA_LATENT_GROUP);
            key[i] = bf16_round(e4m3_decode(row[i]) * scale);
        } else {
            key[i] = read_number(row, layout.format, i);
        }
    }
    const dsa_format rope_format = is_fp8 ? (dsa_format)DSA_BFLOAT16 : layout.format;
    for (int32_t i = 0; i < layout.qk_rope_head_dim; ++i)
        key[layout.kv_lora_rank + i] = read_number(row + layout.rope_offset, rope_format, i);
}

const RowAttentionKernels* kernels_for(const dsa_sparse_mla_params& p, dsa_isa isa) {
#if DSA_X86
    if (isa == DSA_ISA_SCALAR) return nullptr;
    if (isa == DSA_ISA_AVX2) return &sparse_mla_avx2;
    const bool is_bf16 = p.query_format == DSA_BFLOAT16 && p.cache_format != DSA_FLOAT32;
    return isa == DSA_ISA_AVX512_BF16 && is_bf16 ? &sparse_mla_avx512_bf16 : &sparse_mla_avx512;
#else
    (void)p;
    (void)isa;
    return nullptr;
#endif
}

dsa_status make_call(const dsa_sparse_mla_params& p, dsa_isa isa, SparseMla* call) {
    if (p.query_format != DSA_FLOAT32 && p.query_format != DSA_BFLOAT16) return DSA_BAD_FORMAT;
    const dsa_status status = make_latent_layout(p.cache_format, p.kv_lora_rank, p.qk_rope_head_dim, p.num_blocks,
                                                 p.block_size, p.block_stride_bytes, &call->layout);
    if (status != DSA_OK) return status;
    if (call->layout.num_slots > INT32_MAX) return DSA_BAD_SHAPE;
    if (p.topk <= 0 || p.topk > INT32_MAX - kKeysPerChunk) return DSA_BAD_SHAPE;
    if (!is_count(p.num_tokens) || p.num_heads <= 0) return DSA_BAD_SHAPE;
    call->params = &p;
    call->query = p.query;
    call->out = p.out;
    call->lse = p.lse;
    call->workspace = p.workspace;
    call->num_tokens = p.num_tokens;
    call->num_heads = p.num_heads;
    call->max_ids = p.topk;
    call->value_dim = p.kv_lora_rank;
    call->key_only_dim = p.qk_rope_head_dim;
    call->softmax_scale = p.softmax_scale;
    call->query_format = p.query_format;
    call->kernels = kernels_for(p, isa);
    call->collect_ids = collect_ids;
    call->read_row = read_row;
    return set_row_widths(call) ? DSA_OK : DSA_BAD_SHAPE;
}

dsa_status check_arrays(const dsa_sparse_mla_params& p, size_t workspace_bytes) {
    if (p.num_tokens == 0) return DSA_OK;
    if (p.query == nullptr || p.slot_ids == nullptr || p.out == nullptr) return DSA_NULL_POINTER;
    if (p.latent_cache == nullptr && p.num_blocks > 0) return DSA_NULL_POINTER;
    if (p.workspace_bytes < workspace_bytes) return DSA_WORKSPACE_TOO_SMALL;
    if (p.workspace == nullptr) return DSA_NULL_POINTER;
    return counts_fit(p.counts, p.num_tokens, p.topk) ? DSA_OK : DSA_BAD_SHAPE;
}

}  // namespace
}  // namespace dsa

size_t dsa_sparse_mla_params_size(void) { return sizeof(dsa_sparse_mla_params); }

size_t dsa_sparse_mla_workspace_bytes(const dsa_sparse_mla_params* params, const dsa_cpu_options* options) {
    return dsa::row_attention_op_workspace_bytes(params, options, dsa::make_call);
}

dsa_status dsa_sparse_mla_cpu(const dsa_sparse_mla_params* params, const dsa_cpu_options* options) {
    return dsa::run_row_attention_op(params, options, dsa::make_call, dsa::check_arrays);
}
