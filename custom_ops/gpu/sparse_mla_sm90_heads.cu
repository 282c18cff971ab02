/* sparse_mla on Hopper for many rows: 64 heads of one row a CTA, consumers as in sparse_mla_sm90_heads_consume.cuh.
 *
 * attend: two producer warpgroups gather the rows of tile t + 1 into registers and widen them to bfloat16 into shared
 * memory. What limits is the pipe of the shared memory: 64 tokens take some 3400 of its cycles, 1150 of them for S.
 * Few rows: two CTAs of a cluster share the tiles of a row and merge what they have through each other's memory.
 *
 * attend_widened: where many query rows use the same cache rows, these are widened once, and one producer warpgroup only
 * copies them. Both kernels are launched; the device knows which one has work.
 */
#include <float.h>

#include "sparse_mla_kernels.h"
#include "sparse_mla_sm90_heads_consume.cuh"
#include "sparse_mla_sm90_heads_load.cuh"

namespace dsa {
namespace gpu {
namespace heads {

namespace {

/* arrivals: when half of a tile, or a rope, is full. */
__device__ __forceinline__ void init_barriers(Shared& shared, int half_arrivals, int rope_arrivals) {
    for (int i = 0; i < 4; ++i) {
        barrier_init(shared_address(&shared.full[i / 2][i % 2]), half_arrivals);
        barrier_init(shared_address(&shared.free[i / 2][i % 2]), 4);
    }
    for (int i = 0; i < kRopes; ++i) {
        barrier_init(shared_address(&shared.rope_full[i]), rope_arrivals);
        barrier_init(shared_address(&shared.rope_free[i]), 4);
    }
}

/* One CTA a multiprocessor goes through items (a row and 64 of its heads); its producers are up to two tiles ahead,
 * across items too. kSplits > 1: one item a cluster, its tiles dealt out to the CTAs. */
template <int kSplits>
__global__ void __launch_bounds__(kThreads, 1) attend(const __grid_constant__ Arguments a) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *(Shared*)memory;
    if (kSplits == 1 && are_widened(a.widened)) return; /* the other kernel's call */
    if (threadIdx.x == 0) {
        init_barriers(shared, kProducerWarps, 32 * kProducerWarps);
        if (kSplits > 1) {
            barrier_init(shared_address(&shared.others_may_write), 8 * (kSplits - 1));
            barrier_init(shared_address(&shared.others_have_written), 8 * (kSplits - 1));
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (kSplits > 1) cluster_arrive();
    wait_for_previous_kernel(); /* before anything in global memory is touched */
    const int split = blockIdx.x % kSplits;
    const uint32_t item = blockIdx.x / kSplits;
    if (threadIdx.x >= 256) {
        give_registers<kProducerRegisters>();
        if (kSplits > 1) cluster_wait();
        Producer<kSplits>(a, shared, item).run();
        let_next_kernel_start();
    } else {
        take_registers<kConsumerRegisters>();
        consume<Direct, kSplits>(a, shared, item, split);
    }
#endif
}

/* As attend<1>, from widened rows. */
__global__ void __launch_bounds__(kWidenedThreads, 1) attend_widened(const __grid_constant__ Arguments a) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *(Shared*)memory;
    if (!are_widened(a.widened)) return;
    if (threadIdx.x == 0) {
        /* A producer's threads arrive when their copies have landed, its first lane once more: see WidenedProducer. */
        init_barriers(shared, 33 * kWidenedProducerWarps, 32 * kWidenedProducerWarps);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 256) {
        give_registers<kWidenedProducerRegisters>();
        WidenedProducer<kWidenedProducerWarps>(a, shared, blockIdx.x).run();
    } else {
        take_registers<kWidenedConsumerRegisters>();
        consume<Widened, 1>(a, shared, blockIdx.x, 0);
    }
#endif
}

/* A launch of num_clusters clusters; it keeps what its configuration points to. If it overlaps the kernel before, its
 * CTAs start while that one ends and wait for its results. */
template <int kSplits>
struct Launch {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};

