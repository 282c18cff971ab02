/* Number formats on the device, bit for bit the functions of cpu/number_formats.h and cpu/quantize.h.
 *
 * The unit of the fast paths is a group of 128 numbers that share a scale, 16 to each of 8 neighbouring lanes: three
 * shuffles find its largest number, and a lane's codes are one 16-byte store. Numbers become bfloat16 first, so a lane
 * keeps them as 8 pairs whatever the input format.
 */
#ifndef DSA_GPU_QUANTIZE_CUH_
#define DSA_GPU_QUANTIZE_CUH_

#include <cuda_runtime.h>
#include <stdint.h>

#include "dsa/common.h"

namespace dsa {
namespace gpu {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr uint32_t kInfinityBits = 0x7F800000u;
constexpr uint32_t kMagnitudeBits = 0x7FFFFFFFu;
constexpr float kE4m3Max = 448.0f;

constexpr int kNumbersPerLane = 16;
constexpr int kLanesPerGroup = 8;
constexpr int kGroupNumbers = kNumbersPerLane * kLanesPerGroup;

/* ---- bfloat16 ---- */

__device__ __forceinline__ float bf16_decode(uint32_t code) { return __uint_as_float(code << 16); }

/* Round to nearest even; NaN stays NaN (quiet, sign and payload kept, which the conversion instruction does not). */
__device__ __forceinline__ uint32_t bf16_encode(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & kMagnitudeBits) > kInfinityBits) return (bits >> 16) | 0x40u;
    return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ uint32_t bf16_pair(float first, float second) {
    return bf16_encode(first) | bf16_encode(second) << 16;
}

/* Of both codes of a pair: a NaN becomes quiet. */
__device__ __forceinline__ uint32_t quiet_pair(uint32_t pair) {
    const uint32_t low = (pair & 0x7FFFu) > 0x7F80u ? 0x40u : 0;
    const uint32_t high = (pair & 0x7FFF0000u) > 0x7F800000u ? 0x400000u : 0;
    return pair | low | high;
}

/* ---- e4m3 ---- */

/* Two codes, `first` in the low byte: saturating at 448, round to nearest even, NaN to 0x7F. */
__device__ __forceinline__ uint32_t e4m3_encode_software(float value) {
    const uint32_t bits = __float_as_uint(value);
    const uint32_t sign = (bits >> 24) & 0x80u;
    if ((bits & kMagnitudeBits) > kInfinityBits) return 0x7Fu;
    const float absolute = fminf(__uint_as_float(bits & kMagnitudeBits), kE4m3Max);
    if (absolute < 0.015625f) /* below 2^-6 the codes are multiples of 2^-9, the spacing of floats around 2^14 */
        return sign | (__float_as_uint(absolute + 16384.0f) - __float_as_uint(16384.0f));
    const uint32_t normal = __float_as_uint(absolute);
    const uint32_t rounded = normal + 0x7FFFFu + ((normal >> 20) & 1u);
    return sign | ((rounded >> 20) - ((127u - 7u) << 3));
}

__device__ __forceinline__ uint32_t e4m3_encode_2(float first, float second) {
#if __CUDA_ARCH__ >= 890
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
    return codes;
#else
    return e4m3_encode_software(first) | e4m3_encode_software(second) << 8;
#endif
}

/* ---- scales ---- */

/* scale = max(wanted(a / 448), floor) for a = max |v|, where wanted is the number itself or the next power of two.
 * The headers put some floors on a instead; rounding is monotonic, so a floor moves through the division and through
 * the next power of two. */
struct ScaleRule {
    float floor;
    bool is_plain;
};

constexpr float kIndexAmaxFloor = 1e-4f;
constexpr ScaleRule kLatentUe8m0 = {1.0f / (1 << 13), false};         /* the power of two above 1e-4 */
constexpr ScaleRule kLatentPlain = {1.1754944e-38f, true};            /* the smallest normal float32 */
constexpr ScaleRule kIndexUe8m0 = {1.0f / (1 << 22), false};          /* the power of two above 1e-4 / 448 */
constexpr ScaleRule kIndexPlain = {kIndexAmaxFloor / kE4m3Max, true};

static inline ScaleRule latent_scale_rule(dsa_scale_format format) {
    return format == DSA_SCALE_PLAIN ? kLatentPlain : kLatentUe8m0;
}

static inline ScaleRule index_scale_rule(dsa_scale_format format) {
    return format == DSA_SCALE_PLAIN ? kIndexPlain : kIndexUe8m0;
}

/* For a bfloat16 number amax >= 0, infinity or quiet NaN; the latter two stay what they are.
 * amax = m * 2^e is above 448 * 2^(e - 8) exactly if m > 1.75, and no quotient of a bfloat16 rounds to a power of two
 * that it does not equal: adding the rest of the mantissa above 1.75 carries into the exponent where it must. */
template <bool kIsPlain>
__device__ __forceinline__ float scale_of(float amax, float floor) {
    const uint32_t bits = __float_as_uint(amax);
    if (bits >= kInfinityBits) return amax;
    if (kIsPlain) return fmaxf(__fdiv_rn(amax, kE4m3Max), floor);
    const int32_t power = (int32_t)((bits + 0x1FFFFFu) & kInfinityBits) - (8 << 23);
    return __int_as_float(max(power, __float_as_int(floor)));
}

/* Divides by a scale: by its exact reciprocal where it is a power of two. */
template <bool kIsPlain>
struct Divider {
    float factor;

