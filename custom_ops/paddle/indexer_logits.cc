#include "dsa/indexer_logits.h"

#include "index_cache.h"
#include "offending_rows.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_indexer_logits_params> kOp = {
    "indexer_logits", dsa_indexer_logits_cpu, DSA_ON_CUDA(dsa_indexer_logits_cuda), dsa_indexer_logits_workspace_bytes,
    DSA_ON_CUDA(dsa_indexer_logits_cuda_workspace_bytes),
};

static std::vector<Tensor> indexer_logits(const Tensor& query, const Tensor& folded_weights, const Tensor& index_cache,
                                          const Tensor& block_table, const Tensor& request_ids, const Tensor& lengths,
                                          int64_t logits_width, int64_t block_size, int64_t num_threads,
                                          int64_t isa) {
    Shapes shapes;
    expect_index_query(&shapes, query, folded_weights, index_cache, block_size);
    expect_contexts(&shapes, block_table, request_ids, lengths);
    expect_slots_fit("index_cache", shapes["num_blocks"], shapes["block_size"]);
    expect_between("logits_width", logits_width, 0, kMaxInt32);

    const int64_t num_tokens = shapes["num_tokens"];
    Tensor logits = output("logits_width", num_tokens, logits_width, DataType::FLOAT32, shapes.device);

    dsa_indexer_logits_params params = {};
    params.query = address<void>(query);
    params.folded_weights = address<float>(folded_weights);
    params.index_cache = address<uint8_t>(index_cache);
    params.block_table = address<int32_t>(block_table);
    params.request_ids = address<int32_t>(request_ids);
    params.lengths = address<int32_t>(lengths);
    params.logits = address<float>(logits);
    params.block_stride_bytes = block_bytes(index_cache);
    params.logits_stride = logits_width;
    params.logits_width = logits_width;
    params.num_blocks = shapes["num_blocks"];
    params.num_tokens = num_tokens;
    params.num_requests = shapes["num_requests"];
    params.max_blocks = shapes["max_blocks"];
    params.block_size = shapes["block_size"];
    params.index_n_heads = shapes["index_n_heads"];
    params.index_head_dim = shapes["index_head_dim"];
    params.cache_format = format_of(index_cache);

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    const dsa_status status = call_with_workspace(kOp, shapes.device, params, options);
    if (may_blame_values(shapes.device, status))
        refuse_offending_context(shapes, request_ids, lengths, "logits_width", logits_width, params.block_size);
    check_status(kOp.name, status);
    return {logits};
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_indexer_logits)
    .Inputs({"query", "folded_weights", "index_cache", "block_table", "request_ids", "lengths"})
    .Outputs({"logits"})
    .Attrs({"logits_width: int64_t", "block_size: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetKernelFn(PD_KERNEL(dsa::binding::indexer_logits));
