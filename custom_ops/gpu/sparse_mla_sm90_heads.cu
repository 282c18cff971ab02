/* sparse_mla on Hopper for many rows: 64 heads of one row a CTA.
 *
 *   two producer warpgroups   gather the rows of tile t + 1 into registers; widen them to bfloat16 into shared memory
 *   consumer warpgroup 0      S and softmax of even tiles, O[:, 0 .. 255] of all
 *   consumer warpgroup 1      S and softmax of odd tiles,  O[:, 256 .. 511] of all
 *
 * The one's softmax runs while the other's products keep the tensor cores busy. P goes from its owner's registers to
 * the other consumer through the rope block of its own tile, which is unused once S is known. Both take the other's P
 * before they wait for a tile of their own, since the producers have nothing to fill until a buffer is used up.
 * What limits is the pipe of the shared memory: 64 tokens take some 3400 of its cycles, 1150 of them for S.
 * P is relative to a reference that follows the running maximum only in steps above kSlack, so that O is hardly ever
 * rescaled. The reference goes from tile to tile, in order.
 * Few rows: two CTAs of a cluster share the tiles of a row and merge what they have through each other's memory.
 */
#include "sparse_mla_sm90_heads.cuh"

#include <float.h>

#include "sparse_mla_kernels.h"

namespace dsa {
namespace gpu {
namespace heads {

/* ---- consumers ---- */

/* A consumer's 64 heads and 256 columns. */
struct Output {
    float numbers[128];

    /* kCount numbers from kCount * part on; part must be known when compiling. */
    template <int kCount>
    __device__ __forceinline__ float (&part(int part))[kCount] {
        return *(float(*)[kCount]) & numbers[kCount * part];
    }
};
constexpr int kColumnStep = 2 * kBlockBytes / 16; /* 128 columns and 16 tokens on, as steps of a descriptor */
constexpr int kTokenStep = 16 * 128 / 16;

__device__ __forceinline__ void keep(Output& o) { gpu::keep(o.numbers); }

/* A consumer thread's two rows: 16 warp + lane / 4 and 8 more. */
struct Softmax {
    float reference[2]; /* log2; what O and sum are relative to */
    float sum[2];       /* over this thread's columns of the tiles this consumer owns */
};

__device__ __forceinline__ void wait_until_rope(Shared& shared, Rope rope) {
    barrier_wait(shared_address(&shared.rope_full[rope_slot(rope)]), rope_parity(rope));
    fence_async_proxy();
}

/* The writers' stores become visible to wgmma here, and through barriers to the other consumer's too. */
__device__ __forceinline__ void wait_until_full(Shared& shared, Tile tile, int half) {
    barrier_wait(shared_address(&shared.full[buffer_of(tile)][half]), parity_of(tile));
    fence_async_proxy();
}

template <int kFirstBlock, int kLastBlock>
__device__ __forceinline__ void issue_scores(float (&s)[32], uint32_t query, uint32_t tile) {
#pragma unroll
    for (int block = kFirstBlock; block <= kLastBlock; ++block)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int step = block * (kBlockBytes / 16) + 2 * k;
            wgmma_bf16<0, 0>(s, descriptor(query + step), descriptor(tile + step), block != 0 || k != 0);
        }
}

__device__ __forceinline__ void issue_rope_scores(float (&s)[32], uint32_t query, uint32_t keys) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
        wgmma_bf16<0, 0>(s, descriptor(query + kRopeBlock * (kBlockBytes / 16) + 2 * k), descriptor(keys + 2 * k), 1);
}

/* S of a tile, in the order in which its parts become full. */
__device__ __forceinline__ void start_scores(Shared& shared, Tile tile, float (&s)[32], uint32_t query,
                                             uint32_t tile_address) {
    wait_until_full(shared, tile, 0);
    wgmma_begin();
    issue_scores<0, 3>(s, row_operand(query), row_operand(tile_address));
    wgmma_commit();
}

__device__ __forceinline__ void finish_scores(Shared& shared, Tile tile, Rope rope, float (&s)[32], uint32_t query,
                                              uint32_t tile_address) {
    wait_until_full(shared, tile, 1);
    wgmma_begin();
    issue_scores<4, 7>(s, row_operand(query), row_operand(tile_address));
    wgmma_commit();
    wait_until_rope(shared, rope);
    wgmma_begin();
    issue_rope_scores(s, row_operand(query), row_operand(rope_address(shared, rope)));
    wgmma_commit();
}

/* Rescales what is relative to the old reference. No product may be in flight on o. */
__device__ __forceinline__ void move_reference(Softmax& softmax, Output& o, const float (&reference)[2]) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        factor[i] = softmax.reference[i] == reference[i] ? 1.0f : exp2_fast(softmax.reference[i] - reference[i]);
        softmax.reference[i] = reference[i];
        softmax.sum[i] *= factor[i];
    }
    if (!__any_sync(0xFFFFFFFF, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
    for (int j = 0; j < 32; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float* pair = &o.numbers[4 * j + 2 * i];
            pair[0] *= factor[i];
            pair[1] *= factor[i];
        }
}

/* S to P = exp2(S - reference) of the owner's tile; returns the row sums of P over this thread's columns. */
__device__ __forceinline__ void scores_to_weights(float (&s)[32], uint32_t (&p)[4][4], float (&reference)[2],
                                                  float (&sums)[2], uint64_t valid, float scale_log2, int lane) {
    if (valid != ~(uint64_t)0) {
        valid >>= 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (!((valid >> (8 * j + e)) & 1)) s[4 * j + e] = s[4 * j + 2 + e] = -INFINITY;
    }
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float largest = s[2 * i];
#pragma unroll
        for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, 2));
        largest *= scale_log2;
        if (largest > reference[i] + kSlack) reference[i] = largest;
        shift[i] = reference[i] == -INFINITY ? 0.0f : reference[i]; /* no valid id yet */
        sums[i] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float low = exp2_fast(s[4 * j + 2 * i] * scale_log2 - shift[i]);
            const float high = exp2_fast(s[4 * j + 2 * i + 1] * scale_log2 - shift[i]);
            sums[i] += low + high;
            p[j / 2][2 * (j % 2) + i] = pack_bf16(low, high);
        }
}

