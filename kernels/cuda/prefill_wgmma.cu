// Attention of many queries on Hopper: what prefill.cu does, with products of whole warpgroups (wgmma), which read both matrices
// from shared memory and run while the softmax of other keys is computed (FlashAttention-3, arXiv:2407.08608).
//
// One warpgroup copies keys and values, two compute: each 64 rows, or, of tiles of at most 64 rows, half of the keys (HALVES). Their
// products take turns, so that the tensor cores work for one while the other has its softmax.
//
// Device code only, f32 sums, results that do not depend on timing; see params.h.
//
// D: head_dim, 64 or 128.

#include "common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // else there are none of these kernels

namespace prefill_wgmma {

constexpr int ROWS = 128, KEYS = 128, OCTETS = KEYS / OCTET, GROUP = 128, THREADS = 3 * GROUP, STAGES = 3;

// Steps whose octets are known at a time, and those that are looked up together.
constexpr int KNOWN = 8, TOGETHER = KNOWN / 2;

// Bytes between the columns 0..63 of a tile and the next 64: a row is 128 bytes, 16 at a time swizzled by the row.
constexpr int PANEL = KEYS * 128;

template <int D> constexpr int TILE_BYTES = PANEL * D / 64;

// How a matrix lies in shared memory, for wgmma: groups of eight rows of 128 bytes, swizzled, each after the other.
__device__ __forceinline__ uint64_t describe(uint32_t address) {
    return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(PANEL >> 4) << 16 | (address & 0x3ffff) >> 4;
}

__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

// Keeps the compiler from moving what is read or written across this.
template <int N> __device__ __forceinline__ void pin(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
}

#define FOUR(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define EIGHT_BLOCKS FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7)
#define SIXTEEN_BLOCKS EIGHT_BLOCKS, FOUR(8), FOUR(9), FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)
#define REGISTERS_32 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define REGISTERS_64 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

// scores: c[64 x 8N] (+)= a[64 x 16] b[8N x 16]', both in shared memory. weighted: c[64 x 8N] (+)= a[64 x 16] b[16 x 8N], a in registers.
template <typename T> struct Product;
#define PRODUCT(T, NAME)                                                                                                                   \
    template <> struct Product<T> {                                                                                                        \
        static __device__ __forceinline__ void scores(float (&c)[8][4], uint64_t a, uint64_t b, int adds) {                                \
            asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " REGISTERS_32 \
                         ", %32, %33, p, 1, 1, 0, 0;}" : EIGHT_BLOCKS : "l"(a), "l"(b), "r"(adds));                                        \
        }                                                                                                                                  \
        static __device__ __forceinline__ void scores(float (&c)[16][4], uint64_t a, uint64_t b, int adds) {                               \
            asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " REGISTERS_64 \
                         ", %64, %65, p, 1, 1, 0, 0;}" : SIXTEEN_BLOCKS : "l"(a), "l"(b), "r"(adds));                                      \
        }                                                                                                                                  \
        static __device__ __forceinline__ void weighted(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, int adds) {                  \
            asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " REGISTERS_32 \
                         ", {%32,%33,%34,%35}, %36, p, 1, 1, 1;}" : EIGHT_BLOCKS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds)); \
        }                                                                                                                                  \
        static __device__ __forceinline__ void weighted(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, int adds) {                 \
            asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " REGISTERS_64 \
                         ", {%64,%65,%66,%67}, %68, p, 1, 1, 1;}" : SIXTEEN_BLOCKS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds)); \
        }                                                                                                                                  \
    };
PRODUCT(half, "f16")
PRODUCT(__nv_bfloat16, "bf16")
#undef PRODUCT
#undef REGISTERS_64
#undef REGISTERS_32
#undef SIXTEEN_BLOCKS
#undef EIGHT_BLOCKS
#undef FOUR

