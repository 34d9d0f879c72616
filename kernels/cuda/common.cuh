// What the kernels share: tensor cores, copies, numbers, the order of launches.

#pragma once

#include "../params.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <type_traits>

namespace {

constexpr int PAGE = 64, OCTET = 8;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory; zeros where `there` is false.
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool there) {
    asm volatile("{.reg .pred p; setp.eq.s32 p, %2, 0; cp.async.cg.shared.global.L2::128B [%0], [%1], 16, p;}" ::"r"(to), "l"(from), "r"((int)there));
}

// The same of what is there.
__device__ __forceinline__ void copy_async(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}

// The same of 4, 8 or 16 bytes.
template <int BYTES> __device__ __forceinline__ void copy_few_async(uint32_t to, const void *from, bool there) {
    if constexpr (BYTES == 16) copy_async(to, from, there);
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(there ? BYTES : 0));
}

__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(from));
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&a)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(from));
}

__device__ __forceinline__ uint32_t transposed(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// c[16 x 8] += a[16 x 16] b[16 x 8]
template <typename T> __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1);
template <> __device__ __forceinline__ void multiply<half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T> __device__ __forceinline__ uint32_t pack(float a, float b);
template <> __device__ __forceinline__ uint32_t pack<half>(float a, float b) {
    half2 h = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&h);
}
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float a, float b) {
    __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&h);
}
template <typename T> __device__ __forceinline__ float2 unpack(uint32_t x);
template <> __device__ __forceinline__ float2 unpack<half>(uint32_t x) { return __half22float2(*reinterpret_cast<const half2 *>(&x)); }
template <> __device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t x) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&x)); }
__device__ __forceinline__ float wide(half x) { return __half2float(x); }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(half &to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(__nv_bfloat16 &to, float x) { to = __float2bfloat16_rn(x); }

// Storage of rows in signed bytes, with a scale for each GROUP neighbours (ggml's q8_0). Keys are stored as the Hadamard transform of each
// group, and what is multiplied with them is transformed, too.
struct Bytes {};
constexpr int GROUP = 32;
constexpr float HADAMARD_FACTOR = 0.17677669529663687f; // 1 / sqrt(GROUP)

// What is computed with, where rows are stored as S.
template <typename S> struct ComputedAs { using T = S; };
template <> struct ComputedAs<Bytes> { using T = half; };

// Number d of row `row` of `width`.
template <typename S> __device__ __forceinline__ float number_at(const void *values, const void *scales, int64_t row, int width, int d) {
    if constexpr (std::is_same_v<S, Bytes>)
        return (float)((const int8_t *)values)[row * width + d] * __half2float(((const half *)scales)[row * (width / GROUP) + d / GROUP]);
    else return wide(((const S *)values)[row * width + d]);
}

// Stores it. With bytes all lanes of a warp store together, each its own of GROUP neighbours.
template <typename S> __device__ __forceinline__ void store_at(void *values, void *scales, int64_t row, int width, int d, float x) {
    if constexpr (std::is_same_v<S, Bytes>) {
        // Bits of magnitudes are in the order of those; NaN, above all, makes the scale NaN.
        const float scale = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x) & 0x7fffffffu)) / 127.f;
        ((int8_t *)values)[row * width + d] = (int8_t)(int)roundf(x * (scale == 0.f ? 0.f : 1.f / scale));
        if (d % GROUP == 0) ((half *)scales)[row * (width / GROUP) + d / GROUP] = __float2half_rn(scale);
    } else narrow(((S *)values)[row * width + d], x);
}

// Four signed bytes as T, times a scale.
template <typename T> __device__ __forceinline__ uint2 widened(uint32_t bytes, half scale) {
    // Bytes with the sign turned are 0 to 255; as low bits of 1024, or of 2^23, they are that much more.
    const uint32_t shifted = bytes ^ 0x80808080u;
    uint32_t out[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if constexpr (std::is_same_v<T, half>) {
            const uint32_t pair = __byte_perm(shifted, 0x64646464u, i ? 0x4342 : 0x4140);
            const half2 x = __hmul2(__hsub2(*(const half2 *)&pair, __float2half2_rn(1152.f)), __half2half2(scale));
            out[i] = *(const uint32_t *)&x;
        } else {
            float x[2];
#pragma unroll
            for (int j = 0; j < 2; ++j)
                x[j] = (__uint_as_float(__byte_perm(shifted, 0x4b000000u, 0x7650 + 2 * i + j)) - 8388736.f) * __half2float(scale);
            out[i] = pack<T>(x[0], x[1]);
        }
    }
    return make_uint2(out[0], out[1]);
}

