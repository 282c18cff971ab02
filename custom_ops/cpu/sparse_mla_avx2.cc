#include "sparse_mla_vector.h"

const dsa::RowAttentionKernels dsa::sparse_mla_avx2 = dsa::avx2::kRowAttentionKernels<dsa::avx2::LatentRows>;
