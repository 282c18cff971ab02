#include "row_attention.h"

#include <math.h>
#include <string.h>

#include "number_formats.h"
#include "parallel.h"
#include "sizes.h"

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
    bool is_by_rows;
    int32_t num_threads;
    int32_t num_chunks;     /* of a token with max_ids valid ids */
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

/* Time of the call on one thread, for the vector kernels: arithmetic near the peak, and decoding of every row. */
double estimated_nanoseconds(const RowAttention& call) {
    const double flop_per_row = 2.0 * call.num_heads * (2.0 * call.value_dim + call.key_only_dim);
    return (double)call.num_tokens * call.max_ids * (flop_per_row / 80 + 50);
}

Plan make_plan(const RowAttention& call, const dsa_cpu_options* options) {
    const int32_t num_threads = threads_for(estimated_nanoseconds(call), options);
    Plan plan = {};
    plan.ids_bytes = round_up((int64_t)call.max_ids * 4, kCacheLine);
    plan.num_chunks = (int32_t)ceil_divide(call.max_ids, kKeysPerChunk);
    const int64_t tasks_per_token = call.kernels == nullptr
                                        ? call.num_heads
                                        : ceil_divide(call.num_heads, kMinHeadsPerTask) * plan.num_chunks;
    const int64_t max_tasks = call.num_tokens * tasks_per_token;
    plan.num_threads = max_tasks < num_threads ? (int32_t)max_tasks : num_threads;
    if (call.kernels == nullptr) {
        plan.thread_bytes = 2 * plan.ids_bytes + 2 * (int64_t)call.row_width * 4; /* ids, logits, result, one key */
        return plan;
    }
    const int64_t wanted_tasks = (int64_t)kTasksPerThread * plan.num_threads;
    plan.is_by_rows = plan.num_threads == 1 || call.num_tokens >= wanted_tasks;
    const int64_t batch_tokens = ceil_divide(wanted_tasks, plan.num_chunks);
    plan.batch_tokens = batch_tokens < call.num_tokens ? batch_tokens : call.num_tokens;
    plan.heads_per_task = call.num_heads;
    if (!plan.is_by_rows && plan.batch_tokens > 0) {
        const int64_t tiles = ceil_divide(wanted_tasks, plan.batch_tokens * plan.num_chunks);
        const int64_t heads = round_up(ceil_divide(call.num_heads, tiles), kMinHeadsPerTask);
        if (heads < call.num_heads) plan.heads_per_task = (int32_t)heads;
    }
    plan.query_bytes = (int64_t)plan.heads_per_task * call.row_width * 4;
    plan.keys_bytes = kKeysPerChunk * ((int64_t)call.row_width * 4 + (int64_t)call.bf16_row_width * 2);
    plan.probabilities_bytes = (int64_t)plan.heads_per_task * kKeysPerChunk * 4;
    plan.partial_bytes = 2 * round_up(call.num_heads, kPadFloats) * 4 + (int64_t)call.num_heads * call.value_width * 4;
    plan.thread_bytes = plan.query_bytes + plan.keys_bytes + plan.probabilities_bytes;
    if (plan.is_by_rows)
        plan.thread_bytes += plan.ids_bytes + 2 * plan.partial_bytes;
    else
        plan.shared_bytes = plan.batch_tokens * (plan.ids_bytes + kCacheLine + plan.num_chunks * plan.partial_bytes);
    return plan;
}

void store_number(const RowAttention& call, int64_t i, float value) {
    if (call.query_format == DSA_FLOAT32)
        ((float*)call.out)[i] = value;
    else
        ((uint16_t*)call.out)[i] = bf16_encode(value);
}

/* out = 0 and lse = -inf, for a token without valid ids. */
void store_empty(const RowAttention& call, int64_t token) {
    const int64_t numbers = (int64_t)call.num_heads * call.value_dim;
    const int64_t number_bytes = call.query_format == DSA_FLOAT32 ? 4 : 2;
    memset((uint8_t*)call.out + token * numbers * number_bytes, 0, (size_t)(numbers * number_bytes));
    if (call.lse == nullptr) return;
    for (int32_t h = 0; h < call.num_heads; ++h) call.lse[token * call.num_heads + h] = -INFINITY;
}

