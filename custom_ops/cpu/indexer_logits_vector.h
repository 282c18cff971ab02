/* Index scores with one head per lane.
 *
 * A lane keeps the dot product of one head with one key, so nothing is summed across lanes until the heads are: the
 * query is transposed once per tile, and a key is read number by number and broadcast, straight from the cache where
 * its format allows. No lane ever belongs to a key that is not visible.
 *
 *   step      what one multiply-add consumes of a head and of a key: a float32, or a pair of bfloat16 (vdpbf16ps)
 *   query     [panel][step][kPanelVectors * kLanes] steps; the last panel may be one vector wide
 *   keys      kKeysPerGroup at a time against one panel: kKeysPerGroup * kPanelVectors sums in registers
 *
 * Products of e4m3 or bfloat16 numbers are exact in float32. vdpbf16ps reads bfloat16 denormals as zero.
 * Order of sums of one (row, key): steps ascending within a lane; vectors of heads ascending; the lanes as a tree.
 */
#ifndef DSA_CPU_INDEXER_LOGITS_VECTOR_H_
#define DSA_CPU_INDEXER_LOGITS_VECTOR_H_

#include "indexer_logits_kernels.h"
#include "quantize_vector.h"
#include "simd.h"

namespace dsa {
namespace DSA_SIMD {

constexpr int kPanelVectors = 2;
#if defined(__AVX512F__)
constexpr int kKeysPerGroup = 8; /* 16 sums, 2 vectors of the query and a broadcast in 32 registers */
#else
constexpr int kKeysPerGroup = 6; /* 12 sums, 2 vectors of the query and a broadcast in 16 registers */
#endif
constexpr int64_t kGroupsPerTile = 8;
constexpr int64_t kKeysPerTile = kGroupsPerTile * kKeysPerGroup; /* decoded keys and one panel stay in the L1 cache */
static_assert(kKeysPerTile % kLanes == 0, "scores are reduced kLanes keys at a time");

/* How a format is consumed: kWidth numbers a step. */
struct SingleSteps {
    static constexpr int64_t kWidth = 1;
    using Query = Vec;
    static inline Query load_query(const uint32_t* p) { return load((const float*)p); }
    static inline Query broadcast_key(const uint8_t* key, int64_t step) {
        float value;
        memcpy(&value, key + step * 4, sizeof value);
        return splat(value);
    }
    static inline Vec multiply_add(Vec sum, Query query, Query key) { return fma(query, key, sum); }
    static inline uint32_t pack(const float* numbers) { return float_bits(numbers[0]); }
};

#if defined(__AVX512BF16__)
struct PairSteps {
    static constexpr int64_t kWidth = 2;
    using Query = __m512i;
    static inline Query load_query(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static inline Query broadcast_key(const uint8_t* key, int64_t step) {
        int32_t pair;
        memcpy(&pair, key + step * 4, sizeof pair);
        return _mm512_set1_epi32(pair);
    }
    static inline Vec multiply_add(Vec sum, Query query, Query key) {
        return _mm512_dpbf16_ps(sum, (__m512bh)query, (__m512bh)key);
    }
    static inline uint32_t pack(const float* numbers) {
        return (float_bits(numbers[0]) >> 16) | (float_bits(numbers[1]) & 0xFFFF0000u);
    }
};
#endif

struct Layout {
    int64_t num_steps;
    int64_t num_vectors;     /* of heads */
    int64_t query_numbers;   /* uint32 of one packed row */
    int64_t weights_numbers; /* float32 of one row */
    int64_t key_bytes;       /* of one decoded key */
};

template <typename Steps>
static inline Layout make_layout(const dsa_indexer_logits_params& p) {
    Layout l;
    l.num_steps = (p.index_head_dim + Steps::kWidth - 1) / Steps::kWidth;
    l.num_vectors = (p.index_n_heads + kLanes - 1) / kLanes;
    l.query_numbers = l.num_vectors * l.num_steps * kLanes;
    l.weights_numbers = l.num_vectors * kLanes;
    l.key_bytes = (l.num_steps * 4 + 63) / 64 * 64;
    return l;
}

struct Scratch {
    uint32_t* queries; /* [num_rows, query_numbers] */
    float* weights;    /* [num_rows, weights_numbers] */
    float* sums;       /* [kKeysPerTile, kLanes] float32: sums over the heads of one lane */
    float* row;        /* [num_steps * kWidth] float32: one head's query before it is packed */
    uint8_t* keys;     /* [kKeysPerTile, key_bytes] decoded keys */
    uint8_t* zeros;    /* [key_bytes] stands in for a key whose block is outside the cache */
};

struct KeyTile {
    const uint8_t* keys[kKeysPerTile]; /* steps of each key */
    float scales[kKeysPerTile];
    const uint8_t* ahead[kKeysPerTile]; /* the same key of the next tile in the cache, or null */
};

/* What a tile fetches while it computes: a long context comes from memory, and its blocks follow no pattern. */
struct Ahead {
    const uint8_t* const* keys = nullptr; /* [kKeysPerTile], or null: fetch nothing */
    int64_t key_bytes = 0;
};

static inline uintptr_t take(uintptr_t* free, int64_t bytes) {
    const uintptr_t taken = *free;
    *free += (uintptr_t)((bytes + 63) / 64 * 64);
    return taken;
}

/* Lays the scratch out from `base`; returns its end. */
template <typename Steps>
static inline uintptr_t place(const Layout& l, int64_t num_rows, uintptr_t base, Scratch* s) {
    uintptr_t free = base;
    s->queries = (uint32_t*)take(&free, num_rows * l.query_numbers * 4);
    s->weights = (float*)take(&free, num_rows * l.weights_numbers * 4);
    s->sums = (float*)take(&free, kKeysPerTile * kLanes * 4);
    s->row = (float*)take(&free, l.num_steps * Steps::kWidth * 4);
    s->keys = (uint8_t*)take(&free, kKeysPerTile * l.key_bytes);
    s->zeros = (uint8_t*)take(&free, l.key_bytes);
    return free;
}

static inline void row_e4m3_to_float32(const uint8_t* codes, int64_t n, float* values) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(values + i, load_e4m3(codes + i));
    for (; i < n; ++i) values[i] = e4m3_decode(codes[i]);
}

static inline void row_numbers_to_float32(const uint8_t* numbers, dsa_format format, int64_t n, float* values) {
    if (format == DSA_FP8)
        row_e4m3_to_float32(numbers, n, values);
    else if (format == DSA_BFLOAT16)
        row_to_float32((const uint16_t*)numbers, n, values);
    else
        row_to_float32((const float*)numbers, n, values);
}

/* Transposes the query of one row: lane = head. Lanes without a head hold zeros. */
template <typename Steps>
static void pack_row(const dsa_indexer_logits_params& p, const Layout& l, int64_t t, const Scratch& s, uint32_t* query,
                     float* weights) {
    const int64_t heads = p.index_n_heads;
    const int64_t dim = p.index_head_dim;
    const int64_t head_bytes = dim * key_number_bytes(p.cache_format);
    const uint8_t* head = (const uint8_t*)p.query + t * heads * head_bytes;
    memset(weights, 0, (size_t)l.weights_numbers * sizeof(float));
    memcpy(weights, p.folded_weights + t * heads, (size_t)heads * sizeof(float));
    if (heads % kLanes != 0) memset(query, 0, (size_t)l.query_numbers * sizeof(uint32_t));
    s.row[l.num_steps * Steps::kWidth - 1] = 0.0f; /* the second of a pair that has only one */
    for (int64_t h = 0; h < heads; ++h, head += head_bytes) {
        row_numbers_to_float32(head, p.cache_format, dim, s.row);
        const int64_t panel = h / kLanes / kPanelVectors * kPanelVectors;
        const int64_t width = (l.num_vectors - panel < kPanelVectors ? l.num_vectors - panel : kPanelVectors) * kLanes;
        uint32_t* column = query + panel * l.num_steps * kLanes + (h - panel * kLanes);
        for (int64_t step = 0; step < l.num_steps; ++step)
            column[step * width] = Steps::pack(s.row + step * Steps::kWidth);
    }
}

#if defined(__AVX512BF16__)
/* e4m3 codes to bfloat16, exactly. Normal numbers: exponent and mantissa move, the bias grows by 120. */
static inline __m512i bf16_from_e4m3(__m256i codes) {
    const __m512i denormals = _mm512_castsi128_si512( /* 0 to 7 times 2^-9 */
        _mm_setr_epi16(0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60));
    const __m512i wide = _mm512_cvtepu8_epi16(codes);
    const __m512i magnitude = _mm512_and_si512(wide, _mm512_set1_epi16(0x7F));
    const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    const __mmask32 small = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7F));
    const __m512i number = _mm512_mask_permutexvar_epi16(normal, small, magnitude, denormals);
    const __m512i quiet = _mm512_mask_mov_epi16(number, nan, _mm512_set1_epi16(0x7FC0));
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(wide, 8), _mm512_set1_epi16((int16_t)0x8000));
    return _mm512_or_si512(quiet, sign);
}

