//! One work item: a tile of queries against a range of keys of one head.

use super::element::Element;
use super::softmax::exp_sum;
use crate::HeadShape;
use crate::cache::{LayerStore, PAGE_SIZE, Step};
use crate::matrix::{Matrix, multiply};
use std::ops::Range;

/// Keys that are widened to f32 and multiplied at a time: a few pages, small enough for the L2 cache.
const KEY_TILE: usize = 4 * PAGE_SIZE;

/// The queries and keys of an item, as positions.
#[derive(Debug, Clone)]
pub(super) struct Work {
    pub(super) kv_head: usize,
    pub(super) queries: Range<usize>,
    /// Ascending, apart from each other.
    pub(super) keys: Vec<Range<usize>>,
}

/// Buffers that a thread keeps from item to item.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    q: Vec<f32>,      // [rows, head_dim]
    k: Vec<f32>,      // [KEY_TILE, head_dim]
    v: Vec<f32>,      // [KEY_TILE, head_dim]
    scores: Vec<f32>, // [rows, KEY_TILE]
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

/// Cuts `ranges` into groups of up to `most` keys: ranges are cut at multiples of `most`, then put together as they
/// fit. So what one long range is cut into depends on its positions alone.
pub(super) fn cut(ranges: &[Range<usize>], most: usize) -> Vec<Vec<Range<usize>>> {
    let mut groups: Vec<Vec<Range<usize>>> = Vec::new();
    let mut keys = most; // of the last group: full, so the first piece opens one
    for range in ranges {
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min((start / most + 1) * most);
            if keys + (end - start) > most {
                groups.push(Vec::new());
                keys = 0;
            }
            keys += end - start;
            if let Some(group) = groups.last_mut() {
                group.push(start..end);
            }
            start = end;
        }
    }
    groups
}

/// Computes one item into `partial`.
///
/// - `q`: `[q_len, q_heads, head_dim]`
/// - `k_pages`, `v_pages`: `[pages, PAGE_SIZE, head_dim]`
#[expect(clippy::too_many_arguments, reason = "a kernel's arguments, each a different thing")]
pub(super) fn attend<T: Element>(
    work: &Work,
    q: &[f32],
    scale: f32,
    k_pages: &[T],
    v_pages: &[T],
    store: &LayerStore,
    step: Step,
    scratch: &mut Scratch,
    partial: &mut Partial,
) {
    let shape = store.shape();
    let (head_dim, group_size) = (shape.head_dim(), shape.group_size());
    let rows = work.queries.len() * group_size;
    scratch.q.clear();
    for t in work.queries.clone() {
        let from = ((t - step.start) * shape.q_heads() + work.kv_head * group_size) * head_dim;
        scratch.q.extend(q[from..from + group_size * head_dim].iter().map(|x| x * scale));
    }
    scratch.k.resize(KEY_TILE * head_dim, 0.0);
    scratch.v.resize(KEY_TILE * head_dim, 0.0);
    scratch.scores.resize(rows * KEY_TILE, 0.0);

    let pages = store.table().head(work.kv_head);
    for group in cut(&work.keys, KEY_TILE) {
        let keys: usize = group.iter().map(ExactSizeIterator::len).sum();
        let mut at = 0;
        for range in &group {
            gather(k_pages, pages, range.clone(), head_dim, &mut scratch.k[at * head_dim..]);
            gather(v_pages, pages, range.clone(), head_dim, &mut scratch.v[at * head_dim..]);
            at += range.len();
        }
        let scores = &mut scratch.scores[..rows * keys];
        // scores[rows, keys] = q[rows, head_dim] . k[keys, head_dim]'
        multiply(1.0, Matrix::rows(&scratch.q, head_dim), Matrix::columns(&scratch.k, head_dim), [rows, keys, head_dim], scores, false);
        for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
            hide(scores, &group, work.queries.start + row / group_size, store);
            let tile_max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let max = partial.max[row].max(tile_max);
            if max == f32::NEG_INFINITY {
                scores.fill(0.0); // no key of this tile is visible: -inf - -inf would be NaN
                continue;
            }
            let correction = (partial.max[row] - max).exp();
            partial.sum[row] = partial.sum[row] * correction + exp_sum(scores, max);
            if correction != 1.0 {
                partial.out[row * head_dim..][..head_dim].iter_mut().for_each(|x| *x *= correction);
            }
            partial.max[row] = max;
        }
        let values = &scratch.v[..keys * head_dim];
        if values.iter().all(|x| x.is_finite()) {
            // out[rows, head_dim] += scores[rows, keys] . v[keys, head_dim]
            multiply(1.0, Matrix::rows(scores, keys), Matrix::rows(values, head_dim), [rows, head_dim, keys], &mut partial.out, true);
        } else {
            // A weight of 0 must hide what it weighs, and 0 * NaN does not.
            for (weights, out) in scores.chunks_exact(keys).zip(partial.out.chunks_exact_mut(head_dim)) {
                for (weight, value) in weights.iter().zip(values.chunks_exact(head_dim)).filter(|(weight, _)| **weight != 0.0) {
                    out.iter_mut().zip(value).for_each(|(x, v)| *x += weight * v);
                }
            }
        }
    }
}

/// Hides from the query at `t` the keys of its future, and those that its layer's sliding window has left.
fn hide(scores: &mut [f32], ranges: &[Range<usize>], t: usize, store: &LayerStore) {
    let mut rest = scores;
    for range in ranges {
        let (here, others) = rest.split_at_mut(range.len());
        let before = store.first_visible(t).saturating_sub(range.start).min(here.len());
        let from = (t + 1).saturating_sub(range.start).min(here.len()).max(before);
        here[..before].fill(f32::NEG_INFINITY);
        here[from..].fill(f32::NEG_INFINITY);
        rest = others;
    }
}

/// Widens the slots of `positions` into the first rows of `out`.
fn gather<T: Element>(pool: &[T], pages: &[u32], positions: Range<usize>, head_dim: usize, out: &mut [f32]) {
    let mut position = positions.start;
    while position < positions.end {
        let slot = position % PAGE_SIZE;
        let count = (PAGE_SIZE - slot).min(positions.end - position);
        let from = (pages[position / PAGE_SIZE] as usize * PAGE_SIZE + slot) * head_dim;
        let to = (position - positions.start) * head_dim;
        T::widen(&pool[from..from + count * head_dim], &mut out[to..to + count * head_dim]);
        position += count;
    }
}
