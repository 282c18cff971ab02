/* Which instruction set an op runs on: the same conditions choose and refuse.
 *
 * Other processors than x86-64 have DSA_X86 0: the files *_avx2.cc, *_avx512.cc and *_avx512_bf16.cc are not compiled,
 * every mention of their functions stands inside #if DSA_X86, and resolve_isa never answers a vector level.
 */
#ifndef DSA_CPU_DISPATCH_H_
#define DSA_CPU_DISPATCH_H_

#include "dsa/common.h"

#ifndef DSA_X86 /* a test sets it to 0 */
#if defined(__x86_64__)
#define DSA_X86 1
#else
#define DSA_X86 0
#endif
#endif

namespace dsa {

/* The level to run on, or DSA_ISA_AUTO when the processor lacks the level that options ask for. */
static inline dsa_isa resolve_isa(const dsa_cpu_options* options) {
    const dsa_isa best = dsa_cpu_isa();
    if (options->isa == DSA_ISA_AUTO) return best;
    return options->isa >= DSA_ISA_SCALAR && options->isa <= best ? options->isa : (dsa_isa)DSA_ISA_AUTO;
}

}  // namespace dsa

#endif /* DSA_CPU_DISPATCH_H_ */
