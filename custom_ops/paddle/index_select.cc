#include "dsa/index_select.h"

#include "index_cache.h"
#include "offending_rows.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_index_select_params> kOp = {
    "index_select", dsa_index_select_cpu, DSA_ON_CUDA(dsa_index_select_cuda), dsa_index_select_workspace_bytes,
    DSA_ON_CUDA(dsa_index_select_cuda_workspace_bytes),
};

static std::vector<Tensor> index_select(const Tensor& query, const Tensor& folded_weights, const Tensor& index_cache,
                                        const Tensor& block_table, const Tensor& request_ids, const Tensor& lengths,
                                        int64_t max_length, int64_t topk, int64_t max_logits_bytes,
                                        int64_t block_size, int64_t num_threads, int64_t isa) {
    Shapes shapes;
    expect_index_query(&shapes, query, folded_weights, index_cache, block_size);
    expect_contexts(&shapes, block_table, request_ids, lengths);
    expect_slots_fit("index_cache", shapes["num_blocks"], shapes["block_size"]);
    expect_between("max_length", max_length, 0, kMaxInt32);
    expect_between("topk", topk, 1, kMaxInt32);
    expect_between("max_logits_bytes", max_logits_bytes, 0, std::numeric_limits<int64_t>::max());

    const int64_t num_tokens = shapes["num_tokens"];
    Selection selection(num_tokens, topk, shapes.device);

    dsa_index_select_params params = {};
    params.query = address<void>(query);
    params.folded_weights = address<float>(folded_weights);
    params.index_cache = address<uint8_t>(index_cache);
    params.block_table = address<int32_t>(block_table);
    params.request_ids = address<int32_t>(request_ids);
    params.lengths = address<int32_t>(lengths);
    params.positions = address<int32_t>(selection.positions);
    params.slot_ids = address<int32_t>(selection.slot_ids);
    params.counts = address<int32_t>(selection.counts);
    params.max_logits_bytes = max_logits_bytes;
    params.max_length = max_length;
    params.block_stride_bytes = block_bytes(index_cache);
    params.num_blocks = shapes["num_blocks"];
    params.num_tokens = num_tokens;
    params.num_requests = shapes["num_requests"];
    params.max_blocks = shapes["max_blocks"];
    params.block_size = shapes["block_size"];
    params.index_n_heads = shapes["index_n_heads"];
    params.index_head_dim = shapes["index_head_dim"];
    params.topk = (int32_t)topk;
    params.cache_format = format_of(index_cache);

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    const dsa_status status = call_with_workspace(kOp, shapes.device, params, options);
    if (may_blame_values(shapes.device, status))
        refuse_offending_context(shapes, request_ids, lengths, "max_length", max_length, params.block_size);
    check_status(kOp.name, status);
    return selection.outputs();
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_index_select)
    .Inputs({"query", "folded_weights", "index_cache", "block_table", "request_ids", "lengths"})
    .Outputs({"positions", "slot_ids", "counts"})
    .Attrs({"max_length: int64_t", "topk: int64_t", "max_logits_bytes: int64_t", "block_size: int64_t",
            "num_threads: int64_t", "isa: int64_t"})
    .SetKernelFn(PD_KERNEL(dsa::binding::index_select));
