#include "dsa/layer_write.h"

#include "writes.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_layer_write_params> kOp = {
    "layer_write", dsa_layer_write_cpu, DSA_ON_CUDA(dsa_layer_write_cuda), nullptr, nullptr,
};

static std::vector<Tensor> layer_write(const Tensor& latent, const Tensor& rope, const Tensor& latent_cache,
                                       const Tensor& key, const Tensor& index_cache, const Tensor& query,
                                       const Tensor& weights, const Tensor& slot_mapping, int64_t scale_format,
                                       int64_t num_threads, int64_t isa) {
    Shapes shapes;
    dsa_layer_write_params params = {};
    params.latent =
        mla_cache_write_params(&shapes, latent, rope, "latent_cache", latent_cache, slot_mapping, scale_format);
    params.index_key = index_key_write_params(&shapes, key, "index_cache", index_cache, slot_mapping, scale_format);
    const QuantizedQuery outputs(&shapes, query, weights, format_of(index_cache));
    params.index_query = outputs.params;

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    check_status(kOp.name, call(kOp, shapes.device, params, options));
    return {outputs.quantized, outputs.folded_weights};  // Paddle adds the caches, and warns if it gets them twice
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_layer_write)
    .Inputs({"latent", "rope", "latent_cache", "key", "index_cache", "query", "weights", "slot_mapping"})
    .Outputs({"latent_cache_out", "index_cache_out", "quantized", "folded_weights"})
    .Attrs({"scale_format: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetInplaceMap({{"latent_cache", "latent_cache_out"}, {"index_cache", "index_cache_out"}})
    .SetKernelFn(PD_KERNEL(dsa::binding::layer_write));