/* ---- scalar: the definition ---- */

float query_number(const RowAttention& call, int64_t i) {
    if (call.query_format == DSA_FLOAT32) return ((const float*)call.query)[i];
    return bf16_decode(((const uint16_t*)call.query)[i]);
}

float dot_query(const RowAttention& call, int64_t query_row, const float* key) {
    const int32_t width = call.value_dim + call.key_only_dim;
    float sum = 0.0f;
    for (int32_t i = 0; i < width; ++i) sum += query_number(call, query_row * width + i) * key[i];
    return sum;
}

struct ScalarScratch {
    int32_t* ids;  /* [max_ids] */
    float* logits; /* [max_ids], then probabilities */
    float* out;    /* [value_dim] */
    float* key;    /* [value_dim + key_only_dim] */
};

void attend_head_scalar(const RowAttention& call, int64_t token, int32_t head, const ScalarScratch& scratch) {
    const int64_t query_row = token * call.num_heads + head;
    const int32_t num_ids = call.collect_ids(call, token, scratch.ids);
    float max = -INFINITY;
    for (int32_t i = 0; i < num_ids; ++i) {
        call.read_row(call, scratch.ids[i], scratch.key);
        scratch.logits[i] = call.softmax_scale * dot_query(call, query_row, scratch.key);
        if (scratch.logits[i] > max) max = scratch.logits[i];
    }
    float sum = 0.0f;
    for (int32_t i = 0; i < num_ids; ++i) {
        scratch.logits[i] = expf(scratch.logits[i] - max);
        sum += scratch.logits[i];
    }
    for (int32_t d = 0; d < call.value_dim; ++d) scratch.out[d] = 0.0f;
    for (int32_t i = 0; i < num_ids; ++i) {
        call.read_row(call, scratch.ids[i], scratch.key);
        for (int32_t d = 0; d < call.value_dim; ++d) scratch.out[d] += scratch.logits[i] * scratch.key[d];
    }
    const float total = call.sinks == nullptr ? sum : sum + expf(call.sinks[head] - max);
    for (int32_t d = 0; d < call.value_dim; ++d)
        store_number(call, query_row * call.value_dim + d, num_ids > 0 ? scratch.out[d] / total : 0.0f);
    if (call.lse != nullptr) call.lse[query_row] = num_ids > 0 ? max + logf(sum) : -INFINITY;
}

void run_scalar(const RowAttention& call, const Plan& plan) {
    parallel_for(call.num_tokens * call.num_heads, plan.num_threads, [&](int64_t task, int32_t thread) {
        uint8_t* memory = (uint8_t*)call.workspace + thread * plan.thread_bytes;
        float* out = (float*)(memory + 2 * plan.ids_bytes);
        const ScalarScratch scratch = {(int32_t*)memory, (float*)(memory + plan.ids_bytes), out, out + call.row_width};
        attend_head_scalar(call, task / call.num_heads, (int32_t)(task % call.num_heads), scratch);
    });
}

/* ---- vector: chunks of keys, see row_attention.h ---- */

struct ThreadScratch {
    float* query;
    float* keys;
    float* probabilities;
    uint8_t* rest;
};

ThreadScratch thread_scratch(const RowAttention& call, const Plan& plan, int32_t thread) {
    uint8_t* memory = (uint8_t*)call.workspace + thread * plan.thread_bytes;
    uint8_t* keys = memory + plan.query_bytes;
    uint8_t* probabilities = keys + plan.keys_bytes;
    return {(float*)memory, (float*)keys, (float*)probabilities, probabilities + plan.probabilities_bytes};
}

RowAttentionPartial partial_at(const RowAttention& call, uint8_t* memory) {
    float* max = (float*)memory;
    const int64_t heads = round_up(call.num_heads, kPadFloats);
    return {max, max + heads, max + 2 * heads};
}

RowAttentionPartial from_head(const RowAttention& call, const RowAttentionPartial& partial, int32_t first_head) {
    return {partial.max + first_head, partial.sum + first_head,
            partial.out + (int64_t)first_head * call.value_width};
}

/* Ids of a chunk; empty behind the last. */
IdRange chunk_of(const int32_t* ids, int32_t num_ids, int64_t chunk) {
    const int64_t rest = num_ids - chunk * kKeysPerChunk;
    if (rest <= 0) return {nullptr, 0};
    return {ids + chunk * kKeysPerChunk, (int32_t)(rest < kKeysPerChunk ? rest : kKeysPerChunk)};
}

