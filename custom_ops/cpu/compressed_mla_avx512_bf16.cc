#include "row_attention_bf16.h"
#include "compressed_mla_vector.h"

const dsa::RowAttentionKernels dsa::compressed_mla_avx512_bf16 =
    dsa::avx512_bf16::kBf16Kernels<dsa::avx512_bf16::CompressedRows>;
