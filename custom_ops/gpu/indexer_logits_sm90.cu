#include "indexer_logits_sm90.cuh"

namespace dsa {
namespace gpu {
namespace {

/* How a CTA shares its work: kWarpgroups warpgroups multiply, one more warp copies keys. A warpgroup multiplies a tile of
 * keys by kParts times kPartRows rows, kPartRows * kHeads columns at a time. */
template <int kHeadsPadded, int kWarpgroupCount, int kPartCount, int kRowsOfPart, int kStageCount, int kBlockCount>
struct Shape {
    static constexpr int kHeads = kHeadsPadded;
    static constexpr int kWarpgroups = kWarpgroupCount;
    static constexpr int kParts = kPartCount;
    static constexpr int kPartRows = kRowsOfPart;
    static constexpr int kStages = kStageCount;
    static constexpr int kBlocks = kBlockCount; /* of a multiprocessor */
    static constexpr int kWarpgroupRows = kParts * kPartRows;
    static constexpr int kRows = kWarpgroups * kWarpgroupRows;
    static constexpr int kReaders = kWarpgroups * 128;
    static constexpr int kThreads = kReaders + 32;
    static constexpr int kReaderBarrier = 1; /* a named barrier; 0 is __syncthreads */
};

template <typename S>
struct Shared {
    uint8_t query[S::kRows * S::kHeads * kDim]; /* first: 1024-byte aligned */
    KeyRing<S::kStages, S::kReaders / 32> ring;
    float weights[S::kRows * S::kHeads];
    ScheduleShared<S::kRows> schedule;
    Walk<S::kRows> walks[2]; /* of the filling warp, of the warpgroups: one thread walks for all, to spare registers */
    Segment segments[2];
    bool is_segment[2];

    __device__ __forceinline__ void next_segment(const IndexerLogitsArguments& a, int who) {
        is_segment[who] = walks[who].next(a, segments[who]);
    }
};

template <typename S>
constexpr int shared_bytes() {
    return (int)sizeof(Shared<S>) + 1024; /* what alignment may cost */
}

__device__ __forceinline__ uint8_t* aligned_shared(uint8_t* raw) {
    return raw + (1024 - shared_address(raw) % 1024) % 1024;
}

/* Block ids and queries start on their way to the L2 while the schedule is made; every thread takes one line. */
__device__ __forceinline__ void prefetch_inputs(const IndexerLogitsArguments& a) {
    constexpr int64_t kLine = 128;
    const int64_t line = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * kLine;
    const auto prefetch = [&](const void* array, int64_t bytes) {
        if (line < bytes) asm volatile("prefetch.global.L2 [%0];" ::"l"((const uint8_t*)array + line));
    };
    prefetch(a.block_table, (int64_t)a.num_requests * a.max_blocks * 4);
    prefetch(a.query, (int64_t)a.num_tokens * a.index_n_heads * kDim);
}

/* The filling warp. */
template <typename S>
__device__ __forceinline__ void fill_ring(const IndexerLogitsArguments& a, const CUtensorMap& cache, Shared<S>& shared) {
    const bool is_lane_0 = threadIdx.x % 32 == 0;
    uint32_t position = 0;
    while (true) {
        if (is_lane_0) shared.next_segment(a, 0);
        __syncwarp();
        if (!shared.is_segment[0]) break;
        TileIds ids(a, shared.segments[0]);
#pragma unroll 1
        for (int32_t i = 0; i < ids.count; ++i, ++position) {
            const int32_t block = ids.block(i);
            if (is_lane_0) shared.ring.fill(a, cache, position, block, ids.part(i));
        }
        __syncwarp();
    }
}

/* The rows whose scores a thread stores, from row `first` of a run on. With one row a part, lanes 0 and 1 of a quad store
 * it; with more, lane % 4 / 2 chooses one row of each pair. */
template <typename S>
struct OwnRows {
    static constexpr int kStep = S::kPartRows == 1 ? 1 : 2;
    static constexpr int kCount = S::kWarpgroupRows / kStep;
    float* logits; /* of row 0, at key own_key() */
    int32_t lengths[kCount]; /* less own_key(); 0: nothing to store */

    __device__ __forceinline__ OwnRows(const IndexerLogitsArguments& a, const Run& run, int32_t first) {
        const int32_t half = threadIdx.x % 4 / 2;
        const int32_t row = first + (kStep == 2 ? half : 0);
        logits = a.logits + (int64_t)(run.first_row + row) * a.logits_stride + own_key();
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const bool is_row = row + kStep * i < run.num_rows && (kStep == 2 || half == 0);
            lengths[i] = is_row ? row_length(a, run.first_row + row + kStep * i) - own_key() : 0;
        }
    }

