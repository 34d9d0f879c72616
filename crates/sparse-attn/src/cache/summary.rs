//! One row per complete block of keys: what block routers score instead of the keys themselves.

use super::{KvDtype, Order, PAGE_SIZE, Pool};
use crate::{HeadShape, parallel};
use candle_core::{Device, Result, Tensor};
use half::{bf16, f16};

/// What is kept of each block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Summary {
    /// Nothing: the router needs none.
    None,
    /// The mean of its keys, `head_dim` numbers.
    Mean,
    /// The largest value of each dimension, then the smallest: `2 * head_dim` numbers.
    MaxMin,
    /// The mean of its keys, then the standard deviation of each dimension: `2 * head_dim` numbers.
    MeanDeviation,
}

impl Summary {
    /// Numbers per block.
    pub fn width(self, head_dim: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Mean => head_dim,
            Self::MaxMin | Self::MeanDeviation => 2 * head_dim,
        }
    }

    /// How it is stored beside keys stored as `k`: minima and maxima of 16-bit keys are 16-bit numbers; means and deviations
    /// are estimates anyway, and 8 bits do.
    fn dtype(self, k: KvDtype) -> KvDtype {
        match (self, k) {
            (Self::MeanDeviation, KvDtype::F16 | KvDtype::Bf16 | KvDtype::Q8_0) => KvDtype::Q8_0,
            (_, KvDtype::Q8_0) => KvDtype::F16,
            (_, k) => k,
        }
    }

    /// Bytes for the blocks of `capacity` positions of a layer of `shape` whose keys are stored as `k`.
    pub fn planned_bytes(self, k: KvDtype, shape: HeadShape, capacity: usize, block_size: usize) -> usize {
        let pages = capacity.div_ceil(block_size).div_ceil(PAGE_SIZE);
        Pool::page_bytes(self.dtype(k), self.width(shape.head_dim()), pages * shape.kv_heads())
    }

    /// The summary of `keys` `[n, head_dim]`, rounded so that what is stored as `dtype` is still a bound.
    fn of(self, keys: &[f32], head_dim: usize, dtype: KvDtype) -> Vec<f32> {
        let rows = || keys.chunks_exact(head_dim);
        let fold = |start: f32, f: fn(f32, f32) -> f32| {
            let mut out = vec![start; head_dim];
            rows().for_each(|row| out.iter_mut().zip(row).for_each(|(out, x)| *out = f(*out, *x)));
            out
        };
        let mean = || {
            let count = rows().count() as f32;
            fold(0.0, |sum, x| sum + x).into_iter().map(|sum| sum / count).collect::<Vec<f32>>()
        };
        match self {
            Self::None => Vec::new(),
            Self::Mean => mean(),
            Self::MeanDeviation => {
                let mean = mean();
                let mut variance = vec![0f32; head_dim];
                for row in rows() {
                    variance.iter_mut().zip(row).zip(&mean).for_each(|((sum, x), mean)| *sum += (x - mean) * (x - mean));
                }
                let count = rows().count() as f32;
                mean.into_iter().chain(variance.into_iter().map(|sum| (sum / count).sqrt())).collect()
            }
            Self::MaxMin => {
                let high = fold(f32::NEG_INFINITY, f32::max).into_iter().map(|x| round_up(x, dtype));
                let low = fold(f32::INFINITY, f32::min).into_iter().map(|x| -round_up(-x, dtype));
                high.chain(low).collect()
            }
        }
    }
}

/// The smallest number of `dtype` that is not below `x`.
fn round_up(x: f32, dtype: KvDtype) -> f32 {
    // The next 16-bit float: its bits as a sign and a magnitude.
    let next = |bits: u16| if bits >> 15 == 0 { bits + 1 } else { bits - 1 };
    match dtype {
        KvDtype::F32 | KvDtype::Q8_0 => x,
        KvDtype::F16 => {
            let near = f16::from_f32(x);
            if near.to_f32() >= x || !x.is_finite() { near.to_f32() } else { f16::from_bits(next(near.to_bits())).to_f32() }
        }
        KvDtype::Bf16 => {
            let near = bf16::from_f32(x);
            if near.to_f32() >= x || !x.is_finite() { near.to_f32() } else { bf16::from_bits(next(near.to_bits())).to_f32() }
        }
    }
}

/// The summaries of one layer, made as blocks are complete.
///
/// Block `b` of head `h` is row `b % PAGE_SIZE` of the pool's page `b / PAGE_SIZE * kv_heads + h`.
#[derive(Debug)]
pub struct Summaries {
    kind: Summary,
    block_size: usize,
    blocks: usize,
    kv_heads: usize,
    head_dim: usize,
    pool: Pool,
}

