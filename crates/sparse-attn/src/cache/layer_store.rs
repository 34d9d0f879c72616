//! Keys and values of one layer.

use super::admitted::Admitted;
use super::mirror::{DeviceKept, Layout, Mirror, Tables};
use super::{KvDtypes, NO_PAGE, Order, PAGE_SIZE, PageTable, Pool, ReadCount, Step, Summaries, Summary};
use crate::HeadShape;
use crate::backend::cuda::{self, Compacted, Pinned, Summarised, Told, Verdict};
use crate::simd::with_rows;
use crate::token_router::{Admission, Scored};
use candle_core::{DType, Device, IndexOp, Result, Tensor, bail};
use std::ops::Range;
use std::sync::Arc;

/// What a layer stores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerSpec {
    /// Heads of this layer.
    pub shape: HeadShape,
    /// The model's own sliding window: a query at `t` sees positions `(t - sliding_window, t]`.
    /// `None`: all of them.
    pub sliding_window: Option<usize>,
    /// The token router's window: tokens that it does not admit are kept for this long only. `None`: every token
    /// is admitted.
    pub local: Option<Local>,
}

/// The window of tokens that are not admitted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Local {
    /// A query at `t` sees all of `(t - window, t]`, and what was admitted before.
    pub window: usize,
    /// Queries before this position see every token.
    pub dense_len: usize,
    /// And all queries of a prompt whose first one does, or is the first of all, and that has no token at this position or beyond.
    pub dense_prompt: usize,
    /// The part of the tokens that will be admitted, 0 to 1: memory is planned by it, nothing else.
    pub kept_fraction: f32,
}

impl Local {
    /// The newest positions of which the query at `t` sees what is not admitted.
    pub fn window_at(&self, t: usize) -> usize {
        if t < self.dense_len { self.hides_from() } else { self.window }
    }

    /// The first position from whose query tokens may be hidden.
    pub fn hides_from(&self) -> usize {
        self.window.max(self.dense_len)
    }

    /// The first position that the query at `t` sees whether it is admitted or not.
    pub fn edge(&self, t: usize) -> usize {
        (t + 1).saturating_sub(self.window_at(t))
    }
}

impl LayerSpec {
    /// A layer that keeps every token.
    pub fn full(shape: HeadShape) -> Self {
        Self { shape, sliding_window: None, local: None }
    }

    /// The newest tokens that it keeps whatever becomes of others; `None`: all.
    pub fn window(&self) -> Option<usize> {
        self.sliding_window.or(self.local.map(|local| local.window))
    }

    /// The window of tokens that are not admitted, where a token router decides.
    pub fn routed(&self) -> Option<Local> {
        self.local.filter(|_| self.sliding_window.is_none())
    }

    /// Pages for `capacity` tokens; a window needs only itself and one page at either end, and what is kept of those before it.
    fn planned_pages(&self, capacity: usize) -> usize {
        let all = capacity.div_ceil(PAGE_SIZE);
        let recent = self.window().map_or(all, |w| all.min(w.div_ceil(PAGE_SIZE) + 2));
        let (kept, dense) = self.routed().map_or((0, 0), |local| {
            let kept = capacity.saturating_sub(local.window) as f32 * local.kept_fraction;
            ((kept as usize).div_ceil(PAGE_SIZE), all.min(local.dense_len.div_ceil(PAGE_SIZE)))
        });
        (recent + kept).max(dense) * self.shape.kv_heads()
    }

    pub(super) fn planned_bytes(&self, dtypes: KvDtypes, capacity: usize) -> usize {
        self.planned_pages(capacity) * PAGE_SIZE * dtypes.bytes(self.shape.head_dim())
    }
}

/// A token that moves from its place in the window to the kept ones, as slots of the pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// Where it is.
    pub from: u32,
    /// Where it goes.
    pub to: u32,
}

/// Where everything of a layer is to be.
#[derive(Debug)]
pub(super) struct Places {
    table: PageTable,
    frontier: usize,
}

impl Places {
    /// Pages that the pools must have.
    pub(super) fn pages(&self) -> usize {
        self.table.pages()
    }
}

