#include "dsa/index_query_quant.h"

#include "writes.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_index_query_quant_params> kOp = {
    "index_query_quant", dsa_index_query_quant_cpu, DSA_ON_CUDA(dsa_index_query_quant_cuda), nullptr, nullptr,
};

static std::vector<Tensor> index_query_quant(const Tensor& query, const Tensor& weights, int64_t cache_format,
                                             int64_t num_threads, int64_t isa) {
    Shapes shapes;
    const QuantizedQuery outputs(&shapes, query, weights, code("cache_format", cache_format));
    const dsa_cpu_options options = cpu_options(num_threads, isa);
    check_status(kOp.name, call(kOp, shapes.device, outputs.params, options));
    return {outputs.quantized, outputs.folded_weights};
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_index_query_quant)
    .Inputs({"query", "weights"})
    .Outputs({"quantized", "folded_weights"})
    .Attrs({"cache_format: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetKernelFn(PD_KERNEL(dsa::binding::index_query_quant));
