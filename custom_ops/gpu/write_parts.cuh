/* The three parts of a layer's writes as device functions, one warp at a time. mla_cache_write.cu, index_key_write.cu
 * and index_query_quant.cu launch one part each, layer_write.cu all of them in one grid.
 *
 *   part          a warp's share, fast path                      any other sizes, formats and alignments
 *   latent rows   1 row: 512 numbers and the rope at a time      1 row
 *   index keys    4 keys of 128 numbers                          1 key
 *   index query   4 heads of 128 numbers                         1 head
 *
 * Fast paths write fp8. For few tokens the time is that of one load, the sums across lanes, and one store, so a warp
 * has all its loads in flight before it uses any.
 */
#ifndef DSA_GPU_WRITE_PARTS_CUH_
#define DSA_GPU_WRITE_PARTS_CUH_

#include <math.h>

#include "hopper.cuh"
#include "launch.h"
#include "quantize.cuh"
#include "write_checks.h"

namespace dsa {
namespace gpu {

constexpr int kWriteThreads = 128; /* small blocks spread few tokens over more multiprocessors */
constexpr int kWriteWarps = kWriteThreads / 32;
constexpr int64_t kMaxWriteBlocks = 1 << 28; /* of one part; a warp takes several shares beyond that */
constexpr int kGroupsPerWarp = 32 / kLanesPerGroup;

/* Division of a non-negative number by a fixed one: by a shift where it is a power of two, for 64 bits are slow. */
struct Divisor {
    uint32_t divisor;
    int32_t shift; /* -1: not a power of two */

    __device__ __forceinline__ int64_t quotient(int64_t value) const {
        if (shift >= 0) return value >> shift;
        return (uint64_t)value >> 32 == 0 ? (int64_t)((uint32_t)value / divisor)
                                          : (int64_t)((uint64_t)value / divisor);
    }
};

static inline Divisor make_divisor(int32_t divisor) {
    const bool is_power = (divisor & (divisor - 1)) == 0;
    return {(uint32_t)divisor, is_power ? __builtin_ctz((unsigned)divisor) : -1};
}

/* On Hopper a launch overlaps the one before, which may still be writing what this one reads. Until wait_for_inputs a
 * thread may only read params and ask for lines to be brought into the L2 cache, where both launches see the same
 * bytes. The next kernel is let in no sooner: launched earlier, the index scores take 3 us longer (what the launch
 * fetches of their code is gone when they come to run). */
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    wait_for_previous_kernel();
    let_next_kernel_start();
#endif
}

__device__ __forceinline__ void prefetch_line(const void* address) {
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
    (void)address;
#endif
}

/* Launches a kernel that calls wait_for_inputs. */
template <typename Params>
static inline dsa_status launch_write(void (*kernel)(Params), const Params& params, int32_t num_blocks,
                                      const Device& device, cudaStream_t stream) {
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)num_blocks);
    config.blockDim = dim3(kWriteThreads);
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = device.architecture >= 90 ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
    return error == cudaSuccess ? launched(stream) : status_of(error);
}

static inline bool is_aligned(const void* pointer, int64_t bytes) { return (uintptr_t)pointer % (uintptr_t)bytes == 0; }
static inline int64_t input_bytes(dsa_format format) { return format == DSA_BFLOAT16 ? 2 : 4; }

/* The stride of a single row means nothing. */
static inline bool rows_aligned(const void* rows, int64_t stride, int64_t num_rows, dsa_format format, int64_t bytes) {
    return is_aligned(rows, bytes) && (num_rows <= 1 || stride * input_bytes(format) % bytes == 0);
}

enum class WritePath : int32_t {
    kGroups, /* fp8 in groups of 128 */
    kFours,  /* no scales: four numbers at a time */
    kAny,
};

static inline int64_t write_blocks(int64_t num_warps) {
    const int64_t blocks = (num_warps + kWriteWarps - 1) / kWriteWarps;
    return blocks < kMaxWriteBlocks ? blocks : kMaxWriteBlocks;
}

/* ---- latent rows ---- */

struct LatentPart {
    const uint8_t* latent;
    const uint8_t* rope;
    uint8_t* cache;
    const int64_t* slot_mapping;
    int64_t latent_stride_bytes;
    int64_t rope_stride_bytes;
    int64_t block_stride_bytes;
    int64_t row_bytes;
    int64_t scale_offset;
    int64_t rope_offset;
    int64_t num_slots;
    int64_t num_tokens;
    Divisor block_size;
    ScaleRule rule;
    int32_t kv_lora_rank;
    int32_t qk_rope_head_dim;
    dsa_format input_format;
    dsa_format cache_format;
    WritePath path;
    int32_t num_blocks; /* of the grid */
};

