// What keeps the cache: rows into slots, moves, block summaries, and queries made ready to score.

#include "common.cuh"

namespace cache {

// grid count; whole warps.
template <typename S> __device__ void scatter(const ScatterParams &p) {
    const float *from = p.rows + (int64_t)blockIdx.x * p.width;
    for (int i = threadIdx.x; i < p.width; i += blockDim.x)
        store_at<S>(p.pool, p.scales, p.slots[blockIdx.x], p.width, i, p.transforms ? hadamard(from[i]) : from[i]);
}

// Rows of a step, by what they are made of.
enum Row { QUERY, KEY, VALUE };

// What is stored: a row of a token.
struct StoredRow {
    Row kind;
    int token, head;

    __device__ __forceinline__ StoredRow(const StoreParams &p, int row) {
        const int heads = p.q_heads + 2 * p.kv_heads, of_all = row % heads;
        token = row / heads;
        kind = of_all < p.q_heads ? QUERY : of_all < p.q_heads + p.kv_heads ? KEY : VALUE;
        head = of_all - (kind == QUERY ? 0 : kind == KEY ? p.q_heads : p.q_heads + p.kv_heads);
    }

    __device__ __forceinline__ const float *from(const StoreParams &p) const {
        return p.rows[kind] + (int64_t)token * p.apart[kind] + head * p.head_dim;
    }
    __device__ __forceinline__ const float *bias(const StoreParams &p) const { return p.biases[kind] ? p.biases[kind] + head * p.head_dim : nullptr; }
    __device__ __forceinline__ const float *norm(const StoreParams &p) const { return kind == VALUE ? nullptr : p.norms[kind]; }
    __device__ __forceinline__ bool is_rotated(const StoreParams &p) const { return kind != VALUE && p.cos; }
    // The row of queries, or of a pool.
    __device__ __forceinline__ int64_t place(const StoreParams &p) const {
        if (kind == QUERY) return (int64_t)token * p.q_heads + head;
        const int t = p.start + token;
        return (int64_t)p.pages[(int64_t)head * p.max_pages + t / PAGE] * PAGE + t % PAGE;
    }
};

// Rows of a warp at a time, from `first` on, stored as T: a lane has neighbours of the first half of a row, and those of the second half that they are
// rotated with.
template <typename T, int HEAD_DIM> struct StoredHalves {
    static constexpr int LANES = HEAD_DIM < 128 ? HEAD_DIM / 4 : 32, OWN = HEAD_DIM / 2 / LANES, ROWS = 32 / LANES;

    // Numbers of a lane.
    struct __align__(4 * OWN) Own {
        float x[OWN];
    };
    struct __align__(sizeof(T) * OWN) Rounded {
        uint32_t pairs[OWN / 2];
    };

    static __device__ __forceinline__ void store(const StoreParams &p, int first) {
        const int lane = threadIdx.x % LANES;
        // Beyond the last one, that one again.
        const StoredRow row(p, min(first + (int)threadIdx.x % 32 / LANES, p.tokens * (p.q_heads + 2 * p.kv_heads) - 1));
        const auto of_half = [&](const float *numbers, int half) { return *(const Own *)(numbers + half * (HEAD_DIM / 2) + OWN * lane); };
        const float *from = row.from(p);
        Own x[2] = {of_half(from, 0), of_half(from, 1)};
        if (const float *bias = row.bias(p)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Own more = of_half(bias, half);
#pragma unroll
                for (int i = 0; i < OWN; ++i) x[half].x[i] += more.x[i];
            }
        }
        // Neighbouring rows of a warp may be of another kind.
        if (p.norms[QUERY] || p.norms[KEY]) {
            float squares = 0.f;
#pragma unroll
            for (int i = 0; i < OWN; ++i) squares += x[0].x[i] * x[0].x[i] + x[1].x[i] * x[1].x[i];
#pragma unroll
            for (int step = LANES / 2; step; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
            if (const float *weight = row.norm(p)) {
                const float factor = 1.f / sqrtf(squares / HEAD_DIM + p.eps);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Own by = of_half(weight, half);
#pragma unroll
                    for (int i = 0; i < OWN; ++i) x[half].x[i] *= factor * by.x[i];
                }
            }
        }
        if (row.is_rotated(p)) {
            const int64_t at = (int64_t)row.token * (HEAD_DIM / 2) + OWN * lane;
            const Own cos = *(const Own *)(p.cos + at), sin = *(const Own *)(p.sin + at);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const float a = x[0].x[i], b = x[1].x[i];
                x[0].x[i] = a * cos.x[i] - b * sin.x[i], x[1].x[i] = a * sin.x[i] + b * cos.x[i];
            }
        }
        T *to = (T *)(row.kind == QUERY ? p.q : p.pools[row.kind == VALUE]) + row.place(p) * HEAD_DIM + OWN * lane;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Rounded out;
#pragma unroll
            for (int i = 0; i < OWN / 2; ++i) out.pairs[i] = pack<T>(x[half].x[2 * i], x[half].x[2 * i + 1]);
            *(Rounded *)(to + half * (HEAD_DIM / 2)) = out;
        }
    }
};

