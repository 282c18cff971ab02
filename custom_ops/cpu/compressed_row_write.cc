#include "dsa/compressed_row_write.h"

#include "compressed_checks.h"
#include "compressed_row.h"
#include "dispatch.h"
#include "parallel.h"

namespace dsa {
namespace {

constexpr int64_t kTokensPerTask = 32; /* ten microseconds of work: far above the cost of handing out a task */
constexpr double kNanosecondsPerToken = 300;

}  // namespace
}  // namespace dsa

size_t dsa_compressed_row_write_params_size(void) { return sizeof(dsa_compressed_row_write_params); }

dsa_status dsa_compressed_row_write_cpu(const dsa_compressed_row_write_params* params,
                                        const dsa_cpu_options* options) {
    using namespace dsa;
    if (params == nullptr || options == nullptr) return DSA_NULL_POINTER;
    const dsa_compressed_row_write_params& p = *params;
    CompressedLayout layout;
    const dsa_status status = check_compressed_row_write(p, &layout);
    if (status != DSA_OK) return status;
    const dsa_isa isa = resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    const RowCodec& codec = *row_codec(isa);
    const int64_t number_bytes = p.input_format == DSA_FLOAT32 ? 4 : 2;
    const int64_t num_tasks = (p.num_tokens + kTokensPerTask - 1) / kTokensPerTask;
    const int32_t num_threads = threads_for((double)p.num_tokens * kNanosecondsPerToken, options);
    /* Bound: the numbers of a row are read once (fp8: twice, the second time from the cache), its bytes are written. */
    parallel_for(num_tasks, num_threads, [&](int64_t task, int32_t) {
        const int64_t begin = task * kTokensPerTask;
        const int64_t end = begin + kTokensPerTask < p.num_tokens ? begin + kTokensPerTask : p.num_tokens;
        for (int64_t t = begin; t < end; ++t) {
            const int64_t slot = p.slot_mapping[t];
            if (slot < 0 || slot >= layout.num_slots) continue;
            write_compressed_row(layout, codec, (const uint8_t*)p.rows + t * p.row_stride * number_bytes,
                                 p.input_format, p.cache + compressed_row_offset(&layout, slot),
                                 p.cache + compressed_scale_offset(&layout, slot));
        }
    });
    return DSA_OK;
}
