#include "dsa/indexer_logits.h"

#include "indexer_logits_generic.cuh"
#include "indexer_logits_kernels.h"
#include "sizes.h"

namespace {

using dsa::gpu::IndexerLogitsArguments;

/* As on the CPU, without the values inside lengths and request_ids. */
dsa_status check_sizes(const dsa_indexer_logits_params& p) {
    const dsa_status cache_status = dsa::check_index_cache(p.cache_format, p.num_blocks, p.block_stride_bytes,
                                                           p.block_size, p.index_head_dim);
    if (cache_status != DSA_OK) return cache_status;
    if (!dsa::index_rows_fit(p.num_tokens, p.index_n_heads, p.index_head_dim)) return DSA_BAD_SHAPE;
    if (!dsa::is_count(p.logits_width)) return DSA_BAD_SHAPE;
    if (!dsa::rows_fit(p.num_tokens, p.logits_stride, p.logits_width)) return DSA_BAD_SHAPE;
    return DSA_OK;
}

dsa_status check_paging(const dsa_indexer_logits_params& p) {
    if (!dsa::is_count(p.num_requests) || !dsa::is_count(p.max_blocks)) return DSA_BAD_SHAPE;
    if (!dsa::product_fits(p.num_requests, p.max_blocks, (int64_t)sizeof(int32_t))) return DSA_BAD_SHAPE;
    if (p.num_blocks > INT32_MAX / p.block_size) return DSA_BAD_SHAPE; /* slots are int32 */
    if (p.num_tokens > 0 && (!p.request_ids || !p.lengths)) return DSA_NULL_POINTER;
    if (p.num_requests > 0 && p.max_blocks > 0 && !p.block_table) return DSA_NULL_POINTER;
    return DSA_OK;
}

dsa_status check(const dsa_indexer_logits_params& p) {
    if (const dsa_status status = check_sizes(p)) return status;
    if (p.num_tokens > 0 && (!p.query || !p.folded_weights)) return DSA_NULL_POINTER;
    if (p.num_tokens > 0 && p.logits_width > 0 && !p.logits) return DSA_NULL_POINTER;
    if (p.num_blocks > 0 && !p.index_cache) return DSA_NULL_POINTER;
    return check_paging(p);
}

/* A GPU faults on a load that is not aligned to its own size. */
bool is_aligned(const dsa_indexer_logits_params& p) {
    const uint64_t bytes = p.cache_format == DSA_BFLOAT16 ? 2 : 4;
    const uint64_t query_bytes = p.cache_format == DSA_FP8 ? 1 : bytes;
    const uint64_t stride = p.num_blocks > 1 ? (uint64_t)p.block_stride_bytes : 0;
    return ((uint64_t)p.index_cache | stride) % bytes == 0 && (uint64_t)p.query % query_bytes == 0;
}

IndexerLogitsArguments arguments(const dsa_indexer_logits_params& p) {
    const int64_t capacity = p.max_blocks * p.block_size;
    IndexerLogitsArguments a = {};
    a.query = (const uint8_t*)p.query;
    a.folded_weights = p.folded_weights;
    a.index_cache = p.index_cache;
    a.block_table = p.block_table;
    a.request_ids = p.request_ids;
    a.lengths = p.lengths;
    a.logits = p.logits;
    a.block_stride_bytes = p.block_stride_bytes;
    a.logits_stride = p.logits_stride;
    a.scale_offset = dsa_index_scale_offset(p.cache_format, p.block_size, p.index_head_dim);
    a.num_tokens = (int32_t)p.num_tokens;
    a.num_requests = (int32_t)p.num_requests;
    a.max_blocks = (int32_t)p.max_blocks;
    a.num_blocks = (int32_t)p.num_blocks;
    a.block_size = p.block_size;
    a.index_n_heads = p.index_n_heads;
    a.index_head_dim = p.index_head_dim;
    a.max_length = (int32_t)(p.logits_width < capacity ? p.logits_width : capacity);
    return a;
}

}  // namespace

size_t dsa_indexer_logits_cuda_workspace_bytes(const dsa_indexer_logits_params*) { return 0; }

dsa_status dsa_indexer_logits_cuda(const dsa_indexer_logits_params* params, void* stream) {
    if (!params) return DSA_NULL_POINTER;
    const dsa_indexer_logits_params& p = *params;
    if (const dsa_status status = check(p)) return status;
    const IndexerLogitsArguments a = arguments(p);
    if (a.num_tokens == 0 || a.max_length == 0) return DSA_OK;
    if (!is_aligned(p)) return DSA_UNSUPPORTED;
    dsa::gpu::Device device;
    if (const dsa_status status = dsa::gpu::device(&device)) return status;
    cudaStream_t on = (cudaStream_t)stream;
    if (device.has_hopper_instructions && !dsa::gpu::indexer_logits_sm90_refusal(p)) {
        /* Says so before it launches anything if the driver makes no tensor map of these arrays. */
        const dsa_status status = dsa::gpu::indexer_logits_sm90(p, a, device, on);
        if (status != DSA_UNSUPPORTED) return status;
    }
    switch (p.cache_format) {
        case DSA_FP8: return dsa::gpu::indexer_logits_generic<DSA_FP8>(a, on);
        case DSA_BFLOAT16: return dsa::gpu::indexer_logits_generic<DSA_BFLOAT16>(a, on);
        default: return dsa::gpu::indexer_logits_generic<DSA_FLOAT32>(a, on);
    }
}
