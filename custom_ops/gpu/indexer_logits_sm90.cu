#include "indexer_logits_sm90.cuh"

namespace dsa {
namespace gpu {
namespace {

/* How a CTA shares its work: kWarpgroups warpgroups multiply, one more warp copies what they need. A warpgroup
 * multiplies a tile of keys by kRows rows of queries at once. */
template <int kHeadsPadded, int kWarpgroupCount, int kRowsOfWarpgroup, int kStageCount, int kBlockCount, int kCost>
struct Shape {
    static constexpr int kHeads = kHeadsPadded;
    static constexpr int kWarpgroups = kWarpgroupCount;
    static constexpr int kRows = kRowsOfWarpgroup;
    static constexpr int kGroupRows = kWarpgroups * kRows; /* rows of a group */
    static constexpr int kStages = kStageCount; /* tiles of keys on their way */
    static constexpr int kBuffers = 2;          /* of work: the present and the next */
    static constexpr int kBlocks = kBlockCount; /* of a multiprocessor */
    static constexpr int kSwitchCost = kCost;
    static constexpr int kReaderWarps = kWarpgroups * 4;
    static constexpr int kThreads = kReaderWarps * 32 + 32;
    using Part = Columns<kRows, kHeads>; /* of one warpgroup */
    using Share = Walk<kGroupRows, kSwitchCost>;
};

/* What the warpgroups do next. */
template <typename S>
struct alignas(8) Work {
    float weights[S::kGroupRows * S::kHeads]; /* first: read in pairs */
    int32_t lengths[S::kGroupRows];
    int32_t first_row;
    int32_t num_rows;
    int32_t first_tile;
    int32_t num_tiles; /* 0: nothing more */

