#include "dsa/index_query_quant.h"

#include "binding.h"

namespace dsa {
namespace binding {

static std::vector<Tensor> index_query_quant(const Tensor& query, const Tensor& weights, int64_t cache_format,
                                             int64_t num_threads, int64_t isa) {
    Shapes shapes;
    shapes.expect("query", query, {DataType::FLOAT32, DataType::BFLOAT16},
                  {"num_tokens", "index_n_heads", "index_head_dim"});
    shapes.expect("weights", weights, {DataType::FLOAT32}, {"num_tokens", "index_n_heads"});

    expect_index_row_fits(shapes);

    const dsa_format output_format = code("cache_format", cache_format);
    Tensor quantized = paddle::empty(query.shape(), dtype_of(output_format), paddle::CPUPlace());
    Tensor folded_weights = paddle::empty(weights.shape(), DataType::FLOAT32, paddle::CPUPlace());

    dsa_index_query_quant_params params = {};
    params.query = address<void>(query);
    params.weights = address<float>(weights);
    params.quantized = address<void>(quantized);
    params.folded_weights = address<float>(folded_weights);
    params.query_stride = (int64_t)shapes["index_n_heads"] * shapes["index_head_dim"];
    params.weights_stride = shapes["index_n_heads"];
    params.num_tokens = shapes["num_tokens"];
    params.index_n_heads = shapes["index_n_heads"];
    params.index_head_dim = shapes["index_head_dim"];
    params.input_format = format_of(query);
    params.output_format = output_format;

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    check_status("index_query_quant", dsa_index_query_quant_cpu(&params, &options));
    return {quantized, folded_weights};
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_index_query_quant)
    .Inputs({"query", "weights"})
    .Outputs({"quantized", "folded_weights"})
    .Attrs({"cache_format: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetKernelFn(PD_KERNEL(dsa::binding::index_query_quant));
