/* The compressor of DeepSeek-V4: keep the state of every token, and make an entry of every window that a token closes.
 *
 *   C = overlap * head_dim;  b = request_ids[t], p = positions[t];  rows with lengths[t] <= 0 are padding: skipped
 *   state slot of position q of request b: state_table[b][(q / state_block_tokens) % state_table_width] is its block,
 *     q % state_block_tokens its row; blocks outside the cache: no state
 *   1  every row with a state slot:  state := kv_score[t][0 .. C) | kv_score[t][C .. 2C) + ape[p % ratio]
 *   2  then every row with (p + 1) % ratio == 0 whose entry_slots[t] lies inside the entry cache makes an entry of its
 *      members, the positions p - overlap * ratio + 1 .. p; those below 0 are left out
 *      member q uses the channels c from first to first + head_dim - 1: first is head_dim for the newer ratio members
 *      when overlap is 2, else 0
 *        w = exp(score[q][c] - max score),  x[c] = sum w * kv[q][c] / sum w          float32, in the order of positions
 *        x := x / sqrt(mean(x^2) + eps) * norm_weight
 *        the last qk_rope_head_dim numbers rotated by pairs: y[2i] = x[2i] cos[t][i] - x[2i+1] sin[t][i],
 *                                                            y[2i+1] = x[2i+1] cos[t][i] + x[2i] sin[t][i]
 *      entry := y, packed as compressed_row_write.h (DSA_ENTRY_ROW) or index_key_write.h (DSA_ENTRY_INDEX_KEY) says of
 *      float32 numbers
 *      A member at a position >= 0 without a state slot makes the whole entry NaN.
 *   An entry depends on the states of its members only: not on which of them the call wrote, nor on num_tokens.
 *   Two rows may not share a state slot (the ring is too narrow for the step), nor an entry slot: either may win.
 *   CPU: a request id or position out of range is DSA_BAD_SHAPE and nothing was written; CUDA: the row is skipped.
 *
 * Cost: 16 * C bytes a row for the states; overlap * ratio * 8 * head_dim bytes read for an entry.
 * Source: DeepSeek-V4 (compressor), rules S14 to S18 and S31.
 */
#ifndef DSA_KV_COMPRESS_H_
#define DSA_KV_COMPRESS_H_

#include "dsa/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How an entry is stored. */
typedef int32_t dsa_entry_kind;
enum {
    DSA_ENTRY_ROW = 0,      /* a compressed row */
    DSA_ENTRY_INDEX_KEY = 1 /* an index key */
};

typedef struct dsa_kv_compress_params {
    const float* kv_score;      /* [num_tokens, 2 * C] float32, row stride kv_score_stride: what goes into an entry,
                                   then its scores without ape */
    const float* ape;           /* [ratio, C] float32, contiguous: added to the scores by place in the window */
    const float* norm_weight;   /* [head_dim] float32 */
    const float* cos;           /* [num_tokens, qk_rope_head_dim / 2] float32, contiguous: of the window's first
                                   position, p / ratio * ratio; read only in rows that make an entry */
    const float* sin;           /* as cos */
    float* state_cache;         /* [state_num_blocks, state_block_tokens, 2 * C] float32 */
    const int32_t* state_table; /* [num_requests, state_table_width] int32, contiguous: a ring of blocks */
    const int32_t* positions;   /* [num_tokens] int32 */
    const int32_t* request_ids; /* [num_tokens] int32 */
    const int32_t* lengths;     /* [num_tokens] int32: <= 0: padding, its position and request id may hold anything */
    const int64_t* entry_slots; /* [num_tokens] int64: block * entry_block_rows + offset; negative: no entry */
    uint8_t* entry_cache;       /* [entry_num_blocks, block] entry_format, see cache_layout.h */
    void* workspace;            /* workspace_bytes, 64-byte aligned */
    size_t workspace_bytes;
    int64_t kv_score_stride;          /* elements */
    int64_t state_block_stride_bytes; /* >= state_block_tokens * 8 * C, a multiple of 4 */
    int64_t entry_block_stride_bytes; /* >= the bytes of a block, a multiple as in compressed_row_write.h; fp8 index
                                         keys: a multiple of 4 */
    int64_t state_num_blocks;
    int64_t entry_num_blocks;
    int64_t num_tokens;
    int64_t num_requests;
    int64_t state_table_width; /* >= 1 */
    int32_t state_block_tokens;
    int32_t entry_block_rows; /* fp8 index keys: a multiple of 4 */
    int32_t ratio;            /* tokens of a window, 1 .. 2^20 */
    int32_t overlap;          /* 1, or 2: the window before takes part, too */
    int32_t head_dim;         /* numbers of an entry */
    int32_t qk_rope_head_dim; /* even, below head_dim */
    float eps;                /* of the norm, >= 0 */
    dsa_entry_kind entry_kind;
    dsa_format entry_format;
    dsa_scale_format scale_format; /* of fp8 index keys */
} dsa_kv_compress_params;

DSA_API size_t dsa_kv_compress_params_size(void);
DSA_API size_t dsa_kv_compress_workspace_bytes(const dsa_kv_compress_params* params, const dsa_cpu_options* options);
DSA_API dsa_status dsa_kv_compress_cpu(const dsa_kv_compress_params* params, const dsa_cpu_options* options);
DSA_API size_t dsa_kv_compress_cuda_workspace_bytes(const dsa_kv_compress_params* params);
DSA_API dsa_status dsa_kv_compress_cuda(const dsa_kv_compress_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_KV_COMPRESS_H_ */