// Lets the next kernel be put on the GPU as soon as all thread blocks have come here: launches overlap.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the kernel before this one is done.
__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void follow() {
    let_next_begin();
    wait_for_last();
}

// Bits in the order of the numbers.
__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The lanes of an octet that the query at `t` sees, as bits; see params.h. Without branches, so that several are found at the same time.
__device__ __forceinline__ uint32_t visible(Octet octet, int t, int sliding_window, int local_window) {
    // The lanes of positions from `from` on, and bits beyond.
    auto lanes_from = [&](int from) { return 0xffu << min(max(from - octet.position, 0), OCTET); };
    const uint32_t mask = octet.row & 0xff, past = ~lanes_from(t + 1), oldest = sliding_window ? lanes_from(t - sliding_window + 1) : ~0u;
    const uint32_t near = local_window ? lanes_from(t - local_window + 1) & 0xff : 0;
    return octet.position < 0 ? mask : past & oldest & (mask | near);
}

// The queries of a tile of a prompt: numbers of the step.
struct TileQueries {
    int first, count;

    __device__ __forceinline__ TileQueries(const PrefillParams &p, int tile) {
        if (p.firsts) {
            first = p.firsts[tile], count = p.firsts[tile + 1] - first;
            return;
        }
        // Of kernels that know there are none, the first test leaves nothing: they do not know that no number is below 0.
        const bool sees_all = p.dense_tiles && tile < p.dense_tiles;
        first = sees_all ? tile * p.tile : p.dense + (tile - p.dense_tiles) * p.tile;
        count = min(p.tile, (sees_all ? p.dense : p.tokens) - first);
    }

    // Positions of the first and the last one.
    __device__ __forceinline__ int eldest(const PrefillParams &p) const { return p.start + first; }
    __device__ __forceinline__ int newest(const PrefillParams &p) const { return p.start + first + count - 1; }

    // Whether a token router hides tokens from some: before one leaves the window all are seen.
    __device__ __forceinline__ bool miss_some(const PrefillParams &p) const { return first >= p.dense && newest(p) >= p.local_window; }
};

// The octets that queries at `eldest` to `newest` read of a head: a list, or all that is visible.
struct Reads {
    const Octet *list;
    const int *pages, *kept_pages;
    const uint8_t *masks;  // of recent octets; null: every token is kept
    int kept, kept_octets; // tokens before the recent ones
    int oldest, count;     // first recent octet; all octets

    // By the tokens that are kept before the recent ones, see `before`; `hides`: whether a token router hides tokens from the queries.
    template <typename Params>
    __device__ __forceinline__ Reads(const Params &p, int head, int row_of_list, int eldest, int newest, bool hides, int2 before) {
        list = p.octets ? p.octets + (int64_t)row_of_list * p.max_octets : nullptr;
        pages = p.pages + (int64_t)head * p.max_pages;
        kept_pages = nullptr, masks = nullptr, kept = kept_octets = 0;
        oldest = p.sliding_window ? max(0, eldest - p.sliding_window + 1) / OCTET : 0;
        if (!list && p.kept.masks && hides) {
            kept_pages = p.kept.pages + (int64_t)head * p.kept.max_pages;
            masks = p.kept.masks + (int64_t)head * p.max_pages * (PAGE / OCTET);
            oldest = before.x / OCTET, kept = before.y, kept_octets = (kept + OCTET - 1) / OCTET;
        }
        count = list ? p.counts[row_of_list] : kept_octets + newest / OCTET + 1 - oldest;
    }

    // Of a prompt's queries from which nothing is hidden, or what is listed.
    __device__ __forceinline__ Reads(const PrefillParams &p, int head, int row_of_list, TileQueries of)
        : Reads(p, head, row_of_list, of.eldest(p), of.newest(p), false, make_int2(0, 0)) {}

