#include "kv_compress_vector.h"

const dsa::KvCompressKernels dsa::kv_compress_avx2 = dsa::avx2::kKvCompressKernels;
