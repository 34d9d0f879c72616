// Arguments of the attention kernels, one text for every GPU dialect. Mirrored by crates/sparse-attn/src/backend/cuda/params.rs,
// whose test reads this file. Pointers, int and float only.
//
// T: half or bf16. Rows of keys, values and summaries lie one after the other; a slot of a head is row
// `pages[head][slot / 64] * 64 + slot % 64` of the pool. S: T, or signed bytes, of which each 32 neighbours of a row have a scale, half,
// in a pool of their own; T is half then, and keys are stored as the Hadamard transform of each 32 neighbours.

#pragma once

#include <stdint.h>

// Eight neighbouring slots of a head, and who sees them. Sees(t, lane), where a kept octet is one of tokens before every window:
//     position < 0:  bit `lane` of mask
//     else:          p = position + lane: p <= t, and p > t - sliding_window where there is one, and bit `lane` of mask or
//                    p > t - local_window
struct Octet {
    int row;      // of the first slot / 8, shifted left by 8, with the mask in the low byte
    int position; // of the first slot; -1: kept; -2: kept, of slots that are no neighbours, see GATHERED of common.cuh
};

// The tokens of each head that a token router kept when they left the window, packed, and which of the recent ones it keeps. All null
// where every token is kept.
struct Kept {
    const int *pages;     // [kv_heads, max_pages] of the kept tokens
    const int *counts;    // [1 + kv_heads]: the first recent position, then how many tokens are kept before it
    const uint8_t *masks; // [kv_heads, max_pages of recent tokens, 8]: an octet of positions, bit by bit
    const int *ranks;     // [kv_heads, max_pages of recent tokens]: kept tokens before each 64 positions, up to the first recent one
    int max_pages;
};

// `out[t][head] = softmax(scale q . K') V` over a list of octets: of one query.
struct DecodeParams {
    const void *q;        // [q_heads, head_dim] T
    const void *k;        // [pages * 64, head_dim] S
    const void *v;        // [pages * 64, head_dim] S
    const void *k_scales; // [pages * 64, head_dim / 32]; null: there are none
    const void *v_scales;
    const int *pages;     // [kv_heads, max_pages]
    Kept kept;
    const Octet *octets;  // [kv_heads, max_octets], ascending; null: all that is visible, by `pages` and `kept`
    const int *counts;    // [kv_heads] octets of the list
    const int *position;  // of the query
    float *partial;       // [kv_heads * parts, splits, 8, head_dim] sums, then [.., splits, 8, 2] maxima and weights
    int *tickets;         // [kv_heads * parts] zeros, left as zeros
    float *out;           // [q_heads, head_dim]
    void *out_q8;         // the same as activations in 8 bits, see weights.cuh; may be null
    int max_pages;
    int max_octets;
    int group_size;       // query heads of a key/value head
    int sliding_window;   // 0: none
    int local_window;     // 0: none
    int hides_from;       // the first position of whose query a token router hides tokens
    float scale;
};

// The same of many queries, in tiles that share a list.
struct PrefillParams {
    const void *q;        // [tokens, q_heads, head_dim] T, transformed where keys are
    const void *k;
    const void *v;
    const int *pages;
    Kept kept;
    const Octet *octets;  // [lists, kv_heads, max_octets], ascending; null: all that is visible, by `pages` and `kept`
    const int *counts;    // [lists, kv_heads] octets of the lists
    const int *firsts;    // [tiles + 1] first query of each tile; null: tiles of `tile` queries from the first one, and from the first that does not see all
    const int *lists;     // [tiles] number of each tile's list; null: its own
    const int *windows;   // [lists] local windows; null: local_window
    void *out;            // [tokens, q_heads, head_dim] f32, or bf16 if it is rounded
    int max_pages;
    int max_octets;
    int frontier;         // kept.counts[0]
    int start;            // position of the first query
    int tokens;
    int tile;             // most queries of a tile; tile * group_size <= 128
    int kv_heads;
    int group_size;
    int sliding_window;
    int local_window;
    int dense;            // queries that see all, of those that are not listed: the first ones
    int dense_tiles;      // and their tiles
    int is_rounded;
    int by_turns;         // thread blocks are those of all heads by turns, not head by head
    float scale;
};