    __device__ __forceinline__ void store(const IndexerLogitsArguments& a, int i, int32_t first_key, float score) const {
        if (first_key < lengths[i]) logits[i * kStep * a.logits_stride + first_key] = score;
    }
};

/* All scores of one tile for the rows of a warpgroup. */
template <typename S>
__device__ __forceinline__ void score_tile(const IndexerLogitsArguments& a, Shared<S>& shared, uint32_t position,
                                           int32_t first_key, uint32_t query,
                                           const float (&weights)[S::kParts][S::kPartRows][S::kHeads / 4],
                                           const OwnRows<S>& rows) {
    const uint32_t stage = position % S::kStages;
    const float scale = shared.ring.is_valid[stage] ? shared.ring.scales[stage][own_key()] : NAN;
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
        float d[S::kPartRows * S::kHeads / 2], sums[S::kPartRows][2];
        multiply(d, shared_address(shared.ring.tiles[stage]), query + part * S::kPartRows * S::kHeads * kDim);
        if (part == S::kParts - 1) shared.ring.release(position);
        weigh<S::kPartRows, S::kHeads>(d, weights[part], sums);
        if (S::kPartRows == 1) {
            rows.store(a, part, first_key, reduce_quad(sums[0]) * scale);
        } else {
#pragma unroll
            for (int pair = 0; pair < S::kPartRows / 2; ++pair)
                rows.store(a, part * (S::kPartRows / 2) + pair, first_key,
                           reduce_quad(sums[2 * pair], sums[S::kPartRows == 1 ? 0 : 2 * pair + 1]) * scale);
        }
    }
}

/* The warpgroups. In a run of few rows they take turns at the tiles, else each has rows of its own. */
template <typename S>
__device__ __forceinline__ void score_segments(const IndexerLogitsArguments& a, Shared<S>& shared) {
    const int32_t warpgroup = S::kWarpgroups == 1 ? 0 : __shfl_sync(~0u, threadIdx.x / 128, 0);
    uint32_t position = 0;
    while (true) {
        if (threadIdx.x == 0) shared.next_segment(a, 1);
        named_barrier_sync(S::kReaderBarrier, S::kReaders);
        if (!shared.is_segment[1]) break;
        const Run run = shared.segments[1].run;
        load_queries<S::kRows, S::kHeads, S::kReaders>(a, run, shared.query);
        load_weights<S::kRows, S::kHeads, S::kReaders>(a, run, shared.weights);
        const bool takes_turns = run.num_rows <= S::kWarpgroupRows;
        const int32_t first_row = takes_turns ? 0 : warpgroup * S::kWarpgroupRows;
        const bool has_rows = first_row < run.num_rows;
        const OwnRows<S> rows(a, run, first_row);
        copy_async_wait_all();
        fence_async_proxy();
        named_barrier_sync(S::kReaderBarrier, S::kReaders);
        float weights[S::kParts][S::kPartRows][S::kHeads / 4];
#pragma unroll
        for (int part = 0; part < S::kParts; ++part)
            own_weights<S::kPartRows, S::kHeads>(shared.weights + (first_row + part * S::kPartRows) * S::kHeads,
                                                 weights[part]);
        const uint32_t query = shared_address(shared.query) + first_row * S::kHeads * kDim;
        const int32_t last_key = shared.segments[1].last_tile * kTile;
#pragma unroll 1
        for (int32_t key = shared.segments[1].first_tile * kTile; key < last_key; key += kTile, ++position) {
            shared.ring.await(position);
            if (takes_turns ? position % S::kWarpgroups == warpgroup : has_rows) {
                score_tile<S>(a, shared, position, key, query, weights, rows);
            } else {
                shared.ring.release(position);
            }
        }
        named_barrier_sync(S::kReaderBarrier, S::kReaders); /* queries and segment have been used */
    }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    indexer_logits_sm90_kernel(const IndexerLogitsArguments a, const __grid_constant__ CUtensorMap cache) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint8_t raw_shared[];
    auto& shared = *reinterpret_cast<Shared<S>*>(aligned_shared(raw_shared));
    if (threadIdx.x == 0) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&cache) : "memory");
        shared.ring.begin();
    }
    prefetch_inputs(a);
    __syncthreads();
    constexpr int kSchedulers = S::kWarpgroups == 1 ? 32 : S::kThreads;
    const Walk<S::kRows> walk = schedule<S::kRows, kSchedulers>(a, shared.schedule);
    if (threadIdx.x >= S::kReaders) {
        if (threadIdx.x == S::kReaders) shared.walks[0] = walk;
        fill_ring<S>(a, cache, shared);
    } else {
        if (threadIdx.x == 0) shared.walks[1] = walk;
        score_segments<S>(a, shared);
    }
#endif
}

