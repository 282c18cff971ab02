/* The inner problem of indexer_logits: a tile of rows against a range of keys, on one thread.
 *
 *   tile     rows [first_row, last_row) of the batch, keys [first_key, last_key) of each row's own context
 *   writes   logits[t][s] for rows of the tile and first_key <= s < min(last_key, lengths[t]), nothing else
 */
#ifndef DSA_CPU_INDEXER_LOGITS_KERNELS_H_
#define DSA_CPU_INDEXER_LOGITS_KERNELS_H_

#include <string.h>

#include "dsa/indexer_logits.h"

namespace dsa {

constexpr int64_t kRowsPerTile = 8; /* rows that share one decoding of the keys */

struct LogitsTile {
    int64_t first_row;
    int64_t last_row; /* at most first_row + kRowsPerTile */
    int64_t first_key;
    int64_t last_key;
};

struct IndexerLogitsKernel {
    /* Scratch of one thread for tiles of num_rows rows; a multiple of 64. */
    size_t (*scratch_bytes)(const dsa_indexer_logits_params& p, int64_t num_rows);
    void (*score)(const dsa_indexer_logits_params& p, const LogitsTile& tile, void* scratch);
};

extern const IndexerLogitsKernel kIndexerLogitsScalar;
extern const IndexerLogitsKernel kIndexerLogitsAvx2;
extern const IndexerLogitsKernel kIndexerLogitsAvx512;
extern const IndexerLogitsKernel kIndexerLogitsAvx512Bf16;

/* Where the key of one position lies; values is null when the block id is outside the cache. */
struct KeyAddress {
    const uint8_t* values;
    float scale;
};

static inline int64_t key_number_bytes(dsa_format format) {
    return format == DSA_FP8 ? 1 : format == DSA_BFLOAT16 ? 2 : 4;
}

static inline KeyAddress key_address(const dsa_indexer_logits_params& p, int32_t block, int64_t offset) {
    if (block < 0 || block >= p.num_blocks) return {nullptr, 0.0f};
    const uint8_t* base = p.index_cache + block * p.block_stride_bytes;
    KeyAddress key = {base + offset * p.index_head_dim * key_number_bytes(p.cache_format), 1.0f};
    if (p.cache_format == DSA_FP8) {
        const uint8_t* scales = base + (int64_t)p.block_size * p.index_head_dim;
        memcpy(&key.scale, scales + offset * (int64_t)sizeof(float), sizeof(float));
    }
    return key;
}

}  // namespace dsa

#endif /* DSA_CPU_INDEXER_LOGITS_KERNELS_H_ */
