/* Rows of the paged latent cache on the device, four numbers at a time, in any format, size and alignment.
 *
 * fp8 and bfloat16 numbers come as bfloat16 pairs, which holds them exactly (cache_layout.h), float32 as float4.
 */
#ifndef DSA_GPU_LATENT_ROW_CUH_
#define DSA_GPU_LATENT_ROW_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "latent_cache.h"

namespace dsa {
namespace gpu {

struct LatentRows {
    const uint8_t* cache;
    int64_t block_stride_bytes;
    int64_t row_bytes;
    int64_t scale_offset;
    int64_t rope_offset;
    uint32_t num_slots;
    uint32_t block_size;
    int32_t block_shift; /* block_size is 1 << block_shift, or -1 */
    int32_t kv_lora_rank;
    int32_t width;  /* kv_lora_rank + qk_rope_head_dim */
    bool has_fours;    /* four neighbouring numbers of a part are aligned to their size, fp8 ropes to 4 bytes */
    bool has_sixteens; /* and whole rows to 16 bytes, of which they are a multiple */
};

static inline LatentRows make_latent_rows(const LatentLayout& layout, const uint8_t* cache) {
    LatentRows rows = {};
    rows.cache = cache;
    rows.block_stride_bytes = layout.block_stride_bytes;
    rows.row_bytes = layout.row_bytes;
    rows.scale_offset = layout.scale_offset;
    rows.rope_offset = layout.rope_offset;
    rows.num_slots = (uint32_t)layout.num_slots;
    rows.block_size = (uint32_t)layout.block_size;
    const bool is_power = (rows.block_size & (rows.block_size - 1)) == 0;
    rows.block_shift = is_power ? __builtin_ctz(rows.block_size) : -1;
    rows.kv_lora_rank = layout.kv_lora_rank;
    rows.width = layout.kv_lora_rank + layout.qk_rope_head_dim;
    const int64_t four_bytes = layout.format == DSA_FLOAT32 ? 16 : layout.format == DSA_BFLOAT16 ? 8 : 4;
    const int64_t starts = (int64_t)(uintptr_t)cache | rows.block_stride_bytes | rows.row_bytes | rows.rope_offset;
    rows.has_fours = starts % four_bytes == 0 && rows.kv_lora_rank % 4 == 0 && layout.qk_rope_head_dim % 4 == 0;
    const int64_t row_starts = (int64_t)(uintptr_t)cache | rows.block_stride_bytes | rows.row_bytes;
    rows.has_sixteens = rows.has_fours && row_starts % 16 == 0;
    return rows;
}

/* slot < num_slots */
__device__ __forceinline__ const uint8_t* latent_row(const LatentRows& rows, uint32_t slot) {
    const uint32_t block = rows.block_shift >= 0 ? slot >> rows.block_shift : slot / rows.block_size;
    return rows.cache + block * rows.block_stride_bytes + (slot - block * rows.block_size) * rows.row_bytes;
}

/* ---- fp8 numbers ---- */

__device__ __forceinline__ float e4m3_decode(uint32_t code) {
    if ((code & 0x7Fu) == 0x7Fu) return __uint_as_float(0x7FC00000u);
    /* The seven bits as a float's exponent and mantissa are 2^-120 times the number, denormals included. */
    return __uint_as_float((code & 0x80u) << 24 | (code & 0x7Fu) << 20) * 0x1p120f;
}

__device__ __forceinline__ float2 e4m3_decode_2(uint32_t codes) {
#if __CUDA_ARCH__ >= 890
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((uint16_t)codes));
    return __half22float2(*(const __half2*)&halves);
#else
    return make_float2(e4m3_decode(codes), e4m3_decode(codes >> 8));
#endif
}

/* bfloat16(e4m3 * scale) of two codes */
__device__ __forceinline__ uint32_t dequantize_2(uint32_t codes, float scale) {
    const float2 values = e4m3_decode_2(codes & 0xFFFFu);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values.x * scale, values.y * scale);
    return *(const uint32_t*)&pair;
}

