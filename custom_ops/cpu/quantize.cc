#include "quantize.h"

#include "number_formats.h"

namespace dsa {
namespace {

float number(const void* row, dsa_format input_format, int64_t i) {
    return input_format == DSA_BFLOAT16 ? bf16_decode(((const uint16_t*)row)[i]) : ((const float*)row)[i];
}

float amax_bf16(const void* row, dsa_format input_format, int64_t n) {
    uint32_t largest = 0; /* compared as integers: a NaN is larger than every number and so survives */
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t magnitude = float_bits(bf16_round(number(row, input_format, i))) & 0x7FFFFFFFu;
        if (magnitude > largest) largest = magnitude;
    }
    return float_from_bits(largest);
}

void to_e4m3(const void* row, dsa_format input_format, int64_t n, float scale, uint8_t* codes) {
    for (int64_t i = 0; i < n; ++i) codes[i] = e4m3_encode(bf16_round(number(row, input_format, i)) / scale);
}

void to_bf16(const void* row, dsa_format input_format, int64_t n, uint16_t* codes) {
    for (int64_t i = 0; i < n; ++i) codes[i] = bf16_encode(number(row, input_format, i));
}

void to_float32(const void* row, dsa_format input_format, int64_t n, float* values) {
    for (int64_t i = 0; i < n; ++i) values[i] = number(row, input_format, i);
}

}  // namespace

const RowCodec kRowCodecScalar = {amax_bf16, to_e4m3, to_bf16, to_float32};

}  // namespace dsa
