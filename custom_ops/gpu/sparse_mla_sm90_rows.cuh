/* sparse_mla on Hopper with cache rows as the M dimension of the products: numbers, fragments, shared memory.
 *
 *   S^T [64 tokens, heads] = K Q^T      K: bytes of the ring, widened in registers; Q: shared memory
 *   O^T [512, heads]      += V^T P^T    V: the same bytes, read along the tokens;   P: shared memory
 *
 * N of wgmma is the number of heads, so that 16 heads pay for 16 heads, and no widened copy of a row is ever stored.
 *
 * Numbers
 *   Usual scales (powers of two from 2^-12 to 2^4: is_usual_scale), which is what UE8M0 scales of a model are: the
 *   value of an fp8 number is e4m3 * scale without rounding.
 *     S   e4m3 numbers without their scales and the query are float16, both exact: the query is brought to [2^8, 2^9)
 *         by a power of two per head and group of 128 dims. Scales multiply float32 sums, group after group.
 *     PV  V = e4m3 * scale in float16, exact (2^-21 to 448 * 2^4); P in float16, which loses what lies below 2^-25 of
 *         the sum and keeps more of the rest than bfloat16.
 *   A tile with any other scale (kExact): as the definition says, the value is bfloat16(e4m3 * scale).
 *     S   the value divided by the power of two in its scale: 8 bits, exact in float16; then as above.
 *     PV  V and P in bfloat16.
 *
 * Order of the tokens of a k-step: fragment row g is token bit_reverse(g), row g + 8 is token bit_reverse(g) + 8. With
 * rows of 656 bytes this spreads both the reads along a row and those along the tokens over all banks.
 */
#ifndef DSA_GPU_SPARSE_MLA_SM90_ROWS_CUH_
#define DSA_GPU_SPARSE_MLA_SM90_ROWS_CUH_

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include "hopper.cuh"
#include "wgmma.cuh"

