#include "dsa/kv_compress.h"

#include "compressed.h"
#include "index_cache.h"
#include "offending_rows.h"

namespace dsa {
namespace binding {

constexpr Op<dsa_kv_compress_params> kOp = {
    "kv_compress", dsa_kv_compress_cpu, DSA_ON_CUDA(dsa_kv_compress_cuda), dsa_kv_compress_workspace_bytes,
    DSA_ON_CUDA(dsa_kv_compress_cuda_workspace_bytes),
};

/* Keys in blocks of block_rows: [num_blocks, block_rows, head_dim and, for fp8, scale], or fp8 blocks of bytes. */
static void expect_key_cache(Shapes* shapes, const Tensor& cache, const Tensor& norm_weight, int32_t block_rows) {
    shapes->give("index_head_dim", "norm_weight", norm_weight, norm_weight.numel());
    expect_index_cache(shapes, "entry_cache", cache, block_rows);
}

/* Everything but the entries; norm_weight, ratio, overlap and rope_dim are known. */
struct Inputs {
    const Tensor& kv_score;
    const Tensor& ape;
    const Tensor& norm_weight;
    const Tensor& cos;
    const Tensor& sin;
    const Tensor& state_cache;
    const Tensor& state_table;
    const Tensor& positions;
    const Tensor& request_ids;
    const Tensor& lengths;
};

static void expect_inputs(Shapes* shapes, const Inputs& in, const dsa_kv_compress_params& params) {
    constexpr const char* kWidth = "overlap * head_dim";
    constexpr const char* kStateWidth = "2 * overlap * head_dim";
    shapes->give(kWidth, "norm_weight", in.norm_weight, (int64_t)params.overlap * params.head_dim);
    shapes->give(kStateWidth, "norm_weight", in.norm_weight, 2 * (int64_t)params.overlap * params.head_dim);
    shapes->expect("kv_score", in.kv_score, {DataType::FLOAT32}, {"num_tokens", kStateWidth});
    shapes->expect("ape", in.ape, {DataType::FLOAT32}, {params.ratio, kWidth});
    shapes->expect("cos", in.cos, {DataType::FLOAT32}, {"num_tokens", params.qk_rope_head_dim / 2});
    shapes->expect("sin", in.sin, {DataType::FLOAT32}, {"num_tokens", params.qk_rope_head_dim / 2});
    shapes->expect("state_cache", in.state_cache, {DataType::FLOAT32},
                   {"state_blocks", "state_block_tokens", kStateWidth});
    shapes->expect("state_table", in.state_table, {DataType::INT32}, {"num_requests", "state_table_width"});
    shapes->expect("positions", in.positions, {DataType::INT32}, {"num_tokens"});
    shapes->expect("request_ids", in.request_ids, {DataType::INT32}, {"num_tokens"});
    shapes->expect("lengths", in.lengths, {DataType::INT32}, {"num_tokens"});
}

static void set_inputs(const Shapes& shapes, const Inputs& in, dsa_kv_compress_params* params) {
    params->kv_score = address<float>(in.kv_score);
    params->ape = address<float>(in.ape);
    params->norm_weight = address<float>(in.norm_weight);
    params->cos = address<float>(in.cos);
    params->sin = address<float>(in.sin);
    params->state_cache = address<float>(in.state_cache);
    params->state_table = address<int32_t>(in.state_table);
    params->positions = address<int32_t>(in.positions);
    params->request_ids = address<int32_t>(in.request_ids);
    params->lengths = address<int32_t>(in.lengths);
    params->kv_score_stride = 2 * (int64_t)params->overlap * params->head_dim;
    params->state_block_stride_bytes = block_bytes(in.state_cache);
    params->state_num_blocks = shapes["state_blocks"];
    params->num_tokens = shapes["num_tokens"];
    params->num_requests = shapes["num_requests"];
    params->state_table_width = shapes.positive("state_table_width");
    params->state_block_tokens = shapes.positive("state_block_tokens");
}

static void set_entries(Shapes* shapes, const Tensor& norm_weight, const Tensor& cache, const Tensor& slots,
                        dsa_kv_compress_params* params) {
    shapes->expect("entry_slots", slots, {DataType::INT64}, {"num_tokens"});
    if (params->entry_kind == DSA_ENTRY_INDEX_KEY)
        expect_key_cache(shapes, cache, norm_weight, params->entry_block_rows);
    else
        expect_row_cache(shapes, "entry_cache", cache, "num_blocks", params->entry_block_rows,
                         params->qk_rope_head_dim);
    params->entry_slots = address<int64_t>(slots);
    params->entry_cache = address<uint8_t>(cache);
    params->entry_block_stride_bytes = block_bytes(cache);
    params->entry_num_blocks = (*shapes)["num_blocks"];
    params->entry_format = format_of(cache);
}

static void refuse_offending_token(const Shapes& shapes, const Inputs& in) {
    for (int64_t t = 0; t < in.lengths.numel(); ++t) {
        if (address<int32_t>(in.lengths)[t] <= 0) continue;
        const int32_t position = address<int32_t>(in.positions)[t];
        const int32_t request = address<int32_t>(in.request_ids)[t];
        if (position < 0) refuse_value("positions", "at least 0", position, t);
        if (request < 0 || request >= shapes["num_requests"]) {
            refuse_value("request_ids", "a row of state_table, at least 0 and below " +
                         std::to_string(shapes["num_requests"]), request, t);
        }
    }
}

static void kv_compress(const Tensor& kv_score, const Tensor& ape, const Tensor& norm_weight, const Tensor& cos,
                        const Tensor& sin, const Tensor& state_cache, const Tensor& state_table,
                        const Tensor& positions, const Tensor& request_ids, const Tensor& lengths,
                        const Tensor& entry_cache, const Tensor& entry_slots, float eps, int64_t ratio,
                        int64_t overlap, int64_t rope_dim, int64_t block_rows, int64_t entry_kind,
                        int64_t scale_format, int64_t num_threads, int64_t isa) {
    const Inputs in = {kv_score,    ape,         norm_weight, cos,         sin,
                       state_cache, state_table, positions,   request_ids, lengths};
    Shapes shapes;
    shapes.expect("norm_weight", norm_weight, {DataType::FLOAT32}, {"head_dim"});
    expect_between("ratio", ratio, 1, kMaxRatio);
    expect_between("overlap", overlap, 1, 2);
    if (!(eps >= 0)) refuse("eps: expected at least 0, got " + std::to_string(eps));

    dsa_kv_compress_params params = {};
    params.head_dim = shapes.between("head_dim", 1, kMaxCompressedDim);
    params.qk_rope_head_dim = checked_rope_dim(rope_dim, params.head_dim);
    params.entry_block_rows = checked_block_rows("block_rows", block_rows);
    params.ratio = (int32_t)ratio;
    params.overlap = (int32_t)overlap;
    params.eps = eps;
    params.entry_kind = code("entry_kind", entry_kind);
    params.scale_format = code("scale_format", scale_format);
    expect_inputs(&shapes, in, params);
    set_inputs(shapes, in, &params);
    set_entries(&shapes, norm_weight, entry_cache, entry_slots, &params);

    const dsa_cpu_options options = cpu_options(num_threads, isa);
    const dsa_status status = call_with_workspace(kOp, shapes.device, params, options);
    if (may_blame_values(shapes.device, status)) refuse_offending_token(shapes, in);
    check_status(kOp.name, status);
}

}  // namespace binding
}  // namespace dsa

PD_BUILD_OP(dsa_kv_compress)
    .Inputs({"kv_score", "ape", "norm_weight", "cos", "sin", "state_cache", "state_table", "positions", "request_ids",
             "lengths", "entry_cache", "entry_slots"})
    .Outputs({"state_cache_out", "entry_cache_out"})
    .Attrs({"eps: float", "ratio: int64_t", "overlap: int64_t", "rope_dim: int64_t", "block_rows: int64_t",
            "entry_kind: int64_t", "scale_format: int64_t", "num_threads: int64_t", "isa: int64_t"})
    .SetInplaceMap({{"state_cache", "state_cache_out"}, {"entry_cache", "entry_cache_out"}})
    .SetKernelFn(PD_KERNEL(dsa::binding::kv_compress));