static inline WritePath latent_path(const dsa_mla_cache_write_params& p, const LatentLayout& layout) {
    const bool is_fp8 = p.cache_format == DSA_FP8;
    if (!is_aligned(p.cache, 16) || (p.block_stride_bytes | layout.row_bytes) % 16 != 0) return WritePath::kAny;
    if (!rows_aligned(p.latent, p.latent_stride, p.num_tokens, p.input_format, 16)) return WritePath::kAny;
    if (is_fp8) {
        const bool has_groups = p.kv_lora_rank % kGroupNumbers == 0 && p.qk_rope_head_dim % 2 == 0;
        const int64_t pair_bytes = 2 * input_bytes(p.input_format);
        const bool has_pairs = rows_aligned(p.rope, p.rope_stride, p.num_tokens, p.input_format, pair_bytes);
        return has_groups && has_pairs ? WritePath::kGroups : WritePath::kAny;
    }
    const bool has_fours = p.kv_lora_rank % 4 == 0 && p.qk_rope_head_dim % 4 == 0 && layout.rope_offset % 16 == 0;
    const bool is_rope_aligned = rows_aligned(p.rope, p.rope_stride, p.num_tokens, p.input_format, 16);
    return has_fours && is_rope_aligned ? WritePath::kFours : WritePath::kAny;
}

static inline LatentPart make_latent_part(const dsa_mla_cache_write_params& p, const LatentLayout& layout) {
    LatentPart part = {};
    part.latent = (const uint8_t*)p.latent;
    part.rope = (const uint8_t*)p.rope;
    part.cache = p.cache;
    part.slot_mapping = p.slot_mapping;
    part.latent_stride_bytes = p.latent_stride * input_bytes(p.input_format);
    part.rope_stride_bytes = p.rope_stride * input_bytes(p.input_format);
    part.block_stride_bytes = p.block_stride_bytes;
    part.row_bytes = layout.row_bytes;
    part.scale_offset = layout.scale_offset;
    part.rope_offset = layout.rope_offset;
    part.num_slots = layout.num_slots;
    part.num_tokens = p.num_tokens;
    part.block_size = make_divisor(p.block_size);
    part.rule = latent_scale_rule(p.scale_format);
    part.kv_lora_rank = p.kv_lora_rank;
    part.qk_rope_head_dim = p.qk_rope_head_dim;
    part.input_format = p.input_format;
    part.cache_format = p.cache_format;
    part.path = latent_path(p, layout);
    part.num_blocks = (int32_t)write_blocks(p.num_tokens);
    return part;
}

__device__ __forceinline__ uint32_t load_rope_pair(const uint16_t* rope, int i) { return load_4(rope + 2 * i); }

__device__ __forceinline__ uint32_t load_rope_pair(const float* rope, int i) {
    const uint2 pair = load_8(rope + 2 * i);
    return pair_of_bits(pair.x, pair.y);
}

__device__ __forceinline__ uint8_t* latent_row(const LatentPart& part, int64_t slot) {
    if (slot < 0 || slot >= part.num_slots) return nullptr;
    const int64_t block = part.block_size.quotient(slot);
    return part.cache + block * part.block_stride_bytes + (slot - block * part.block_size.divisor) * part.row_bytes;
}

