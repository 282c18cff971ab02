#include "dsa/indexer_logits.h"

#include <math.h>

#include "dispatch.h"
#include "indexer_logits_kernels.h"
#include "number_formats.h"
#include "paged_rows.h"
#include "parallel.h"

namespace {

using dsa::IndexerLogitsKernel;
using dsa::LogitsTile;

/* Keys of one task: many, because each task packs its queries anew; few, so that one long row feeds all threads. */
constexpr int64_t kMaxKeysPerTask = 8192;
constexpr int64_t kMinKeysPerTask = 512;
constexpr int64_t kTasksPerThread = 8; /* enough for the last tasks to even out causal rows */

float number(const uint8_t* numbers, dsa_format format, int64_t i) {
    if (format == DSA_FP8) return e4m3_decode(numbers[i]);
    if (format == DSA_BFLOAT16) return bf16_decode(((const uint16_t*)numbers)[i]);
    return ((const float*)numbers)[i];
}

void decode(const void* numbers, dsa_format format, int64_t n, float* values) {
    for (int64_t i = 0; i < n; ++i) values[i] = number((const uint8_t*)numbers, format, i);
}

size_t scalar_scratch_bytes(const dsa_indexer_logits_params& p, int64_t) {
    const size_t numbers = ((size_t)p.index_n_heads + 1) * (size_t)p.index_head_dim;
    return (numbers * sizeof(float) + 63) / 64 * 64;
}

float scalar_score(const float* query, const float* weights, const float* key, int64_t heads, int64_t dim) {
    float sum = 0.0f;
    for (int64_t h = 0; h < heads; ++h) {
        float dot = 0.0f;
        for (int64_t d = 0; d < dim; ++d) dot += query[h * dim + d] * key[d];
        sum += weights[h] * (dot < 0.0f ? 0.0f : dot); /* a NaN stays */
    }
    return sum;
}

void scalar_score_tile(const dsa_indexer_logits_params& p, const LogitsTile& tile, void* scratch) {
    const int64_t heads = p.index_n_heads;
    const int64_t dim = p.index_head_dim;
    float* query = (float*)scratch;
    float* key = query + heads * dim;
    for (int64_t t = tile.first_row; t < tile.last_row; ++t) {
        const int64_t last = p.lengths[t] < tile.last_key ? p.lengths[t] : tile.last_key;
        if (last <= tile.first_key) continue;
        const int64_t row_bytes = heads * dim * dsa::key_number_bytes(p.cache_format);
        decode((const uint8_t*)p.query + t * row_bytes, p.cache_format, heads * dim, query);
        const int32_t* blocks = p.block_table + p.request_ids[t] * p.max_blocks;
        for (int64_t s = tile.first_key; s < last; ++s) {
            const dsa::KeyAddress address = dsa::key_address(p, blocks[s / p.block_size], s % p.block_size);
            float* score = p.logits + t * p.logits_stride + s;
            if (!address.values) {
                *score = NAN;
                continue;
            }
            decode(address.values, p.cache_format, dim, key);
            *score = address.scale * scalar_score(query, p.folded_weights + t * heads, key, heads, dim);
        }
    }
}

const IndexerLogitsKernel* kernel(dsa_isa isa) {
    switch (isa) {
#if DSA_X86
        case DSA_ISA_AVX2: return &dsa::kIndexerLogitsAvx2;
        case DSA_ISA_AVX512: return &dsa::kIndexerLogitsAvx512;
        case DSA_ISA_AVX512_BF16: return &dsa::kIndexerLogitsAvx512Bf16;
#endif
        default: return &dsa::kIndexerLogitsScalar;
    }
}

dsa_status check_sizes(const dsa_indexer_logits_params& p) {
    const dsa_status cache_status = dsa::check_index_cache(p.cache_format, p.num_blocks, p.block_stride_bytes,
                                                           p.block_size, p.index_head_dim);
    if (cache_status != DSA_OK) return cache_status;
    if (!dsa::index_rows_fit(p.num_tokens, p.index_n_heads, p.index_head_dim)) return DSA_BAD_SHAPE;
    if (!dsa::is_count(p.logits_width)) return DSA_BAD_SHAPE;
    if (!dsa::rows_fit(p.num_tokens, p.logits_stride, p.logits_width)) return DSA_BAD_SHAPE;
    return DSA_OK;
}

dsa_status check(const dsa_indexer_logits_params& p) {
    if (const dsa_status status = check_sizes(p)) return status;
    if (p.num_tokens > 0 && (!p.query || !p.folded_weights)) return DSA_NULL_POINTER;
    if (p.num_tokens > 0 && p.logits_width > 0 && !p.logits) return DSA_NULL_POINTER;
    if (p.num_blocks > 0 && !p.index_cache) return DSA_NULL_POINTER;
    return dsa::check_rows(dsa::paged_rows(p, p.logits_width));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t rows_per_tile(const dsa_indexer_logits_params& p) {
    return p.num_tokens < dsa::kRowsPerTile ? p.num_tokens : dsa::kRowsPerTile;
}

size_t thread_bytes(const dsa_indexer_logits_params& p, dsa_isa isa) {
    return kernel(isa)->scratch_bytes(p, rows_per_tile(p));
}

int64_t longest_row(const dsa_indexer_logits_params& p) {
    int64_t longest = 0;
    for (int64_t t = 0; t < p.num_tokens; ++t) longest = p.lengths[t] > longest ? p.lengths[t] : longest;
    return longest;
}

/* Time of the call on one thread: arithmetic near the peak, and the decoding of keys. */
double estimated_nanoseconds(const dsa_indexer_logits_params& p) {
    const double per_score = 2.0 * p.index_n_heads * p.index_head_dim / 100 + 5;
    double scores = 0;
    for (int64_t t = 0; t < p.num_tokens; ++t) scores += p.lengths[t] > 0 ? p.lengths[t] : 0;
    return scores * per_score;
}

/* Results do not depend on it: a score is computed from its own row and key. */
int64_t keys_per_task(int64_t longest, int64_t num_row_tiles, int64_t num_threads) {
    int64_t keys = kMaxKeysPerTask;
    while (keys > kMinKeysPerTask && num_row_tiles * ceil_div(longest, keys) < kTasksPerThread * num_threads) keys /= 2;
    return keys;
}

}  // namespace

const IndexerLogitsKernel dsa::kIndexerLogitsScalar = {scalar_scratch_bytes, scalar_score_tile};

size_t dsa_indexer_logits_params_size(void) { return sizeof(dsa_indexer_logits_params); }

size_t dsa_indexer_logits_workspace_bytes(const dsa_indexer_logits_params* params, const dsa_cpu_options* options) {
    if (!params || !options || check_sizes(*params) || params->num_tokens == 0) return 0;
    const dsa_isa isa = dsa::resolve_isa(options);
    return isa == DSA_ISA_AUTO ? 0 : (size_t)dsa::thread_count(options) * thread_bytes(*params, isa);
}

dsa_status dsa_indexer_logits_cpu(const dsa_indexer_logits_params* params, const dsa_cpu_options* options) {
    if (!params || !options) return DSA_NULL_POINTER;
    const dsa_indexer_logits_params& p = *params;
    if (const dsa_status status = check(p)) return status;
    const dsa_isa isa = dsa::resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    const size_t needed = dsa_indexer_logits_workspace_bytes(params, options);
    if (p.workspace_bytes < needed) return DSA_WORKSPACE_TOO_SMALL;
    if (needed > 0 && !p.workspace) return DSA_NULL_POINTER;
    const int64_t longest = longest_row(p);
    if (longest == 0) return DSA_OK;

    const IndexerLogitsKernel& ops = *kernel(isa);
    const int32_t num_threads = dsa::threads_for(estimated_nanoseconds(p), options);
    const int64_t num_row_tiles = ceil_div(p.num_tokens, dsa::kRowsPerTile);
    const int64_t num_keys = keys_per_task(longest, num_row_tiles, num_threads);
    const int64_t num_chunks = ceil_div(longest, num_keys);
    const size_t scratch_bytes = thread_bytes(p, isa);
    dsa::parallel_for(num_row_tiles * num_chunks, num_threads, [&](int64_t task, int32_t thread) {
        LogitsTile tile = {};
        tile.first_row = task / num_chunks * dsa::kRowsPerTile;
        tile.last_row = tile.first_row + dsa::kRowsPerTile;
        if (tile.last_row > p.num_tokens) tile.last_row = p.num_tokens;
        tile.first_key = task % num_chunks * num_keys;
        tile.last_key = tile.first_key + num_keys;
        ops.score(p, tile, (uint8_t*)p.workspace + (size_t)thread * scratch_bytes);
    });
    return DSA_OK;
}
