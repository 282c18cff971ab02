/* What the tensor-core kernels of compressed_mla share: 64 heads of one row a block, 256 threads.
 *
 *   S [64 heads, 64 rows] = Q K^T     O [64 heads, 512] += P V,  V = K
 *
 * The query, tiles and P lie in shared memory as bfloat16 in blocks of 64 columns: a block is 64 rows of 128 bytes,
 * whose 16-byte pieces are permuted by the row number (piece ^ row % 8), the 128-byte swizzle of wgmma.
 * Value columns of fp8 rows stand in the order 0 2 1 3, 4 6 5 7, ...: unpacking four e4m3 numbers yields (0, 2) and
 * (1, 3). The query is stored in the same order, and the output is put back in order when it leaves.
 * A tile is of window rows or of entries, never of both; window tiles come first.
 */
#ifndef DSA_GPU_COMPRESSED_MLA_TILE_CUH_
#define DSA_GPU_COMPRESSED_MLA_TILE_CUH_

#include <float.h>
#include <math.h>

#include "compressed_mla_kernels.h"
#include "e4m3_to_bf16.cuh"
#include "hopper.cuh"
#include "latent_row.cuh"
#include "quantize.cuh"

namespace dsa {
namespace gpu {
namespace mla {

constexpr int kHeads = kMlaHeads;
constexpr int kRows = kMlaTileRows;
constexpr int kDim = kMlaHeadDim;
constexpr int kValueDim = kMlaHeadDim - kMlaRopeDim;
constexpr int kValueBlocks = kValueDim / 64;
constexpr int kBlocks = kDim / 64;
constexpr int kBlockBytes = 64 * 128;
constexpr int kTileBytes = kBlocks * kBlockBytes;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kThreadsPerRow = kThreads / kRows;
constexpr int kFp8RowBytes = kValueDim + 2 * kMlaRopeDim;
constexpr int kFp8ScaleBytes = 8;
constexpr float kSlack = 8.0f; /* log2 by which a score may exceed the reference before the sums are rescaled */
constexpr float kLog2E = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;

/* One of the two caches with its slots. */
struct Source {
    const uint8_t* cache;
    const int32_t* slots;
    const int32_t* counts; /* may be null */
    int64_t block_stride_bytes;
    int64_t scales_offset;
    uint32_t num_slots;
    uint32_t block_rows;
    int32_t width;
};

struct Arguments {
    Source window;
    Source entries;
    const uint8_t* query;
    const float* sinks;
    uint8_t* out;
    float* lse;         /* may be null */
    float2* part_sums;  /* [num_items, num_splits, 64] reference, sum; where blocks share a row */
    float* part_values; /* [num_items, num_splits, 64, 512] in the order of columns of a tile */
    int64_t num_tokens;
    int32_t num_heads;
    int32_t num_parts; /* of 64 heads */
    int32_t num_splits;
    float scale_log2;     /* log2(e) times the magnitude of softmax_scale, above 0 */
    uint32_t query_signs; /* flips the sign of two bfloat16 numbers if softmax_scale is negative */
    WidenShifts shifts;
};

/* What a block works on: 64 heads of a row, every num_splits-th of its tiles. */
struct Work {
    int64_t item; /* token * num_parts + part */
    int64_t token;
    int32_t first_head;
    int32_t split;
    int32_t window_count;
    int32_t entry_count;
    int32_t window_tiles;
    int32_t num_tiles; /* of this block */
};

__device__ __forceinline__ int32_t count_of(const Source& source, int64_t token) {
    return source.counts == nullptr ? source.width : max(0, min((int32_t)load_4(source.counts + token), source.width));
}

/* The shuffle tells the compiler that a number is the same in all lanes. */
__device__ __forceinline__ int32_t uniform(int32_t x) { return __shfl_sync(kAllLanes, x, 0); }

/* A launch may begin while the one before ends, and waits here for what that one wrote. */
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
    wait_for_previous_kernel();
#endif
}

/* A block calls this when it has read all rows: launches behind it begin no sooner, so that none of them finds lines of
 * the first-level cache that were read before a launch between them changed the cache. */
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
    let_next_kernel_start();
#endif
}

__device__ __forceinline__ Work work_of(const Arguments& a, uint32_t block) {
    Work work;
    const uint32_t item = block / (uint32_t)a.num_splits, token = item / (uint32_t)a.num_parts;
    work.item = item;
    work.token = token;
    work.first_head = (int32_t)(item - token * (uint32_t)a.num_parts) * kHeads;
    work.split = (int32_t)(block - item * (uint32_t)a.num_splits);
    work.window_count = count_of(a.window, token);
    work.entry_count = count_of(a.entries, token);
    work.window_tiles = (work.window_count + kRows - 1) / kRows;
    const int32_t tiles = work.window_tiles + (work.entry_count + kRows - 1) / kRows;
    work.num_tiles = uniform((tiles - work.split + a.num_splits - 1) / a.num_splits);
    return work;
}

/* ---- numbers ---- */

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 2^(code - 127 + 120), twice; only of codes up to kLastEasyScale. */
constexpr uint32_t kLastEasyScale = 134;
__device__ __forceinline__ uint32_t easy_factor(uint32_t code) { return (code + 120) * 0x00800080; }

/* Has a bit where a byte is the code of a NaN. */
__device__ __forceinline__ uint32_t nan_codes(uint32_t bytes) {
    return ((bytes & 0x7F7F7F7F) + 0x01010101) & 0x80808080;
}

/* ---- shared memory ---- */

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

/* Where 16-byte piece `piece` of row `row` lies in a swizzled block. */
__device__ __forceinline__ uint32_t swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

/* ---- loads without a branch, of zeros where `wanted` is false ---- */

__device__ __forceinline__ uint4 load_16_if(bool wanted, const void* from) {
    uint4 v;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(from), "r"((int)wanted));
    return v;
}

