#include "dsa/index_key_write.h"

#include "binding.h"

namespace dsa {
namespace binding {

static void index_key_write(const Tensor& key, const Tensor& cache, const Tensor& slot_mapping, int64_t scale_format,
                            int64_t num_threads, int64_t isa) {
    Shapes shapes;
    shapes.expect("key", key, {DataType::FLOAT32, DataType::BFLOAT16}, {"num_tokens", "index_head_dim"});
    expect_index_cache(&shapes, "cache", cache);
    shapes.expect("slot_mapping", slot_mapping, {DataType::INT64}, {"num_tokens"});

    dsa_index_key_write_params params = {};
    params.key = address<void>(key);
    params.cache = address<uint8_t>(cache);
    params.slot_mapping = address<int64_t>(slot_mapping);
    params.key_stride = shapes["index_head_dim"];
    params.block_stride_bytes = block_bytes(cache);
    params.num_blocks = shapes["num_blocks"];
    params.num_tokens = shapes["num_tokens"];
    params.block_size = shapes["block_size"];
    params.index_head_dim = shapes["index_head_dim"];
    params.input_format = format_of(key);
    params.cache_format = format_of(cache);
    params.scale_format = code("scale_format", scale_format);

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    check_status("index_key_write", dsa_index_key_write_cpu(&params, &options));
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_index_key_write)
    .Inputs({"key", "cache", "slot_mapping"})
    .Outputs({"cache_out"})
    .Attrs({"scale_format: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetInplaceMap({{"cache", "cache_out"}})
    .SetKernelFn(PD_KERNEL(dsa::binding::index_key_write));