    __device__ __forceinline__ explicit Divider(float scale) : factor(scale) {
        const uint32_t bits = __float_as_uint(scale);
        if (!kIsPlain && bits < kInfinityBits) factor = __uint_as_float((254u << 23) - bits);
        if (!kIsPlain && bits == kInfinityBits) factor = 0.0f;
    }
    __device__ __forceinline__ float divide(float value) const {
        return kIsPlain ? __fdiv_rn(value, factor) : value * factor;
    }
};

/* ---- groups of 128 numbers, 16 a lane ---- */

struct LanePairs {
    uint32_t pair[kNumbersPerLane / 2]; /* bfloat16, earlier number in the low half */
};

/* Loads that stay where they are written: left to itself the compiler moves the loads of numbers behind the branch on
 * a slot, where a second wait for memory begins. From the L2 cache: a launch that overlaps the one before must not find
 * old lines of the first-level cache, and nothing is read twice. */
__device__ __forceinline__ uint4 load_16(const void* from) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ uint2 load_8(const void* from) {
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}

__device__ __forceinline__ uint32_t load_4(const void* from) {
    uint32_t v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}

__device__ __forceinline__ int64_t load_slot(const int64_t* from) {
    int64_t slot;
    asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(slot) : "l"(from));
    return slot;
}

/* As they lie in memory, 16-byte aligned. */
template <typename Input>
struct LaneNumbers {
    uint4 piece[kNumbersPerLane * sizeof(Input) / 16];
};

template <typename Input>
__device__ __forceinline__ LaneNumbers<Input> load_lane(const Input* numbers) {
    LaneNumbers<Input> loaded;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(loaded) / 16); ++i) loaded.piece[i] = load_16((const uint4*)numbers + i);
    return loaded;
}

__device__ __forceinline__ LanePairs pairs_of(const LaneNumbers<uint16_t>& numbers) {
    const uint4 low = numbers.piece[0], high = numbers.piece[1];
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

__device__ __forceinline__ uint32_t pair_of_bits(uint32_t first, uint32_t second) {
    return bf16_pair(__uint_as_float(first), __uint_as_float(second));
}

__device__ __forceinline__ LanePairs pairs_of(const LaneNumbers<float>& numbers) {
    LanePairs pairs;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        pairs.pair[2 * i] = pair_of_bits(numbers.piece[i].x, numbers.piece[i].y);
        pairs.pair[2 * i + 1] = pair_of_bits(numbers.piece[i].z, numbers.piece[i].w);
    }
    return pairs;
}

/* max |v| of the group as float32 bits, in all its lanes. Magnitudes are compared as integers: a NaN is larger than
 * every number and so survives. All lanes of the warp must call. */
__device__ __forceinline__ uint32_t group_amax_bits(const LanePairs& pairs) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kNumbersPerLane / 2; ++i) largest = __vmaxu2(largest, pairs.pair[i] & 0x7FFF7FFFu);
#pragma unroll
    for (int step = kLanesPerGroup / 2; step > 0; step /= 2)
        largest = __vmaxu2(largest, __shfl_xor_sync(kAllLanes, largest, step));
    return max(largest << 16, largest & 0xFFFF0000u);
}

/* As group_amax_bits, of bfloat16(v): that a NaN becomes quiet may change which one is the largest. */
__device__ __forceinline__ float group_amax(LanePairs& pairs) {
    const uint32_t amax = group_amax_bits(pairs);
    if (!__any_sync(kAllLanes, amax > kInfinityBits)) return __uint_as_float(amax);
#pragma unroll
    for (int i = 0; i < kNumbersPerLane / 2; ++i) pairs.pair[i] = quiet_pair(pairs.pair[i]);
    return __uint_as_float(group_amax_bits(pairs));
}