/// Keys and values of one layer, in pages of [`PAGE_SIZE`] slots of one head.
///
/// Per head there are *recent* tokens, with a place for every position from [`LayerStore::frontier`] on, and *kept* ones:
/// those of the positions before it that the token router admitted, packed in order. Without a token router
/// all tokens are recent and the frontier is 0.
///
/// The pools are tensors on the cache's device; backends write into them in place.
#[derive(Debug)]
pub struct LayerStore {
    spec: LayerSpec,
    /// Pages that the pools were made with.
    planned_pages: usize,
    k: Pool,
    v: Pool,
    table: PageTable,
    admitted: Option<Vec<Admitted>>, // per head, where the token router decides
    frontier: usize,
    moves: Vec<Vec<Move>>, // of each step that reserved and has not written, on the host
    written: usize,
    summaries: Option<Summaries>,
    /// The tables on the device of the pools, and the frontier by which tokens lie there.
    mirror: Option<Mirror>,
    moved_to: usize,
    /// Where a device tells the host its verdicts, from which place on.
    noted: Option<(Arc<Pinned<u8>>, usize)>,
    /// A step whose verdict only the device knows, unless it is done.
    undecided: Option<Step>,
    /// By what it is to be made, until the device is told, and the positions that are kept anyway.
    asked: Option<Asked>,
    /// Whether it is to be made with those of other layers.
    waits: bool,
    /// Of what kind summaries are to be made, and of how many tokens each.
    due: Option<(Summary, usize)>,
}

/// What a device is to decide by.
pub(crate) type Asked = (Scored, usize);

impl LayerStore {
    pub(super) fn new(spec: LayerSpec, dtypes: KvDtypes, device: &Device, capacity: usize) -> Result<Self> {
        let (pages, width) = (spec.planned_pages(capacity), spec.shape.head_dim());
        let kv_heads = spec.shape.kv_heads();
        Ok(Self {
            spec,
            planned_pages: pages,
            k: Pool::of_keys(dtypes.k, width, pages, device)?,
            v: Pool::new(dtypes.v, Order::Rows, width, pages, device)?,
            table: PageTable::new(kv_heads, spec.window(), spec.routed().map_or(0, |local| local.dense_len)),
            admitted: spec.routed().map(|_| vec![Admitted::default(); kv_heads]),
            frontier: 0,
            moves: Vec::new(),
            written: 0,
            summaries: None,
            mirror: None,
            moved_to: 0,
            noted: None,
            undecided: None,
            asked: None,
            waits: false,
            due: None,
        })
    }

    /// Heads of this layer.
    pub fn shape(&self) -> HeadShape {
        self.spec.shape
    }

    /// The model's own sliding window, see [`LayerSpec`].
    pub fn sliding_window(&self) -> Option<usize> {
        self.spec.sliding_window
    }

    /// The window of tokens that are not admitted, where a token router decides; as it is for the prompt that is read.
    pub fn local(&self) -> Option<Local> {
        self.spec.routed().map(|local| Local { dense_len: self.table.dense_len(), ..local })
    }

    /// Has all queries of `prompt` see every token, if it is one that ends early enough, until [`LayerStore::end_prompt`].
    pub(super) fn begin_prompt(&mut self, prompt: Step) {
        let Some(local) = self.spec.routed() else { return };
        let (begins, ends) = (0..local.dense_len.max(1), local.hides_from() + 1..=local.dense_prompt);
        let sees_all = begins.contains(&prompt.start) && ends.contains(&prompt.end());
        self.table.see_all_before(if sees_all { prompt.end() } else { local.dense_len });
    }

    /// Whether they do.
    pub(super) fn is_in_dense_prompt(&self) -> bool {
        self.spec.routed().is_some_and(|local| self.table.dense_len() > local.dense_len)
    }

    /// What queries see depends on their positions again, now that there are `len` tokens; but where those that still wait for verdicts, from `first` on,
    /// would lose their places by that, only from the next query on, which asks for these.
    pub(super) fn end_prompt(&mut self, len: usize, first: Option<usize>) {
        let Some(local) = self.spec.routed() else { return };
        let some_leave = first.is_some_and(|first| first < local.edge(len));
        self.table.see_all_before(if some_leave { self.table.dense_len().min(len).max(local.dense_len) } else { local.dense_len });
    }

