#include "dsa/block_copy.h"

#include "binding.h"
#include "offending_rows.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_block_copy_params> kOp = {
    "block_copy", dsa_block_copy_cpu, DSA_ON_CUDA(dsa_block_copy_cuda), nullptr, nullptr,
};

/* A GPU reads and writes page-locked host memory, too. */
static void expect_reachable(const char* argument, const Tensor& arena, Device* device) {
    const bool is_pinned = arena.defined() && arena.place().GetType() == phi::AllocationType::GPUPINNED;
    if (!is_pinned || device->is_cpu()) device->expect(argument, arena);
}

/* Blocks are copied as bytes: any dtype and any shape behind the first axis. */
static std::vector<int64_t> expect_arena(const char* argument, const Tensor& arena, Device* device) {
    expect_reachable(argument, arena, device);
    std::vector<int64_t> block_shape = arena.shape();
    if (block_shape.empty()) refuse(std::string(argument) + ": expected [num_blocks, ...], got " + describe(arena));
    if (block_shape[0] > kMaxInt32) {
        refuse(std::string(argument) + ": expected at most " + std::to_string(kMaxInt32) + " blocks, got " +
               describe(arena));
    }
    block_shape.erase(block_shape.begin());
    return block_shape;
}

static void block_copy(const Tensor& src, const Tensor& dst, const Tensor& src_block_ids, const Tensor& dst_block_ids,
                       int64_t num_threads, int64_t isa) {
    Shapes shapes;
    shapes.expect("src_block_ids", src_block_ids, {DataType::INT64}, {"num_copies"});
    shapes.expect("dst_block_ids", dst_block_ids, {DataType::INT64}, {"num_copies"});
    const std::vector<int64_t> src_block_shape = expect_arena("src", src, &shapes.device);
    if (expect_arena("dst", dst, &shapes.device) != src_block_shape || dst.dtype() != src.dtype()) {
        refuse("dst: expected blocks like those of src, " + describe(src) + ", got " + describe(dst));
    }

    dsa_block_copy_params params = {};
    params.src = address<uint8_t>(src);
    params.dst = address<uint8_t>(dst);
    params.src_block_ids = address<int64_t>(src_block_ids);
    params.dst_block_ids = address<int64_t>(dst_block_ids);
    params.src_stride_bytes = block_bytes(src);
    params.dst_stride_bytes = block_bytes(dst);
    params.src_num_blocks = src.dims()[0];
    params.dst_num_blocks = dst.dims()[0];
    params.block_bytes = block_bytes(src);
    params.num_copies = shapes["num_copies"];

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    const dsa_status status = call(kOp, shapes.device, params, options);
    if (may_blame_values(shapes.device, status)) {
        refuse_offending_block("src_block_ids", src_block_ids, "src", params.src_num_blocks);
        refuse_offending_block("dst_block_ids", dst_block_ids, "dst", params.dst_num_blocks);
    }
    check_status(kOp.name, status);
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_block_copy)
    .Inputs({"src", "dst", "src_block_ids", "dst_block_ids"})
    .Outputs({"dst_out"})
    .Attrs({"num_threads: int64_t", "isa: int64_t"})
    .SetInplaceMap({{"dst", "dst_out"}})
    .SetKernelFn(PD_KERNEL(dsa::binding::block_copy));
