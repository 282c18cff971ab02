#include "dsa/layer_write.h"

#include "write_parts.cuh"

namespace dsa {
namespace gpu {
namespace {

/* Blocks of the grid, in this order: index queries, which are most of the bytes, latent rows, index keys. A part that
 * is left out has none. */
struct LayerParts {
    IndexQueryPart index_query;
    LatentPart latent;
    IndexKeyPart index_key;
};

__global__ void __launch_bounds__(kWriteThreads) layer_write_kernel(const __grid_constant__ LayerParts parts) {
    int block = blockIdx.x;
    if (block < parts.index_query.num_blocks) return write_index_query(parts.index_query, block);
    block -= parts.index_query.num_blocks;
    if (block < parts.latent.num_blocks) return write_latent(parts.latent, block);
    write_index_key(parts.index_key, block - parts.latent.num_blocks);
}

/* Fills the parts that have tokens. */
dsa_status make_layer_parts(const dsa_layer_write_params& p, LayerParts* parts) {
    int64_t num_tokens = 0;
    for (int64_t tokens : {p.latent.num_tokens, p.index_key.num_tokens, p.index_query.num_tokens}) {
        if (tokens == 0) continue;
        if (num_tokens != 0 && tokens != num_tokens) return DSA_BAD_SHAPE;
        num_tokens = tokens;
    }
    dsa_status status = DSA_OK;
    if (p.latent.num_tokens != 0) {
        LatentLayout layout;
        status = check_mla_cache_write(p.latent, &layout);
        if (status == DSA_OK) parts->latent = make_latent_part(p.latent, layout);
    }
    if (status == DSA_OK && p.index_key.num_tokens != 0) {
        status = check_index_key_write(p.index_key);
        if (status == DSA_OK) parts->index_key = make_index_key_part(p.index_key);
    }
    if (status == DSA_OK && p.index_query.num_tokens != 0) {
        status = check_index_query_quant(p.index_query);
        if (status == DSA_OK) parts->index_query = make_index_query_part(p.index_query);
    }
    return status;
}

}  // namespace
}  // namespace gpu
}  // namespace dsa

dsa_status dsa_layer_write_cuda(const dsa_layer_write_params* params, void* stream) {
    using namespace dsa;
    if (params == nullptr) return DSA_NULL_POINTER;
    gpu::LayerParts parts = {};
    dsa_status status = gpu::make_layer_parts(*params, &parts);
    if (status != DSA_OK) return status;
    const int32_t num_blocks = parts.latent.num_blocks + parts.index_key.num_blocks + parts.index_query.num_blocks;
    if (num_blocks == 0) return DSA_OK;
    gpu::Device device = {};
    status = gpu::device(&device);
    if (status != DSA_OK) return status;
    /* Bound: the sum of the three ops, 27 KB a token of which 25 KB are queries; below 128 tokens one launch. */
    return gpu::launch_write(gpu::layer_write_kernel, parts, num_blocks, device, (cudaStream_t)stream);
}
