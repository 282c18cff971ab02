#include "compressed_row_vector.h"

const dsa::ReadCompressedRow dsa::read_compressed_row_avx2 = dsa::avx2::load_compressed_row;
