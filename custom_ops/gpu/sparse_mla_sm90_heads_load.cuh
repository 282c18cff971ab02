/* How the producers of sparse_mla_sm90_heads.cu fill tiles: from the fp8 cache, or from rows widened before. */
#ifndef DSA_GPU_SPARSE_MLA_SM90_HEADS_LOAD_CUH_
#define DSA_GPU_SPARSE_MLA_SM90_HEADS_LOAD_CUH_

#include <type_traits>

#include "sparse_mla_sm90_heads.cuh"

namespace dsa {
namespace gpu {
namespace heads {

constexpr uint32_t kNowhere = 0xFFFFFFFF;

/* The tokens of a producer warp, which has kPerWarp of every tile. They are looked up for some tiles of a row at once, one
 * a lane: lane l knows token l % kPerWarp of tile l / kPerWarp. Goes over all items of a CTA. */
template <int kSplits, int kPerWarp>
struct TokenBatches {
    static constexpr int kTiles = 32 / kPerWarp; /* of a batch */
    /* The next batch: first this lane's id, then where its row is. */
    uint32_t next, next_tiles;
    /* The batch after it starts at tile `ahead` of this item. */
    uint32_t item;
    int32_t count, ahead;

    __device__ __forceinline__ TokenBatches(const Arguments& a, uint32_t first_item) : item(first_item), ahead(0) {
        count = count_of(a, item / (uint32_t)a.num_parts);
    }

    /* Starts to read the next batch's ids; next_tiles 0: there is none. */
    __device__ __forceinline__ void start(const Arguments& a) {
        const int warp = (threadIdx.x >> 5) % (kTokens / kPerWarp), lane = threadIdx.x & 31;
        const int split = blockIdx.x % kSplits;
        int num_tiles = num_tiles_of<kSplits>(count, split);
        next_tiles = 0;
        while (ahead == num_tiles) {
            if (kSplits > 1 || item + gridDim.x >= a.num_items) return;
            item += gridDim.x;
            count = count_of(a, item / (uint32_t)a.num_parts);
            num_tiles = num_tiles_of<kSplits>(count, split);
            ahead = 0;
        }
        const int index = ((ahead + lane / kPerWarp) * kSplits + split) * kTokens + kPerWarp * warp + lane % kPerWarp;
        const int64_t token = item / (uint32_t)a.num_parts;
        next = kNowhere;
        if (index < count) next = (uint32_t)load_id(a.slot_ids + token * a.topk + index);
        next_tiles = min(num_tiles - ahead, kTiles);
        ahead += next_tiles;
    }

    /* Whether the next batch, once started, is the first of its row. */
    __device__ __forceinline__ bool starts_row() const { return ahead <= kTiles; }
};

/* From the fp8 cache. Eight lanes that store together hit eight different 16-byte pieces of the banks:
 *   latent load  token 2 pair + lane / 4 % 2, columns 256 half + 64 (lane / 8) + 16 (lane % 4) ..
 *   scale        token lane / 4, group lane % 4
 *   rope copy    token 4 quad + lane / 8, columns 8 (lane % 8) ..
 * The compiler makes any use of a load wait for all loads in flight. So they are all issued together, just after the
 * tile before is done; the ids of the next batch are among them. */
template <int kSplits>
struct Producer {
    const Arguments& a;
    Shared& shared;
    int warp, lane;
    uint32_t latent_from, latent_to, pair_lane;
    /* The batch that is being worked on: this lane's row in the cache; a bit a token that is there. */
    uint32_t offset, valid;
    uint4 latent[2][4]; /* [half][pair] */
    float scale;
    TokenBatches<kSplits, kTokensPerWarp> batches;
    Tile tile, tile_after; /* the names of the next tile and of the one after it */
    Rope rope;             /* of the next tile */