template <bool kIsPlain>
__device__ __forceinline__ uint32_t e4m3_of_pairs(uint32_t first, uint32_t second, const Divider<kIsPlain>& by) {
    const uint32_t low =
        e4m3_encode_2(by.divide(__uint_as_float(first << 16)), by.divide(__uint_as_float(first & 0xFFFF0000u)));
    const uint32_t high =
        e4m3_encode_2(by.divide(__uint_as_float(second << 16)), by.divide(__uint_as_float(second & 0xFFFF0000u)));
    return low | high << 16;
}

template <bool kIsPlain>
__device__ __forceinline__ uint4 lane_codes(const LanePairs& pairs, float scale) {
    const Divider<kIsPlain> by(scale);
    return {e4m3_of_pairs(pairs.pair[0], pairs.pair[1], by), e4m3_of_pairs(pairs.pair[2], pairs.pair[3], by),
            e4m3_of_pairs(pairs.pair[4], pairs.pair[5], by), e4m3_of_pairs(pairs.pair[6], pairs.pair[7], by)};
}

/* ---- rows of any length and alignment, by one warp ---- */

/* Bytes one by one: a cache need not be aligned to its numbers. */
__device__ __forceinline__ void store_2(uint8_t* to, uint32_t code) {
    to[0] = (uint8_t)code;
    to[1] = (uint8_t)(code >> 8);
}

__device__ __forceinline__ void store_4(uint8_t* to, uint32_t bits) {
    store_2(to, bits);
    store_2(to + 2, bits >> 16);
}

/* The bits of number i as float32. */
__device__ __forceinline__ uint32_t number_bits(const uint8_t* numbers, dsa_format format, int64_t i) {
    return format == DSA_BFLOAT16 ? (uint32_t)((const uint16_t*)numbers)[i] << 16 : ((const uint32_t*)numbers)[i];
}

__device__ __forceinline__ float number_bf16(const uint8_t* numbers, dsa_format format, int64_t i) {
    return bf16_decode(bf16_encode(__uint_as_float(number_bits(numbers, format, i))));
}

template <bool kIsPlain>
__device__ inline float quantize_row_with(const uint8_t* numbers, dsa_format format, int64_t n, float amax, float floor,
                                          uint8_t* to) {
    const float scale = scale_of<kIsPlain>(amax, floor);
    const Divider<kIsPlain> by(scale);
#pragma unroll 1
    for (int64_t i = threadIdx.x % 32; i < n; i += 32)
        to[i] = (uint8_t)e4m3_encode_2(by.divide(number_bf16(numbers, format, i)), 0.0f);
    return scale;
}

/* Codes of numbers [0, n) at `to`; returns their scale. */
__device__ inline float quantize_row(const uint8_t* numbers, dsa_format format, int64_t n, const ScaleRule& rule,
                                     uint8_t* to) {
    uint32_t largest = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x % 32; i < n; i += 32)
        largest = max(largest, __float_as_uint(number_bf16(numbers, format, i)) & kMagnitudeBits);
    const float amax = __uint_as_float(__reduce_max_sync(kAllLanes, largest));
    return rule.is_plain ? quantize_row_with<true>(numbers, format, n, amax, rule.floor, to)
                         : quantize_row_with<false>(numbers, format, n, amax, rule.floor, to);
}

/* Numbers [0, n) as bfloat16 or float32 at `to`. */
__device__ inline void convert_row(const uint8_t* numbers, dsa_format format, int64_t n, dsa_format to_format,
                                   uint8_t* to) {
#pragma unroll 1
    for (int64_t i = threadIdx.x % 32; i < n; i += 32) {
        const uint32_t bits = number_bits(numbers, format, i);
        if (to_format == DSA_FLOAT32)
            store_4(to + 4 * i, bits);
        else
            store_2(to + 2 * i, bf16_encode(__uint_as_float(bits)));
    }
}

/* As convert_row, four numbers at a time: n is a multiple of 4, and four numbers are aligned to their size. */
__device__ inline void convert_row_by_4(const uint8_t* numbers, dsa_format format, int64_t n, dsa_format to_format,
                                        uint8_t* to) {
#pragma unroll 2
    for (int64_t i = threadIdx.x % 32; i < n / 4; i += 32) {
        uint4 bits;
        if (format == DSA_FLOAT32) {
            bits = load_16((const uint4*)numbers + i);
        } else {
            const uint2 pairs = load_8((const uint2*)numbers + i);
            bits = {pairs.x << 16, pairs.x & 0xFFFF0000u, pairs.y << 16, pairs.y & 0xFFFF0000u};
        }
        if (to_format == DSA_FLOAT32)
            ((uint4*)to)[i] = bits;
        else
            ((uint2*)to)[i] = {pair_of_bits(bits.x, bits.y), pair_of_bits(bits.z, bits.w)};
    }
}

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_QUANTIZE_CUH_ */