    Launch(uint32_t num_clusters, bool overlaps, cudaStream_t stream) {
        config.gridDim = dim3(num_clusters * kSplits);
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = sizeof(Shared);
        config.stream = stream;
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = overlaps;
        attributes[1].id = cudaLaunchAttributeClusterDimension;
        attributes[1].val.clusterDim.x = kSplits;
        attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
        config.attrs = attributes;
        config.numAttrs = kSplits > 1 ? 2 : 1;
    }
    Launch(const Launch&) = delete;
};

template <int kSplits>
dsa_status launch(const Arguments& a, uint32_t num_clusters, cudaStream_t stream) {
    const dsa_status status = allow_shared_bytes(attend<kSplits>, sizeof(Shared));
    if (status != DSA_OK) return status;
    /* Where CTAs go through many items the start does not count, and starting early cost up to 3 %. */
    const bool overlaps = num_clusters == a.num_items && a.widened.num_places == nullptr; /* which is read at the start */
    const Launch<kSplits> launch(num_clusters, overlaps, stream);
    const cudaError_t error = cudaLaunchKernelEx(&launch.config, attend<kSplits>, a);
    return error != cudaSuccess ? status_of(error) : launched(stream);
}

/* Clusters of kSplits CTAs that the current device runs at the same time: fewer than multiprocessors / kSplits, because
 * a cluster does not cross the device's parts. The answer never changes, so that threads may race to store it. */
template <int kSplits>
uint32_t max_clusters() {
    static int32_t known[kMaxDevices]; /* 0: not asked yet; else one more than the answer */
    int ordinal = 0, clusters = 0;
    if (cudaGetDevice(&ordinal) != cudaSuccess || ordinal >= kMaxDevices) return 0;
    const int32_t found = __atomic_load_n(&known[ordinal], __ATOMIC_ACQUIRE);
    if (found != 0) return (uint32_t)(found - 1);
    if (allow_shared_bytes(attend<kSplits>, sizeof(Shared)) != DSA_OK) return 0;
    const Launch<kSplits> launch(1, false, nullptr);
    if (cudaOccupancyMaxActiveClusters(&clusters, attend<kSplits>, &launch.config) != cudaSuccess) {
        cudaGetLastError();
        clusters = 0;
    }
    __atomic_store_n(&known[ordinal], clusters + 1, __ATOMIC_RELEASE);
    return (uint32_t)clusters;
}

int64_t num_items_of(const dsa_sparse_mla_params& p) { return p.num_tokens * ((p.num_heads + kHeads - 1) / kHeads); }

/* Ids are looked for some tiles ahead, in int32; offsets in the cache count 16 bytes, in uint32. */
bool has_room_for(const dsa_sparse_mla_params& p) {
    return p.topk <= INT32_MAX - 8192 && p.num_blocks * p.block_stride_bytes / 16 <= UINT32_MAX &&
           num_items_of(p) <= INT32_MAX / 2;
}

}  // namespace
}  // namespace heads

size_t sparse_mla_sm90_heads_workspace_bytes(const dsa_sparse_mla_params& params) {
    return heads::has_room_for(params) ? widen_workspace_bytes(params) : 0;
}

/* Bound: 2 * 64 * (576 + 512) * count FLOP for 64 heads of a row on the tensor cores, 34 cycles of a multiprocessor a
 * slot; 656 bytes a slot read. */
dsa_status sparse_mla_sm90_heads(const dsa_sparse_mla_params& params, const Device& device, bool has_workspace,
                                 cudaStream_t stream) {
    using namespace heads;
    if (!device.has_hopper_instructions || device.max_shared_bytes < (int32_t)sizeof(Shared)) return DSA_UNSUPPORTED;
    if (!has_room_for(params)) return DSA_UNSUPPORTED;
    Arguments a = {};
    a.query = (const uint8_t*)params.query;
    a.latent_cache = params.num_blocks > 0 ? params.latent_cache : a.query;
    a.slot_ids = params.slot_ids;
    a.counts = params.counts;
    a.out = (uint8_t*)params.out;
    a.lse = params.lse;
    a.block_stride = (uint32_t)(params.block_stride_bytes / 16);
    a.num_slots = (int32_t)(params.num_blocks * params.block_size);
    a.block_size = params.block_size;
    a.num_heads = params.num_heads;
    a.num_parts = (params.num_heads + kHeads - 1) / kHeads;
    a.topk = params.topk;
    a.shifts = kWidenShifts;
    a.query_signs = params.softmax_scale < 0.0f ? 0x80008000 : 0;
    a.scale_log2 = fmaxf(fabsf(params.softmax_scale) * 1.44269504088896f, FLT_MIN); /* masked scores stay -inf */
    a.num_items = (uint32_t)num_items_of(params);
    const uint32_t num_multiprocessors = (uint32_t)device.num_multiprocessors;
    const uint32_t num_tiles = (uint32_t)((params.topk + kTokens - 1) / kTokens);
    if (num_tiles >= 2 && a.num_items <= max_clusters<2>()) return launch<2>(a, a.num_items, stream);
    const uint32_t num_ctas = a.num_items < num_multiprocessors ? a.num_items : num_multiprocessors;
    if (has_workspace) {
        dsa_status status = widen_rows(params, device, &a.widened, stream);
        if (status != DSA_OK) return status;
        status = allow_shared_bytes(attend_widened, sizeof(Shared));
        if (status != DSA_OK) return status;
        attend_widened<<<num_ctas, kWidenedThreads, sizeof(Shared), stream>>>(a);
        status = launched(stream);
        if (status != DSA_OK) return status;
    }
    return launch<1>(a, num_ctas, stream);
}

}  // namespace gpu
}  // namespace dsa
