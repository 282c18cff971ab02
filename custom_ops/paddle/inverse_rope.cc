#include "dsa/inverse_rope.h"

#include "binding.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_inverse_rope_params> kOp = {
    "inverse_rope", dsa_inverse_rope_cpu, DSA_ON_CUDA(dsa_inverse_rope_cuda), nullptr, nullptr,
};

static void inverse_rope(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t num_threads, int64_t isa) {
    Shapes shapes;
    shapes.expect("x", x, {DataType::FLOAT32, DataType::BFLOAT16}, {"num_tokens", "num_heads", "head_dim"});
    shapes.expect("cos", cos, {DataType::FLOAT32}, {"num_tokens", "half_rope_dim"});
    shapes.expect("sin", sin, {DataType::FLOAT32}, {"num_tokens", "half_rope_dim"});

    dsa_inverse_rope_params params = {};
    params.num_heads = shapes.positive("num_heads");
    params.head_dim = shapes.positive("head_dim");
    params.qk_rope_head_dim = 2 * shapes.between("half_rope_dim", 1, params.head_dim / 2);
    params.x = address<void>(x);
    params.cos = address<float>(cos);
    params.sin = address<float>(sin);
    params.num_tokens = shapes["num_tokens"];
    params.x_format = format_of(x);

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    check_status(kOp.name, call(kOp, shapes.device, params, options));
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_inverse_rope)
    .Inputs({"x", "cos", "sin"})
    .Outputs({"x_out"})
    .Attrs({"num_threads: int64_t", "isa: int64_t"})
    .SetInplaceMap({{"x", "x_out"}})
    .SetKernelFn(PD_KERNEL(dsa::binding::inverse_rope));