__device__ __forceinline__ uint2 load_8_if(bool wanted, const void* from) {
    uint2 v;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
        "@p ld.global.nc.v2.u32 {%0, %1}, [%2];\n}\n"
        : "=&r"(v.x), "=&r"(v.y)
        : "l"(from), "r"((int)wanted));
    return v;
}

__device__ __forceinline__ int32_t load_int_or(bool wanted, const int32_t* from, int32_t otherwise) {
    int32_t v;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\nmov.b32 %0, %3;\n@p ld.global.nc.s32 %0, [%1];\n}\n"
        : "=&r"(v)
        : "l"(from), "r"((int)wanted), "r"(otherwise));
    return v;
}

/* ---- rows of the caches ---- */

/* A quarter of an fp8 row in a thread's registers: 16 bytes of each group of 64 value numbers, 32 of the rotated. */
struct RawRow {
    uint4 value[kValueBlocks];
    uint4 rope[2];
    uint2 scales;

    __device__ __forceinline__ uint32_t scale_code(int block) const {
        return (block < 4 ? scales.x >> (8 * block) : scales.y >> (8 * (block - 4))) & 0xFF;
    }

    static __device__ __forceinline__ void store_pieces(uint32_t block, int row, int quarter,
                                                        const uint32_t (&wide)[8]) {
        store_shared_16(block + swizzled(row, 2 * quarter), wide[0], wide[1], wide[2], wide[3]);
        store_shared_16(block + swizzled(row, 2 * quarter + 1), wide[4], wide[5], wide[6], wide[7]);
    }

