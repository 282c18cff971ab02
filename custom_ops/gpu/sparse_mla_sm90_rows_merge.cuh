/* sparse_mla on Hopper with cache rows as the M dimension: the parts of a row become one, in a CTA and over a cluster.
 *
 *   sums of the warps -> shared memory;  two teams -> halves of the dims each;  CTAs of a cluster -> owners (Shares)
 *   out = sum_r w_r O_r / sum_r w_r l_r,  w_r = 2^(reference_r - largest reference), in the order of the ranks r
 *
 * The only barrier of the cluster says that every CTA is ready to receive; the bytes that arrive count at a barrier of
 * the owner's shared memory. Where clusters would leave multiprocessors unused, CTAs keep their parts in the workspace
 * instead, and another kernel, merge_parts, merges them in the same order.
 */
#ifndef DSA_GPU_SPARSE_MLA_SM90_ROWS_MERGE_CUH_
#define DSA_GPU_SPARSE_MLA_SM90_ROWS_MERGE_CUH_

#include "sparse_mla_sm90_rows.cuh"

namespace dsa {
namespace gpu {
namespace rows {

/* The sum of every warp's tokens. */
template <int kHeads, typename Memory>
__device__ __forceinline__ void publish_sums(Memory& shared, const Place& at, float (&sums)[kHeads / 4]) {
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i)
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
            sums[i] += __shfl_xor_sync(~0u, sums[i], distance);
    if (at.g != 0) return;
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i)
        shared.warp_sums[threadIdx.x >> 5][(i >> 1) * 8 + 2 * at.c + (i & 1)] = sums[i];
}

/* exp2 of a difference of references; nothing relative to nothing counts nothing. */
__device__ __forceinline__ float relative_weight(float reference, float common) {
    return reference == -INFINITY ? 0.0f : exp2_fast(reference - common);
}

template <int kHeads, int kWide>
constexpr int kBoxBytes = kWide == 1 ? 2 * 4 * (kHeads / 2) * 128 * 4 : 0;

/* Two teams: each brings its output to the common reference, keeps half of the dims and hands the other half over. The
 * ring is idle by now. The lower four tiles of o are the kept ones afterwards. */
template <int kHeads, typename Memory>
__device__ __forceinline__ void merge_teams(Memory& shared, const Place& at, float (&o)[8][kHeads / 2]) {
    constexpr int kHalf = 4, kColumns = kHeads / 2;
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i) {
        const int head = (i >> 1) * 8 + 2 * at.c + (i & 1);
        const float mine = shared.references[at.team][head];
        const float factor = relative_weight(mine, fmaxf(mine, shared.references[at.team ^ 1][head]));
#pragma unroll
        for (int m = 0; m < 2 * kHalf; ++m) {
            o[m][(i >> 1) * 4 + (i & 1)] *= factor;
            o[m][(i >> 1) * 4 + 2 + (i & 1)] *= factor;
        }
    }
    float* box = (float*)((uint8_t*)shared.ring + Memory::kReceivedBytes); /* behind what may arrive */
    float* given = box + at.team * (kHalf * kColumns * 128) + threadIdx.x % 128;
    const float* taken = box + (at.team ^ 1) * (kHalf * kColumns * 128) + threadIdx.x % 128;
#pragma unroll
    for (int m = 0; m < kHalf; ++m)
#pragma unroll
        for (int i = 0; i < kColumns; ++i) given[(m * kColumns + i) * 128] = at.team == 0 ? o[kHalf + m][i] : o[m][i];
    named_barrier_sync(kExchange, kConsumers);
#pragma unroll
    for (int m = 0; m < kHalf; ++m)
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            o[m][i] = (at.team == 0 ? o[m][i] : o[kHalf + m][i]) + taken[(m * kColumns + i) * 128];
}

/* Reference and sum of a head over the whole CTA, in the order of the warps. */
template <int kTeams, typename Memory>
__device__ __forceinline__ float2 sums_of_block(const Memory& shared, int head) {
    float reference = shared.references[0][head];
    if (kTeams == 2) reference = fmaxf(reference, shared.references[1][head]);
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kConsumerWarps; ++warp) {
        const float factor = kTeams == 2 ? relative_weight(shared.references[warp / 4][head], reference) : 1.0f;
        sum += factor * shared.warp_sums[warp][head];
    }
    return make_float2(reference, sum);
}

__device__ __forceinline__ float lse_of(float reference, float sum) {
    return reference == -INFINITY ? -INFINITY : (reference + log2f(sum)) * 0.693147180559945f;
}

template <int kHeads, int kSpread, typename Memory>
__device__ __forceinline__ void expect_parts(Memory& shared) {
    using Share = Shares<kHeads, kSpread>;
    barrier_arrive_expect(shared_address(&shared.all_received), Share::kOutputBytes + Share::kSumBytes);
}