/* The owner's part between S and PV: P into registers and, with its reference, into shared memory. */
__device__ __forceinline__ void weigh_tile(Shared& shared, Tile tile, Rope rope, int group, Softmax& softmax,
                                           float (&s)[32], uint32_t (&p)[4][4], float (&reference)[2],
                                           float (&sums)[2], float scale_log2) {
    const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, buffer = group;
    const uint64_t valid = *(const volatile uint64_t*)shared.valid[valid_slot(tile)];
    reference[0] = softmax.reference[0], reference[1] = softmax.reference[1];
    scores_to_weights(s, p, reference, sums, valid, scale_log2, lane);
    if ((lane & 3) == 0) {
        shared.references[buffer][16 * warp + lane / 4] = reference[0];
        shared.references[buffer][16 * warp + lane / 4 + 8] = reference[1];
    }
    named_barrier_sync(kGroup + group, 128); /* every warp has read the rope block */
    const uint32_t block = rope_address(shared, rope);
#pragma unroll
    for (int k = 0; k < 4; ++k)
        store_matrices(block + swizzled(16 * warp + (lane & 15), 2 * k + (lane >> 4)), p[k][0], p[k][1], p[k][2],
                       p[k][3]);
    if (group == 1) fence_async_proxy(); /* consumer 0 leaves it there for wgmma, consumer 1 loads it */
}

/* P of the other consumer's tile. */
__device__ __forceinline__ void load_weights(const Shared& shared, Rope rope, uint32_t (&p)[4][4]) {
    const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
    const uint32_t block = rope_address(shared, rope);
#pragma unroll
    for (int k = 0; k < 4; ++k) load_matrices(block + swizzled(16 * warp + (lane & 15), 2 * k + (lane >> 4)), p[k]);
}

/* P V with P in registers. Two instructions of 128 columns, since 256 would need more registers than the launch gives a
 * thread. */
__device__ __forceinline__ void issue_output(Output& o, uint32_t (&p)[4][4], uint32_t values) {
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            wgmma_bf16<1>(o.part<64>(i), p[k], descriptor(values + i * kColumnStep + k * kTokenStep), 1);
    wgmma_commit();
}

