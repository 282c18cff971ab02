#include "dsa/index_key_write.h"

#include "dispatch.h"
#include "parallel.h"
#include "quantize.h"
#include "write_checks.h"

namespace {

using dsa::RowCodec;

constexpr int64_t kTokensPerTask = 64; /* some microseconds of work, enough to pay for a task */
constexpr double kNanosecondsPerToken = 100;

void write_key(const dsa_index_key_write_params& p, const RowCodec& codec, const void* key, uint8_t* block,
               int64_t offset) {
    const int64_t dim = p.index_head_dim;
    if (p.cache_format == DSA_FLOAT32) {
        codec.to_float32(key, p.input_format, dim, (float*)block + offset * dim);
    } else if (p.cache_format == DSA_BFLOAT16) {
        codec.to_bf16(key, p.input_format, dim, (uint16_t*)block + offset * dim);
    } else {
        const float wanted = dsa::index_scale(codec.amax_bf16(key, p.input_format, dim));
        const float scale = p.scale_format == DSA_SCALE_UE8M0 ? ceil_pow2(wanted) : wanted;
        codec.to_e4m3(key, p.input_format, dim, scale, block + offset * dim);
        float* scales = (float*)(block + dsa_index_scale_offset(p.cache_format, p.block_size, p.index_head_dim));
        scales[offset] = scale;
    }
}

}  // namespace

size_t dsa_index_key_write_params_size(void) { return sizeof(dsa_index_key_write_params); }

dsa_status dsa_index_key_write_cpu(const dsa_index_key_write_params* params, const dsa_cpu_options* options) {
    if (!params || !options) return DSA_NULL_POINTER;
    const dsa_index_key_write_params& p = *params;
    if (const dsa_status status = dsa::check_index_key_write(p)) return status;
    const dsa_isa isa = dsa::resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;

    const RowCodec& codec = *dsa::row_codec(isa);
    const int64_t number_bytes = p.input_format == DSA_BFLOAT16 ? 2 : 4;
    const int64_t num_tasks = (p.num_tokens + kTokensPerTask - 1) / kTokensPerTask;
    const int32_t num_threads = dsa::threads_for((double)p.num_tokens * kNanosecondsPerToken, options);
    dsa::parallel_for(num_tasks, num_threads, [&](int64_t task, int32_t) {
        const int64_t first = task * kTokensPerTask;
        const int64_t last = first + kTokensPerTask < p.num_tokens ? first + kTokensPerTask : p.num_tokens;
        for (int64_t t = first; t < last; ++t) {
            const int64_t slot = p.slot_mapping[t];
            if (slot < 0 || slot / p.block_size >= p.num_blocks) continue;
            uint8_t* block = p.cache + slot / p.block_size * p.block_stride_bytes;
            const uint8_t* key = (const uint8_t*)p.key + t * p.key_stride * number_bytes;
            write_key(p, codec, key, block, slot % p.block_size);
        }
    });
    return DSA_OK;
}