namespace dsa {
namespace gpu {
namespace rows {

constexpr int kLatent = 512;
constexpr int kRope = 64;
constexpr int kWidth = kLatent + kRope;
constexpr int kScaleOffset = kLatent; /* bytes in a cache row */
constexpr int kRopeOffset = kLatent + 16;
constexpr int kRowBytes = kRopeOffset + 2 * kRope;
constexpr int kPieces = kRowBytes / 16;
constexpr int kSteps = kWidth / 16; /* of S, the last kRopeSteps in bfloat16 */
constexpr int kRopeSteps = kRope / 16;
constexpr int kGroups = kLatent / 128;

constexpr int kSlotRows = 32; /* of the ring: what its barriers count */
constexpr int kSlotBytes = kSlotRows * kRowBytes;
constexpr int kProducerWarps = 4;
constexpr int kProducerRows = kSlotRows / kProducerWarps; /* of a slot, per warp */
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kThreads = kConsumers + 32 * kProducerWarps;
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224; /* 2 * 224 + 56 = 3 * 168, the registers of the launch */

constexpr float kSlack = 8.0f; /* log2 by which a score may exceed the reference before the sums are rescaled */

struct Arguments {
    const uint8_t* query;
    const uint8_t* latent_cache;
    const int32_t* slot_ids;
    const int32_t* counts; /* may be null */
    uint8_t* out;
    float* lse; /* may be null */
    int64_t block_stride_bytes;
    int32_t num_slots;
    int32_t block_size;
    int32_t num_heads;
    int32_t num_parts; /* of kHeads heads */
    int32_t topk;
    int32_t spread;    /* CTAs of a row and part that leave what they found in the workspace */
    float4* outputs;   /* there, of every such CTA: [units of a thread][kConsumers], as Shares counts units */
    float2* sums;      /* [kHeads]: reference, sum */
    float scale_log2; /* softmax_scale * log2(e) */
};

/* Who merges what, where kSpread CTAs share a row. A thread holds its heads 8 j + 2 c + e for 8 dims: units of 4 dims
 * of one head, in the order (j, e, dims). The first kOwners CTAs of a cluster are owners: CTA r merges the units
 * [r * kUnits, (r + 1) * kUnits) of every thread or, if there are more owners than units, one unit of the threads in
 * slice r % kSlices. What is sent goes to the same thread of another CTA, so that a warp sends 512 neighbouring bytes
 * to one place. */
template <int kHeads, int kSpread>
struct Shares {
    static constexpr int kOwners = kSpread >= 16 ? 16 : kSpread >= 8 ? 8 : kSpread >= 4 ? 4 : kSpread >= 2 ? 2 : 1;
    static constexpr int kAllUnits = kHeads / 2;
    static constexpr int kSlices = kOwners > kAllUnits ? kOwners / kAllUnits : 1;
    static constexpr int kUnits = kAllUnits * kSlices / kOwners;
    static constexpr int kSliceThreads = kConsumers / kSlices;
    static constexpr int kBytes = kSpread * kUnits * kSliceThreads * 16;
    /* what arrives at an owner: its units from all the others, and the sums of all heads from everyone */
    static constexpr int kOutputBytes = kBytes / kSpread * (kSpread - 1);
    static constexpr int kSumBytes = kSpread * kHeads * 8;
};

/* kHeads of a CTA (N of wgmma); kWide warpgroups share a tile of 64 * kWide tokens and split the dims of its output;
 * kSlots of the ring. What other CTAs send arrives in a buffer of its own or, where the ring should be longer, in the
 * ring once it is idle. */
template <int kHeads, int kWide, int kSlots, int kSpread, bool kOwnBuffer>
struct Shared {
    static constexpr int kTeams = 2 / kWide;
    static constexpr int kReceivedBytes = Shares<kHeads, kSpread>::kBytes;
    static constexpr int kWeightStepBytes = 32 * kHeads; /* 16 tokens */
    alignas(128) uint8_t query[kSteps * 32 * kHeads];
    alignas(128) uint8_t ring[kSlots][kSlotBytes];
    alignas(128) uint8_t weights[kTeams][4 * kWide * kWeightStepBytes];
    alignas(16) uint8_t buffer[kOwnBuffer ? kReceivedBytes : 16];
    float2 received_sums[kSpread][kHeads]; /* of every CTA: reference, sum */
    float query_scales[kGroups][kHeads];
    alignas(8) float references[kTeams][kHeads];
    float warp_sums[kConsumerWarps][kHeads];
    int32_t maxima[kTeams][2][kHeads];     /* ordered() of the tile's largest scores */
    uint8_t valid[kSlots][kProducerWarps]; /* a bit per row */
    uint64_t full[kSlots];
    uint64_t free[kSlots];
    uint64_t all_received;

    /* [units merged here][source][threads that sent] 4 floats */
    __device__ float* received() { return (float*)(kOwnBuffer ? buffer : ring[0]); }
    __device__ const float* received() const { return (const float*)(kOwnBuffer ? buffer : ring[0]); }
};

/* Named barriers; 0 belongs to __syncthreads. */
enum { kAllConsumers = 1, kTeam = 2 /* and 3 */, kExchange = 4 };

/* ---- numbers ---- */

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float2 unpack_f16(uint32_t packed) {
    float2 v;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(packed));
    return v;
}

__device__ __forceinline__ uint32_t multiply_f16(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

/* Four e4m3 numbers to float16: (0, 1) and (2, 3). */
__device__ __forceinline__ void widen(uint32_t bytes, uint32_t& low, uint32_t& high) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(low), "=r"(high)
        : "r"(bytes));
}

__device__ __forceinline__ bool is_usual_scale(float scale) {
    return scale >= 0x1p-12f && scale <= 0x1p4f && (__float_as_uint(scale) & 0x007FFFFF) == 0;
}

/* Two float16 numbers times factor, in [1, 2), rounded to the 8 bits of bfloat16. */
__device__ __forceinline__ uint32_t multiply_as_bf16(uint32_t packed, float factor) {
    const float2 v = unpack_f16(packed);
    const uint32_t rounded = pack_bf16(v.x * factor, v.y * factor);
    return pack_f16(__uint_as_float(rounded << 16), __uint_as_float(rounded & 0xFFFF0000));
}

/* Floats as integers of the same order, for atomicMax. */
__device__ __forceinline__ int32_t ordered(float x) {
    const int32_t bits = __float_as_int(x);
    return bits >= 0 ? bits : bits ^ 0x7FFFFFFF;
}
__device__ __forceinline__ float from_ordered(int32_t x) { return __int_as_float(x >= 0 ? x : x ^ 0x7FFFFFFF); }

/* ---- memory ---- */

__device__ __forceinline__ uint4 load_16(const uint8_t* from) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t from) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from));
    return v;
}