// A barrier of threads that copy and threads that compute, in shared memory: it has a phase for every `count` arrivals.
__device__ __forceinline__ void prepare(uint64_t *barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// The same as soon as all is there that this thread copied so far.
__device__ __forceinline__ void arrive_with_copies(uint64_t *barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits for the end of the phase of this parity.
__device__ __forceinline__ void await(uint64_t *barrier, uint32_t parity) {
    asm volatile("{.reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra AGAIN;}" ::"r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}

// Barriers of the hardware, by number: of `count` threads that wait or arrive.
__device__ __forceinline__ void meet(int number, int count) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(count) : "memory"); }
__device__ __forceinline__ void pass(int number, int count) { asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(count) : "memory"); }

// What is read: all that queries see, PLAIN where nothing is hidden from them but what comes later, KEPT where a token router hides tokens and what is
// kept of those that no query sees by its window is gathered; or what is LISTED. Each has a kernel of its own, with less code than one for all:
// code comes from afar when it is first executed, some 5 cycles for each instruction.
enum Kind { PLAIN, KEPT, LISTED };

template <Kind KIND> struct Shared {
    uint64_t keys_there[STAGES], values_there[STAGES], keys_read[STAGES], values_read[STAGES];
    Octet listed[KNOWN][OCTETS];
    uint32_t partly[KNOWN]; // octets of a step that not every query sees whole, from bit 0 on
};
template <> struct Shared<KEPT> : Shared<PLAIN> {
    int steps; // in all, once the first keys are there
};

// What a thread block computes: a tile of queries, and what it reads.
template <Kind KIND> struct Tile {
    int first, queries, eldest, newest; // of the step; and positions
    std::conditional_t<KIND == KEPT, PromptReads, Reads> reads;
    int steps, local_window;

    __device__ __forceinline__ Tile(const PrefillParams &p, int tile, int head) : Tile(p, TileQueries(p, tile), tile, head) {}

    __device__ __forceinline__ Tile(const PrefillParams &p, TileQueries of, int tile, int head)
        : first(of.first), queries(of.count), eldest(of.eldest(p)), newest(of.newest(p)),
          reads(p, head, (p.lists ? p.lists[tile] : tile) * p.kv_heads + head, of),
          steps((reads.octets() + OCTETS - 1) / OCTETS), local_window(p.windows ? p.windows[p.lists ? p.lists[tile] : tile] : p.local_window) {}

    // An octet as the queries see it: what all see by the window is as good as kept, and what none sees by it is kept or not.
    __device__ __forceinline__ Octet simplified(Octet octet, int sliding_window) const {
        if (KIND == PLAIN || octet.position < 0 || !local_window) return octet;
        if (octet.position > newest - local_window) octet.row |= 0xff;
        else if (!sliding_window && octet.position + OCTET - 1 <= eldest - local_window) octet.position = -1;
        return octet;
    }

    // Whether some query does not see an octet whole.
    __device__ __forceinline__ bool is_partial(Octet octet, int sliding_window) const {
        const bool by_position = octet.position + OCTET - 1 > eldest || sliding_window && octet.position <= newest - sliding_window;
        return (octet.row & 0xff) != 0xff || octet.position >= 0 && by_position;
    }
};

// Where queries, then all stages of keys, then of values lie.
template <int D> struct Places {
    uint32_t queries;
    __device__ __forceinline__ uint32_t keys(int step) const { return queries + (1 + step % STAGES) * TILE_BYTES<D>; }
    __device__ __forceinline__ uint32_t values(int step) const { return queries + (1 + STAGES + step % STAGES) * TILE_BYTES<D>; }
};

// Where 16 bytes of a row of a tile are: swizzled by the row.
__device__ __forceinline__ uint32_t place(uint32_t tile, int row, int chunk) { return tile + chunk / 8 * PANEL + row * 128 + ((chunk ^ row) % 8) * 16; }

// What this thread copied, or waited for, is there for wgmma, too.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies keys and values: the work of one warpgroup, which all others wait for if it takes long. So what row a thread brings is found once a step,
// by one thread for all that copy it, and nobody waits here for what comes.
template <typename T, int D, Kind KIND>
__device__ __forceinline__ void fetch(const PrefillParams &p, Tile<KIND> tile, Places<D> places, Shared<KIND> &shared) {
    constexpr int CHUNKS = D / 8, ROWS_AT_ONCE = 32 / CHUNKS; // chunks of 16 bytes; rows of a warp
    const int thread = threadIdx.x % GROUP, lane = thread % 32, chunk = thread % CHUNKS;
    // Octets of some steps are looked up together, one for each thread, well before they are copied: whole warps.
    auto look_up = [&](int step) {
        const int index = step * OCTETS + thread;
        return KIND == KEPT ? tile.reads.octet(index) : tile.reads.octet_by_branches(index);
    };
    auto note = [&](int step, Octet octet) {
        const int listed = (step + thread / OCTETS) % KNOWN, place = thread % OCTETS;
        octet = tile.simplified(octet, p.sliding_window);
        shared.listed[listed][place] = octet;
        const uint32_t partly = __ballot_sync(~0u, tile.is_partial(octet, p.sliding_window)) >> threadIdx.x % 32 & (1 << OCTETS) - 1;
        if (place == 0) shared.partly[listed] = partly;
    };
    // The slot of the thread's row of a step. What no query sees may be anything, and no number hides it: in its place comes what all see, the eldest's.
    const int seen_by_all = tile.reads.pages[tile.eldest / PAGE] * PAGE + tile.eldest % PAGE;
    auto slot_of = [&](int step, int gathered) {
        const Octet octet = shared.listed[step % KNOWN][thread / OCTET];
        const int own = thread % OCTET;
        if (!(octet.position < 0 ? octet.row >> own & 1 : octet.position + own <= tile.newest)) return seen_by_all;
        if constexpr (KIND == KEPT) {
            if (octet.position == GATHERED) return gathered;
        }
        return (octet.row >> 8) * OCTET + own;
    };
    // A warp copies the rows of its threads: keys and values of the same slots.
    constexpr int COPIES = 32 / ROWS_AT_ONCE;
    uint32_t slots[COPIES];
    const uint32_t own_place = place(0, thread - lane + lane / CHUNKS, chunk);
    auto copy = [&](const char *from, uint32_t tile) {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int row = i * ROWS_AT_ONCE;
            copy_async((tile + own_place ^ row % 8 * 16) + row * 128, from + (uint64_t)slots[i] * (D * sizeof(T)));
        }
    };
    // Each in registers of its own: then one instruction makes an address.
    const char *keys = (const char *)p.k + chunk * 16, *values = (const char *)p.v + chunk * 16;
    asm volatile("" : "+l"(keys), "+l"(values));
    const auto meet_all = [] { meet(3, GROUP); };
    Gathering gathering;
    // How much is gathered is learned while the first keys and values come, but where it is among what is looked up first.
    auto learn = [&]() {
        if constexpr (KIND == KEPT) {
            if (tile.reads.hidden) {
                tile.reads.count_gathered();
                gathering.turn(tile.reads);
                tile.steps = (tile.reads.octets() + OCTETS - 1) / OCTETS;
            }
            if (thread == 0) shared.steps = tile.steps;
        }
    };
    wait_for_last();
    const bool learns_first = tile.steps <= KNOWN;
    if (learns_first) learn();
    note(0, look_up(0));
    static_assert(KNOWN * OCTETS == GROUP);
    const bool leads = thread < TOGETHER * OCTETS;
    Octet ahead{};
    for (int step = 0; step < tile.steps; ++step) {
        const int stage = step % STAGES;
        const uint32_t before = (step / STAGES + 1) % 2; // parity of the phase in which this stage was read
        if (step % TOGETHER == 0) meet_all(); // the octets of this step and the next ones are noted
        int gathered = 0;
        if constexpr (KIND == KEPT) {
            const int from = tile.reads.gathered_from(step * OCTETS);
            if (tile.reads.gathered && from > -KEYS) gathered = gathering.slot(tile.reads, min(max(from + thread, 0), tile.reads.gathered - 1));
        }
        const int slot = slot_of(step, gathered);
#pragma unroll
        for (int i = 0; i < COPIES; ++i) slots[i] = __shfl_sync(~0u, slot, i * ROWS_AT_ONCE + lane / CHUNKS);
        if (step >= STAGES) await(shared.keys_read + stage, before);
        copy(keys, places.keys(step));
        if (step == 0 && !learns_first) learn();
        arrive_with_copies(shared.keys_there + stage);
        if (thread == 0) arrive(shared.keys_there + stage); // with what is noted
        if (step >= STAGES) await(shared.values_read + stage, before);
        copy(values, places.values(step));
        arrive_with_copies(shared.values_there + stage);
        if (leads && step % TOGETHER == 0 && step > 0) ahead = look_up(step + TOGETHER);
        // Where those of steps are that were read: of this stage the values were, three steps ago.
        static_assert(TOGETHER > STAGES);
        if (leads && step % TOGETHER == TOGETHER - 1 && step > TOGETHER) note(step + 1, ahead);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Rows of scores and of sums: a thread has those of lane / 4 of its warp's 16, and of 8 more.
template <typename T, int D, bool HALVES, Kind KIND>
__device__ __forceinline__ void compute(const PrefillParams &p, const Tile<KIND> &tile, Places<D> places, Shared<KIND> &shared, float *handed, int head) {
    constexpr int OWN = HALVES ? KEYS / 2 : KEYS; // keys of a step that a warpgroup takes
    const int group = threadIdx.x / GROUP, warp = threadIdx.x / 32, lane = threadIdx.x % 32, G = p.group_size;
    const int first_row = (HALVES ? warp % 4 : warp) * 16 + lane / 4, first_octet = HALVES ? group * (OWN / OCTET) : 0;
    // The query of a row, exactly for so few rows, and by less code than a division.
    const float inverse = __fdividef(1.f, G);
    const auto query_of = [&](int row) { return int((row + 0.5f) * inverse); };
    // Where a row is among those of the step, [tokens, q_heads].
    const auto row_of = [&](int query, int row) { return int64_t(((tile.first + query) * p.kv_heads + head - query) * G + row); };
    int position[2]; // of the row's query; of rows that are none, before all keys
#pragma unroll
    for (int r = 0; r < 2; ++r) position[r] = first_row + 8 * r < tile.queries * G ? tile.eldest + query_of(first_row + 8 * r) : -1;
    float sums[D / 8][4] = {}, c[OWN / 8][4];
    float maximum[2] = {-INFINITY, -INFINITY}, weight[2] = {0.f, 0.f}, factor[2];
    const float scale = p.scale * LOG2_E;
    const uint32_t own_queries = places.queries + (HALVES ? 0 : group * 64 * 128), own_keys = HALVES ? group * OWN * 128 : 0;

    auto score = [&](int step) {
        const uint32_t keys = places.keys(step) + own_keys;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            const uint32_t column = i / 4 * PANEL + i % 4 * 32;
            Product<T>::scores(c, describe(own_queries + column), describe(keys + column), i > 0);
        }
        commit();
    };
    // Takes out what this thread's rows do not see. The four threads of a row look at a quarter of its octets each.
    auto hide = [&](int step) {
        constexpr int SHARE = OWN / OCTET / 4;
        uint32_t seen[2] = {};
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const Octet octet = shared.listed[step % KNOWN][first_octet + lane % 4 * SHARE + i];
#pragma unroll
            for (int r = 0; r < 2; ++r) seen[r] |= visible(octet, position[r], p.sliding_window, tile.local_window) << OCTET * i;
        }
#pragma unroll
        for (int n = 0; n < OWN / OCTET; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t bits = __shfl_sync(~0u, seen[r], n / SHARE, 4) >> 2 * (lane % 4) >> OCTET * (n % SHARE);
                if (!(bits & 1)) c[n][2 * r] = -INFINITY;
                if (!(bits & 2)) c[n][2 * r + 1] = -INFINITY;
            }
        }
    };
    // Scores to weights, with the maximum and the weight of each row so far.
    auto soften = [&](int step, bool is_partial) {
        // Of most steps all is seen: one branch leads around what is long, and by octets would not stay in the cache of instructions.
        if (__builtin_expect(is_partial, 0)) hide(step);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float best = -INFINITY;
#pragma unroll
            for (int n = 0; n < OWN / 8; ++n) best = fmaxf(best, fmaxf(c[n][2 * r], c[n][2 * r + 1]));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
            best = fmaxf(maximum[r], fmaxf(best, __shfl_xor_sync(~0u, best, 2)) * scale);
            const float zero = best == -INFINITY ? 0.f : best; // a row that sees nothing yet
            factor[r] = exp2_approx(maximum[r] - zero);
            maximum[r] = best;
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < OWN / 8; ++n) {
                c[n][2 * r] = exp2_approx(fmaf(c[n][2 * r], scale, -zero));
                c[n][2 * r + 1] = exp2_approx(fmaf(c[n][2 * r + 1], scale, -zero));
                sum += c[n][2 * r] + c[n][2 * r + 1];
            }
            weight[r] = weight[r] * factor[r] + sum;
        }
    };
    uint32_t weights[OWN / 16][4];
    auto round = [&]() {
#pragma unroll
        for (int n = 0; n < OWN / 16; ++n) {
            weights[n][0] = pack<T>(c[2 * n][0], c[2 * n][1]), weights[n][1] = pack<T>(c[2 * n][2], c[2 * n][3]);
            weights[n][2] = pack<T>(c[2 * n + 1][0], c[2 * n + 1][1]), weights[n][3] = pack<T>(c[2 * n + 1][2], c[2 * n + 1][3]);
        }
    };
    auto is_partial = [&](int step) { return (shared.partly[step % KNOWN] >> first_octet & (1 << OWN / OCTET) - 1) != 0; };
    auto weigh = [&](int step) {
        const uint32_t values = places.values(step) + own_keys;
#pragma unroll
        for (int n = 0; n < OWN / 16; ++n) Product<T>::weighted(sums, weights[n], describe(values + n * 16 * 128), 1);
        commit();
    };
    auto parity = [&](int step) { return uint32_t(step / STAGES % 2); };
    // Of a barrier that counts warps: all that the lanes of this one read is read.
    auto arrive_as_warp = [&](uint64_t *barrier) {
        __syncwarp();
        if (lane == 0) arrive(barrier);
    };
    // The queries, while the first keys are looked up; rows that are none are zeros.
    wait_for_last();
    {
        constexpr int CHUNKS = D / 8, COPIERS = HALVES ? 2 * GROUP : GROUP;
        const int thread = threadIdx.x % COPIERS, chunk = thread % CHUNKS, first = HALVES ? 0 : group * 64;
#pragma unroll 1
        for (int row = first + thread / CHUNKS; row < first + 64; row += COPIERS / CHUNKS) {
            const bool is_row = row < tile.queries * G;
            const int64_t at = is_row ? row_of(query_of(row), row) * D + chunk * 8 : 0;
            copy_async(place(places.queries, row, chunk), (const T *)p.q + at, is_row);
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
        publish();
        meet(HALVES ? 5 : 5 + group, COPIERS);
    }
    if (group == 1) pass(1, 2 * GROUP); // the first group's turn
    await(shared.keys_there, 0);
    publish();
    int steps = tile.steps;
    if constexpr (KIND == KEPT) steps = shared.steps; // what is gathered, too
    meet(1 + group, 2 * GROUP);
    begin();
    score(0);
    pass(2 - group, 2 * GROUP);
    const bool is_first_partial = is_partial(0);
    wait<0>();
    pin(c);
    arrive_as_warp(shared.keys_read);
    soften(0, is_first_partial);
    round();
    for (int step = 0; step < steps - 1; ++step) {
        const int next = step + 1;
        await(shared.keys_there + next % STAGES, parity(next));
        await(shared.values_there + step % STAGES, parity(step));
        publish();
        meet(1 + group, 2 * GROUP);
        pin(c), pin(sums);
        begin();
        score(next);
        weigh(step);
        pass(2 - group, 2 * GROUP);
        const bool is_next_partial = is_partial(next);
        wait<1>();
        pin(c);
        arrive_as_warp(shared.keys_read + next % STAGES);
        soften(next, is_next_partial);
        wait<0>();
        pin(sums);
        arrive_as_warp(shared.values_read + step % STAGES);
        round();
#pragma unroll
        for (int d = 0; d < D / 8; ++d) {
            sums[d][0] *= factor[0], sums[d][1] *= factor[0];
            sums[d][2] *= factor[1], sums[d][3] *= factor[1];
        }
    }
    await(shared.values_there + (steps - 1) % STAGES, parity(steps - 1));
    publish();
    pin(sums);
    begin();
    weigh(steps - 1);
    wait<0>();
    pin(sums);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        weight[r] += __shfl_xor_sync(~0u, weight[r], 1);
        weight[r] += __shfl_xor_sync(~0u, weight[r], 2);
    }
    if constexpr (HALVES) {
        // The second group hands the sums of its keys to the first.
        const int thread = threadIdx.x % GROUP;
        meet(4, 2 * GROUP); // nobody reads keys or values any more
        if (group == 1) {
#pragma unroll
            for (int d = 0; d < D / 8; ++d)
#pragma unroll
                for (int i = 0; i < 4; ++i) handed[(d * 4 + i) * GROUP + thread] = sums[d][i];
#pragma unroll
            for (int r = 0; r < 2; ++r) handed[(D / 2 + r) * GROUP + thread] = maximum[r], handed[(D / 2 + 2 + r) * GROUP + thread] = weight[r];
        }
        meet(4, 2 * GROUP);
        if (group == 1) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float other = handed[(D / 2 + r) * GROUP + thread], best = fmaxf(maximum[r], other), zero = best == -INFINITY ? 0.f : best;
            const float a = exp2_approx(maximum[r] - zero), b = exp2_approx(other - zero);
            weight[r] = weight[r] * a + handed[(D / 2 + 2 + r) * GROUP + thread] * b;
#pragma unroll
            for (int d = 0; d < D / 8; ++d)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; ++i) sums[d][i] = sums[d][i] * a + handed[(d * 4 + i) * GROUP + thread] * b;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (position[r] < 0) continue;
        const int64_t to = row_of(position[r] - tile.eldest, first_row + 8 * r) * D + 2 * (lane % 4);
        const float by = __fdividef(1.f, weight[r]);
