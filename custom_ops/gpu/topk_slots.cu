#include "dsa/topk_slots.h"

#include <math.h>

#include "clusters.cuh"
#include "launch.h"
#include "sizes.h"
#include "topk_sampled.cuh"

namespace dsa {
namespace gpu {
namespace {

using topk::Problem;
using topk::Room;

constexpr int32_t kLongestRow = INT32_MAX - (1 << 20); /* places of a tile behind a row's end fit int32 */
constexpr int64_t kLongestPart = 1 << 20;              /* its bits fit shared memory */
constexpr int32_t kLeastCapacity = 1024;               /* uncertain scores */
constexpr int32_t kLeastPartLength = 1024;
constexpr int32_t kTileLength = 8192;   /* of 512 threads */
constexpr int32_t kLongLength = 32768;  /* from here on a tile ahead is worth more than a fourth CTA */
constexpr int32_t kUsualCtasPerRow = 8; /* of a cluster that every kernel may have */
constexpr int32_t kFewRows = 4;         /* that have clusters of 16 CTAs side by side on a whole device */
constexpr int32_t kWholeDevice = 100;   /* multiprocessors */

dsa_status check(const dsa_topk_slots_params& p) {
    if (p.topk < 1 || !is_count(p.logits_width) || !is_count(p.num_tokens)) return DSA_BAD_SHAPE;
    if (!product_fits(p.num_tokens, p.topk, (int64_t)sizeof(int32_t))) return DSA_BAD_SHAPE;
    if (!rows_fit(p.num_tokens, p.logits_stride, p.logits_width)) return DSA_BAD_SHAPE;
    if (p.num_tokens > 0 && (!p.positions || !p.slot_ids || !p.counts)) return DSA_NULL_POINTER;
    if (p.num_tokens > 0 && p.logits_width > 0 && !p.logits) return DSA_NULL_POINTER;
    if (!is_count(p.num_requests) || p.block_size <= 0 || !is_count(p.max_blocks)) return DSA_BAD_SHAPE;
    if (!product_fits(p.num_requests, p.max_blocks, (int64_t)sizeof(int32_t))) return DSA_BAD_SHAPE;
    if (p.num_blocks < 0 || p.num_blocks > INT32_MAX / p.block_size) return DSA_BAD_SHAPE;
    if (p.num_tokens > 0 && (!p.request_ids || !p.lengths)) return DSA_NULL_POINTER;
    if (p.num_requests > 0 && p.max_blocks > 0 && !p.block_table) return DSA_NULL_POINTER;
    return DSA_OK;
}

Problem problem_of(const dsa_topk_slots_params& p) {
    Problem problem = {};
    problem.logits = p.logits;
    problem.lengths = p.lengths;
    problem.block_table = p.block_table;
    problem.request_ids = p.request_ids;
    problem.positions = p.positions;
    problem.slot_ids = p.slot_ids;
    problem.counts = p.counts;
    problem.logits_stride = p.num_tokens > 1 ? p.logits_stride : 0;
    const int64_t capacity = p.max_blocks * p.block_size;
    problem.max_length = (int32_t)(p.logits_width < capacity ? p.logits_width : capacity);
    problem.num_requests = (int32_t)p.num_requests;
    problem.max_blocks = (int32_t)p.max_blocks;
    problem.num_blocks = (int32_t)p.num_blocks;
    problem.block_size = p.block_size;
    problem.topk = p.topk;
    int32_t log2 = 0;
    while (((int64_t)1 << log2) < p.block_size) ++log2;
    problem.block_size_shift = 31 + log2;
    problem.block_size_inverse = (uint32_t)(((uint64_t)1 << problem.block_size_shift) / (uint32_t)p.block_size + 1);
    problem.ctas_per_row = 1;
    /* Rows that start on 16 bytes fill vectors from their first score on. */
    problem.is_aligned = (uintptr_t)p.logits % 16 == 0 && problem.logits_stride % 4 == 0;
    return problem;
}

/* As many CTAs as keep every multiprocessor busy, and no part too short to be worth one; a power of two. */
int32_t ctas_per_row(const Device& device, int64_t num_rows, int32_t length) {
    if (!device.has_hopper_instructions) return 1;
    int32_t ctas = 1;
    while (ctas < kUsualCtasPerRow && length / (2 * ctas) >= kLeastPartLength) {
        /* Clusters of four and more leave some multiprocessors of a group unused. */
        const int32_t usable = ctas == 1 ? device.num_multiprocessors : device.num_multiprocessors * 10 / 11;
        if (2 * ctas * num_rows > usable) break;
        ctas *= 2;
    }
    if (num_rows <= kFewRows && device.num_multiprocessors >= kWholeDevice && length > kTileLength * ctas) ctas *= 2;
    while (ctas > 1 && clusters_at_once(device, ctas) == 0) ctas /= 2;
    return ctas;
}

template <typename... Params>
dsa_status launch(void (*kernel)(Params...), int64_t num_ctas, int32_t threads, int32_t cluster, int32_t shared_bytes,
                  const Device& device, cudaStream_t stream, const Params&... params) {
    if (shared_bytes > 0)
        if (const dsa_status status = allow_shared_bytes(kernel, shared_bytes)) return status;
    if (cluster > 8) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (error != cudaSuccess) return status_of(error);
    }
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)num_ctas);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = (unsigned)cluster;
        attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
        ++config.numAttrs;
    }
    /* The launch itself overlaps the end of the kernel before; the kernels wait for its results. */
    if (device.has_hopper_instructions) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
        ++config.numAttrs;
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params...);
    if (error != cudaSuccess) return status_of(error);
    return launched(stream);
}