__device__ __forceinline__ float load_shared_float(uint32_t from) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from));
    return v;
}

__device__ __forceinline__ void store_shared_4(uint32_t to, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}

/* Stores to a CTA of the cluster whose bytes count at a barrier of that CTA: no fence, no barrier of the cluster. */
__device__ __forceinline__ void send_4(uint32_t remote, float4 v, uint32_t remote_barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
        "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(remote_barrier)
        : "memory");
}

__device__ __forceinline__ void send_2(uint32_t remote, float2 v, uint32_t remote_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(remote),
                 "f"(v.x), "f"(v.y), "r"(remote_barrier)
                 : "memory");
}

/* cluster_arrive of a CTA that has nothing to show but its start. */
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

/* named_barrier_sync that also says whether any of the threads had true. */
__device__ __forceinline__ bool named_barrier_any(int id, int num_threads, bool mine) {
    uint32_t any;
    asm volatile(
        "{\n.reg .pred p, q;\nsetp.ne.u32 p, %3, 0;\n"
        "barrier.cta.red.or.pred q, %1, %2, p;\nselp.u32 %0, 1, 0, q;\n}\n"
        : "=r"(any)
        : "r"(id), "r"(num_threads), "r"((uint32_t)mine)
        : "memory");
    return any != 0;
}

/* Fragment row g (0 .. 7) holds this row of its 16 tokens; row g + 8 the one 8 further. */
__device__ __forceinline__ int token_of(int g) { return ((g & 1) << 2) | (g & 2) | (g >> 2); }

/* Where a consumer thread stands. Warps of one warpgroup share a fragment of 64 rows. */
struct Place {
    int team; /* works on tiles team, team + kTeams, ... */
    int wide; /* warpgroup within the team */
    int warp; /* within the warpgroup */
    int g;    /* fragment row, and g + 8 */
    int c;    /* fragment columns 2 c, 2 c + 1 of every 8 */
};

template <int kWide>
__device__ __forceinline__ Place place_of_thread() {
    /* taken from one lane, so that the compiler sees that a warp agrees and keeps descriptors in uniform registers */
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    const int lane = threadIdx.x & 31;
    return {kWide == 2 ? 0 : warp >> 2, kWide == 2 ? warp >> 2 : 0, warp & 3, lane >> 2, lane & 3};
}

/* Output tile m of a thread has dims first_dim_of + 2 m (fragment row g) and + 2 m + 1 (row g + 8). */
template <int kWide>
__device__ __forceinline__ int first_dim_of(const Place& at) {
    constexpr int kTiles = 8 / kWide; /* of 64 dims, per warpgroup */
    return (at.wide * 4 + at.warp) * (16 * kTiles) + at.g * (2 * kTiles);
}

/* The same once two teams have merged and each has kept half of the tiles. */
template <int kWide>
__device__ __forceinline__ int first_kept_dim(const Place& at) {
    return first_dim_of<kWide>(at) + (kWide == 1 ? 8 * at.team : 0);
}

}  // namespace rows
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_SPARSE_MLA_SM90_ROWS_CUH_ */
