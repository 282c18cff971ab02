#include "topk_select_vector.h"

const dsa::TopkSelector dsa::kTopkSelectorAvx2 = dsa::avx2::kTopkSelector;