// A row of a warp, of N groups of 32 numbers, stored as bytes with a scale for each group: a lane has one of each.
template <int N> struct StoredBytes {
    static constexpr int HEAD_DIM = 32 * N, ROWS = 1;

    static __device__ __forceinline__ void store(const StoreParams &p, int first) {
        const int lane = threadIdx.x % 32;
        const StoredRow row(p, first);
        const float *from = row.from(p) + lane;
        float x[N];
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = from[32 * i];
        if (const float *bias = row.bias(p)) {
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] += bias[lane + 32 * i];
        }
        if (const float *weight = row.norm(p)) {
            float squares = 0.f;
#pragma unroll
            for (int i = 0; i < N; ++i) squares += x[i] * x[i];
            const float factor = 1.f / sqrtf(sum_of_warp(squares) / HEAD_DIM + p.eps);
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] *= factor * weight[lane + 32 * i];
        }
        if (row.is_rotated(p)) {
            const int64_t at = (int64_t)row.token * (HEAD_DIM / 2) + lane;
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                const float cos = p.cos[at + 32 * i], sin = p.sin[at + 32 * i], a = x[i], b = x[i + N / 2];
                x[i] = a * cos - b * sin, x[i + N / 2] = a * sin + b * cos;
            }
        }
        const int64_t place = row.place(p);
        if (row.kind == QUERY) {
            half *to = (half *)p.q + place * HEAD_DIM + lane;
#pragma unroll
            for (int i = 0; i < N; ++i) narrow(to[32 * i], x[i]);
            return;
        }
        void *pool = p.pools[row.kind == VALUE], *scales = p.scales[row.kind == VALUE];
#pragma unroll
        for (int i = 0; i < N; ++i) store_at<Bytes>(pool, scales, place, HEAD_DIM, lane + 32 * i, row.kind == KEY ? hadamard(x[i]) : x[i]);
    }
};

template <typename S, int HEAD_DIM> using Stored = std::conditional_t<std::is_same_v<S, Bytes>, StoredBytes<HEAD_DIM / 32>, StoredHalves<S, HEAD_DIM>>;

// Rows one after the other, as a token has them: a warp takes one at a time, or two, of so many thread blocks. The first `late` ones, which had
// something else to do, begin when each of the others has had one.
template <typename S> __device__ __forceinline__ void store(const StoreParams &p, int block, int blocks, int late) {
    const int of_block = blockDim.x / 32, all = blocks * of_block, early = (blocks - late) * of_block;
    const int warp = (block - late) * of_block + (int)threadIdx.x / 32; // below 0: of a late one, the last of all in each round
    const int rows = p.tokens * (p.q_heads + 2 * p.kv_heads), at_once = p.head_dim == 64 ? Stored<S, 64>::ROWS : 1;
    const bool is_late = warp < 0;
    for (int turn = is_late ? early + warp + all : warp, step = is_late ? all : early; turn * at_once < rows; turn += step, step = all) {
        switch (p.head_dim) {
        case 64: Stored<S, 64>::store(p, turn * at_once); break;
        case 128: Stored<S, 128>::store(p, turn); break;
        default: Stored<S, 256>::store(p, turn);
        }
    }
}