static inline void row_e4m3_to_bf16(const uint8_t* codes, int64_t n, uint16_t* values) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        _mm512_storeu_si512(values + i, bf16_from_e4m3(_mm256_loadu_si256((const __m256i*)(codes + i))));
    if (i == n) return;
    const __mmask32 left = (__mmask32)((1u << (n - i)) - 1u);
    const __m256i rest = _mm256_maskz_loadu_epi8(left, codes + i);
    _mm512_mask_storeu_epi16(values + i, left, bf16_from_e4m3(rest));
}

/* The steps of one key: where they lie in the cache, or decoded into `decoded`. */
static inline const uint8_t* key_steps(PairSteps, const dsa_indexer_logits_params& p, const uint8_t* key,
                                       uint8_t* decoded) {
    const int64_t dim = p.index_head_dim;
    if (p.cache_format == DSA_BFLOAT16 && dim % 2 == 0) return key;
    uint16_t* numbers = (uint16_t*)decoded;
    if (p.cache_format == DSA_FP8)
        row_e4m3_to_bf16(key, dim, numbers);
    else
        memcpy(numbers, key, (size_t)dim * sizeof(uint16_t));
    if (dim % 2 != 0) numbers[dim] = 0;
    return decoded;
}
#endif

static inline const uint8_t* key_steps(SingleSteps, const dsa_indexer_logits_params& p, const uint8_t* key,
                                       uint8_t* decoded) {
    if (p.cache_format == DSA_FLOAT32) return key;
    row_numbers_to_float32(key, p.cache_format, p.index_head_dim, (float*)decoded);
    return decoded;
}

