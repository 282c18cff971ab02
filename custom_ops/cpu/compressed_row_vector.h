/* Reading compressed rows on vectors, bit for bit read_compressed_row. Include it only where simd.h may be included. */
#ifndef DSA_CPU_COMPRESSED_ROW_VECTOR_H_
#define DSA_CPU_COMPRESSED_ROW_VECTOR_H_

#include "compressed_row.h"
#include "quantize_vector.h"

namespace dsa {
namespace DSA_SIMD {

/* n <= DSA_COMPRESSED_GROUP numbers that share a scale */
static inline void load_compressed_group(const uint8_t* codes, int64_t n, float scale, float* values) {
    /* Full groups of numbers and a scale that may be multiplied by 2^8. */
    if (n == DSA_COMPRESSED_GROUP && scale < 0x1p119f && scale > 0x1p-119f) {
        bool has_nan = false;
#pragma GCC unroll 2
        for (int i = 0; i < DSA_COMPRESSED_GROUP; i += 4 * kLanes) has_nan |= has_e4m3_nan(codes + i);
        if (!has_nan) {
            const Vec factor = splat(scale * 256.0f);
#pragma GCC unroll 4
            for (int i = 0; i < DSA_COMPRESSED_GROUP; i += 2 * kLanes) {
                Vec low, high;
                load_finite_e4m3(codes + i, &low, &high);
                store(values + i, mul(low, factor));
                store(values + i + kLanes, mul(high, factor));
            }
            return;
        }
    }
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(values + i, mul(load_e4m3(codes + i), splat(scale)));
    for (; i < n; ++i) values[i] = e4m3_decode(codes[i]) * scale;
}

static void load_compressed_row(const CompressedLayout& layout, const uint8_t* data, const uint8_t* scales,
                                float* row) {
    if (layout.format == DSA_FLOAT32) return row_to_float32((const float*)data, layout.head_dim, row);
    if (layout.format == DSA_BFLOAT16) return row_to_float32((const uint16_t*)data, layout.head_dim, row);
    for (int64_t begin = 0; begin < layout.value_dim; begin += DSA_COMPRESSED_GROUP) {
        const int64_t rest = layout.value_dim - begin;
        const int64_t n = rest < DSA_COMPRESSED_GROUP ? rest : (int64_t)DSA_COMPRESSED_GROUP;
        load_compressed_group(data + begin, n, byte_scale(scales[begin / DSA_COMPRESSED_GROUP]), row + begin);
    }
    row_to_float32((const uint16_t*)(data + layout.value_dim), layout.qk_rope_head_dim, row + layout.value_dim);
}

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_COMPRESSED_ROW_VECTOR_H_ */