void attend_row(const RowAttention& call, const Plan& plan, int64_t token, int32_t thread) {
    const ThreadScratch scratch = thread_scratch(call, plan, thread);
    int32_t* ids = (int32_t*)scratch.rest;
    const RowAttentionPartial row = partial_at(call, scratch.rest + plan.ids_bytes);
    const RowAttentionPartial chunk_partial = partial_at(call, scratch.rest + plan.ids_bytes + plan.partial_bytes);
    const int32_t num_heads = call.num_heads;
    const int32_t num_ids = call.collect_ids(call, token, ids);
    if (num_ids == 0) return store_empty(call, token);
    call.kernels->load_query(call, token, 0, num_heads, scratch.query);
    for (int32_t chunk = 0; chunk * kKeysPerChunk < num_ids; ++chunk) {
        const IdRange chunk_ids = chunk_of(ids, num_ids, chunk);
        call.kernels->load_keys(call, chunk_ids, scratch.keys);
        call.kernels->attend(call, scratch.query, scratch.keys, num_heads, chunk_ids.size,
                             chunk_of(ids, num_ids, chunk + 1), scratch.probabilities,
                             chunk == 0 ? row : chunk_partial);
        if (chunk > 0) call.kernels->merge(call, num_heads, chunk_partial, row);
    }
    call.kernels->store(call, token, 0, num_heads, row);
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

RowAttentionPartial batch_partial(const RowAttention& call, const Plan& plan, const Batch& batch, int64_t i,
                                  int32_t chunk) {
    uint8_t* partials = batch.memory + plan.batch_tokens * (plan.ids_bytes + kCacheLine);
    return partial_at(call, partials + (i * plan.num_chunks + chunk) * plan.partial_bytes);
}

/* One task: a chunk of one token for one tile of heads. */
struct ChunkTask {
    int64_t i; /* of the batch */
    int32_t chunk;
    int32_t first_head;
};

ChunkTask chunk_task(const RowAttention& call, const Plan& plan, int64_t task) {
    const int64_t num_tiles = ceil_divide(call.num_heads, plan.heads_per_task);
    return {task / num_tiles / plan.num_chunks, (int32_t)(task / num_tiles % plan.num_chunks),
            (int32_t)(task % num_tiles) * plan.heads_per_task};
}

IdRange task_ids(const Plan& plan, const Batch& batch, const ChunkTask& task) {
    if (task.i >= batch.num_tokens) return {nullptr, 0};
    return chunk_of(batch_ids(plan, batch, task.i), *batch_num_ids(plan, batch, task.i), task.chunk);
}

void attend_chunk(const RowAttention& call, const Plan& plan, const Batch& batch, int64_t task_number,
                  int32_t thread) {
    const ChunkTask task = chunk_task(call, plan, task_number);
    const IdRange chunk_ids = task_ids(plan, batch, task);
    if (chunk_ids.size == 0) return;
    /* Threads take tasks in turn: this is most likely the next one of this thread. */
    const IdRange next = task_ids(plan, batch, chunk_task(call, plan, task_number + plan.num_threads));
    const ThreadScratch scratch = thread_scratch(call, plan, thread);
    const int32_t rest = call.num_heads - task.first_head;
    const int32_t num_heads = rest < plan.heads_per_task ? rest : plan.heads_per_task;
    call.kernels->load_query(call, batch.first_token + task.i, task.first_head, num_heads, scratch.query);
    call.kernels->load_keys(call, chunk_ids, scratch.keys);
    call.kernels->attend(call, scratch.query, scratch.keys, num_heads, chunk_ids.size, next, scratch.probabilities,
                         from_head(call, batch_partial(call, plan, batch, task.i, task.chunk), task.first_head));
}

void merge_chunks(const RowAttention& call, const Plan& plan, const Batch& batch, int64_t task) {
    const int32_t num_heads = call.num_heads;
    const int32_t num_tiles = (int32_t)ceil_divide(num_heads, kHeadsPerMerge);
    const int32_t first_head = (int32_t)(task % num_tiles) * kHeadsPerMerge;
    const int32_t heads = num_heads - first_head < kHeadsPerMerge ? num_heads - first_head : kHeadsPerMerge;
    const int64_t i = task / num_tiles;
    const int32_t num_ids = *batch_num_ids(plan, batch, i);
    if (num_ids == 0) return; /* stored already */
    const RowAttentionPartial row = from_head(call, batch_partial(call, plan, batch, i, 0), first_head);
    for (int32_t chunk = 1; chunk * kKeysPerChunk < num_ids; ++chunk)
        call.kernels->merge(call, heads, from_head(call, batch_partial(call, plan, batch, i, chunk), first_head), row);
    call.kernels->store(call, batch.first_token + i, first_head, heads, row);
}

void run_batch(const RowAttention& call, const Plan& plan, const Batch& batch) {
    const int64_t num_tiles = ceil_divide(call.num_heads, plan.heads_per_task);
    const int64_t num_merges = batch.num_tokens * ceil_divide(call.num_heads, kHeadsPerMerge);
    parallel_for(batch.num_tokens, plan.num_threads, [&](int64_t i, int32_t) {
        const int32_t num_ids = call.collect_ids(call, batch.first_token + i, batch_ids(plan, batch, i));
        *batch_num_ids(plan, batch, i) = num_ids;
        if (num_ids == 0) store_empty(call, batch.first_token + i);
    });
    parallel_for(batch.num_tokens * plan.num_chunks * num_tiles, plan.num_threads,
                 [&](int64_t task, int32_t thread) { attend_chunk(call, plan, batch, task, thread); });
    parallel_for(num_merges, plan.num_threads, [&](int64_t task, int32_t) { merge_chunks(call, plan, batch, task); });
}

/* Bound: 2 * num_heads * (2 * value_dim + key_only_dim) FLOP a row at the rate of float32 FMA (512 + 64, 16 heads: 34.8
 * kFLOP, 15 to 53 for each byte of the row); with few heads the bytes of the rows. */
void run_vector(const RowAttention& call, const Plan& plan) {
    const int64_t num_tokens = call.num_tokens;
    if (plan.is_by_rows) {
        parallel_for(num_tokens, plan.num_threads,
                     [&](int64_t token, int32_t thread) { attend_row(call, plan, token, thread); });
        return;
    }
    uint8_t* shared = (uint8_t*)call.workspace + plan.num_threads * plan.thread_bytes;
    for (int64_t first = 0; first < num_tokens; first += plan.batch_tokens) {
        const int64_t rest = num_tokens - first;
        run_batch(call, plan, {first, rest < plan.batch_tokens ? rest : plan.batch_tokens, shared});
    }
}

}  // namespace

