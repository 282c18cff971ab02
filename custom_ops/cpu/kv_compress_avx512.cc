#include "kv_compress_vector.h"

const dsa::KvCompressKernels dsa::kv_compress_avx512 = dsa::avx512::kKvCompressKernels;
