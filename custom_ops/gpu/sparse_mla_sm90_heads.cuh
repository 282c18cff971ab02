/* sparse_mla on Hopper with 64 heads as the M dimension of the products: tile shapes, shared memory, device helpers.
 *
 *   S [64 heads, 64 tokens] = Q K^T     O [64 heads, 512] += P V,  V = the first 512 columns of K
 *
 * Tiles and the query lie in shared memory as bfloat16 in blocks of 64 columns: a block is 64 rows of 128 bytes, whose
 * 16-byte pieces are permuted by the row number (piece ^ row % 8), the 128-byte swizzle of wgmma.
 * Columns 0 .. 511 stand in the order 0 2 1 3, 4 6 5 7, ...: unpacking four e4m3 numbers yields (0, 2) and (1, 3). The
 * query is stored in the same order, and the output is put back in order when it leaves.
 */
#ifndef DSA_GPU_SPARSE_MLA_SM90_HEADS_CUH_
#define DSA_GPU_SPARSE_MLA_SM90_HEADS_CUH_

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include "hopper.cuh"
#include "wgmma.cuh"

namespace dsa {
namespace gpu {
namespace heads {

constexpr int kHeads = 64;  /* of a CTA: M of wgmma */
constexpr int kTokens = 64; /* of a tile: two tiles and the query fill the shared memory */
constexpr int kLatent = 512;
constexpr int kRope = 64;
constexpr int kWidth = kLatent + kRope;
constexpr int kScaleOffset = kLatent; /* bytes in a cache row */
constexpr int kRopeOffset = kLatent + 16;
constexpr int kRowBytes = kRopeOffset + 2 * kRope;
constexpr int kBlockBytes = 64 * 128;
constexpr int kRopeBlock = kLatent / 64;
constexpr int kQueryBytes = (kRopeBlock + 1) * kBlockBytes;
constexpr int kTileBytes = kRopeBlock * kBlockBytes; /* without the rope */
constexpr int kRopes = 3; /* one more than tiles: a rope is on its way before its tile's buffer is free */
constexpr int kThreads = 512; /* two consumer and two producer warpgroups */
constexpr int kProducerRegisters = 64;
constexpr int kConsumerRegisters = 192; /* 2 * 192 + 2 * 64 = 4 * 128, the registers of the launch */
constexpr int kProducerWarps = 8;
constexpr int kTokensPerWarp = kTokens / kProducerWarps;
constexpr int kBatch = 32 / kTokensPerWarp; /* tiles whose tokens a producer warp looks up together, one a lane */
constexpr int kMaxSplits = 2; /* CTAs that share a row; for fewer rows than take two, another kernel is faster */
constexpr float kSlack = 8.0f; /* log2 by which a score may exceed the reference before the sums are rescaled */

struct Arguments {
    const uint8_t* query;
    const uint8_t* latent_cache; /* readable for a row even if it has no slots */
    const int32_t* slot_ids;
    const int32_t* counts; /* may be null */
    uint8_t* out;
    float* lse; /* may be null */
    uint32_t block_stride; /* in 16 bytes, as all offsets in the cache */
    uint32_t num_items; /* num_tokens * num_parts */
    int32_t num_slots;
    int32_t block_size;
    int32_t num_heads;
    int32_t num_parts; /* of 64 heads */
    int32_t topk;
    float scale_log2;     /* log2(e) times the magnitude of softmax_scale, above 0 */
    uint32_t query_signs; /* flips the sign of two bfloat16 numbers if softmax_scale is negative */
    uint32_t sixteen; /* 16 and 256: multiplied by numbers that the compiler does not know, words are shifted in the */
    uint32_t pow2_8;  /* multiply pipe, which is idle, and not in the one that moves bits, which is not */
};

struct Shared {
    uint8_t query[kQueryBytes];
    uint8_t tiles[2][kTileBytes];       /* tile t in t % 2 */
    uint8_t ropes[kRopes][kBlockBytes]; /* see Rope; holds P once S is computed */
    float references[2][kHeads];  /* of tile t in t % 2: what P of this tile is relative to, log2 */
    float sums[2][kHeads];
    uint64_t full[2][2]; /* [tile % 2][columns 0 .. 255, columns 256 .. 511] */
    uint64_t free[2][2]; /* the same, used up by consumer 0, 1 */
    uint64_t rope_full[kRopes], rope_free[kRopes];
    uint8_t valid[4][kProducerWarps]; /* [valid_slot(tile)]: a bit per token */
    uint64_t others_may_write, others_have_written; /* only where CTAs share a row */
};
static_assert(sizeof(Shared) <= 232448, "the shared memory of a multiprocessor");

/* Reference and sum of each CTA that shares a row, in place of the ropes. */
using PartialSums = float2[kMaxSplits][kHeads];
static_assert(sizeof(PartialSums) <= sizeof(Shared::ropes), "no rope is in use when sums are exchanged");

/* Named barriers; 0 belongs to __syncthreads. */
enum { kEvenReady = 1, kOddReady = 2, kGroup = 3 /* and 4 */, kConsumers = 5 };

/* ---- numbers ---- */

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

__device__ __forceinline__ uint32_t multiply_add_bf16(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

/* condition ? a : b, in a form that does not tempt the compiler to choose between addresses of a and b. */
__device__ __forceinline__ float select_float(bool condition, float a, float b) {
    float chosen;
    asm("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\nselp.f32 %0, %1, %2, p;\n}\n"
        : "=f"(chosen)
        : "f"(a), "f"(b), "r"((int)condition));
    return chosen;
}

/* Columns a b c d of two words (a b) (c d) to (a c) (b d) and back. */
__device__ __forceinline__ void exchange_middle(uint32_t& first, uint32_t& second) {
    const uint32_t low = __byte_perm(first, second, 0x5410);
    second = __byte_perm(first, second, 0x7632);
    first = low;
}

/* Bits of a where mask has ones, else those of b. */
__device__ __forceinline__ uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {
    uint32_t selected;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(selected) : "r"(a), "r"(b), "r"(mask));
    return selected;
}

/* Four e4m3 numbers to bfloat16 times 2^-120, by moving bits: (0, 2) and (1, 3). */
__device__ __forceinline__ void widen(const Arguments& a, uint32_t bytes, uint32_t& even, uint32_t& odd) {
    constexpr uint32_t kMagnitude = 0x07F007F0;
    const uint32_t signs = bytes & 0x80808080;
    even = select_bits(bytes * a.sixteen, signs * a.pow2_8, kMagnitude);
    odd = select_bits(bytes >> 4, signs, kMagnitude);
}

/* A float32 scale as two bfloat16 numbers in a word, high << 16 | low, for dequantize().
 * Exact scales (bfloat16 numbers below 2^7, which all sensible powers of two are) carry the factor 2^120. */
__device__ __forceinline__ bool is_exact_scale(float scale) {
    return (__float_as_uint(scale) & 0xFFFF) == 0 && scale < 128.0f;
}

__device__ __forceinline__ uint32_t split_scale(float scale, bool are_exact) {
    if (are_exact) return __float_as_uint(scale * 0x1p120f);
    const uint32_t high = pack_bf16(scale, scale) & 0xFFFF0000;
    return high | (pack_bf16(scale - __uint_as_float(high), 0.0f) & 0xFFFF);
}

/* 8 e4m3 numbers times their scale. The general way multiplies by high + low, which differs from the float32 product by
 * less than 2^-16 of it before the one rounding that counts. */
template <bool kAreExact>
__device__ __forceinline__ void dequantize(const Arguments& a, uint32_t first, uint32_t second, uint32_t scale,
                                           uint32_t (&wide)[4]) {
    widen(a, first, wide[0], wide[1]);
    widen(a, second, wide[2], wide[3]);
    const uint32_t high = __byte_perm(scale, scale, 0x3232), low = __byte_perm(scale, scale, 0x1010);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (kAreExact) {
            wide[i] = multiply_bf16(wide[i], high);
        } else {
            const uint32_t value = multiply_bf16(wide[i], 0x7B807B80); /* 2^120 */
            wide[i] = multiply_add_bf16(value, high, multiply_bf16(value, low));
        }
    }
}

/* ---- memory ---- */

__device__ __forceinline__ uint4 load_16(const uint8_t* from) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ float load_float(const uint8_t* from) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
}

__device__ __forceinline__ int32_t load_id(const int32_t* from) {
    int32_t v;
    asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}

__device__ __forceinline__ void store_shared_16(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

/* Four 8 x 8 matrices of 16-bit numbers; lanes 8 i .. 8 i + 7 name the rows of matrix i. */
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t from, uint32_t (&m)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
}

/* Asks for bytes, a multiple of 16, to be brought into the L2. */
__device__ __forceinline__ void prefetch(const uint8_t* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

/* Where 16-byte piece `piece` of row `row` lies in a swizzled block. */
__device__ __forceinline__ uint32_t swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

/* The upper word of every descriptor here: 8 rows of 128 bytes a step, 128-byte swizzle. The lower word holds the
 * address, without the CTA's rank in a cluster that shared addresses carry above bit 18, and is stepped in 32 bits. */
constexpr uint64_t kDescriptorUpper = (uint64_t)(1024 >> 4) << 32 | (uint64_t)Swizzle::k128 << 62;

__device__ __forceinline__ uint64_t descriptor(uint32_t lower) { return kDescriptorUpper | lower; }

/* Keeps a number in a register that the compiler would rather recompute, at every use, from the thread's index. */
__device__ __forceinline__ uint32_t fresh(uint32_t x) {
    asm volatile("mov.b32 %0, %0;" : "+r"(x));
    return x;
}

/* A shuffle tells the compiler that a number is the same in all lanes, so that it steps it in uniform registers. */
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(0xFFFFFFFF, x, 0); }

/* K along the 128 bytes: the query, tiles in S, P. */
__device__ __forceinline__ uint32_t row_operand(uint32_t block) { return uniform((block & 0x3FFFF) >> 4 | 1 << 16); }

/* K along the rows, blocks side by side: tiles in P V. */
__device__ __forceinline__ uint32_t column_operand(uint32_t block) {
    return uniform((block & 0x3FFFF) >> 4 | (kBlockBytes >> 4) << 16);
}

/* Leading ids of a row to look at. */
__device__ __forceinline__ int32_t count_of(const Arguments& a, int64_t token) {
    return a.counts == nullptr ? a.topk : min(max(a.counts[token], 0), a.topk);
}

/* Tile i of a row belongs to CTA i % kSplits of its cluster: balanced whatever the count. The shuffle tells the
 * compiler that the number is the same in all lanes. */
template <int kSplits>
__device__ __forceinline__ int num_tiles_of(int32_t count, int split) {
    const int row_tiles = (int)(((int64_t)count + kTokens - 1) / kTokens);
    return __shfl_sync(0xFFFFFFFF, (row_tiles - split + kSplits - 1) / kSplits, 0);
}

/* ---- producers ---- */

/* A tile on its way: bit 0 is its buffer, the others count that buffer's uses. Even tiles of a row take buffer 0, odd
 * ones buffer 1. */
using Tile = int32_t;

__device__ __forceinline__ int buffer_of(Tile tile) { return tile & 1; }
__device__ __forceinline__ uint32_t parity_of(Tile tile) { return (tile >> 1) & 1; }
__device__ __forceinline__ int valid_slot(Tile tile) { return tile & 3; }

/* A tile's rope, and later its P: counts tiles over all rows. */
using Rope = uint32_t;

__device__ __forceinline__ uint32_t rope_slot(Rope rope) { return rope % kRopes; }
__device__ __forceinline__ uint32_t rope_parity(Rope rope) { return rope / kRopes & 1; }
__device__ __forceinline__ uint32_t rope_address(const Shared& shared, Rope rope) {
    return shared_address(shared.ropes[0]) + rope_slot(rope) * kBlockBytes;
}

/* A producer warp fills 8 tokens of every tile. Tokens are looked up for up to four tiles of a row at once, one a lane:
 * lane l knows token l % 8 of tile l / 8. In the work on a tile eight lanes that store together hit eight different
 * 16-byte pieces of the banks:
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
    /* The next batch: first the lane's id, then its offset. */
    uint32_t next, next_tiles;
    /* The batch after it starts at tile `ahead` of this item. */
    uint32_t item;
    int32_t count, ahead;
    Tile tile, tile_after; /* the names of the next tile and of the one after it */
    Rope rope;             /* of the next tile */
    static constexpr uint32_t kNowhere = 0xFFFFFFFF;

