#include "dsa/block_copy.h"

#include <string.h>

#include "dispatch.h"
#include "parallel.h"
#include "sizes.h"

namespace dsa {
namespace {

/* One task's share of all bytes: large enough to hide the start of a thread, small enough to balance. */
constexpr int64_t kPieceBytes = 256 * 1024;

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
    for (int64_t i = 0; i < p.num_copies; ++i) {
        if (p.src_block_ids[i] < 0 || p.src_block_ids[i] >= p.src_num_blocks) return DSA_BAD_SHAPE;
        if (p.dst_block_ids[i] < 0 || p.dst_block_ids[i] >= p.dst_num_blocks) return DSA_BAD_SHAPE;
    }
    return DSA_OK;
}

/* Copies bytes [begin, end) of the copied blocks laid end to end. */
void copy_range(const dsa_block_copy_params& p, int64_t begin, int64_t end) {
    while (begin < end) {
        const int64_t i = begin / p.block_bytes;
        const int64_t offset = begin % p.block_bytes;
        const int64_t rest_of_block = p.block_bytes - offset;
        const int64_t length = rest_of_block < end - begin ? rest_of_block : end - begin;
        const uint8_t* from = p.src + p.src_block_ids[i] * p.src_stride_bytes + offset;
        uint8_t* to = p.dst + p.dst_block_ids[i] * p.dst_stride_bytes + offset;
        if (from != to) memcpy(to, from, (size_t)length); /* a block may be copied onto itself */
        begin += length;
    }
}

}  // namespace
}  // namespace dsa

size_t dsa_block_copy_params_size(void) { return sizeof(dsa_block_copy_params); }

dsa_status dsa_block_copy_cpu(const dsa_block_copy_params* params, const dsa_cpu_options* options) {
    if (params == nullptr || options == nullptr) return DSA_NULL_POINTER;
    const dsa_status status = dsa::check(*params);
    if (status != DSA_OK) return status;
    if (dsa::resolve_isa(options) == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    /* Bound: 2 * num_copies * block_bytes of memory traffic. */
    const int64_t copied_bytes = params->num_copies * params->block_bytes;
    const int64_t num_pieces = copied_bytes / dsa::kPieceBytes + (copied_bytes % dsa::kPieceBytes != 0);
    dsa::parallel_for(num_pieces, dsa::thread_count(options), [&](int64_t piece, int32_t) {
        const int64_t begin = piece * dsa::kPieceBytes;
        const int64_t rest = copied_bytes - begin;
        dsa::copy_range(*params, begin, begin + (rest < dsa::kPieceBytes ? rest : dsa::kPieceBytes));
    });
    return DSA_OK;
}
