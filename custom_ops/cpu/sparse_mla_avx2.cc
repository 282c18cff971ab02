#include "sparse_mla_vector.h"

const dsa::SparseMlaKernels dsa::sparse_mla_avx2 = dsa::avx2::kSparseMlaKernels;
