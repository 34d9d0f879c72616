//! One work item: a tile of queries against some keys of one head.

use super::Work;
use super::reads::{Reads, TileRef};
use crate::HeadShape;
use crate::cache::{LANES, Step};
use crate::simd::{Numbers, Rows, ValueColumn, add_weighted, dot_tiles, exp_sum, max};

/// Key tiles that are scored at a time: scores and widened keys stay in the caches next to the core.
const BLOCK_TILES: usize = 8;

/// From this many rows on, keys and values are widened to f32 once instead of by each few rows.
const WIDEN_ROWS: usize = 16;

/// Buffers that a thread keeps from item to item.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    q: Vec<f32>,      // [rows, head_dim]
    k: Vec<f32>,      // [BLOCK_TILES, head_dim, LANES]
    v: Vec<f32>,      // [columns, head_dim]
    scores: Vec<f32>, // [rows, BLOCK_TILES * LANES]
    tiles: Vec<u32>,
    columns: Vec<ValueColumn>,
}

/// A softmax over some of the keys, not yet divided: row = `(query, head of the group)`.
#[derive(Debug)]
pub(super) struct Partial {
    max: Vec<f32>, // [rows], -inf: no key yet
    sum: Vec<f32>, // [rows]
    out: Vec<f32>, // [rows, head_dim]
    head_dim: usize,
}

impl Partial {
    pub(super) fn new(rows: usize, head_dim: usize) -> Self {
        Self { max: vec![f32::NEG_INFINITY; rows], sum: vec![0.0; rows], out: vec![0.0; rows * head_dim], head_dim }
    }

    /// Adds the keys of `other`.
    pub(super) fn merge(&mut self, other: &Self) {
        for row in 0..self.max.len() {
            if other.max[row] == f32::NEG_INFINITY {
                continue; // or -inf - -inf below would be NaN
            }
            let max = self.max[row].max(other.max[row]);
            let (a, b) = ((self.max[row] - max).exp(), (other.max[row] - max).exp());
            self.sum[row] = self.sum[row] * a + other.sum[row] * b;
            let out = &mut self.out[row * self.head_dim..][..self.head_dim];
            for (x, y) in out.iter_mut().zip(&other.out[row * self.head_dim..]) {
                *x = *x * a + y * b;
            }
            self.max[row] = max;
        }
    }

    /// Divides and stores into `out` `[q_len, q_heads, head_dim]`.
    pub(super) fn write(&self, work: &Work, step: Step, shape: HeadShape, out: &mut [f32]) {
        let group_size = shape.group_size();
        for (row, (values, sum)) in self.out.chunks_exact(self.head_dim).zip(&self.sum).enumerate() {
            let query = work.queries.start - step.start + row / group_size;
            let head = work.kv_head * group_size + row % group_size;
            let to = &mut out[(query * shape.q_heads() + head) * self.head_dim..][..self.head_dim];
            for (to, value) in to.iter_mut().zip(values) {
                *to = value / sum;
            }
        }
    }
}