    __device__ __forceinline__ Producer(const Arguments& a, Shared& shared, uint32_t first_item)
        : a(a), shared(shared), warp((threadIdx.x >> 5) & 7), lane(threadIdx.x & 31), batches(a, first_item) {
        const int row_bit = (lane >> 2) & 1;
        latent_from = fresh(64 * (lane >> 3) + 16 * (lane & 3));
        latent_to = fresh(shared_address(shared.tiles[0]) + (lane >> 3) * kBlockBytes +
                          swizzled(kTokensPerWarp * warp + row_bit, 2 * (lane & 3)));
        pair_lane = fresh(row_bit);
        tile = 0;
        tile_after = 1;
        rope = 0;
    }

    __device__ __forceinline__ const uint8_t* row_at(uint32_t row_offset) const {
        return a.latent_cache + (uint64_t)row_offset * 16;
    }

    /* The ids have arrived. */
    __device__ __forceinline__ void finish_batch() {
        const uint32_t id = batches.next;
        const bool is_valid = id < (uint32_t)a.num_slots;
        const uint32_t block = id / (uint32_t)a.block_size;
        const uint32_t row = id - block * (uint32_t)a.block_size;
        batches.next = is_valid ? block * a.block_stride + row * (kRowBytes / 16) : kNowhere;
    }

    /* A token that is not there reads the first row and gets scales of zero. */
    __device__ __forceinline__ void take_batch() {
        valid = __ballot_sync(0xFFFFFFFF, batches.next != kNowhere);
        offset = batches.next == kNowhere ? 0 : batches.next;
    }

    __device__ __forceinline__ void load(int in_batch) {
        const int first_lane = kTokensPerWarp * in_batch;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            const uint8_t* row =
                row_at(__shfl_sync(0xFFFFFFFF, offset, first_lane + pair_lane + 2 * pair)) + latent_from;
            latent[0][pair] = load_16(row);
            latent[1][pair] = load_16(row + 256);
        }
        const uint8_t* row = row_at(__shfl_sync(0xFFFFFFFF, offset, first_lane + (lane >> 2)));
        scale = load_float(row + kScaleOffset + 4 * (lane & 3));
    }

    __device__ __forceinline__ void copy_rope(int in_batch) {
        constexpr int kQuads = kTokensPerWarp / 4;
        const int token = lane >> 3, piece = lane & 7;
        const uint8_t* rows[kQuads];
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad)
            rows[quad] = row_at(__shfl_sync(0xFFFFFFFF, offset, kTokensPerWarp * in_batch + 4 * quad + token));
        barrier_wait(shared_address(&shared.rope_free[rope_slot(rope)]), rope_parity(rope) ^ 1);
        const uint32_t to = shared_address(shared.ropes[rope_slot(rope)]);
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad)
            copy_async_16(to + swizzled(kTokensPerWarp * warp + 4 * quad + token, piece),
                          rows[quad] + kRopeOffset + 16 * piece);
        copy_async_arrive(shared_address(&shared.rope_full[rope_slot(rope)]));
        ++rope;
    }

    template <int kHalf>
    __device__ __forceinline__ uint32_t factor_of(uint32_t split, int pair) const {
        return __shfl_sync(0xFFFFFFFF, split, 4 * (pair_lane + 2 * pair) + 2 * kHalf + (lane >> 4));
    }