/* Walks the positions of a context in order. */
struct Position {
    int64_t block; /* in the request's line of the block table */
    int64_t offset;
};

static inline Position position_at(const dsa_indexer_logits_params& p, int64_t position) {
    return {position / p.block_size, position % p.block_size};
}

static inline void advance(const dsa_indexer_logits_params& p, Position* position) {
    if (++position->offset < p.block_size) return;
    position->offset = 0;
    ++position->block;
}

/* The tile of positions [first, last), cut to kKeysPerTile; returns how many it holds. */
template <typename Steps>
static int64_t load_keys(const dsa_indexer_logits_params& p, const Layout& l, const int32_t* blocks, int64_t first,
                         int64_t last, const Scratch& s, KeyTile* tile) {
    const int64_t n = last - first < kKeysPerTile ? last - first : kKeysPerTile;
    Position at = position_at(p, first);
    for (int64_t i = 0; i < n; ++i, advance(p, &at)) {
        const KeyAddress key = key_address(p, blocks[at.block], at.offset);
        tile->keys[i] = key.values ? key_steps(Steps(), p, key.values, s.keys + i * l.key_bytes) : s.zeros;
        tile->scales[i] = key.values ? key.scale : float_from_bits(0x7FC00000u);
    }
    at = position_at(p, first + kKeysPerTile);
    for (int64_t i = 0; i < kKeysPerTile; ++i, advance(p, &at))
        tile->ahead[i] = first + kKeysPerTile + i < last ? key_address(p, blocks[at.block], at.offset).values : nullptr;
    return n;
}

