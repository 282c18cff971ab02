#include "compressed_mla_vector.h"

const dsa::RowAttentionKernels dsa::compressed_mla_avx2 =
    dsa::avx2::kRowAttentionKernels<dsa::avx2::CompressedRows>;