    /* As bfloat16 into row `row` of the tile at `to`. Straight code. Returns whether a number was not treated right. */
    __device__ __forceinline__ bool store(const Arguments& a, uint32_t to, int row, int quarter) const {
        uint32_t nans = 0, largest = 0;
#pragma unroll
        for (int i = 0; i < kValueBlocks; ++i) {
            const uint32_t code = scale_code(i), factor = easy_factor(code);
            const uint32_t words[4] = {value[i].x, value[i].y, value[i].z, value[i].w};
            uint32_t wide[8];
            largest = max(largest, code);
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                nans |= nan_codes(words[w]);
                widen(a.shifts, words[w], wide[2 * w], wide[2 * w + 1]);
                wide[2 * w] = multiply_bf16(wide[2 * w], factor);
                wide[2 * w + 1] = multiply_bf16(wide[2 * w + 1], factor);
            }
            store_pieces(to + i * kBlockBytes, row, quarter, wide);
        }
        const uint32_t wide[8] = {rope[0].x, rope[0].y, rope[0].z, rope[0].w,
                                  rope[1].x, rope[1].y, rope[1].z, rope[1].w};
        store_pieces(to + kValueBlocks * kBlockBytes, row, quarter, wide);
        return nans != 0 || largest > kLastEasyScale;
    }

    /* The value numbers once more, whatever they are. */
    __device__ __forceinline__ void store_carefully(uint32_t to, int row, int quarter) const {
#pragma unroll 1
        for (int i = 0; i < kValueBlocks; ++i) {
            uint4 codes = value[0];
            uint32_t code = scale_code(0);
#pragma unroll
            for (int j = 1; j < kValueBlocks; ++j)
                if (i == j) codes = value[j], code = scale_code(j);
            const float scale = __uint_as_float(code == 0 ? 0x400000u : code << 23);
            const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
            uint32_t wide[8];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                float numbers[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) numbers[n] = e4m3_decode(words[w] >> (8 * n)) * scale;
                wide[2 * w] = pack_bf16(numbers[0], numbers[2]);
                wide[2 * w + 1] = pack_bf16(numbers[1], numbers[3]);
            }
            store_pieces(to + i * kBlockBytes, row, quarter, wide);
        }
    }
};

/* The slot of row `row` of a block's tile number `tile`, -1: none. */
__device__ __forceinline__ int32_t slot_of(const Arguments& a, const Work& work, int tile, int row) {
    const int32_t number = work.split + tile * a.num_splits;
    const bool in_window = number < work.window_tiles;
    const int32_t place = (in_window ? number : number - work.window_tiles) * kRows + row;
    const Source& source = in_window ? a.window : a.entries;
    const bool is_listed = tile < work.num_tiles && place < (in_window ? work.window_count : work.entry_count);
    return load_int_or(is_listed, source.slots + work.token * source.width + place, -1);
}

__device__ __forceinline__ const Source& source_of(const Arguments& a, const Work& work, int tile) {
    return work.split + tile * a.num_splits < work.window_tiles ? a.window : a.entries;
}

/* Where a slot's row begins; slot 0 stands for one that is not there. */
struct Place {
    const uint8_t* block;
    uint32_t row;
    bool is_there;
};

__device__ __forceinline__ Place place_of(const Source& source, int32_t slot) {
    const bool is_there = (uint32_t)slot < source.num_slots;
    const uint32_t known = is_there ? (uint32_t)slot : 0, block = known / source.block_rows;
    return {source.cache + block * source.block_stride_bytes, known - block * source.block_rows, is_there};
}

/* A thread brings a quarter of one row of every tile. The slot is read one tile ahead of the row, and the row one tile
 * ahead of the products; until then fp8 rows wait in registers, and bfloat16 rows are copied without passing them. */
template <dsa_format kFormat>
struct Loader {
    const Arguments& a;
    const Work& work;
    int row, quarter;
    int32_t slot; /* of the next tile to load */
    RawRow raw;   /* fp8 only */
    bool is_there;

    __device__ __forceinline__ Loader(const Arguments& a, const Work& work)
        : a(a), work(work), row(threadIdx.x % kThreads / kThreadsPerRow), quarter(threadIdx.x % kThreadsPerRow) {}

    __device__ __forceinline__ void find(int tile) { slot = slot_of(a, work, tile, row); }