/* P V with P in shared memory. */
__device__ __forceinline__ void issue_output(Output& o, uint32_t weights, uint32_t values) {
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            wgmma_bf16<0, 1>(o.part<64>(i), descriptor(weights + 2 * k),
                             descriptor(values + i * kColumnStep + k * kTokenStep), 1);
    wgmma_commit();
}

__device__ __forceinline__ void read_references(const Shared& shared, int buffer, float (&reference)[2]) {
    const int row = 16 * ((threadIdx.x >> 5) & 3) + (threadIdx.x & 31) / 4;
    reference[0] = *(const volatile float*)&shared.references[buffer][row];
    reference[1] = *(const volatile float*)&shared.references[buffer][row + 8];
}

__device__ __forceinline__ void release(Shared& shared, int buffer, int group) {
    if ((threadIdx.x & 31) == 0) barrier_arrive(shared_address(&shared.free[buffer][group]));
}

__device__ __forceinline__ void release_rope(Shared& shared, Rope rope) {
    if ((threadIdx.x & 31) == 0) barrier_arrive(shared_address(&shared.rope_free[rope_slot(rope)]));
}

/* The row's sums over this thread's quad, then over both consumers. */
__device__ __forceinline__ void reduce_sums(Shared& shared, int group, int row, bool is_first, Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        softmax.sum[i] += __shfl_xor_sync(0xFFFFFFFF, softmax.sum[i], 1);
        softmax.sum[i] += __shfl_xor_sync(0xFFFFFFFF, softmax.sum[i], 2);
        if (is_first) shared.sums[group][row + 8 * i] = softmax.sum[i];
    }
}

/* What a CTA writes: all columns, 256 a consumer, or those of its rank among kSplits CTAs; the numbers a thread has. */
template <int kSplits>
struct Part {
    static constexpr int kColumns = kSplits == 1 ? 256 : kLatent / kSplits;
    static constexpr int kNumbers = kColumns / 2;
    static constexpr int kOfConsumer = 256 / kColumns; /* parts a consumer holds */
    static constexpr int kMailBytes = kNumbers * 128 * 4;
    static_assert(kSplits == 1 || kSplits * kMailBytes <= 2 * kTileBytes, "a mailbox for every CTA");
};

__device__ __forceinline__ float weight_of(float reference, float largest) {
    return reference == -INFINITY ? 0.0f : exp2_fast(reference - largest);
}

/* kSplits CTAs have each seen some of the row's tiles; CTA r finishes columns r * kColumns ... A thread sends each part
 * to the thread of the same number there, 16 bytes of all threads side by side. */
template <int kSplits>
__device__ __forceinline__ void send_parts(Shared& shared, int group, int rank, int row, bool is_first,
                                           const Softmax& softmax, const Output& o) {
    using P = Part<kSplits>;
    const int lane = threadIdx.x & 31;
    PartialSums& partial_sums = *(PartialSums*)shared.ropes;
    const uint32_t mailbox = shared_address(shared.tiles[0]) + 16 * (threadIdx.x & 127);
    const auto arrive_everywhere = [&](uint64_t* barrier) {
        if (lane < kSplits && lane != rank) barrier_arrive_remote(remote_address(shared_address(barrier), lane));
    };
    cluster_wait(); /* the barriers of the others are initialised */
    arrive_everywhere(&shared.others_may_write);
    barrier_wait_cluster(shared_address(&shared.others_may_write), 0);
    if (group == 0 && is_first) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            for (int other = 0; other < kSplits; ++other) {
                const uint32_t to = remote_address(shared_address(&partial_sums[rank][row + 8 * i]), other);
                if (other != rank) store_remote(to, softmax.reference[i]);
                if (other != rank) store_remote(to + 4, softmax.sum[i]);
            }
    }
#pragma unroll
    for (int part = 0; part < P::kOfConsumer; ++part) {
        const int owner = group * P::kOfConsumer + part;
        if (owner == rank) continue;
        const uint32_t to = remote_address(mailbox + rank * P::kMailBytes, owner);
#pragma unroll
        for (int n = 0; n < P::kNumbers; n += 4) {
            const float* v = &o.numbers[part * P::kNumbers + n];
            store_remote_4(to + 512 * n, make_float4(v[0], v[1], v[2], v[3]));
        }
    }
    __syncwarp();
    arrive_everywhere(&shared.others_have_written);
    barrier_wait_cluster(shared_address(&shared.others_have_written), 0);
}

