/* How one compressed row is packed and unpacked; the ops over compressed rows share it. */
#ifndef DSA_CPU_COMPRESSED_ROW_H_
#define DSA_CPU_COMPRESSED_ROW_H_

#include <string.h>

#include "compressed_cache.h"
#include "quantize.h"

namespace dsa {

/* The byte stored for a power of two. Infinity and NaN, whose exponent would be 255, take the largest scale: numbers
 * that are not finite stay so in e4m3 * 2^127 or in e4m3 itself. */
static inline uint8_t scale_byte(float power_of_two) {
    const uint32_t exponent = (float_bits(power_of_two) >> 23) & 0xFFu;
    return (uint8_t)(exponent > 254u ? 254u : exponent);
}

/* 2^(byte - 127) */
static inline float byte_scale(uint8_t byte) {
    return float_from_bits(byte == 0 ? 0x00400000u : (uint32_t)byte << 23);
}

/* row is head_dim numbers in input_format; data and scales are those of its slot. Scale padding becomes zero, so that
 * equal rows give equal bytes. */
static inline void write_compressed_row(const CompressedLayout& layout, const RowCodec& codec, const void* row,
                                        dsa_format input_format, uint8_t* data, uint8_t* scales) {
    if (layout.format == DSA_FLOAT32) return codec.to_float32(row, input_format, layout.head_dim, (float*)data);
    if (layout.format == DSA_BFLOAT16) return codec.to_bf16(row, input_format, layout.head_dim, (uint16_t*)data);
    const int64_t number_bytes = input_format == DSA_FLOAT32 ? 4 : 2;
    const uint8_t* numbers = (const uint8_t*)row;
    int64_t group = 0;
    for (int64_t begin = 0; begin < layout.value_dim; begin += DSA_COMPRESSED_GROUP, ++group) {
        const int64_t rest = layout.value_dim - begin;
        const int64_t n = rest < DSA_COMPRESSED_GROUP ? rest : (int64_t)DSA_COMPRESSED_GROUP;
        const uint8_t* values = numbers + begin * number_bytes;
        scales[group] = scale_byte(ceil_pow2(index_scale(codec.amax_bf16(values, input_format, n))));
        codec.to_e4m3(values, input_format, n, byte_scale(scales[group]), data + begin);
    }
    memset(scales + group, 0, (size_t)(layout.scale_bytes - group));
    codec.to_bf16(numbers + layout.value_dim * number_bytes, input_format, layout.qk_rope_head_dim,
                  (uint16_t*)(data + layout.value_dim));
}

/* row [head_dim] := the numbers of a slot */
using ReadCompressedRow = void (*)(const CompressedLayout& layout, const uint8_t* data, const uint8_t* scales,
                                   float* row);

/* The definition. */
static inline void read_compressed_row(const CompressedLayout& layout, const uint8_t* data, const uint8_t* scales,
                                       float* row) {
    if (layout.format == DSA_FLOAT32) {
        memcpy(row, data, (size_t)layout.head_dim * sizeof(float));
        return;
    }
    const bool is_fp8 = layout.format == DSA_FP8;
    const int32_t value_dim = is_fp8 ? layout.value_dim : 0;
    for (int32_t i = 0; i < value_dim; ++i)
        row[i] = e4m3_decode(data[i]) * byte_scale(scales[i / DSA_COMPRESSED_GROUP]);
    const uint16_t* codes = (const uint16_t*)(data + value_dim);
    for (int32_t i = value_dim; i < layout.head_dim; ++i) row[i] = bf16_decode(codes[i - value_dim]);
}

extern const ReadCompressedRow read_compressed_row_avx2;
extern const ReadCompressedRow read_compressed_row_avx512;

}  // namespace dsa

#endif /* DSA_CPU_COMPRESSED_ROW_H_ */
