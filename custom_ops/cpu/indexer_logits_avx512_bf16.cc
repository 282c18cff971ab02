#include "indexer_logits_vector.h"

const dsa::IndexerLogitsKernel dsa::kIndexerLogitsAvx512Bf16 = dsa::avx512_bf16::kIndexerLogits;