template <typename Input, bool kIsPlain>
__device__ __forceinline__ void write_latent_groups(const LatentPart& part, int64_t token) {
    const int lane = threadIdx.x % 32;
    const int64_t slot = load_slot(part.slot_mapping + token);
    const Input* latent = (const Input*)(part.latent + token * part.latent_stride_bytes);
    const Input* rope = (const Input*)(part.rope + token * part.rope_stride_bytes);
    const int num_rope_pairs = part.qk_rope_head_dim / 2;
    LaneNumbers<Input> numbers = {};
    if (lane * kNumbersPerLane < part.kv_lora_rank) numbers = load_lane(latent + lane * kNumbersPerLane);
    uint32_t rope_pair = lane < num_rope_pairs ? load_rope_pair(rope, lane) : 0;
    uint8_t* row = latent_row(part, slot);
    if (row == nullptr) return;
    LanePairs pairs = pairs_of(numbers);
    for (int first = 0;;) {
        const float scale = scale_of<kIsPlain>(group_amax(pairs), part.rule.floor);
        const int number = first + lane * kNumbersPerLane;
        if (number < part.kv_lora_rank) {
            *(uint4*)(row + number) = lane_codes<kIsPlain>(pairs, scale);
            if (lane % kLanesPerGroup == 0) ((float*)(row + part.scale_offset))[number / kGroupNumbers] = scale;
        }
        first += 32 * kNumbersPerLane;
        if (first >= part.kv_lora_rank) break;
        pairs = {};
        if (number + 32 * kNumbersPerLane < part.kv_lora_rank)
            pairs = pairs_of(load_lane(latent + number + 32 * kNumbersPerLane));
    }
    for (int i = lane; i < num_rope_pairs; i += 32) {
        if (i >= 32) rope_pair = load_rope_pair(rope, i);
        ((uint32_t*)(row + part.rope_offset))[i] = quiet_pair(rope_pair);
    }
}

__device__ inline void write_latent_any(const LatentPart& part, int64_t token) {
    const int lane = threadIdx.x % 32;
    uint8_t* row = latent_row(part, part.slot_mapping[token]);
    if (row == nullptr) return;
    const uint8_t* latent = part.latent + token * part.latent_stride_bytes;
    const uint8_t* rope = part.rope + token * part.rope_stride_bytes;
    const int64_t number_bytes = part.input_format == DSA_BFLOAT16 ? 2 : 4;
    if (part.path == WritePath::kFours) {
        convert_row_by_4(latent, part.input_format, part.kv_lora_rank, part.cache_format, row);
        convert_row_by_4(rope, part.input_format, part.qk_rope_head_dim, part.cache_format, row + part.rope_offset);
        return;
    }
    if (part.cache_format != DSA_FP8) {
        convert_row(latent, part.input_format, part.kv_lora_rank, part.cache_format, row);
        convert_row(rope, part.input_format, part.qk_rope_head_dim, part.cache_format, row + part.rope_offset);
        return;
    }
    for (int64_t first = 0; first < part.kv_lora_rank; first += DSA_LATENT_GROUP) {
        const int64_t n = min((int64_t)DSA_LATENT_GROUP, part.kv_lora_rank - first);
        const float scale =
            quantize_row(latent + first * number_bytes, part.input_format, n, part.rule, row + first);
        if (lane == 0) store_4(row + part.scale_offset + first / DSA_LATENT_GROUP * 4, __float_as_uint(scale));
    }
    convert_row(rope, part.input_format, part.qk_rope_head_dim, DSA_BFLOAT16, row + part.rope_offset);
    /* The pad bytes become zero, so that equal tokens give equal rows; there are at most 3 in a place. */
    const int64_t rope_end = part.rope_offset + 2 * (int64_t)part.qk_rope_head_dim;
    if (lane < part.scale_offset - part.kv_lora_rank) row[part.kv_lora_rank + lane] = 0;
    if (lane < part.row_bytes - rope_end) row[rope_end + lane] = 0;
}

/* Lines of what write_latent_groups reads first. */
__device__ __forceinline__ void prefetch_latent(const LatentPart& part, int64_t token) {
    const int64_t number_bytes = part.input_format == DSA_BFLOAT16 ? 2 : 4;
    const int64_t number = threadIdx.x % 32 * kNumbersPerLane;
    if (number < part.kv_lora_rank)
        prefetch_line(part.latent + token * part.latent_stride_bytes + number * number_bytes);
    if (number < part.qk_rope_head_dim)
        prefetch_line(part.rope + token * part.rope_stride_bytes + number * number_bytes);
    if (number == 0) prefetch_line(part.slot_mapping + token);
}

/* What block `block` of the part's grid does. */
__device__ __forceinline__ void write_latent(const LatentPart& part, int block) {
    const int64_t stride = (int64_t)part.num_blocks * kWriteWarps;
    const int64_t first = (int64_t)block * kWriteWarps + threadIdx.x / 32;
    if (first < part.num_tokens) prefetch_latent(part, first);
    wait_for_inputs();
    for (int64_t t = first; t < part.num_tokens; t += stride) {
        if (part.path != WritePath::kGroups)
            write_latent_any(part, t);
        else if (part.input_format == DSA_BFLOAT16)
            part.rule.is_plain ? write_latent_groups<uint16_t, true>(part, t)
                               : write_latent_groups<uint16_t, false>(part, t);
        else
            part.rule.is_plain ? write_latent_groups<float, true>(part, t)
                               : write_latent_groups<float, false>(part, t);
    }
}

