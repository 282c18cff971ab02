#include "dsa/compressed_mla.h"

#include <math.h>

#include "compressed.h"
#include "offending_rows.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_compressed_mla_params> kOp = {
    "compressed_mla", dsa_compressed_mla_cpu, DSA_ON_CUDA(dsa_compressed_mla_cuda), dsa_compressed_mla_workspace_bytes,
    DSA_ON_CUDA(dsa_compressed_mla_cuda_workspace_bytes),
};

using OptionalTensor = paddle::optional<Tensor>;

static void set_entries(Shapes* shapes, const OptionalTensor& cache, const OptionalTensor& slots,
                        const OptionalTensor& counts, const Tensor& window_cache, int64_t block_rows,
                        dsa_compressed_mla_params* params) {
    /* A tensor without numbers arrives as none, too: there is nothing to attend to in either case. */
    if (!cache || !slots || !counts) {
        params->entry_block_rows = 1;
        return;
    }
    params->entry_block_rows = checked_block_rows("entry_block_rows", block_rows);
    expect_row_cache(shapes, "entry_cache", *cache, "entry_blocks", params->entry_block_rows,
                     params->qk_rope_head_dim, "entry_block_bytes");
    if (cache->dtype() != window_cache.dtype()) {
        refuse(std::string("entry_cache: expected ") + dtype_name(window_cache.dtype()) + " like window_cache, got " +
               describe(*cache));
    }
    shapes->expect("entry_slots", *slots, {DataType::INT32}, {"num_tokens", "entry_width"});
    shapes->expect("entry_counts", *counts, {DataType::INT32}, {"num_tokens"});
    expect_slots_fit("entry_cache", (*shapes)["entry_blocks"], params->entry_block_rows);
    params->entry_cache = address<uint8_t>(*cache);
    params->entry_slots = address<int32_t>(*slots);
    params->entry_counts = address<int32_t>(*counts);
    params->entry_block_stride_bytes = block_bytes(*cache);
    params->entry_num_blocks = (*shapes)["entry_blocks"];
    params->entry_width = (*shapes)["entry_width"];
}

static void set_windows(Shapes* shapes, const Tensor& cache, const Tensor& slots, const Tensor& counts,
                        int64_t block_rows, dsa_compressed_mla_params* params) {
    params->window_block_rows = checked_block_rows("window_block_rows", block_rows);
    expect_row_cache(shapes, "window_cache", cache, "window_blocks", params->window_block_rows,
                     params->qk_rope_head_dim);
    shapes->expect("window_slots", slots, {DataType::INT32}, {"num_tokens", "window_width"});
    shapes->expect("window_counts", counts, {DataType::INT32}, {"num_tokens"});
    expect_slots_fit("window_cache", (*shapes)["window_blocks"], params->window_block_rows);
    params->window_cache = address<uint8_t>(cache);
    params->window_slots = address<int32_t>(slots);
    params->window_counts = address<int32_t>(counts);
    params->window_block_stride_bytes = block_bytes(cache);
    params->window_num_blocks = (*shapes)["window_blocks"];
    params->window_width = (*shapes)["window_width"];
    params->cache_format = format_of(cache);
}

static void refuse_offending_counts(const char* argument, const Tensor& counts, int32_t width) {
    for (int64_t t = 0; t < counts.numel(); ++t) {
        const int32_t count = address<int32_t>(counts)[t];
        if (count < 0 || count > width)
            refuse_value(argument, "0 to " + std::to_string(width) + " (the width of the slots)", count, t);
    }
}

static std::vector<Tensor> compressed_mla(const Tensor& query, const Tensor& window_cache, const Tensor& window_slots,
                                          const Tensor& window_counts, const OptionalTensor& entry_cache,
                                          const OptionalTensor& entry_slots, const OptionalTensor& entry_counts,
                                          const Tensor& sinks, int64_t window_block_rows, int64_t entry_block_rows,
                                          int64_t rope_dim, float softmax_scale, bool batch_invariant,
                                          int64_t num_threads, int64_t isa) {
    Shapes shapes;
    shapes.expect("query", query, {DataType::FLOAT32, DataType::BFLOAT16}, {"num_tokens", "num_heads", "head_dim"});

    dsa_compressed_mla_params params = {};
    params.num_heads = shapes.positive("num_heads");
    params.head_dim = shapes.positive("head_dim");
    params.qk_rope_head_dim = checked_rope_dim(rope_dim, params.head_dim);
    set_windows(&shapes, window_cache, window_slots, window_counts, window_block_rows, &params);
    set_entries(&shapes, entry_cache, entry_slots, entry_counts, window_cache, entry_block_rows, &params);
    if (params.window_width + (int64_t)params.entry_width < 1)
        refuse("window_slots: expected at least one column in window_slots and entry_slots, got none");
    shapes.expect("sinks", sinks, {DataType::FLOAT32}, {"num_heads"});
    if (!isfinite(softmax_scale))
        refuse("softmax_scale: expected a finite float32, got " + std::to_string(softmax_scale));
    Tensor out = paddle::empty(query.shape(), query.dtype(), shapes.device.place());
    Tensor lse = paddle::empty({shapes["num_tokens"], params.num_heads}, DataType::FLOAT32, shapes.device.place());
    params.query = address<void>(query);
    params.sinks = address<float>(sinks);
    params.out = address<void>(out);
    params.lse = address<float>(lse);
    params.num_tokens = shapes["num_tokens"];
    params.softmax_scale = softmax_scale;
    params.batch_invariant = batch_invariant;
    params.query_format = format_of(query);

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    const dsa_status status = call_with_workspace(kOp, shapes.device, params, options);
    if (may_blame_values(shapes.device, status)) {
        refuse_offending_counts("window_counts", window_counts, params.window_width);
        if (entry_counts) refuse_offending_counts("entry_counts", *entry_counts, params.entry_width);
    }
    check_status(kOp.name, status);
    return {out, lse};
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_compressed_mla)
    .Inputs({"query", "window_cache", "window_slots", "window_counts", paddle::Optional("entry_cache"),
             paddle::Optional("entry_slots"), paddle::Optional("entry_counts"), "sinks"})
    .Outputs({"out", "lse"})
    .Attrs({"window_block_rows: int64_t", "entry_block_rows: int64_t", "rope_dim: int64_t", "softmax_scale: float",
            "batch_invariant: bool", "num_threads: int64_t", "isa: int64_t"})
    .SetKernelFn(PD_KERNEL(dsa::binding::compressed_mla));
