/* What the files of kv_compress share: the parts of the op that have a version per instruction set. */
#ifndef DSA_CPU_KV_COMPRESS_KERNELS_H_
#define DSA_CPU_KV_COMPRESS_KERNELS_H_

#include <stdint.h>

namespace dsa {

/* What an entry is made from, in the order of positions. */
struct CompressMembers {
    const float* const* values; /* [num_members] rows of head_dim numbers; their scores lie score_offset further on */
    int64_t num_members;        /* >= 1 */
    int64_t score_offset;
    int32_t head_dim;
};

struct KvCompressKernels {
    /* state [2 * width] := kv_score [2 * width], with ape [width] added to the second half */
    void (*add_to_scores)(const float* kv_score, const float* ape, int64_t width, float* state);
    /* pooled [head_dim] := for each channel the mean of the members' values, weighted by the softmax of their scores;
     * sums go from the first member to the last */
    void (*pool)(const CompressMembers& members, float* pooled);
    /* row [head_dim] := row / sqrt(mean(row^2) + eps) * weight */
    void (*normalize)(const float* weight, int32_t head_dim, float eps, float* row);
};

extern const KvCompressKernels kv_compress_avx2;
extern const KvCompressKernels kv_compress_avx512;

}  // namespace dsa

#endif /* DSA_CPU_KV_COMPRESS_KERNELS_H_ */