    /* Straight code: a branch per piece would leave blocks too short to fill their own waits. */
    template <int kHalf, bool kAreExact>
    __device__ __forceinline__ void widen_half(uint32_t split) {
        const uint32_t to_half = latent_to + buffer_of(tile) * kTileBytes + 4 * kHalf * kBlockBytes;
        uint32_t next_factor = factor_of<kHalf>(split, 0);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            const uint32_t factor = next_factor;
            if (pair < 3) next_factor = factor_of<kHalf>(split, pair + 1);
            const uint32_t to = (to_half ^ (pair << 5)) + 256 * pair;
            const uint4& v = latent[kHalf][pair];
            uint32_t wide[4];
            dequantize<kAreExact>(a.shifts, v.x, v.y, factor, wide);
            store_shared_16(to, wide[0], wide[1], wide[2], wide[3]);
            dequantize<kAreExact>(a.shifts, v.z, v.w, factor, wide);
            store_shared_16(to ^ 16, wide[0], wide[1], wide[2], wide[3]);
        }
    }

    /* The fence that wgmma needs is the reader's: here it would wait for loads. */
    template <int kHalf>
    __device__ __forceinline__ void fill_half(uint32_t split, bool are_exact) {
        if (are_exact)
            widen_half<kHalf, true>(split);
        else
            widen_half<kHalf, false>(split);
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.full[buffer_of(tile)][kHalf]));
    }

    __device__ __forceinline__ void fill(int in_batch) {
        const int buffer = buffer_of(tile);
        const uint32_t parity = parity_of(tile) ^ 1;
        barrier_wait(shared_address(&shared.free[buffer][0]), parity);
        const bool is_valid = (valid >> (kTokensPerWarp * in_batch + (lane >> 2))) & 1;
        const bool are_exact = __all_sync(0xFFFFFFFF, !is_valid || is_exact_scale(scale));
        const uint32_t split = is_valid ? split_scale(scale, are_exact) : 0;
        if (lane == 0) shared.valid[valid_slot(tile)][warp] = (uint8_t)(valid >> (kTokensPerWarp * in_batch));
        fill_half<0>(split, are_exact);
        barrier_wait(shared_address(&shared.free[buffer][1]), parity);
        fill_half<1>(split, are_exact);
    }

    __device__ __forceinline__ void swap_names(int used) {
        const Tile old = tile + used;
        tile = tile_after;
        tile_after = old;
    }

    __device__ __forceinline__ void run() {
        batches.start(a);
        finish_batch();
        while (batches.next_tiles > 0) {
            const uint32_t num_tiles = batches.next_tiles;
            take_batch();
            if (batches.starts_row() && buffer_of(tile) == 1) swap_names(0); /* a row starts in buffer 0 */
            for (uint32_t i = 0; i < num_tiles; ++i) {
                load(i);
                copy_rope(i);
                if (i == 0) batches.start(a);
                fill(i);
                swap_names(2);
                if (i == 0) finish_batch();
            }
        }
        copy_async_wait_all();
    }
};

__device__ __forceinline__ bool are_widened(const WidenedRows& widened) {
    return widened.num_places != nullptr && *widened.num_places <= widened.capacity;
}

/* From rows that are bfloat16 already, in the order of columns of a tile: 16-byte pieces are copied to where they belong
 * and never pass through registers. Eight lanes copy 128 bytes of a token, which is a row of a block. */
template <int kWarps>
struct WidenedProducer {
    static constexpr int kPerWarp = kTokens / kWarps, kQuads = kPerWarp / 4;
    using Valid = std::conditional_t<kPerWarp == 8, uint8_t, uint16_t>;
    static_assert(sizeof(Valid) * 8 == kPerWarp, "a bit a token");

    const Arguments& a;
    Shared& shared;
    int warp, lane;
    uint32_t place; /* of this lane's piece in a block, for the first four tokens */
    TokenBatches<1, kPerWarp> batches;
    uint32_t row, valid; /* the batch that is being worked on: this lane's widened row; a bit a token that is there */
    Tile tile, tile_after;
    Rope rope;
    static constexpr int kHalfBlocks = kRopeBlock / 2;

    __device__ __forceinline__ WidenedProducer(const Arguments& a, Shared& shared, uint32_t first_item)
        : a(a), shared(shared), warp((threadIdx.x >> 5) - kConsumerWarps), lane(threadIdx.x & 31), batches(a, first_item) {
        place = swizzled(kPerWarp * warp + (lane >> 3), lane & 7);
        tile = 0;
        tile_after = 1;
        rope = 0;
    }