/* Bytes: 4 a score six times, most of them from L2; 8 a kept position. */
dsa_status launch_digits(const Problem& p, int64_t num_rows, const Device& device, cudaStream_t stream) {
    if (p.ctas_per_row > 1)
        return launch(topk::topk_digits_kernel<512, true>, num_rows * p.ctas_per_row, 512, p.ctas_per_row, 0, device,
                      stream, p);
    return launch(topk::topk_digits_kernel<512, false>, num_rows, 512, 1, 0, device, stream, p);
}

/* Uncertain scores of a row of the longest length, 3.5 standard deviations above their expected number. */
int32_t uncertain_scores(const Problem& p) {
    const double each = (double)p.max_length / topk::kSamples;
    const double expected = p.topk / each, margin = 4 * sqrt(expected) + 4;
    const bool has_sure = expected > margin + 1;
    const double ranks = has_sure ? 2 * margin + 1 : expected + margin;
    const int32_t scores = (int32_t)(each * (ranks + 3.5 * sqrt(has_sure ? 2 * expected : ranks))) + 64;
    return scores > kLeastCapacity ? scores : kLeastCapacity;
}

int32_t round_up(int32_t number, int32_t multiple) { return (number + multiple - 1) / multiple * multiple; }

template <int kThreads, int kVectors, bool kClustered, int kCtas>
dsa_status launch_sampled(const Problem& p, int64_t num_rows, const Device& device, cudaStream_t stream) {
    const int64_t tile = 4 * kVectors * kThreads;
    const int64_t part = (p.max_length / p.ctas_per_row + 64 + tile - 1) / tile * tile;
    if (part > kLongestPart) return launch_digits(p, num_rows, device, stream);
    Room room = {};
    room.bits = (int32_t)(part / 32);
    room.capacity = round_up(uncertain_scores(p), 32);
    const int64_t entries = part / p.block_size + 2;
    room.table = entries < topk::kMaxTableEntries ? round_up((int32_t)entries, 4) : topk::kMaxTableEntries;
    room.staged = kClustered ? 0 : round_up(p.topk, 4);
    room.gathered = kClustered ? (int32_t)topk::kGatheredKeys : 0;
    const int32_t words = room.bits + room.table + room.staged + room.gathered;
    const int32_t fixed = (int32_t)sizeof(topk::SampledShared) + 4 * words;
    const int32_t affordable = (device.max_shared_bytes - fixed) / 8 & ~31;
    if (affordable < room.capacity) room.capacity = affordable;
    if (room.capacity < kLeastCapacity) return launch_digits(p, num_rows, device, stream);
    /* Bytes: 4 a score once, 8 a kept position. */
    return launch(topk::topk_sampled_kernel<kThreads, kVectors, kClustered, kCtas>, num_rows * p.ctas_per_row, kThreads,
                  p.ctas_per_row, fixed + 8 * room.capacity, device, stream, p, room);
}