/* ---- index keys ---- */

struct IndexKeyPart {
    const uint8_t* key;
    uint8_t* cache;
    const int64_t* slot_mapping;
    int64_t key_stride_bytes;
    int64_t block_stride_bytes;
    int64_t scale_offset; /* inside a block */
    int64_t num_slots;
    int64_t num_tokens;
    Divisor block_size;
    ScaleRule rule;
    int32_t index_head_dim;
    dsa_format input_format;
    dsa_format cache_format;
    WritePath path;
    int32_t num_blocks; /* of the grid */
};

static inline WritePath index_key_path(const dsa_index_key_write_params& p) {
    if (!is_aligned(p.cache, 16) || p.block_stride_bytes % 16 != 0) return WritePath::kAny;
    if (!rows_aligned(p.key, p.key_stride, p.num_tokens, p.input_format, 16)) return WritePath::kAny;
    if (p.cache_format == DSA_FP8) return p.index_head_dim == kGroupNumbers ? WritePath::kGroups : WritePath::kAny;
    const int64_t row_bytes = p.index_head_dim * input_bytes(p.cache_format);
    return row_bytes % 16 == 0 && p.index_head_dim % 4 == 0 ? WritePath::kFours : WritePath::kAny;
}

static inline IndexKeyPart make_index_key_part(const dsa_index_key_write_params& p) {
    IndexKeyPart part = {};
    part.key = (const uint8_t*)p.key;
    part.cache = p.cache;
    part.slot_mapping = p.slot_mapping;
    part.key_stride_bytes = p.key_stride * input_bytes(p.input_format);
    part.block_stride_bytes = p.block_stride_bytes;
    part.scale_offset = dsa_index_scale_offset(p.cache_format, p.block_size, p.index_head_dim);
    part.num_slots = p.num_blocks * p.block_size;
    part.num_tokens = p.num_tokens;
    part.block_size = make_divisor(p.block_size);
    part.rule = index_scale_rule(p.scale_format);
    part.index_head_dim = p.index_head_dim;
    part.input_format = p.input_format;
    part.cache_format = p.cache_format;
    part.path = index_key_path(p);
    const int64_t keys_per_warp = part.path == WritePath::kGroups ? kGroupsPerWarp : 1;
    part.num_blocks = (int32_t)write_blocks((p.num_tokens + keys_per_warp - 1) / keys_per_warp);
    return part;
}

/* A slot's block, null for a slot outside the cache; the offset in it. */
__device__ __forceinline__ uint8_t* index_block(const IndexKeyPart& part, int64_t slot, int64_t* offset) {
    if (slot < 0 || slot >= part.num_slots) return nullptr;
    const int64_t block = part.block_size.quotient(slot);
    *offset = slot - block * part.block_size.divisor;
    return part.cache + block * part.block_stride_bytes;
}

/* Keys first_token .. first_token + 3, eight lanes each. */
template <typename Input, bool kIsPlain>
__device__ __forceinline__ void write_key_groups(const IndexKeyPart& part, int64_t first_token) {
    const int lane = threadIdx.x % 32;
    const int64_t token = first_token + lane / kLanesPerGroup;
    const int number = lane % kLanesPerGroup * kNumbersPerLane;
    int64_t slot = -1;
    LaneNumbers<Input> numbers = {};
    if (token < part.num_tokens) {
        slot = load_slot(part.slot_mapping + token);
        numbers = load_lane((const Input*)(part.key + token * part.key_stride_bytes) + number);
    }
    LanePairs pairs = pairs_of(numbers);
    const float scale = scale_of<kIsPlain>(group_amax(pairs), part.rule.floor);
    int64_t offset;
    uint8_t* block = index_block(part, slot, &offset);
    if (block == nullptr) return;
    *(uint4*)(block + offset * kGroupNumbers + number) = lane_codes<kIsPlain>(pairs, scale);
    if (number == 0) ((float*)(block + part.scale_offset))[offset] = scale;
}

