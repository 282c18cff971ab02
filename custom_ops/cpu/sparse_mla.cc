#include <math.h>
#include <string.h>

#include "dispatch.h"
#include "number_formats.h"
#include "parallel.h"
#include "sparse_mla_kernels.h"

namespace dsa {
namespace {

constexpr int32_t kTasksPerThread = 4;   /* enough for an even end when tasks differ in length */
constexpr int32_t kMinHeadsPerTask = 16; /* the chunk is decoded once per task: an eighth of its time at 16 heads */
constexpr int32_t kHeadsPerMerge = 4;    /* one token of 16 heads is merged by up to four threads */
constexpr int64_t kCacheLine = 64;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t ceil_divide(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

/* Who works on what:
 *   scalar     a task is one (token, head)
 *   by rows    a task is one token, chunk after chunk; for many tokens
 *   by chunks  a task is one (token, chunk, head tile); partial results of a batch of tokens are kept, then merged
 */
struct Plan {
    const SparseMlaKernels* kernels; /* null: scalar */
    bool is_by_rows;
    int32_t num_threads;
    int32_t num_chunks;     /* of a row with topk valid ids */
    int32_t heads_per_task; /* num_heads but by chunks */
    int64_t batch_tokens;   /* by chunks */
    int64_t ids_bytes;      /* one row of valid ids */
    int64_t query_bytes;
    int64_t keys_bytes;
    int64_t probabilities_bytes;
    int64_t partial_bytes;
    int64_t thread_bytes;
    int64_t shared_bytes;
};

dsa_status check_shape(const dsa_sparse_mla_params& p, SparseMla* call) {
    if (p.query_format != DSA_FLOAT32 && p.query_format != DSA_BFLOAT16) return DSA_BAD_FORMAT;
    const dsa_status status = make_latent_layout(p.cache_format, p.kv_lora_rank, p.qk_rope_head_dim, p.num_blocks,
                                                 p.block_size, p.block_stride_bytes, &call->layout);
    if (status != DSA_OK) return status;
    if (call->layout.num_slots > INT32_MAX) return DSA_BAD_SHAPE;
    if (p.topk <= 0 || p.topk > INT32_MAX - kKeysPerChunk) return DSA_BAD_SHAPE;
    if (!is_count(p.num_tokens) || p.num_heads <= 0) return DSA_BAD_SHAPE;
    call->params = &p;
    const int64_t latent_width = round_up(p.kv_lora_rank, kPadFloats);
    const int64_t row_width = latent_width + round_up(p.qk_rope_head_dim, kPadFloats);
    if (row_width > (INT32_MAX - 2 * kPadFloats) / p.num_heads) return DSA_BAD_SHAPE; /* bf16_row_width rounds up */
    if (!product_fits(row_width, p.num_heads, p.num_tokens, 4)) return DSA_BAD_SHAPE;
    if (!product_fits(p.topk, p.num_heads, p.num_tokens, 4)) return DSA_BAD_SHAPE; /* bounds the tasks too */
    call->latent_width = (int32_t)latent_width;
    call->row_width = (int32_t)row_width;
    call->bf16_row_width = (int32_t)round_up(row_width, 2 * kPadFloats);
    return DSA_OK;
}

dsa_status check_arrays(const dsa_sparse_mla_params& p, size_t workspace_bytes) {
    if (p.num_tokens == 0) return DSA_OK;
    if (p.query == nullptr || p.slot_ids == nullptr || p.out == nullptr) return DSA_NULL_POINTER;
    if (p.latent_cache == nullptr && p.num_blocks > 0) return DSA_NULL_POINTER;
    if (p.workspace_bytes < workspace_bytes) return DSA_WORKSPACE_TOO_SMALL;
    if (p.workspace == nullptr) return DSA_NULL_POINTER;
    if (p.counts == nullptr) return DSA_OK;
    for (int64_t t = 0; t < p.num_tokens; ++t)
        if (p.counts[t] < 0 || p.counts[t] > p.topk) return DSA_BAD_SHAPE;
    return DSA_OK;
}

/* Time of the call on one thread, for the vector kernels: arithmetic near the peak, and decoding of every row. */
double estimated_nanoseconds(const dsa_sparse_mla_params& p) {
    const double flop_per_row = 2.0 * p.num_heads * (2.0 * p.kv_lora_rank + p.qk_rope_head_dim);
    return (double)p.num_tokens * p.topk * (flop_per_row / 80 + 50);
}

const SparseMlaKernels* kernels_for(const dsa_sparse_mla_params& p, dsa_isa isa) {
#if DSA_X86
    if (isa == DSA_ISA_SCALAR) return nullptr;
    if (isa == DSA_ISA_AVX2) return &sparse_mla_avx2;
    const bool is_bf16 = p.query_format == DSA_BFLOAT16 && p.cache_format != DSA_FLOAT32;
    return isa == DSA_ISA_AVX512_BF16 && is_bf16 ? &sparse_mla_avx512_bf16 : &sparse_mla_avx512;
#else
    (void)p;
    (void)isa;
    return nullptr;
#endif
}

Plan make_plan(const SparseMla& call, int32_t num_threads, dsa_isa isa) {
    const dsa_sparse_mla_params& p = *call.params;
    Plan plan = {};
    plan.kernels = kernels_for(p, isa);
    plan.ids_bytes = round_up((int64_t)p.topk * 4, kCacheLine);
    plan.num_chunks = (int32_t)ceil_divide(p.topk, kKeysPerChunk);
    const int64_t tasks_per_token = plan.kernels == nullptr
                                        ? p.num_heads
                                        : ceil_divide(p.num_heads, kMinHeadsPerTask) * plan.num_chunks;
    const int64_t max_tasks = p.num_tokens * tasks_per_token;
    plan.num_threads = max_tasks < num_threads ? (int32_t)max_tasks : num_threads;
    if (plan.kernels == nullptr) {
        plan.thread_bytes = 2 * plan.ids_bytes + 2 * (int64_t)call.row_width * 4; /* ids, logits, result, one key */
        return plan;
    }
    const int64_t wanted_tasks = (int64_t)kTasksPerThread * plan.num_threads;
    plan.is_by_rows = plan.num_threads == 1 || p.num_tokens >= wanted_tasks;
    const int64_t batch_tokens = ceil_divide(wanted_tasks, plan.num_chunks);
    plan.batch_tokens = batch_tokens < p.num_tokens ? batch_tokens : p.num_tokens;
    plan.heads_per_task = p.num_heads;
    if (!plan.is_by_rows && plan.batch_tokens > 0) {
        const int64_t tiles = ceil_divide(wanted_tasks, plan.batch_tokens * plan.num_chunks);
        const int64_t heads = round_up(ceil_divide(p.num_heads, tiles), kMinHeadsPerTask);
        if (heads < p.num_heads) plan.heads_per_task = (int32_t)heads;
    }
    plan.query_bytes = (int64_t)plan.heads_per_task * call.row_width * 4;
    plan.keys_bytes = kKeysPerChunk * ((int64_t)call.row_width * 4 + (int64_t)call.bf16_row_width * 2);
    plan.probabilities_bytes = (int64_t)plan.heads_per_task * kKeysPerChunk * 4;
    plan.partial_bytes = 2 * round_up(p.num_heads, kPadFloats) * 4 + (int64_t)p.num_heads * call.latent_width * 4;
    plan.thread_bytes = plan.query_bytes + plan.keys_bytes + plan.probabilities_bytes;
    if (plan.is_by_rows)
        plan.thread_bytes += plan.ids_bytes + 2 * plan.partial_bytes;
    else
        plan.shared_bytes = plan.batch_tokens * (plan.ids_bytes + kCacheLine + plan.num_chunks * plan.partial_bytes);
    return plan;
}

size_t workspace_bytes(const SparseMla& call, const Plan& plan) {
    if (call.params->num_tokens == 0) return 0;
    return (size_t)(plan.num_threads * plan.thread_bytes + plan.shared_bytes);
}

/* Valid ids of a token in their order; returns how many. */
int32_t collect_ids(const SparseMla& call, int64_t token, int32_t* ids) {
    const dsa_sparse_mla_params& p = *call.params;
    const int32_t count = p.counts == nullptr ? p.topk : p.counts[token];
    const int32_t* slot_ids = p.slot_ids + token * p.topk;
    int32_t num_ids = 0;
    for (int32_t i = 0; i < count; ++i) {
        ids[num_ids] = slot_ids[i];
        num_ids += slot_ids[i] >= 0 && slot_ids[i] < call.layout.num_slots;
    }
    return num_ids;
}

void store_number(const dsa_sparse_mla_params& p, int64_t i, float value) {
    if (p.query_format == DSA_FLOAT32)
        ((float*)p.out)[i] = value;
    else
        ((uint16_t*)p.out)[i] = bf16_encode(value);
}

/* out = 0 and lse = -inf, for a token without valid ids. */
void store_empty(const dsa_sparse_mla_params& p, int64_t token) {
    const int64_t numbers = (int64_t)p.num_heads * p.kv_lora_rank;
    const int64_t number_bytes = p.query_format == DSA_FLOAT32 ? 4 : 2;
    memset((uint8_t*)p.out + token * numbers * number_bytes, 0, (size_t)(numbers * number_bytes));
    for (int32_t h = 0; h < p.num_heads && p.lse != nullptr; ++h) p.lse[token * p.num_heads + h] = -INFINITY;
}

/* ---- scalar: the definition ---- */

float read_number(const uint8_t* numbers, dsa_format format, int64_t i) {
    float value;
    uint16_t code;
    if (format == DSA_FLOAT32) {
        memcpy(&value, numbers + 4 * i, 4);
        return value;
    }
    memcpy(&code, numbers + 2 * i, 2);
    return bf16_decode(code);
}

void decode_row(const LatentLayout& layout, const uint8_t* row, float* key) {
    const bool is_fp8 = layout.format == DSA_FP8;
    for (int32_t i = 0; i < layout.kv_lora_rank; ++i) {
        if (is_fp8) {
            const float scale = read_number(row + layout.scale_offset, DSA_FLOAT32, i / DSA_LATENT_GROUP);
            key[i] = bf16_round(e4m3_decode(row[i]) * scale);
        } else {
            key[i] = read_number(row, layout.format, i);
        }
    }
    const dsa_format rope_format = is_fp8 ? (dsa_format)DSA_BFLOAT16 : layout.format;
    for (int32_t i = 0; i < layout.qk_rope_head_dim; ++i)
        key[layout.kv_lora_rank + i] = read_number(row + layout.rope_offset, rope_format, i);
}

float dot_query(const dsa_sparse_mla_params& p, int64_t query_row, const float* key) {
    const int32_t width = p.kv_lora_rank + p.qk_rope_head_dim;
    const int64_t number_bytes = p.query_format == DSA_FLOAT32 ? 4 : 2;
    const uint8_t* query = (const uint8_t*)p.query + query_row * width * number_bytes;
    float sum = 0.0f;
    for (int32_t i = 0; i < width; ++i) sum += read_number(query, p.query_format, i) * key[i];
    return sum;
}

struct ScalarScratch {
    int32_t* ids;  /* [topk] */
    float* logits; /* [topk], then probabilities */
    float* out;    /* [kv_lora_rank] */
    float* key;    /* [kv_lora_rank + qk_rope_head_dim] */
};

void attend_head_scalar(const SparseMla& call, int64_t token, int32_t head, const ScalarScratch& scratch) {
    const dsa_sparse_mla_params& p = *call.params;
    const int64_t query_row = token * p.num_heads + head;
    const int32_t num_ids = collect_ids(call, token, scratch.ids);
    float max = -INFINITY;
    for (int32_t i = 0; i < num_ids; ++i) {
        decode_row(call.layout, p.latent_cache + latent_row_offset(&call.layout, scratch.ids[i]), scratch.key);
        scratch.logits[i] = p.softmax_scale * dot_query(p, query_row, scratch.key);
        if (scratch.logits[i] > max) max = scratch.logits[i];
    }
    float sum = 0.0f;
    for (int32_t i = 0; i < num_ids; ++i) {
        scratch.logits[i] = expf(scratch.logits[i] - max);
        sum += scratch.logits[i];
    }
    for (int32_t d = 0; d < p.kv_lora_rank; ++d) scratch.out[d] = 0.0f;
    for (int32_t i = 0; i < num_ids; ++i) {
        decode_row(call.layout, p.latent_cache + latent_row_offset(&call.layout, scratch.ids[i]), scratch.key);
        for (int32_t d = 0; d < p.kv_lora_rank; ++d) scratch.out[d] += scratch.logits[i] * scratch.key[d];
    }
    for (int32_t d = 0; d < p.kv_lora_rank; ++d)
        store_number(p, query_row * p.kv_lora_rank + d, num_ids > 0 ? scratch.out[d] / sum : 0.0f);
    if (p.lse != nullptr) p.lse[query_row] = num_ids > 0 ? max + logf(sum) : -INFINITY;
}

void run_scalar(const SparseMla& call, const Plan& plan) {
    const dsa_sparse_mla_params& p = *call.params;
    parallel_for(p.num_tokens * p.num_heads, plan.num_threads, [&](int64_t task, int32_t thread) {
        uint8_t* memory = (uint8_t*)p.workspace + thread * plan.thread_bytes;
        float* out = (float*)(memory + 2 * plan.ids_bytes);
        const ScalarScratch scratch = {(int32_t*)memory, (float*)(memory + plan.ids_bytes), out, out + call.row_width};
        attend_head_scalar(call, task / p.num_heads, (int32_t)(task % p.num_heads), scratch);
    });
}

/* ---- vector: chunks of keys, see sparse_mla_kernels.h ---- */

struct ThreadScratch {
    float* query;
    float* keys;
    float* probabilities;
    uint8_t* rest;
};

ThreadScratch thread_scratch(const SparseMla& call, const Plan& plan, int32_t thread) {
    uint8_t* memory = (uint8_t*)call.params->workspace + thread * plan.thread_bytes;
    uint8_t* keys = memory + plan.query_bytes;
    uint8_t* probabilities = keys + plan.keys_bytes;
    return {(float*)memory, (float*)keys, (float*)probabilities, probabilities + plan.probabilities_bytes};
}

SparseMlaPartial partial_at(const SparseMla& call, uint8_t* memory) {
    float* max = (float*)memory;
    const int64_t heads = round_up(call.params->num_heads, kPadFloats);
    return {max, max + heads, max + 2 * heads};
}

SparseMlaPartial from_head(const SparseMla& call, const SparseMlaPartial& partial, int32_t first_head) {
    return {partial.max + first_head, partial.sum + first_head,
            partial.out + (int64_t)first_head * call.latent_width};
}

/* Ids of a chunk; empty behind the last. */
SlotRange chunk_of(const int32_t* ids, int32_t num_ids, int64_t chunk) {
    const int64_t rest = num_ids - chunk * kKeysPerChunk;
    if (rest <= 0) return {nullptr, 0};
    return {ids + chunk * kKeysPerChunk, (int32_t)(rest < kKeysPerChunk ? rest : kKeysPerChunk)};
}

void attend_row(const SparseMla& call, const Plan& plan, int64_t token, int32_t thread) {
    const ThreadScratch scratch = thread_scratch(call, plan, thread);
    int32_t* ids = (int32_t*)scratch.rest;
    const SparseMlaPartial row = partial_at(call, scratch.rest + plan.ids_bytes);
    const SparseMlaPartial chunk_partial = partial_at(call, scratch.rest + plan.ids_bytes + plan.partial_bytes);
    const int32_t num_heads = call.params->num_heads;
    const int32_t num_ids = collect_ids(call, token, ids);
    if (num_ids == 0) return store_empty(*call.params, token);
    plan.kernels->load_query(call, token, 0, num_heads, scratch.query);
    for (int32_t chunk = 0; chunk * kKeysPerChunk < num_ids; ++chunk) {
        const SlotRange slots = chunk_of(ids, num_ids, chunk);
        plan.kernels->load_keys(call, slots, scratch.keys);
        plan.kernels->attend(call, scratch.query, scratch.keys, num_heads, slots.size,
                             chunk_of(ids, num_ids, chunk + 1), scratch.probabilities,
                             chunk == 0 ? row : chunk_partial);
        if (chunk > 0) plan.kernels->merge(call, num_heads, chunk_partial, row);
    }
    plan.kernels->store(call, token, 0, num_heads, row);
}

/* Tokens that are worked on by chunks at the same time; memory holds their ids and partial results. */
struct Batch {
    int64_t first_token;
    int64_t num_tokens;
    uint8_t* memory;
};

int32_t* batch_ids(const Plan& plan, const Batch& batch, int64_t i) {
    return (int32_t*)(batch.memory + i * (plan.ids_bytes + kCacheLine) + kCacheLine);
}

int32_t* batch_num_ids(const Plan& plan, const Batch& batch, int64_t i) {
    return (int32_t*)(batch.memory + i * (plan.ids_bytes + kCacheLine));
}

SparseMlaPartial batch_partial(const SparseMla& call, const Plan& plan, const Batch& batch, int64_t i, int32_t chunk) {
    uint8_t* partials = batch.memory + plan.batch_tokens * (plan.ids_bytes + kCacheLine);
    return partial_at(call, partials + (i * plan.num_chunks + chunk) * plan.partial_bytes);
}

/* One task: a chunk of one token for one tile of heads. */
struct ChunkTask {
    int64_t i; /* of the batch */
    int32_t chunk;
    int32_t first_head;
};

ChunkTask chunk_task(const SparseMla& call, const Plan& plan, int64_t task) {
    const int64_t num_tiles = ceil_divide(call.params->num_heads, plan.heads_per_task);
    return {task / num_tiles / plan.num_chunks, (int32_t)(task / num_tiles % plan.num_chunks),
            (int32_t)(task % num_tiles) * plan.heads_per_task};
}

SlotRange task_slots(const Plan& plan, const Batch& batch, const ChunkTask& task) {
    if (task.i >= batch.num_tokens) return {nullptr, 0};
    return chunk_of(batch_ids(plan, batch, task.i), *batch_num_ids(plan, batch, task.i), task.chunk);
}

void attend_chunk(const SparseMla& call, const Plan& plan, const Batch& batch, int64_t task_number,
                  int32_t thread) {
    const ChunkTask task = chunk_task(call, plan, task_number);
    const SlotRange slots = task_slots(plan, batch, task);
    if (slots.size == 0) return;
    /* Threads take tasks in turn: this is most likely the next one of this thread. */
    const SlotRange next = task_slots(plan, batch, chunk_task(call, plan, task_number + plan.num_threads));
    const ThreadScratch scratch = thread_scratch(call, plan, thread);
    const int32_t rest = call.params->num_heads - task.first_head;
    const int32_t num_heads = rest < plan.heads_per_task ? rest : plan.heads_per_task;
    plan.kernels->load_query(call, batch.first_token + task.i, task.first_head, num_heads, scratch.query);
    plan.kernels->load_keys(call, slots, scratch.keys);
    plan.kernels->attend(call, scratch.query, scratch.keys, num_heads, slots.size, next, scratch.probabilities,
                         from_head(call, batch_partial(call, plan, batch, task.i, task.chunk), task.first_head));
}

void merge_chunks(const SparseMla& call, const Plan& plan, const Batch& batch, int64_t task) {
    const int32_t num_heads = call.params->num_heads;
    const int32_t num_tiles = (int32_t)ceil_divide(num_heads, kHeadsPerMerge);
    const int32_t first_head = (int32_t)(task % num_tiles) * kHeadsPerMerge;
    const int32_t heads = num_heads - first_head < kHeadsPerMerge ? num_heads - first_head : kHeadsPerMerge;
    const int64_t i = task / num_tiles;
    const int32_t num_ids = *batch_num_ids(plan, batch, i);
    if (num_ids == 0) return; /* stored already */
    const SparseMlaPartial row = from_head(call, batch_partial(call, plan, batch, i, 0), first_head);
    for (int32_t chunk = 1; chunk * kKeysPerChunk < num_ids; ++chunk)
        plan.kernels->merge(call, heads, from_head(call, batch_partial(call, plan, batch, i, chunk), first_head), row);
    plan.kernels->store(call, batch.first_token + i, first_head, heads, row);
}

void run_batch(const SparseMla& call, const Plan& plan, const Batch& batch) {
    const int64_t num_tiles = ceil_divide(call.params->num_heads, plan.heads_per_task);
    const int64_t num_merges = batch.num_tokens * ceil_divide(call.params->num_heads, kHeadsPerMerge);
    parallel_for(batch.num_tokens, plan.num_threads, [&](int64_t i, int32_t) {
        const int32_t num_ids = collect_ids(call, batch.first_token + i, batch_ids(plan, batch, i));
        *batch_num_ids(plan, batch, i) = num_ids;
        if (num_ids == 0) store_empty(*call.params, batch.first_token + i);
    });
    parallel_for(batch.num_tokens * plan.num_chunks * num_tiles, plan.num_threads,
                 [&](int64_t task, int32_t thread) { attend_chunk(call, plan, batch, task, thread); });
    parallel_for(num_merges, plan.num_threads, [&](int64_t task, int32_t) { merge_chunks(call, plan, batch, task); });
}

/* Bound: FLOPs of sparse_mla.h at the rate of float32 FMA (512 + 64, 16 heads: 34.8 kFLOP a key, 15 to 53 for
 * each byte of its row); with few heads the bytes of the rows. */
void run_vector(const SparseMla& call, const Plan& plan) {
    const int64_t num_tokens = call.params->num_tokens;
    if (plan.is_by_rows) {
        parallel_for(num_tokens, plan.num_threads,
                     [&](int64_t token, int32_t thread) { attend_row(call, plan, token, thread); });
        return;
    }
    uint8_t* shared = (uint8_t*)call.params->workspace + plan.num_threads * plan.thread_bytes;
    for (int64_t first = 0; first < num_tokens; first += plan.batch_tokens) {
        const int64_t rest = num_tokens - first;
        run_batch(call, plan, {first, rest < plan.batch_tokens ? rest : plan.batch_tokens, shared});
    }
}

}  // namespace
}  // namespace dsa

size_t dsa_sparse_mla_params_size(void) { return sizeof(dsa_sparse_mla_params); }

size_t dsa_sparse_mla_workspace_bytes(const dsa_sparse_mla_params* params, const dsa_cpu_options* options) {
    using namespace dsa;
    SparseMla call;
    if (params == nullptr || options == nullptr || check_shape(*params, &call) != DSA_OK) return 0;
    return workspace_bytes(call, make_plan(call, threads_for(estimated_nanoseconds(*params), options), resolve_isa(options)));
}

dsa_status dsa_sparse_mla_cpu(const dsa_sparse_mla_params* params, const dsa_cpu_options* options) {
    using namespace dsa;
    if (params == nullptr || options == nullptr) return DSA_NULL_POINTER;
    SparseMla call;
    const dsa_status shape_status = check_shape(*params, &call);
    if (shape_status != DSA_OK) return shape_status;
    const dsa_isa isa = resolve_isa(options);
    if (isa == DSA_ISA_AUTO) return DSA_UNSUPPORTED;
    const Plan plan = make_plan(call, threads_for(estimated_nanoseconds(*params), options), isa);
    const dsa_status array_status = check_arrays(*params, workspace_bytes(call, plan));
    if (array_status != DSA_OK || params->num_tokens == 0) return array_status;
    if (plan.kernels == nullptr)
        run_scalar(call, plan);
    else
        run_vector(call, plan);
    return DSA_OK;
}