template <int kHeads, int kTeams, int kSpread, int kTiles, typename Memory>
__device__ __forceinline__ void send_parts(Memory& shared, int rank, const float (&o)[kTiles][kHeads / 2]) {
    using Share = Shares<kHeads, kSpread>;
    const uint32_t barrier = shared_address(&shared.all_received);
    const int slice = threadIdx.x / Share::kSliceThreads, thread = threadIdx.x % Share::kSliceThreads;
    float4* const here = (float4*)shared.received() + rank * Share::kSliceThreads + thread;
#pragma unroll
    for (int unit = 0; unit < Share::kAllUnits; ++unit) {
        const int owner = unit / Share::kUnits * Share::kSlices + slice;
        float4* const to = here + unit % Share::kUnits * (kSpread * Share::kSliceThreads);
        const int i = unit / 4 * 4 + (unit / 2 & 1), m = unit % 2 * 2;
        const float4 v = make_float4(o[m][i], o[m][i + 2], o[m + 1][i], o[m + 1][i + 2]);
        if (owner == rank)
            *to = v; /* read by this thread itself */
        else
            send_4(remote_address(shared_address(to), owner), v, remote_address(barrier, owner));
    }
    for (int i = threadIdx.x; i < kHeads * Share::kOwners; i += kConsumers) {
        const uint32_t mine = shared_address(&shared.received_sums[rank][i % kHeads]);
        send_2(remote_address(mine, i / kHeads), sums_of_block<kTeams>(shared, i % kHeads),
               remote_address(barrier, i / kHeads));
    }
}

/* The owner weighs the parts in the order of the ranks and writes out and lse. */
template <int kHeads, int kSpread, typename Memory>
__device__ __forceinline__ void store_output(const Arguments& a, const Memory& shared, const Place& at, int rank,
                                             uint32_t token, int first_head, int first_dim) {
    using Share = Shares<kHeads, kSpread>;
    if ((int)threadIdx.x / Share::kSliceThreads != rank % Share::kSlices) return;
    const int first_unit = rank / Share::kSlices * Share::kUnits;
    constexpr int kDimUnits = Share::kUnits > 1 ? 2 : 1; /* of one head */
#pragma unroll
    for (int i = 0; i < Share::kUnits; i += kDimUnits) {
        const int unit = first_unit + i;
        const int head = unit / 4 * 8 + 2 * at.c + (unit / 2 & 1), dim = first_dim + unit % 2 * 4;
        float4 sum_of[kDimUnits] = {};
        float reference = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kSpread; ++r) reference = fmaxf(reference, shared.received_sums[r][head].x);
#pragma unroll
        for (int r = 0; r < kSpread; ++r) {
            const float2 part = shared.received_sums[r][head];
            const float weight = relative_weight(part.x, reference);
            sum = fmaf(weight, part.y, sum);
#pragma unroll
            for (int d = 0; d < kDimUnits; ++d) {
                const float4 v = ((const float4*)shared.received())[((i + d) * kSpread + r) * Share::kSliceThreads +
                                                                    threadIdx.x % Share::kSliceThreads];
                sum_of[d].x = fmaf(weight, v.x, sum_of[d].x), sum_of[d].y = fmaf(weight, v.y, sum_of[d].y);
                sum_of[d].z = fmaf(weight, v.z, sum_of[d].z), sum_of[d].w = fmaf(weight, v.w, sum_of[d].w);
            }
        }
        if (first_head + head >= a.num_heads) continue;
        const float inverse = reference == -INFINITY ? 0.0f : 1.0f / sum;
        const int64_t index = (int64_t)token * a.num_heads + first_head + head;
        uint32_t packed[2 * kDimUnits];
#pragma unroll
        for (int d = 0; d < kDimUnits; ++d) {
            packed[2 * d] = pack_bf16(sum_of[d].x * inverse, sum_of[d].y * inverse);
            packed[2 * d + 1] = pack_bf16(sum_of[d].z * inverse, sum_of[d].w * inverse);
        }
        uint8_t* to = a.out + (index * kLatent + dim) * 2;
        if constexpr (kDimUnits == 2)
            *(uint4*)to = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        else
            *(uint2*)to = make_uint2(packed[0], packed[1]);
        if (dim == 0 && a.lse != nullptr) a.lse[index] = lse_of(reference, sum);
    }
}

