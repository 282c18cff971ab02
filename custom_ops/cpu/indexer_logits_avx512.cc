#include "indexer_logits_vector.h"

const dsa::IndexerLogitsKernel dsa::kIndexerLogitsAvx512 = dsa::avx512::kIndexerLogits;