    /* Starts to bring the tile whose slot is known; `to` is its place in shared memory. Straight code, as is what
     * stores a tile: a branch would end the products that run meanwhile. */
    __device__ __forceinline__ void load(int tile, uint32_t to) {
        const Source& source = source_of(a, work, tile);
        const Place place = place_of(source, slot);
        is_there = place.is_there;
        if constexpr (kFormat == DSA_FP8) {
            const uint8_t* numbers = place.block + place.row * (int64_t)kFp8RowBytes;
            const uint8_t* scales = place.block + source.scales_offset + place.row * (int64_t)kFp8ScaleBytes;
            raw.scales = load_8_if(is_there, scales);
#pragma unroll
            for (int i = 0; i < kValueBlocks; ++i)
                raw.value[i] = load_16_if(is_there, numbers + 64 * i + 16 * quarter);
#pragma unroll
            for (int i = 0; i < 2; ++i)
                raw.rope[i] = load_16_if(is_there, numbers + kValueDim + 32 * quarter + 16 * i);
        } else {
            const uint8_t* numbers = is_there ? place.block + place.row * (int64_t)(2 * kDim) : a.query;
#pragma unroll
            for (int i = 0; i < 2 * kBlocks; ++i)
                copy_async_16_or_zero(to + i / 2 * kBlockBytes + swizzled(row, 2 * quarter + i % 2),
                                      numbers + i / 2 * 128 + 32 * quarter + 16 * (i % 2), is_there);
        }
    }

    /* What load() brought becomes a tile. Returns whether store_carefully() must follow. */
    __device__ __forceinline__ bool store(uint32_t to) const {
        if constexpr (kFormat == DSA_FP8) {
            return raw.store(a, to, row, quarter);
        } else {
            copy_async_wait_all();
            return false;
        }
    }

    __device__ __forceinline__ void store_carefully(uint32_t to) const {
        if constexpr (kFormat == DSA_FP8) raw.store_carefully(to, row, quarter);
    }

    /* Which rows of this warp are there: bit i is row 8 * warp + i. */
    __device__ __forceinline__ uint32_t valid_rows() const {
        static_assert(kThreadsPerRow == 4, "every fourth bit of the vote");
        uint32_t votes = __ballot_sync(kAllLanes, is_there) & 0x11111111;
        votes = (votes | votes >> 3) & 0x03030303;
        votes = (votes | votes >> 6) & 0x000F000F;
        return (votes | votes >> 12) & 0xFF;
    }
};

/* ---- query and output ---- */

template <dsa_format kFormat>
__host__ __device__ constexpr bool is_exchanged(int block) {
    return kFormat == DSA_FP8 && block < kValueBlocks;
}

/* A thread's quarter of one of 64 heads; zeros where the row has fewer. */
struct Query {
    uint4 piece[2 * kBlocks];

    __device__ __forceinline__ void load(const Arguments& a, const Work& work) {
        const int row = threadIdx.x / kThreadsPerRow, quarter = threadIdx.x % kThreadsPerRow;
        const bool is_there = work.first_head + row < a.num_heads;
        const uint8_t* from = a.query + (work.token * a.num_heads + work.first_head + row) * (2 * kDim);
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i)
            piece[i] = load_16_if(is_there, from + i / 2 * 128 + 32 * quarter + 16 * (i % 2));
    }

    template <dsa_format kFormat>
    __device__ __forceinline__ void store(const Arguments& a, uint32_t to) {
        const int row = threadIdx.x / kThreadsPerRow, quarter = threadIdx.x % kThreadsPerRow;
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
            uint4& v = piece[i];
            if (is_exchanged<kFormat>(i / 2)) {
                exchange_middle(v.x, v.y);
                exchange_middle(v.z, v.w);
            }
            store_shared_16(to + i / 2 * kBlockBytes + swizzled(row, 2 * quarter + i % 2), v.x ^ a.query_signs,
                            v.y ^ a.query_signs, v.z ^ a.query_signs, v.w ^ a.query_signs);
        }
    }
};

/* All threads write the 64 heads that are staged as bfloat16 in the blocks at `from`, a warp 512 bytes of a head. */
template <dsa_format kFormat>
__device__ __forceinline__ void store_output(const Arguments& a, const Work& work, uint32_t from) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int block = warp % 2 * (kBlocks / 2) + lane / 8;
    uint8_t* out = a.out + ((work.token * a.num_heads + work.first_head) * kDim + 64 * block + 8 * (lane % 8)) * 2;
