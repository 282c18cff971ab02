#include "dsa/compressed_row_read.h"

#include "compressed_checks.h"
#include "compressed_row.h"
#include "dispatch.h"
#include "parallel.h"

namespace dsa {
namespace {

constexpr int64_t kRowsPerTask = 64; /* some microseconds of work, enough to pay for a task */
constexpr double kNanosecondsPerRow = 150;

ReadCompressedRow reader_for(dsa_isa isa) {
#if DSA_X86
    if (isa >= DSA_ISA_AVX512) return read_compressed_row_avx512;
    if (isa == DSA_ISA_AVX2) return read_compressed_row_avx2;
#else
    (void)isa;
#endif
    return read_compressed_row;
}

}  // namespace
}  // namespace dsa

size_t dsa_compressed_row_read_params_size(void) { return sizeof(dsa_compressed_row_read_params); }

dsa_status dsa_compressed_row_read_cpu(const dsa_compressed_row_read_params* params, const dsa_cpu_options* options) {
    using namespace dsa;
    if (params == nullptr || options == nullptr) return DSA_NULL_POINTER;
    const dsa_compressed_row_read_params& p = *params;
    CompressedLayout layout;
    const dsa_status status = check_compressed_row_read(p, &layout);
    if (status != DSA_OK) return status;
    const dsa_isa isa = resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    const ReadCompressedRow read = reader_for(isa);
    const int64_t num_tasks = (p.num_rows + kRowsPerTask - 1) / kRowsPerTask;
    const int32_t num_threads = threads_for((double)p.num_rows * kNanosecondsPerRow, options);
    /* Bound: the bytes of a row are read once, its float32 numbers are written. */
    parallel_for(num_tasks, num_threads, [&](int64_t task, int32_t) {
        const int64_t begin = task * kRowsPerTask;
        const int64_t end = begin + kRowsPerTask < p.num_rows ? begin + kRowsPerTask : p.num_rows;
        for (int64_t i = begin; i < end; ++i) {
            float* row = p.out + i * p.head_dim;
            const int64_t slot = p.slot_ids[i];
            if (slot < 0 || slot >= layout.num_slots)
                memset(row, 0, (size_t)p.head_dim * sizeof(float));
            else
                read(layout, p.cache + compressed_row_offset(&layout, slot),
                     p.cache + compressed_scale_offset(&layout, slot), row);
        }
    });
    return DSA_OK;
}