    /// First position that a query at `position` sees.
    pub fn first_visible(&self, position: usize) -> usize {
        self.spec.sliding_window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// The keys, after rope, [`Order::Tiles`].
    pub fn k(&self) -> &Pool {
        &self.k
    }

    /// The values, [`Order::Rows`].
    pub fn v(&self) -> &Pool {
        &self.v
    }

    /// Where each head's pages lie in the pools.
    pub fn table(&self) -> &PageTable {
        &self.table
    }

    /// The first position with a place of its own; of those before, the admitted ones are kept.
    pub fn frontier(&self) -> usize {
        self.frontier
    }

    /// Which tokens of `head` are admitted; `None`: all.
    pub fn admitted(&self, head: usize) -> Option<&Admitted> {
        self.admitted.as_ref().map(|heads| &heads[head])
    }

    /// Admitted tokens of `head` at the positions of `range` that are written.
    pub fn count_admitted(&self, head: usize, range: Range<usize>) -> usize {
        match self.admitted(head) {
            None => range.end.min(self.written).saturating_sub(range.start),
            Some(admitted) => admitted.rank(range.end) - admitted.rank(range.start),
        }
    }

    /// The places that `step` needs, and what leaves the window before it among the kept ones; `None`: there are those. What a failed step left
    /// behind is forgotten: it is written again.
    pub(super) fn begin(&mut self, step: Step) -> Option<Places> {
        self.forget(step.start);
        self.places_for(step)
    }

    /// [`LayerStore::begin`] that forgets nothing.
    pub(super) fn places_for(&self, step: Step) -> Option<Places> {
        if self.table.holds(step) && self.table.frontier(step) <= self.frontier {
            return None;
        }
        // A copy: if growing the pools fails, all is as it was.
        let mut table = self.table.clone();
        let frontier = table.frontier(step).max(self.frontier);
        for (head, admitted) in self.admitted.iter().flatten().enumerate() {
            table.reserve_kept(head, admitted.rank(frontier));
        }
        table.reserve(step);
        Some(Places { table, frontier })
    }

    /// Takes these places, for which the pools have pages. A GPU moves what they are not as soon as the tables are there.
    pub(super) fn take(&mut self, Places { table, frontier }: Places) {
        let mut moves = Vec::new();
        for (head, admitted) in self.admitted.iter().flatten().enumerate().filter(|_| self.k.values().device().is_cpu()) {
            for (position, index) in admitted.positions(self.frontier..frontier).zip(admitted.rank(self.frontier)..) {
                moves.push(Move { from: self.table.recent_slot(head, position), to: table.kept_slot(head, index) });
            }
        }
        self.table = table;
        self.frontier = frontier;
        if !moves.is_empty() {
            self.moves.push(moves);
        }
    }

    /// Pages that the pools are to have if they are made again for `places`: some more than are in use then, so that it is long until any layer's are
    /// made again.
    pub(super) fn pages_to_have(&self, places: Option<&Places>) -> usize {
        let (have, used) = (self.k.pages(), self.k.pages() - self.has_left(places));
        let needed = places.map_or(&self.table, |places| &places.table).pages();
        needed.max(have).max(used + used / 8)
    }

    /// Whether the pools have hardly more pages than are in use by `places`, where a token router decides how many more there will be.
    pub(super) fn is_nearly_full(&self, places: Option<&Places>) -> bool {
        self.admitted.is_some() && self.has_left(places) * 64 < self.k.pages()
    }

    /// Pages of the pools that hold nothing by `places`.
    fn has_left(&self, places: Option<&Places>) -> usize {
        let table = places.map_or(&self.table, |places| &places.table);
        (self.k.pages() + table.free_pages()).saturating_sub(table.pages())
    }

    /// Whether the pools have too few pages for `places`.
    pub(super) fn lacks_pages(&self, places: Option<&Places>) -> bool {
        places.is_some_and(|places| places.pages() > self.k.pages())
    }

    /// Takes pools that hold what these do, as far as any of it matters.
    pub(super) fn take_pools(&mut self, [k, v]: [Pool; 2]) {
        (self.k, self.v) = (k, v);
    }

    /// Bytes of pools with so many pages.
    pub(super) fn bytes_of(&self, pages: usize) -> usize {
        [&self.k, &self.v].map(|pool| Pool::page_bytes(pool.dtype(), pool.width(), pages)).iter().sum()
    }

    /// Whether the pools of both may lie in one allocation, and be given back together: on a GPU, with rows of one kind.
    pub(super) fn may_join(&self, other: &Self) -> bool {
        let pools = [&self.k, &self.v, &other.k, &other.v];
        let are_alike = pools.iter().all(|pool| !pool.values().device().is_cpu() && pool.is_like(pools[0]));
        are_alike && self.admitted.is_some() == other.admitted.is_some()
    }

    /// What kernels are to look up.
    pub(super) fn tables(&self) -> Tables<'_> {
        self.tables_of(&self.table, self.frontier)
    }

    fn tables_of<'a>(&'a self, table: &'a PageTable, frontier: usize) -> Tables<'a> {
        Tables { kv_heads: self.spec.shape.kv_heads(), table, admitted: self.admitted.as_deref(), frontier }
    }

    /// Notes that the device has them, and where if that is another place.
    pub(super) fn look_up_in(&mut self, mirror: Option<Mirror>) {
        self.mirror = mirror.or(self.mirror.take());
        self.moved_to = self.frontier;
    }

