/* Rows of a paged cache of compressed rows on the device, bit for bit what cpu/compressed_cache.h and the headers of
 * the two row ops say.
 */
#ifndef DSA_GPU_COMPRESSED_ROW_CUH_
#define DSA_GPU_COMPRESSED_ROW_CUH_

#include "compressed_cache.h"
#include "latent_row.cuh"
#include "write_parts.cuh"

namespace dsa {
namespace gpu {

struct CompressedRows {
    uint8_t* cache; /* readers do not write */
    int64_t block_stride_bytes;
    int64_t data_bytes;
    int64_t scale_bytes;
    int64_t scales_offset;
    int64_t num_slots;
    Divisor block_rows;
    int32_t head_dim;
    int32_t value_dim;
    dsa_format format;
    bool has_fours;    /* four neighbouring numbers are aligned to their size, bfloat16 ones of fp8 rows to 4 bytes */
    bool has_sixteens; /* rows begin at multiples of 16 bytes */
};

static inline CompressedRows make_compressed_rows(const CompressedLayout& layout, const uint8_t* cache) {
    CompressedRows rows = {};
    rows.cache = (uint8_t*)cache;
    rows.block_stride_bytes = layout.block_stride_bytes;
    rows.data_bytes = layout.data_bytes;
    rows.scale_bytes = layout.scale_bytes;
    rows.scales_offset = layout.scales_offset;
    rows.num_slots = layout.num_slots;
    rows.block_rows = make_divisor((int32_t)layout.block_rows);
    rows.head_dim = layout.head_dim;
    rows.value_dim = layout.value_dim;
    rows.format = layout.format;
    const int64_t four_bytes = layout.format == DSA_FLOAT32 ? 16 : layout.format == DSA_BFLOAT16 ? 8 : 4;
    const int64_t starts = (int64_t)(uintptr_t)cache | layout.block_stride_bytes | layout.data_bytes;
    rows.has_fours = starts % four_bytes == 0 && layout.value_dim % 4 == 0 && layout.head_dim % 4 == 0;
    rows.has_sixteens = starts % 16 == 0;
    return rows;
}

struct CompressedRow {
    uint8_t* numbers;
    uint8_t* scales; /* fp8 only */
};

/* 0 <= slot < num_slots */
__device__ __forceinline__ CompressedRow compressed_row(const CompressedRows& rows, int64_t slot) {
    const int64_t block = rows.block_rows.quotient(slot), row = slot - block * rows.block_rows.divisor;
    uint8_t* start = rows.cache + block * rows.block_stride_bytes;
    return {start + row * rows.data_bytes, start + rows.scales_offset + row * rows.scale_bytes};
}

/* ---- reading ---- */

constexpr uint32_t kSmallestScaleBits = 0x400000u; /* 2^-127, the value of scale code 0 and the reciprocal of 254's */

__device__ __forceinline__ float scale_of_code(uint32_t code) {
    return __uint_as_float(code == 0 ? kSmallestScaleBits : code << 23);
}

/* Number d of a row as float32. */
__device__ inline float load_number(const CompressedRows& rows, const CompressedRow& row, int32_t d) {
    if (rows.format == DSA_FLOAT32) return __uint_as_float(load_bytes(row.numbers + 4 * (int64_t)d, 4));
    if (rows.format == DSA_BFLOAT16) return bf16_decode(load_bytes(row.numbers + 2 * (int64_t)d, 2));
    if (d < rows.value_dim)
        return e4m3_decode(row.numbers[d]) * scale_of_code(row.scales[d / DSA_COMPRESSED_GROUP]);
    return bf16_decode(load_bytes(row.numbers + 2 * (int64_t)d - rows.value_dim, 2));
}

/* Numbers d .. d + 3, d a multiple of 4; zeros behind the row. */
__device__ inline float4 load_floats(const CompressedRows& rows, const CompressedRow& row, int32_t d) {
    if (d >= rows.head_dim) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (!rows.has_fours) {
        float numbers[4];
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            const float number = d + i < rows.head_dim ? load_number(rows, row, d + i) : 0.0f;
            if (i == 0) numbers[0] = number;
            if (i == 1) numbers[1] = number;
            if (i == 2) numbers[2] = number;
            if (i == 3) numbers[3] = number;
        }
        return make_float4(numbers[0], numbers[1], numbers[2], numbers[3]);
    }
    if (rows.format == DSA_FLOAT32) return __ldg((const float4*)row.numbers + d / 4);
    if (rows.format == DSA_BFLOAT16) return as_floats(__ldg((const uint2*)row.numbers + d / 4));
    if (d < rows.value_dim) {
        const uint32_t codes = __ldg((const uint32_t*)(row.numbers + d));
        const float scale = scale_of_code(__ldg(row.scales + d / DSA_COMPRESSED_GROUP));
        const float2 low = e4m3_decode_2(codes & 0xFFFFu), high = e4m3_decode_2(codes >> 16);
        return make_float4(low.x * scale, low.y * scale, high.x * scale, high.y * scale);
    }
    const uint32_t* pairs = (const uint32_t*)(row.numbers + 2 * (int64_t)d - rows.value_dim);
    return as_floats(uint2{__ldg(pairs), __ldg(pairs + 1)});
}

/* ---- writing ---- */

/* Of the largest magnitude of a group of bfloat16 numbers, as float32 bits. The smallest power of two that reaches
 * max(a, 1e-4) / 448 is that of an index key; what is no number gets the largest scale, with which an infinity
 * saturates to one again. */
constexpr uint32_t kLargestScaleCode = 254;

__device__ __forceinline__ uint32_t scale_code_of(uint32_t amax_bits) {
    if (amax_bits >= kInfinityBits) return kLargestScaleCode;
    return __float_as_uint(scale_of<false>(__uint_as_float(amax_bits), kIndexUe8m0.floor)) >> 23;
}

__device__ __forceinline__ float reciprocal_of_code(uint32_t code) {
    return scale_of_code(kLargestScaleCode - code);
}

/* One group of value numbers, by a warp. numbers may lie in any memory; this group's begin at `first`. */
__device__ inline void pack_group(const uint8_t* numbers, dsa_format format, int32_t first, int32_t value_dim,
                                  const CompressedRow& row) {
    const int lane = threadIdx.x % 32, end = min(first + DSA_COMPRESSED_GROUP, value_dim);
    const int place[2] = {first + lane, first + lane + 32};
    float value[2];
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        value[i] = place[i] < end ? number_bf16(numbers, format, place[i]) : 0.0f;
        largest = max(largest, __float_as_uint(value[i]) & kMagnitudeBits);
    }
    const uint32_t code = scale_code_of(__reduce_max_sync(kAllLanes, largest));
    const float factor = reciprocal_of_code(code);
    const uint32_t codes = e4m3_encode_2(value[0] * factor, value[1] * factor);
    if (place[0] < end) row.numbers[place[0]] = (uint8_t)codes;
    if (place[1] < end) row.numbers[place[1]] = (uint8_t)(codes >> 8);
    if (lane == 0) row.scales[first / DSA_COMPRESSED_GROUP] = (uint8_t)code;
}

