//! One row per complete block of keys: what block routers score instead of the keys themselves.

use super::{PAGE_SIZE, PageTable};
use candle_core::{DType, Result, Tensor};

/// What is kept of each block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Summary {
    /// Nothing: the router needs none.
    None,
    /// The mean of its keys.
    Mean,
    /// The smallest and the largest value of each dimension.
    MinMax,
}

/// The summaries of one layer, made as blocks are complete, on the host in f32.
#[derive(Debug)]
pub struct Summaries {
    kind: Summary,
    block_size: usize,
    blocks: usize,
    heads: Vec<Rows>,
}

/// One head's summaries, `[blocks, head_dim]` each.
#[derive(Debug, Clone, Default)]
pub struct Rows {
    /// Means, or the smallest values.
    pub low: Vec<f32>,
    /// The largest values; empty for means.
    pub high: Vec<f32>,
}

impl Summaries {
    pub(super) fn new(kind: Summary, block_size: usize, kv_heads: usize) -> Self {
        Self { kind, block_size, blocks: 0, heads: vec![Rows::default(); kv_heads] }
    }

    pub(super) fn is_of(&self, kind: Summary, block_size: usize) -> bool {
        self.kind == kind && self.block_size == block_size
    }

    /// Blocks that are summarised: `0..blocks`.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// One head's rows.
    pub fn head(&self, head: usize) -> &Rows {
        &self.heads[head]
    }

    /// Forgets blocks that hold a position from `len` on.
    pub(super) fn truncate(&mut self, len: usize, head_dim: usize) {
        self.blocks = self.blocks.min(len / self.block_size);
        for rows in &mut self.heads {
            rows.low.truncate(self.blocks * head_dim);
            rows.high.truncate(self.blocks * head_dim);
        }
    }

    /// Adds the blocks that are complete once `len` keys are written.
    pub(super) fn extend(&mut self, k_pages: &Tensor, table: &PageTable, len: usize) -> Result<()> {
        let complete = len / self.block_size;
        if complete <= self.blocks || self.kind == Summary::None {
            return Ok(());
        }
        let (positions, new) = (self.blocks * self.block_size..complete * self.block_size, complete - self.blocks);
        let head_dim = k_pages.dim(2)?;
        let slots = k_pages.flatten_to(1)?; // [pages * PAGE_SIZE, head_dim]
        for (head, rows) in self.heads.iter_mut().enumerate() {
            let pages = table.head(head);
            let ids: Vec<u32> = positions.clone().map(|p| pages[p / PAGE_SIZE] * PAGE_SIZE as u32 + (p % PAGE_SIZE) as u32).collect();
            let keys = slots.index_select(&Tensor::new(ids, k_pages.device())?, 0)?.to_dtype(DType::F32)?;
            let keys = keys.reshape((new, self.block_size, head_dim))?;
            let flat = |tensor: Tensor| tensor.flatten_all()?.to_vec1::<f32>();
            match self.kind {
                Summary::None => {}
                Summary::Mean => rows.low.extend(flat(keys.mean(1)?)?),
                Summary::MinMax => {
                    rows.low.extend(flat(keys.min(1)?)?);
                    rows.high.extend(flat(keys.max(1)?)?);
                }
            }
        }
        self.blocks = complete;
        Ok(())
    }

    pub(super) fn bytes(&self) -> usize {
        self.heads.iter().map(|rows| rows.low.capacity() + rows.high.capacity()).sum::<usize>() * size_of::<f32>()
    }
}
