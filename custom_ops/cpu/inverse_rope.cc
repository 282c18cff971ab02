#include "dsa/inverse_rope.h"

#include "compressed_checks.h"
#include "dispatch.h"
#include "parallel.h"
#include "quantize.h"

namespace dsa {
namespace {

constexpr int64_t kHeadsPerTask = 256;
constexpr double kNanosecondsPerNumber = 1;
constexpr int32_t kNumbersAtOnce = 64;

/* turned [n] := x [n], rotated back by the angles of n / 2 pairs */
void rotate_back(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, int32_t n,
                 float* __restrict turned) {
    for (int32_t i = 0; i < n / 2; ++i) {
        turned[2 * i] = x[2 * i] * cos[i] + x[2 * i + 1] * sin[i];
        turned[2 * i + 1] = x[2 * i + 1] * cos[i] - x[2 * i] * sin[i];
    }
}

/* All instruction sets give the same bits: they differ in how numbers are converted, which is exact. */
void rotate_head(const dsa_inverse_rope_params& p, const RowCodec& codec, int64_t row) {
    const int64_t number_bytes = p.x_format == DSA_FLOAT32 ? 4 : 2;
    const int64_t angles = row / p.num_heads * (p.qk_rope_head_dim / 2);
    uint8_t* rotated = (uint8_t*)p.x + ((row + 1) * p.head_dim - p.qk_rope_head_dim) * number_bytes;
    float numbers[kNumbersAtOnce], turned[kNumbersAtOnce];
    for (int32_t begin = 0; begin < p.qk_rope_head_dim; begin += kNumbersAtOnce) {
        const int32_t rest = p.qk_rope_head_dim - begin;
        const int32_t n = rest < kNumbersAtOnce ? rest : kNumbersAtOnce;
        uint8_t* part = rotated + begin * number_bytes;
        codec.to_float32(part, p.x_format, n, numbers);
        rotate_back(numbers, p.cos + angles + begin / 2, p.sin + angles + begin / 2, n, turned);
        if (p.x_format == DSA_FLOAT32)
            codec.to_float32(turned, DSA_FLOAT32, n, (float*)part);
        else
            codec.to_bf16(turned, DSA_FLOAT32, n, (uint16_t*)part);
    }
}

}  // namespace
}  // namespace dsa

size_t dsa_inverse_rope_params_size(void) { return sizeof(dsa_inverse_rope_params); }

dsa_status dsa_inverse_rope_cpu(const dsa_inverse_rope_params* params, const dsa_cpu_options* options) {
    using namespace dsa;
    if (params == nullptr || options == nullptr) return DSA_NULL_POINTER;
    const dsa_inverse_rope_params& p = *params;
    const dsa_status status = check_inverse_rope(p);
    if (status != DSA_OK) return status;
    const dsa_isa isa = resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    const RowCodec& codec = *row_codec(isa);
    const int64_t num_rows = p.num_tokens * p.num_heads;
    const int64_t num_tasks = (num_rows + kHeadsPerTask - 1) / kHeadsPerTask;
    const int32_t num_threads = threads_for((double)num_rows * p.qk_rope_head_dim * kNanosecondsPerNumber, options);
    /* Bound: the rotated numbers are read and written once. */
    parallel_for(num_tasks, num_threads, [&](int64_t task, int32_t) {
        const int64_t begin = task * kHeadsPerTask;
        const int64_t end = begin + kHeadsPerTask < num_rows ? begin + kHeadsPerTask : num_rows;
        for (int64_t row = begin; row < end; ++row) rotate_head(p, codec, row);
    });
    return DSA_OK;
}
