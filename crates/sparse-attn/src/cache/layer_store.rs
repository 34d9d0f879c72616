//! The paged keys and values of one layer.

use super::{NO_PAGE, PAGE_SIZE, PageTable, Step, Summaries, Summary};
use crate::HeadShape;
use candle_core::{DType, Device, Result, Tensor, bail};

/// What the cache must know of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSpec {
    /// Heads of this layer.
    pub shape: HeadShape,
    /// The model's own sliding window: a query at `t` sees positions `(t - sliding_window, t]`.
    /// `None`: all of them.
    pub sliding_window: Option<usize>,
}

/// Keys and values of one layer, in pages of [`PAGE_SIZE`] slots of one head.
///
/// The pools are tensors on the cache's device; backends write into them in place.
#[derive(Debug)]
pub struct LayerStore {
    spec: LayerSpec,
    k_pages: Tensor, // [pages, PAGE_SIZE, head_dim]
    v_pages: Tensor, // [pages, PAGE_SIZE, head_dim]
    table: PageTable,
    written: usize,
    summaries: Option<Summaries>,
}

impl LayerStore {
    pub(super) fn new(spec: LayerSpec, dtype: DType, device: &Device, capacity: usize) -> Result<Self> {
        let dims = (Self::planned_pages(&spec, capacity), PAGE_SIZE, spec.shape.head_dim());
        Ok(Self {
            spec,
            k_pages: Tensor::zeros(dims, dtype, device)?,
            v_pages: Tensor::zeros(dims, dtype, device)?,
            table: PageTable::new(spec.shape.kv_heads(), spec.sliding_window),
            written: 0,
            summaries: None,
        })
    }

    /// Pages for `capacity` tokens; a sliding layer needs only its window and one page at either end.
    fn planned_pages(spec: &LayerSpec, capacity: usize) -> usize {
        let per_head = capacity.div_ceil(PAGE_SIZE);
        let per_head = spec.sliding_window.map_or(per_head, |w| per_head.min(w.div_ceil(PAGE_SIZE) + 2));
        per_head * spec.shape.kv_heads()
    }

    pub(super) fn planned_bytes(spec: &LayerSpec, dtype: DType, capacity: usize) -> usize {
        2 * Self::planned_pages(spec, capacity) * PAGE_SIZE * spec.shape.head_dim() * dtype.size_in_bytes()
    }

    /// Heads of this layer.
    pub fn shape(&self) -> HeadShape {
        self.spec.shape
    }

    /// The model's own sliding window, see [`LayerSpec`].
    pub fn sliding_window(&self) -> Option<usize> {
        self.spec.sliding_window
    }

