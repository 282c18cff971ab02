#include "topk_select_vector.h"

const dsa::TopkSelector dsa::kTopkSelectorAvx512 = dsa::avx512::kTopkSelector;
