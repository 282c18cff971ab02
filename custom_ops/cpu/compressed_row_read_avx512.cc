#include "compressed_row_vector.h"

const dsa::ReadCompressedRow dsa::read_compressed_row_avx512 = dsa::avx512::load_compressed_row;
