/* How one index key is packed; the ops that write index keys share it. */
#ifndef DSA_CPU_INDEX_KEY_ROW_H_
#define DSA_CPU_INDEX_KEY_ROW_H_

#include "dsa/cache_layout.h"
#include "quantize.h"

namespace dsa {

struct IndexKeyFormat {
    dsa_format cache_format;
    dsa_scale_format scale_format;
    int32_t block_size;
    int32_t index_head_dim;
};

/* key is index_head_dim numbers in input_format; block begins a block of the cache. */
static inline void write_index_key(const IndexKeyFormat& format, const RowCodec& codec, const void* key,
                                   dsa_format input_format, uint8_t* block, int64_t offset) {
    const int64_t dim = format.index_head_dim;
    if (format.cache_format == DSA_FLOAT32) {
        codec.to_float32(key, input_format, dim, (float*)block + offset * dim);
    } else if (format.cache_format == DSA_BFLOAT16) {
        codec.to_bf16(key, input_format, dim, (uint16_t*)block + offset * dim);
    } else {
        const float wanted = index_scale(codec.amax_bf16(key, input_format, dim));
        const float scale = format.scale_format == DSA_SCALE_UE8M0 ? ceil_pow2(wanted) : wanted;
        codec.to_e4m3(key, input_format, dim, scale, block + offset * dim);
        float* scales = (float*)(block + dsa_index_scale_offset(DSA_FP8, format.block_size, format.index_head_dim));
        scales[offset] = scale;
    }
}

}  // namespace dsa

#endif /* DSA_CPU_INDEX_KEY_ROW_H_ */