__device__ inline void write_key_any(const IndexKeyPart& part, int64_t token) {
    int64_t offset;
    uint8_t* block = index_block(part, part.slot_mapping[token], &offset);
    if (block == nullptr) return;
    const uint8_t* key = part.key + token * part.key_stride_bytes;
    const int64_t dim = part.index_head_dim;
    if (part.cache_format == DSA_FP8) {
        const float scale = quantize_row(key, part.input_format, dim, part.rule, block + offset * dim);
        if (threadIdx.x % 32 == 0) store_4(block + part.scale_offset + 4 * offset, __float_as_uint(scale));
        return;
    }
    uint8_t* to = block + offset * dim * (part.cache_format == DSA_BFLOAT16 ? 2 : 4);
    if (part.path == WritePath::kFours)
        convert_row_by_4(key, part.input_format, dim, part.cache_format, to);
    else
        convert_row(key, part.input_format, dim, part.cache_format, to);
}

/* What block `block` of the part's grid does. */
__device__ __forceinline__ void write_index_key(const IndexKeyPart& part, int block) {
    const int64_t stride = (int64_t)part.num_blocks * kWriteWarps;
    const int64_t warp = (int64_t)block * kWriteWarps + threadIdx.x / 32;
    if (part.path == WritePath::kGroups) {
        const int64_t token = warp * kGroupsPerWarp + threadIdx.x % 32 / kLanesPerGroup;
        const int64_t number_bytes = part.input_format == DSA_BFLOAT16 ? 2 : 4;
        if (token < part.num_tokens) {
            prefetch_line(part.key + token * part.key_stride_bytes +
                          threadIdx.x % kLanesPerGroup * kNumbersPerLane * number_bytes);
            prefetch_line(part.slot_mapping + token);
        }
    }
    wait_for_inputs();
    if (part.path != WritePath::kGroups) {
        for (int64_t t = warp; t < part.num_tokens; t += stride) write_key_any(part, t);
        return;
    }
    for (int64_t t = warp * kGroupsPerWarp; t < part.num_tokens; t += stride * kGroupsPerWarp) {
        if (part.input_format == DSA_BFLOAT16)
            part.rule.is_plain ? write_key_groups<uint16_t, true>(part, t)
                               : write_key_groups<uint16_t, false>(part, t);
        else
            part.rule.is_plain ? write_key_groups<float, true>(part, t) : write_key_groups<float, false>(part, t);
    }
}

/* ---- index queries; a row is one head of one token ---- */

struct IndexQueryPart {
    const uint8_t* query;
    const float* weights;
    uint8_t* quantized;
    float* folded_weights;
    int64_t query_stride_bytes;
    int64_t weights_stride;
    int64_t num_rows;
    Divisor index_n_heads;
    ScaleRule rule;
    int32_t index_head_dim;
    float factor;
    dsa_format input_format;
    dsa_format output_format;
    WritePath path;
    int32_t num_blocks; /* of the grid */
};

static inline WritePath index_query_path(const dsa_index_query_quant_params& p) {
    if (!is_aligned(p.quantized, 16)) return WritePath::kAny;
    if (!rows_aligned(p.query, p.query_stride, p.num_tokens, p.input_format, 16)) return WritePath::kAny;
    if (p.output_format == DSA_FP8) return p.index_head_dim == kGroupNumbers ? WritePath::kGroups : WritePath::kAny;
    return p.index_head_dim % 8 == 0 ? WritePath::kFours : WritePath::kAny; /* 16 bytes a row, bfloat16 or float32 */
}

static inline IndexQueryPart make_index_query_part(const dsa_index_query_quant_params& p) {
    IndexQueryPart part = {};
    part.query = (const uint8_t*)p.query;
    part.weights = p.weights;
    part.quantized = (uint8_t*)p.quantized;
    part.folded_weights = p.folded_weights;
    part.query_stride_bytes = p.query_stride * input_bytes(p.input_format);
    part.weights_stride = p.weights_stride;
    part.num_rows = p.num_tokens * p.index_n_heads;
    part.index_n_heads = make_divisor(p.index_n_heads);
    part.rule = kIndexUe8m0;
    part.index_head_dim = p.index_head_dim;
    part.factor = (float)(1.0 / sqrt((double)p.index_head_dim * p.index_n_heads));
    part.input_format = p.input_format;
    part.output_format = p.output_format;
    part.path = index_query_path(p);
    const int64_t rows_per_warp = part.path == WritePath::kGroups ? kGroupsPerWarp : 1;
    part.num_blocks = (int32_t)write_blocks((part.num_rows + rows_per_warp - 1) / rows_per_warp);
    return part;
}

