// Arguments of the kernels around attention, mirrored by crates/model/src/gpu/params.rs. See params.h.

#pragma once

#include <stdint.h>

// A matrix as the GPU keeps it, and where its product goes; see weights.cuh.
struct Matrix {
    const uint8_t *planes[4];
    float *out;            // [tokens, rows]
    const float *bias;     // [rows]; may be null
    int rows;
    int format;
};

// `out = W x + bias` for up to four matrices of one width, for few tokens. grid (rows of all / 4, tokens).
struct ProductParams {
    Matrix matrices[4];
    const float *x;        // [tokens, columns]
    const void *x_q8;      // the same in 8 bits, see weights.cuh
    int count;
    int columns;
};

// `out = activation(W0 x) * W1 x`, in 8 bits and as it is.
struct GatedParams {
    Matrix gate;
    Matrix up;
    const float *x;
    const void *x_q8;
    float *out;            // [rows]
    void *out_q8;
    int columns;
    int activation;        // 0: SiLU; 1: GELU by tanh
};

// Memory that a kernel further on reads first of all.
struct Ahead {
    const void *from;      // null: none
    int bytes;
};

// `x += y`, or `x += norm(y)`; then `out = norm(x)`: of one token as it is and in 8 bits, of many as it is or as bf16. Norms are by root
// mean square.
struct NormParams {
    float *x;              // [tokens, columns]
    const float *y;        // null: none
    const float *y_weight; // [columns]; null: no norm of y
    const float *weight;
    float *out;            // null: not of many tokens
    void *out_q8;          // of one token
    void *rounded;         // of many tokens: [tokens, columns] bf16; null: none
    void *copy;            // the same again; null: none
    Ahead ahead[8];        // of one token: brought to the L2 cache
    int columns;
    float eps;
};

// What becomes of one token's query, key and value: norms, rotation, rounding; key and value go into the cache. Where a token router decides later, the
// input that they were made of is kept for it, rounded. grid kv_heads, and one more for that.
struct WriteParams {
    const float *qkv;      // [q_heads + 2 kv_heads, head_dim]
    const float *q_norm;   // [head_dim]; may be null
    const float *k_norm;
    const double *frequencies; // [head_dim / 2]
    const int *position;
    const int *pages;      // [kv_heads, max_pages]
    void *q;               // [q_heads, head_dim] T
    void *k;               // S
    void *v;
    void *k_scales;        // as in DecodeParams
    void *v_scales;
    const float *input;    // [columns]
    void *inputs;          // [rows, columns] bf16, of which row `position % rows` is the token's; null: none are kept
    int rows;              // a power of two
    int columns;
    int max_pages;
    int group_size;
    int head_dim;
    float eps;
    float magnitude;       // of the rotation
};

// Rows of a matrix as f32, times a factor.
struct RowsParams {
    Matrix matrix;
    const int *ids;        // [rows of out]
    float *out;            // [.., columns]
    int columns;
    float factor;
};

// Numbers of the host's memory, brought to the device. One thread block.
struct FetchParams {
    const int *from;       // [count]
    int *to;
    int count;
};

// Whole matrices as bf16. grid blocks[count - 1], 256 threads, of eight weights each
struct UnpackParams {
    Matrix matrices[8];    // `out`: where their rows go, as bf16; of any width
    int columns[8];        // multiples of 32
    int blocks[8];         // thread blocks of a matrix and those before it
    int count;
};

// A layer's weights, and the norm before its first product. grid unpack.blocks[unpack.count - 1] + tokens, 256 threads
struct UnpackNormParams {
    UnpackParams unpack;
    NormParams norm;
};

// Numbers in 8 bits. grid columns * tokens / 32 / 8
struct QuantizeParams {
    const float *x;        // [tokens, columns]
    void *out;             // [tokens] of activations
    int columns;
    int tokens;
};

// f32 to bf16.
struct RoundParams {
    const float *x;
    void *out;
    int64_t count;
};

// `out = activation(gate) * up` of many tokens, in f32 or bf16. grid count / 1024, 256 threads
struct GateRowsParams {
    const float *gate;     // [tokens, columns], rows that many numbers apart
    const float *up;
    void *out;             // [tokens, columns] f32, or bf16 if it is rounded
    int64_t count;         // of all numbers
    int columns;           // a multiple of 4, as are distances
    int gate_row;
    int up_row;
    int activation;        // as in GatedParams
    int is_rounded;
};

// cos and sin of the angles by which tokens are rotated, times a factor. grid tokens * pairs / 256, 256 threads
struct AnglesParams {
    const double *frequencies; // [pairs]: radians per position
    float *cos;            // [tokens, pairs]
    float *sin;
    int start;             // position of the first token
    int tokens;
    int pairs;
    float magnitude;
};

// Queries and keys of many tokens, rotated: the pair of number i and number i + head_dim / 2 of a head by the i-th angle of the token. Four
// pairs for each thread. grid (q_heads + kv_heads) * head_dim / 8 * tokens / 256
struct RotateParams {
    const float *q;        // [tokens, q_heads, head_dim], tokens that many numbers apart
    const float *k;        // [tokens, kv_heads, head_dim]
    const float *cos;      // [tokens, head_dim / 2]
    const float *sin;
    void *q_out;           // [tokens, q_heads, head_dim] T
    float *k_out;          // [tokens, kv_heads, head_dim]
    int q_row;             // a multiple of 4
    int k_row;
    int tokens;
    int q_heads;
    int kv_heads;
    int head_dim;          // a multiple of 8
};

// The likeliest token: of equal ones the first. One thread block.
struct LikeliestParams {
    const float *logits;   // [count]
    const int *told;       // what kernels before have to tell the host
    int *id;               // one more: whether a logit is NaN or infinite; then what was told, so that one kernel writes to the host
    int count;
    int told_count;
};

// The likeliest tokens, in no order: all whose logit is at least that of the `wanted`th, and a few that are as near as makes no bin of a
// histogram. One thread block, after LikeliestParams.
struct BestParams {
    const float *logits;   // [count]
    const int *likeliest;  // as `id` there
    int *found;            // how many; -1: more than `room`, or some of the wanted are far below the likeliest
    int *ids;              // [room]
    float *scores;         // [room]
    int count;
    int wanted;
    int room;
};
