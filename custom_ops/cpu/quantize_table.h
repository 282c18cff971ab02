/* The RowCodec of one instruction set; include it once from a file compiled for that set. */
#ifndef DSA_CPU_QUANTIZE_TABLE_H_
#define DSA_CPU_QUANTIZE_TABLE_H_

#include "quantize.h"
#include "quantize_vector.h"

namespace dsa {
namespace DSA_SIMD {

static float amax_bf16(const void* row, dsa_format input_format, int64_t n) {
    return input_format == DSA_BFLOAT16 ? row_amax_bf16((const uint16_t*)row, n) : row_amax_bf16((const float*)row, n);
}

static void to_e4m3(const void* row, dsa_format input_format, int64_t n, float scale, uint8_t* codes) {
    if (input_format == DSA_BFLOAT16)
        row_to_e4m3((const uint16_t*)row, n, scale, codes);
    else
        row_to_e4m3((const float*)row, n, scale, codes);
}

static void to_bf16(const void* row, dsa_format input_format, int64_t n, uint16_t* codes) {
    if (input_format == DSA_BFLOAT16)
        row_to_bf16((const uint16_t*)row, n, codes);
    else
        row_to_bf16((const float*)row, n, codes);
}

static void to_float32(const void* row, dsa_format input_format, int64_t n, float* values) {
    if (input_format == DSA_BFLOAT16)
        row_to_float32((const uint16_t*)row, n, values);
    else
        row_to_float32((const float*)row, n, values);
}

constexpr RowCodec kRowCodec = {amax_bf16, to_e4m3, to_bf16, to_float32};

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_QUANTIZE_TABLE_H_ */
