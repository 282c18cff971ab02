#include "dsa/mla_cache_write.h"

#include "writes.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_mla_cache_write_params> kOp = {
    "mla_cache_write", dsa_mla_cache_write_cpu, DSA_ON_CUDA(dsa_mla_cache_write_cuda), nullptr, nullptr,
};

static void mla_cache_write(const Tensor& latent, const Tensor& rope, const Tensor& cache, const Tensor& slot_mapping,
                            int64_t scale_format, int64_t num_threads, int64_t isa) {
    Shapes shapes;
    const dsa_mla_cache_write_params params =
        mla_cache_write_params(&shapes, latent, rope, "cache", cache, slot_mapping, scale_format);
    const dsa_cpu_options options = cpu_options(num_threads, isa);
    check_status(kOp.name, call(kOp, shapes.device, params, options));
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_mla_cache_write)
    .Inputs({"latent", "rope", "cache", "slot_mapping"})
    .Outputs({"cache_out"})
    .Attrs({"scale_format: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetInplaceMap({{"cache", "cache_out"}})
    .SetKernelFn(PD_KERNEL(dsa::binding::mla_cache_write));