/* weight * scale * factor, and where that is no number the NaN that the processor of the CPU version makes of it. */
__device__ __forceinline__ float folded_weight(float weight, float scale, float factor) {
    const float folded = __fmul_rn(__fmul_rn(weight, scale), factor);
    if (folded == folded) return folded;
    const uint32_t weight_bits = __float_as_uint(weight), scale_bits = __float_as_uint(scale);
    if ((scale_bits & kMagnitudeBits) > kInfinityBits) return scale;
    if ((weight_bits & kMagnitudeBits) > kInfinityBits) return __uint_as_float(weight_bits | 0x400000u);
    return __uint_as_float(0xFFC00000u); /* 0 * infinity */
}

/* Rows first_row .. first_row + 3, eight lanes each. */
template <typename Input>
__device__ __forceinline__ void write_query_groups(const IndexQueryPart& part, int64_t first_row) {
    const int lane = threadIdx.x % 32;
    const int64_t row = first_row + lane / kLanesPerGroup;
    const int number = lane % kLanesPerGroup * kNumbersPerLane;
    float weight = 0.0f;
    LaneNumbers<Input> numbers = {};
    if (row < part.num_rows) {
        const int64_t token = part.index_n_heads.quotient(row);
        const int64_t head = row - token * part.index_n_heads.divisor;
        const Input* query = (const Input*)(part.query + token * part.query_stride_bytes);
        numbers = load_lane(query + head * kGroupNumbers + number);
        weight = __uint_as_float(load_4(part.weights + token * part.weights_stride + head));
    }
    LanePairs pairs = pairs_of(numbers);
    const float scale = scale_of<false>(group_amax(pairs), part.rule.floor);
    if (row >= part.num_rows) return;
    *(uint4*)(part.quantized + row * kGroupNumbers + number) = lane_codes<false>(pairs, scale);
    if (number == 0) part.folded_weights[row] = folded_weight(weight, scale, part.factor);
}

__device__ inline void write_query_any(const IndexQueryPart& part, int64_t row) {
    const int64_t token = part.index_n_heads.quotient(row);
    const int64_t head = row - token * part.index_n_heads.divisor;
    const int64_t dim = part.index_head_dim;
    const int64_t number_bytes = part.input_format == DSA_BFLOAT16 ? 2 : 4;
    const uint8_t* query = part.query + token * part.query_stride_bytes + head * dim * number_bytes;
    float scale = 1.0f;
    if (part.output_format == DSA_FP8) {
        scale = quantize_row(query, part.input_format, dim, part.rule, part.quantized + row * dim);
    } else {
        uint8_t* to = part.quantized + row * dim * (part.output_format == DSA_BFLOAT16 ? 2 : 4);
        if (part.path == WritePath::kFours)
            convert_row_by_4(query, part.input_format, dim, part.output_format, to);
        else
            convert_row(query, part.input_format, dim, part.output_format, to);
    }
    if (threadIdx.x % 32 == 0)
        part.folded_weights[row] = folded_weight(part.weights[token * part.weights_stride + head], scale, part.factor);
}

/* What block `block` of the part's grid does. */
__device__ __forceinline__ void write_index_query(const IndexQueryPart& part, int block) {
    const int64_t stride = (int64_t)part.num_blocks * kWriteWarps;
    const int64_t warp = (int64_t)block * kWriteWarps + threadIdx.x / 32;
    if (part.path == WritePath::kGroups) {
        const int64_t row = warp * kGroupsPerWarp + threadIdx.x % 32 / kLanesPerGroup;
        const int64_t number_bytes = part.input_format == DSA_BFLOAT16 ? 2 : 4;
        if (row < part.num_rows) {
            const int64_t token = part.index_n_heads.quotient(row);
            const int64_t head = row - token * part.index_n_heads.divisor;
            const int64_t number = head * kGroupNumbers + threadIdx.x % kLanesPerGroup * kNumbersPerLane;
            prefetch_line(part.query + token * part.query_stride_bytes + number * number_bytes);
            prefetch_line(part.weights + token * part.weights_stride + head);
        }
    }
    wait_for_inputs();
    if (part.path != WritePath::kGroups) {
        for (int64_t row = warp; row < part.num_rows; row += stride) write_query_any(part, row);
        return;
    }
    for (int64_t row = warp * kGroupsPerWarp; row < part.num_rows; row += stride * kGroupsPerWarp) {
        if (part.input_format == DSA_BFLOAT16)
            write_query_groups<uint16_t>(part, row);
        else
            write_query_groups<float>(part, row);
    }
}

}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_WRITE_PARTS_CUH_ */
