#include "dsa/index_query_quant.h"

#include <math.h>

#include "dispatch.h"
#include "parallel.h"
#include "quantize.h"
#include "write_checks.h"

namespace {

using dsa::RowCodec;

constexpr int64_t kTokensPerTask = 4; /* some microseconds of work, enough to pay for a task */
constexpr double kNanosecondsPerHead = 80;

/* Quantizes one head's query as number `row` of the output; returns the factor its weight has to absorb. */
float quantize_head(const dsa_index_query_quant_params& p, const RowCodec& codec, const void* query, int64_t row) {
    const int64_t dim = p.index_head_dim;
    if (p.output_format == DSA_FLOAT32) {
        codec.to_float32(query, p.input_format, dim, (float*)p.quantized + row * dim);
        return 1.0f;
    }
    if (p.output_format == DSA_BFLOAT16) {
        codec.to_bf16(query, p.input_format, dim, (uint16_t*)p.quantized + row * dim);
        return 1.0f;
    }
    const float scale = ceil_pow2(dsa::index_scale(codec.amax_bf16(query, p.input_format, dim)));
    codec.to_e4m3(query, p.input_format, dim, scale, (uint8_t*)p.quantized + row * dim);
    return scale;
}

void quantize_token(const dsa_index_query_quant_params& p, const RowCodec& codec, int64_t t, float factor) {
    const int64_t number_bytes = p.input_format == DSA_BFLOAT16 ? 2 : 4;
    for (int64_t h = 0; h < p.index_n_heads; ++h) {
        const int64_t element = t * p.query_stride + h * p.index_head_dim;
        const int64_t row = t * p.index_n_heads + h;
        const float scale = quantize_head(p, codec, (const uint8_t*)p.query + element * number_bytes, row);
        p.folded_weights[row] = p.weights[t * p.weights_stride + h] * scale * factor;
    }
}

}  // namespace

size_t dsa_index_query_quant_params_size(void) { return sizeof(dsa_index_query_quant_params); }

dsa_status dsa_index_query_quant_cpu(const dsa_index_query_quant_params* params, const dsa_cpu_options* options) {
    if (!params || !options) return DSA_NULL_POINTER;
    const dsa_index_query_quant_params& p = *params;
    if (const dsa_status status = dsa::check_index_query_quant(p)) return status;
    const dsa_isa isa = dsa::resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;

    const RowCodec& codec = *dsa::row_codec(isa);
    const float factor = (float)(1.0 / sqrt((double)p.index_head_dim * p.index_n_heads));
    const int64_t num_tasks = (p.num_tokens + kTokensPerTask - 1) / kTokensPerTask;
    const double nanoseconds = (double)p.num_tokens * p.index_n_heads * kNanosecondsPerHead;
    dsa::parallel_for(num_tasks, dsa::threads_for(nanoseconds, options), [&](int64_t task, int32_t) {
        const int64_t first = task * kTokensPerTask;
        const int64_t last = first + kTokensPerTask < p.num_tokens ? first + kTokensPerTask : p.num_tokens;
        for (int64_t t = first; t < last; ++t) quantize_token(p, codec, t, factor);
    });
    return DSA_OK;
}
