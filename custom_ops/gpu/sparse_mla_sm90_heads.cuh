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

#include "e4m3_to_bf16.cuh"
#include "hopper.cuh"
#include "sparse_mla_sm90_widen.h"
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
constexpr int kConsumerWarps = 8;
constexpr int kProducerWarps = 8;
constexpr int kTokensPerWarp = kTokens / kProducerWarps;
constexpr int kWidenedThreads = 384; /* two consumer warpgroups and one that copies */
constexpr int kWidenedProducerWarps = 4;
constexpr int kWidenedProducerRegisters = 40;
constexpr int kWidenedConsumerRegisters = 232; /* 2 * 232 + 40 = 504, the registers of the launch */
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
    WidenShifts shifts;
    WidenedRows widened;
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

/* condition ? a : b, in a form that does not tempt the compiler to choose between addresses of a and b. */
__device__ __forceinline__ float select_float(bool condition, float a, float b) {
    float chosen;
    asm("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\nselp.f32 %0, %1, %2, p;\n}\n"
        : "=f"(chosen)
        : "f"(a), "f"(b), "r"((int)condition));
    return chosen;
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

/* ---- tiles ---- */

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

}  // namespace heads
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_SPARSE_MLA_SM90_HEADS_CUH_ */
