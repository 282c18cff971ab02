#include "sparse_mla_vector.h"

const dsa::RowAttentionKernels dsa::sparse_mla_avx512 = dsa::avx512::kRowAttentionKernels<dsa::avx512::LatentRows>;
