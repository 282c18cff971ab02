#include "sparse_mla_vector.h"

const dsa::SparseMlaKernels dsa::sparse_mla_avx512 = dsa::avx512::kSparseMlaKernels;
