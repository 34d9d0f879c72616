//! One work item: a tile of queries against some keys of one head.

use crate::backend::reads::{OctetRef, Reads};
use crate::cache::{LANES, OCTET, Step};
use crate::parallel::Places;
use crate::simd::{Numbers, Rows, ValueColumn, add_weighted, all_finite, dot_octets, exp, exp_sum, max, widen_columns, widen_octets};

/// Octets of keys that are scored at a time, an even number: scores and widened keys stay in the caches next to the core.
const BLOCK_OCTETS: usize = 32;

/// From this many rows on, keys and values are widened to f32 once instead of by each few rows.
const WIDEN_ROWS: usize = 16;

/// Buffers that a thread keeps from item to item.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    q: Vec<f32>,      // [rows, head_dim]
    k: Vec<f32>,      // [pairs, head_dim, LANES]
    v: Vec<f32>,      // [columns, head_dim]
    scores: Vec<f32>, // [rows, BLOCK_OCTETS * OCTET]
    pairs: Vec<[u32; 2]>,
    columns: Vec<ValueColumn>,
    /// Of all keys of the queries, and of the next split of them.
    pub(super) whole: Partial,
    pub(super) next: Partial,
}

/// A softmax over some of the keys, not yet divided: row = `(query, head of the group)`.
#[derive(Debug, Default)]
pub(super) struct Partial {
    max: Vec<f32>, // [rows], -inf: no key yet
    sum: Vec<f32>, // [rows]
    out: Vec<f32>, // [rows, head_dim]
    head_dim: usize,
}

impl Partial {
    /// No key yet.
    pub(super) fn reset(&mut self, rows: usize, head_dim: usize) {
        let fill = |list: &mut Vec<f32>, count: usize, value: f32| {
            list.clear();
            list.resize(count, value);
        };
        fill(&mut self.max, rows, f32::NEG_INFINITY);
        fill(&mut self.sum, rows, 0.0);
        fill(&mut self.out, rows * head_dim, 0.0);
        self.head_dim = head_dim;
    }

    /// Adds the keys of `other`.
    pub(super) fn merge(&mut self, other: &Self) {
        for row in 0..self.max.len() {
            if other.max[row] == f32::NEG_INFINITY {
                continue; // or -inf - -inf below would be NaN
            }
            let max = self.max[row].max(other.max[row]);
            let (a, b) = (exp(self.max[row] - max), exp(other.max[row] - max));
            self.sum[row] = self.sum[row] * a + other.sum[row] * b;
            let out = &mut self.out[row * self.head_dim..][..self.head_dim];
            for (x, y) in out.iter_mut().zip(&other.out[row * self.head_dim..]) {
                *x = *x * a + y * b;
            }
            self.max[row] = max;
        }
    }

