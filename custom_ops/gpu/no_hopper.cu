/* What a library without code for 90a has in place of the kernels that are for Hopper alone. Nobody asks for them there:
 * Device::has_hopper_instructions is false. */
#if defined(DSA_HAS_SM90) && !DSA_HAS_SM90

#include "compressed_mla_kernels.h"
#include "indexer_logits_kernels.h"
#include "sparse_mla_kernels.h"

namespace dsa {
namespace gpu {

dsa_status sparse_mla_sm90_rows(const dsa_sparse_mla_params&, const Device&, int64_t, bool, cudaStream_t) {
    return DSA_UNSUPPORTED;
}

size_t sparse_mla_sm90_rows_workspace_bytes(const dsa_sparse_mla_params&, const Device&) { return 0; }

dsa_status sparse_mla_sm90_heads(const dsa_sparse_mla_params&, const Device&, bool, cudaStream_t) {
    return DSA_UNSUPPORTED;
}

size_t sparse_mla_sm90_heads_workspace_bytes(const dsa_sparse_mla_params&) { return 0; }

dsa_status compressed_mla_sm90(const dsa_compressed_mla_params&, const CompressedMlaLayouts&, int32_t, const Device&,
                               cudaStream_t) {
    return DSA_UNSUPPORTED;
}

const char* indexer_logits_sm90_refusal(const dsa_indexer_logits_params&) { return "no code for this device"; }

dsa_status indexer_logits_sm90(const dsa_indexer_logits_params&, const IndexerLogitsArguments&, const Device&,
                               cudaStream_t) {
    return DSA_UNSUPPORTED;
}

}  // namespace gpu
}  // namespace dsa

#endif
