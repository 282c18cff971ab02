#include "dsa/index_key_write.h"

#include "writes.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_index_key_write_params> kOp = {
    "index_key_write", dsa_index_key_write_cpu, DSA_ON_CUDA(dsa_index_key_write_cuda), nullptr, nullptr,
};

static void index_key_write(const Tensor& key, const Tensor& cache, const Tensor& slot_mapping, int64_t scale_format,
                            int64_t num_threads, int64_t isa) {
    Shapes shapes;
    const dsa_index_key_write_params params =
        index_key_write_params(&shapes, key, "cache", cache, slot_mapping, scale_format);
    const dsa_cpu_options options = cpu_options(num_threads, isa);
    check_status(kOp.name, call(kOp, shapes.device, params, options));
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_index_key_write)
    .Inputs({"key", "cache", "slot_mapping"})
    .Outputs({"cache_out"})
    .Attrs({"scale_format: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetInplaceMap({{"cache", "cache_out"}})
    .SetKernelFn(PD_KERNEL(dsa::binding::index_key_write));