// The slot of token `index` of those of a head that are kept only since the frontier moved: among recent ones, by the old tables.
__device__ __forceinline__ int slot_of_new(const CompactedLayer &p, int head, int index) {
    // The last 64 positions before which there are no more than so many.
    const int *ranks = p.kept.ranks + (int64_t)head * p.max_pages;
    int low = p.old.counts[0] / PAGE, high = p.kept.counts[0] / PAGE;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (ranks[middle] <= index ? low : high) = middle;
    }
    const uint64_t mask = *(const uint64_t *)(p.old.masks + ((int64_t)head * p.old_max_pages + low) * (PAGE / OCTET));
    int left = index - ranks[low], slot = 0;
    for (; slot < PAGE - 1; ++slot)
        if ((mask >> slot & 1) && left-- == 0) break;
    return p.old_pages[(int64_t)head * p.old_max_pages + low] * PAGE + slot;
}

// A page, row by row.
__device__ __forceinline__ void compact(const CompactedLayer &p, int tensor) {
    __shared__ int from[PAGE];
    const int head = blockIdx.y, words = p.words[tensor], slot = threadIdx.x;
    const bool is_kept = blockIdx.x < p.kept_pages;
    if (blockIdx.x >= p.kept_pages + p.recent_pages) return;
    const bool in_place = p.from[0] == p.to[0];
    const int count = p.kept.counts[1 + head], had = p.old.counts[1 + head];
    const int first = is_kept ? (in_place ? had / PAGE : 0) : p.kept.counts[0] / PAGE - p.kept_pages, of_head = first + blockIdx.x;
    if (is_kept && of_head * PAGE >= count) return;
    if (slot < PAGE) {
        const int index = of_head * PAGE + slot;
        if (!is_kept) from[slot] = p.old_pages[(int64_t)head * p.old_max_pages + of_head] * PAGE + slot;
        else if (index < had) from[slot] = p.old.pages[(int64_t)head * p.old.max_pages + of_head] * PAGE + slot;
        else from[slot] = index < count ? slot_of_new(p, head, index) : -1;
    }
    __syncthreads();
    const auto is_left = [&](int row) { return in_place && (of_head * PAGE + row < had || of_head * PAGE + row >= count); };
    const int page = is_kept ? p.kept.pages[(int64_t)head * p.kept.max_pages + of_head] : p.pages[(int64_t)head * p.max_pages + of_head];
    uint32_t *to = p.to[tensor] + (int64_t)page * PAGE * words;
    for (int i = threadIdx.x; i < PAGE * words; i += blockDim.x) {
        if (is_left(i / words)) continue;
        const int row = from[i / words];
        to[i] = row < 0 ? 0 : p.from[tensor][(int64_t)row * words + i % words];
    }
}

// The smallest number of T that is not below x.
template <typename T> __device__ __forceinline__ T round_up(float x) {
    T near;
    narrow(near, x);
    if (wide(near) >= x || !isfinite(x)) return near;
    uint16_t bits = *reinterpret_cast<uint16_t *>(&near);
    bits = bits >> 15 ? bits - 1 : bits + 1;
    return *reinterpret_cast<T *>(&bits);
}