    /// Whether tokens lie where they did before the frontier moved, on a GPU.
    pub(super) fn is_to_move(&self) -> bool {
        self.k.values().device().is_cuda() && self.moved_to != self.frontier
    }

    /// What a GPU copies to places among the kept tokens, where some left the window since it last had the tables.
    pub(super) fn moved(&self, layout: Layout) -> Option<Compacted<'_>> {
        let (old, new) = (self.moved_to, self.frontier);
        let pages = |admitted: &Admitted| admitted.rank(new).div_ceil(PAGE_SIZE) - admitted.rank(old) / PAGE_SIZE;
        let most = self.admitted.iter().flatten().map(pages).max().filter(|_| old < new)?;
        (most > 0).then_some(Compacted { store: self, new: [&self.k, &self.v], layout, pages: [most, 0] })
    }

    /// The page of each recent token on the device of the pools: `[kv_heads, room]`, u32, with anything beyond the last one. It stays
    /// where it is until there is no more room.
    ///
    /// # Errors
    /// If the pools are on the host, or nothing was reserved.
    pub fn device_pages(&self) -> Result<&Tensor> {
        match &self.mirror {
            Some(mirror) => Ok(&mirror.pages),
            None => bail!("page table: it is on the host only"),
        }
    }

    /// What the token router leaves, on the device of the pools; `None`: all.
    pub fn device_kept(&self) -> Option<&DeviceKept> {
        self.mirror.as_ref()?.kept.as_ref()
    }

    /// The tokens that must move before this step is written: lists, one after the other, of which each leaves no slot that it takes. None
    /// on a GPU, which has moved them when it got the tables.
    pub fn take_moves(&mut self) -> Vec<Vec<Move>> {
        std::mem::take(&mut self.moves)
    }

    /// Moves them, in place.
    ///
    /// # Errors
    /// If a slot is beyond the pools.
    pub fn apply_moves(&mut self) -> Result<()> {
        self.take_moves().iter().try_for_each(|moves| Pool::apply([&self.k, &self.v], moves))
    }

    /// Notes the token router's verdict on the tokens of `step`; those before position `sinks` are always admitted. Where it follows from scores on
    /// the device, and all that needs it at once is there, too, it is made while the step is written ([`LayerStore::take_asked`]) or by
    /// [`LayerStore::ask`], and the host learns of it by [`LayerStore::decide`] or when the step is committed.
    ///
    /// # Errors
    /// If the verdict is not on `[step.len, kv_heads]`, or the cache was made without a token router.
    pub(crate) fn admit(&mut self, step: Step, admission: Admission, sinks: usize) -> Result<()> {
        let kv_heads = self.spec.shape.kv_heads();
        let verdicts = match &admission {
            Admission::Every => step.len * kv_heads,
            Admission::Some(admitted) => admitted.len(),
            Admission::Scored(scored) => scored.scores.dims()?.into_iter().product(),
        };
        if self.admitted.is_none() {
            return match admission {
                Admission::Some(_) | Admission::Scored(_) if self.spec.sliding_window.is_none() => {
                    bail!("token router: the cache was made to keep every token")
                }
                _ => Ok(()),
            };
        }
        if verdicts != step.len * kv_heads {
            bail!("token router: {verdicts} verdicts on {} tokens of {kv_heads} heads", step.len);
        }
        match admission {
            Admission::Every => self.keep(step, sinks, |_| true),
            Admission::Some(admitted) => self.keep(step, sinks, |index| admitted[index]),
            Admission::Scored(scored) => {
                if self.device_kept().is_some() && self.noted.is_some() {
                    (self.undecided, self.asked) = (Some(step), Some((scored, sinks)));
                    return Ok(());
                }
                let scores = scored.scores.made()?.flatten_all()?.to_vec1::<f32>()?;
                self.keep(step, sinks, |index| scores[index] >= scored.tau);
            }
        }
        match (self.device_kept(), &self.admitted) {
            (Some(kept), Some(admitted)) => kept.put_masks(admitted, step.start),
            _ => Ok(()),
        }
    }

    /// Whether a device is to decide on steps, which can be done with other layers.
    pub fn may_wait_for_verdict(&self) -> bool {
        self.admitted.is_some() && self.noted.is_some()
    }

    /// Leaves the verdict on `step` to [`RoutedAttention::decide`](crate::RoutedAttention::decide).
    ///
    /// # Errors
    /// If no device is to decide.
    pub fn wait_for_verdict(&mut self, step: Step) -> Result<()> {
        if !self.may_wait_for_verdict() || self.device_kept().is_none() {
            bail!("token router: no device decides on this layer's tokens");
        }
        // With those before it that wait, too.
        let waiting = self.undecided.filter(|_| self.waits).and_then(|waiting| waiting.and(step));
        (self.undecided, self.asked, self.waits) = (Some(waiting.unwrap_or(step)), None, true);
        Ok(())
    }

    /// The tokens on which that is to come.
    pub(crate) fn waiting(&self) -> Option<Step> {
        self.undecided.filter(|_| self.waits)
    }

    /// Notes that it came.
    pub(crate) fn is_given_verdict(&mut self) {
        self.waits = false;
    }

    /// Notes which tokens of `step` are admitted: `keeps(token * kv_heads + head)`.
    fn keep(&mut self, step: Step, sinks: usize, keeps: impl Fn(usize) -> bool) {
        let kv_heads = self.spec.shape.kv_heads();
        for (head, bits) in self.admitted.iter_mut().flatten().enumerate() {
            bits.truncate(step.start);
            bits.extend((0..step.len).map(|token| step.start + token < sinks || keeps(token * kv_heads + head)));
        }
    }

    /// What the device is to decide by, for a backend that tells it so while it writes the step.
    pub(crate) fn take_asked(&mut self) -> Option<Asked> {
        self.asked.take()
    }

    /// The verdict on `step` that is to be made; `None`: there is no room for it on the device.
    pub(crate) fn verdict<'a>(&'a self, step: Step, (scored, sinks): &'a Asked) -> Option<Verdict<'a>> {
        Some(Verdict { scored, step, sinks: *sinks, masks: &self.device_kept()?.masks })
    }

    /// Has the verdict on `step` made, unless that was done when it was written.
    ///
    /// # Errors
    /// If shapes do not fit each other, or the device fails.
    pub(crate) fn ask(&mut self, step: Step) -> Result<()> {
        let asked = self.take_asked();
        asked.and_then(|asked| self.verdict(step, &asked).map(cuda::note_verdicts)).unwrap_or(Ok(()))
    }

    /// Learns the verdict on the running step, if only the device knows it.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn decide(&mut self) -> Result<()> {
        if self.waits {
            bail!("token router: a verdict is asked for that is made when all layers are done");
        }
        if let (Some(step), Some(told)) = (self.undecided, self.told()) {
            cuda::tell(&[told], step, self.k.values().device())?.wait()?;
            self.settle();
        }
        Ok(())
    }

    /// Notes that all tokens are kept on which it is to come.
    ///
    /// # Errors
    /// If that cannot be brought to the device.
    pub(crate) fn keep_waiting(&mut self, sinks: usize) -> Result<()> {
        let Some(step) = self.undecided.take_if(|_| self.waits) else { return Ok(()) };
        self.waits = false;
        self.admit(step, Admission::Every, sinks)
    }

    /// Whether the host knows the verdict on the running step.
    pub(crate) fn is_decided(&self) -> bool {
        self.undecided.is_none()
    }

    /// A step on which only the device knows the verdict that it made.
    pub(super) fn untold(&self) -> Option<Step> {
        self.undecided.filter(|_| !self.waits)
    }

    /// Octets of all heads that the verdicts on `step` fill, where a token router decides.
    pub(super) fn octets_of_verdicts(&self, step: Step) -> usize {
        self.admitted.as_ref().map_or(0, |heads| heads.len() * step.octets().len())
    }

    /// Where the device is to note the verdicts on the next step.
    pub(super) fn note_verdicts_in(&mut self, noted: &Arc<Pinned<u8>>, first: usize) {
        let is_there = self.noted.as_ref().is_some_and(|(had, at)| Arc::ptr_eq(had, noted) && *at == first);
        if self.admitted.is_some() && !is_there {
            self.noted = Some((noted.clone(), first));
        }
    }

    /// What the host is to learn of it.
    pub(super) fn told(&self) -> Option<Told<'_>> {
        let (noted, first) = self.noted.as_ref().filter(|_| self.untold().is_some())?;
        Some(Told { masks: self.device_kept()?.verdicts, noted: (noted, *first) })
    }

    /// Takes over the verdict that the device has told.
    pub(super) fn settle(&mut self) {
        if let (Some(step), Some((noted, first))) = (self.undecided.take_if(|_| !self.waits), &self.noted) {
            let octets = noted.numbers()[*first..].chunks_exact(step.octets().len());
            for (bits, octets) in self.admitted.iter_mut().flatten().zip(octets) {
                bits.truncate(step.start);
                bits.extend_octets(octets, step.end());
            }
        }
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
        self.finish_write_later(step, kind, block_size);
        if let Some(blocks) = self.begin_summaries()? {
            let summaries = self.needed_summaries()?;
            cuda::summarise(&[Summarised { store: self, summaries, blocks: blocks.clone() }])?;
            self.end_summaries(&blocks);
        }
        Ok(())
    }

    /// [`LayerStore::finish_write`] that leaves it to [`KvCache::summarise`](super::KvCache::summarise) to summarise them.
    pub(crate) fn finish_write_later(&mut self, step: Step, kind: Summary, block_size: usize) {
        self.written = step.end();
        self.due = (kind != Summary::None && self.spec.sliding_window.is_none()).then_some((kind, block_size));
    }

    /// Summarises what is due, unless a device can: the blocks of which, for which there is room then.
    pub(super) fn begin_summaries(&mut self) -> Result<Option<Range<usize>>> {
        let Some((kind, block_size)) = self.due.take() else { return Ok(None) };
        let (shape, decided) = (self.spec.shape, self.waiting().map_or(self.written, |waiting| waiting.start.min(self.written)));
        let kept = self.summaries.take().filter(|summaries| summaries.is_of(kind, block_size));
        let mut summaries = match kept {
            Some(summaries) => summaries,
            None => {
                let device = self.k.values().device();
                Summaries::new(kind, block_size, [shape.kv_heads(), shape.head_dim()], self.k.dtype(), device)?
            }
        };
        let missing = summaries.missing(decided);
        let is_on_gpu = self.k.values().device().is_cuda();
        if is_on_gpu {
            // For as many blocks as there is room for keys, or the summaries would often be copied.
            let room = self.k.pages() / shape.kv_heads() * PAGE_SIZE / block_size;
            summaries.reserve(room.max(missing.end))?;
        }
        // Where the keys are, none of which has moved.
        let by_device = is_on_gpu && !missing.is_empty() && missing.start * block_size >= self.frontier;
        if !by_device && !missing.is_empty() {
            self.decide()?;
            let positions = missing.start * block_size..missing.end * block_size;
            let heads = (0..shape.kv_heads()).map(|head| self.admitted_keys(head, positions.clone()));
            summaries.extend(missing.len(), &heads.collect::<Result<Vec<_>>>()?)?;
        }
        self.summaries = Some(summaries);
        Ok(by_device.then_some(missing))
    }

    /// Notes that a device summarises these blocks.
    pub(super) fn end_summaries(&mut self, blocks: &Range<usize>) {
        if let Some(summaries) = &mut self.summaries {
            summaries.advance(blocks.len());
        }
    }

    /// Whether blocks are to be summarised with those of other layers.
    pub(super) fn has_summaries_due(&self) -> bool {
        self.due.is_some()
    }

    /// Notes that the device writes the token of `step` by itself, and leaves the blocks that are complete then to
    /// [`KvCache::summarise`](super::KvCache::summarise). Returns whether a GPU can do that: not if a block lies before the frontier that was
    /// never summarised, and a step that the host leads must come first.
    pub fn begin_device_write(&mut self, step: Step, kind: Summary, block_size: usize) -> bool {
        let blocks = self.summaries.as_ref().filter(|summaries| summaries.is_of(kind, block_size)).map_or(0, Summaries::blocks);
        if kind != Summary::None && self.spec.sliding_window.is_none() && blocks * block_size < self.frontier {
            return false;
        }
        self.finish_write_later(step, kind, block_size);
        true
    }

    /// What queries of `step` read where they read all that they see.
    pub fn count_visible(&self, step: Step) -> ReadCount {
        let heads = self.spec.shape.kv_heads();
        let visible = heads as u64 * step.seen(self.spec.sliding_window.unwrap_or(usize::MAX));
        let read = self.local().map_or(visible, |Local { window, dense_len, .. }| {
            let (dense, rest) = step.split_at(dense_len);
            let whole = heads as u64 * (dense.seen(usize::MAX) + rest.seen(window));
            // The query at `t` sees those kept before `t + 1 - window`.
            let before = (rest.start + 1).saturating_sub(window)..(rest.end() + 1).saturating_sub(window);
            whole + self.admitted.iter().flatten().map(|admitted| admitted.sum_of_ranks(before.clone())).sum::<u64>()
        });
        let row = |pool: &Pool| pool.dtype().row_bytes(pool.width()) as u64;
        ReadCount { read, visible, bytes: read * (row(&self.k) + row(&self.v)) }
    }

    /// The summaries of complete blocks; `None`: the running router asked for none.
    pub fn summaries(&self) -> Option<&Summaries> {
        self.summaries.as_ref()
    }

    /// The same for a router that reads them.
    ///
    /// # Errors
    /// If there are none.
    pub(crate) fn needed_summaries(&self) -> Result<&Summaries> {
        match &self.summaries {
            Some(summaries) => Ok(summaries),
            None => bail!("block router: this layer keeps no block summaries"),
        }
    }

    /// The admitted positions of `range`, and their keys, `[positions, head_dim]`, f32.
    ///
    /// # Errors
    /// If a sliding layer recycled some of them.
    pub fn admitted_keys(&self, head: usize, range: Range<usize>) -> Result<(Vec<usize>, Vec<f32>)> {
        let positions: Vec<usize> = match self.admitted(head) {
            Some(admitted) => admitted.positions(range).collect(),
            None => range.collect(),
        };
        let slots = positions.iter().map(|position| self.slot(head, *position)).collect::<Result<Vec<u32>>>()?;
        if self.k.values().device().is_cpu() {
            let stored = with_rows(&self.k, |rows| rows.gather(self.k.order(), &slots))?;
            return Ok((positions, self.k.transformed(stored).into_owned()));
        }
        Ok((positions, read_slots(&self.k, &slots)?.flatten_all()?.to_vec1()?))
    }

    /// All tokens of `head` up to `end` that are there: their positions, keys and values, `[n, head_dim]` f32.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn rows(&self, head: usize, end: usize) -> Result<(Vec<usize>, Tensor, Tensor)> {
        let kept = self.admitted(head).into_iter().flat_map(|admitted| admitted.positions(0..self.frontier));
        let positions: Vec<usize> = kept.chain(self.frontier.max(self.table.first_position())..end).collect();
        let slots = positions.iter().map(|position| self.slot(head, *position)).collect::<Result<Vec<u32>>>()?;
        Ok((positions, read_slots(&self.k, &slots)?, read_slots(&self.v, &slots)?))
    }

    fn slot(&self, head: usize, position: usize) -> Result<u32> {
        if position < self.frontier
            && let Some(admitted) = self.admitted(head)
        {
            return Ok(self.table.kept_slot(head, admitted.rank(position)));
        }
        if self.table.recent(head)[position / PAGE_SIZE] == NO_PAGE {
            bail!("keys: position {position} left the sliding window of its layer");
        }
        Ok(self.table.recent_slot(head, position))
    }

    fn forget(&mut self, len: usize) {
        self.written = self.written.min(len);
        (self.undecided, self.asked) = (self.waiting().and_then(|waiting| waiting.until(len)), None);
        self.waits = self.undecided.is_some();
        for admitted in self.admitted.iter_mut().flatten() {
            admitted.truncate(len);
        }
        if let Some(summaries) = &mut self.summaries {
            summaries.truncate(len);
        }
    }

    pub(super) fn oldest_restorable(&self) -> usize {
        match (self.spec.window(), self.table.first_position()) {
            (None, _) | (_, 0) => 0,
            // The next token, at position `len`, sees from `len + 1 - window`, or everything.
            (Some(window), first) => (first + window - 1).max(self.local().map_or(0, |local| local.dense_len)),
        }
    }

    pub(super) fn truncate(&mut self, len: usize) {
        if len == 0 {
            // Recycled pages leave holes that only a fresh table forgets.
            self.table.clear();
            (self.frontier, self.moved_to) = (0, 0);
            self.moves.clear();
        } else {
            self.table.truncate(len);
        }
        self.forget(len);
    }

    /// Gives memory back that the step before took and the next ones will not need, where a token router is at work: on the host.
    /// `len`: tokens that are committed.
    pub(super) fn trim(&mut self, len: usize) -> Result<()> {
        let Some(step) = self.step_to_trim_for(len) else { return Ok(()) };
        if let Some(places) = self.places_for(step) {
            if self.lacks_pages(Some(&places)) {
                let pages = self.pages_to_have(Some(&places));
                self.take_pools([self.k.grown(pages)?, self.v.grown(pages)?]);
            }
            self.take(places);
        }
        self.apply_moves()?; // in place: most tokens stay where they are
        if self.is_tight(&self.table) {
            return Ok(());
        }
        let used = self.table.compact();
        (self.k, self.v) = (self.k.selected(&used)?, self.v.selected(&used)?);
        Ok(())
    }

    /// The places of a store on a GPU such that no page is free, and whether it has much to give back; `None`: no token router is at work. What was
    /// planned stays there: it costs a copy of everything to give it back, and one to have it again.
    pub(super) fn compaction(&self, len: usize) -> Option<(Places, bool)> {
        let step = self.step_to_trim_for(len)?;
        let (admitted, frontier) = (self.admitted.as_ref()?, self.table.frontier(step).max(self.frontier));
        let places = Places { table: self.table.compacted(frontier, |head| admitted[head].rank(frontier)), frontier };
        let left = self.k.pages().saturating_sub(places.pages());
        let is_due = self.has_grown() && left * 32 >= places.pages();
        Some((places, is_due))
    }

    /// Whether there are more pages than were planned.
    pub(super) fn has_grown(&self) -> bool {
        self.k.pages() > self.planned_pages
    }

    /// What a step after the newest token will not see moves now; that token may still be taken back and fed again.
    fn step_to_trim_for(&self, len: usize) -> Option<Step> {
        (self.admitted.is_some() && len > 0).then(|| Step { start: len - 1, len: 1 })
    }

    /// Whether there are hardly more pages than `table` uses.
    fn is_tight(&self, table: &PageTable) -> bool {
        let free = table.free_pages() + self.k.pages().saturating_sub(table.pages());
        free * 32 < table.pages()
    }

    /// What kernels are to look up once it has these places.
    pub(super) fn tables_after<'a>(&'a self, places: Option<&'a Places>) -> Tables<'a> {
        places.map_or_else(|| self.tables(), |places| self.tables_of(&places.table, places.frontier))
    }

    /// What a GPU copies to new pools for these places.
    pub(super) fn compacted<'a>(&'a self, Places { table, frontier }: &Places, new: &'a [Pool; 2], layout: Layout) -> Compacted<'a> {
        let kept = (0..self.spec.shape.kv_heads()).map(|head| table.kept(head).len()).max().unwrap_or(0);
        Compacted { store: self, new: [&new[0], &new[1]], layout, pages: [kept, table.recent(0).len() - frontier / PAGE_SIZE] }
    }

    /// Takes these places and pools, in which everything lies there.
    pub(super) fn take_compacted(&mut self, Places { table, frontier }: Places, new: [Pool; 2]) {
        self.take_pools(new);
        (self.table, self.frontier, self.moved_to) = (table, frontier, frontier);
    }

    /// The same store, with pools of its own.
    pub(super) fn fork(&self, [k, v]: [Pool; 2]) -> Result<Self> {
        if self.is_to_move() {
            bail!("kv cache: a step failed before its tokens were moved, nothing can be copied before the next one");
        }
        Ok(Self {
            spec: self.spec,
            planned_pages: self.planned_pages,
            k,
            v,
            table: self.table.clone(),
            admitted: self.admitted.clone(),
            frontier: self.frontier,
            moves: self.moves.clone(),
            written: self.written,
            summaries: self.summaries.as_ref().map(Summaries::fork).transpose()?,
            mirror: None,
            moved_to: self.moved_to,
            noted: None,
            undecided: self.undecided,
            asked: None,
            waits: false,
            due: self.due,
        })
    }

    pub(super) fn allocated_bytes(&self) -> usize {
        let summaries = self.summaries.as_ref().map_or(0, Summaries::bytes);
        let admitted: usize = self.admitted.iter().flatten().map(Admitted::bytes).sum();
        let moves = self.moves.iter().map(Vec::capacity).sum::<usize>() * size_of::<Move>();
        let mirror = self.mirror.as_ref().map_or(0, Mirror::bytes);
        self.k.bytes() + self.v.bytes() + self.table.bytes() + summaries + admitted + moves + mirror
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

/// The rows of `slots`, `[slots, width]` f32, by reading the pages that hold them.
fn read_slots(pool: &Pool, slots: &[u32]) -> Result<Tensor> {
    let device = pool.values().device();
    if slots.is_empty() {
        return Tensor::zeros((0, pool.width()), DType::F32, device);
    }
    let mut pages: Vec<u32> = slots.iter().map(|slot| slot / PAGE_SIZE as u32).collect();
    pages.sort_unstable();
    pages.dedup();
    let at = |slot: &u32| {
        let page = pages.partition_point(|page| *page < slot / PAGE_SIZE as u32);
        (page * PAGE_SIZE) as u32 + slot % PAGE_SIZE as u32
    };
    let index: Vec<u32> = slots.iter().map(at).collect();
    let rows = pool.read(&pages)?;
    if index.windows(2).all(|pair| pair[1] == pair[0] + 1) {
        return rows.i(index[0] as usize..index[0] as usize + index.len());
    }
    rows.index_select(&Tensor::new(index, device)?, 0)
}