/* The cache as blocks of rows of 128 bytes; what lies behind a block's keys is not part of it. */
dsa_status describe_cache(const IndexerLogitsArguments& a, CUtensorMap* map) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? (Encode)found : nullptr;
    }();
    if (!encode) return DSA_UNSUPPORTED;
    const int64_t block_bytes = a.scale_offset + a.block_size * 4;
    const cuuint64_t sizes[3] = {kDim, (cuuint64_t)a.block_size, (cuuint64_t)a.num_blocks};
    const cuuint64_t strides[2] = {kDim, (cuuint64_t)(a.num_blocks > 1 ? a.block_stride_bytes : block_bytes)};
    const cuuint32_t box[3] = {kDim, kTile, 1};
    const cuuint32_t steps[3] = {1, 1, 1};
    const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<uint8_t*>(a.index_cache), sizes, strides,
                                   box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? DSA_OK : DSA_UNSUPPORTED;
}

template <typename S>
dsa_status launch(const IndexerLogitsArguments& a, const Device& device, cudaStream_t stream) {
    CUtensorMap cache;
    if (const dsa_status status = describe_cache(a, &cache)) return status;
    const auto kernel = &indexer_logits_sm90_kernel<S>;
    constexpr int kBytes = shared_bytes<S>();
    if (const dsa_status status = allow_shared_bytes(kernel, kBytes)) return status;
    const int64_t tiles = (int64_t)a.num_tokens * ((a.max_length + kTile - 1) / kTile); /* there are no more */
    const int64_t places = (int64_t)device.num_multiprocessors * S::kBlocks;
    kernel<<<(uint32_t)(tiles < places ? tiles : places), S::kThreads, kBytes, stream>>>(a, cache);
    return launched(stream);
}

#ifndef V_BLOCKS
#define V_BLOCKS 4
#endif
#ifndef V_STAGES
#define V_STAGES 4
#endif
#ifndef V_WG
#define V_WG 3
#endif
#ifndef V_PSTAGES
#define V_PSTAGES 8
#endif

/* One row a request (decode). Bound: 132 bytes a key read, 4 bytes a score written. Several small CTAs a multiprocessor,
 * so that one's start and sums hide behind another's copies. */
template <int kHeads>
using SingleRows = Shape<kHeads, 1, 1, 1, V_STAGES, V_BLOCKS>;

/* Two rows a request (decode with a drafted token): the same bytes. */
template <int kHeads>
using RowPairs = Shape<kHeads, 1, 2, 1, V_STAGES, 3>;

/* Many rows a request (prefill). Bound: 2 * heads * 128 FLOP a score; a key is read once for kRows rows. One warpgroup
 * multiplies while the others weigh. */
template <int kHeads>
using ManyRows = Shape<kHeads, V_WG, 1, 128 / kHeads, V_PSTAGES, 1>;

/* Rows a request from which the groups of ManyRows are mostly full. */
constexpr int64_t kManyRows = 8;

template <int kHeads>
dsa_status choose(const IndexerLogitsArguments& a, const Device& device, cudaStream_t stream) {
    if (a.num_tokens <= a.num_requests) return launch<SingleRows<kHeads>>(a, device, stream);
    if (a.num_tokens < kManyRows * a.num_requests) return launch<RowPairs<kHeads>>(a, device, stream);
    return launch<ManyRows<kHeads>>(a, device, stream);
}

}  // namespace

const char* indexer_logits_sm90_refusal(const dsa_indexer_logits_params& p) {
    constexpr int64_t kMaxStride = (int64_t)1 << 40; /* of a tensor map */
    if (p.cache_format != DSA_FP8) return "the cache is not fp8";
    if (p.index_head_dim != kDim) return "index_head_dim is not 128";
    if (p.index_n_heads > 64) return "more than 64 heads";
    if (p.block_size % kTile != 0) return "block_size is not a multiple of 64";
    if (p.num_blocks == 0) return "the cache has no block";
    if ((uint64_t)p.index_cache % 16 != 0 || (p.num_blocks > 1 && p.block_stride_bytes % 16 != 0))
        return "blocks are not 16-byte aligned";
    if (p.num_blocks > 1 && p.block_stride_bytes >= kMaxStride) return "block_stride_bytes is 2^40 or more";
    if ((uint64_t)p.query % 16 != 0) return "query is not 16-byte aligned";
    const int64_t tiles_of_row = (p.logits_width + kTile - 1) / kTile;
    if (p.num_tokens > 0 && tiles_of_row > INT32_MAX / p.num_tokens) return "the tiles exceed int32";
    return nullptr;
}

dsa_status indexer_logits_sm90(const dsa_indexer_logits_params& p, const IndexerLogitsArguments& a,
                               const Device& device, cudaStream_t stream) {
    return p.index_n_heads <= 32 ? choose<32>(a, device, stream) : choose<64>(a, device, stream);
}

}  // namespace gpu
}  // namespace dsa
