//! What kernels/params.h says, in Rust. Addresses are of the device; see there for shapes.

/// Declares mirrors of the structs of params.h, and what the test compares.
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
    /// Attention of one query.
    DecodeParams {
        q: u64, k: u64, v: u64, pages: u64, octets: u64, counts: u64, position: u64, partial: u64, tickets: u64, out: u64, out_q8: u64,
        max_pages: i32, max_octets: i32, group_size: i32, sliding_window: i32, local_window: i32, scale: f32,
    }
    /// Attention of many queries.
    PrefillParams {
        q: u64, k: u64, v: u64, pages: u64, octets: u64, counts: u64, firsts: u64, lists: u64, out: u64,
        max_pages: i32, max_octets: i32, start: i32, tokens: i32, tile: i32, kv_heads: i32, group_size: i32, sliding_window: i32,
        local_window: i32, scale: f32,
    }
    /// Scores of block summaries.
    ScoreParams {
        q: u64, summaries: u64, position: u64, scores: u64,
        kind: i32, expanded: i32, group_size: i32, max_scores: i32, window: i32, block_size: i32, tile: i32, first_row: i32,
    }
    /// The best blocks.
    SelectParams {
        scores: u64, pages: u64, position: u64, takes: u64, octets: u64, counts: u64, blocks: u64,
        max_scores: i32, max_pages: i32, max_octets: i32, rows: i32, tokens: i32, window: i32, block_size: i32, tile: i32, first_tile: i32,
    }
    /// Rows into slots.
    ScatterParams { rows: u64, slots: u64, pool: u64, count: i32, width: i32 }
    /// Rows to other slots.
    MoveParams { pool: u64, moves: u64, count: i32, width: i32 }
    /// Summaries of complete blocks.
    SummaryParams { k: u64, pages: u64, summaries: u64, kind: i32, max_pages: i32, block_size: i32, first: i32, head_dim: i32 }
    /// Queries made ready to score.
    ExpandParams { q: u64, out: u64, kind: i32, start: i32, tokens: i32, tile: i32, first_row: i32, q_heads: i32, head_dim: i32 }
}

#[cfg(test)]
mod tests {
    use super::MIRRORS;

    /// Names and offsets of the fields of a struct of plain C, and its size.
    fn layout(text: &str, name: &str) -> (usize, Vec<(String, usize)>) {
        let body = text.split_once(&format!("struct {name} {{")).unwrap().1.split_once("};").unwrap().0;
        let (mut at, mut largest, mut fields) = (0usize, 1, Vec::new());
        for line in body.lines().filter_map(|line| line.split("//").next()?.trim().strip_suffix(';')) {
            let (kind, field) = line.rsplit_once(' ').unwrap();
            let size = if field.starts_with('*') {
                8
            } else {
                assert!(matches!(kind, "int" | "float"), "{line}");
                4
            };
            at = at.next_multiple_of(size);
            largest = largest.max(size);
            fields.push((field.trim_start_matches('*').to_string(), at));
            at += size;
        }
        (at.next_multiple_of(largest), fields)
    }

    #[test]
    fn structs_lie_as_params_h_says() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../kernels/params.h")).unwrap();
        for (name, size, fields) in MIRRORS {
            let (want_size, want) = layout(&text, name);
            let fields: Vec<(String, usize)> = fields.iter().map(|(field, at)| (field.to_string(), *at)).collect();
            assert_eq!((*size, fields), (want_size, want), "{name}");
        }
    }
}
