#include "compressed_mla_vector.h"

const dsa::RowAttentionKernels dsa::compressed_mla_avx512 =
    dsa::avx512::kRowAttentionKernels<dsa::avx512::CompressedRows>;
