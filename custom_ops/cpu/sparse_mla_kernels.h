/* What the files of sparse_mla share: the validated call, and one table of kernels per instruction set. */
#ifndef DSA_CPU_SPARSE_MLA_KERNELS_H_
#define DSA_CPU_SPARSE_MLA_KERNELS_H_

#include "dsa/sparse_mla.h"
#include "latent_cache.h"
#include "row_attention.h"

namespace dsa {

/* An id is a slot. */
struct SparseMla : RowAttention {
    const dsa_sparse_mla_params* params;
    LatentLayout layout;
};

extern const RowAttentionKernels sparse_mla_avx2;
extern const RowAttentionKernels sparse_mla_avx512;
extern const RowAttentionKernels sparse_mla_avx512_bf16; /* bfloat16 queries, and a cache of bfloat16 or fp8 numbers */

}  // namespace dsa

#endif /* DSA_CPU_SPARSE_MLA_KERNELS_H_ */
