/* The kernels of sparse_mla, written once over simd.h; include it once from a file compiled for one instruction set.
 *
 * A register block holds kLanes accumulators: heads x keys where queries meet keys, heads x vectors of latent numbers
 * where probabilities meet keys. Lanes run over the numbers of a row in both, so that any number of heads is fast.
 * The sum for one (head, key) or (head, number) has the same order in every block shape.
 */
#ifndef DSA_CPU_SPARSE_MLA_VECTOR_H_
#define DSA_CPU_SPARSE_MLA_VECTOR_H_

#include <string.h>

#include "quantize_vector.h"
#include "simd.h"
#include "sparse_mla_kernels.h"

namespace dsa {
namespace DSA_SIMD {

static inline void clear(float* begin, float* end) {
    if (begin < end) memset(begin, 0, (size_t)(end - begin) * sizeof(float));
}

/* ---- load ---- */

template <typename Number>
static inline void load_padded(const Number* numbers, int32_t n, float* values, int32_t width) {
    row_to_float32(numbers, n, values);
    clear(values + n, values + width);
}

template <typename Number>
static void load_query_numbers(const SparseMla& call, int64_t row, int32_t num_rows, float* query) {
    const int32_t latent = call.layout.kv_lora_rank, rope = call.layout.qk_rope_head_dim;
    for (int32_t h = 0; h < num_rows; ++h, query += call.row_width) {
        const Number* numbers = (const Number*)call.params->query + (row + h) * (latent + rope);
        load_padded(numbers, latent, query, call.latent_width);
        load_padded(numbers + latent, rope, query + call.latent_width, call.row_width - call.latent_width);
    }
}

static void load_query(const SparseMla& call, int64_t token, int32_t head_begin, int32_t num_heads, float* query) {
    const int64_t row = token * call.params->num_heads + head_begin;
    if (call.params->query_format == DSA_BFLOAT16)
        load_query_numbers<uint16_t>(call, row, num_heads, query);
    else
        load_query_numbers<float>(call, row, num_heads, query);
}

/* Whether a group is full, has no NaN, and as its scale a power of two far from overflow and from denormal products, so
 * that the products are bfloat16 numbers without rounding and the scale may be multiplied by 2^8. */
static inline bool is_exact_group(const uint8_t* codes, int32_t n, float scale) {
    if (n != DSA_LATENT_GROUP || (float_bits(scale) & 0x7FFFFFu) != 0) return false;
    if (!(__builtin_fabsf(scale) < 0x1p119f && __builtin_fabsf(scale) > 0x1p-119f)) return false;
    bool has_nan = false;
#pragma GCC unroll 4
    for (int32_t i = 0; i < DSA_LATENT_GROUP; i += 4 * kLanes) has_nan |= has_e4m3_nan(codes + i);
    return !has_nan;
}

/* n <= DSA_LATENT_GROUP numbers that share a scale */
static inline void load_fp8_group(const uint8_t* codes, int32_t n, float scale, float* values) {
    if (is_exact_group(codes, n, scale)) {
        const Vec factor = splat(scale * 256.0f);
#pragma GCC unroll 8
        for (int32_t i = 0; i < DSA_LATENT_GROUP; i += 2 * kLanes) {
            Vec low, high;
            load_finite_e4m3(codes + i, &low, &high);
            store(values + i, mul(low, factor));
            store(values + i + kLanes, mul(high, factor));
        }
        return;
    }
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(values + i, bf16_round(mul(load_e4m3(codes + i), splat(scale))));
    for (; i < n; ++i) values[i] = ::bf16_round(e4m3_decode(codes[i]) * scale);
}

static inline void load_fp8_latent(const LatentLayout& layout, const uint8_t* row, float* values) {
    for (int32_t begin = 0; begin < layout.kv_lora_rank; begin += DSA_LATENT_GROUP) {
        const int32_t rest = layout.kv_lora_rank - begin;
        float scale;
        memcpy(&scale, row + layout.scale_offset + begin / DSA_LATENT_GROUP * 4, sizeof scale);
        load_fp8_group(row + begin, rest < DSA_LATENT_GROUP ? rest : (int32_t)DSA_LATENT_GROUP, scale, values + begin);
    }
}

static inline void load_key(const SparseMla& call, const uint8_t* row, float* key) {
    const LatentLayout& layout = call.layout;
    const uint8_t* row_rope = row + layout.rope_offset;
    float* key_rope = key + call.latent_width;
    const int32_t rope_width = call.row_width - call.latent_width;
    if (layout.format == DSA_FLOAT32) {
        load_padded((const float*)row, layout.kv_lora_rank, key, call.latent_width);
        load_padded((const float*)row_rope, layout.qk_rope_head_dim, key_rope, rope_width);
        return;
    }
    if (layout.format == DSA_BFLOAT16) {
        load_padded((const uint16_t*)row, layout.kv_lora_rank, key, call.latent_width);
    } else {
        load_fp8_latent(layout, row, key);
        clear(key + layout.kv_lora_rank, key_rope);
    }
    load_padded((const uint16_t*)row_rope, layout.qk_rope_head_dim, key_rope, rope_width);
}

enum class Near { kL1, kL2 };

/* Asks for a row; how near is a template argument because the instruction wants a constant. */
template <Near kNear>
static inline void prefetch_row(const SparseMla& call, int32_t slot) {
    const uint8_t* row = call.params->latent_cache + latent_row_offset(&call.layout, slot);
    for (int64_t byte = 0; byte < call.layout.row_bytes; byte += 64)
        __builtin_prefetch(row + byte, 0, kNear == Near::kL1 ? 3 : 2);
}

/* Decodes the rows of slots; after_row(row, j) runs while row j is in the L1 cache. */
template <typename AfterRow>
static inline void load_each_key(const SparseMla& call, const SlotRange& slots, float* keys,
                                 const AfterRow& after_row) {
    constexpr int32_t kRowsAhead = 2; /* more would push the keys out of the L1 cache */
    const int64_t width = call.row_width;
    for (int32_t j = 0; j < slots.size; ++j) {
        if (j + kRowsAhead < slots.size) prefetch_row<Near::kL1>(call, slots.slot_ids[j + kRowsAhead]);
        float* key = keys + j * width;
        load_key(call, call.params->latent_cache + latent_row_offset(&call.layout, slots.slot_ids[j]), key);
        after_row(key, j);
    }
    /* Score blocks take up to kLanes keys at a time; scores of these rows are thrown away. */
    for (int32_t j = slots.size; j % kLanes != 0; ++j) {
        clear(keys + j * width, keys + (j + 1) * width);
        after_row(keys + j * width, j);
    }
}

static void load_keys(const SparseMla& call, const SlotRange& slots, float* keys) {
    load_each_key(call, slots, keys, [](const float*, int32_t) {});
}

/* ---- score: z = query . key ---- */

static inline Vec load_operand(const float* p) { return load(p); }
static inline Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
#if defined(__AVX512BF16__)
/* Two numbers a lane: their exact products are added to the lane's sum one after the other. */
static inline __m512bh load_operand(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
static inline Vec multiply_add(__m512bh a, __m512bh b, Vec sum) { return _mm512_dpbf16_ps(sum, a, b); }
#endif

/* width is a multiple of the numbers in a vector */
template <int kHeads, typename Number>
static inline void score_block(const Number* query, const Number* keys, int32_t width, float* scores) {
    constexpr int kKeys = kLanes / kHeads;
    constexpr int kNumbers = kLanes * (int)sizeof(float) / (int)sizeof(Number);
    Vec sums[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = zero();
#pragma GCC unroll 2 /* AVX2: 8 FMAs take 4 cycles, the loop's own instructions would take a fifth */
    for (int32_t d = 0; d < width; d += kNumbers) {
        decltype(load_operand(keys)) key[kKeys];
#pragma GCC unroll 16
        for (int j = 0; j < kKeys; ++j) key[j] = load_operand(keys + j * (int64_t)width + d);
#pragma GCC unroll 16
        for (int h = 0; h < kHeads; ++h) {
            const auto q = load_operand(query + h * (int64_t)width + d);
#pragma GCC unroll 16
            for (int j = 0; j < kKeys; ++j) sums[h * kKeys + j] = multiply_add(q, key[j], sums[h * kKeys + j]);
        }
    }
    float block[kLanes];
    store(block, reduce_add_each(sums));
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) memcpy(scores + h * kKeysPerChunk, block + h * kKeys, kKeys * sizeof(float));
}

/* Spreads the memory reads of the next chunk over the score blocks of this one. */
struct Prefetcher {
    const SparseMla& call;
    SlotRange rest;
    int32_t rows_per_block;

    void step() {
        for (int32_t i = 0; i < rows_per_block && rest.size > 0; ++i, ++rest.slot_ids, --rest.size)
            prefetch_row<Near::kL2>(call, *rest.slot_ids);
    }
};

template <int kHeads, typename Number>
static inline void score_heads(const Number* query, const Number* keys, int32_t width, int32_t num_keys, float* scores,
                               Prefetcher* prefetcher) {
    constexpr int kKeys = kLanes / kHeads;
    for (int32_t j = 0; j < num_keys; j += kKeys) {
        prefetcher->step();
        score_block<kHeads>(query, keys + (int64_t)j * width, width, scores + j);
    }
}

template <typename Number>
static inline void score(const SparseMla& call, const Number* query, const Number* keys, int32_t width,
                         int32_t num_heads, int32_t num_keys, const SlotRange& next, float* scores) {
    const int64_t num_blocks = (int64_t)num_heads * num_keys / kLanes + 1;
    Prefetcher prefetcher = {call, next, (int32_t)((next.size + num_blocks - 1) / num_blocks)};
    int32_t h = 0;
    for (; h + 4 <= num_heads; h += 4)
        score_heads<4>(query + (int64_t)h * width, keys, width, num_keys, scores + h * kKeysPerChunk, &prefetcher);
    for (; h + 2 <= num_heads; h += 2)
        score_heads<2>(query + (int64_t)h * width, keys, width, num_keys, scores + h * kKeysPerChunk, &prefetcher);
    if (h < num_heads)
        score_heads<1>(query + (int64_t)h * width, keys, width, num_keys, scores + h * kKeysPerChunk, &prefetcher);
}

/* ---- softmax over the keys of a chunk, in place ---- */

static inline void softmax_head(float* scores, int32_t num_keys, float softmax_scale, float* max_out, float* sum_out) {
    const int32_t width = (num_keys + kLanes - 1) / kLanes * kLanes;
    for (int32_t j = 0; j < width; j += kLanes) store(scores + j, mul(load(scores + j), splat(softmax_scale)));
    for (int32_t j = num_keys; j < width; ++j) scores[j] = -__builtin_inff();
    /* The lowest finite number, so that scores of -inf alone give sum 0 here and can be merged. NaN is passed over. */
    Vec running = splat(-__FLT_MAX__);
    for (int32_t j = 0; j < width; j += kLanes) running = max(load(scores + j), running);
    const float largest = reduce_max(running);
    Vec sums = zero();
    for (int32_t j = 0; j < width; j += kLanes) {
        const Vec p = exp_nonpositive(sub(load(scores + j), splat(largest)));
        store(scores + j, p);
        sums = add(sums, p);
    }
    *max_out = largest;
    *sum_out = reduce_add(sums);
}

static inline void softmax(const SparseMla& call, int32_t num_heads, int32_t num_keys, float* scores,
                           const SparseMlaPartial& partial) {
    for (int32_t h = 0; h < num_heads; ++h)
        softmax_head(scores + h * kKeysPerChunk, num_keys, call.params->softmax_scale, partial.max + h,
                     partial.sum + h);
}

/* ---- weigh: out = sum of probability * latent ---- */

template <int kHeads, int kVectors>
static inline void weigh_block(const float* probabilities, const float* keys, int32_t row_width, int32_t num_keys,
                               float* out, int32_t latent_width) {
    Vec sums[kHeads * kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kHeads * kVectors; ++i) sums[i] = zero();
    for (int32_t j = 0; j < num_keys; ++j, keys += row_width) {
        Vec key[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) key[v] = load(keys + v * kLanes);
#pragma GCC unroll 16
        for (int h = 0; h < kHeads; ++h) {
            const Vec p = splat(probabilities[h * kKeysPerChunk + j]);
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) sums[h * kVectors + v] = fma(p, key[v], sums[h * kVectors + v]);
        }
    }
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
            store(out + h * (int64_t)latent_width + v * kLanes, sums[h * kVectors + v]);
}

template <int kHeads>
static inline void weigh_heads(const SparseMla& call, const float* probabilities, const float* keys, int32_t num_keys,
                               float* out) {
    constexpr int kVectors = kLanes / kHeads;
    int32_t d = 0;
    for (; d + kVectors * kLanes <= call.latent_width; d += kVectors * kLanes)
        weigh_block<kHeads, kVectors>(probabilities, keys + d, call.row_width, num_keys, out + d, call.latent_width);
    for (; d < call.latent_width; d += kLanes)
        weigh_block<kHeads, 1>(probabilities, keys + d, call.row_width, num_keys, out + d, call.latent_width);
}

static inline void weigh(const SparseMla& call, const float* probabilities, const float* keys, int32_t num_heads,
                         int32_t num_keys, float* out) {
    const int64_t width = call.latent_width;
    int32_t h = 0;
    for (; h + 4 <= num_heads; h += 4)
        weigh_heads<4>(call, probabilities + h * kKeysPerChunk, keys, num_keys, out + h * width);
    for (; h + 2 <= num_heads; h += 2)
        weigh_heads<2>(call, probabilities + h * kKeysPerChunk, keys, num_keys, out + h * width);
    if (h < num_heads) weigh_heads<1>(call, probabilities + h * kKeysPerChunk, keys, num_keys, out + h * width);
}

/* Bound: num_heads * num_keys * 2 * (2 * kv_lora_rank + qk_rope_head_dim) FLOP from the L2 cache. */
static void attend(const SparseMla& call, const float* query, const float* keys, int32_t num_heads, int32_t num_keys,
                   const SlotRange& next, float* probabilities, const SparseMlaPartial& partial) {
    score(call, query, keys, call.row_width, num_heads, num_keys, next, probabilities);
    softmax(call, num_heads, num_keys, probabilities, partial);
    weigh(call, probabilities, keys, num_heads, num_keys, partial.out);
}

/* ---- merge and store ---- */

static inline float first_lane(Vec v) {
    float lanes[kLanes];
    store(lanes, v);
    return lanes[0];
}

static void merge(const SparseMla& call, int32_t num_heads, const SparseMlaPartial& from,
                  const SparseMlaPartial& into) {
    for (int32_t h = 0; h < num_heads; ++h) {
        const float largest = from.max[h] > into.max[h] ? from.max[h] : into.max[h];
        const Vec weight_from = exp_nonpositive(splat(from.max[h] - largest));
        const Vec weight_into = exp_nonpositive(splat(into.max[h] - largest));
        const float* source = from.out + (int64_t)h * call.latent_width;
        float* target = into.out + (int64_t)h * call.latent_width;
        for (int32_t d = 0; d < call.latent_width; d += kLanes)
            store(target + d, fma(load(source + d), weight_from, mul(load(target + d), weight_into)));
        into.sum[h] = first_lane(fma(splat(from.sum[h]), weight_from, mul(splat(into.sum[h]), weight_into)));
        into.max[h] = largest;
    }
}

static inline void store_numbers(const float* values, int32_t n, float factor, float* out) {
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, mul(load(values + i), splat(factor)));
    for (; i < n; ++i) out[i] = values[i] * factor;
}

static inline void store_numbers(const float* values, int32_t n, float factor, uint16_t* out) {
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_bf16(out + i, mul(load(values + i), splat(factor)));
    for (; i < n; ++i) out[i] = bf16_encode(values[i] * factor);
}

static void store_result(const SparseMla& call, int64_t token, int32_t head_begin, int32_t num_heads,
                         const SparseMlaPartial& partial) {
    const dsa_sparse_mla_params& p = *call.params;
    for (int32_t h = 0; h < num_heads; ++h) {
        const int64_t row = token * p.num_heads + head_begin + h;
        const float* values = partial.out + (int64_t)h * call.latent_width;
        const float factor = 1.0f / partial.sum[h];
        if (p.query_format == DSA_BFLOAT16)
            store_numbers(values, p.kv_lora_rank, factor, (uint16_t*)p.out + row * p.kv_lora_rank);
        else
            store_numbers(values, p.kv_lora_rank, factor, (float*)p.out + row * p.kv_lora_rank);
        if (p.lse != nullptr) p.lse[row] = partial.max[h] + __builtin_logf(partial.sum[h]);
    }
}

constexpr SparseMlaKernels kSparseMlaKernels = {load_query, load_keys, attend, merge, store_result};

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_SPARSE_MLA_VECTOR_H_ */