/* Adds what the others sent to this CTA's own part, relative to the largest reference. */
template <int kSplits>
__device__ __forceinline__ void merge_part(const Shared& shared, int rank, int row, Softmax& softmax,
                                           float (&numbers)[Part<kSplits>::kNumbers]) {
    using P = Part<kSplits>;
    const PartialSums& partial_sums = *(const PartialSums*)shared.ropes;
    const uint8_t* mailbox = shared.tiles[0] + 16 * (threadIdx.x & 127);
    float largest[2], weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        largest[i] = softmax.reference[i];
        for (int other = 0; other < kSplits; ++other)
            if (other != rank) largest[i] = fmaxf(largest[i], partial_sums[other][row + 8 * i].x);
        weight[i] = weight_of(softmax.reference[i], largest[i]);
        softmax.reference[i] = largest[i];
        softmax.sum[i] *= weight[i];
    }
#pragma unroll
    for (int n = 0; n < P::kNumbers; ++n) numbers[n] *= weight[n / 2 % 2];
    for (int other = 0; other < kSplits; ++other) {
        if (other == rank) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 partial = partial_sums[other][row + 8 * i];
            weight[i] = weight_of(partial.x, largest[i]);
            softmax.sum[i] += weight[i] * partial.y;
        }
#pragma unroll
        for (int n = 0; n < P::kNumbers; n += 4) {
            const float4 v = *(const float4*)(mailbox + other * P::kMailBytes + 512 * n);
            numbers[n] += weight[0] * v.x;
            numbers[n + 1] += weight[0] * v.y;
            numbers[n + 2] += weight[1] * v.z;
            numbers[n + 3] += weight[1] * v.w;
        }
    }
}

/* Divides by the sums, writes the log-sum-exp, and puts columns where the query was, from block `first_block` on. */
template <int kNumbers>
__device__ __forceinline__ void stage_part(const Arguments& a, Shared& shared, uint32_t item, bool writes_lse,
                                           int first_block, const Softmax& softmax, const float (&numbers)[kNumbers]) {
    const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
    const int64_t token = item / (uint32_t)a.num_parts;
    const int first_head = (int)(item % (uint32_t)a.num_parts) * kHeads + 16 * warp + lane / 4;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        inverse[i] = softmax.sum[i] > 0.0f ? 1.0f / softmax.sum[i] : 0.0f;
        if (writes_lse && (lane & 3) == 0 && first_head + 8 * i < a.num_heads)
            a.lse[token * a.num_heads + first_head + 8 * i] =
                (softmax.reference[i] + log2f(softmax.sum[i])) * 0.693147180559945f;
    }
    const uint32_t staged = shared_address(shared.query) + first_block * kBlockBytes;
#pragma unroll
    for (int n = 0; n < kNumbers; n += 8) {
        uint32_t v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
            v[e] = pack_bf16(numbers[n + 2 * e] * inverse[e % 2], numbers[n + 2 * e + 1] * inverse[e % 2]);
        store_matrices(staged + n / 32 * kBlockBytes + swizzled(16 * warp + (lane & 15), n / 4 % 8 + (lane >> 4)), v[0],
                       v[1], v[2], v[3]);
    }
    __syncwarp();
}

template <int kSplits>
__device__ __forceinline__ void stage_output(const Arguments& a, Shared& shared, int group, int rank, uint32_t item,
                                             Softmax& softmax, Output& o) {
    using P = Part<kSplits>;
    const int lane = threadIdx.x & 31, row = 16 * ((threadIdx.x >> 5) & 3) + lane / 4;
    const bool is_first = (lane & 3) == 0;
    reduce_sums(shared, group, row, is_first, softmax);
    named_barrier_sync(kConsumers, 256); /* also: neither the query nor a tile is in use any more */
#pragma unroll
    for (int i = 0; i < 2; ++i) softmax.sum[i] = shared.sums[0][row + 8 * i] + shared.sums[1][row + 8 * i];
    const bool writes_lse = a.lse != nullptr && group == 0 && rank == 0;
    if (kSplits == 1) {
        stage_part(a, shared, item, writes_lse, 4 * group, softmax, o.numbers);
        return;
    }
    send_parts<kSplits>(shared, group, rank, row, is_first, softmax, o);
    if (group != rank / P::kOfConsumer) return;
    float(&own)[P::kNumbers] = o.template part<P::kNumbers>(0);
#pragma unroll
    for (int part = 1; part < P::kOfConsumer; ++part)
#pragma unroll
        for (int n = 0; n < P::kNumbers; ++n)
            own[n] = select_float(part == rank % P::kOfConsumer, o.numbers[part * P::kNumbers + n], own[n]);
    merge_part<kSplits>(shared, rank, row, softmax, own);
    stage_part(a, shared, item, writes_lse, 0, softmax, own);
}