#pragma unroll
        for (int d = 0; d < D / 8; ++d) put_out(p, to + 8 * d, sums[d][2 * r] * by, sums[d][2 * r + 1] * by);
    }
}

// grid (tiles, kv_heads), or by turns (kv_heads, tiles), THREADS. A row is a query and a head of the group: query * group_size + head; at most ROWS, or 64 by HALVES.
// Shared memory: (1 + 2 * STAGES) tiles, and 1024 bytes to align them.
template <typename T, int D, bool HALVES, Kind KIND> __device__ __forceinline__ void attend(PrefillParams p) {
    // What a kind is without needs no code.
    if (KIND != KEPT) p.dense = p.dense_tiles = 0;
    if (KIND == KEPT) p.sliding_window = 0; // layers with one of their own have no token router
    if (KIND == PLAIN) p.kept = Kept{}, p.local_window = 0;
    if (KIND != LISTED) p.octets = nullptr, p.counts = p.firsts = p.lists = p.windows = nullptr;
    extern __shared__ unsigned char unaligned[];
    __shared__ Shared<KIND> shared;
    const uint32_t before = shared_address(unaligned), aligned = (before + 1023) & ~1023u;
    let_next_begin();
    // Tables of pages and of kept tokens are copied to the device, or written by kernels that let none begin before they are done: they are there, and
    // looking at them overlaps with the last kernel. Lists may be what it makes.
    if (KIND == LISTED) wait_for_last();
    const Turn turn(p);
    const Tile<KIND> tile(p, turn.tile, turn.head);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            prepare(shared.keys_there + stage, GROUP + 1), prepare(shared.values_there + stage, GROUP);
            prepare(shared.keys_read + stage, 2 * GROUP / 32), prepare(shared.values_read + stage, 2 * GROUP / 32);
        }
    }
    __syncthreads();
    // A thread has 168 registers at first; what one warpgroup gives up is as much as the others take.
    if (threadIdx.x >= 2 * GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        fetch<T, D, KIND>(p, tile, Places<D>{aligned}, shared);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
        compute<T, D, HALVES, KIND>(p, tile, Places<D>{aligned}, shared, reinterpret_cast<float *>(unaligned + (aligned - before)), turn.head);
    }
}

} // namespace prefill_wgmma

#define ATTEND_AS(NAME, T, D, HALVES, KIND)                                                                                          \
    extern "C" __global__ void __launch_bounds__(prefill_wgmma::THREADS, 1) attend_prefill_wgmma_##NAME##_##D(const PrefillParams p) { \
        prefill_wgmma::attend<T, D, HALVES, prefill_wgmma::KIND>(p);                                                                   \
    }
#define ATTEND(NAME, T, D)                              \
    ATTEND_AS(NAME, T, D, false, PLAIN)                 \
    ATTEND_AS(halves_##NAME, T, D, true, PLAIN)         \
    ATTEND_AS(kept_##NAME, T, D, false, KEPT)           \
    ATTEND_AS(halves_kept_##NAME, T, D, true, KEPT)     \
    ATTEND_AS(listed_##NAME, T, D, false, LISTED)       \
    ATTEND_AS(halves_listed_##NAME, T, D, true, LISTED)
ATTEND(f16, half, 64) ATTEND(f16, half, 128)
ATTEND(bf16, __nv_bfloat16, 64) ATTEND(bf16, __nv_bfloat16, 128)
#undef ATTEND
#undef ATTEND_AS

#endif
