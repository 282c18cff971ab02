/* Widens every cache block that a call of sparse_mla uses, once.
 *
 *   claim   each used block gets a place in the workspace: whoever comes first takes the next free one
 *   widen   the blocks' rows are read from the cache and written as bfloat16
 *
 * Which place a block gets depends on who came first, what stands there does not, and no result depends on the place.
 * How many blocks are used is known on the device only. If they are more than there is room for, which is made only for as
 * many as it can pay for, nothing is widened, and the attention, which looks at the same number, takes the cache itself.
 */
#include "sparse_mla_sm90_widen.h"

#include "e4m3_to_bf16.cuh"

namespace dsa {
namespace gpu {
namespace {

/* Fewer rows are mostly decode steps, whose requests have nothing in common; the passes here would cost them some 2 %. */
constexpr int64_t kMinTokens = 512;
/* A cache row is widened if on the average so many query rows may use it, were all their ids to count: a widened row is
 * 1.8 times as long as one in the cache, and is written and read. */
constexpr int64_t kMinUses = 4;
constexpr int64_t kMaxWidenedBytes = 256 << 20;
constexpr int64_t kMaxPlaceBytes = 64 << 20; /* it is cleared in every call */

constexpr int kLatent = 512, kGroup = 128, kScaleOffset = kLatent, kRopeOffset = kLatent + 16;
constexpr int kRopeBytes = 2 * 64;

constexpr int kThreads = 256;
constexpr int kIdsPerThread = 8;
constexpr int kIdsPerStep = kThreads * kIdsPerThread;
constexpr int kBlocksPerMultiprocessor = 8;

struct Arguments {
    const uint8_t* latent_cache;
    const int32_t* slot_ids;
    const int32_t* counts;    /* may be null */
    uint32_t* num_places;     /* used blocks */
    uint32_t* place_of_block; /* [num_blocks]: 1 + the place */
    uint32_t* block_of_place; /* [capacity] */
    uint8_t* rows;            /* [capacity, block_size, kWidenedBytes] */
    int64_t block_stride;
    int64_t topk;
    uint32_t capacity; /* in blocks */
    uint32_t num_slots;
    uint32_t block_size;
    WidenShifts shifts;
};

/* The number of used blocks and everything else, each at a multiple of 256 bytes from the workspace's start. */
struct Sections {
    size_t place_of_block, block_of_place, rows, end;
};

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

/* Blocks to make room for. */
int64_t capacity_of(const dsa_sparse_mla_params& p) {
    const int64_t worth_it = p.num_tokens * p.topk / kMinUses / p.block_size;
    const int64_t fitting = kMaxWidenedBytes / kWidenedBytes / p.block_size;
    const int64_t wanted = worth_it < p.num_blocks ? worth_it : p.num_blocks;
    return wanted < fitting ? wanted : fitting;
}

Sections sections_of(const dsa_sparse_mla_params& p) {
    Sections s = {};
    const size_t capacity = (size_t)capacity_of(p);
    s.place_of_block = rounded(sizeof(uint32_t));
    s.block_of_place = s.place_of_block + rounded((size_t)p.num_blocks * sizeof(uint32_t));
    s.rows = s.block_of_place + rounded(capacity * sizeof(uint32_t));
    s.end = s.rows + capacity * (size_t)p.block_size * kWidenedBytes;
    return s;
}

/* A block of threads goes through a row's ids, kIdsPerStep at a time. Ids of one cache block mostly come together, so
 * they first agree in shared memory on one of them that asks for all. */
__global__ void __launch_bounds__(kThreads) claim(const __grid_constant__ Arguments a) {
    constexpr int kEntries = 2 * kIdsPerStep;
    __shared__ uint32_t blocks[kIdsPerStep];
    __shared__ uint32_t speakers[kEntries]; /* an id's index in this step, by its block's number modulo kEntries */
    const int64_t token = blockIdx.x;
    const int64_t count = a.counts == nullptr ? a.topk : min(max((int64_t)a.counts[token], (int64_t)0), a.topk);
    for (int64_t first = 0; first < count; first += kIdsPerStep) {
        uint32_t ids[kIdsPerThread];
#pragma unroll
        for (int i = 0; i < kIdsPerThread; ++i) {
            const int64_t index = first + i * kThreads + threadIdx.x;
            ids[i] = index < count ? (uint32_t)a.slot_ids[token * a.topk + index] : UINT32_MAX;
        }
        __syncthreads(); /* the step before has read */
#pragma unroll
        for (int i = 0; i < kIdsPerThread; ++i) {
            const int index = i * kThreads + threadIdx.x;
            const uint32_t block = ids[i] / a.block_size;
            blocks[index] = block;
            if (ids[i] < a.num_slots) atomicExch(&speakers[block % kEntries], (uint32_t)index);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kIdsPerThread; ++i) {
            if (ids[i] >= a.num_slots) continue;
            const uint32_t index = i * kThreads + threadIdx.x;
            const uint32_t block = ids[i] / a.block_size, speaker = speakers[block % kEntries];
            if (speaker != index && blocks[speaker] == block) continue;
            uint32_t* place = &a.place_of_block[block];
            if (__ldcg(place) != 0 || atomicCAS(place, 0, UINT32_MAX) != 0) continue;
            const uint32_t mine = atomicAdd(a.num_places, 1);
            *place = 1 + mine;
            if (mine < a.capacity) a.block_of_place[mine] = block;
        }
    }
}

/* A warp a row: a lane has 16 latent columns, the first eight 8 rotated ones, too. */
__global__ void __launch_bounds__(kThreads) widen_blocks(const __grid_constant__ Arguments a) {
    const uint32_t num_places = *a.num_places;
    if (num_places > a.capacity) return;
    const uint32_t lane = threadIdx.x % 32, num_warps = gridDim.x * (kThreads / 32);
    const uint32_t num_rows = num_places * a.block_size;
    for (uint32_t row = (blockIdx.x * kThreads + threadIdx.x) / 32; row < num_rows; row += num_warps) {
        const uint32_t place = row / a.block_size;
        const uint8_t* from = a.latent_cache + a.block_of_place[place] * a.block_stride +
                              (int64_t)(row - place * a.block_size) * (kRopeOffset + kRopeBytes);
        const uint4 codes = __ldcs((const uint4*)(from + 16 * lane));
        const float scale = __ldcs((const float*)(from + kScaleOffset) + 16 * lane / kGroup);
        uint4* to = (uint4*)(a.rows + (uint64_t)row * kWidenedBytes);
        if (lane < kRopeBytes / 16) to[2 * kLatent / 16 + lane] = __ldcs((const uint4*)(from + kRopeOffset) + lane);
        const bool is_exact = is_exact_scale(scale);
        const uint32_t factor = split_scale(scale, is_exact);
        uint32_t wide[2][4];
        if (is_exact) {
            dequantize<true>(a.shifts, codes.x, codes.y, factor, wide[0]);
            dequantize<true>(a.shifts, codes.z, codes.w, factor, wide[1]);
        } else {
            dequantize<false>(a.shifts, codes.x, codes.y, factor, wide[0]);
            dequantize<false>(a.shifts, codes.z, codes.w, factor, wide[1]);
        }
        to[2 * lane] = make_uint4(wide[0][0], wide[0][1], wide[0][2], wide[0][3]);
        to[2 * lane + 1] = make_uint4(wide[1][0], wide[1][1], wide[1][2], wide[1][3]);
    }
}

}  // namespace

size_t widen_workspace_bytes(const dsa_sparse_mla_params& params) {
    if (params.num_tokens < kMinTokens || params.num_tokens > INT32_MAX || capacity_of(params) == 0) return 0;
    if (params.num_blocks > kMaxPlaceBytes / (int64_t)sizeof(uint32_t)) return 0;
    return sections_of(params).end;
}

/* Bound: 4 bytes an id read, 656 + 1152 bytes a row of a used block. */
dsa_status widen_rows(const dsa_sparse_mla_params& params, const Device& device, WidenedRows* widened,
                      cudaStream_t stream) {
    const Sections sections = sections_of(params);
    uint8_t* workspace = (uint8_t*)params.workspace;
    Arguments a = {};
    a.latent_cache = params.latent_cache;
    a.slot_ids = params.slot_ids;
    a.counts = params.counts;
    a.num_places = (uint32_t*)workspace;
    a.place_of_block = (uint32_t*)(workspace + sections.place_of_block);
    a.block_of_place = (uint32_t*)(workspace + sections.block_of_place);
    a.rows = workspace + sections.rows;
    a.block_stride = params.block_stride_bytes;
    a.topk = params.topk;
    a.capacity = (uint32_t)capacity_of(params);
    a.num_slots = (uint32_t)(params.num_blocks * params.block_size);
    a.block_size = (uint32_t)params.block_size;
    a.shifts = kWidenShifts;
    *widened = {a.rows, a.place_of_block, a.num_places, a.capacity};
    const cudaError_t error = cudaMemsetAsync(workspace, 0, sections.block_of_place, stream);
    if (error != cudaSuccess) return status_of(error);
    claim<<<(uint32_t)params.num_tokens, kThreads, 0, stream>>>(a);
    widen_blocks<<<kBlocksPerMultiprocessor * device.num_multiprocessors, kThreads, 0, stream>>>(a);
    return launched(stream);
}

}  // namespace gpu
}  // namespace dsa