    // The first recent position, and the tokens of a head that are kept before it: where a token router decides, and nothing is listed.
    template <typename Params> static __device__ __forceinline__ int2 before(const Params &p, int head) {
        return p.kept.masks && !p.octets ? make_int2(p.kept.counts[0], p.kept.counts[1 + head]) : make_int2(0, 0);
    }

    __device__ __forceinline__ int octets() const { return count; }

    static __device__ __forceinline__ int row(const int *pages, int octet) {
        return (pages[octet / (PAGE / OCTET)] * (PAGE / OCTET) + octet % (PAGE / OCTET)) << 8;
    }

    // Numbers of an octet on their way: what is made of them waits for them.
    struct Sought {
        int row, mask, position;

        __device__ __forceinline__ Octet found() const { return Octet{row << 8 | mask, position}; }
    };

    // Octet number `index`; beyond the last one, one that nothing is seen of.
    __device__ __forceinline__ Sought seek(int index) const {
        if (index >= count) return Sought{0, 0, -1};
        if (list) return Sought{list[index].row >> 8, list[index].row & 0xff, list[index].position};
        // Without branches, so that neighbours are looked up at the same time.
        const bool is_kept = index < kept_octets;
        const int octet = is_kept ? index : oldest + index - kept_octets;
        const int page = (is_kept ? kept_pages : pages)[octet / (PAGE / OCTET)];
        const int mask = masks && !is_kept ? masks[octet] : 0xff >> max(0, is_kept ? OCTET * (index + 1) - kept : 0);
        return Sought{page * (PAGE / OCTET) + octet % (PAGE / OCTET), mask, is_kept ? -1 : octet * OCTET};
    }

    __device__ __forceinline__ Octet octet(int index) const { return seek(index).found(); }

    // The same by branches: cheaper where there is one to look up, and time to do it.
    __device__ __forceinline__ Octet octet_by_branches(int index) const {
        if (index >= count) return Octet{0, -1};
        if (list) return list[index];
        if (index < kept_octets) return Octet{row(kept_pages, index) | 0xff >> max(0, OCTET * (index + 1) - kept), -1};
        const int octet = oldest + index - kept_octets;
        return Octet{row(pages, octet) | (masks ? masks[octet] : 0xff), octet * OCTET};
    }
};

// What a thread block of a prompt takes: of tiles that read more the longer they are, the longest begin first.
struct Turn {
    int tile, head;

    __device__ __forceinline__ Turn(const PrefillParams &p)
        : tile(p.by_turns ? gridDim.y - 1 - blockIdx.y : gridDim.x - 1 - blockIdx.x), head(p.by_turns ? blockIdx.x : blockIdx.y) {}
};

// Two neighbours of a prompt's output, from number `at` on.
__device__ __forceinline__ void put_out(const PrefillParams &p, int64_t at, float a, float b) {
    if (p.is_rounded) *(uint32_t *)((__nv_bfloat16 *)p.out + at) = pack<__nv_bfloat16>(a, b);
    else *(float2 *)((float *)p.out + at) = make_float2(a, b);
}

constexpr int GATHERED = -2; // the position of octets of tokens that are no neighbours: each has a place of its own, see Gathering

// The octets that queries of a prompt read: those that some queries are among, then, from where their windows begin, all others that some query
// sees by its window, those that are kept for long, at last, of the other tokens that none sees by its window, those that are kept, eight and eight.
struct PromptReads : Reads {
    int first_hidden, hidden; // octets of which none sees a token by its window
    int own;                  // octets that come first: with those at the edge of the windows, all that only some queries see
    int gathered;             // tokens of the hidden octets that are kept, once they are counted

    // What the host knows need not be waited for.
    static __device__ __forceinline__ int2 before(const PrefillParams &p, int head) { return p.frontier ? Reads::before(p, head) : make_int2(0, 0); }

    __device__ __forceinline__ PromptReads(const PrefillParams &p, int head, int row_of_list, TileQueries of)
        : Reads(p, head, row_of_list, of.eldest(p), of.newest(p), of.miss_some(p), before(p, head)), first_hidden(oldest), hidden(0), own(0), gathered(0) {
        if (masks) hidden = max(0, of.eldest(p) - p.local_window + 1 - oldest * OCTET) / OCTET;
        oldest += hidden, count -= hidden;
        if (masks) own = of.newest(p) / OCTET - of.eldest(p) / OCTET + 1;
    }