/* The bytes behind the scales, so that equal rows are equal bytes. */
__device__ __forceinline__ void clear_scale_padding(const CompressedRows& rows, const CompressedRow& row) {
    const int num_groups = (rows.value_dim + DSA_COMPRESSED_GROUP - 1) / DSA_COMPRESSED_GROUP;
    const int lane = threadIdx.x % 32;
    if (lane < rows.scale_bytes - num_groups) row.scales[num_groups + lane] = 0;
}

/* Part `part` of `num_parts` of a row of any size and alignment, by a warp. */
__device__ inline void pack_row(const CompressedRows& rows, const uint8_t* numbers, dsa_format format,
                                const CompressedRow& row, int part, int num_parts) {
    const int64_t number_bytes = format == DSA_BFLOAT16 ? 2 : 4;
    if (rows.format != DSA_FP8) {
        const int64_t share = (rows.head_dim + num_parts - 1) / num_parts, first = part * share;
        const int64_t n = min(share, rows.head_dim - first);
        if (n > 0)
            convert_row(numbers + first * number_bytes, format, n, rows.format,
                        row.numbers + first * (rows.format == DSA_BFLOAT16 ? 2 : 4));
        return;
    }
    for (int32_t first = part * DSA_COMPRESSED_GROUP; first < rows.value_dim; first += num_parts * DSA_COMPRESSED_GROUP)
        pack_group(numbers, format, first, rows.value_dim, row);
    if (part != num_parts - 1) return;
    clear_scale_padding(rows, row);
    convert_row(numbers + rows.value_dim * number_bytes, format, rows.head_dim - rows.value_dim, DSA_BFLOAT16,
                row.numbers + rows.value_dim);
}

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_COMPRESSED_ROW_CUH_ */