bool set_row_widths(RowAttention* call) {
    const int64_t value_width = round_up(call->value_dim, kPadFloats);
    const int64_t row_width = value_width + round_up(call->key_only_dim, kPadFloats);
    if (row_width > (INT32_MAX - 2 * kPadFloats) / call->num_heads) return false; /* bf16_row_width rounds up */
    if (!product_fits(row_width, call->num_heads, call->num_tokens, 4)) return false;
    if (!product_fits(call->max_ids, call->num_heads, call->num_tokens, 4)) return false; /* bounds the tasks too */
    call->value_width = (int32_t)value_width;
    call->row_width = (int32_t)row_width;
    call->bf16_row_width = (int32_t)round_up(row_width, 2 * kPadFloats);
    return true;
}

size_t row_attention_workspace_bytes(const RowAttention& call, const dsa_cpu_options* options) {
    if (call.num_tokens == 0) return 0;
    const Plan plan = make_plan(call, options);
    return (size_t)(plan.num_threads * plan.thread_bytes + plan.shared_bytes);
}

void run_row_attention(const RowAttention& call, const dsa_cpu_options* options) {
    const Plan plan = make_plan(call, options);
    if (call.kernels == nullptr)
        run_scalar(call, plan);
    else
        run_vector(call, plan);
}

bool counts_fit(const int32_t* counts, int64_t num_tokens, int32_t width) {
    for (int64_t t = 0; counts != nullptr && t < num_tokens; ++t)
        if (counts[t] < 0 || counts[t] > width) return false;
    return true;
}

}  // namespace dsa
