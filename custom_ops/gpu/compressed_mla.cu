#include "dsa/compressed_mla.h"

#include "compressed_checks.h"
#include "compressed_mla_kernels.h"

namespace dsa {
namespace gpu {
namespace {

/* Copies of 16 bytes everywhere; a row of a bfloat16 cache is 512 numbers wherever its rotated ones begin. */
bool fits_tensor_kernels(const dsa_compressed_mla_params& p) {
    if (p.query_format != DSA_BFLOAT16 || p.cache_format == DSA_FLOAT32 || p.head_dim != kMlaHeadDim) return false;
    if (p.cache_format == DSA_FP8 && p.qk_rope_head_dim != kMlaRopeDim) return false;
    uintptr_t all = (uintptr_t)p.query | (uintptr_t)p.out;
    if (p.window_num_blocks > 0) all |= (uintptr_t)p.window_cache | (uintptr_t)p.window_block_stride_bytes;
    if (p.entry_num_blocks > 0) all |= (uintptr_t)p.entry_cache | (uintptr_t)p.entry_block_stride_bytes;
    return all % 16 == 0;
}

/* Blocks that share a row leave parts of 128 KB each for a second launch. They pay where they bring idle
 * multiprocessors to work, and never for less than a tile. */
constexpr int32_t kMaxSplits = 32;
constexpr int32_t kInvariantSplits = 4; /* where the result must not depend on num_tokens */
constexpr int64_t kMaxPartsBytes = (int64_t)1 << 28; /* of one launch; more tokens are more launches */

int32_t num_splits_of(const dsa_compressed_mla_params& p, const Device& device) {
    const int64_t items = p.num_tokens * ((p.num_heads + kMlaHeads - 1) / kMlaHeads);
    const int32_t tiles = (p.window_width + kMlaTileRows - 1) / kMlaTileRows +
                          (p.entry_width + kMlaTileRows - 1) / kMlaTileRows;
    int64_t splits = p.batch_invariant != 0 ? kInvariantSplits : device.num_multiprocessors / items;
    if (splits > tiles) splits = tiles;
    if (splits > kMaxSplits) splits = kMaxSplits;
    return splits < 1 ? 1 : (int32_t)splits;
}

int64_t tokens_per_launch(const dsa_compressed_mla_params& p, int32_t num_splits) {
    if (num_splits == 1) return p.num_tokens;
    const int64_t fitting = kMaxPartsBytes / compressed_mla_parts_bytes(1, p.num_heads, num_splits);
    return fitting < 1 ? 1 : fitting < p.num_tokens ? fitting : p.num_tokens;
}

int64_t workspace_bytes(const dsa_compressed_mla_params& p, const Device& device) {
    if (!fits_tensor_kernels(p) || p.num_tokens == 0) return 0;
    const int32_t splits = num_splits_of(p, device);
    return splits == 1 ? 0 : compressed_mla_parts_bytes(tokens_per_launch(p, splits), p.num_heads, splits);
}

/* Tokens [first, first + num_tokens). */
dsa_compressed_mla_params tokens_of(const dsa_compressed_mla_params& p, int64_t first, int64_t num_tokens) {
    dsa_compressed_mla_params q = p;
    const int64_t row_bytes = (int64_t)p.num_heads * p.head_dim * 2; /* bfloat16 */
    q.num_tokens = num_tokens;
    q.query = (const uint8_t*)p.query + first * row_bytes;
    q.out = (uint8_t*)p.out + first * row_bytes;
    if (p.lse != nullptr) q.lse = p.lse + first * p.num_heads;
    q.window_slots = p.window_slots + first * p.window_width;
    q.entry_slots = p.entry_slots + first * p.entry_width;
    if (p.window_counts != nullptr) q.window_counts = p.window_counts + first;
    if (p.entry_counts != nullptr) q.entry_counts = p.entry_counts + first;
    return q;
}

/* DSA_UNSUPPORTED where no kernel with tensor cores fits the device; nothing has been launched then. */
dsa_status attend_with_tensor_cores(const dsa_compressed_mla_params& p, const CompressedMlaLayouts& layouts,
                                    const Device& device, cudaStream_t stream) {
    const int32_t splits = num_splits_of(p, device);
    const int64_t at_once = tokens_per_launch(p, splits);
    dsa_status status = DSA_OK;
    for (int64_t first = 0; first < p.num_tokens && status == DSA_OK; first += at_once) {
        const int64_t rest = p.num_tokens - first;
        const dsa_compressed_mla_params tokens = tokens_of(p, first, rest < at_once ? rest : at_once);
        status = compressed_mla_sm90(tokens, layouts, splits, device, stream);
        if (status == DSA_UNSUPPORTED) status = compressed_mla_mma(tokens, layouts, splits, device, stream);
    }
    return status;
}

}  // namespace

int64_t compressed_mla_parts_bytes(int64_t num_tokens, int32_t num_heads, int32_t num_splits) {
    const int64_t parts = num_tokens * ((num_heads + kMlaHeads - 1) / kMlaHeads) * num_splits;
    return parts * kMlaHeads * (kMlaHeadDim + 2) * (int64_t)sizeof(float);
}

}  // namespace gpu
}  // namespace dsa

size_t dsa_compressed_mla_cuda_workspace_bytes(const dsa_compressed_mla_params* params) {
    using namespace dsa;
    gpu::CompressedMlaLayouts layouts;
    gpu::Device device = {};
    if (params == nullptr) return 0;
    if (check_compressed_mla_shape(*params, &layouts.window, &layouts.entries) != DSA_OK) return 0;
    return gpu::device(&device) == DSA_OK ? (size_t)gpu::workspace_bytes(*params, device) : 0;
}

dsa_status dsa_compressed_mla_cuda(const dsa_compressed_mla_params* params, void* stream) {
    using namespace dsa;
    if (params == nullptr) return DSA_NULL_POINTER;
    const dsa_compressed_mla_params& p = *params;
    gpu::CompressedMlaLayouts layouts;
    dsa_status status = check_compressed_mla_shape(p, &layouts.window, &layouts.entries);
    if (status == DSA_OK) status = check_compressed_mla_arrays(p);
    if (status != DSA_OK || p.num_tokens == 0) return status;
    gpu::Device device = {};
    status = gpu::device(&device);
    if (status != DSA_OK) return status;
    const int64_t needed = gpu::workspace_bytes(p, device);
    if (needed > 0 && p.workspace == nullptr) return DSA_NULL_POINTER;
    if (needed > 0 && p.workspace_bytes < (size_t)needed) return DSA_WORKSPACE_TOO_SMALL;
    if (gpu::fits_tensor_kernels(p)) {
        status = gpu::attend_with_tensor_cores(p, layouts, device, (cudaStream_t)stream);
        if (status != DSA_UNSUPPORTED) return status;
    }
    return gpu::compressed_mla_generic(p, layouts, (cudaStream_t)stream);
}
