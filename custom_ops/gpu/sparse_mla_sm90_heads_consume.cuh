/* The consumers of sparse_mla_sm90_heads.cu: scores, softmax and output of 64 heads, from tiles that producers fill.
 *
 *   consumer warpgroup 0      S and softmax of even tiles, half of the columns of O of all
 *   consumer warpgroup 1      S and softmax of odd tiles, the other half of all
 *
 * The one's softmax runs while the other's products keep the tensor cores busy. P goes from its owner's registers to
 * the other consumer through the rope block of its own tile, which is unused once S is known.
 * P is relative to a reference that follows the running maximum only in steps above kSlack, so that O is hardly ever
 * rescaled. The reference goes from tile to tile, in order.
 */
#ifndef DSA_GPU_SPARSE_MLA_SM90_HEADS_CONSUME_CUH_
#define DSA_GPU_SPARSE_MLA_SM90_HEADS_CONSUME_CUH_

#include "sparse_mla_sm90_heads.cuh"

namespace dsa {
namespace gpu {
namespace heads {

/* The order of a consumer's work, and how it reads and writes what it needs once. */

/* Rows are widened as they are gathered: the filling of a tile takes longer than the products of the other, so both
 * consumers take the other's P before they wait for a tile of their own, which frees a buffer early. */
struct Direct {
    static constexpr bool kScoresFirst = false;
    static constexpr bool kStreams = false;
};

/* Rows are only copied: tiles come early enough for the odd one's scores to run under the even one's softmax. Over many
 * items queries and results pass through the L2 once, and would drive rows out of it that are wanted again. */
struct Widened {
    static constexpr bool kScoresFirst = true;
    static constexpr bool kStreams = true;
};

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

template <class Way>
__device__ __forceinline__ uint4 load_once_16(const uint8_t* from) {
    if constexpr (Way::kStreams) return __ldcs((const uint4*)from);
    return load_16(from);
}

template <class Way>
__device__ __forceinline__ void store_16(uint8_t* to, const uint4& v) {
    if constexpr (Way::kStreams)
        __stcs((uint4*)to, v);
    else
        *(uint4*)to = v;
}

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

/* Rescales what is relative to the old reference. No product may be in flight on o; the compiler wants the others, too,
 * to be done before registers of a product change. */
__device__ __forceinline__ void move_reference(Softmax& softmax, Output& o, const float (&reference)[2]) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        factor[i] = softmax.reference[i] == reference[i] ? 1.0f : exp2_fast(softmax.reference[i] - reference[i]);
        softmax.reference[i] = reference[i];
        softmax.sum[i] *= factor[i];
    }
    if (!__any_sync(0xFFFFFFFF, factor[0] != 1.0f || factor[1] != 1.0f)) return;
    wgmma_wait<0>();
    keep(o);
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
template <class Way>
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
    if (group == 1 || Way::kScoresFirst) fence_async_proxy(); /* if the other consumer leaves it there for wgmma */
}

/* P of the other consumer's tile. */
__device__ __forceinline__ void load_weights(const Shared& shared, Rope rope, uint32_t (&p)[4][4]) {
    const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
    const uint32_t block = rope_address(shared, rope);
#pragma unroll
    for (int k = 0; k < 4; ++k) load_matrices(block + swizzled(16 * warp + (lane & 15), 2 * k + (lane >> 4)), p[k]);
}

__device__ __forceinline__ void multiply(float (&o)[64], uint32_t (&weights)[4][4], int k, uint32_t values) {
    wgmma_bf16<1>(o, weights[k], descriptor(values + k * kTokenStep), 1);
}

__device__ __forceinline__ void multiply(float (&o)[64], uint32_t weights, int k, uint32_t values) {
    wgmma_bf16<0, 1>(o, descriptor(weights + 2 * k), descriptor(values + k * kTokenStep), 1);
}

/* P V with P in registers or in shared memory. Two instructions of 128 columns, since 256 would need more registers than
 * the launch of Direct gives a thread. */
template <class Weights>
__device__ __forceinline__ void issue_output(Output& o, Weights& weights, uint32_t values) {
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) multiply(o.part<64>(i), weights, k, values + i * kColumnStep);
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
template <class Way, int kSplits>
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
        store_16<Way>(out + i * (2 * kLatent), v);
    }
}

/* Both consumers together: 64 heads, zeros where the row has fewer. The output of the item before, which waits in the
 * same memory, is written meanwhile. */
template <class Way>
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
    for (int i = 0; i < kPieces; ++i) v[i] = is_there ? load_once_16<Way>(from + 64 * i) : make_uint4(0, 0, 0, 0);
    if (!is_first) store_output<Way, 1>(a, shared, group, 0, item - gridDim.x);
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

