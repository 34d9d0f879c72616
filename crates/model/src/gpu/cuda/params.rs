//! What kernels/layer_params.h says, in Rust. Addresses are of the device; see there for shapes.

/// Declares mirrors of the structs of layer_params.h, and what the test compares.
macro_rules! mirrors {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy)]
            #[repr(C)]
            pub(super) struct $name { $(pub(super) $field: $type),* }
        )*

        #[cfg(test)]
        const MIRRORS: &[(&str, usize, &[(&str, usize)])] =
            &[$((stringify!($name), size_of::<$name>(), &[$((stringify!($field), std::mem::offset_of!($name, $field))),*])),*];
    };
}

mirrors! {
    /// A matrix, and where its product goes.
    Matrix { planes: [u64; 4], out: u64, bias: u64, rows: i32, format: i32 }
    /// Products of up to three matrices.
    ProductParams { matrices: [Matrix; 3], x: u64, x_q8: u64, count: i32, columns: i32 }
    /// `activation(gate x) * up x`
    GatedParams { gate: Matrix, up: Matrix, x: u64, x_q8: u64, out: u64, out_q8: u64, columns: i32, activation: i32 }
    /// A residual connection and the norm that follows.
    NormParams { x: u64, y: u64, y_weight: u64, weight: u64, out: u64, out_q8: u64, columns: i32, eps: f32 }
    /// A token's query, key and value.
    WriteParams {
        qkv: u64, q_norm: u64, k_norm: u64, frequencies: u64, position: u64, pages: u64, q: u64, k: u64, v: u64, summaries: u64,
        kind: i32, block_size: i32, max_pages: i32, group_size: i32, head_dim: i32, eps: f32, magnitude: f32,
    }
    /// Rows of a matrix.
    RowsParams { matrix: Matrix, ids: u64, out: u64, columns: i32, factor: f32 }
    /// A matrix as bf16.
    UnpackParams { matrix: Matrix, out: u64, columns: i32 }
    /// Numbers in 8 bits.
    QuantizeParams { x: u64, out: u64, columns: i32, tokens: i32 }
    /// f32 to bf16.
    RoundParams { x: u64, out: u64, count: i64 }
    /// The likeliest token.
    LikeliestParams { logits: u64, id: u64, count: i32 }
}

#[cfg(test)]
mod tests {
    use super::MIRRORS;

    /// Names and offsets of the fields of a struct of plain C, its size, and what it is aligned to.
    fn layout(text: &str, name: &str) -> (usize, usize, Vec<(String, usize)>) {
        let body = text.split_once(&format!("struct {name} {{")).unwrap().1.split_once("};").unwrap().0;
        let (mut at, mut largest, mut fields) = (0usize, 1, Vec::new());
        for line in body.lines().filter_map(|line| line.split("//").next()?.trim().strip_suffix(';')) {
            let (kind, field) = line.rsplit_once(' ').unwrap();
            let (field, count) = match field.split_once('[') {
                Some((field, count)) => (field, count.trim_end_matches(']').parse().unwrap()),
                None => (field, 1),
            };
            let (size, align) = match kind {
                _ if field.starts_with('*') => (8, 8),
                "int" | "float" => (4, 4),
                "int64_t" => (8, 8),
                other => {
                    let (size, align, _) = layout(text, other);
                    (size, align)
                }
            };
            at = at.next_multiple_of(align);
            largest = largest.max(align);
            fields.push((field.trim_start_matches('*').to_string(), at));
            at += size * count;
        }
        (at.next_multiple_of(largest), largest, fields)
    }

    #[test]
    fn structs_lie_as_layer_params_h_says() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../kernels/layer_params.h")).unwrap();
        for (name, size, fields) in MIRRORS {
            let (want_size, _, want) = layout(&text, name);
            let fields: Vec<(String, usize)> = fields.iter().map(|(field, at)| (field.to_string(), *at)).collect();
            assert_eq!((*size, fields), (want_size, want), "{name}");
        }
    }
}