// Dimension d of a block's summary, over the tokens that `masks` keeps. Whole warps.
template <typename S>
__device__ __forceinline__ void summarise(const void *k, const void *k_scales, const int *pages, const uint8_t *masks, int block, int block_size, int d, int head_dim,
                                          int kind, void *summaries, void *scales, int64_t row) {
    using T = typename ComputedAs<S>::T;
    float sum = 0.f, high = -INFINITY, low = INFINITY;
    int count = 0;
    auto is_kept = [&](int slot) { return !masks || masks[slot / OCTET] >> slot % OCTET & 1; };
    auto key = [&](int slot) {
        const float x = number_at<S>(k, k_scales, (int64_t)pages[slot / PAGE] * PAGE + slot % PAGE, head_dim, d);
        return std::is_same_v<S, Bytes> ? hadamard(x) : x;
    };
    for (int slot = block * block_size; slot < (block + 1) * block_size; ++slot) {
        if (!is_kept(slot)) continue;
        const float x = key(slot);
        sum += x, high = fmaxf(high, x), low = fminf(low, x), ++count;
    }
    if (count == 0) return;
    const int width = kind ? 2 * head_dim : head_dim;
    if (kind == 1) {
        T *to = (T *)summaries + row * width;
        to[d] = round_up<T>(high);
        const T least = round_up<T>(-low);
        narrow(to[head_dim + d], -wide(least));
        return;
    }
    auto store = [&](int at, float x) {
        if (scales) store_at<Bytes>(summaries, scales, row, width, at, x);
        else store_at<T>(summaries, nullptr, row, width, at, x);
    };
    const float mean = sum / count;
    store(d, mean);
    if (kind == 0) return;
    float squares = 0.f;
    for (int slot = block * block_size; slot < (block + 1) * block_size; ++slot) {
        if (!is_kept(slot)) continue;
        const float x = key(slot) - mean;
        squares += x * x;
    }
    store(head_dim + d, sqrtf(squares / count));
}

// What `masks` has of a head.
__device__ __forceinline__ const uint8_t *masks_of(const uint8_t *masks, int head, int max_pages) {
    return masks ? masks + (int64_t)head * max_pages * (PAGE / OCTET) : nullptr;
}

// Where the summary of a block lies.
__device__ __forceinline__ int64_t summary_row(int block, int head, int kv_heads) { return ((int64_t)(block / PAGE) * kv_heads + head) * PAGE + block % PAGE; }

// grid (most blocks, kv_heads), head_dim threads.
template <typename S> __device__ void summaries(const SummaryParams &p) {
    if (blockIdx.x >= p.blocks) return;
    const int head = blockIdx.y, block = p.first + blockIdx.x;
    summarise<S>(p.k, p.k_scales, p.pages + (int64_t)head * p.max_pages, masks_of(p.masks, head, p.max_pages), block, p.block_size, threadIdx.x, p.head_dim, p.kind,
                 p.summaries, p.scales, summary_row(block, head, gridDim.y));
}

// grid (rows, q_heads), head_dim threads.
template <typename T> __device__ void expand(const ExpandParams &p) {
    const int d = threadIdx.x, first = max(p.start, (p.start / p.tile + p.first_row + (int)blockIdx.x) * p.tile);
    const int end = min(p.start + p.tokens, (first / p.tile + 1) * p.tile);
    float a = 0.f, b = 0.f;
    for (int t = first; t < end; ++t) {
        const float x = wide(((const T *)p.q)[((int64_t)(t - p.start) * p.q_heads + blockIdx.y) * p.head_dim + d]);
        a += p.kind == 1 ? fmaxf(x, 0.f) : x;
        b += p.kind == 1 ? fminf(x, 0.f) : fabsf(x);
    }
    T *to = (T *)p.out + ((int64_t)blockIdx.x * p.q_heads + blockIdx.y) * 2 * p.head_dim;
    narrow(to[d], a / (end - first));
    narrow(to[p.head_dim + d], b / (end - first));
}

// What a mask says of an octet's tokens before a step's first one. Of most octets it need not be read.
__device__ __forceinline__ uint32_t known_before(int start, int octet, const uint8_t *mask) {
    const int before = start - octet * OCTET;
    return before > 0 ? *mask & ~(0xffu << min(OCTET, before)) : 0;
}