    __device__ __forceinline__ Producer(const Arguments& a, Shared& shared, uint32_t first_item)
        : a(a), shared(shared), warp((threadIdx.x >> 5) & 7), lane(threadIdx.x & 31), item(first_item) {
        const int row_bit = (lane >> 2) & 1;
        latent_from = fresh(64 * (lane >> 3) + 16 * (lane & 3));
        latent_to = fresh(shared_address(shared.tiles[0]) + (lane >> 3) * kBlockBytes +
                          swizzled(kTokensPerWarp * warp + row_bit, 2 * (lane & 3)));
        pair_lane = fresh(row_bit);
        tile = 0;
        tile_after = 1;
        rope = 0;
        ahead = 0;
        count = count_of(a, item / (uint32_t)a.num_parts);
    }

    __device__ __forceinline__ const uint8_t* row_at(uint32_t row_offset) const {
        return a.latent_cache + (uint64_t)row_offset * 16;
    }

    /* Starts to read the next batch's ids; next_tiles 0: there is none. */
    __device__ __forceinline__ void start_batch() {
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
        const int index = ((ahead + (lane >> 3)) * kSplits + split) * kTokens + kTokensPerWarp * warp + (lane & 7);
        const int64_t token = item / (uint32_t)a.num_parts;
        next = kNowhere;
        if (index < count) next = (uint32_t)load_id(a.slot_ids + token * a.topk + index);
        next_tiles = min(num_tiles - ahead, kBatch);
        ahead += next_tiles;
    }