template <class Way>
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
        weigh_tile<Way>(shared, tile, rope, 0, softmax, s, p, reference, sums, a.scale_log2);
        named_barrier_arrive(kEvenReady, 256);
        move_reference(softmax, o, reference);
        softmax.sum[0] += sums[0], softmax.sum[1] += sums[1];
        issue_output(o, p, column_operand(tiles));
        wgmma_wait<0>();
        release(shared, 0, 0);
        keep(o);
        gpu::keep(p[0]), gpu::keep(p[1]), gpu::keep(p[2]), gpu::keep(p[3]);
        ++rope;
        tile += 2;
    };
    const auto start_odd = [&] {
        named_barrier_sync(kOddReady, 256);
        read_references(shared, 1, reference);
        move_reference(softmax, o, reference);
        const uint32_t weights = row_operand(rope_address(shared, rope));
        issue_output(o, weights, column_operand(tiles + kTileBytes));
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
        release(shared, 1, 0);
        keep(o);
        release_rope(shared, rope++);
    }
}

template <class Way>
__device__ __forceinline__ void consume_odd(const Arguments& a, Shared& shared, int num_tiles, Uses uses,
                                            Softmax& softmax, Output& o) {
    const uint32_t query = shared_address(shared.query);
    const uint32_t tiles = shared_address(shared.tiles[0]);
    constexpr int kColumns = 4 * kBlockBytes; /* where this consumer's columns start */
    Rope rope = uses.rope;
    float s[32];
    uint32_t p[4][4];
    float reference[2], sums[2];
    Tile tile = uses.odd << 1 | 1;
    const auto take_even_weights = [&] {
        named_barrier_sync(kEvenReady, 256);
        read_references(shared, 0, reference);
        move_reference(softmax, o, reference);
    };
    const auto finish_even = [&] {
        wgmma_wait<0>();
        release(shared, 0, 1);
        keep(o);
        release_rope(shared, rope);
    };
    const auto take_even = [&] {
        take_even_weights();
        load_weights(shared, rope, p);
        issue_output(o, p, column_operand(tiles + kColumns));
        finish_even();
        gpu::keep(p[0]), gpu::keep(p[1]), gpu::keep(p[2]), gpu::keep(p[3]);
    };
    for (int t = 0; t + 1 < num_tiles; t += 2, tile += 2, rope += 2) {
        if (!Way::kScoresFirst) take_even();
        start_scores(shared, tile, s, query, tiles + kTileBytes);
        finish_scores(shared, tile, rope + 1, s, query, tiles + kTileBytes);
        if (Way::kScoresFirst) { /* P V of the even tile runs under this one's softmax */
            take_even_weights();
            const uint32_t weights = row_operand(rope_address(shared, rope));
            issue_output(o, weights, column_operand(tiles + kColumns));
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        gpu::keep(s);
        weigh_tile<Way>(shared, tile, rope + 1, 1, softmax, s, p, reference, sums, a.scale_log2);
        named_barrier_arrive(kOddReady, 256);
        if (Way::kScoresFirst) finish_even();
        move_reference(softmax, o, reference);
        softmax.sum[0] += sums[0], softmax.sum[1] += sums[1];
        issue_output(o, p, column_operand(tiles + kTileBytes + kColumns));
        wgmma_wait<0>();
        release(shared, 1, 1);
        keep(o);
        gpu::keep(p[0]), gpu::keep(p[1]), gpu::keep(p[2]), gpu::keep(p[3]);
    }
    if (num_tiles % 2 == 1) take_even();
}

template <class Way, int kSplits>
__device__ __forceinline__ void consume(const Arguments& a, Shared& shared, uint32_t first_item, int split) {
    const int group = threadIdx.x >> 7;
    Uses uses = {0, 0, 0};
    uint32_t item = first_item;
    for (;;) {
        load_query<Way>(a, shared, group, item, item == first_item);
        if (kSplits == 1 && threadIdx.x == 0 && item + gridDim.x < a.num_items) prefetch_query(a, item + gridDim.x);
        const int num_tiles = num_tiles_of<kSplits>(count_of(a, item / (uint32_t)a.num_parts), split);
        Softmax softmax = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        Output o;
#pragma unroll
        for (int i = 0; i < 128; ++i) o.numbers[i] = 0.0f;
        if (group == 0)
            consume_even<Way>(a, shared, num_tiles, uses, softmax, o);
        else
            consume_odd<Way>(a, shared, num_tiles, uses, softmax, o);
        uses.even += (num_tiles + 1) / 2;
        uses.odd += num_tiles / 2;
        uses.rope += num_tiles;
        stage_output<kSplits>(a, shared, group, split, item, softmax, o);
        if (kSplits > 1 || item + gridDim.x >= a.num_items) break;
        item += gridDim.x;
    }
    if (kSplits == 1 || group == split / Part<kSplits>::kOfConsumer)
        store_output<Way, kSplits>(a, shared, group, split, item);
}

}  // namespace heads
}  // namespace gpu
}  // namespace dsa

#endif /* DSA_GPU_SPARSE_MLA_SM90_HEADS_CONSUME_CUH_ */