// An octet for each thread. grid (octets / 256, kv_heads)
__device__ __forceinline__ void note_verdicts(const VerdictParams &p) {
    const int octet = p.start / OCTET + blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y, end = p.start + p.tokens;
    if (octet * OCTET >= end) return;
    uint8_t *mask = p.masks + (int64_t)head * p.max_pages * (PAGE / OCTET) + octet;
    uint32_t bits = known_before(p.start, octet, mask);
    for (int t = max(p.start, octet * OCTET); t < min(end, (octet + 1) * OCTET); ++t) {
        const bool keeps = t < p.sinks || p.scores[(int64_t)(t - p.start) * p.kv_heads + head] >= p.tau;
        bits |= (uint32_t)keeps << t % OCTET;
    }
    *mask = bits;
}

// An octet for each thread.
__device__ __forceinline__ void tell(const ToldLayer &layer, int first, int octets) {
    const int octet = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y;
    if (octet < octets && head < layer.kv_heads) layer.told[head * octets + octet] = layer.masks[(int64_t)head * layer.max_pages * (PAGE / OCTET) + first + octet];
}

// Tokens of a thread block, and of a tile of rows; columns that a warp takes at a time, one warp after the other.
constexpr int GATE_TOKENS = 16, GATE_ROWS = 8, GATE_COLUMNS = 32, GATE_WARPS = 16;

// Eight numbers as bf16, and what is lost by that, again as bf16.
struct Halves {
    uint32_t high[4], low[4];
};

__device__ __forceinline__ Halves halves(float4 a, float4 b) {
    const float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    Halves out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out.high[i] = pack<__nv_bfloat16>(x[2 * i], x[2 * i + 1]);
        const float2 near = unpack<__nv_bfloat16>(out.high[i]);
        out.low[i] = pack<__nv_bfloat16>(x[2 * i] - near.x, x[2 * i + 1] - near.y);
    }
    return out;
}

// Eight neighbours of a row of which so many are left, T: f32, whole fours, or bf16, whole eights.
template <typename T> __device__ __forceinline__ Halves eight(const void *x, int64_t at, int left) {
    Halves out{};
    if (left <= 0) return out;
    if constexpr (std::is_same_v<T, float>) {
        const float4 *from = (const float4 *)((const float *)x + at);
        return halves(from[0], left > 4 ? from[1] : make_float4(0.f, 0.f, 0.f, 0.f));
    } else *(uint4 *)out.high = *(const uint4 *)((const T *)x + at);
    return out;
}

// Called, not inlined for each number: code comes from afar when it is first executed, and this is long.
__device__ __noinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

// GELU of so many numbers of a layer, `at(row)`, by a warp; those beyond its rows are 0.
template <int N, typename At> __device__ __forceinline__ void activate(float (&x)[N], int rows, At at) {
    // All are under way before one is waited for.
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = threadIdx.x % 32 + 32 * i < rows ? at(threadIdx.x % 32 + 32 * i) : 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (32 * i < rows) x[i] = gelu(x[i]);
}