template <int kThreads, int kVectors>
dsa_status launch_short(const Problem& p, int64_t num_rows, const Device& device, cudaStream_t stream) {
    const int32_t staged = round_up(p.topk < p.max_length ? p.topk : p.max_length, 4);
    /* Bytes: 4 a score once, 8 a kept position. */
    return launch(topk::topk_short_kernel<kThreads, kVectors>, num_rows, kThreads, 1, 4 * staged, device, stream, p);
}

/* Scores that fit a tile. */
int32_t short_length(const Problem& p, int32_t vectors) { return 4 * vectors - (p.is_aligned ? 0 : 3); }

/* Rows whose scores fit the registers of a CTA. */
dsa_status select_short(Problem p, int64_t num_rows, const Device& device, cudaStream_t stream) {
    p.lets_next_start = num_rows <= device.num_multiprocessors ? topk::kAtOnce : topk::kNearTheEnd;
    if (p.max_length > short_length(p, 1024)) return launch_short<512, 4>(p, num_rows, device, stream);
    /* More warps are sooner done with a row, fewer do more rows at a time. */
    if (num_rows <= 2 * device.num_multiprocessors) return launch_short<512, 2>(p, num_rows, device, stream);
    return launch_short<256, 4>(p, num_rows, device, stream);
}

dsa_status select(Problem p, int64_t num_rows, const Device& device, cudaStream_t stream) {
    if (p.max_length > kLongestRow) return DSA_UNSUPPORTED;
    if (p.max_length <= short_length(p, 2048)) return select_short(p, num_rows, device, stream);
    p.ctas_per_row = ctas_per_row(device, num_rows, p.max_length);
    while (1 << p.ctas_per_row_log2 < p.ctas_per_row) ++p.ctas_per_row_log2;
    if (p.topk > topk::kMaxCandidateTopk) return launch_digits(p, num_rows, device, stream);
    p.lets_next_start = topk::kAfterCollecting;
    if (p.ctas_per_row > 1) {
        /* As few threads as have one tile each: every warp more is one more to issue the same instructions. */
        const int32_t part = p.max_length / p.ctas_per_row;
        if (part <= 2048) return launch_sampled<256, 2, true, 1>(p, num_rows, device, stream);
        if (part <= 4096) return launch_sampled<256, 4, true, 1>(p, num_rows, device, stream);
        return launch_sampled<512, 4, true, 1>(p, num_rows, device, stream);
    }
    if (num_rows <= device.num_multiprocessors) return launch_sampled<512, 4, false, 1>(p, num_rows, device, stream);
    if (p.max_length < kLongLength) return launch_sampled<256, 4, false, 4>(p, num_rows, device, stream);
    return launch_sampled<256, 4, false, 3>(p, num_rows, device, stream);
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

size_t dsa_topk_slots_cuda_workspace_bytes(const dsa_topk_slots_params*) { return 0; }

dsa_status dsa_topk_slots_cuda(const dsa_topk_slots_params* params, void* stream) {
    if (!params) return DSA_NULL_POINTER;
    if (const dsa_status status = dsa::gpu::check(*params)) return status;
    if (params->num_tokens == 0) return DSA_OK;
    dsa::gpu::Device device;
    if (const dsa_status status = dsa::gpu::device(&device)) return status;
    return dsa::gpu::select(dsa::gpu::problem_of(*params), params->num_tokens, device, (cudaStream_t)stream);
}

