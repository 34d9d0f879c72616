//! What kernels/layer_params.h says, in Rust. Addresses are of the device; see there for shapes.

sparse_attn::mirrors! { "layer_params.h":
    /// A matrix, and where its product goes.
    Matrix { planes: [u64; 4], out: u64, bias: u64, rows: i32, format: i32 }
    /// Products of up to four matrices.
    ProductParams { matrices: [Matrix; 4], x: u64, x_q8: u64, count: i32, columns: i32 }
    /// `activation(gate x) * up x`
    GatedParams { gate: Matrix, up: Matrix, x: u64, x_q8: u64, out: u64, out_q8: u64, columns: i32, activation: i32 }
    /// Memory that is read soon.
    Ahead { from: u64, bytes: i32 }
    /// A residual connection and the norm that follows.
    NormParams { x: u64, y: u64, y_weight: u64, weight: u64, out: u64, out_q8: u64, rounded: u64, copy: u64, ahead: [Ahead; 8], columns: i32, eps: f32 }
    /// A token's query, key and value.
    WriteParams {
        qkv: u64, q_norm: u64, k_norm: u64, frequencies: u64, position: u64, pages: u64, q: u64, k: u64, v: u64, k_scales: u64, v_scales: u64,
        input: u64, inputs: u64, rows: i32, columns: i32, max_pages: i32, group_size: i32, head_dim: i32, eps: f32, magnitude: f32,
    }
    /// Rows of a matrix.
    RowsParams { matrix: Matrix, ids: u64, out: u64, columns: i32, factor: f32 }
    /// Numbers from the host.
    FetchParams { from: u64, to: u64, count: i32 }
    /// Matrices as bf16.
    UnpackParams { matrices: [Matrix; 8], columns: [i32; 8], blocks: [i32; 8], count: i32 }
    /// Both, in one launch.
    UnpackNormParams { unpack: UnpackParams, norm: NormParams }
    /// Numbers in 8 bits.
    QuantizeParams { x: u64, out: u64, columns: i32, tokens: i32 }
    /// f32 to bf16.
    RoundParams { x: u64, out: u64, count: i64 }
    /// `activation(gate) * up`
    GateRowsParams { gate: u64, up: u64, out: u64, count: i64, columns: i32, gate_row: i32, up_row: i32, activation: i32, is_rounded: i32 }
    /// Angles of a rotation.
    AnglesParams { frequencies: u64, cos: u64, sin: u64, start: i32, tokens: i32, pairs: i32, magnitude: f32 }
    /// Queries and keys, rotated.
    RotateParams { q: u64, k: u64, cos: u64, sin: u64, q_out: u64, k_out: u64, q_row: i32, k_row: i32, tokens: i32, q_heads: i32, kv_heads: i32, head_dim: i32 }
    /// The likeliest token.
    LikeliestParams { logits: u64, told: u64, id: u64, count: i32, told_count: i32 }
    /// The likeliest tokens.
    BestParams { logits: u64, likeliest: u64, found: u64, ids: u64, scores: u64, count: i32, wanted: i32, room: i32 }
}