struct Panel {
    const uint32_t* query; /* [num_steps, lanes] */
    const float* weights;  /* [lanes] */
    int64_t num_heads;     /* from the panel's first on; lanes beyond it hold no head */
};

/* sums[key][lane] (+)= weights * relu(query . key) of one panel for kKeysPerGroup keys. Not inlined: the pointers of
 * the keys need most of the general registers. */
template <typename Steps, int kVectors>
__attribute__((noinline)) static void score_group(const Panel& panel, int64_t num_steps, const uint8_t* const* keys,
                                                  bool is_first, float* sums) {
    Vec dots[kKeysPerGroup][kVectors];
#pragma GCC unroll 8
    for (int k = 0; k < kKeysPerGroup; ++k)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) dots[k][v] = zero();
    const uint8_t* key[kKeysPerGroup];
#pragma GCC unroll 8
    for (int k = 0; k < kKeysPerGroup; ++k) key[k] = keys[k];
    const uint32_t* query = panel.query;
    for (int64_t step = 0; step < num_steps; ++step, query += kVectors * kLanes) {
        typename Steps::Query q[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) q[v] = Steps::load_query(query + v * kLanes);
#pragma GCC unroll 8
        for (int k = 0; k < kKeysPerGroup; ++k) {
            const typename Steps::Query number = Steps::broadcast_key(key[k], step);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) dots[k][v] = Steps::multiply_add(dots[k][v], q[v], number);
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kKeysPerGroup; ++k) {
        Vec sum = is_first ? zero() : load(sums + k * kLanes);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            /* Lanes without a head hold 0 * key, which is NaN for an infinite key. */
            const Vec relu = keep_lanes(max(zero(), dots[k][v]), panel.num_heads - v * kLanes);
            sum = fma(load(panel.weights + v * kLanes), relu, sum);
        }
        store(sums + k * kLanes, sum);
    }
}

static inline void fetch(const Ahead& ahead, int64_t key) {
    if (!ahead.keys || !ahead.keys[key]) return;
    for (int64_t byte = 0; byte < ahead.key_bytes; byte += 64)
        _mm_prefetch((const char*)ahead.keys[key] + byte, _MM_HINT_T1); /* L1 is full of this tile */
}

template <typename Steps, int kVectors>
static void score_panel(const Panel& panel, int64_t num_steps, const KeyTile& tile, int64_t n, const Ahead& ahead,
                        bool is_first, float* sums) {
    for (int64_t k = 0; k < n; k += kKeysPerGroup) {
        for (int64_t i = 0; i < kKeysPerGroup; ++i) fetch(ahead, k + i);
        const uint8_t* keys[kKeysPerGroup];
        for (int64_t i = 0; i < kKeysPerGroup; ++i) keys[i] = tile.keys[k + i < n ? k + i : n - 1];
        score_group<Steps, kVectors>(panel, num_steps, keys, is_first, sums + k * kLanes);
    }
}

/* Scores of one row for the first n keys of the tile. `row` is a panel of all heads. */
template <typename Steps>
static void score_row(const Layout& l, const Panel& row, const KeyTile& tile, int64_t n, const Ahead& ahead,
                      float* sums, float* scores) {
    for (int64_t v = 0; v < l.num_vectors; v += kPanelVectors) {
        const Panel panel = {row.query + v * l.num_steps * kLanes, row.weights + v * kLanes,
                             row.num_heads - v * kLanes};
        const Ahead once = v == 0 ? ahead : Ahead();
        if (l.num_vectors - v >= kPanelVectors)
            score_panel<Steps, kPanelVectors>(panel, l.num_steps, tile, n, once, v == 0, sums);
        else
            score_panel<Steps, 1>(panel, l.num_steps, tile, n, once, v == 0, sums);
    }
    for (int64_t k = 0; k < n; k += kLanes) {
        Vec lanes[kLanes];
        for (int i = 0; i < kLanes; ++i) lanes[i] = load(sums + (k + i) * kLanes);
        float reduced[kLanes];
        store(reduced, mul(load(tile.scales + k), reduce_add_each(lanes)));
        memcpy(scores + k, reduced, (size_t)(n - k < kLanes ? n - k : kLanes) * sizeof(float));
    }
}

