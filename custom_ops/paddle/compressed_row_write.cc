#include "dsa/compressed_row_write.h"

#include "compressed.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_compressed_row_write_params> kOp = {
    "compressed_row_write", dsa_compressed_row_write_cpu, DSA_ON_CUDA(dsa_compressed_row_write_cuda), nullptr, nullptr,
};

static void compressed_row_write(const Tensor& rows, const Tensor& cache, const Tensor& slot_mapping, int64_t rope_dim,
                                 int64_t block_rows, int64_t num_threads, int64_t isa) {
    Shapes shapes;
    shapes.expect("rows", rows, {DataType::FLOAT32, DataType::BFLOAT16}, {"num_tokens", "head_dim"});

    dsa_compressed_row_write_params params = {};
    params.head_dim = shapes.positive("head_dim");
    params.qk_rope_head_dim = checked_rope_dim(rope_dim, params.head_dim);
    params.block_rows = checked_block_rows("block_rows", block_rows);
    expect_row_cache(&shapes, "cache", cache, "num_blocks", params.block_rows, params.qk_rope_head_dim);
    shapes.expect("slot_mapping", slot_mapping, {DataType::INT64}, {"num_tokens"});
    params.rows = address<void>(rows);
    params.cache = address<uint8_t>(cache);
    params.slot_mapping = address<int64_t>(slot_mapping);
    params.row_stride = params.head_dim;
    params.block_stride_bytes = block_bytes(cache);
    params.num_blocks = shapes["num_blocks"];
    params.num_tokens = shapes["num_tokens"];
    params.input_format = format_of(rows);
    params.cache_format = format_of(cache);

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    check_status(kOp.name, call(kOp, shapes.device, params, options));
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_compressed_row_write)
    .Inputs({"rows", "cache", "slot_mapping"})
    .Outputs({"cache_out"})
    .Attrs({"rope_dim: int64_t", "block_rows: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetInplaceMap({{"cache", "cache_out"}})
    .SetKernelFn(PD_KERNEL(dsa::binding::compressed_row_write));