// `scores[row][head][block] = max over the group of x . summary`; a summary is [first, second], mean and deviation or largest and
// smallest, or first alone. Row r scores the queries of a tile together, by their mean, or one query.
struct ScoreParams {
    const void *q;         // [rows, q_heads, 2 head_dim] T, expanded; or with rows = 1 [q_heads, head_dim], to be expanded
    const void *summaries; // [ceil(blocks / 64), kv_heads, 64, width] S
    const void *scales;    // [.., width / 32]; null: there are none
    const int *position;   // of the first query of the step
    float *scores;         // [rows, kv_heads, max_scores]
    int kind;              // 0: mean; 1: largest and smallest; 2: mean and deviation
    int expanded;
    int group_size;
    int max_scores;        // a multiple of 4
    int window;
    int block_size;
    int tile;              // queries of a row, aligned to absolute positions
    int first_row;         // rows before these in the step
};

// The octets that the queries of a tile read: block 0, the best of blocks 1 to edge - 1 (of equal scores the later) as long as their
// tokens are no more than `takes`, and everything from the edge on, where the edge is the block of the newest position outside the window
// of the tile's first query.
struct SelectParams {
    const float *scores;   // [tiles * rows, kv_heads, max_scores]
    const int *pages;      // [kv_heads, max_pages]
    Kept kept;
    const int *position;   // of the first query of the step
    const int *takes;      // [tiles, kv_heads] tokens that fit the budget beside those of the forced blocks
    Octet *octets;         // [tiles, kv_heads, max_octets]
    int *counts;           // [tiles, kv_heads]
    int *picked;           // [tiles, kv_heads] kept tokens of block 0 and the chosen ones; may be null
    int *blocks;           // [tiles, kv_heads, max_scores]: the chosen blocks before the edge, then -1; may be null
    int max_scores;
    int max_pages;
    int max_octets;
    int rows;              // rows of scores of a tile: the best counts
    int tokens;            // of the step
    int window;
    int block_size;        // a multiple of 8
    int tile;              // queries of a tile, aligned to absolute positions
    int first_tile;        // tiles before these in the step
};

// Queries, keys and values of a step, made of rows of products: with a bias, normed, rotated, as far as there is by what. Keys and values are
// written to the places that the page table gives them, rounded; keys in 8 bits as their Hadamard transform. All that is read begins at multiples of
// 16 bytes, and tokens are multiples of 4 numbers apart.
struct StoreParams {
    const float *rows[3];   // queries, keys, values: [tokens, heads, head_dim], tokens so many numbers apart
    const float *biases[3]; // [heads, head_dim]; null: none
    const float *norms[2];  // of queries and keys, [head_dim]: x / sqrt(mean(x^2) + eps) * norm; null: none
    const float *cos;       // of queries and keys, [tokens, head_dim / 2]: of pairs x[i], x[i + head_dim / 2]; null: none is rotated
    const float *sin;
    void *q;                // [tokens, q_heads, head_dim] T
    void *pools[2];         // S
    void *scales[2];        // as in DecodeParams
    const int *pages;       // [kv_heads, max_pages]
    int apart[3];
    int max_pages;
    int start;              // position of the first token
    int tokens;
    int q_heads;            // 0: there are no queries
    int kv_heads;
    int head_dim;           // 64, 128 or 256
    float eps;
};

// Rows that are written into a pool, rounded.
struct ScatterParams {
    const float *rows;     // [count, width]
    const int *slots;      // [count]
    void *pool;            // [.., width] S
    void *scales;          // [.., width / 32]; null: there are none
    int count;
    int width;
    int transforms;        // whether the Hadamard transform of each 32 neighbours is stored
};

// The Hadamard transform of each 32 neighbours. grid ceil(count / 256)
struct TransformParams {
    const void *x;         // [count] half
    void *out;             // [count] half
    int64_t count;         // a multiple of 32
};

// Numbers of a pool of bytes and scales, as half. grid ceil(count / 16 / 256)
struct WidenParams {
    const void *values;    // [count]
    const void *scales;    // [count / 32]
    void *out;             // [count]
    int64_t count;         // a multiple of 32
};

// All tokens of a layer, to new pools by new tables; of recent tokens that are kept ones there, those that masks keep. Slots of kept pages
// that hold none yet get zeros. In pools that are not new, recent tokens that are kept ones now.
struct CompactedLayer {
    const uint32_t *from[4]; // [.., words]
    uint32_t *to[4];
    int words[4];            // of a row of each: 4 bytes each, whatever they mean
    const int *old_pages;    // [kv_heads, old_max_pages]
    Kept old;
    const int *pages;        // [kv_heads, max_pages]
    Kept kept;               // masks are the old ones
    int old_max_pages;
    int max_pages;
    int kept_pages;          // most of a head that are written
    int recent_pages;        // from the first position of `kept` on
};

