#include "dsa/cache_layout.h"

namespace {

constexpr int64_t kScaleBytes = 4;

int64_t round_up_to_scale(int64_t bytes) { return (bytes + kScaleBytes - 1) / kScaleBytes * kScaleBytes; }

int64_t number_bytes(dsa_format format) {
    switch (format) {
        case DSA_FLOAT32: return 4;
        case DSA_BFLOAT16: return 2;
        case DSA_FP8: return 1;
        default: return -1;
    }
}

}  // namespace

int64_t dsa_latent_scale_offset(dsa_format format, int32_t kv_lora_rank) {
    return format == DSA_FP8 && kv_lora_rank > 0 ? round_up_to_scale(kv_lora_rank) : -1;
}

int64_t dsa_latent_rope_offset(dsa_format format, int32_t kv_lora_rank) {
    if (number_bytes(format) < 0 || kv_lora_rank <= 0) return -1;
    if (format != DSA_FP8) return kv_lora_rank * number_bytes(format);
    const int64_t groups = ((int64_t)kv_lora_rank + DSA_LATENT_GROUP - 1) / DSA_LATENT_GROUP;
    return dsa_latent_scale_offset(format, kv_lora_rank) + groups * kScaleBytes;
}

int64_t dsa_latent_row_bytes(dsa_format format, int32_t kv_lora_rank, int32_t qk_rope_head_dim) {
    const int64_t rope_offset = dsa_latent_rope_offset(format, kv_lora_rank);
    if (rope_offset < 0 || qk_rope_head_dim <= 0) return -1;
    if (format == DSA_FP8) return round_up_to_scale(rope_offset + qk_rope_head_dim * number_bytes(DSA_BFLOAT16));
    return rope_offset + qk_rope_head_dim * number_bytes(format);
}

int64_t dsa_index_scale_offset(dsa_format format, int32_t block_size, int32_t index_head_dim) {
    if (format != DSA_FP8 || block_size <= 0 || block_size % kScaleBytes != 0) return -1;
    if (index_head_dim <= 0 || index_head_dim > DSA_MAX_FP8_INDEX_HEAD_DIM) return -1;
    return (int64_t)block_size * index_head_dim;
}

int64_t dsa_index_block_bytes(dsa_format format, int32_t block_size, int32_t index_head_dim) {
    if (format == DSA_FP8) {
        const int64_t scales = dsa_index_scale_offset(format, block_size, index_head_dim);
        return scales < 0 ? -1 : scales + block_size * kScaleBytes;
    }
    if (number_bytes(format) < 0 || block_size <= 0 || index_head_dim <= 0) return -1;
    int64_t bytes; /* two int32 of 4-byte numbers can exceed int64 */
    const bool overflows = __builtin_mul_overflow((int64_t)block_size * index_head_dim, number_bytes(format), &bytes);
    return overflows ? -1 : bytes;
}

int64_t dsa_compressed_row_data_bytes(dsa_format format, int32_t head_dim, int32_t qk_rope_head_dim) {
    if (number_bytes(format) < 0 || qk_rope_head_dim <= 0 || qk_rope_head_dim % 2 != 0) return -1;
    if (head_dim <= qk_rope_head_dim) return -1;
    if (format != DSA_FP8) return head_dim * number_bytes(format);
    if (head_dim % 2 != 0) return -1;
    return (int64_t)head_dim - qk_rope_head_dim + qk_rope_head_dim * number_bytes(DSA_BFLOAT16);
}

int64_t dsa_compressed_row_scale_bytes(dsa_format format, int32_t head_dim, int32_t qk_rope_head_dim) {
    if (dsa_compressed_row_data_bytes(format, head_dim, qk_rope_head_dim) < 0) return -1;
    if (format != DSA_FP8) return 0;
    constexpr int64_t kNumbersPerUnit = (int64_t)DSA_COMPRESSED_GROUP * DSA_COMPRESSED_SCALE_ALIGNMENT;
    const int64_t value_dim = (int64_t)head_dim - qk_rope_head_dim;
    return (value_dim + kNumbersPerUnit - 1) / kNumbersPerUnit * DSA_COMPRESSED_SCALE_ALIGNMENT;
}

int64_t dsa_compressed_block_bytes(dsa_format format, int32_t block_rows, int32_t head_dim,
                                   int32_t qk_rope_head_dim) {
    const int64_t data = dsa_compressed_row_data_bytes(format, head_dim, qk_rope_head_dim);
    if (data < 0 || block_rows <= 0) return -1;
    int64_t bytes;
    const int64_t row = data + dsa_compressed_row_scale_bytes(format, head_dim, qk_rope_head_dim);
    return __builtin_mul_overflow((int64_t)block_rows, row, &bytes) ? -1 : bytes;
}
