/* Types shared by every op of the C ABI: status, number formats, CPU execution options; rules of all headers.
 *
 * Conventions of all headers in this folder
 *   - Every pointer is followed by its shape and dtype; strides are in elements unless the name says bytes.
 *   - An op is called as dsa_<op>_cpu(params, options) or dsa_<op>_cuda(params, stream).
 *   - An op allocates nothing, prints nothing, throws nothing and keeps no state. Scratch memory is the caller's:
 *     dsa_<op>_workspace_bytes (CPU) or dsa_<op>_cuda_workspace_bytes says how much; both calls must get the same
 *     params and options.
 *   - CUDA: every pointer inside params is memory that the stream's device can read, params itself is host memory and
 *     not needed after the call. The call only enqueues: it never waits for the device, and may be captured in a
 *     graph. The workspace needs no preparation and may serve the next call on the same stream.
 *     The device reads values inside arrays (ids, lengths, counts) too late for a status: each header says what a wrong
 *     value does on CUDA; it never makes a kernel touch memory outside the arrays.
 *   - Functions ending in _cuda exist only in a library built with CUDA: dsa_has_cuda().
 *   - dsa_<op>_params_size() is sizeof of the params struct; bindings in other languages compare it when they load.
 *   - Counts and widths are at most INT32_MAX, and the bytes of every array fit int64: else DSA_BAD_SHAPE.
 *   - Packed e4m3 numbers are uint8_t, packed bfloat16 numbers are uint16_t.
 */
#ifndef DSA_COMMON_H_
#define DSA_COMMON_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define DSA_API __attribute__((visibility("default")))
#else
#define DSA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* int32_t in every signature and struct, so that the layout does not depend on the compiler's choice for enums. */
typedef int32_t dsa_status;
enum {
    DSA_OK = 0,
    DSA_NULL_POINTER = 1,        /* a pointer that may not be null is null */
    DSA_BAD_SHAPE = 2,           /* a size is negative, zero where that has no meaning, or inconsistent */
    DSA_BAD_FORMAT = 3,          /* an unknown number format, or one this op does not take */
    DSA_WORKSPACE_TOO_SMALL = 4, /* workspace_bytes is below dsa_<op>_workspace_bytes */
    DSA_UNSUPPORTED = 5,         /* valid, but not implemented for this device or instruction set */
    DSA_CUDA_ERROR = 1000        /* DSA_CUDA_ERROR + cudaError_t: the CUDA runtime refused or failed */
};

/* Static text for a status; "unknown status" for any other number. */
DSA_API const char* dsa_status_text(dsa_status status);

typedef int32_t dsa_format;
enum {
    DSA_FLOAT32 = 0,
    DSA_BFLOAT16 = 1,
    DSA_FP8 = 2 /* e4m3 with float32 scales, arranged as cache_layout.h says */
};

/* How a writer chooses fp8 scales. Readers multiply by the stored float32 and never ask. */
typedef int32_t dsa_scale_format;
enum {
    DSA_SCALE_UE8M0 = 0, /* the smallest power of two >= the wanted scale */
    DSA_SCALE_PLAIN = 1  /* the wanted scale itself */
};

typedef int32_t dsa_isa;
enum {
    DSA_ISA_AUTO = 0, /* the best this processor has */
    DSA_ISA_SCALAR = 1,
    DSA_ISA_AVX2 = 2,      /* AVX2 + FMA + F16C */
    DSA_ISA_AVX512 = 3,    /* AVX-512 F, BW, DQ, VL */
    DSA_ISA_AVX512_BF16 = 4 /* the above + AVX512_BF16 */
};

/* 1 if this library contains the _cuda functions, else 0. Whether a GPU is there is another question. */
DSA_API int32_t dsa_has_cuda(void);

/* The best level this processor has; never DSA_ISA_AUTO. */
DSA_API dsa_isa dsa_cpu_isa(void);

enum { DSA_MAX_THREADS = 1024 };

/* Results depend on isa (order of float sums), never on num_threads. */
typedef struct dsa_cpu_options {
    int32_t num_threads; /* <= 0: as many as the process may run on; no more than DSA_MAX_THREADS are used */
    dsa_isa isa;         /* a level the processor lacks: DSA_UNSUPPORTED */
} dsa_cpu_options;

DSA_API size_t dsa_cpu_options_size(void);

#ifdef __cplusplus
}
#endif
#endif /* DSA_COMMON_H_ */
