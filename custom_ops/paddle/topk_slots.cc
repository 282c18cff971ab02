#include "dsa/topk_slots.h"

#include "binding.h"
#include "offending_rows.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_topk_slots_params> kOp = {
    "topk_slots", dsa_topk_slots_cpu, DSA_ON_CUDA(dsa_topk_slots_cuda), dsa_topk_slots_workspace_bytes,
    DSA_ON_CUDA(dsa_topk_slots_cuda_workspace_bytes),
};

static std::vector<Tensor> topk_slots(const Tensor& logits, const Tensor& lengths, const Tensor& block_table,
                                      const Tensor& request_ids, int64_t topk, int64_t num_blocks, int64_t block_size,
                                      int64_t num_threads, int64_t isa) {
    Shapes shapes;
    shapes.expect("logits", logits, {DataType::FLOAT32}, {"num_tokens", "logits_width"});
    expect_contexts(&shapes, block_table, request_ids, lengths);
    expect_between("topk", topk, 1, kMaxInt32);
    expect_between("block_size", block_size, 1, kMaxInt32);
    expect_slots_fit("num_blocks", num_blocks, (int32_t)block_size);

    const int64_t num_tokens = shapes["num_tokens"];
    Selection selection(num_tokens, topk, shapes.device);

    dsa_topk_slots_params params = {};
    params.logits = address<float>(logits);
    params.lengths = address<int32_t>(lengths);
    params.block_table = address<int32_t>(block_table);
    params.request_ids = address<int32_t>(request_ids);
    params.positions = address<int32_t>(selection.positions);
    params.slot_ids = address<int32_t>(selection.slot_ids);
    params.counts = address<int32_t>(selection.counts);
    params.logits_stride = shapes["logits_width"];
    params.logits_width = shapes["logits_width"];
    params.num_blocks = num_blocks;
    params.num_tokens = num_tokens;
    params.num_requests = shapes["num_requests"];
    params.max_blocks = shapes["max_blocks"];
    params.block_size = (int32_t)block_size;
    params.topk = (int32_t)topk;

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    const dsa_status status = call_with_workspace(kOp, shapes.device, params, options);
    if (may_blame_values(shapes.device, status))
        refuse_offending_context(shapes, request_ids, lengths, "the width of logits", params.logits_width, block_size);
    check_status(kOp.name, status);
    return selection.outputs();
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_topk_slots)
    .Inputs({"logits", "lengths", "block_table", "request_ids"})
    .Outputs({"positions", "slot_ids", "counts"})
    .Attrs({"topk: int64_t", "num_blocks: int64_t", "block_size: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetKernelFn(PD_KERNEL(dsa::binding::topk_slots));