    /// First position that a query at `position` sees.
    pub fn first_visible(&self, position: usize) -> usize {
        self.spec.sliding_window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// The pool of keys `[pages, PAGE_SIZE, head_dim]`, after rope.
    pub fn k_pages(&self) -> &Tensor {
        &self.k_pages
    }

    /// The pool of values `[pages, PAGE_SIZE, head_dim]`.
    pub fn v_pages(&self) -> &Tensor {
        &self.v_pages
    }

    /// Where each head's pages lie in the pools.
    pub fn table(&self) -> &PageTable {
        &self.table
    }

    pub(super) fn reserve(&mut self, step: Step) -> Result<()> {
        // On a copy: if growing the pools fails, the table is as it was.
        let mut table = self.table.clone();
        table.reserve(step);
        let have = self.k_pages.dim(0)?;
        if table.pages() > have {
            let pages = table.pages().max(have + have / 2);
            let (k_pages, v_pages) = (grown(&self.k_pages, pages)?, grown(&self.v_pages, pages)?);
            (self.k_pages, self.v_pages) = (k_pages, v_pages);
        }
        self.table = table;
        // What a failed step left behind is written again.
        self.forget(step.start);
        Ok(())
    }

    /// Positions whose keys are written, those of the running step included once it wrote them.
    pub fn written(&self) -> usize {
        self.written
    }

    /// Notes that the step's keys are written, and summarises the blocks that are complete now.
    ///
    /// # Errors
    /// If the keys cannot be read.
    pub(crate) fn finish_write(&mut self, step: Step, kind: Summary, block_size: usize) -> Result<()> {
        self.written = step.end();
        if kind == Summary::None || self.spec.sliding_window.is_some() {
            return Ok(());
        }
        let kept = self.summaries.take().filter(|summaries| summaries.is_of(kind, block_size));
        let mut summaries = kept.unwrap_or_else(|| Summaries::new(kind, block_size, self.spec.shape.kv_heads()));
        summaries.extend(&self.k_pages, &self.table, self.written)?;
        self.summaries = Some(summaries);
        Ok(())
    }

    /// The summaries of complete blocks.
    ///
    /// # Errors
    /// If the running router asked for none.
    pub fn summaries(&self) -> Result<&Summaries> {
        match &self.summaries {
            Some(summaries) => Ok(summaries),
            None => bail!("block router: this layer keeps no block summaries"),
        }
    }

    /// Keys of `head` at positions `0..len`, f32, `[len, head_dim]`, row after row.
    ///
    /// # Errors
    /// If a sliding layer recycled some of them.
    pub fn keys(&self, head: usize, len: usize) -> Result<Vec<f32>> {
        let pages = &self.table.head(head)[..len.div_ceil(PAGE_SIZE)];
        if pages.contains(&NO_PAGE) {
            bail!("keys: a sliding layer keeps only its window");
        }
        if len == 0 {
            return Ok(Vec::new());
        }
        let ids = Tensor::new(pages, self.k_pages.device())?;
        self.k_pages.index_select(&ids, 0)?.flatten_to(1)?.narrow(0, 0, len)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
    }

    fn forget(&mut self, len: usize) {
        self.written = self.written.min(len);
        if let Some(summaries) = &mut self.summaries {
            summaries.truncate(len, self.spec.shape.head_dim());
        }
    }

    pub(super) fn oldest_restorable(&self) -> usize {
        match (self.spec.sliding_window, self.table.first_position()) {
            (None, _) | (_, 0) => 0,
            // The next token, at position `len`, sees from `len + 1 - window`.
            (Some(window), first) => first + window - 1,
        }
    }

    pub(super) fn truncate(&mut self, len: usize) {
        if len == 0 {
            // Recycled pages leave holes that only a fresh table forgets.
            self.table = PageTable::new(self.spec.shape.kv_heads(), self.spec.sliding_window);
        } else {
            self.table.truncate(len);
        }
        self.forget(len);
    }

    pub(super) fn allocated_bytes(&self) -> usize {
        let elements = self.k_pages.elem_count() + self.v_pages.elem_count();
        let summaries = self.summaries.as_ref().map_or(0, Summaries::bytes);
        elements * self.k_pages.dtype().size_in_bytes() + self.table.bytes() + summaries
    }

    /// Checks the keys and values of a step before a backend writes them.
    ///
    /// # Errors
    /// If a shape is not `[step.len, kv_heads, head_dim]`.
    pub fn check_step(&self, k: &Tensor, v: &Tensor, step: Step) -> Result<()> {
        let want = [step.len, self.spec.shape.kv_heads(), self.spec.shape.head_dim()];
        if k.dims() != want || v.dims() != want {
            bail!("write: k {:?} and v {:?} must both be {want:?} (tokens, kv_heads, head_dim)", k.dims(), v.dims());
        }
        Ok(())
    }

    /// Checks the queries of a step before a backend attends.
    ///
    /// # Errors
    /// If the shape is not `[step.len, q_heads, head_dim]`.
    pub fn check_queries(&self, q: &Tensor, step: Step) -> Result<()> {
        let want = [step.len, self.spec.shape.q_heads(), self.spec.shape.head_dim()];
        if q.dims() != want {
            bail!("attend: q is {:?}, the cache wants {want:?} (tokens, q_heads, head_dim)", q.dims());
        }
        Ok(())
    }
}

/// A copy of `pool` with room for `pages` pages.
fn grown(pool: &Tensor, pages: usize) -> Result<Tensor> {
    let (have, page_size, head_dim) = pool.dims3()?;
    let larger = Tensor::zeros((pages, page_size, head_dim), pool.dtype(), pool.device())?;
    if have > 0 {
        larger.slice_set(pool, 0, 0)?;
    }
    Ok(larger)
}