/* ---- numbers one by one, where nothing is aligned ---- */

__device__ inline uint32_t load_bytes(const uint8_t* from, int num_bytes) {
    uint32_t bits = 0;
    for (int i = 0; i < num_bytes; ++i) bits |= (uint32_t)from[i] << (8 * i);
    return bits;
}

/* Number d as bfloat16 (fp8, bfloat16) or float32 bits; 0 behind the row. */
template <dsa_format kFormat>
__device__ inline uint32_t load_one(const LatentRows& rows, const uint8_t* row, int32_t d) {
    if (d >= rows.width) return 0;
    if (kFormat == DSA_FLOAT32) return load_bytes(row + 4 * (int64_t)d, 4);
    if (kFormat == DSA_BFLOAT16) return load_bytes(row + 2 * (int64_t)d, 2);
    if (d >= rows.kv_lora_rank) return load_bytes(row + rows.rope_offset + 2 * (int64_t)(d - rows.kv_lora_rank), 2);
    const float scale = __uint_as_float(load_bytes(row + rows.scale_offset + d / DSA_LATENT_GROUP * 4, 4));
    return dequantize_2(row[d], scale) & 0xFFFFu;
}

/* ---- four numbers ---- */

template <dsa_format kFormat>
struct FourNumbers {
    using Type = uint2; /* bfloat16 pairs */
};
template <>
struct FourNumbers<DSA_FLOAT32> {
    using Type = float4;
};

template <dsa_format kFormat>
using Four = typename FourNumbers<kFormat>::Type;

/* As load_four, of rows where nothing is aligned. */
template <dsa_format kFormat>
__device__ __noinline__ Four<kFormat> load_any_four(const LatentRows& rows, const uint8_t* row, int32_t d) {
    uint32_t one[4];
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
        const uint32_t bits = load_one<kFormat>(rows, row, d + i);
        if (i == 0) one[0] = bits;
        if (i == 1) one[1] = bits;
        if (i == 2) one[2] = bits;
        if (i == 3) one[3] = bits;
    }
    if constexpr (kFormat == DSA_FLOAT32)
        return make_float4(__uint_as_float(one[0]), __uint_as_float(one[1]), __uint_as_float(one[2]),
                           __uint_as_float(one[3]));
    else
        return {one[0] | one[1] << 16, one[2] | one[3] << 16};
}

/* Numbers d .. d + 3 of a row, d a multiple of 4; zeros behind the row. */
template <dsa_format kFormat>
__device__ __forceinline__ Four<kFormat> load_four(const LatentRows& rows, const uint8_t* row, int32_t d) {
    if (!rows.has_fours) return load_any_four<kFormat>(rows, row, d);
    if (d >= rows.width) return {};
    if constexpr (kFormat != DSA_FP8) {
        return __ldg((const Four<kFormat>*)row + d / 4);
    } else if (d < rows.kv_lora_rank) {
        const uint32_t codes = __ldg((const uint32_t*)(row + d));
        const float scale = __ldg((const float*)(row + rows.scale_offset) + d / DSA_LATENT_GROUP);
        return {dequantize_2(codes, scale), dequantize_2(codes >> 16, scale)};
    } else {
        const uint32_t* rope = (const uint32_t*)(row + rows.rope_offset + 2 * (int64_t)(d - rows.kv_lora_rank));
        return {__ldg(rope), __ldg(rope + 1)};
    }
}

__device__ __forceinline__ float4 as_floats(float4 four) { return four; }

__device__ __forceinline__ float4 as_floats(uint2 pairs) {
    return make_float4(__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xFFFF0000u),
                       __uint_as_float(pairs.y << 16), __uint_as_float(pairs.y & 0xFFFF0000u));
}

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_LATENT_ROW_CUH_ */
