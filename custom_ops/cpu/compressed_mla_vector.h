/* How the kernels of row_attention_vector.h read two caches of compressed rows. */
#ifndef DSA_CPU_COMPRESSED_MLA_VECTOR_H_
#define DSA_CPU_COMPRESSED_MLA_VECTOR_H_

#include "compressed_mla_kernels.h"
#include "compressed_row_vector.h"
#include "row_attention_vector.h"

namespace dsa {
namespace DSA_SIMD {

struct CompressedRows {
    static RowMemory memory(const RowAttention& base, int32_t id) {
        const CompressedRow row = compressed_row_of(static_cast<const CompressedMla&>(base), id);
        return {row.data, row.layout->data_bytes, row.scales};
    }

    static void load(const RowAttention& base, int32_t id, float* key) {
        const CompressedRow row = compressed_row_of(static_cast<const CompressedMla&>(base), id);
        load_compressed_row(*row.layout, row.data, row.scales, key);
        clear(key + base.value_dim, key + base.row_width);
    }
};

}  // namespace DSA_SIMD
}  // namespace dsa

#endif /* DSA_CPU_COMPRESSED_MLA_VECTOR_H_ */