/* A warp writes the rows that it has staged. */
template <int kSplits>
__device__ __forceinline__ void store_output(const Arguments& a, Shared& shared, int group, int rank, uint32_t item) {
    constexpr int kColumns = Part<kSplits>::kColumns, kLanesPerRow = kColumns / 8, kRowsPerStep = 32 / kLanesPerRow;
    const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, piece = lane % kLanesPerRow;
    const int64_t token = item / (uint32_t)a.num_parts;
    const int first_row = 16 * warp + lane / kLanesPerRow;
    const int first_head = (int)(item % (uint32_t)a.num_parts) * kHeads + first_row;
    const uint32_t staged = shared_address(shared.query) + ((kSplits == 1 ? 4 * group : 0) + piece / 8) * kBlockBytes;
    const int first_column = (kSplits == 1 ? group : rank) * kColumns + 8 * piece;
    uint8_t* out = a.out + ((token * a.num_heads + first_head) * kLatent + first_column) * 2;
#pragma unroll 4
    for (int i = 0; i < 16; i += kRowsPerStep) {
        if (first_head + i >= a.num_heads) break;
        uint4 v = load_shared_16(staged + swizzled(first_row + i, piece % 8));
        exchange_middle(v.x, v.y);
        exchange_middle(v.z, v.w);
        *(uint4*)(out + i * (2 * kLatent)) = v;
    }
}

/* Both consumers together: 64 heads, zeros where the row has fewer. The output of the item before, which waits in the
 * same memory, is written meanwhile. */
__device__ __forceinline__ void load_query(const Arguments& a, Shared& shared, int group, uint32_t item,
                                           bool is_first) {
    /* A thread takes pieces 4 i + thread % 4 of one head; eight lanes that store together have heads h and h + 4. */
    constexpr int kPieces = kWidth / 8 / 4;
    const int lane = threadIdx.x & 31;
    const int row = 8 * (threadIdx.x >> 5) + (lane >> 3) + (lane & 4);
    const int64_t token = item / (uint32_t)a.num_parts;
    const int head = (int)(item % (uint32_t)a.num_parts) * kHeads + row;
    const bool is_there = head < a.num_heads;
    const int64_t query_row = token * a.num_heads + (is_there ? head : 0);
    const uint8_t* from = a.query + query_row * (2 * kWidth) + 16 * (lane & 3);
    uint4 v[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) v[i] = is_there ? load_16(from + 64 * i) : make_uint4(0, 0, 0, 0);
    if (!is_first) store_output<1>(a, shared, group, 0, item - gridDim.x);
    named_barrier_sync(kConsumers, 256);
    const uint32_t to = shared_address(shared.query) + swizzled(row, lane & 3);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        if (i / 2 != kRopeBlock) {
            exchange_middle(v[i].x, v[i].y);
            exchange_middle(v[i].z, v[i].w);
        }
        v[i].x ^= a.query_signs, v[i].y ^= a.query_signs, v[i].z ^= a.query_signs, v[i].w ^= a.query_signs;
        store_shared_16((to ^ (i % 2 << 6)) + i / 2 * kBlockBytes, v[i].x, v[i].y, v[i].z, v[i].w);
    }
    fence_async_proxy();
    named_barrier_sync(kConsumers, 256);
}