/* Rows of a tile that see its first key and belong to one request. */
struct RowRun {
    int64_t rows[kRowsPerTile];
    int64_t count;
    int64_t last_key; /* the largest number of keys among them, within the tile */
};

static inline RowRun next_run(const dsa_indexer_logits_params& p, const LogitsTile& tile, int64_t* t) {
    RowRun run = {};
    for (; *t < tile.last_row; ++*t) {
        const int64_t last = p.lengths[*t] < tile.last_key ? p.lengths[*t] : tile.last_key;
        if (last <= tile.first_key) continue;
        if (run.count > 0 && p.request_ids[*t] != p.request_ids[run.rows[0]]) break;
        run.rows[run.count++] = *t;
        if (last > run.last_key) run.last_key = last;
    }
    return run;
}

template <typename Steps>
static void score_run(const dsa_indexer_logits_params& p, const LogitsTile& tile, const RowRun& run, const Layout& l,
                      const Scratch& s) {
    for (int64_t r = 0; r < run.count; ++r)
        pack_row<Steps>(p, l, run.rows[r], s, s.queries + r * l.query_numbers, s.weights + r * l.weights_numbers);
    const int32_t* blocks = p.block_table + p.request_ids[run.rows[0]] * p.max_blocks;
    KeyTile keys = {};
    const Ahead next = {keys.ahead, p.index_head_dim * key_number_bytes(p.cache_format)};
    for (int64_t first = tile.first_key; first < run.last_key; first += kKeysPerTile) {
        const int64_t n = load_keys<Steps>(p, l, blocks, first, run.last_key, s, &keys);
        for (int64_t r = 0; r < run.count; ++r) {
            const int64_t t = run.rows[r];
            const int64_t visible = p.lengths[t] - first < n ? p.lengths[t] - first : n;
            if (visible <= 0) continue;
            const Panel row = {s.queries + r * l.query_numbers, s.weights + r * l.weights_numbers, p.index_n_heads};
            score_row<Steps>(l, row, keys, visible, r == 0 ? next : Ahead(), s.sums,
                             p.logits + t * p.logits_stride + first);
        }
    }
}

template <typename Steps>
static void score_steps(const dsa_indexer_logits_params& p, const LogitsTile& tile, void* scratch) {
    const Layout l = make_layout<Steps>(p);
    Scratch s;
    place<Steps>(l, tile.last_row - tile.first_row, (uintptr_t)scratch, &s);
    memset(s.zeros, 0, (size_t)l.key_bytes);
    int64_t t = tile.first_row;
    for (RowRun run = next_run(p, tile, &t); run.count > 0; run = next_run(p, tile, &t))
        score_run<Steps>(p, tile, run, l, s);
}

template <typename Steps>
static size_t steps_scratch_bytes(const dsa_indexer_logits_params& p, int64_t num_rows) {
    Scratch s;
    return place<Steps>(make_layout<Steps>(p), num_rows, 0, &s);
}

#if defined(__AVX512BF16__)
static inline bool uses_pairs(const dsa_indexer_logits_params& p) { return p.cache_format != DSA_FLOAT32; }

static size_t scratch_bytes(const dsa_indexer_logits_params& p, int64_t num_rows) {
    return uses_pairs(p) ? steps_scratch_bytes<PairSteps>(p, num_rows) : steps_scratch_bytes<SingleSteps>(p, num_rows);
}

static void score(const dsa_indexer_logits_params& p, const LogitsTile& tile, void* scratch) {
    if (uses_pairs(p))
        score_steps<PairSteps>(p, tile, scratch);
    else
        score_steps<SingleSteps>(p, tile, scratch);
}
#else
static size_t scratch_bytes(const dsa_indexer_logits_params& p, int64_t num_rows) {
    return steps_scratch_bytes<SingleSteps>(p, num_rows);
}

static void score(const dsa_indexer_logits_params& p, const LogitsTile& tile, void* scratch) {
    score_steps<SingleSteps>(p, tile, scratch);
}
#endif

constexpr IndexerLogitsKernel kIndexerLogits = {scratch_bytes, score};

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_INDEXER_LOGITS_VECTOR_H_ */
