#include "dsa/compressed_row_write.h"

#include "compressed_checks.h"
#include "compressed_row.cuh"

namespace dsa {
namespace gpu {
namespace {

constexpr int kLanesPerScale = DSA_COMPRESSED_GROUP / kNumbersPerLane;
constexpr int kNumbersPerStep = 32 * kNumbersPerLane;

struct RowPart {
    CompressedRows rows;
    const uint8_t* numbers;
    const int64_t* slot_mapping;
    int64_t row_stride_bytes;
    int64_t num_tokens;
    dsa_format input_format;
    WritePath path;
    int32_t num_blocks; /* of the grid */
};

/* kGroups: fp8, value numbers in whole groups, 16 a lane, the rotated ones as pairs. */
WritePath path_of(const dsa_compressed_row_write_params& p, const CompressedRows& rows) {
    if (!rows.has_sixteens) return WritePath::kAny;
    if (!rows_aligned(p.rows, p.row_stride, p.num_tokens, p.input_format, 16)) return WritePath::kAny;
    if (p.cache_format != DSA_FP8) return p.head_dim % 4 == 0 ? WritePath::kFours : WritePath::kAny;
    return rows.value_dim % DSA_COMPRESSED_GROUP == 0 ? WritePath::kGroups : WritePath::kAny;
}

RowPart make_row_part(const dsa_compressed_row_write_params& p, const CompressedLayout& layout) {
    RowPart part = {};
    part.rows = make_compressed_rows(layout, p.cache);
    part.numbers = (const uint8_t*)p.rows;
    part.slot_mapping = p.slot_mapping;
    part.row_stride_bytes = p.row_stride * input_bytes(p.input_format);
    part.num_tokens = p.num_tokens;
    part.input_format = p.input_format;
    part.path = path_of(p, part.rows);
    part.num_blocks = (int32_t)write_blocks(p.num_tokens);
    return part;
}

__device__ __forceinline__ uint32_t scale_group_amax_bits(const LanePairs& pairs) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kNumbersPerLane / 2; ++i) largest = __vmaxu2(largest, pairs.pair[i] & 0x7FFF7FFFu);
#pragma unroll
    for (int step = kLanesPerScale / 2; step > 0; step /= 2)
        largest = __vmaxu2(largest, __shfl_xor_sync(kAllLanes, largest, step));
    return max(largest << 16, largest & 0xFFFF0000u);
}

__device__ __forceinline__ uint32_t codes_of_pairs(uint32_t first, uint32_t second, float factor) {
    const uint32_t low =
        e4m3_encode_2(__uint_as_float(first << 16) * factor, __uint_as_float(first & 0xFFFF0000u) * factor);
    const uint32_t high =
        e4m3_encode_2(__uint_as_float(second << 16) * factor, __uint_as_float(second & 0xFFFF0000u) * factor);
    return low | high << 16;
}

template <typename Input>
__device__ __forceinline__ void write_groups(const RowPart& part, int64_t token) {
    const CompressedRows& rows = part.rows;
    const int lane = threadIdx.x % 32, value_dim = rows.value_dim, num_rope_pairs = (rows.head_dim - value_dim) / 2;
    const int64_t slot = load_slot(part.slot_mapping + token);
    const Input* numbers = (const Input*)(part.numbers + token * part.row_stride_bytes);
    LaneNumbers<Input> loaded = {};
    if (lane * kNumbersPerLane < value_dim) loaded = load_lane(numbers + lane * kNumbersPerLane);
    uint32_t rope_pair = lane < num_rope_pairs ? load_rope_pair(numbers + value_dim, lane) : 0;
    if (slot < 0 || slot >= rows.num_slots) return;
    const CompressedRow row = compressed_row(rows, slot);
    for (int first = 0; first < value_dim; first += kNumbersPerStep) {
        const int number = first + lane * kNumbersPerLane;
        if (first > 0) {
            loaded = {};
            if (number < value_dim) loaded = load_lane(numbers + number);
        }
        const LanePairs pairs = pairs_of(loaded);
        const uint32_t code = scale_code_of(scale_group_amax_bits(pairs));
        const float factor = reciprocal_of_code(code);
        if (number >= value_dim) continue;
        *(uint4*)(row.numbers + number) = {codes_of_pairs(pairs.pair[0], pairs.pair[1], factor),
                                           codes_of_pairs(pairs.pair[2], pairs.pair[3], factor),
                                           codes_of_pairs(pairs.pair[4], pairs.pair[5], factor),
                                           codes_of_pairs(pairs.pair[6], pairs.pair[7], factor)};
        if (lane % kLanesPerScale == 0) row.scales[number / DSA_COMPRESSED_GROUP] = (uint8_t)code;
    }
    clear_scale_padding(rows, row);
    for (int i = lane; i < num_rope_pairs; i += 32) {
        if (i >= 32) rope_pair = load_rope_pair(numbers + value_dim, i);
        ((uint32_t*)(row.numbers + value_dim))[i] = quiet_pair(rope_pair);
    }
}

__device__ inline void write_any(const RowPart& part, int64_t token) {
    const int64_t slot = part.slot_mapping[token];
    if (slot < 0 || slot >= part.rows.num_slots) return;
    const uint8_t* numbers = part.numbers + token * part.row_stride_bytes;
    const CompressedRow row = compressed_row(part.rows, slot);
    if (part.path == WritePath::kFours)
        convert_row_by_4(numbers, part.input_format, part.rows.head_dim, part.rows.format, row.numbers);
    else
        pack_row(part.rows, numbers, part.input_format, row, 0, 1);
}

/* Lines of what write_groups reads first. */
__device__ __forceinline__ void prefetch_row(const RowPart& part, int64_t token) {
    const int64_t number_bytes = part.input_format == DSA_BFLOAT16 ? 2 : 4;
    const int64_t number = threadIdx.x % 32 * kNumbersPerLane;
    if (number < part.rows.head_dim)
        prefetch_line(part.numbers + token * part.row_stride_bytes + number * number_bytes);
    if (number == 0) prefetch_line(part.slot_mapping + token);
}

__global__ void __launch_bounds__(kWriteThreads) compressed_row_write_kernel(const __grid_constant__ RowPart part) {
    const int64_t stride = (int64_t)part.num_blocks * kWriteWarps;
    const int64_t first = (int64_t)blockIdx.x * kWriteWarps + threadIdx.x / 32;
    if (first < part.num_tokens) prefetch_row(part, first);
    wait_for_inputs();
    for (int64_t t = first; t < part.num_tokens; t += stride) {
        if (part.path != WritePath::kGroups)
            write_any(part, t);
        else if (part.input_format == DSA_BFLOAT16)
            write_groups<uint16_t>(part, t);
        else
            write_groups<float>(part, t);
    }
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

dsa_status dsa_compressed_row_write_cuda(const dsa_compressed_row_write_params* params, void* stream) {
    using namespace dsa;
    if (params == nullptr) return DSA_NULL_POINTER;
    CompressedLayout layout;
    dsa_status status = check_compressed_row_write(*params, &layout);
    if (status != DSA_OK || params->num_tokens == 0) return status;
    gpu::Device device = {};
    status = gpu::device(&device);
    if (status != DSA_OK) return status;
    /* Bound: the numbers of a row are read once, its row is written; 512 bfloat16 to fp8: 1616 bytes. */
    const gpu::RowPart part = gpu::make_row_part(*params, layout);
    return gpu::launch_write(gpu::compressed_row_write_kernel, part, part.num_blocks, device, (cudaStream_t)stream);
}
