/* The params of the ops that write a layer's rows; layer_write has those of all three. */
#ifndef DSA_PADDLE_WRITES_H_
#define DSA_PADDLE_WRITES_H_

#include "binding.h"
#include "dsa/index_key_write.h"
#include "dsa/index_query_quant.h"
#include "dsa/mla_cache_write.h"
#include "index_cache.h"

namespace dsa {
namespace binding {

static inline dsa_mla_cache_write_params mla_cache_write_params(Shapes* shapes, const Tensor& latent,
                                                                const Tensor& rope, const char* cache_argument,
                                                                const Tensor& cache, const Tensor& slot_mapping,
                                                                int64_t scale_format) {
    shapes->expect("latent", latent, {DataType::FLOAT32, DataType::BFLOAT16}, {"num_tokens", "kv_lora_rank"});
    shapes->expect("rope", rope, {latent.dtype()}, {"num_tokens", "qk_rope_head_dim"});
    const int32_t kv_lora_rank = shapes->positive("kv_lora_rank");
    const int32_t qk_rope_head_dim = shapes->positive("qk_rope_head_dim");
    expect_latent_cache(shapes, cache_argument, cache, kv_lora_rank, qk_rope_head_dim);
    shapes->expect("slot_mapping", slot_mapping, {DataType::INT64}, {"num_tokens"});

    dsa_mla_cache_write_params params = {};
    params.latent = address<void>(latent);
    params.rope = address<void>(rope);
    params.cache = address<uint8_t>(cache);
    params.slot_mapping = address<int64_t>(slot_mapping);
    params.latent_stride = kv_lora_rank;
    params.rope_stride = qk_rope_head_dim;
    params.block_stride_bytes = block_bytes(cache);
    params.num_blocks = (*shapes)["num_blocks"];
    params.num_tokens = (*shapes)["num_tokens"];
    params.block_size = (*shapes)["block_size"];
    params.kv_lora_rank = kv_lora_rank;
    params.qk_rope_head_dim = qk_rope_head_dim;
    params.input_format = format_of(latent);
    params.cache_format = format_of(cache);
    params.scale_format = code("scale_format", scale_format);
    return params;
}

static inline dsa_index_key_write_params index_key_write_params(Shapes* shapes, const Tensor& key,
                                                                const char* cache_argument, const Tensor& cache,
                                                                const Tensor& slot_mapping, int64_t scale_format) {
    shapes->expect("key", key, {DataType::FLOAT32, DataType::BFLOAT16}, {"num_tokens", "index_head_dim"});
    expect_index_cache(shapes, cache_argument, cache);
    shapes->expect("slot_mapping", slot_mapping, {DataType::INT64}, {"num_tokens"});

    dsa_index_key_write_params params = {};
    params.key = address<void>(key);
    params.cache = address<uint8_t>(cache);
    params.slot_mapping = address<int64_t>(slot_mapping);
    params.key_stride = (*shapes)["index_head_dim"];
    params.block_stride_bytes = block_bytes(cache);
    params.num_blocks = (*shapes)["num_blocks"];
    params.num_tokens = (*shapes)["num_tokens"];
    params.block_size = (*shapes)["block_size"];
    params.index_head_dim = (*shapes)["index_head_dim"];
    params.input_format = format_of(key);
    params.cache_format = format_of(cache);
    params.scale_format = code("scale_format", scale_format);
    return params;
}

/* The outputs of index_query_quant, which are made with its params. */
struct QuantizedQuery {
    Tensor quantized;
    Tensor folded_weights;
    dsa_index_query_quant_params params;

    QuantizedQuery(Shapes* shapes, const Tensor& query, const Tensor& weights, dsa_format output_format) : params() {
        shapes->expect("query", query, {DataType::FLOAT32, DataType::BFLOAT16},
                       {"num_tokens", "index_n_heads", "index_head_dim"});
        shapes->expect("weights", weights, {DataType::FLOAT32}, {"num_tokens", "index_n_heads"});
        expect_index_row_fits(*shapes);
        quantized = paddle::empty(query.shape(), dtype_of(output_format), shapes->device.place());
        folded_weights = paddle::empty(weights.shape(), DataType::FLOAT32, shapes->device.place());

        params.query = address<void>(query);
        params.weights = address<float>(weights);
        params.quantized = address<void>(quantized);
        params.folded_weights = address<float>(folded_weights);
        params.query_stride = (int64_t)(*shapes)["index_n_heads"] * (*shapes)["index_head_dim"];
        params.weights_stride = (*shapes)["index_n_heads"];
        params.num_tokens = (*shapes)["num_tokens"];
        params.index_n_heads = (*shapes)["index_n_heads"];
        params.index_head_dim = (*shapes)["index_head_dim"];
        params.input_format = format_of(query);
        params.output_format = output_format;
    }
};

}  // namespace binding
}  // namespace dsa

#endif /* DSA_PADDLE_WRITES_H_ */
