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
constexpr int kTileBytes = (kRopeBlock + 1) * kBlockBytes;
constexpr int kThreads = 512; /* two consumer and two producer warpgroups */
constexpr int kProducerRegisters = 64;
constexpr int kConsumerRegisters = 192; /* 2 * 192 + 2 * 64 = 4 * 128, the registers of the launch */
constexpr int kProducerWarps = 8;
constexpr int kTokensPerWarp = kTokens / kProducerWarps;
constexpr int kBatch = 32 / kTokensPerWarp; /* tiles whose tokens a producer warp looks up together, one a lane */
constexpr int kMaxSplits = 8;               /* CTAs that share a row: the largest portable cluster */
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
    int32_t is_prefetching; /* rows into the L2, some tiles ahead */
    uint32_t sixteen; /* 16 and 256: multiplied by numbers that the compiler does not know, words are shifted in the */
    uint32_t pow2_8;  /* multiply pipe, which is idle, and not in the one that moves bits, which is not */
};

struct Shared {
    uint8_t query[kTileBytes];
    uint8_t tiles[2][kTileBytes]; /* tile t in t % 2; its rope block holds P once S is computed */
    float references[2][kHeads];  /* of tile t in t % 2: what P of this tile is relative to, log2 */
    float sums[2][kHeads];
    uint64_t full[2][2]; /* [tile % 2][columns 0 .. 255, columns 256 .. 511] */
    uint64_t free[2][2]; /* the same, used up by consumer 0, 1; with it the rope block */
    uint64_t rope_full[2];
    uint8_t valid[4][8]; /* [valid_slot(tile)]: a bit per token, a byte per producer warp */
    /* Only where CTAs share a row: reference and sum of each, and when the others may write here and have written. */
    float2 partial_sums[kMaxSplits][kHeads];
    uint64_t others_may_write, others_have_written;
};
static_assert(sizeof(Shared) <= 232448, "the shared memory of a multiprocessor");

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
__device__ __forceinline__ void dequantize(const Arguments& a, uint32_t first, uint32_t second, uint32_t scale,
                                           bool are_exact, uint32_t (&wide)[4]) {
    widen(a, first, wide[0], wide[1]);
    widen(a, second, wide[2], wide[3]);
    const uint32_t high = __byte_perm(scale, scale, 0x3232);
    if (are_exact) {
#pragma unroll
        for (int i = 0; i < 4; ++i) wide[i] = multiply_bf16(wide[i], high);
        return;
    }
    const uint32_t low = __byte_perm(scale, scale, 0x1010);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t value = multiply_bf16(wide[i], 0x7B807B80); /* 2^120 */
        wide[i] = multiply_add_bf16(value, high, multiply_bf16(value, low));
    }
}

/* ---- memory ---- */

__device__ __forceinline__ uint4 load_16(const uint8_t* from) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
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

__device__ __forceinline__ void prefetch_row(const uint8_t* row) {
#pragma unroll
    for (int i = 0; i < kRowBytes; i += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i) : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}

/* Four 8 x 8 matrices of 16-bit numbers; lanes 8 i .. 8 i + 7 name the rows of matrix i. */
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* Where 16-byte piece `piece` of row `row` lies in a swizzled block. */
__device__ __forceinline__ uint32_t swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

/* The upper word of every descriptor here: 8 rows of 128 bytes a step, 128-byte swizzle. The lower word holds the address
 * and is stepped alone, in 32 bits. */
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

}  // namespace heads
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_SPARSE_MLA_SM90_HEADS_CUH_ */