    /// Divides and stores the queries and heads of `reads` into `out` `[q_len, q_heads, head_dim]`, which no other thread may
    /// be writing.
    pub(super) fn write(&self, reads: &Reads<'_>, step: Step, out: &Places<f32>) {
        let shape = reads.store.shape();
        let group_size = shape.group_size();
        for (row, (values, sum)) in self.out.chunks_exact(self.head_dim).zip(&self.sum).enumerate() {
            let query = reads.queries.start - step.start + row / group_size;
            let head = reads.kv_head * group_size + row % group_size;
            let first = (query * shape.q_heads() + head) * self.head_dim;
            for (i, value) in values.iter().enumerate() {
                // SAFETY: the query is one of the step and the head one of the layer's; the caller's: only this thread writes them.
                unsafe { out.at(first + i).write(value / sum) };
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
    scratch.scores.resize(rows * BLOCK_OCTETS * OCTET, 0.0);

    for part in reads.parts(BLOCK_OCTETS) {
        let octets = &reads.octets[part];
        let stride = octets.len().next_multiple_of(2) * OCTET;
        score(octets, rows, k, scratch);
        let scores = &mut scratch.scores[..rows * stride];
        hide(reads, octets, group_size, scores);
        for (row, scores) in scores.chunks_exact_mut(stride).enumerate() {
            let max = partial.max[row].max(max(scores));
            if max == f32::NEG_INFINITY {
                scores.fill(0.0); // no key of these is visible: -inf - -inf would be NaN
                continue;
            }
            let correction = if max == partial.max[row] { 1.0 } else { (partial.max[row] - max).exp() };
            partial.sum[row] = partial.sum[row] * correction + exp_sum(scores, max);
            if correction != 1.0 {
                partial.out[row * head_dim..][..head_dim].iter_mut().for_each(|x| *x *= correction);
            }
            partial.max[row] = max;
        }
        weigh(reads, octets, rows, v, scratch, partial);
    }
}

/// `scores[rows, pairs * LANES] = q[rows, head_dim] . k'`
fn score(octets: &[OctetRef], rows: usize, k: Rows<'_>, scratch: &mut Scratch) {
    scratch.pairs.clear();
    // A last one without a partner is its own; `hide` hides the copy.
    scratch.pairs.extend(octets.chunks(2).map(|pair| [pair[0].octet, pair[pair.len() - 1].octet]));
    let scores = &mut scratch.scores[..rows * scratch.pairs.len() * LANES];
    if rows < WIDEN_ROWS {
        return dot_octets(k, &scratch.q, &scratch.pairs, scores);
    }
    scratch.k.resize(scratch.pairs.len() * k.width * LANES, 0.0);
    widen_octets(k, &scratch.pairs, &mut scratch.k);
    for (pair, first) in scratch.pairs.iter_mut().zip((0..).step_by(2)) {
        *pair = [first, first + 1];
    }
    dot_octets(Rows { numbers: Numbers::F32(&scratch.k), width: k.width }, &scratch.q, &scratch.pairs, scores);
}

/// For each mask of an octet, all bits of the lanes in it.
static LANES_OF: [[u32; OCTET]; 256] = {
    let mut masks = [[0; OCTET]; 256];
    let mut mask = 0;
    while mask < 256 {
        let mut lane = 0;
        while lane < OCTET {
            masks[mask][lane] = if mask >> lane & 1 == 1 { u32::MAX } else { 0 };
            lane += 1;
        }
        mask += 1;
    }
    masks
};

/// Hides the lanes that a query does not see.
fn hide(reads: &Reads<'_>, octets: &[OctetRef], group_size: usize, scores: &mut [f32]) {
    let stride = octets.len().next_multiple_of(2) * OCTET;
    for (index, octet) in octets.iter().enumerate() {
        let shared = reads.is_shared(*octet).then(|| reads.visible(*octet, reads.queries.start));
        if shared == Some(u8::MAX) {
            continue;
        }
        for (query, scores) in scores.chunks_exact_mut(group_size * stride).enumerate() {
            let visible = shared.unwrap_or_else(|| reads.visible(*octet, reads.queries.start + query));
            for scores in scores.chunks_exact_mut(stride) {
                // By bits, not by branches: with a token router most octets are read in part.
                let lanes = &LANES_OF[usize::from(visible)];
                for (score, lane) in scores[index * OCTET..][..OCTET].iter_mut().zip(lanes) {
                    *score = f32::from_bits(score.to_bits() & lane | f32::NEG_INFINITY.to_bits() & !lane);
                }
            }
        }
    }
    if !octets.len().is_multiple_of(2) {
        scores.chunks_exact_mut(stride).for_each(|scores| scores[stride - OCTET..].fill(f32::NEG_INFINITY));
    }
}

/// The slots that some query of the item sees.
fn collect_columns(reads: &Reads<'_>, octets: &[OctetRef], columns: &mut Vec<ValueColumn>) {
    columns.clear();
    for (index, octet) in octets.iter().enumerate() {
        let seen = if reads.is_shared(*octet) {
            reads.visible(*octet, reads.queries.start)
        } else {
            reads.queries.clone().fold(0, |seen, t| seen | reads.visible(*octet, t))
        };
        let (slot, weight) = (octet.first_slot(), (index * OCTET) as u32);
        let all = (0..OCTET as u32).map(|lane| ValueColumn { slot: slot + lane, weight: weight + lane });
        match seen {
            u8::MAX => columns.extend(all),
            _ => {
                let mut seen = seen;
                while seen != 0 {
                    let lane = seen.trailing_zeros();
                    columns.push(ValueColumn { slot: slot + lane, weight: weight + lane });
                    seen &= seen - 1;
                }
            }
        }
    }
}

/// `out[rows, head_dim] += weights[rows, pairs * LANES] . v`
fn weigh(reads: &Reads<'_>, octets: &[OctetRef], rows: usize, v: Rows<'_>, scratch: &mut Scratch, partial: &mut Partial) {
    collect_columns(reads, octets, &mut scratch.columns);
    let stride = octets.len().next_multiple_of(2) * OCTET;
    let weights = &scratch.scores[..rows * stride];
    // A weight of 0 must hide what it weighs, and 0 * NaN does not. Only where queries see different lanes can it happen.
    let mixed = octets.iter().any(|octet| !reads.is_shared(*octet));
    if rows < WIDEN_ROWS && !mixed {
        return add_weighted(v, weights, stride, &scratch.columns, &mut partial.out);
    }
    let head_dim = v.width;
    scratch.v.resize(scratch.columns.len() * head_dim, 0.0);
    widen_columns(v, &scratch.columns, &mut scratch.v);
    if mixed && !all_finite(&scratch.v) {
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