/* The query rows of an item lie side by side. */
__device__ __forceinline__ void prefetch_query(const Arguments& a, uint32_t item) {
    const int64_t token = item / (uint32_t)a.num_parts;
    const int first_head = (int)(item % (uint32_t)a.num_parts) * kHeads;
    prefetch(a.query + (token * a.num_heads + first_head) * (2 * kWidth),
             min(kHeads, a.num_heads - first_head) * (2 * kWidth));
}

/* Uses of the buffers before this row: what its first tiles are called. */
struct Uses {
    int even, odd;
    Rope rope;
};

__device__ __forceinline__ void consume_even(const Arguments& a, Shared& shared, int num_tiles, Uses uses,
                                             Softmax& softmax, Output& o) {
    const uint32_t query = shared_address(shared.query);
    const uint32_t tiles = shared_address(shared.tiles[0]);
    Rope rope = uses.rope;
    float s[32];
    uint32_t p[4][4];
    float reference[2], sums[2];
    Tile tile = uses.even << 1;
    const auto finish_even = [&] {
        wgmma_wait<0>();
        gpu::keep(s);
        keep(o);
        weigh_tile(shared, tile, rope, 0, softmax, s, p, reference, sums, a.scale_log2);
        named_barrier_arrive(kEvenReady, 256);
        move_reference(softmax, o, reference);
        softmax.sum[0] += sums[0], softmax.sum[1] += sums[1];
        issue_output(o, p, column_operand(tiles));
        wgmma_wait<0>();
        keep(o);
        gpu::keep(p[0]), gpu::keep(p[1]), gpu::keep(p[2]), gpu::keep(p[3]);
        release(shared, 0, 0);
        ++rope;
        tile += 2;
    };
    const auto start_odd = [&] {
        named_barrier_sync(kOddReady, 256);
        read_references(shared, 1, reference);
        move_reference(softmax, o, reference);
        issue_output(o, row_operand(rope_address(shared, rope)), column_operand(tiles + kTileBytes));
    };
    if (num_tiles == 0) return;
    start_scores(shared, tile, s, query, tiles);
    finish_scores(shared, tile, rope, s, query, tiles);
    finish_even();
    /* P V of the odd tile and S of the next even one are in flight together: the compiler follows them in straight code
     * only, which is why the first S stands before the loop and the last P V behind it. */
    for (int t = 2; t < num_tiles; t += 2) {
        start_odd();
        start_scores(shared, tile, s, query, tiles);
        wgmma_wait<1>();
        release(shared, 1, 0);
        release_rope(shared, rope++);
        finish_scores(shared, tile, rope, s, query, tiles);
        finish_even();
    }
    if (num_tiles % 2 == 0) {
        start_odd();
        wgmma_wait<0>();
        keep(o);
        release(shared, 1, 0);
        release_rope(shared, rope++);
    }
}

__device__ __forceinline__ void consume_odd(const Arguments& a, Shared& shared, int num_tiles, Uses uses,
                                            Softmax& softmax, Output& o) {
    const uint32_t query = shared_address(shared.query);
    const uint32_t tiles = shared_address(shared.tiles[0]);
    Rope rope = uses.rope;
    constexpr int kColumns = 4 * kBlockBytes; /* where this consumer's columns start */
    float s[32];
    uint32_t p[4][4];
    float reference[2], sums[2];
    Tile tile = uses.odd << 1 | 1;
    const auto take_even = [&] {
        named_barrier_sync(kEvenReady, 256);
        read_references(shared, 0, reference);
        move_reference(softmax, o, reference);
        load_weights(shared, rope, p);
        issue_output(o, p, column_operand(tiles + kColumns));
        wgmma_wait<0>();
        keep(o);
        gpu::keep(p[0]), gpu::keep(p[1]), gpu::keep(p[2]), gpu::keep(p[3]);
        release(shared, 0, 1);
        release_rope(shared, rope);
    };
    for (int t = 0; t + 1 < num_tiles; t += 2, tile += 2, rope += 2) {
        take_even();
        start_scores(shared, tile, s, query, tiles + kTileBytes);
        finish_scores(shared, tile, rope + 1, s, query, tiles + kTileBytes);
        wgmma_wait<0>();
        gpu::keep(s);
        weigh_tile(shared, tile, rope + 1, 1, softmax, s, p, reference, sums, a.scale_log2);
        named_barrier_arrive(kOddReady, 256);
        move_reference(softmax, o, reference);
        softmax.sum[0] += sums[0], softmax.sum[1] += sums[1];
        issue_output(o, p, column_operand(tiles + kTileBytes + kColumns));
        wgmma_wait<0>();
        keep(o);
        gpu::keep(p[0]), gpu::keep(p[1]), gpu::keep(p[2]), gpu::keep(p[3]);
        release(shared, 1, 1);
    }
    if (num_tiles % 2 == 1) take_even();
}

