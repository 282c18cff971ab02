/* The kernels of row_attention.h, written once over simd.h; include it once from a file compiled for one instruction
 * set.
 *
 * An op says where the rows of its ids lie by a struct Rows with two functions:
 *   static RowMemory memory(const RowAttention& call, int32_t id)           what a prefetch has to bring
 *   static void load(const RowAttention& call, int32_t id, float* row)      row [row_width] := the row, padded
 *
 * A register block holds kLanes accumulators: heads x keys where queries meet keys, heads x vectors of value numbers
 * where probabilities meet keys. Lanes run over the numbers of a row in both, so that any number of heads is fast.
 * The sum for one (head, key) or (head, number) has the same order in every block shape.
 */
#ifndef DSA_CPU_ROW_ATTENTION_VECTOR_H_
#define DSA_CPU_ROW_ATTENTION_VECTOR_H_

#include <string.h>

#include "quantize_vector.h"
#include "row_attention.h"
#include "simd.h"

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
static void load_query_numbers(const RowAttention& call, int64_t row, int32_t num_rows, float* query) {
    const int32_t value = call.value_dim, rest = call.key_only_dim;
    for (int32_t h = 0; h < num_rows; ++h, query += call.row_width) {
        const Number* numbers = (const Number*)call.query + (row + h) * (value + rest);
        load_padded(numbers, value, query, call.value_width);
        load_padded(numbers + value, rest, query + call.value_width, call.row_width - call.value_width);
    }
}

static void load_query(const RowAttention& call, int64_t token, int32_t head_begin, int32_t num_heads, float* query) {
    const int64_t row = token * call.num_heads + head_begin;
    if (call.query_format == DSA_BFLOAT16)
        load_query_numbers<uint16_t>(call, row, num_heads, query);
    else
        load_query_numbers<float>(call, row, num_heads, query);
}

struct RowMemory {
    const uint8_t* row;
    int64_t bytes;
    const uint8_t* scales; /* in one cache line, wherever that is */
};

enum class Near { kL1, kL2 };

/* Asks for a row; how near is a template argument because the instruction wants a constant. */
template <Near kNear>
static inline void prefetch_row(const RowMemory& memory) {
    constexpr int kLocality = kNear == Near::kL1 ? 3 : 2;
    for (int64_t byte = 0; byte < memory.bytes; byte += 64) __builtin_prefetch(memory.row + byte, 0, kLocality);
    __builtin_prefetch(memory.scales, 0, kLocality);
}

/* Decodes the rows of ids; after_row(row, j) runs while row j is in the L1 cache. */
template <typename Rows, typename AfterRow>
static inline void load_each_key(const RowAttention& call, const IdRange& range, float* keys,
                                 const AfterRow& after_row) {
    constexpr int32_t kRowsAhead = 2; /* more would push the keys out of the L1 cache */
    const int64_t width = call.row_width;
    for (int32_t j = 0; j < range.size; ++j) {
        if (j + kRowsAhead < range.size) prefetch_row<Near::kL1>(Rows::memory(call, range.ids[j + kRowsAhead]));
        float* key = keys + j * width;
        Rows::load(call, range.ids[j], key);
        after_row(key, j);
    }
    /* Score blocks take up to kLanes keys at a time; scores of these rows are thrown away. */
    for (int32_t j = range.size; j % kLanes != 0; ++j) {
        clear(keys + j * width, keys + (j + 1) * width);
        after_row(keys + j * width, j);
    }
}