/// Computes one item into `partial`.
///
/// - `q`: `[q_len, q_heads, head_dim]`
/// - `kv`: the pools of keys (in tiles) and of values
pub(super) fn attend(
    reads: &Reads<'_>,
    q: &[f32],
    scale: f32,
    [k, v]: [Rows<'_>; 2],
    step: Step,
    scratch: &mut Scratch,
    partial: &mut Partial,
) {
    let shape = reads.store.shape();
    let (head_dim, group_size) = (shape.head_dim(), shape.group_size());
    let rows = reads.queries.len() * group_size;
    scratch.q.clear();
    for t in reads.queries.clone() {
        let from = ((t - step.start) * shape.q_heads() + reads.kv_head * group_size) * head_dim;
        scratch.q.extend(q[from..from + group_size * head_dim].iter().map(|x| x * scale));
    }
    scratch.scores.resize(rows * BLOCK_TILES * LANES, 0.0);

    for tiles in reads.tiles.chunks(BLOCK_TILES) {
        let stride = tiles.len() * LANES;
        score(tiles, rows, k, scratch);
        let scores = &mut scratch.scores[..rows * stride];
        hide(reads, tiles, group_size, scores);
        for (row, scores) in scores.chunks_exact_mut(stride).enumerate() {
            let max = partial.max[row].max(max(scores));
            if max == f32::NEG_INFINITY {
                scores.fill(0.0); // no key of these is visible: -inf - -inf would be NaN
                continue;
            }
            let correction = (partial.max[row] - max).exp();
            partial.sum[row] = partial.sum[row] * correction + exp_sum(scores, max);
            if correction != 1.0 {
                partial.out[row * head_dim..][..head_dim].iter_mut().for_each(|x| *x *= correction);
            }
            partial.max[row] = max;
        }
        collect_columns(reads, tiles, &mut scratch.columns);
        weigh(reads, tiles, rows, v, scratch, partial);
    }
}

/// `scores[rows, tiles * LANES] = q[rows, head_dim] . k'`
fn score(tiles: &[TileRef], rows: usize, k: Rows<'_>, scratch: &mut Scratch) {
    let scores = &mut scratch.scores[..rows * tiles.len() * LANES];
    scratch.tiles.clear();
    if rows < WIDEN_ROWS {
        scratch.tiles.extend(tiles.iter().map(|tile| tile.tile));
        return dot_tiles(k, &scratch.q, &scratch.tiles, scores);
    }
    scratch.tiles.extend(0..tiles.len() as u32);
    scratch.k.resize(BLOCK_TILES * k.width * LANES, 0.0);
    for (tile, wide) in tiles.iter().zip(scratch.k.chunks_exact_mut(k.width * LANES)) {
        k.widen_tile(tile.tile as usize, wide);
    }
    dot_tiles(Rows { numbers: Numbers::F32(&scratch.k), width: k.width }, &scratch.q, &scratch.tiles, scores);
}

/// Hides the lanes that a query does not see.
fn hide(reads: &Reads<'_>, tiles: &[TileRef], group_size: usize, scores: &mut [f32]) {
    let stride = tiles.len() * LANES;
    for (index, tile) in tiles.iter().enumerate() {
        let shared = reads.is_shared(*tile).then(|| reads.visible(*tile, reads.queries.start));
        if shared == Some(u16::MAX) {
            continue;
        }
        for (query, scores) in scores.chunks_exact_mut(group_size * stride).enumerate() {
            let visible = shared.unwrap_or_else(|| reads.visible(*tile, reads.queries.start + query));
            for scores in scores.chunks_exact_mut(stride) {
                for (lane, score) in scores[index * LANES..][..LANES].iter_mut().enumerate() {
                    if visible >> lane & 1 == 0 {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// The slots that some query of the item sees.
fn collect_columns(reads: &Reads<'_>, tiles: &[TileRef], columns: &mut Vec<ValueColumn>) {
    columns.clear();
    for (index, tile) in tiles.iter().enumerate() {
        let seen = if reads.is_shared(*tile) {
            reads.visible(*tile, reads.queries.start)
        } else {
            reads.queries.clone().fold(0, |seen, t| seen | reads.visible(*tile, t))
        };
        let lanes = (0..LANES).filter(|lane| seen >> lane & 1 == 1);
        columns.extend(lanes.map(|lane| ValueColumn { slot: tile.slot(lane), weight: (index * LANES + lane) as u32 }));
    }
}

/// `out[rows, head_dim] += weights[rows, tiles * LANES] . v`
fn weigh(reads: &Reads<'_>, tiles: &[TileRef], rows: usize, v: Rows<'_>, scratch: &mut Scratch, partial: &mut Partial) {
    let stride = tiles.len() * LANES;
    let weights = &scratch.scores[..rows * stride];
    // A weight of 0 must hide what it weighs, and 0 * NaN does not. Only where queries see different lanes can it happen.
    let mixed = tiles.iter().any(|tile| !reads.is_shared(*tile));
    if rows < WIDEN_ROWS && !mixed {
        return add_weighted(v, weights, stride, &scratch.columns, &mut partial.out);
    }
    let head_dim = v.width;
    scratch.v.resize(scratch.columns.len() * head_dim, 0.0);
    for (column, wide) in scratch.columns.iter().zip(scratch.v.chunks_exact_mut(head_dim)) {
        v.widen_row(column.slot as usize, wide);
    }
    if mixed && !scratch.v.iter().all(|x| x.is_finite()) {
        for (weights, out) in weights.chunks_exact(stride).zip(partial.out.chunks_exact_mut(head_dim)) {
            for (column, value) in scratch.columns.iter().zip(scratch.v.chunks_exact(head_dim)) {
                let weight = weights[column.weight as usize];
                if weight != 0.0 {
                    out.iter_mut().zip(value).for_each(|(x, v)| *x = weight.mul_add(*v, *x));
                }
            }
        }
        return;
    }
    for (slot, column) in (0..).zip(&mut scratch.columns) {
        column.slot = slot;
    }
    add_weighted(Rows { numbers: Numbers::F32(&scratch.v), width: head_dim }, weights, stride, &scratch.columns, &mut partial.out);
}