template <int kSplits>
__device__ __forceinline__ void consume(const Arguments& a, Shared& shared, uint32_t first_item, int split) {
    const int group = threadIdx.x >> 7;
    Uses uses = {0, 0, 0};
    uint32_t item = first_item;
    for (;;) {
        load_query(a, shared, group, item, item == first_item);
        if (kSplits == 1 && threadIdx.x == 0 && item + gridDim.x < a.num_items) prefetch_query(a, item + gridDim.x);
        const int num_tiles = num_tiles_of<kSplits>(count_of(a, item / (uint32_t)a.num_parts), split);
        Softmax softmax = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        Output o;
#pragma unroll
        for (int i = 0; i < 128; ++i) o.numbers[i] = 0.0f;
        if (group == 0)
            consume_even(a, shared, num_tiles, uses, softmax, o);
        else
            consume_odd(a, shared, num_tiles, uses, softmax, o);
        uses.even += (num_tiles + 1) / 2;
        uses.odd += num_tiles / 2;
        uses.rope += num_tiles;
        stage_output<kSplits>(a, shared, group, split, item, softmax, o);
        if (kSplits > 1 || item + gridDim.x >= a.num_items) break;
        item += gridDim.x;
    }
    if (kSplits == 1 || group == split / Part<kSplits>::kOfConsumer)
        store_output<kSplits>(a, shared, group, split, item);
}

namespace {

/* One CTA a multiprocessor goes through items (a row and 64 of its heads); its producers are up to two tiles ahead,
 * across items too. kSplits > 1: one item a cluster, its tiles dealt out to the CTAs. */
template <int kSplits>
__global__ void __launch_bounds__(kThreads, 1) attend(const __grid_constant__ Arguments a) {
#if __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *(Shared*)memory;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; ++i) {
            barrier_init(shared_address(&shared.full[i / 2][i % 2]), kProducerWarps);
            barrier_init(shared_address(&shared.free[i / 2][i % 2]), 4);
        }
        for (int i = 0; i < kRopes; ++i) {
            barrier_init(shared_address(&shared.rope_full[i]), 32 * kProducerWarps);
            barrier_init(shared_address(&shared.rope_free[i]), 4);
        }
        if (kSplits > 1) {
            barrier_init(shared_address(&shared.others_may_write), 8 * (kSplits - 1));
            barrier_init(shared_address(&shared.others_have_written), 8 * (kSplits - 1));
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (kSplits > 1) cluster_arrive();
    wait_for_previous_kernel(); /* before anything in global memory is touched */
    const int split = blockIdx.x % kSplits;
    const uint32_t item = blockIdx.x / kSplits;
    if (threadIdx.x >= 256) {
        give_registers<kProducerRegisters>();
        if (kSplits > 1) cluster_wait();
        Producer<kSplits>(a, shared, item).run();
        let_next_kernel_start();
    } else {
        take_registers<kConsumerRegisters>();
        consume<kSplits>(a, shared, item, split);
    }
#endif
}

/* A launch of num_clusters clusters; it keeps what its configuration points to. If it overlaps the kernel before, its
 * CTAs start while that one ends and wait for its results. */
template <int kSplits>
struct Launch {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};

    Launch(uint32_t num_clusters, bool overlaps, cudaStream_t stream) {
        config.gridDim = dim3(num_clusters * kSplits);
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = sizeof(Shared);
        config.stream = stream;
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = overlaps;
        attributes[1].id = cudaLaunchAttributeClusterDimension;
        attributes[1].val.clusterDim.x = kSplits;
        attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
        config.attrs = attributes;
        config.numAttrs = kSplits > 1 ? 2 : 1;
    }
    Launch(const Launch&) = delete;
};

