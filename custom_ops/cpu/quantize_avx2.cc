#include "quantize_table.h"

const dsa::RowCodec dsa::kRowCodecAvx2 = dsa::avx2::kRowCodec;
