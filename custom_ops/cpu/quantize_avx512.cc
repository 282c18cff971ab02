#include "quantize_table.h"

const dsa::RowCodec dsa::kRowCodecAvx512 = dsa::avx512::kRowCodec;