/* No cluster: out and lse straight from the registers. */
template <int kHeads, int kWide, int kTiles, typename Memory>
__device__ __forceinline__ void store_own_output(const Arguments& a, const Memory& shared, const Place& at,
                                                 uint32_t token, int first_head, int first_dim,
                                                 const float (&o)[kTiles][kHeads / 2]) {
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int head = 8 * j + 2 * at.c + e;
            if (first_head + head >= a.num_heads) continue;
            const float2 sums = sums_of_block<2 / kWide>(shared, head);
            const float inverse = sums.x == -INFINITY ? 0.0f : 1.0f / sums.y;
            uint32_t packed[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) packed[m] = pack_bf16(o[m][4 * j + e] * inverse, o[m][4 * j + 2 + e] * inverse);
            const int64_t index = (int64_t)token * a.num_heads + first_head + head;
            uint8_t* to = a.out + (index * kLatent + first_dim) * 2;
            *(uint4*)to = make_uint4(packed[0], packed[1], packed[2], packed[3]);
            if (first_dim == 0 && a.lse != nullptr) a.lse[index] = lse_of(sums.x, sums.y);
        }
}

/* ---- parts in the workspace ---- */

template <int kHeads>
constexpr int kUnitsOfThread = kHeads / 2; /* of a CTA's part: 4 dims of one head each, in the order (j, e, dims) */

/* Numbers relative to the CTA's own references. A warp stores 512 neighbouring bytes at a time. */
template <int kHeads, int kTeams, int kTiles, typename Memory>
__device__ __forceinline__ void store_part(const Arguments& a, const Memory& shared,
                                           const float (&o)[kTiles][kHeads / 2]) {
    uint32_t block, thread; /* read here, or addresses would take registers all through the loop over tiles */
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    float4* to = a.outputs + (int64_t)block * (kUnitsOfThread<kHeads> * kConsumers) + thread;
#pragma unroll
    for (int unit = 0; unit < kUnitsOfThread<kHeads>; ++unit) {
        const int i = unit / 4 * 4 + (unit / 2 & 1), m = unit % 2 * 2;
        to[unit * kConsumers] = make_float4(o[m][i], o[m][i + 2], o[m + 1][i], o[m + 1][i + 2]);
    }
    if (thread < kHeads) a.sums[(int64_t)block * kHeads + thread] = sums_of_block<kTeams>(shared, thread);
}

/* One unit of every thread of a row's part of heads: the parts of its CTAs, weighed in their order. */
template <int kHeads, int kWide>
__device__ __forceinline__ void merge_unit(const Arguments& a, int64_t row_and_heads, int unit) {
    const Place at = place_of_thread<kWide>();
    constexpr int kAtOnce = 8; /* loads in flight */
    constexpr int64_t kStride = kUnitsOfThread<kHeads> * kConsumers;
    const int64_t first_part = row_and_heads * a.spread;
    const float4* outputs = a.outputs + first_part * kStride + unit * kConsumers + threadIdx.x;
    const int head = unit / 4 * 8 + 2 * at.c + (unit / 2 & 1);
    const float2* sums = a.sums + first_part * kHeads + head;
    float reference = -INFINITY, sum = 0.0f;
    float4 total = {};
    for (int first = 0; first < a.spread; first += kAtOnce) {
        float4 v[kAtOnce];
        float2 s[kAtOnce];
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
            v[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f), s[r] = make_float2(-INFINITY, 0.0f);
            if (first + r < a.spread)
                v[r] = __ldcg(outputs + (first + r) * kStride), s[r] = __ldcg(sums + (first + r) * kHeads);
        }
        float common = reference;
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) common = fmaxf(common, s[r].x);
        const float kept = relative_weight(reference, common);
        sum *= kept, total.x *= kept, total.y *= kept, total.z *= kept, total.w *= kept;
        reference = common;
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
            const float weight = relative_weight(s[r].x, common);
            sum = fmaf(weight, s[r].y, sum);
            total.x = fmaf(weight, v[r].x, total.x), total.y = fmaf(weight, v[r].y, total.y);
            total.z = fmaf(weight, v[r].z, total.z), total.w = fmaf(weight, v[r].w, total.w);
        }
    }
    const int token = (int)(row_and_heads / a.num_parts);
    const int first_head = (int)(row_and_heads - (int64_t)token * a.num_parts) * kHeads;
    if (first_head + head >= a.num_heads) return;
    const float inverse = reference == -INFINITY ? 0.0f : 1.0f / sum;
    const int64_t index = (int64_t)token * a.num_heads + first_head + head;
    const int dim = first_kept_dim<kWide>(at) + unit % 2 * 4;
    *(uint2*)(a.out + (index * kLatent + dim) * 2) = make_uint2(pack_bf16(total.x * inverse, total.y * inverse),
                                                               pack_bf16(total.z * inverse, total.w * inverse));
    if (dim == 0 && a.lse != nullptr) a.lse[index] = lse_of(reference, sum);
}

}  // namespace rows
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_SPARSE_MLA_SM90_ROWS_MERGE_CUH_ */
