/* The kernels of kv_compress, written once over simd.h; include it once from a file compiled for one instruction set.
 *
 * Lanes are channels; what is left of the last vector is copied into vectors of its own. The sums of a channel have the
 * order of the definition.
 */
#ifndef DSA_CPU_KV_COMPRESS_VECTOR_H_
#define DSA_CPU_KV_COMPRESS_VECTOR_H_

#include <string.h>

#include "kv_compress_kernels.h"
#include "simd.h"

namespace dsa {
namespace DSA_SIMD {

static void add_to_scores(const float* kv_score, const float* ape, int64_t width, float* state) {
    memcpy(state, kv_score, (size_t)width * sizeof(float));
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(state + width + i, add(load(kv_score + width + i), load(ape + i)));
    for (; i < width; ++i) state[width + i] = kv_score[width + i] + ape[i];
}

/* The first n numbers, 1 .. kLanes, and zeros; reads nothing else. */
static inline Vec load_part(const float* p, int32_t n) {
    if (n == kLanes) return load(p);
    float lanes[kLanes] = {};
    memcpy(lanes, p, (size_t)n * sizeof(float));
    return load(lanes);
}

/* kVectors vectors of channels, the last of them with n channels. A cache line or more of each member at a time: the
 * scores that the maximum was taken of are in the L1 cache when the weights are. */
template <int kVectors>
static inline void pool_channels(const CompressMembers& members, int64_t first, int32_t n, float* pooled) {
    Vec largest[kVectors], weights[kVectors], sums[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        largest[v] = splat(-__builtin_inff());
        weights[v] = sums[v] = zero();
    }
    for (int64_t i = 0; i < members.num_members; ++i) {
        const float* scores = members.values[i] + members.score_offset + first;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            largest[v] = max(load_part(scores + v * kLanes, v + 1 < kVectors ? kLanes : n), largest[v]);
    }
    for (int64_t i = 0; i < members.num_members; ++i) {
        const float* values = members.values[i] + first;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const int32_t count = v + 1 < kVectors ? kLanes : n;
            const Vec score = load_part(values + members.score_offset + v * kLanes, count);
            const Vec weight = exp_nonpositive(sub(score, largest[v]));
            weights[v] = add(weights[v], weight);
            sums[v] = fma(weight, load_part(values + v * kLanes, count), sums[v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        float lanes[kLanes];
        store(lanes, div(sums[v], weights[v]));
        memcpy(pooled + first + v * kLanes, lanes, (size_t)(v + 1 < kVectors ? kLanes : n) * sizeof(float));
    }
}

/* Bound: 8 bytes a member and channel, read once; exponentials where the states are in a cache. */
static void pool(const CompressMembers& members, float* pooled) {
    constexpr int kVectors = 4;
    int64_t c = 0;
    for (; c + kVectors * kLanes <= members.head_dim; c += kVectors * kLanes)
        pool_channels<kVectors>(members, c, kLanes, pooled);
    for (; c < members.head_dim; c += kLanes) {
        const int64_t rest = members.head_dim - c;
        pool_channels<1>(members, c, rest < kLanes ? (int32_t)rest : kLanes, pooled);
    }
}

static void normalize(const float* weight, int32_t head_dim, float eps, float* row) {
    Vec squares = zero();
    int32_t i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) squares = fma(load(row + i), load(row + i), squares);
    float sum = reduce_add(squares);
    for (; i < head_dim; ++i) sum += row[i] * row[i];
    const float factor = 1.0f / __builtin_sqrtf(sum / (float)head_dim + eps);
    for (i = 0; i + kLanes <= head_dim; i += kLanes)
        store(row + i, mul(mul(load(row + i), splat(factor)), load(weight + i)));
    for (; i < head_dim; ++i) row[i] = row[i] * factor * weight[i];
}

constexpr KvCompressKernels kKvCompressKernels = {add_to_scores, pool, normalize};

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_KV_COMPRESS_VECTOR_H_ */