    /* In a run of few rows all warpgroups have the same ones and take turns at the tiles. */
    __device__ __forceinline__ static bool takes_turns(int32_t num_rows) {
        return S::kWarpgroups > 1 && num_rows <= S::kRows;
    }
};

template <typename S>
struct Shared {
    uint8_t query[S::kBuffers][S::kWarpgroups][S::Part::kBytes]; /* first: 1024-byte aligned */
    KeyRing<S::kStages> ring;
    Work<S> works[S::kBuffers];
    RingBarriers<S::kBuffers> work_barriers;
    ScheduleShared<S::kGroupRows> schedule;
    typename S::Share walk;
    Segment segment;
    bool is_segment;
};

template <typename S>
constexpr int shared_bytes() {
    return (int)sizeof(Shared<S>) + 1024; /* what alignment may cost */
}

__device__ __forceinline__ uint8_t* aligned_shared(uint8_t* raw) {
    return raw + (1024 - shared_address(raw) % 1024) % 1024;
}

/* Block ids and queries start on their way to the L2, where the kernel before sees the same bytes, should it be writing
 * them; every reading thread takes one line of each. */
template <typename S>
__device__ __forceinline__ void prefetch_inputs(const IndexerLogitsArguments& a) {
    constexpr int64_t kLine = 128;
    const int64_t line = ((int64_t)blockIdx.x * S::kReaderWarps * 32 + threadIdx.x) * kLine;
    const auto prefetch = [&](const void* array, int64_t bytes) {
        if (line < bytes) asm volatile("prefetch.global.L2 [%0];" ::"l"((const uint8_t*)array + line));
    };
    prefetch(a.block_table, (int64_t)a.num_requests * a.max_blocks * 4);
    prefetch(a.query, (int64_t)a.num_tokens * a.index_n_heads * kDim);
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/* ---- copies ---- */

/* One warp sends work number n: queries, weights and lengths of `segment`, or the end where there is none. `rows` holds
 * the segment's rows. */
template <typename S>
__device__ __forceinline__ void send_work(const IndexerLogitsArguments& a, const CUtensorMap& queries,
                                          Shared<S>& shared, uint32_t n, bool is_segment, const Segment& segment,
                                          const RowGroup<S::kGroupRows>& rows) {
    const int lane = threadIdx.x % 32, buffer = n % S::kBuffers;
    const uint32_t barrier = shared.work_barriers.filled(n);
    Work<S>& work = shared.works[buffer];
    const Run run = segment.run;
    shared.work_barriers.await_empty(n);
    if (is_segment && lane == 0) {
        barrier_arrive_expect(barrier, S::kWarpgroups * S::kRows * S::kHeads * kDim);
#pragma unroll
        for (int w = 0; w < S::kWarpgroups; ++w) {
            const int32_t row = run.first_row + (Work<S>::takes_turns(run.num_rows) ? 0 : w * S::kRows);
            copy_box(shared_address(shared.query[buffer][w]), queries, 0, row, barrier);
        }
    }
    __syncwarp();
    if (is_segment) {
#pragma unroll 4
        for (int i = lane; i < S::kGroupRows * S::kHeads; i += 32) {
            const int row = i / S::kHeads, head = i % S::kHeads;
            const bool is_weight = row < run.num_rows && head < a.index_n_heads;
            const int64_t index = is_weight ? (int64_t)(run.first_row + row) * a.index_n_heads + head : 0;
            copy_async_4_or_zero(shared_address(&work.weights[i]), a.folded_weights + index, is_weight);
        }
        copy_async_arrive(barrier);
        int32_t length = 0; /* of row `lane` of the run */
#pragma unroll
        for (int i = 0; i < S::kGroupRows; ++i)
            if (rows.first_row + i == run.first_row + lane && lane < run.num_rows) length = rows.lengths[i];
        if (lane < S::kGroupRows) work.lengths[lane] = length;
    }
    if (lane == 0) {
        work.first_row = run.first_row;
        work.num_rows = run.num_rows;
        work.first_tile = segment.first_tile;
        work.num_tiles = is_segment ? segment.last_tile - segment.first_tile : 0;
    }
    __syncwarp();
    barrier_arrive(barrier); /* releases the writes above */
    if (!is_segment) {
        barrier_arrive(barrier);
        if (lane == 0) barrier_arrive(barrier);
    }
}

/* The filling warp: all tiles, and all work but the first, which another warp sends at the same time. */
template <typename S>
__device__ __forceinline__ void fill(const IndexerLogitsArguments& a, const CUtensorMap& cache,
                                     const CUtensorMap& queries, Shared<S>& shared, typename S::Share walk) {
    Segment segment = {};
    bool is_segment = walk.next(a, segment);
    TileIds ids(a, segment, is_segment);
    if (threadIdx.x % 32 == 0) shared.walk = walk;
    uint32_t position = 0;
#pragma unroll 1
    for (uint32_t n = 1; is_segment; ++n) {
#pragma unroll 1
        for (int32_t i = 0; i < ids.count; ++i, ++position)
            shared.ring.fill(a, cache, position, ids.block(i), ids.part(i));
        __syncwarp();
        if (threadIdx.x % 32 == 0) shared.is_segment = shared.walk.next(a, shared.segment);
        __syncwarp();
        is_segment = shared.is_segment;
        ids = TileIds(a, shared.segment, is_segment);
        if (!is_segment) let_next_kernel_start(); /* all that this CTA needs is on its way */
        send_work<S>(a, queries, shared, n, is_segment, shared.segment, shared.walk.rows);
    }
}

/* ---- the warpgroups ---- */

/* The rows whose scores a thread stores. With one row, lanes 0 and 1 of a quad store it; with more, lane % 4 / 2
 * chooses one row of each pair. */
template <typename S>
struct OwnRows {
    static constexpr int kStep = S::kRows == 1 ? 1 : 2;
    static constexpr int kCount = S::kRows / kStep;
    float* logits; /* of the first, at key own_key() of the next tile */
    int32_t lengths[kCount]; /* counted from there; not positive: nothing to store */

    __device__ __forceinline__ OwnRows(const IndexerLogitsArguments& a, const Work<S>& work, int32_t first) {
        const int32_t half = threadIdx.x % 4 / 2;
        const int32_t row = first + (kStep == 2 ? half : 0);
        const int32_t key = work.first_tile * kTile + own_key();
        logits = a.logits + (int64_t)(work.first_row + row) * a.logits_stride + key;
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            lengths[i] = kStep == 1 && half == 1 ? 0 : work.lengths[row + kStep * i] - key;
    }

    __device__ __forceinline__ void store(const IndexerLogitsArguments& a, int i, float score) const {
        if (lengths[i] > 0) logits[i * kStep * a.logits_stride] = score;
    }
    __device__ __forceinline__ void next_tile() {
        logits += kTile;
#pragma unroll
        for (int i = 0; i < kCount; ++i) lengths[i] -= kTile;
    }
};

/* All scores of one tile for the rows of a warpgroup. */
template <typename S>
__device__ __forceinline__ void score_tile(const IndexerLogitsArguments& a, Shared<S>& shared, uint32_t position,
                                           uint32_t query, const float (&weights)[S::kRows][S::kHeads / 4 + 1],
                                           const OwnRows<S>& rows) {
    const uint32_t stage = position % S::kStages;
    const float scale = shared.ring.scales[stage][own_key()];
    float d[S::Part::kCount / 2], sums[S::kRows][2];
    multiply(d, descriptor_low(shared_address(shared.ring.tiles)) + stage * (kTileBytes / 16), query);
    shared.ring.barriers.release(position);
    weigh<S::kRows, S::kHeads>(d, weights, sums);
    if (S::kRows == 1) {
        rows.store(a, 0, reduce_quad(sums[0]) * scale);
    } else {
#pragma unroll
        for (int pair = 0; pair < S::kRows / 2; ++pair)
            rows.store(a, pair, reduce_quad(sums[2 * pair], sums[S::kRows == 1 ? 0 : 2 * pair + 1]) * scale);
    }
}

/* The columns that hold u, for all rows of a warpgroup: those that do not exist cost less than a branch. */
template <typename S>
__device__ __forceinline__ void prepare_queries(const float* row_weights, uint8_t* query, int32_t warpgroup,
                                                int (&exponents)[S::kRows]) {
#pragma unroll
    for (int row = 0; row < S::kRows; ++row) {
        exponents[row] = piece_exponent<S::kHeads>(row_weights + row * S::kHeads);
        fold_heads<S::kHeads>(row_weights + row * S::kHeads, exponents[row], query, row * S::kHeads,
                              S::Part::piece(row, threadIdx.x % 4));
    }
    fence_async_proxy();
    named_barrier_sync(1 + warpgroup, 128);
}

template <typename S>
__device__ __forceinline__ void score(const IndexerLogitsArguments& a, Shared<S>& shared) {
    const int32_t warpgroup = S::kWarpgroups == 1 ? 0 : __shfl_sync(~0u, threadIdx.x / 128, 0);
    uint32_t position = 0;
#pragma unroll 1
    for (uint32_t n = 0;; ++n) {
        shared.work_barriers.await_full(n);
        const Work<S>& work = shared.works[n % S::kBuffers];
        if (work.num_tiles == 0) break;
        uint8_t* columns = shared.query[n % S::kBuffers][warpgroup];
        const bool takes_turns = Work<S>::takes_turns(work.num_rows);
        const int32_t first_row = takes_turns ? 0 : warpgroup * S::kRows;
        int exponents[S::kRows];
        prepare_queries<S>(work.weights + first_row * S::kHeads, columns, warpgroup, exponents);
        float weights[S::kRows][S::kHeads / 4 + 1];
        own_weights<S::kRows, S::kHeads>(work.weights + first_row * S::kHeads, exponents, weights);
        OwnRows<S> rows(a, work, first_row);
        uint32_t query = descriptor_low(shared_address(columns));
        asm volatile("" : "+r"(query)); /* or it would be computed anew for every tile */
        const uint32_t end = position + work.num_tiles;
        if (!takes_turns && first_row < work.num_rows) {
#pragma unroll 1
            for (; position != end; ++position, rows.next_tile()) {
                shared.ring.barriers.await_full(position);
                score_tile<S>(a, shared, position, query, weights, rows);
            }
        } else if (S::kWarpgroups > 1) {
#pragma unroll 1
            for (; position != end; ++position, rows.next_tile()) {
                shared.ring.barriers.await_full(position);
                if (takes_turns && position % S::kWarpgroups == warpgroup) {
                    score_tile<S>(a, shared, position, query, weights, rows);
                } else {
                    shared.ring.barriers.release(position);
                }
            }
        }
        shared.work_barriers.release(n);
    }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    indexer_logits_sm90_kernel(const IndexerLogitsArguments a, const __grid_constant__ CUtensorMap cache,
                               const __grid_constant__ CUtensorMap queries) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint8_t raw_shared[];
    auto& shared = *reinterpret_cast<Shared<S>*>(aligned_shared(raw_shared));
    const bool is_filler = threadIdx.x >= S::kReaderWarps * 32;
    const bool is_first_sender = threadIdx.x < 32;
    if (threadIdx.x == 32) {
        shared.ring.barriers.begin(1, S::kReaderWarps);
        shared.work_barriers.begin(65, S::kReaderWarps); /* a warp's lanes twice, and one for the copied bytes */
    }
    if (threadIdx.x == 64) prefetch_map(cache);
    if (threadIdx.x == 96) prefetch_map(queries);
    if (!is_filler) prefetch_inputs<S>(a);
    wait_for_previous_kernel();
    constexpr int kSchedulers = S::kWarpgroups == 1 ? 32 : S::kThreads; /* groups are few where their rows are */
    typename S::Share walk = {};
    if (is_filler || is_first_sender || kSchedulers > 32)
        walk = schedule<S::kGroupRows, S::kSwitchCost, kSchedulers>(a, shared.schedule);
    __syncthreads(); /* the barriers are there */
    if (is_filler) {
        fill<S>(a, cache, queries, shared, walk);
    } else {
        if (is_first_sender) {
            Segment segment = {};
            const bool is_segment = walk.next(a, segment);
            send_work<S>(a, queries, shared, 0, is_segment, segment, walk.rows);
        }
        score<S>(a, shared);
    }
#endif
}

/* ---- launch ---- */

/* FASTDEPLOY_DSA_CUDA_TENSOR_MAPS=0 stands for a driver that makes none. */
bool are_tensor_maps_wanted() {
    const char* value = getenv("FASTDEPLOY_DSA_CUDA_TENSOR_MAPS");
    return value == nullptr || value[0] != '0';
}

/* Bytes [size_2, size_1, 128], copied in boxes [third, second, 128] with the 128-byte swizzle; zeros arrive for what
 * lies outside the sizes. */
dsa_status describe(const void* array, int64_t size_1, int64_t size_2, int64_t stride_2, int second, int third,
                    CUtensorMap* map) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = []() -> Encode {
        if (!are_tensor_maps_wanted()) return nullptr;
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? (Encode)found : nullptr;
    }();
    if (!encode) return DSA_UNSUPPORTED;
    const cuuint64_t sizes[3] = {kDim, (cuuint64_t)size_1, (cuuint64_t)size_2};
    const cuuint64_t strides[2] = {kDim, (cuuint64_t)stride_2};
    const cuuint32_t box[3] = {kDim, (cuuint32_t)second, (cuuint32_t)third};
    const cuuint32_t steps[3] = {1, 1, 1};
    const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(array), sizes, strides, box,
                                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? DSA_OK : DSA_UNSUPPORTED;
}

template <typename S>
dsa_status launch(const IndexerLogitsArguments& a, const Device& device, cudaStream_t stream) {
    CUtensorMap cache, queries;
    const int64_t block_stride = a.num_blocks > 1 ? a.block_stride_bytes : a.scale_offset + a.block_size * 4;
    if (const dsa_status status = describe(a.index_cache, a.block_size, a.num_blocks, block_stride, kTile, 1, &cache))
        return status;
    if (const dsa_status status = describe(a.query, a.index_n_heads, a.num_tokens, a.index_n_heads * kDim, S::kHeads,
                                           S::kRows, &queries))
        return status;
    const auto kernel = &indexer_logits_sm90_kernel<S>;
    constexpr int kBytes = shared_bytes<S>();
    if (const dsa_status status = allow_shared_bytes(kernel, kBytes)) return status;
    const int64_t tiles = (int64_t)a.num_tokens * ((a.max_length + kTile - 1) / kTile); /* there are no more */
    const int64_t places = (int64_t)device.num_multiprocessors * S::kBlocks;
    /* The launch itself overlaps the end of the kernel before; the kernel waits for its results. */
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(tiles < places ? tiles : places));
    config.blockDim = dim3(S::kThreads);
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, a, cache, queries);
    return error == cudaSuccess ? launched(stream) : status_of(error);
}

/* One row a request (decode). Bound: 132 bytes a key read, 4 bytes a score written. Several small CTAs share a
 * multiprocessor, so that one's start and sums hide behind another's copies. */
template <int kHeads>
using SingleRows = Shape<kHeads, 1, 1, 3, 4, 0>;

/* Two rows a request (decode with a drafted token): the same bytes. */
template <int kHeads>
using RowPairs = Shape<kHeads, 1, 2, 4, 3, 0>;

/* Many rows a request (prefill). Bound: 2 * heads * 128 FLOP a score; a key is read once for kGroupRows rows. One
 * warpgroup multiplies while the others weigh; a thread's weights and sums for 128 columns leave room for three. A CTA
 * has the multiprocessor for itself, and nothing hides that it goes to other rows: 2.7 us, 4 tiles. */
template <int kHeads>
using ManyRows = Shape<kHeads, kHeads == 64 ? 3 : 2, 128 / kHeads, 8, 1, 4>;

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
    const int64_t costs_of_row = (p.logits_width + kTile - 1) / kTile + ManyRows<64>::kSwitchCost;
    if (p.num_tokens > 0 && costs_of_row > INT32_MAX / p.num_tokens) return "the tiles exceed int32";
    return nullptr;
}

dsa_status indexer_logits_sm90(const dsa_indexer_logits_params& p, const IndexerLogitsArguments& a,
                               const Device& device, cudaStream_t stream) {
    return p.index_n_heads <= 32 ? choose<32>(a, device, stream) : choose<64>(a, device, stream);
}

}  // namespace gpu
}  // namespace dsa
