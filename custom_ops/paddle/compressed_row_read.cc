#include "dsa/compressed_row_read.h"

#include "compressed.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_compressed_row_read_params> kOp = {
    "compressed_row_read", dsa_compressed_row_read_cpu, DSA_ON_CUDA(dsa_compressed_row_read_cuda), nullptr, nullptr,
};

static std::vector<Tensor> compressed_row_read(const Tensor& cache, const Tensor& slot_ids, int64_t head_dim,
                                               int64_t rope_dim, int64_t block_rows, int64_t num_threads,
                                               int64_t isa) {
    Shapes shapes;
    expect_between("head_dim", head_dim, 1, kMaxCompressedDim);
    shapes.give("head_dim", "head_dim", cache, head_dim);

    dsa_compressed_row_read_params params = {};
    params.head_dim = (int32_t)head_dim;
    params.qk_rope_head_dim = checked_rope_dim(rope_dim, params.head_dim);
    params.block_rows = checked_block_rows("block_rows", block_rows);
    expect_row_cache(&shapes, "cache", cache, "num_blocks", params.block_rows, params.qk_rope_head_dim);
    shapes.expect("slot_ids", slot_ids, {DataType::INT64}, {"num_rows"});
    Tensor out = output("head_dim", shapes["num_rows"], head_dim, DataType::FLOAT32, shapes.device);
    params.cache = address<uint8_t>(cache);
    params.slot_ids = address<int64_t>(slot_ids);
    params.out = address<float>(out);
    params.block_stride_bytes = block_bytes(cache);
    params.num_blocks = shapes["num_blocks"];
    params.num_rows = shapes["num_rows"];
    params.cache_format = format_of(cache);

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    check_status(kOp.name, call(kOp, shapes.device, params, options));
    return {out};
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_compressed_row_read)
    .Inputs({"cache", "slot_ids"})
    .Outputs({"out"})
    .Attrs({"head_dim: int64_t", "rope_dim: int64_t", "block_rows: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetKernelFn(PD_KERNEL(dsa::binding::compressed_row_read));
