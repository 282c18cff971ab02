/* Attention of query rows over rows of paged caches: what sparse_mla and compressed_mla share.
 *
 * A token's valid ids, in their order, are cut into chunks of kKeysPerChunk. A chunk is attended to by itself (partial
 * result with its own maximum); partial results are merged from the first chunk to the last. Neither the cut nor the
 * order knows anything but the token's ids, so every schedule over threads gives the same bits.
 */
#ifndef DSA_CPU_ROW_ATTENTION_H_
#define DSA_CPU_ROW_ATTENTION_H_

#include "dispatch.h"

namespace dsa {

/* 128 rows of 512 + 64 float32 are 288 KiB: they stay in an L2 cache of 1 MiB with the queries and results of 16
 * heads, and 2048 keys still give 16 tasks. */
constexpr int32_t kKeysPerChunk = 128;
constexpr int32_t kPadFloats = 16; /* a multiple of the lanes of every instruction set */

/* Softmax over a part of a token's rows, for several heads. */
struct RowAttentionPartial {
    float* max; /* [num_heads] float32: m, the largest z */
    float* sum; /* [num_heads] float32: sum exp(z - m) */
    float* out; /* [num_heads, value_width] float32: sum exp(z - m) * row */
};

struct IdRange {
    const int32_t* ids;
    int32_t size;
};

struct RowAttention;

struct RowAttentionKernels {
    /* query [num_heads, row_width] float32 := heads [head_begin, head_begin + num_heads) of a token, padded */
    void (*load_query)(const RowAttention& call, int64_t token, int32_t head_begin, int32_t num_heads, float* query);
    /* keys [kKeysPerChunk, row_width] float32 := the rows of ids, decoded and padded */
    void (*load_keys)(const RowAttention& call, const IdRange& ids, float* keys);
    /* partial := the softmax over keys; probabilities [num_heads, kKeysPerChunk] float32 is scratch. Rows of next are
     * brought into the L2 cache meanwhile. */
    void (*attend)(const RowAttention& call, const float* query, const float* keys, int32_t num_heads, int32_t num_keys,
                   const IdRange& next, float* probabilities, const RowAttentionPartial& partial);
    void (*merge)(const RowAttention& call, int32_t num_heads, const RowAttentionPartial& from,
                  const RowAttentionPartial& into);
    /* out and lse of heads [head_begin, head_begin + num_heads) of a token */
    void (*store)(const RowAttention& call, int64_t token, int32_t head_begin, int32_t num_heads,
                  const RowAttentionPartial& partial);
};

/* A validated call. An op derives from it what only its own functions know: which rows an id names. */
struct RowAttention {
    const void* query;  /* [num_tokens, num_heads, value_dim + key_only_dim] query_format */
    const float* sinks; /* [num_heads]; null: none */
    void* out;          /* [num_tokens, num_heads, value_dim] query_format */
    float* lse;         /* [num_tokens, num_heads]; null: not wanted */
    void* workspace;
    int64_t num_tokens;
    int32_t num_heads;
    int32_t max_ids;        /* the most a token can have */
    int32_t value_dim;      /* leading numbers of a row: key and value in one */
    int32_t key_only_dim;   /* the numbers behind them */
    int32_t value_width;    /* value_dim rounded up to kPadFloats; the pad of a decoded row is zero */
    int32_t row_width;      /* value_width + key_only_dim, each rounded up */
    int32_t bf16_row_width; /* row_width rounded up to 2 * kPadFloats */
    float softmax_scale;
    dsa_format query_format;
    const RowAttentionKernels* kernels; /* null: scalar */
    /* ids [max_ids] := the valid ids of a token in their order; returns how many */
    int32_t (*collect_ids)(const RowAttention& call, int64_t token, int32_t* ids);
    /* row [value_dim + key_only_dim] := the row of an id; scalar only */
    void (*read_row)(const RowAttention& call, int32_t id, float* row);
};

/* Fills the widths; false where a product of sizes would overflow. */
bool set_row_widths(RowAttention* call);

size_t row_attention_workspace_bytes(const RowAttention& call, const dsa_cpu_options* options);
void run_row_attention(const RowAttention& call, const dsa_cpu_options* options);

/* Whether counts [num_tokens], or null, say how many of a row's ids to look at: 0 .. width. */
bool counts_fit(const int32_t* counts, int64_t num_tokens, int32_t width);

/* What an op's two functions do. make_call checks sizes and formats and fills the call; check_arrays looks at the
 * arrays behind the pointers. */
template <typename Call, typename Params>
size_t row_attention_op_workspace_bytes(const Params* params, const dsa_cpu_options* options,
                                        dsa_status (*make_call)(const Params&, dsa_isa, Call*)) {
    Call call = {};
    if (params == nullptr || options == nullptr) return 0;
    if (make_call(*params, resolve_isa(options), &call) != DSA_OK) return 0;
    return row_attention_workspace_bytes(call, options);
}

template <typename Call, typename Params>
dsa_status run_row_attention_op(const Params* params, const dsa_cpu_options* options,
                                dsa_status (*make_call)(const Params&, dsa_isa, Call*),
                                dsa_status (*check_arrays)(const Params&, size_t workspace_bytes)) {
    if (params == nullptr || options == nullptr) return DSA_NULL_POINTER;
    Call call = {};
    const dsa_isa isa = resolve_isa(options);
    const dsa_status shape_status = make_call(*params, isa, &call);
    if (shape_status != DSA_OK) return shape_status;
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    const dsa_status array_status = check_arrays(*params, row_attention_workspace_bytes(call, options));
    if (array_status != DSA_OK || params->num_tokens == 0) return array_status;
    run_row_attention(call, options);
    return DSA_OK;
}

}  // namespace dsa

#endif /* DSA_CPU_ROW_ATTENTION_H_ */
