#include "dsa/compressed_row_read.h"

#include "compressed_checks.h"
#include "compressed_row.cuh"

namespace dsa {
namespace gpu {
namespace {

struct Reading {
    CompressedRows rows;
    const int64_t* slot_ids;
    float* out;
    int64_t num_rows;
    int32_t num_blocks; /* of the grid */
    bool is_by_fours;
};

/* A warp reads a row. */
__device__ __forceinline__ void read_row(const Reading& call, int64_t i) {
    const CompressedRows& rows = call.rows;
    const int lane = threadIdx.x % 32;
    const int64_t slot = __ldg(call.slot_ids + i);
    const bool is_there = slot >= 0 && slot < rows.num_slots;
    const CompressedRow row = compressed_row(rows, is_there ? slot : 0);
    float* out = call.out + i * rows.head_dim;
    if (call.is_by_fours) {
#pragma unroll 4
        for (int d = 4 * lane; d < rows.head_dim; d += 4 * 32)
            *(float4*)(out + d) = is_there ? load_floats(rows, row, d) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        return;
    }
#pragma unroll 1
    for (int d = lane; d < rows.head_dim; d += 32) out[d] = is_there ? load_number(rows, row, d) : 0.0f;
}

__global__ void __launch_bounds__(kWriteThreads) compressed_row_read_kernel(const __grid_constant__ Reading call) {
    const int64_t stride = (int64_t)call.num_blocks * kWriteWarps;
    for (int64_t i = (int64_t)blockIdx.x * kWriteWarps + threadIdx.x / 32; i < call.num_rows; i += stride)
        read_row(call, i);
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

dsa_status dsa_compressed_row_read_cuda(const dsa_compressed_row_read_params* params, void* stream) {
    using namespace dsa;
    if (params == nullptr) return DSA_NULL_POINTER;
    CompressedLayout layout;
    dsa_status status = check_compressed_row_read(*params, &layout);
    if (status != DSA_OK || params->num_rows == 0) return status;
    gpu::Device device = {};
    status = gpu::device(&device);
    if (status != DSA_OK) return status;
    gpu::Reading call = {};
    call.rows = gpu::make_compressed_rows(layout, params->cache);
    call.slot_ids = params->slot_ids;
    call.out = params->out;
    call.num_rows = params->num_rows;
    call.num_blocks = (int32_t)gpu::write_blocks(params->num_rows);
    call.is_by_fours = call.rows.has_fours && gpu::is_aligned(params->out, 16);
    /* Bound: a row is read once and written as float32; fp8 of 512: 584 + 2048 bytes. */
    gpu::compressed_row_read_kernel<<<(unsigned)call.num_blocks, gpu::kWriteThreads, 0, (cudaStream_t)stream>>>(call);
    return gpu::launched((cudaStream_t)stream);
}
