#include "dsa/block_copy.h"

#include "launch.h"
#include "sizes.h"

namespace dsa {
namespace gpu {
namespace {

/* A warp's loads are in flight together before its stores: enough for a page-locked host, whose answers take
 * microseconds, and short pieces keep the grid even. */
constexpr int kThreads = 256;
constexpr int kWordsInFlight = 4;
constexpr int64_t kPieceWords = kThreads * kWordsInFlight;
constexpr int64_t kMaxGrid = 1 << 20; /* a block takes several pieces beyond that */

struct BlockCopy {
    const uint8_t* src;
    uint8_t* dst;
    const int64_t* src_block_ids;
    const int64_t* dst_block_ids;
    int64_t src_stride_bytes;
    int64_t dst_stride_bytes;
    int64_t src_num_blocks;
    int64_t dst_num_blocks;
    int64_t words_per_block;
    int64_t pieces_per_block;
    int64_t num_pieces;
};

template <typename Word>
__device__ __forceinline__ void copy_piece(const Word* from, Word* to, int64_t num_words) {
    Word words[kWordsInFlight];
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i)
        if (threadIdx.x + i * kThreads < num_words) words[i] = from[threadIdx.x + i * kThreads];
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i)
        if (threadIdx.x + i * kThreads < num_words) to[threadIdx.x + i * kThreads] = words[i];
}

/* Word: the widest that every block of both arenas, and its end, are aligned to. */
template <typename Word>
__global__ void __launch_bounds__(kThreads) block_copy_kernel(const __grid_constant__ BlockCopy copy) {
    for (int64_t piece = blockIdx.x; piece < copy.num_pieces; piece += gridDim.x) {
        const int64_t pair = piece / copy.pieces_per_block;
        const int64_t src_block = copy.src_block_ids[pair], dst_block = copy.dst_block_ids[pair];
        if (src_block < 0 || src_block >= copy.src_num_blocks) continue;
        if (dst_block < 0 || dst_block >= copy.dst_num_blocks) continue;
        const int64_t first = (piece - pair * copy.pieces_per_block) * kPieceWords;
        copy_piece((const Word*)(copy.src + src_block * copy.src_stride_bytes) + first,
                   (Word*)(copy.dst + dst_block * copy.dst_stride_bytes) + first, copy.words_per_block - first);
    }
}

bool arena_fits(int64_t num_blocks, int64_t stride_bytes, int64_t block_bytes) {
    return is_count(num_blocks) && stride_bytes >= block_bytes && product_fits(num_blocks, stride_bytes);
}

dsa_status check(const dsa_block_copy_params& p) {
    if (p.block_bytes < 0 || !is_count(p.num_copies)) return DSA_BAD_SHAPE;
    if (!arena_fits(p.src_num_blocks, p.src_stride_bytes, p.block_bytes)) return DSA_BAD_SHAPE;
    if (!arena_fits(p.dst_num_blocks, p.dst_stride_bytes, p.block_bytes)) return DSA_BAD_SHAPE;
    if (!product_fits(p.num_copies, p.block_bytes)) return DSA_BAD_SHAPE;
    if (p.num_copies == 0) return DSA_OK;
    if (p.src_block_ids == nullptr || p.dst_block_ids == nullptr) return DSA_NULL_POINTER;
    if (p.src == nullptr && p.src_num_blocks > 0 && p.block_bytes > 0) return DSA_NULL_POINTER;
    if (p.dst == nullptr && p.dst_num_blocks > 0 && p.block_bytes > 0) return DSA_NULL_POINTER;
    return DSA_OK;
}

bool is_multiple_of(const dsa_block_copy_params& p, int64_t bytes) {
    const int64_t all = (int64_t)(uintptr_t)p.src | (int64_t)(uintptr_t)p.dst | p.src_stride_bytes |
                        p.dst_stride_bytes | p.block_bytes;
    return (all & (bytes - 1)) == 0;
}

/* Bound: num_copies * block_bytes read and as much written, or the same over the bus of a page-locked host. */
template <typename Word>
dsa_status launch(const dsa_block_copy_params& p, cudaStream_t stream) {
    BlockCopy copy = {p.src, p.dst, p.src_block_ids, p.dst_block_ids, p.src_stride_bytes, p.dst_stride_bytes,
                      p.src_num_blocks, p.dst_num_blocks, 0, 0, 0};
    copy.words_per_block = p.block_bytes / (int64_t)sizeof(Word);
    copy.pieces_per_block = (copy.words_per_block + kPieceWords - 1) / kPieceWords;
    copy.num_pieces = p.num_copies * copy.pieces_per_block;
    const int64_t grid = copy.num_pieces < kMaxGrid ? copy.num_pieces : kMaxGrid;
    block_copy_kernel<Word><<<(unsigned)grid, kThreads, 0, stream>>>(copy);
    return launched(stream);
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

dsa_status dsa_block_copy_cuda(const dsa_block_copy_params* params, void* stream) {
    using namespace dsa::gpu;
    if (params == nullptr) return DSA_NULL_POINTER;
    dsa_status status = check(*params);
    if (status != DSA_OK || params->num_copies == 0 || params->block_bytes == 0) return status;
    Device found = {};
    status = device(&found);
    if (status != DSA_OK) return status;
    if (is_multiple_of(*params, 16)) return launch<uint4>(*params, (cudaStream_t)stream);
    if (is_multiple_of(*params, 4)) return launch<uint32_t>(*params, (cudaStream_t)stream);
    return launch<uint8_t>(*params, (cudaStream_t)stream);
}