    // Which tokens are kept of page number `page` of those with hidden octets; beyond the last one, none.
    __device__ __forceinline__ uint64_t kept_of_page(int page) const {
        const int left = hidden - page * (PAGE / OCTET);
        if (left <= 0) return 0;
        const uint64_t mask = *(const uint64_t *)(masks + first_hidden + page * (PAGE / OCTET));
        return left < PAGE / OCTET ? mask & ~(~uint64_t(0) << OCTET * left) : mask;
    }

    // Counts the gathered tokens. Whole warps, each for itself.
    __device__ __forceinline__ void count_gathered() {
        int sum = 0;
#pragma unroll 1 // few have more than one, and code comes from afar when it is first executed
        for (int page = threadIdx.x % 32; page * (PAGE / OCTET) < hidden; page += 32) sum += __popcll(kept_of_page(page));
        gathered = __reduce_add_sync(~0u, sum);
    }

    __device__ __forceinline__ int octets() const { return count + (gathered + OCTET - 1) / OCTET; }
    __device__ __forceinline__ Octet octet(int index) const { return index < count ? Reads::octet(of_all(index)) : gathered_octet(index - count); }
    __device__ __forceinline__ Octet octet_by_branches(int index) const {
        return index < count ? Reads::octet_by_branches(of_all(index)) : gathered_octet(index - count);
    }

    // The first gathered token of octets from `index` on; below 0: those before are others.
    __device__ __forceinline__ int gathered_from(int index) const { return (index - count) * OCTET; }

  private:
    __device__ __forceinline__ int of_all(int index) const {
        const int others = count - own, other = index - own + kept_octets;
        return index < own ? others + index : other < others ? other : other - others;
    }

    __device__ __forceinline__ Octet gathered_octet(int index) const {
        const int left = gathered - index * OCTET;
        return left > 0 ? Octet{0xff >> max(0, OCTET - left), GATHERED} : Octet{0, -1};
    }
};

// Finds the slots of gathered tokens, in their order: a warp for itself, with a page for each lane.
struct Gathering {
    int next = 0;            // the first page that no lane has had yet
    int begin = 0, end = 0;  // tokens before those of the warp's pages, and with them
    int upto = 0, first = 0; // of the lane's page: tokens before it and in it, and its first slot
    uint64_t kept = 0;

    // The next 32 pages.
    __device__ __forceinline__ void turn(const PromptReads &reads) {
        const int lane = threadIdx.x % 32, page = next + lane;
        kept = reads.kept_of_page(page);
        first = kept ? reads.pages[reads.first_hidden / (PAGE / OCTET) + page] * PAGE : 0;
        upto = __popcll(kept);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, upto, step);
            if (lane >= step) upto += other;
        }
        upto += end, begin = end, end = __shfl_sync(~0u, upto, 31), next += 32;
    }

    // The slot of token `index`, for each lane one of its own, below `reads.gathered` and no earlier than the first one of the last call.
    __device__ __forceinline__ int slot(const PromptReads &reads, int index) {
        int found = 0;
        while (true) {
            int page = 0;
#pragma unroll
            for (int step = 16; step; step /= 2)
                if (__shfl_sync(~0u, upto, page + step - 1) <= index) page += step;
            const uint64_t mask = __shfl_sync(~0u, kept, page);
            // Of its page's tokens, how many are before it; then the same of halves of what is left.
            int rank = index - __shfl_sync(~0u, upto, page) + __popcll(mask), at = __shfl_sync(~0u, first, page);
            uint32_t left = mask;
            if (const int low = __popc(left); rank >= low) left = mask >> 32, rank -= low, at += 32;
#pragma unroll
            for (int half = 16; half; half /= 2)
                if (const int low = __popc(left & (1u << half) - 1); rank >= low) left >>= half, rank -= low, at += half;
            if (index >= begin) found = at;
            if (!__any_sync(~0u, index >= end)) return found;
            turn(reads);
        }
    }
};

// The lane's number of the Hadamard transform of a warp's numbers: 32 neighbours of a row. Its own inverse.
__device__ __forceinline__ float hadamard(float x) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_xor_sync(~0u, x, step);
        x = lane & step ? other - x : x + other;
    }
    return x * HADAMARD_FACTOR;
}

// The sum of the numbers of a warp, in every lane.
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

} // namespace