template <int kSplits>
dsa_status launch(const Arguments& a, uint32_t num_clusters, cudaStream_t stream) {
    const dsa_status status = allow_shared_bytes(attend<kSplits>, sizeof(Shared));
    if (status != DSA_OK) return status;
    /* Where CTAs go through many items the start does not count, and starting early cost up to 3 %. */
    const Launch<kSplits> launch(num_clusters, num_clusters == a.num_items, stream);
    const cudaError_t error = cudaLaunchKernelEx(&launch.config, attend<kSplits>, a);
    return error != cudaSuccess ? status_of(error) : launched(stream);
}

/* Clusters of kSplits CTAs that the current device runs at the same time: fewer than multiprocessors / kSplits, because
 * a cluster does not cross the device's parts. The answer never changes, so that threads may race to store it. */
template <int kSplits>
uint32_t max_clusters() {
    static int32_t known[kMaxDevices]; /* 0: not asked yet; else one more than the answer */
    int ordinal = 0, clusters = 0;
    if (cudaGetDevice(&ordinal) != cudaSuccess || ordinal >= kMaxDevices) return 0;
    const int32_t found = __atomic_load_n(&known[ordinal], __ATOMIC_ACQUIRE);
    if (found != 0) return (uint32_t)(found - 1);
    if (allow_shared_bytes(attend<kSplits>, sizeof(Shared)) != DSA_OK) return 0;
    const Launch<kSplits> launch(1, false, nullptr);
    if (cudaOccupancyMaxActiveClusters(&clusters, attend<kSplits>, &launch.config) != cudaSuccess) {
        cudaGetLastError();
        clusters = 0;
    }
    __atomic_store_n(&known[ordinal], clusters + 1, __ATOMIC_RELEASE);
    return (uint32_t)clusters;
}

}  // namespace
}  // namespace heads

/* Bound: 2 * 64 * (576 + 512) * count FLOP for 64 heads of a row on the tensor cores, 34 cycles of a multiprocessor a
 * slot; 656 bytes a slot read. */
dsa_status sparse_mla_sm90_heads(const dsa_sparse_mla_params& params, const Device& device, cudaStream_t stream) {
    using namespace heads;
    if (!device.has_hopper_instructions || device.max_shared_bytes < (int32_t)sizeof(Shared)) return DSA_UNSUPPORTED;
    /* Ids are looked for some tiles ahead, in int32; offsets in the cache count 16 bytes, in uint32. */
    if (params.topk > INT32_MAX - 8192) return DSA_UNSUPPORTED;
    if (params.num_blocks * params.block_stride_bytes / 16 > UINT32_MAX) return DSA_UNSUPPORTED;
    Arguments a = {};
    a.query = (const uint8_t*)params.query;
    a.latent_cache = params.num_blocks > 0 ? params.latent_cache : a.query;
    a.slot_ids = params.slot_ids;
    a.counts = params.counts;
    a.out = (uint8_t*)params.out;
    a.lse = params.lse;
    a.block_stride = (uint32_t)(params.block_stride_bytes / 16);
    a.num_slots = (int32_t)(params.num_blocks * params.block_size);
    a.block_size = params.block_size;
    a.num_heads = params.num_heads;
    a.num_parts = (params.num_heads + kHeads - 1) / kHeads;
    a.topk = params.topk;
    a.sixteen = 16;
    a.pow2_8 = 256;
    a.query_signs = params.softmax_scale < 0.0f ? 0x80008000 : 0;
    a.scale_log2 = fmaxf(fabsf(params.softmax_scale) * 1.44269504088896f, FLT_MIN); /* masked scores stay -inf */
    const int64_t num_items = params.num_tokens * a.num_parts;
    if (num_items > INT32_MAX / 2) return DSA_UNSUPPORTED;
    a.num_items = (uint32_t)num_items;
    const uint32_t num_multiprocessors = (uint32_t)device.num_multiprocessors;
    const uint32_t num_tiles = (uint32_t)((params.topk + kTokens - 1) / kTokens);
    if (num_tiles >= 2 && a.num_items <= max_clusters<2>()) return launch<2>(a, a.num_items, stream);
    return launch<1>(a, a.num_items < num_multiprocessors ? a.num_items : num_multiprocessors, stream);
}

}  // namespace gpu
}  // namespace dsa