template <typename Rows>
static void load_keys(const RowAttention& call, const IdRange& ids, float* keys) {
    load_each_key<Rows>(call, ids, keys, [](const float*, int32_t) {});
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
template <typename Rows>
struct Prefetcher {
    const RowAttention& call;
    IdRange rest;
    int32_t rows_per_block;

    void step() {
        for (int32_t i = 0; i < rows_per_block && rest.size > 0; ++i, ++rest.ids, --rest.size)
            prefetch_row<Near::kL2>(Rows::memory(call, *rest.ids));
    }
};

template <int kHeads, typename Number, typename Prefetcher>
static inline void score_heads(const Number* query, const Number* keys, int32_t width, int32_t num_keys, float* scores,
                               Prefetcher* prefetcher) {
    constexpr int kKeys = kLanes / kHeads;
    for (int32_t j = 0; j < num_keys; j += kKeys) {
        prefetcher->step();
        score_block<kHeads>(query, keys + (int64_t)j * width, width, scores + j);
    }
}

template <typename Rows, typename Number>
static inline void score(const RowAttention& call, const Number* query, const Number* keys, int32_t width,
                         int32_t num_heads, int32_t num_keys, const IdRange& next, float* scores) {
    const int64_t num_blocks = (int64_t)num_heads * num_keys / kLanes + 1;
    Prefetcher<Rows> prefetcher = {call, next, (int32_t)((next.size + num_blocks - 1) / num_blocks)};
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

static inline void softmax(const RowAttention& call, int32_t num_heads, int32_t num_keys, float* scores,
                           const RowAttentionPartial& partial) {
    for (int32_t h = 0; h < num_heads; ++h)
        softmax_head(scores + h * kKeysPerChunk, num_keys, call.softmax_scale, partial.max + h,
                     partial.sum + h);
}

/* ---- weigh: out = sum of probability * value ---- */

template <int kHeads, int kVectors>
static inline void weigh_block(const float* probabilities, const float* keys, int32_t row_width, int32_t num_keys,
                               float* out, int32_t value_width) {
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
            store(out + h * (int64_t)value_width + v * kLanes, sums[h * kVectors + v]);
}

template <int kHeads>
static inline void weigh_heads(const RowAttention& call, const float* probabilities, const float* keys,
                               int32_t num_keys, float* out) {
    constexpr int kVectors = kLanes / kHeads;
    int32_t d = 0;
    for (; d + kVectors * kLanes <= call.value_width; d += kVectors * kLanes)
        weigh_block<kHeads, kVectors>(probabilities, keys + d, call.row_width, num_keys, out + d, call.value_width);
    for (; d < call.value_width; d += kLanes)
        weigh_block<kHeads, 1>(probabilities, keys + d, call.row_width, num_keys, out + d, call.value_width);
}

static inline void weigh(const RowAttention& call, const float* probabilities, const float* keys, int32_t num_heads,
                         int32_t num_keys, float* out) {
    const int64_t width = call.value_width;
    int32_t h = 0;
    for (; h + 4 <= num_heads; h += 4)
        weigh_heads<4>(call, probabilities + h * kKeysPerChunk, keys, num_keys, out + h * width);
    for (; h + 2 <= num_heads; h += 2)
        weigh_heads<2>(call, probabilities + h * kKeysPerChunk, keys, num_keys, out + h * width);
    if (h < num_heads) weigh_heads<1>(call, probabilities + h * kKeysPerChunk, keys, num_keys, out + h * width);
}

/* Bound: num_heads * num_keys * 2 * (2 * value_dim + key_only_dim) FLOP from the L2 cache. */
template <typename Rows>
static void attend(const RowAttention& call, const float* query, const float* keys, int32_t num_heads, int32_t num_keys,
                   const IdRange& next, float* probabilities, const RowAttentionPartial& partial) {
    score<Rows>(call, query, keys, call.row_width, num_heads, num_keys, next, probabilities);
    softmax(call, num_heads, num_keys, probabilities, partial);
    weigh(call, probabilities, keys, num_heads, num_keys, partial.out);
}

/* ---- merge and store ---- */

static inline float first_lane(Vec v) {
    float lanes[kLanes];
    store(lanes, v);
    return lanes[0];
}

static void merge(const RowAttention& call, int32_t num_heads, const RowAttentionPartial& from,
                  const RowAttentionPartial& into) {
    for (int32_t h = 0; h < num_heads; ++h) {
        const float largest = from.max[h] > into.max[h] ? from.max[h] : into.max[h];
        const Vec weight_from = exp_nonpositive(splat(from.max[h] - largest));
        const Vec weight_into = exp_nonpositive(splat(into.max[h] - largest));
        const float* source = from.out + (int64_t)h * call.value_width;
        float* target = into.out + (int64_t)h * call.value_width;
        for (int32_t d = 0; d < call.value_width; d += kLanes)
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

static void store_result(const RowAttention& call, int64_t token, int32_t head_begin, int32_t num_heads,
                         const RowAttentionPartial& partial) {
    for (int32_t h = 0; h < num_heads; ++h) {
        const int64_t row = token * call.num_heads + head_begin + h;
        const float* values = partial.out + (int64_t)h * call.value_width;
        float sum = partial.sum[h];
        if (call.sinks != nullptr) sum += __builtin_expf(call.sinks[head_begin + h] - partial.max[h]);
        const float factor = 1.0f / sum;
        if (call.query_format == DSA_BFLOAT16)
            store_numbers(values, call.value_dim, factor, (uint16_t*)call.out + row * call.value_dim);
        else
            store_numbers(values, call.value_dim, factor, (float*)call.out + row * call.value_dim);
        if (call.lse != nullptr) call.lse[row] = partial.max[h] + __builtin_logf(partial.sum[h]);
    }
}

template <typename Rows>
constexpr RowAttentionKernels kRowAttentionKernels = {load_query, load_keys<Rows>, attend<Rows>, merge, store_result};

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_ROW_ATTENTION_VECTOR_H_ */
