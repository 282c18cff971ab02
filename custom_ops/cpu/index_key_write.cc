#include "dsa/index_key_write.h"

#include "dispatch.h"
#include "index_key_row.h"
#include "parallel.h"
#include "write_checks.h"

namespace {

constexpr int64_t kTokensPerTask = 64; /* some microseconds of work, enough to pay for a task */
constexpr double kNanosecondsPerToken = 100;

}  // namespace

size_t dsa_index_key_write_params_size(void) { return sizeof(dsa_index_key_write_params); }

dsa_status dsa_index_key_write_cpu(const dsa_index_key_write_params* params, const dsa_cpu_options* options) {
    if (!params || !options) return DSA_NULL_POINTER;
    const dsa_index_key_write_params& p = *params;
    if (const dsa_status status = dsa::check_index_key_write(p)) return status;
    const dsa_isa isa = dsa::resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;

    const dsa::RowCodec& codec = *dsa::row_codec(isa);
    const dsa::IndexKeyFormat format = {p.cache_format, p.scale_format, p.block_size, p.index_head_dim};
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
            dsa::write_index_key(format, codec, key, p.input_format, block, slot % p.block_size);
        }
    });
    return DSA_OK;
}