#pragma unroll 4
    for (int head = warp / 2; head < kHeads; head += kWarps / 2) {
        if (work.first_head + head >= a.num_heads) break;
        uint4 v = load_shared_16(from + block * kBlockBytes + swizzled(head, lane % 8));
        if (is_exchanged<kFormat>(block)) {
            exchange_middle(v.x, v.y);
            exchange_middle(v.z, v.w);
        }
        *(uint4*)(out + (int64_t)head * (2 * kDim)) = v;
    }
}

/* 1 / (sum + sink), 0 where there was no row; everything relative to `reference`, log2. */
__device__ __forceinline__ float inverse_of(float sum, float reference, float sink) {
    return reference == -INFINITY ? 0.0f : 1.0f / (sum + exp2f(sink * kLog2E - reference));
}

__device__ __forceinline__ float lse_of(float sum, float reference) {
    return reference == -INFINITY ? -INFINITY : (reference + log2f(sum)) * kLn2;
}

/* ---- launch ---- */

/* A launch of num_blocks blocks that call wait_for_previous_launch. */
template <typename Kernel>
static inline cudaError_t launch_following(Kernel* kernel, const Arguments& a, int64_t num_blocks, int num_threads,
                                           int32_t shared_bytes, const Device& device, cudaStream_t stream) {
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)num_blocks);
    config.blockDim = dim3((unsigned)num_threads);
    config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = device.architecture >= 90 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, a);
}

/* Bytes of the parts' sums and of their values. */
static inline int64_t part_sums_bytes(int64_t num_items, int32_t num_splits) {
    return num_items * num_splits * kHeads * (int64_t)sizeof(float2);
}

static inline Source make_source(const CompressedLayout& layout, const void* cache, const void* readable,
                                 const int32_t* slots, const int32_t* counts, int32_t width) {
    Source source = {};
    source.cache = (const uint8_t*)(layout.num_slots > 0 ? cache : readable);
    source.slots = slots;
    source.counts = counts;
    source.block_stride_bytes = layout.block_stride_bytes;
    source.scales_offset = layout.scales_offset;
    source.num_slots = (uint32_t)layout.num_slots;
    source.block_rows = (uint32_t)layout.block_rows;
    source.width = width;
    return source;
}

static inline Arguments make_arguments(const dsa_compressed_mla_params& p, const CompressedMlaLayouts& layouts,
                                       int32_t num_splits) {
    Arguments a = {};
    a.window = make_source(layouts.window, p.window_cache, p.query, p.window_slots, p.window_counts, p.window_width);
    a.entries = make_source(layouts.entries, p.entry_cache, p.query, p.entry_slots, p.entry_counts, p.entry_width);
    a.query = (const uint8_t*)p.query;
    a.sinks = p.sinks;
    a.out = (uint8_t*)p.out;
    a.lse = p.lse;
    a.num_tokens = p.num_tokens;
    a.num_heads = p.num_heads;
    a.num_parts = (p.num_heads + kHeads - 1) / kHeads;
    a.num_splits = num_splits;
    if (num_splits > 1) {
        const int64_t num_items = p.num_tokens * a.num_parts;
        a.part_sums = (float2*)p.workspace;
        a.part_values = (float*)((uint8_t*)p.workspace + part_sums_bytes(num_items, num_splits));
    }
    a.shifts = kWidenShifts;
    a.query_signs = p.softmax_scale < 0.0f ? 0x80008000 : 0;
    a.scale_log2 = fmaxf(fabsf(p.softmax_scale) * kLog2E, FLT_MIN); /* masked scores stay -inf */
    return a;
}

/* Merges what the blocks of a launch with num_splits > 1 left. */
dsa_status merge_parts(const Arguments& a, dsa_format format, const Device& device, cudaStream_t stream);

}  // namespace mla
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_COMPRESSED_MLA_TILE_CUH_ */
