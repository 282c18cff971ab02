#include "indexer_logits_vector.h"

const dsa::IndexerLogitsKernel dsa::kIndexerLogitsAvx2 = dsa::avx2::kIndexerLogits;
