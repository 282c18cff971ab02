#include "dsa/sparse_mla.h"

#include "latent_cache.h"
#include "sparse_mla_kernels.h"

namespace dsa {
namespace gpu {
namespace {

/* The CPU version's bounds, so that both refuse the same sizes: a pad of numbers, and a chunk of ids behind topk. */
constexpr int32_t kPadNumbers = 16;
constexpr int32_t kIdsPad = 128;

int64_t padded(int64_t numbers) { return (numbers + kPadNumbers - 1) / kPadNumbers * kPadNumbers; }

dsa_status check_shape(const dsa_sparse_mla_params& p) {
    if (p.query_format != DSA_FLOAT32 && p.query_format != DSA_BFLOAT16) return DSA_BAD_FORMAT;
    LatentLayout layout;
    const dsa_status status = make_latent_layout(p.cache_format, p.kv_lora_rank, p.qk_rope_head_dim, p.num_blocks,
                                                 p.block_size, p.block_stride_bytes, &layout);
    if (status != DSA_OK) return status;
    if (layout.num_slots > INT32_MAX) return DSA_BAD_SHAPE;
    if (p.topk <= 0 || p.topk > INT32_MAX - kIdsPad) return DSA_BAD_SHAPE;
    if (!is_count(p.num_tokens) || p.num_heads <= 0) return DSA_BAD_SHAPE;
    const int64_t row_width = padded(p.kv_lora_rank) + padded(p.qk_rope_head_dim);
    if (row_width > (INT32_MAX - 2 * kPadNumbers) / p.num_heads) return DSA_BAD_SHAPE;
    if (!product_fits(row_width, p.num_heads, p.num_tokens, 4)) return DSA_BAD_SHAPE;
    return product_fits(p.topk, p.num_heads, p.num_tokens, 4) ? DSA_OK : DSA_BAD_SHAPE;
}

dsa_status check_arrays(const dsa_sparse_mla_params& p) {
    if (p.num_tokens == 0) return DSA_OK;
    if (p.query == nullptr || p.slot_ids == nullptr || p.out == nullptr) return DSA_NULL_POINTER;
    return p.latent_cache == nullptr && p.num_blocks > 0 ? DSA_NULL_POINTER : DSA_OK;
}

enum class Kernel { kGeneric, kRows, kHeads };

/* The Hopper kernels copy rows in pieces of 16 bytes, and queries and results likewise. */
bool fits_hopper_kernels(const dsa_sparse_mla_params& p, const Device& device) {
    if (!device.has_hopper_instructions) return false;
    if (p.query_format != DSA_BFLOAT16 || p.cache_format != DSA_FP8) return false;
    if (p.kv_lora_rank != 512 || p.qk_rope_head_dim != 64) return false;
    const uintptr_t all = (uintptr_t)p.latent_cache | (uintptr_t)p.block_stride_bytes | (uintptr_t)p.query |
                          (uintptr_t)p.out;
    return all % 16 == 0;
}

/* One block of kHeads works on 64 heads of a row for as long as a cluster of kRows works on all of them: it wins as
 * soon as its blocks fill about a third of the device. */
constexpr int32_t kMinHeadsForHeads = 33;
constexpr int64_t kMinBlocksForHeads = 48;
constexpr int32_t kHeadsPerBlock = 64;

/* Where the result must not depend on num_tokens: the spread of a row that waits for nobody, which serves decode. */
constexpr int64_t kInvariantRowsHint = 1;

Kernel choose(const dsa_sparse_mla_params& p, const Device& device) {
    if (!fits_hopper_kernels(p, device)) return Kernel::kGeneric;
    if (p.batch_invariant != 0 || p.num_heads < kMinHeadsForHeads) return Kernel::kRows;
    const int64_t blocks = p.num_tokens * ((p.num_heads + kHeadsPerBlock - 1) / kHeadsPerBlock);
    return blocks >= kMinBlocksForHeads ? Kernel::kHeads : Kernel::kRows;
}

/* Where the result must not depend on num_tokens, nothing is split over the workspace. */
size_t workspace_bytes(const dsa_sparse_mla_params& p, Kernel kernel, const Device& device) {
    if (kernel == Kernel::kHeads) return sparse_mla_sm90_heads_workspace_bytes(p);
    if (kernel != Kernel::kRows || p.batch_invariant != 0) return 0;
    return sparse_mla_sm90_rows_workspace_bytes(p, device);
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

size_t dsa_sparse_mla_cuda_workspace_bytes(const dsa_sparse_mla_params* params) {
    using namespace dsa::gpu;
    Device found = {};
    if (params == nullptr || check_shape(*params) != DSA_OK || params->num_tokens == 0) return 0;
    return device(&found) == DSA_OK ? workspace_bytes(*params, choose(*params, found), found) : 0;
}

dsa_status dsa_sparse_mla_cuda(const dsa_sparse_mla_params* params, void* stream) {
    using namespace dsa::gpu;
    if (params == nullptr) return DSA_NULL_POINTER;
    const dsa_sparse_mla_params& p = *params;
    dsa_status status = check_shape(p);
    if (status == DSA_OK) status = check_arrays(p);
    if (status != DSA_OK || p.num_tokens == 0) return status;
    Device found = {};
    status = device(&found);
    if (status != DSA_OK) return status;
    const Kernel kernel = choose(p, found);
    const size_t bytes = workspace_bytes(p, kernel, found);
    if (p.workspace_bytes < bytes) return DSA_WORKSPACE_TOO_SMALL;
    if (bytes > 0 && p.workspace == nullptr) return DSA_NULL_POINTER;
    /* A Hopper kernel that has no room for a size (a cache of 64 GiB, 2^31 blocks) says so before it launches. */
    status = DSA_UNSUPPORTED;
    if (kernel == Kernel::kHeads) status = sparse_mla_sm90_heads(p, found, bytes > 0, (cudaStream_t)stream);
    if (kernel != Kernel::kGeneric && status == DSA_UNSUPPORTED) {
        const int64_t num_rows = p.batch_invariant != 0 ? kInvariantRowsHint : p.num_tokens;
        status = sparse_mla_sm90_rows(p, found, num_rows, kernel == Kernel::kRows && bytes > 0,
                                      (cudaStream_t)stream);
    }
    return status == DSA_UNSUPPORTED ? sparse_mla_generic(p, found, (cudaStream_t)stream) : status;
}