// TILES tiles of rows with GATE_TOKENS tokens, from a multiple of them on. Products are of bf16 and of what is lost by that: 16 bits of
// both, in one order for any number of tokens.
template <typename T, int TILES> __device__ __forceinline__ void gate(const GateParams &p) {
    __shared__ float sums[GATE_WARPS][GATE_TOKENS][TILES * GATE_ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_row = blockIdx.y * TILES * GATE_ROWS;
    const int first_token = (p.start / GATE_TOKENS + blockIdx.x) * GATE_TOKENS - p.start; // in the step; before it there is none
    const auto is_token = [&](int token) { return token >= 0 && token < p.tokens; };
    float c[TILES][4] = {};
#pragma unroll 4
    for (int at = warp * GATE_COLUMNS + lane % 4 * 8; at - lane % 4 * 8 < p.columns; at += GATE_WARPS * GATE_COLUMNS) {
        // A lane has two tokens and a row of each tile, of which eight columns: of every product the first half is of columns 0, 1 and 2, 3
        // of all lanes, the second of the others.
        const int left = p.columns - at;
        Halves x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = first_token + lane / 4 + 8 * i;
            x[i] = eight<T>(p.x, (int64_t)token * p.columns + at, is_token(token) ? left : 0);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const int row = first_row + tile * GATE_ROWS + lane / 4;
            const Halves w = eight<float>(p.weight, (int64_t)row * p.columns + at, row < p.rows ? left : 0);
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const uint32_t high[4] = {x[0].high[i], x[1].high[i], x[0].high[i + 1], x[1].high[i + 1]};
                multiply<__nv_bfloat16>(c[tile], high, w.high[i], w.high[i + 1]);
                multiply<__nv_bfloat16>(c[tile], high, w.low[i], w.low[i + 1]);
                if constexpr (std::is_same_v<T, float>) {
                    const uint32_t low[4] = {x[0].low[i], x[1].low[i], x[0].low[i + 1], x[1].low[i + 1]};
                    multiply<__nv_bfloat16>(c[tile], low, w.high[i], w.high[i + 1]);
                }
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][lane / 4 + i / 2 * 8][tile * GATE_ROWS + lane % 4 * 2 + i % 2] = c[tile][i];
    __syncthreads();
    __shared__ uint32_t kept[GATE_TOKENS * GATE_ROWS / 32];
#pragma unroll
    for (int i = threadIdx.x; i < GATE_TOKENS * TILES * GATE_ROWS; i += GATE_WARPS * 32) {
        const int token = first_token + i / (TILES * GATE_ROWS), own = i % (TILES * GATE_ROWS), row = first_row + own;
        float sum = row < p.rows ? p.bias[row] : 0.f;
#pragma unroll
        for (int of = 0; of < GATE_WARPS; ++of) sum += sums[of][i / (TILES * GATE_ROWS)][own];
        const bool is_there = is_token(token) && row < p.rows;
        if (p.out && is_there) p.out[(int64_t)token * p.rows + row] = p.is_hidden ? gelu(sum) : sum;
        if (TILES == 1) {
            const uint32_t bits = __ballot_sync(~0u, is_there && (p.start + token < p.sinks || sum >= p.tau));
            if (lane == 0) kept[warp] = bits;
        }
    }
    if (TILES > 1 || !p.masks) return;
    __syncthreads();
    // An octet of a row for each thread: a warp has had four tokens.
    constexpr int OCTETS = GATE_TOKENS / OCTET;
    const int row = first_row + threadIdx.x % GATE_ROWS, of_block = threadIdx.x / GATE_ROWS, octet = (p.start + first_token) / OCTET + of_block;
    const int first = p.start / OCTET, end = (p.start + p.tokens + OCTET - 1) / OCTET;
    if (of_block >= OCTETS || row >= p.rows || octet < first || octet >= end) return;
    uint8_t *mask = p.masks + (int64_t)row * p.max_pages * (PAGE / OCTET) + octet;
    uint32_t bits = known_before(p.start, octet, mask);
#pragma unroll
    for (int i = 0; i < OCTET; ++i) bits |= (kept[of_block * 2 + i / 4] >> (i % 4 * GATE_ROWS + threadIdx.x % GATE_ROWS) & 1) << i;
    *mask = bits;
}

// Notes what is kept of an octet of positions, one bit each.
__device__ __forceinline__ void note_octet(const ProjectedParams &p, int head, int octet, uint32_t bits) {
    uint8_t *mask = p.masks + (int64_t)head * p.max_pages * (PAGE / OCTET) + octet;
    *mask = bits | known_before(p.start, octet, mask);
}

// By a gate of one layer: a token for each of 256 threads.
__device__ __forceinline__ void decide_at_once(const ProjectedParams &p, int index) {
    const int t = p.start / OCTET * OCTET + index * 256 + threadIdx.x, token = t - p.start, lane = threadIdx.x % 32;
    const bool is_there = token >= 0 && token < p.tokens;
    const float *sums = p.sums + (int64_t)(is_there ? token : 0) * p.apart;
#pragma unroll 4
    for (int head = 0; head < p.kv_heads; ++head) {
        const float score = sums[head] + p.bias[head];
        const uint32_t bits = __ballot_sync(~0u, is_there && (t < p.sinks || score >= p.tau));
        if (lane % OCTET == 0 && t < p.start + p.tokens) note_octet(p, head, t / OCTET, bits >> lane & 0xff);
    }
}

// By a gate with a hidden layer: an octet of positions by a thread block, a warp for each token.
__device__ __forceinline__ void decide_by_warps(const ProjectedParams &p, int index) {
    constexpr int HELD = 4, HEADS = 32; // numbers of a lane, and heads that are decided on at a time
    __shared__ uint32_t kept[OCTET];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, octet = p.start / OCTET + index, t = octet * OCTET + warp, token = t - p.start;
    const bool is_there = token >= 0 && token < p.tokens;
    const float *sums = p.sums + (int64_t)(is_there ? token : 0) * p.apart;
    const auto first = [&](int row) { return sums[row] + p.bias[row]; };
    float x[HELD] = {};
    activate(x, p.rows, first);
    for (int from = 0; from < p.kv_heads; from += HEADS) {
        const int heads = min(HEADS, p.kv_heads - from);
        float score = 0.f; // of the lane's head
#pragma unroll 2
        for (int head = 0; head < heads; ++head) {
            const float *weight = p.weight + (from + head) * p.rows;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < HELD; ++i) sum += lane + 32 * i < p.rows ? x[i] * weight[lane + 32 * i] : 0.f;
            for (int row = lane + 32 * HELD; row < p.rows; row += 32) sum += gelu(first(row)) * weight[row];
            sum = sum_of_warp(sum);
            if (lane == head) score = sum + p.last_bias[from + head];
        }
        const uint32_t bits = __ballot_sync(~0u, is_there && (t < p.sinks || score >= p.tau));
        if (lane == 0) kept[warp] = bits;
        __syncthreads();
        if (threadIdx.x < heads) {
            uint32_t of_octet = 0;
#pragma unroll
            for (int i = 0; i < OCTET; ++i) of_octet |= (kept[i] >> threadIdx.x & 1) << i;
            note_octet(p, from + threadIdx.x, octet, of_octet);
        }
        __syncthreads();
    }
}

} // namespace cache

