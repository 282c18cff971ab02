/* Scalar definitions of bfloat16, e4m3 and the power-of-two scale, in float32 arithmetic.
 *
 * Every vector version in this folder must agree with these bit for bit (tests/ops/test_number_formats.py).
 * Functions are static, so that a file compiled for one instruction set never lends its copy to another.
 */
#ifndef DSA_CPU_NUMBER_FORMATS_H_
#define DSA_CPU_NUMBER_FORMATS_H_

#include <stdint.h>
#include <string.h>

static const float kE4m3Max = 448.0f;
static const float kIndexAmaxFloor = 1e-4f;         /* on max |v| of an index query or key */
static const float kLatentScaleFloor = 1e-4f;       /* on max |v| / 448 of a latent group, ue8m0 scales */
static const float kPlainScaleFloor = 1.1754944e-38f; /* the same for plain scales: the smallest normal float32 */

static inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float bf16_decode(uint16_t code) { return float_from_bits((uint32_t)code << 16); }

/* Round to nearest even; NaN stays NaN (quiet, sign kept). */
static inline uint16_t bf16_encode(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static inline float bf16_round(float value) { return bf16_decode(bf16_encode(value)); }

/* Saturating at 448, round to nearest even, NaN to 0x7F. */
static inline uint8_t e4m3_encode(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint8_t sign = (uint8_t)((bits >> 24) & 0x80u);
    if (magnitude > 0x7F800000u) return 0x7F;
    float absolute = float_from_bits(magnitude);
    if (absolute > kE4m3Max) absolute = kE4m3Max;
    if (absolute < 0.015625f) { /* below 2^-6 the codes are multiples of 2^-9, the spacing of floats around 2^14 */
        const float shifted = absolute + 16384.0f;
        return (uint8_t)(sign | (float_bits(shifted) - float_bits(16384.0f)));
    }
    const uint32_t normal = float_bits(absolute);
    const uint32_t rounded = normal + 0x7FFFFu + ((normal >> 20) & 1u);
    return (uint8_t)(sign | ((rounded >> 20) - ((127u - 7u) << 3)));
}

static inline float e4m3_decode(uint8_t code) {
    const uint32_t exponent = (code >> 3) & 15u;
    const uint32_t mantissa = code & 7u;
    const float sign = (code & 0x80u) ? -1.0f : 1.0f;
    if ((code & 0x7Fu) == 0x7Fu) return float_from_bits(0x7FC00000u);
    if (exponent == 0) return sign * (float)mantissa * 0.001953125f;
    return sign * float_from_bits(((exponent + 120u) << 23) | (mantissa << 20));
}

/* The smallest power of two >= value, for normal positive values; infinity and NaN stay what they are. */
static inline float ceil_pow2(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return value;
    return float_from_bits((bits + 0x7FFFFFu) & 0x7F800000u);
}

#endif /* DSA_CPU_NUMBER_FORMATS_H_ */
