/* All writes of one DSA layer in one call: mla_cache_write, index_key_write and index_query_quant, whose headers define
 * what happens. For few tokens the three are nothing but launches on a GPU; here they are one.
 *
 *   Bit for bit the three ops one after the other. The parts share num_tokens; a part that is left out (a layer without
 *   an indexer) has num_tokens 0, and its pointers are not looked at.
 *
 * Source: as the three ops.
 */
#ifndef DSA_LAYER_WRITE_H_
#define DSA_LAYER_WRITE_H_

#include "dsa/index_key_write.h"
#include "dsa/index_query_quant.h"
#include "dsa/mla_cache_write.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsa_layer_write_params {
    dsa_mla_cache_write_params latent;
    dsa_index_key_write_params index_key;
    dsa_index_query_quant_params index_query;
} dsa_layer_write_params;

DSA_API size_t dsa_layer_write_params_size(void);
DSA_API dsa_status dsa_layer_write_cpu(const dsa_layer_write_params* params, const dsa_cpu_options* options);
DSA_API dsa_status dsa_layer_write_cuda(const dsa_layer_write_params* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* DSA_LAYER_WRITE_H_ */