    /* The ids have arrived. */
    __device__ __forceinline__ void finish_batch() {
        const bool is_valid = next < (uint32_t)a.num_slots;
        const uint32_t block = next / (uint32_t)a.block_size;
        const uint32_t row = next - block * (uint32_t)a.block_size;
        next = is_valid ? block * a.block_stride + row * (kRowBytes / 16) : kNowhere;
    }

    /* A token that is not there reads the first row and gets scales of zero. */
    __device__ __forceinline__ void take_batch() {
        valid = __ballot_sync(0xFFFFFFFF, next != kNowhere);
        offset = next == kNowhere ? 0 : next;
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
            dequantize<kAreExact>(a, v.x, v.y, factor, wide);
            store_shared_16(to, wide[0], wide[1], wide[2], wide[3]);
            dequantize<kAreExact>(a, v.z, v.w, factor, wide);
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
        start_batch();
        finish_batch();
        while (next_tiles > 0) {
            const uint32_t num_tiles = next_tiles;
            take_batch();
            if (ahead <= kBatch && buffer_of(tile) == 1) swap_names(0); /* a row starts in buffer 0 */
            for (uint32_t i = 0; i < num_tiles; ++i) {
                load(i);
                copy_rope(i);
                if (i == 0) start_batch();
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

#endif /* DSA_GPU_SPARSE_MLA_SM90_HEADS_CUH_ */
