/* What every Paddle binding shares: checks that name the tensor, formats, devices, scratch memory, errors.
 *
 * A binding turns tensors into a params struct and calls the op; it computes nothing. Paddle has made every input
 * contiguous before we see it, so strides follow from shapes. (That is also why fastdeploy_dsa/ops refuses in-place
 * arguments that are not contiguous: we would write into Paddle's copy.)
 *
 * Errors are Paddle's EnforceNotMet, which arrives in Python as ValueError (a user's mistake) or RuntimeError (ours).
 * Paddle does not catch standard exceptions around custom ops: they would end the process.
 */
#ifndef DSA_PADDLE_BINDING_H_
#define DSA_PADDLE_BINDING_H_

#include <string.h>

#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "dsa/cache_layout.h"
#include "dsa/common.h"
#include "paddle/common/enforce.h"
#include "paddle/phi/api/all.h"
#include "sizes.h"

namespace dsa {
namespace gpu {
int32_t current_device(); /* current_device.cu, in a build with CUDA */
}

namespace binding {

using paddle::DataType;
using paddle::Tensor;

[[noreturn]] static inline void refuse(const std::string& message) {
    PADDLE_THROW(common::errors::InvalidArgument("%s", message));
}

static inline const char* dtype_name(DataType dtype) {
    switch (dtype) {
        case DataType::FLOAT32: return "float32";
        case DataType::FLOAT64: return "float64";
        case DataType::FLOAT16: return "float16";
        case DataType::BFLOAT16: return "bfloat16";
        case DataType::FLOAT8_E4M3FN: return "float8_e4m3fn";
        case DataType::FLOAT8_E5M2: return "float8_e5m2";
        case DataType::UINT8: return "uint8";
        case DataType::INT8: return "int8";
        case DataType::INT16: return "int16";
        case DataType::INT32: return "int32";
        case DataType::INT64: return "int64";
        case DataType::BOOL: return "bool";
        default: return "another dtype";
    }
}

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

static inline void expect_between(const char* argument, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return;
    refuse(std::string(argument) + ": expected " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
           std::to_string(value));
}

/* "int32 [4, 7]" */
static inline std::string describe(const Tensor& tensor) {
    std::string text = std::string(dtype_name(tensor.dtype())) + " [";
    const std::vector<int64_t> shape = tensor.shape();
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

#if defined(DSA_WITH_CUDA)
constexpr bool kHasCuda = true;
#define DSA_ON_CUDA(function) function
#else
constexpr bool kHasCuda = false;
#define DSA_ON_CUDA(function) nullptr
#endif

/* Paddle's current stream on the device of a tensor; see stream.cc. */
void* stream_of(const Tensor& tensor);

/* Where a call runs: where its first tensor lies, and all others must lie there, too.
 *
 * "Not on the CPU" stands for CUDA: GPUs that come to Paddle as a plugin have a place of their own kind. A kernel goes
 * to the current GPU, which cannot read another one's memory, so that is where tensors must lie.
 */
class Device {
  public:
    void expect(const char* argument, const Tensor& tensor) {
        if (!tensor.defined()) refuse(std::string(argument) + ": expected a tensor, got none");
        if (!kHasCuda && !tensor.is_cpu()) {
            refuse(std::string(argument) + ": expected a tensor on the CPU, because GPU kernels are not built, " +
                   "got one on " + tensor.place().DebugString());
        }
        if (!first_) {
            first_ = &tensor;
            first_argument_ = argument;
            expect_current(argument, tensor.place());
        } else if (tensor.place() != first_->place()) {
            refuse(std::string(argument) + ": expected a tensor on " + first_->place().DebugString() + " like " +
                   first_argument_ + ", got one on " + tensor.place().DebugString());
        }
    }

    bool is_cpu() const { return first_->is_cpu(); }
    const phi::Place& place() const { return first_->place(); }
    void* stream() const { return stream_of(*first_); }

  private:
    static void expect_current(const char* argument, const phi::Place& place) {
        if constexpr (kHasCuda) {
            if (place.GetType() == phi::AllocationType::CPU) return;
            const int32_t current = gpu::current_device();
            if (current < 0 || current == place.GetDeviceId()) return;
            const phi::Place expected(place.GetType(), (int8_t)current, place.GetDeviceType());
            refuse(std::string(argument) + ": expected a tensor on the current device, " + expected.DebugString() +
                   ", got one on " + place.DebugString());
        }
    }

    const Tensor* first_ = nullptr;
    const char* first_argument_ = nullptr;
};

/* One size of an expected shape: a number, or a name that means the same number in every tensor of the call. */
struct Size {
    const char* name; /* null: value is meant */
    int64_t value;

    Size(const char* size_name) : name(size_name), value(-1) {}
    Size(int fixed) : name(nullptr), value(fixed) {}
};

/* Checks tensors against shapes with named sizes. The first tensor that shows a name fixes its number, and the very
 * first one the device.
 *
 *   Shapes shapes;
 *   shapes.expect("latent", latent, {DataType::FLOAT32}, {"num_tokens", "kv_lora_rank"});
 *   shapes.expect("slot_mapping", slot_mapping, {DataType::INT64}, {"num_tokens"});
 *   shapes["num_tokens"]
 */
class Shapes {
  public:
    Device device;

    void expect(const char* argument, const Tensor& tensor, std::initializer_list<DataType> dtypes,
                std::initializer_list<Size> shape) {
        device.expect(argument, tensor);
        if (!accepts(tensor, dtypes, shape)) {
            refuse(std::string(argument) + ": expected " + expectation(dtypes, shape) + ", got " + describe(tensor));
        }
        const auto& dims = tensor.dims();
        int axis = 0;
        for (const Size& size : shape) {
            if (size.name && !find(size.name)) known_.push_back({size.name, argument, &tensor, dims[axis]});
            ++axis;
        }
    }

    /* A size that may be zero. */
    int32_t operator[](const char* name) const { return between(name, 0, kMaxInt32); }

    /* A size without which there is nothing to compute. */
    int32_t positive(const char* name) const { return between(name, 1, kMaxInt32); }

    /* Refuses the tensor that showed the size. */
    int32_t between(const char* name, int64_t least, int64_t most) const {
        const Known* known = find(name);
        if (!known) PADDLE_THROW(common::errors::Fatal("no tensor showed the size %s", name));
        if (known->value < least || known->value > most) {
            refuse(std::string(known->argument) + ": expected " + name + " of " + std::to_string(least) + " to " +
                   std::to_string(most) + ", got " + std::to_string(known->value) + " in " + describe(*known->tensor));
        }
        return (int32_t)known->value;
    }

    /* A size that is the user's number, where a tensor's shape cannot show it. */
    void give(const char* name, const char* argument, const Tensor& tensor, int64_t value) {
        known_.push_back({name, argument, &tensor, value});
    }

  private:
    struct Known {
        const char* name;
        const char* argument; /* where it was first seen */
        const Tensor* tensor;
        int64_t value;
    };

    /* Null for a size that no tensor showed yet. */
    const Known* find(const char* name) const {
        for (const Known& known : known_)
            if (strcmp(known.name, name) == 0) return &known;
        return nullptr;
    }

    bool accepts(const Tensor& tensor, std::initializer_list<DataType> dtypes,
                 std::initializer_list<Size> shape) const {
        bool accepted = false;
        for (const DataType dtype : dtypes) accepted |= tensor.dtype() == dtype;
        const auto& dims = tensor.dims();
        if (!accepted || dims.size() != (int)shape.size()) return false;
        int axis = 0;
        for (const Size& size : shape) {
            const Known* known = size.name ? find(size.name) : nullptr;
            if (known && dims[axis] != known->value) return false;
            if (!size.name && dims[axis] != size.value) return false;
            ++axis;
        }
        return true;
    }

    /* "int32 or int64 [num_tokens, topk] with num_tokens = 4 (from query)" */
    std::string expectation(std::initializer_list<DataType> dtypes, std::initializer_list<Size> shape) const {
        std::string text, origin;
        for (const DataType dtype : dtypes) text += (text.empty() ? "" : " or ") + std::string(dtype_name(dtype));
        const char* separator = " [";
        for (const Size& size : shape) {
            text += separator + (size.name ? std::string(size.name) : std::to_string(size.value));
            separator = ", ";
            for (const Known& known : known_) {
                if (!size.name || strcmp(known.name, size.name) != 0) continue;
                origin += std::string(origin.empty() ? " with " : ", ") + size.name + " = " +
                          std::to_string(known.value) + " (from " + known.argument + ")";
            }
        }
        return text + "]" + origin;
    }

    std::vector<Known> known_;
};

/* The address of a tensor's numbers. An empty tensor has none, yet the C ABI wants a pointer that is not null. */
template <typename T>
static inline T* address(const Tensor& tensor) {
    alignas(64) static char nothing[64];
    return (T*)(tensor.numel() == 0 ? nothing : tensor.data());
}

/* The format that a dtype stands for; checked by Shapes::expect before. */
static inline dsa_format format_of(const Tensor& tensor) {
    switch (tensor.dtype()) {
        case DataType::FLOAT32: return DSA_FLOAT32;
        case DataType::BFLOAT16: return DSA_BFLOAT16;
        default: return DSA_FP8;
    }
}

static inline DataType dtype_of(dsa_format format) {
    switch (format) {
        case DSA_FLOAT32: return DataType::FLOAT32;
        case DSA_BFLOAT16: return DataType::BFLOAT16;
        default: return DataType::UINT8;
    }
}

/* Bytes of one block of a tensor whose first axis counts blocks. */
static inline int64_t block_bytes(const Tensor& cache) {
    int64_t bytes = (int64_t)phi::SizeOf(cache.dtype());
    for (int axis = 1; axis < cache.dims().size(); ++axis) bytes *= cache.dims()[axis];
    return bytes;
}

/* A latent cache, [num_blocks, 1, block_size, row]: the row must be what cache_layout.h says for the two sizes. */
static inline void expect_latent_cache(Shapes* shapes, const char* argument, const Tensor& cache,
                                       int32_t kv_lora_rank, int32_t qk_rope_head_dim) {
    shapes->expect(argument, cache, {DataType::UINT8, DataType::BFLOAT16, DataType::FLOAT32},
                   {"num_blocks", 1, "block_size", "latent_row"});
    shapes->positive("block_size");
    const int64_t row_bytes = (*shapes)["latent_row"] * (int64_t)phi::SizeOf(cache.dtype());
    const int64_t expected = dsa_latent_row_bytes(format_of(cache), kv_lora_rank, qk_rope_head_dim);
    if (row_bytes == expected) return;
    refuse(std::string(argument) + ": expected rows of " + std::to_string(expected) + " bytes for kv_lora_rank " +
           std::to_string(kv_lora_rank) + " and qk_rope_head_dim " + std::to_string(qk_rope_head_dim) + ", got " +
           std::to_string(row_bytes) + " bytes in " + describe(cache));
}

/* Which cache blocks each row sees. */
static inline void expect_contexts(Shapes* shapes, const Tensor& block_table, const Tensor& request_ids,
                                   const Tensor& lengths) {
    shapes->expect("block_table", block_table, {DataType::INT32}, {"num_requests", "max_blocks"});
    shapes->expect("request_ids", request_ids, {DataType::INT32}, {"num_tokens"});
    shapes->expect("lengths", lengths, {DataType::INT32}, {"num_tokens"});
}

/* Slot ids are int32. */
static inline void expect_slots_fit(const char* argument, int64_t num_blocks, int32_t block_size) {
    if (num_blocks >= 0 && num_blocks <= kMaxInt32 / block_size) return;
    refuse(std::string(argument) + ": expected 0 to " + std::to_string(kMaxInt32 / block_size) +
           " blocks of block_size " + std::to_string(block_size) + ", because slot ids are int32, got " +
           std::to_string(num_blocks));
}

/* The number of a format or an instruction set; the op knows which there are. */
static inline int32_t code(const char* argument, int64_t value) {
    expect_between(argument, value, 0, kMaxInt32);
    return (int32_t)value;
}

static inline dsa_cpu_options cpu_options(int64_t num_threads, int64_t isa) {
    expect_between("num_threads", num_threads, 0, DSA_MAX_THREADS);
    return {(int32_t)num_threads, code("isa", isa)};
}

/* An output. The second size may be the user's number, so that the bytes need not fit what a tensor can count. */
static inline Tensor output(const char* argument, int64_t rows, int64_t width, DataType dtype, const Device& device) {
    const int64_t most = std::numeric_limits<int64_t>::max() / (int64_t)phi::SizeOf(dtype) / (rows > 0 ? rows : 1);
    if (width > most) expect_between(argument, width, 0, most);
    return paddle::empty({rows, width}, dtype, device.place());
}

/* The outputs of a top-k op. */
struct Selection {
    Tensor positions;
    Tensor slot_ids;
    Tensor counts;

    Selection(int64_t num_tokens, int64_t topk, const Device& device)
        : positions(output("topk", num_tokens, topk, DataType::INT32, device)),
          slot_ids(output("topk", num_tokens, topk, DataType::INT32, device)),
          counts(paddle::empty({num_tokens}, DataType::INT32, device.place())) {}

    std::vector<Tensor> outputs() const { return {positions, slot_ids, counts}; }
};

/* Memory for one call, aligned as the headers ask. On a GPU the allocator gives it to nobody else before what was
 * enqueued on the stream has run. */
class Workspace {
  public:
    Workspace(size_t bytes, const Device& device) : bytes_(bytes) {
        if (bytes == 0) return;
        memory_ = paddle::empty({(int64_t)(bytes + kAlignment)}, DataType::UINT8, device.place());
    }
    void* address() const {
        if (bytes_ == 0) return nullptr;
        const uintptr_t start = (uintptr_t)memory_.data();
        return (void*)((start + kAlignment - 1) / kAlignment * kAlignment);
    }
    size_t bytes() const { return bytes_; }

  private:
    static constexpr size_t kAlignment = 64;
    Tensor memory_;
    size_t bytes_;
};

/* The functions of an op, those for CUDA inside DSA_ON_CUDA. An op without scratch memory has no sizes. */
template <typename Params>
struct Op {
    const char* name;
    dsa_status (*cpu)(const Params* params, const dsa_cpu_options* options);
    dsa_status (*cuda)(const Params* params, void* stream);
    size_t (*cpu_workspace_bytes)(const Params* params, const dsa_cpu_options* options);
    size_t (*cuda_workspace_bytes)(const Params* params);
};

template <typename Params>
static inline dsa_status call(const Op<Params>& op, const Device& device, const Params& params,
                              const dsa_cpu_options& options) {
    if constexpr (kHasCuda) {
        if (!device.is_cpu()) return op.cuda(&params, device.stream());
    }
    return op.cpu(&params, &options);
}

template <typename Params>
static inline dsa_status call_with_workspace(const Op<Params>& op, const Device& device, Params params,
                                             const dsa_cpu_options& options) {
    const bool is_cpu = !kHasCuda || device.is_cpu();
    const size_t bytes = is_cpu ? op.cpu_workspace_bytes(&params, &options) : op.cuda_workspace_bytes(&params);
    const Workspace workspace(bytes, device);
    params.workspace = workspace.address();
    params.workspace_bytes = workspace.bytes();
    return call(op, device, params, options);
}

/* On the CPU values inside tensors may be why an op refused; those on a GPU are not looked at. */
static inline bool may_blame_values(const Device& device, dsa_status status) {
    return device.is_cpu() && status == DSA_BAD_SHAPE;
}

static inline void check_status(const char* op, dsa_status status) {
    if (status == DSA_OK) return;
    const std::string message = std::string(op) + ": " + dsa_status_text(status);
    const bool is_users = status == DSA_BAD_SHAPE || status == DSA_BAD_FORMAT || status == DSA_UNSUPPORTED;
    if (is_users) refuse(message);
    PADDLE_THROW(common::errors::Fatal("%s", message));
}

}  // namespace binding
}  // namespace dsa

#endif /* DSA_PADDLE_BINDING_H_ */
