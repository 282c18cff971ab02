/* Row loops of the ops that write a cache format, chosen once per call by instruction set.
 *
 * A row is n numbers in input_format, DSA_FLOAT32 or DSA_BFLOAT16. All levels give the same bits.
 */
#ifndef DSA_CPU_QUANTIZE_H_
#define DSA_CPU_QUANTIZE_H_

#include "dispatch.h"
#include "dsa/common.h"
#include "number_formats.h"

namespace dsa {

struct RowCodec {
    /* max |bfloat16(row[i])|, 0 when n is 0, NaN when there is one */
    float (*amax_bf16)(const void* row, dsa_format input_format, int64_t n);
    /* codes[i] = e4m3(bfloat16(row[i]) / scale) */
    void (*to_e4m3)(const void* row, dsa_format input_format, int64_t n, float scale, uint8_t* codes);
    /* codes[i] = bfloat16(row[i]) */
    void (*to_bf16)(const void* row, dsa_format input_format, int64_t n, uint16_t* codes);
    /* values[i] = row[i] */
    void (*to_float32)(const void* row, dsa_format input_format, int64_t n, float* values);
};

extern const RowCodec kRowCodecScalar;
extern const RowCodec kRowCodecAvx2;
extern const RowCodec kRowCodecAvx512;

static inline const RowCodec* row_codec(dsa_isa isa) {
#if DSA_X86
    if (isa >= DSA_ISA_AVX512) return &kRowCodecAvx512;
    if (isa == DSA_ISA_AVX2) return &kRowCodecAvx2;
#else
    (void)isa;
#endif
    return &kRowCodecScalar;
}

/* The wanted scale of an index query or key; a NaN in the row makes it NaN. */
static inline float index_scale(float amax) {
    const float floored = amax < kIndexAmaxFloor ? kIndexAmaxFloor : amax;
    return floored / kE4m3Max;
}

}  // namespace dsa

#endif /* DSA_CPU_QUANTIZE_H_ */
