#include "dsa/layer_write.h"

#include "dispatch.h"
#include "write_checks.h"

namespace {

dsa_status check(const dsa_layer_write_params& p) {
    dsa::LatentLayout layout;
    dsa_status status = p.latent.num_tokens == 0 ? DSA_OK : dsa::check_mla_cache_write(p.latent, &layout);
    if (status == DSA_OK && p.index_key.num_tokens != 0) status = dsa::check_index_key_write(p.index_key);
    if (status == DSA_OK && p.index_query.num_tokens != 0) status = dsa::check_index_query_quant(p.index_query);
    if (status != DSA_OK) return status;
    const int64_t tokens[] = {p.latent.num_tokens, p.index_key.num_tokens, p.index_query.num_tokens};
    for (int64_t a : tokens)
        for (int64_t b : tokens)
            if (a != 0 && b != 0 && a != b) return DSA_BAD_SHAPE;
    return DSA_OK;
}

}  // namespace

size_t dsa_layer_write_params_size(void) { return sizeof(dsa_layer_write_params); }

dsa_status dsa_layer_write_cpu(const dsa_layer_write_params* params, const dsa_cpu_options* options) {
    if (params == nullptr || options == nullptr) return DSA_NULL_POINTER;
    dsa_status status = check(*params);
    if (status != DSA_OK) return status;
    if (dsa::resolve_isa(options) == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    if (params->latent.num_tokens > 0) status = dsa_mla_cache_write_cpu(&params->latent, options);
    if (status == DSA_OK && params->index_key.num_tokens > 0)
        status = dsa_index_key_write_cpu(&params->index_key, options);
    if (status == DSA_OK && params->index_query.num_tokens > 0)
        status = dsa_index_query_quant_cpu(&params->index_query, options);
    return status;
}
