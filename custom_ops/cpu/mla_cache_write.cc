#include "dsa/mla_cache_write.h"

#include <string.h>

#include "dispatch.h"
#include "parallel.h"
#include "quantize.h"
#include "write_checks.h"

namespace dsa {
namespace {

constexpr int64_t kTokensPerTask = 32; /* ten microseconds of work: far above the cost of handing out a task */
constexpr double kNanosecondsPerToken = 300;

/* A NaN in the group makes the scale NaN. */
float latent_scale(float amax, dsa_scale_format scale_format) {
    const float wanted = amax / kE4m3Max;
    if (scale_format == DSA_SCALE_PLAIN) return wanted < kPlainScaleFloor ? kPlainScaleFloor : wanted;
    return ceil_pow2(wanted < kLatentScaleFloor ? kLatentScaleFloor : wanted);
}

/* The pad bytes become zero, so that equal tokens give equal rows. */
void write_fp8_row(const dsa_mla_cache_write_params& p, const LatentLayout& layout, const RowCodec& codec,
                   const uint8_t* latent, const uint8_t* rope, uint8_t* row) {
    const int64_t number_bytes = p.input_format == DSA_FLOAT32 ? 4 : 2;
    uint8_t* scales = row + layout.scale_offset;
    uint8_t* rope_codes = row + layout.rope_offset;
    constexpr int64_t kGroup = DSA_LATENT_GROUP;
    for (int64_t begin = 0; begin < p.kv_lora_rank; begin += kGroup) {
        const int64_t n = p.kv_lora_rank - begin < kGroup ? p.kv_lora_rank - begin : kGroup;
        const uint8_t* group = latent + begin * number_bytes;
        const float scale = latent_scale(codec.amax_bf16(group, p.input_format, n), p.scale_format);
        codec.to_e4m3(group, p.input_format, n, scale, row + begin);
        memcpy(scales + begin / kGroup * 4, &scale, 4);
    }
    codec.to_bf16(rope, p.input_format, p.qk_rope_head_dim, (uint16_t*)rope_codes);
    memset(row + p.kv_lora_rank, 0, (size_t)(layout.scale_offset - p.kv_lora_rank));
    uint8_t* rope_end = rope_codes + 2 * (int64_t)p.qk_rope_head_dim;
    memset(rope_end, 0, (size_t)(row + layout.row_bytes - rope_end));
}

void write_row(const dsa_mla_cache_write_params& p, const LatentLayout& layout, const RowCodec& codec, int64_t token,
               uint8_t* row) {
    const int64_t number_bytes = p.input_format == DSA_FLOAT32 ? 4 : 2;
    const uint8_t* latent = (const uint8_t*)p.latent + token * p.latent_stride * number_bytes;
    const uint8_t* rope = (const uint8_t*)p.rope + token * p.rope_stride * number_bytes;
    uint8_t* row_rope = row + layout.rope_offset;
    switch (p.cache_format) {
        case DSA_FP8:
            write_fp8_row(p, layout, codec, latent, rope, row);
            break;
        case DSA_BFLOAT16:
            codec.to_bf16(latent, p.input_format, p.kv_lora_rank, (uint16_t*)row);
            codec.to_bf16(rope, p.input_format, p.qk_rope_head_dim, (uint16_t*)row_rope);
            break;
        default:
            codec.to_float32(latent, p.input_format, p.kv_lora_rank, (float*)row);
            codec.to_float32(rope, p.input_format, p.qk_rope_head_dim, (float*)row_rope);
    }
}

}  // namespace
}  // namespace dsa

size_t dsa_mla_cache_write_params_size(void) { return sizeof(dsa_mla_cache_write_params); }

dsa_status dsa_mla_cache_write_cpu(const dsa_mla_cache_write_params* params, const dsa_cpu_options* options) {
    using namespace dsa;
    if (params == nullptr || options == nullptr) return DSA_NULL_POINTER;
    LatentLayout layout;
    const dsa_status status = check_mla_cache_write(*params, &layout);
    if (status != DSA_OK) return status;
    const dsa_isa isa = resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    const RowCodec& codec = *row_codec(isa);
    const int64_t num_tokens = params->num_tokens;
    const int64_t num_tasks = (num_tokens + kTokensPerTask - 1) / kTokensPerTask;
    /* Bound: the numbers of a token are read once (fp8: twice, the second time from the cache), its row is written. */
    parallel_for(num_tasks, threads_for((double)num_tokens * kNanosecondsPerToken, options), [&](int64_t task, int32_t) {
        const int64_t begin = task * kTokensPerTask;
        const int64_t end = begin + kTokensPerTask < num_tokens ? begin + kTokensPerTask : num_tokens;
        for (int64_t t = begin; t < end; ++t) {
            const int64_t slot = params->slot_mapping[t];
            if (slot < 0 || slot >= layout.num_slots) continue;
            write_row(*params, layout, codec, t, params->cache + latent_row_offset(&layout, slot));
        }
    });
    return DSA_OK;
}