// That of some layers of as many heads. grid (most kept and recent pages of a layer, kv_heads, tensors * layers)
struct CompactParams {
    CompactedLayer layers[16];
    int tensors;
};

// Summaries of complete blocks of a layer; one of which nothing is kept has none.
struct SummaryParams {
    const void *k;         // [pages * 64, head_dim] S
    const void *k_scales;  // as in DecodeParams
    const int *pages;      // [kv_heads, max_pages]
    const uint8_t *masks;  // as in Kept: the tokens that are summarised; null: all
    void *summaries;       // as in ScoreParams
    void *scales;
    int kind;              // as in ScoreParams
    int max_pages;
    int block_size;        // divides 64, or 64 divides it
    int first;             // block
    int blocks;
    int head_dim;
};

// Those of layers that are alike. grid (most blocks, kv_heads, layers)
struct SummariesParams {
    SummaryParams layers[32];
};

// Queries that score together, as [mean] and what the second half of a summary is multiplied with.
struct ExpandParams {
    const void *q;         // [tokens, q_heads, head_dim] T
    void *out;             // [rows, q_heads, 2 head_dim] T
    int kind;              // as in ScoreParams
    int start;             // position of the first query
    int tokens;
    int tile;
    int first_row;
    int q_heads;
    int head_dim;
};

// Verdicts of a gate on the tokens of a step, as bits.
struct VerdictParams {
    const float *scores;   // [tokens, kv_heads]
    uint8_t *masks;        // as in Kept
    int start;             // position of the first token
    int tokens;
    int kv_heads;
    int max_pages;
    int sinks;             // positions that are kept anyway
    float tau;             // kept from this score on
};

// A layer, and where its verdicts go.
struct ToldLayer {
    const uint8_t *masks;  // as in Kept
    uint8_t *told;         // [kv_heads, octets], in memory of the host
    int kv_heads;
    int max_pages;
};

// Verdicts on the tokens of a step, brought to the host: of some layers. grid (octets / 256, most kv_heads, layers)
struct TellParams {
    ToldLayer layers[32];
    int first;             // octet
    int octets;            // of the step
};

// A layer of a token router's gate: `x weight' + bias`, each from its token alone. The last one gives scores, verdicts or both.
struct GateParams {
    const void *x;         // [tokens, columns] f32 or bf16
    const float *weight;   // [rows, columns]
    const float *bias;     // [rows]
    float *out;            // [tokens, rows]; null: not asked for
    uint8_t *masks;        // as in Kept, of a row each; null: no verdict
    int start;             // position of the first token
    int tokens;
    int rows;
    int columns;           // a multiple of 4, with bf16 of 8
    int is_hidden;         // GELU of the sums, by erf
    int max_pages;
    int sinks;             // as in VerdictParams
    float tau;
};

// Verdicts of a gate whose first layer was multiplied beside other matrices.
struct ProjectedParams {
    const float *sums;     // [tokens, rows], tokens so many numbers apart
    const float *bias;     // [rows]
    const float *weight;   // [kv_heads, rows]: a layer on GELU of the first one, by erf; null: it is the last one, a row for each head
    const float *last_bias; // [kv_heads]
    uint8_t *masks;        // as in Kept
    int apart;
    int start;             // position of the first token
    int tokens;
    int rows;
    int kv_heads;
    int max_pages;
    int sinks;             // as in VerdictParams
    float tau;
};

// A layer that waits for its verdicts.
struct WaitingLayer {
    uint8_t *masks;        // as in Kept
    int layer;
    int max_pages;
};

// Such verdicts of layers whose gates are alike, all at once. grid (as many thread blocks as in StoreProjectedParams, layers)
struct DecideParams {
    ProjectedParams first; // of layer 0, without masks
    int64_t sums_apart;    // numbers from what is a layer's to what is the next one's
    int bias_apart;
    int weight_apart;
    int last_bias_apart;
    WaitingLayer layers[32];
};

// A step's keys and values, and such verdicts on its tokens.
struct StoreProjectedParams {
    int gates;             // thread blocks of the gate, of 256 threads: the first ones, one for each octet of positions, or, without a second
                           // layer, for 256 positions from the first octet on. They store what is left then. It comes first: all look at it first
    StoreParams store;
    ProjectedParams gate;
};

// A step's keys and values, and a gate's verdict on its tokens.
struct StoreGatedParams {
    StoreParams store;
    GateParams gate;
    int gates;             // thread blocks of the gate: the first ones
};