namespace cache {

// What is a layer's of the gates of all.
__device__ __forceinline__ ProjectedParams of_layer(const DecideParams &p, const WaitingLayer &at) {
    ProjectedParams own = p.first;
    own.sums += at.layer * p.sums_apart, own.bias += at.layer * p.bias_apart;
    own.weight += at.layer * p.weight_apart, own.last_bias += at.layer * p.last_bias_apart;
    own.masks = at.masks, own.max_pages = at.max_pages;
    return own;
}

} // namespace cache

extern "C" __global__ void __launch_bounds__(256) decide_layers_1(const __grid_constant__ DecideParams p) {
    follow();
    cache::decide_at_once(cache::of_layer(p, p.layers[blockIdx.y]), blockIdx.x);
}
extern "C" __global__ void __launch_bounds__(256) decide_layers_2(const __grid_constant__ DecideParams p) {
    follow();
    cache::decide_by_warps(cache::of_layer(p, p.layers[blockIdx.y]), blockIdx.x);
}

// grid (tiles of tokens that the step has a part of, ceil(rows / (8 TILES)))
#define GATE(NAME, T, TILES)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(cache::GATE_WARPS * 32) gate_##NAME##_##TILES(const GateParams p) {                       \
        follow();                                                                                                                          \
        cache::gate<T, TILES>(p);                                                                                                          \
    }
GATE(f32, float, 1)
GATE(f32, float, 4)
GATE(bf16, __nv_bfloat16, 1)
GATE(bf16, __nv_bfloat16, 4)
#undef GATE

