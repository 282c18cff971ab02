#include "dsa/sparse_mla.h"

#include <math.h>

#include "binding.h"
#include "offending_rows.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_sparse_mla_params> kOp = {
    "sparse_mla", dsa_sparse_mla_cpu, DSA_ON_CUDA(dsa_sparse_mla_cuda), dsa_sparse_mla_workspace_bytes,
    DSA_ON_CUDA(dsa_sparse_mla_cuda_workspace_bytes),
};

static std::vector<Tensor> sparse_mla(const Tensor& query, const Tensor& latent_cache, const Tensor& slot_ids,
                                      const Tensor& counts, int64_t kv_lora_rank, float softmax_scale,
                                      bool batch_invariant, int64_t num_threads, int64_t isa) {
    Shapes shapes;
    shapes.expect("query", query, {DataType::FLOAT32, DataType::BFLOAT16}, {"num_tokens", "num_heads", "head_dim"});
    const int32_t head_dim = shapes["head_dim"];
    if (kv_lora_rank < 1 || kv_lora_rank >= head_dim) {
        refuse("kv_lora_rank: expected at least 1 and less than the " + std::to_string(head_dim) +
               " numbers of a query head, got " + std::to_string(kv_lora_rank));
    }
    const int32_t qk_rope_head_dim = head_dim - (int32_t)kv_lora_rank;
    expect_latent_cache(&shapes, "latent_cache", latent_cache, (int32_t)kv_lora_rank, qk_rope_head_dim);
    shapes.expect("slot_ids", slot_ids, {DataType::INT32}, {"num_tokens", "topk"});
    shapes.expect("counts", counts, {DataType::INT32}, {"num_tokens"});

    const int64_t num_tokens = shapes["num_tokens"];
    const int64_t num_heads = shapes.positive("num_heads");
    expect_slots_fit("latent_cache", shapes["num_blocks"], shapes["block_size"]);
    if (!isfinite(softmax_scale))
        refuse("softmax_scale: expected a finite float32, got " + std::to_string(softmax_scale));
    Tensor out = paddle::empty({num_tokens, num_heads, kv_lora_rank}, query.dtype(), shapes.device.place());
    Tensor lse = paddle::empty({num_tokens, num_heads}, DataType::FLOAT32, shapes.device.place());

    dsa_sparse_mla_params params = {};
    params.query = address<void>(query);
    params.latent_cache = address<uint8_t>(latent_cache);
    params.slot_ids = address<int32_t>(slot_ids);
    params.counts = address<int32_t>(counts);
    params.out = address<void>(out);
    params.lse = address<float>(lse);
    params.block_stride_bytes = block_bytes(latent_cache);
    params.num_blocks = shapes["num_blocks"];
    params.num_tokens = num_tokens;
    params.block_size = shapes["block_size"];
    params.num_heads = (int32_t)num_heads;
    params.kv_lora_rank = (int32_t)kv_lora_rank;
    params.qk_rope_head_dim = qk_rope_head_dim;
    params.topk = shapes.positive("topk");
    params.softmax_scale = softmax_scale;
    params.batch_invariant = batch_invariant;
    params.query_format = format_of(query);
    params.cache_format = format_of(latent_cache);

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    const dsa_status status = call_with_workspace(kOp, shapes.device, params, options);
    if (may_blame_values(shapes.device, status)) refuse_offending_count(counts, params.topk);
    check_status(kOp.name, status);
    return {out, lse};
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_sparse_mla)
    .Inputs({"query", "latent_cache", "slot_ids", "counts"})
    .Outputs({"out", "lse"})
    .Attrs({"kv_lora_rank: int64_t", "softmax_scale: float", "batch_invariant: bool", "num_threads: int64_t",
            "isa: int64_t"})
    .SetKernelFn(PD_KERNEL(dsa::binding::sparse_mla));