impl Summaries {
    pub(super) fn new(kind: Summary, block_size: usize, [kv_heads, head_dim]: [usize; 2], keys: KvDtype, device: &Device) -> Result<Self> {
        let pool = Pool::new(kind.dtype(keys), Order::Tiles, kind.width(head_dim), 0, device)?;
        Ok(Self { kind, block_size, blocks: 0, kv_heads, head_dim, pool })
    }

    /// What is kept of each.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "of builds with a GPU"))]
    pub(crate) fn kind(&self) -> Summary {
        self.kind
    }

    /// Positions of each.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "of builds with a GPU"))]
    pub(crate) fn block_size(&self) -> usize {
        self.block_size
    }

    pub(super) fn is_of(&self, kind: Summary, block_size: usize) -> bool {
        self.kind == kind && self.block_size == block_size
    }

    /// Blocks that are summarised: `0..blocks`.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The rows.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The pages of `head` in the pool, ascending.
    pub fn pages(&self, head: usize) -> impl Iterator<Item = u32> {
        (0..self.blocks.div_ceil(PAGE_SIZE)).map(move |page| (page * self.kv_heads + head) as u32)
    }

    /// Forgets blocks that hold a position from `len` on.
    pub(super) fn truncate(&mut self, len: usize) {
        self.blocks = self.blocks.min(len / self.block_size);
    }

    /// Blocks that are complete once `len` keys are written, and not summarised yet.
    pub(super) fn missing(&self, len: usize) -> std::ops::Range<usize> {
        self.blocks..(len / self.block_size).max(self.blocks)
    }

    /// Makes room for `blocks` blocks.
    pub(super) fn reserve(&mut self, blocks: usize) -> Result<()> {
        let pages = blocks.div_ceil(PAGE_SIZE) * self.kv_heads;
        if pages > self.pool.pages() {
            self.pool = self.pool.grown(pages)?;
        }
        Ok(())
    }

    /// Notes that the next `new` blocks are summarised where they are.
    pub(super) fn advance(&mut self, new: usize) {
        self.blocks += new;
    }

    /// Adds the next `new` blocks: per head, the ascending positions of their admitted keys, and those, `[positions, head_dim]`.
    pub(super) fn extend(&mut self, new: usize, heads: &[(Vec<usize>, Vec<f32>)]) -> Result<()> {
        self.reserve(self.blocks + new)?;
        let keys = |head: usize, block: usize| {
            let (positions, keys) = &heads[head];
            let before = |position: usize| positions.partition_point(|at| *at < position);
            let rows = before(block * self.block_size)..before((block + 1) * self.block_size);
            &keys[rows.start * self.head_dim..rows.end * self.head_dim]
        };
        let blocks = (0..heads.len()).flat_map(|head| (self.blocks..self.blocks + new).map(move |block| (head, block)));
        let blocks: Vec<(usize, usize)> = blocks.filter(|(head, block)| !keys(*head, *block).is_empty()).collect();
        let slot = |(head, block): &(usize, usize)| {
            let page = block / PAGE_SIZE * self.kv_heads + head;
            (page * PAGE_SIZE + block % PAGE_SIZE) as u32
        };
        let slots: Vec<u32> = blocks.iter().map(slot).collect();
        if !slots.is_empty() {
            let row = |index: usize| {
                let (head, block) = blocks[index];
                self.kind.of(keys(head, block), self.head_dim, self.pool.dtype())
            };
            let rows = parallel::map(blocks.len(), row).concat();
            let rows = Tensor::from_vec(rows, (slots.len(), self.pool.width()), self.pool.values().device())?;
            self.pool.write(&rows, &slots)?;
        }
        self.blocks += new;
        Ok(())
    }

    pub(super) fn fork(&self) -> Result<Self> {
        Ok(Self { pool: self.pool.grown(self.pool.pages())?, ..*self })
    }

    pub(super) fn bytes(&self) -> usize {
        self.pool.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rounded_bound_is_a_bound_and_a_near_one() {
        for dtype in [KvDtype::F16, KvDtype::Bf16] {
            for i in -4000..4000 {
                let x = i as f32 * 1.000_37e-3;
                let up = round_up(x, dtype);
                assert!(up >= x && up - x <= x.abs() / 100.0 + 1e-6, "{dtype:?}: {x} -> {up}");
            }
        }
        assert_eq!(round_up(f32::NEG_INFINITY, KvDtype::F16), f32::NEG_INFINITY);
    }
}