namespace cache {

// 16 numbers for each thread.
__device__ __forceinline__ void widen(const WidenParams &p) {
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 16;
    if (at >= p.count) return;
    const uint4 bytes = *(const uint4 *)((const int8_t *)p.values + at);
    const half scale = ((const half *)p.scales)[at / GROUP];
    const uint2 wide[4] = {widened<half>(bytes.x, scale), widened<half>(bytes.y, scale), widened<half>(bytes.z, scale), widened<half>(bytes.w, scale)};
    uint4 *to = (uint4 *)((half *)p.out + at);
    to[0] = make_uint4(wide[0].x, wide[0].y, wide[1].x, wide[1].y);
    to[1] = make_uint4(wide[2].x, wide[2].y, wide[3].x, wide[3].y);
}

// A number for each thread, whole warps.
__device__ __forceinline__ void transform(const TransformParams &p) {
    const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < p.count) ((half *)p.out)[at] = __float2half_rn(hadamard(wide(((const half *)p.x)[at])));
}

} // namespace cache

extern "C" __global__ void __launch_bounds__(256) transform_f16(const TransformParams p) { cache::transform(p); }
extern "C" __global__ void __launch_bounds__(256) tell_verdicts(const __grid_constant__ TellParams p) { cache::tell(p.layers[blockIdx.z], p.first, p.octets); }
extern "C" __global__ void __launch_bounds__(256) note_verdicts(const VerdictParams p) { cache::note_verdicts(p); }
extern "C" __global__ void __launch_bounds__(256) widen_bytes(const WidenParams p) { cache::widen(p); }

// The gate takes longer, and begins.
#define STORE_GATED(NAME, S, GATE, T)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(cache::GATE_WARPS * 32) store_step_##NAME##_gate_##GATE(const StoreGatedParams p) {       \
        follow();                                                                                                                          \
        if ((int)blockIdx.x < p.gates) cache::gate<T, 1>(p.gate);                                                                          \
        else cache::store<S>(p.store, blockIdx.x - p.gates, gridDim.x - p.gates, 0);                                                       \
    }
// As many at once as there would be of a kernel that only stores: what a gate of two layers lacks registers for is not much. Those that decide store
// what is left then.
#define STORE_PROJECTED(NAME, S, LAYERS, DECIDE)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256, std::is_same_v<S, Bytes> ? 6 : 8)                                                     \
        store_step_##NAME##_projected_##LAYERS(const StoreProjectedParams p) {                                                             \
        follow();                                                                                                                          \
        if ((int)blockIdx.x < p.gates) cache::DECIDE(p.gate, blockIdx.x);                                                                  \
        cache::store<S>(p.store, blockIdx.x, gridDim.x, p.gates);                                                                           \
    }
#define ROWS(NAME, S)                                                                                                                      \
    extern "C" __global__ void store_step_##NAME(const StoreParams p) {                                                                    \
        follow();                                                                                                                          \
        cache::store<S>(p, blockIdx.x, gridDim.x, 0);                                                                                      \
    }                                                                                                                                      \
    STORE_GATED(NAME, S, f32, float)                                                                                                       \
    STORE_GATED(NAME, S, bf16, __nv_bfloat16)                                                                                              \
    STORE_PROJECTED(NAME, S, 1, decide_at_once)                                                                                            \
    STORE_PROJECTED(NAME, S, 2, decide_by_warps)                                                                                           \
    extern "C" __global__ void scatter_rows_##NAME(const ScatterParams p) { cache::scatter<S>(p); }                                         \
    extern "C" __global__ void summarise_blocks_##NAME(const __grid_constant__ SummariesParams p) { cache::summaries<S>(p.layers[blockIdx.z]); }
ROWS(f16, half)
ROWS(bf16, __nv_bfloat16)
ROWS(q8_0, Bytes)
#undef ROWS
#undef STORE_GATED
#undef STORE_PROJECTED
#define EXPAND(NAME, T) extern "C" __global__ void expand_queries_##NAME(const ExpandParams p) { cache::expand<T>(p); }
EXPAND(f16, half)
EXPAND(bf16, __nv_bfloat16)
#undef EXPAND
extern "C" __global__ void __launch_bounds__(256) compact_pages(const __grid_constant__ CompactParams p) {
    cache::compact(p.layers[blockIdx.z / p.tensors], blockIdx.z % p.tensors);
}
