//! What kernels/params.h says, in Rust. Addresses are of the device; see there for shapes.

/// Declares mirrors of the structs of a header in kernels/, and a test that compares them with what it says: plain C of pointers, `int`,
/// `float`, `int64_t`, structs of the same header, and arrays.
#[macro_export]
#[doc(hidden)]
macro_rules! mirrors {
    ($header:literal: $($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, Default)]
            #[repr(C)]
            pub(super) struct $name { $(pub(super) $field: $type),* }
        )*

        #[cfg(test)]
        mod tests {
            use super::*;

            /// The size of a struct of `text`, what it is aligned to, and names and offsets of its fields.
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
            fn structs_lie_as_the_header_says() {
                let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../kernels/", $header)).unwrap();
                $({
                    let fields = vec![$((stringify!($field).to_string(), std::mem::offset_of!($name, $field))),*];
                    let (size, _, want) = layout(&text, stringify!($name));
                    assert_eq!((size_of::<$name>(), fields), (size, want), stringify!($name));
                })*
            }
        }
    };
}

crate::mirrors! { "params.h":
    /// What a token router keeps.
    Kept { pages: u64, counts: u64, masks: u64, ranks: u64, max_pages: i32 }
    /// Attention of one query.
    DecodeParams {
        q: u64, k: u64, v: u64, k_scales: u64, v_scales: u64, pages: u64, kept: Kept, octets: u64, counts: u64, position: u64, partial: u64, tickets: u64, out: u64, out_q8: u64,
        max_pages: i32, max_octets: i32, group_size: i32, sliding_window: i32, local_window: i32, hides_from: i32, scale: f32,
    }
    /// Attention of many queries.
    PrefillParams {
        q: u64, k: u64, v: u64, pages: u64, kept: Kept, octets: u64, counts: u64, firsts: u64, lists: u64, windows: u64,
        out: u64, max_pages: i32, max_octets: i32, frontier: i32, start: i32, tokens: i32, tile: i32, kv_heads: i32, group_size: i32, sliding_window: i32,
        local_window: i32, dense: i32, dense_tiles: i32, is_rounded: i32, by_turns: i32, scale: f32,
    }
    /// Scores of block summaries.
    ScoreParams {
        q: u64, summaries: u64, scales: u64, position: u64, scores: u64,
        kind: i32, expanded: i32, group_size: i32, max_scores: i32, window: i32, block_size: i32, tile: i32, first_row: i32,
    }
    /// The best blocks.
    SelectParams {
        scores: u64, pages: u64, kept: Kept, position: u64, takes: u64, octets: u64, counts: u64, picked: u64, blocks: u64,
        max_scores: i32, max_pages: i32, max_octets: i32, rows: i32, tokens: i32, window: i32, block_size: i32, tile: i32, first_tile: i32,
    }
    /// Rows into slots.
    ScatterParams { rows: u64, slots: u64, pool: u64, scales: u64, count: i32, width: i32, transforms: i32 }
    /// Queries as keys in 8 bits are.
    TransformParams { x: u64, out: u64, count: i64 }
    /// Bytes and scales as 16-bit numbers.
    WidenParams { values: u64, scales: u64, out: u64, count: i64 }
    /// A step's queries, keys and values.
    StoreParams {
        rows: [u64; 3], biases: [u64; 3], norms: [u64; 2], cos: u64, sin: u64, q: u64, pools: [u64; 2], scales: [u64; 2], pages: u64,
        apart: [i32; 3], max_pages: i32, start: i32, tokens: i32, q_heads: i32, kv_heads: i32, head_dim: i32, eps: f32,
    }
    /// All tokens of a layer to new pools.
    CompactedLayer {
        from: [u64; 4], to: [u64; 4], words: [i32; 4], old_pages: u64, old: Kept, pages: u64, kept: Kept,
        old_max_pages: i32, max_pages: i32, kept_pages: i32, recent_pages: i32,
    }
    /// That of some layers.
    CompactParams { layers: [CompactedLayer; 16], tensors: i32 }
    /// Summaries of complete blocks.
    SummaryParams {
        k: u64, k_scales: u64, pages: u64, masks: u64, summaries: u64, scales: u64,
        kind: i32, max_pages: i32, block_size: i32, first: i32, blocks: i32, head_dim: i32,
    }
    /// Those of some layers.
    SummariesParams { layers: [SummaryParams; 32] }
    /// Queries made ready to score.
    ExpandParams { q: u64, out: u64, kind: i32, start: i32, tokens: i32, tile: i32, first_row: i32, q_heads: i32, head_dim: i32 }
    /// Verdicts of a gate.
    VerdictParams { scores: u64, masks: u64, start: i32, tokens: i32, kv_heads: i32, max_pages: i32, sinks: i32, tau: f32 }
    /// Where a layer's verdicts go.
    ToldLayer { masks: u64, told: u64, kv_heads: i32, max_pages: i32 }
    /// Verdicts for the host.
    TellParams { layers: [ToldLayer; 32], first: i32, octets: i32 }
    /// A layer of a gate.
    GateParams {
        x: u64, weight: u64, bias: u64, out: u64, masks: u64,
        start: i32, tokens: i32, rows: i32, columns: i32, is_hidden: i32, max_pages: i32, sinks: i32, tau: f32,
    }
    /// Verdicts of a gate by products that are there.
    ProjectedParams {
        sums: u64, bias: u64, weight: u64, last_bias: u64, masks: u64,
        apart: i32, start: i32, tokens: i32, rows: i32, kv_heads: i32, max_pages: i32, sinks: i32, tau: f32,
    }
    /// A layer that waits for its verdicts.
    WaitingLayer { masks: u64, layer: i32, max_pages: i32 }
    /// Such verdicts of all layers.
    DecideParams {
        first: ProjectedParams, sums_apart: i64, bias_apart: i32, weight_apart: i32, last_bias_apart: i32, layers: [WaitingLayer; 32],
    }
    /// Keys, values and such verdicts.
    StoreProjectedParams { gates: i32, store: StoreParams, gate: ProjectedParams }
    /// Keys, values and verdicts.
    StoreGatedParams { store: StoreParams, gate: GateParams, gates: i32 }
}
