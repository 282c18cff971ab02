/* Paddle declares Tensor::stream() for builds with a device only, and for a GPU with types of the CUDA headers. What is
 * linked is one function without arguments that returns a pointer, so that the declaration for plugins serves all.
 */
#if defined(DSA_WITH_CUDA)

#define PADDLE_WITH_CUSTOM_DEVICE
#include "paddle/phi/api/all.h"

namespace dsa {
namespace binding {

void* stream_of(const paddle::Tensor& tensor) { return (void*)tensor.stream(); }

}  // namespace binding
}  // namespace dsa

#endif