    /* The ids have arrived; their blocks' places are read. */
    __device__ __forceinline__ void finish_batch() {
        const uint32_t id = batches.next, block = id / (uint32_t)a.block_size;
        batches.next = kNowhere;
        if (id >= (uint32_t)a.num_slots) return;
        const uint32_t in_block = id - block * (uint32_t)a.block_size;
        batches.next = (__ldg(a.widened.place_of_block + block) - 1) * (uint32_t)a.block_size + in_block;
    }

    __device__ __forceinline__ void take_batch() {
        valid = __ballot_sync(0xFFFFFFFF, batches.next != kNowhere);
        row = batches.next == kNowhere ? 0 : batches.next;
    }

    /* kCount blocks of 64 columns; a token that is not there gets zeros. */
    template <int kCount>
    __device__ __forceinline__ void copy(uint32_t to, const uint8_t* const (&from)[kQuads], int bytes_before,
                                         uint32_t is_there) {
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad)
#pragma unroll
            for (int block = 0; block < kCount; ++block)
                /* Four tokens on, the swizzle flips bit 2 of the piece. */
                copy_async_16_or_zero(to + ((place ^ (quad % 2 << 6)) + 512 * quad) + block * kBlockBytes,
                                      from[quad] + bytes_before + 128 * block, is_there >> quad & 1);
    }

    __device__ __forceinline__ void fill(int in_batch) {
        const int first_lane = kPerWarp * in_batch;
        const uint32_t there = valid >> first_lane;
        const uint8_t* from[kQuads];
        uint32_t is_there = 0;
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
            const uint32_t token_row = __shfl_sync(0xFFFFFFFF, row, first_lane + 4 * quad + (lane >> 3));
            from[quad] = a.widened.rows + (uint64_t)token_row * kWidenedBytes + 16 * (lane & 7);
            is_there |= (there >> (4 * quad + (lane >> 3)) & 1) << quad;
        }
        barrier_wait(shared_address(&shared.rope_free[rope_slot(rope)]), rope_parity(rope) ^ 1);
        copy<1>(rope_address(shared, rope), from, 2 * kLatent, is_there);
        copy_async_arrive(shared_address(&shared.rope_full[rope_slot(rope)]));
        ++rope;
        const int buffer = buffer_of(tile);
        const uint32_t parity = parity_of(tile) ^ 1;
        const uint32_t to = shared_address(shared.tiles[0]) + buffer * kTileBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t full = shared_address(&shared.full[buffer][half]);
            barrier_wait(shared_address(&shared.free[buffer][half]), parity);
            if (half == 0 && lane == 0) ((Valid*)shared.valid[valid_slot(tile)])[warp] = (Valid)there;
            copy<kHalfBlocks>(to + half * kHalfBlocks * kBlockBytes, from, half * kHalfBlocks * 128, is_there);
            copy_async_arrive(full);
            if (lane == 0) barrier_arrive(full); /* for what was stored: the copies' arrivals do not speak for it */
        }
    }

    __device__ __forceinline__ void swap_names(int used) {
        const Tile old = tile + used;
        tile = tile_after;
        tile_after = old;
    }

    __device__ __forceinline__ void run() {
        batches.start(a);
        finish_batch();
        while (batches.next_tiles > 0) {
            const uint32_t num_tiles = batches.next_tiles;
            take_batch();
            if (batches.starts_row() && buffer_of(tile) == 1) swap_names(0); /* a row starts in buffer 0 */
            for (uint32_t i = 0; i < num_tiles; ++i) {
                if (i == 0) batches.start(a);
                fill(i);
                swap_names(2);
                if (i == 0) finish_batch();
            }
        }
        copy_async_wait_all();
    }
};

}  // namespace heads
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_SPARSE_MLA_SM90_HEADS_LOAD_CUH_ */
