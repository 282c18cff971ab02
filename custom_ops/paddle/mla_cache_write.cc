#include "dsa/mla_cache_write.h"

#include "binding.h"

namespace dsa {
namespace binding {

static void mla_cache_write(const Tensor& latent, const Tensor& rope, const Tensor& cache, const Tensor& slot_mapping,
                            int64_t scale_format, int64_t num_threads, int64_t isa) {
    Shapes shapes;
    shapes.expect("latent", latent, {DataType::FLOAT32, DataType::BFLOAT16}, {"num_tokens", "kv_lora_rank"});
    shapes.expect("rope", rope, {latent.dtype()}, {"num_tokens", "qk_rope_head_dim"});
    const int32_t kv_lora_rank = shapes.positive("kv_lora_rank");
    const int32_t qk_rope_head_dim = shapes.positive("qk_rope_head_dim");
    expect_latent_cache(&shapes, "cache", cache, kv_lora_rank, qk_rope_head_dim);
    shapes.expect("slot_mapping", slot_mapping, {DataType::INT64}, {"num_tokens"});

    dsa_mla_cache_write_params params = {};
    params.latent = address<void>(latent);
    params.rope = address<void>(rope);
    params.cache = address<uint8_t>(cache);
    params.slot_mapping = address<int64_t>(slot_mapping);
    params.latent_stride = kv_lora_rank;
    params.rope_stride = qk_rope_head_dim;
    params.block_stride_bytes = block_bytes(cache);
    params.num_blocks = shapes["num_blocks"];
    params.num_tokens = shapes["num_tokens"];
    params.block_size = shapes["block_size"];
    params.kv_lora_rank = kv_lora_rank;
    params.qk_rope_head_dim = qk_rope_head_dim;
    params.input_format = format_of(latent);
    params.cache_format = format_of(cache);
    params.scale_format = code("scale_format", scale_format);

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    check_status("mla_cache_write", dsa_mla_cache_write_cpu(&params, &options));
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_mla_cache_write)
    .Inputs({"latent", "rope", "cache", "slot_mapping"})
    .Outputs({"cache_out"})
    .Attrs({"scale_format: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetInplaceMap({{"cache", "cache_out"}})
    .SetKernelFn(PD_KERNEL(dsa::binding::mla_cache_write));
