//! Keys and values of past tokens: what every layer stores, and how much of it is committed.

mod admitted;
mod dtype;
mod hadamard;
mod layer_store;
mod mirror;
mod page_table;
mod pool;
mod scatter;
mod slabs;
mod summary;

pub use admitted::Admitted;
pub use dtype::{GROUP, KvDtype, KvDtypes};
pub use layer_store::{LayerSpec, LayerStore, Local, Move};
pub use mirror::DeviceKept;
pub use page_table::{NO_PAGE, PAGE_SIZE, PageTable};
pub use pool::{LANES, OCTET, Order, Pool};
pub use summary::{Summaries, Summary};

use layer_store::Places;
pub(crate) use mirror::{Layout, VerdictMasks};
use mirror::{Mirrors, Staged};
use slabs::Slabs;

use crate::backend::cuda::{self, Mark, Pinned, Summarised};
use candle_core::{Device, Result, Tensor, bail};
use std::ops::Range;
use std::sync::Arc;

/// The tokens of one forward pass: positions `[start, start + len)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Position of the first token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
}

impl Step {
    /// Position after the last token.
    pub fn end(&self) -> usize {
        self.start + self.len
    }

    /// Positions that its tokens see, over all of them: each itself and those before, of which no more than `window`.
    pub(crate) fn seen(&self, window: usize) -> u64 {
        let before = |end: usize| {
            let rising = end.min(window) as u64;
            rising * (rising + 1) / 2 + end.saturating_sub(window) as u64 * window as u64
        };
        before(self.end()) - before(self.start)
    }

    /// Its tokens before position `len`, if there are any.
    pub(crate) fn until(self, len: usize) -> Option<Self> {
        Some(self.split_at(len).0).filter(|before| before.len > 0)
    }

    /// Its tokens before position `t`, and the others.
    pub(crate) fn split_at(self, t: usize) -> (Self, Self) {
        let middle = t.clamp(self.start, self.end());
        (Self { start: self.start, len: middle - self.start }, Self { start: middle, len: self.end() - middle })
    }

    /// The tokens of both, where `next` follows.
    pub(crate) fn and(self, next: Self) -> Option<Self> {
        (self.end() == next.start).then(|| Self { len: self.len + next.len, ..self })
    }

    /// The octets of positions that it has tokens in.
    pub(crate) fn octets(&self) -> Range<usize> {
        self.start / OCTET..self.end().div_ceil(OCTET)
    }
}

/// The key/value cache of one sequence, owned by the caller of the model.
///
/// A forward pass is `reserve` -> every layer writes -> `commit`. Until `commit`, nothing that was
/// readable before changes, so a failed pass leaves the cache as it was.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerStore>,
    slabs: Slabs,
    device: Device,
    len: usize,
    /// What the newest step read, but for layers of which that was not counted yet: they read all that is visible.
    read: ReadCount,
    uncounted: Option<(Step, Vec<usize>)>,
    /// See [`KvCache::changes`].
    changes: u64,
    /// The page tables, where a device has the pools, and whether those say where everything is: every layer of a step asks.
    mirrors: Mirrors,
    are_tables_brought: bool,
    /// Where a device tells the host verdicts of token routers: every layer's of a step.
    noted: Option<Arc<Pinned<u8>>>,
    /// When it has, until the host looks.
    told: Option<Mark>,
    /// The newest tokens, where verdicts on them are still to be made.
    waiting: Option<Waiting>,
    /// Whether more of a prompt may come.
    is_in_prompt: bool,
}

/// Tokens that wait for their verdicts, and what those are made of.
#[derive(Debug, Clone)]
pub(crate) struct Waiting {
    pub(crate) step: Step,
    /// For each of [`Gate::stacks`](crate::token_router::Gate::stacks) attention inputs, `[layers, rows, hidden_size]`, the first token's in row `first`.
    pub(crate) inputs: Vec<Option<Arc<Tensor>>>,
    pub(crate) first: usize,
}

/// Keys that a step read, over all its queries, layers and heads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadCount {
    /// Keys that were read.
    pub read: u64,
    /// Keys that dense attention would have read.
    pub visible: u64,
    /// Bytes of those that were read, keys and values, and of the block summaries that were scored.
    pub bytes: u64,
}

impl ReadCount {
    /// Adds what another step or layer read.
    pub fn add(&mut self, other: Self) {
        self.read += other.read;
        self.visible += other.visible;
        self.bytes += other.bytes;
    }
}

impl KvCache {
    /// An empty cache with room for `capacity` tokens allocated now (it grows beyond when asked to).
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn new(specs: &[LayerSpec], dtypes: KvDtypes, device: &Device, capacity: usize) -> Result<Self> {
        let layers = specs.iter().map(|spec| LayerStore::new(*spec, dtypes, device, capacity)).collect::<Result<Vec<_>>>()?;
        let mut cache = Self::of(layers, Slabs::single(specs.len()), device, 0);
        // Locking memory takes a millisecond, which the first prompt would wait for.
        cache.make_room_for_verdicts(Step { start: 0, len: capacity })?;
        Ok(cache)
    }

    fn of(layers: Vec<LayerStore>, slabs: Slabs, device: &Device, len: usize) -> Self {
        let (read, mirrors) = (ReadCount::default(), Mirrors::default());
        Self {
            layers,
            slabs,
            device: device.clone(),
            len,
            read,
            uncounted: None,
            changes: 0,
            mirrors,
            are_tables_brought: false,
            noted: None,
            told: None,
            waiting: None,
            is_in_prompt: false,
        }
    }

    /// Bytes that [`KvCache::new`] allocates, without allocating them.
    pub fn planned_bytes(specs: &[LayerSpec], dtypes: KvDtypes, capacity: usize) -> usize {
        specs.iter().map(|spec| spec.planned_bytes(dtypes, capacity)).sum()
    }

    /// Committed tokens; also the position of the next one.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is committed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where keys and values lie.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Layers that there are.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// One layer's store.
    pub fn layer(&self, layer: usize) -> &LayerStore {
        &self.layers[layer]
    }

    /// One layer's store, to write to.
    pub fn layer_mut(&mut self, layer: usize) -> &mut LayerStore {
        &mut self.layers[layer]
    }

    /// Begins a prompt of `len` tokens, in however many steps: what its queries see may depend on its length, see [`Local::dense_prompt`].
    pub fn begin_prompt(&mut self, len: usize) {
        let prompt = Step { start: self.len, len };
        self.is_in_prompt = true;
        self.layers.iter_mut().for_each(|layer| layer.begin_prompt(prompt));
    }

    /// Ends it, or what there is of it.
    pub fn end_prompt(&mut self) {
        self.is_in_prompt = false;
        // A step that failed may have left some.
        self.have_none_wait_from(self.len);
        self.see_by_position();
    }

    /// Has what queries see depend on their positions again, once no more of a prompt comes, and verdicts on what is hidden then are made.
    fn see_by_position(&mut self) {
        if self.is_in_prompt || !self.layers.iter().any(LayerStore::is_in_dense_prompt) {
            return;
        }
        (self.read, self.uncounted) = (self.read_count(), None);
        let (len, first) = (self.len, self.waiting.as_ref().map(|waiting| waiting.step.start));
        self.layers.iter_mut().for_each(|layer| layer.end_prompt(len, first));
    }

    /// Makes room for `len` more tokens in every layer. Where a device has the pools, steps of several tokens begin without the tables of their places:
    /// see [`KvCache::bring_tables`].
    ///
    /// # Errors
    /// If `len` is zero, tokens wait for verdicts, or the device is out of memory; the cache is then as it was.
    pub fn reserve(&mut self, len: usize) -> Result<Step> {
        if len == 0 {
            bail!("kv cache: a step needs at least one token");
        }
        if let Some(Waiting { step, .. }) = self.waiting.as_ref().filter(|waiting| waiting.step.start < self.len) {
            bail!("kv cache: {} tokens from {} on wait for verdicts, which are to be made before {len} more come", step.len, step.start);
        }
        self.summarise()?;
        let step = Step { start: self.len, len };
        self.reserve_step(step)?;
        self.make_room_for_verdicts(step)?;
        Ok(step)
    }

    /// Makes room for one more token while others may wait for verdicts, and blocks for their summaries: those that nobody asks for yet.
    ///
    /// # Errors
    /// If one of them leaves the window, or the device is out of memory; the cache is then as it was.
    pub fn reserve_token(&mut self) -> Result<Step> {
        let step = Step { start: self.len, len: 1 };
        if self.needs_verdicts(step) {
            bail!("kv cache: the query at {} needs verdicts that are still to be made: {:?}", self.len, self.waiting());
        }
        self.reserve_step(step)?;
        if self.noted.is_none() {
            // Of a copy.
            self.make_room_for_verdicts(step)?;
        }
        Ok(step)
    }

    /// Whether queries of `step` have a token outside of their window that waits for its verdict.
    pub fn needs_verdicts(&self, step: Step) -> bool {
        let leaves = |first: usize, layer: &LayerStore| layer.local().is_some_and(|local| first < local.edge(step.end() - 1));
        self.waiting.as_ref().is_some_and(|waiting| self.layers.iter().any(|layer| leaves(waiting.step.start, layer)))
    }

    fn reserve_step(&mut self, step: Step) -> Result<()> {
        self.learn()?;
        // What a failed step left behind is moved before anything takes its place.
        if self.layers.iter().any(LayerStore::is_to_move) {
            self.bring_tables()?;
        }
        let places: Vec<_> = self.layers.iter_mut().map(|layer| layer.begin(step)).collect();
        self.make_places(places, step.start > 0, step.len == 1)?;
        if step.len == 1 {
            self.bring_tables()?;
        }
        self.changes += 1;
        // A step that failed may have left some.
        self.have_none_wait_from(self.len);
        (self.read, self.uncounted) = (ReadCount::default(), None);
        Ok(())
    }

    /// Makes room for the token after `step` while a device is at work on that, so that [`KvCache::reserve`] has little left to do. Pools that were
    /// made for so many tokens grow when the next one is there, no sooner.
    ///
    /// # Errors
    /// As there; `step` is not affected.
    pub fn reserve_next(&mut self, step: Step) -> Result<()> {
        let next = Step { start: step.end(), len: 1 };
        if self.needs_verdicts(next) {
            return Ok(());
        }
        let places: Vec<_> = self.layers.iter().map(|layer| layer.places_for(next)).collect();
        let are_planned = |(layer, places): (&LayerStore, &Option<Places>)| layer.local().is_none() && layer.lacks_pages(places.as_ref());
        if places.iter().all(Option::is_none) || self.layers.iter().zip(&places).any(are_planned) {
            return Ok(());
        }
        self.make_places(places, true, true)?;
        self.bring_tables()
    }

    /// Makes these places in each layer; see [`KvCache::make_pages`].
    fn make_places(&mut self, places: Vec<Option<Places>>, keeps: bool, single: bool) -> Result<()> {
        self.make_pages(&places, keeps, single)?;
        self.are_tables_brought = false;
        for (layer, places) in self.layers.iter_mut().zip(places) {
            places.into_iter().for_each(|places| layer.take(places));
        }
        Ok(())
    }

    /// Gives pools that lack pages for `places` of their layers more, and those beside them; `keeps` what is there. Before a `single` token on a GPU
    /// then also pools that will soon lack some: whenever one is somewhere else, that step is recorded anew.
    fn make_pages(&mut self, places: &[Option<Places>], keeps: bool, single: bool) -> Result<()> {
        let foresees = single && !self.device.is_cpu();
        let lacks = |layer: usize| self.layers[layer].lacks_pages(places[layer].as_ref());
        if !(0..self.layers.len()).any(lacks) {
            return Ok(());
        }
        let is_due = |layer: usize| lacks(layer) || foresees && self.layers[layer].is_nearly_full(places[layer].as_ref());
        let pages: Vec<usize> = self.layers.iter().zip(places).map(|(layer, places)| layer.pages_to_have(places.as_ref())).collect();
        let bytes = |layer: usize| self.layers[layer].bytes_of(pages[layer]);
        for slab in self.slabs.renew(is_due, bytes, slabs::joins(&self.layers)) {
            let layers = &mut self.layers[slab.clone()];
            let new = slabs::pools_of(layers, |index| pages[slab.start + index])?;
            for (layer, [k, v]) in layers.iter_mut().zip(new) {
                if keeps {
                    k.take_over(layer.k())?;
                    v.take_over(layer.v())?;
                }
                layer.take_pools([k, v]);
            }
        }
        Ok(())
    }

    /// Brings the page tables to the device of the pools, if that is not the host and has not got them, and moves what has another place by them. Layers
    /// ask for it when they write: the device is at work on a long step's first products by then.
    ///
    /// # Errors
    /// If the device has no memory for them.
    pub fn bring_tables(&mut self) -> Result<()> {
        self.are_tables_brought =
            self.are_tables_brought || self.device.is_cpu() || self.mirrors.are_of(self.layers.iter().map(LayerStore::table));
        if self.are_tables_brought {
            return Ok(());
        }
        let tables: Vec<_> = self.layers.iter().map(LayerStore::tables).collect();
        let mut staged = self.mirrors.stage(&tables, false);
        let moved: Vec<_> = self.layers.iter().zip(&staged.layouts).filter_map(|(layer, layout)| layer.moved(*layout)).collect();
        if !moved.is_empty() {
            cuda::compact(&moved, staged.beside(&self.device)?)?;
        }
        self.look_up(staged)
    }

    /// Makes staged tables those that layers look up.
    fn look_up(&mut self, staged: Staged) -> Result<()> {
        let tables: Vec<_> = self.layers.iter().map(LayerStore::tables).collect();
        let are_elsewhere = self.mirrors.put(staged, &tables, &self.device)?;
        for (index, layer) in self.layers.iter_mut().enumerate() {
            layer.look_up_in(are_elsewhere.then(|| self.mirrors.part(index).clone()));
        }
        self.are_tables_brought = true;
        Ok(())
    }

    /// What the newest step read.
    pub fn read_count(&self) -> ReadCount {
        let mut read = self.read;
        if let Some((step, layers)) = &self.uncounted {
            layers.iter().for_each(|layer| read.add(self.layers[*layer].count_visible(*step)));
        }
        read
    }

    /// Adds what a layer read in the running step.
    pub fn count_read(&mut self, count: ReadCount) {
        self.read.add(count);
    }

    /// Counts for a layer all that the running step sees, once somebody asks.
    pub fn count_visible_later(&mut self, layer: usize, step: Step) {
        self.uncounted.get_or_insert_with(|| (step, Vec::new())).1.push(layer);
    }

    /// How often steps began and tokens were forgotten: who led the last one knows by it whether somebody else did since.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Has the tokens of the running step wait for their verdicts, with those before it that do. `inputs`: of each of a gate's stacks the attention
    /// inputs, `[layers, rows, hidden_size]` bf16, the first token's in row `first`, and all others in those that follow; `None`: no layer of it waits.
    /// They are held until the verdicts are made, or not needed any more.
    ///
    /// # Errors
    /// If others wait that these do not follow, in the same tensors.
    pub fn wait_for_verdicts(&mut self, step: Step, inputs: &[Option<Arc<Tensor>>], first: usize) -> Result<()> {
        let Some(waiting) = &mut self.waiting else {
            self.waiting = Some(Waiting { step, inputs: inputs.to_vec(), first });
            return Ok(());
        };
        let at = |inputs: &Option<Arc<Tensor>>| inputs.as_ref().map(Arc::as_ptr);
        let are_same = waiting.inputs.iter().map(at).eq(inputs.iter().map(at)) && waiting.first + waiting.step.len == first;
        match waiting.step.and(step).filter(|_| are_same) {
            Some(both) => waiting.step = both,
            None => bail!("kv cache: {} tokens from {} on wait for other verdicts", waiting.step.len, waiting.step.start),
        }
        Ok(())
    }

    /// The tokens that wait for verdicts; `None`: all are made, or on their way.
    pub fn waiting(&self) -> Option<Step> {
        self.waiting.as_ref().map(|waiting| waiting.step)
    }

    /// Forgets that tokens from position `len` on wait for verdicts.
    fn have_none_wait_from(&mut self, len: usize) {
        self.waiting = self.waiting.take().and_then(|waiting| waiting.until(len));
    }

    pub(crate) fn waiting_by(&self) -> Option<&Waiting> {
        self.waiting.as_ref()
    }

    /// Notes that these verdicts are made.
    pub(crate) fn is_given_verdicts(&mut self) {
        self.waiting = None;
        self.layers.iter_mut().for_each(LayerStore::is_given_verdict);
        self.see_by_position();
    }

    /// Summarises the blocks that layers left to be summarised together, as far as verdicts on their tokens are made. [`KvCache::reserve`] does
    /// it if nobody did before.
    ///
    /// # Errors
    /// If keys cannot be read, or the device is out of memory.
    pub fn summarise(&mut self) -> Result<()> {
        if !self.layers.iter().any(LayerStore::has_summaries_due) {
            return Ok(());
        }
        // A copy has none yet.
        self.bring_tables()?;
        let blocks = self.layers.iter_mut().map(LayerStore::begin_summaries).collect::<Result<Vec<_>>>()?;
        let by_device = self
            .layers
            .iter()
            .zip(&blocks)
            .filter_map(|(store, blocks)| Some(Summarised { store, summaries: store.summaries()?, blocks: blocks.clone()? }));
        cuda::summarise(&by_device.collect::<Vec<_>>())?;
        for (layer, blocks) in self.layers.iter_mut().zip(&blocks) {
            blocks.iter().for_each(|blocks| layer.end_summaries(blocks));
        }
        Ok(())
    }

    /// Has the device tell the host, once it made them all, the verdicts of a token router that only the device knows: [`KvCache::learn`] waits for
    /// them. Those that are still to be made are told when they are.
    ///
    /// # Errors
    /// If the device fails.
    pub fn tell(&mut self) -> Result<()> {
        let Some(step) = self.layers.iter().find_map(LayerStore::untold).filter(|_| self.told.is_none()) else { return Ok(()) };
        self.make_room_for_verdicts(step)?;
        let untold: Vec<_> = self.layers.iter().filter_map(LayerStore::told).collect();
        self.told = Some(cuda::tell(&untold, step, &self.device)?);
        Ok(())
    }

    /// Learns the verdicts that the device tells. Whatever changes the cache does it before.
    ///
    /// # Errors
    /// If the device fails.
    pub fn learn(&mut self) -> Result<()> {
        let Some(told) = self.told.take() else { return Ok(()) };
        told.wait()?;
        self.layers.iter_mut().for_each(LayerStore::settle);
        Ok(())
    }

    /// Makes the tokens of `step` part of the cache, and learns what a token router decided on them where a device did; verdicts that they wait for
    /// are still to be made.
    ///
    /// # Errors
    /// If `step` is not the one that follows the committed tokens, the device fails, or verdicts are to be made of nothing.
    pub fn commit(&mut self, step: Step) -> Result<()> {
        self.commit_untold(step)?;
        if self.waiting.is_none() {
            self.summarise()?;
        }
        self.learn()
    }

    /// [`KvCache::commit`] that does not wait for verdicts which a device has yet to tell: [`KvCache::learn`] does. Until then layers and counts know
    /// nothing of them.
    ///
    /// # Errors
    /// As there.
    pub fn commit_untold(&mut self, step: Step) -> Result<()> {
        if step.start != self.len {
            bail!("kv cache: the step starts at {}, but {} tokens are committed", step.start, self.len);
        }
        if let Some(layer) = self.layers.iter().position(|layer| self.waiting.is_none() && layer.waiting().is_some()) {
            bail!("kv cache: layer {layer} waits for the verdict on {} tokens that nothing is kept of", step.len);
        }
        self.tell()?;
        self.len = step.end();
        Ok(())
    }

    /// Gives the layers whose tokens a router decides on memory of the host for the verdicts of `step`, where there is a device that makes
    /// them.
    fn make_room_for_verdicts(&mut self, step: Step) -> Result<()> {
        if !self.device.is_cuda() {
            return Ok(());
        }
        let rooms: Vec<usize> = self.layers.iter().map(|layer| layer.octets_of_verdicts(step)).collect();
        let all = rooms.iter().sum();
        if self.noted.as_ref().is_none_or(|noted| noted.len() < all) {
            self.noted = if all > 0 { Some(Arc::new(Pinned::zeros(&self.device, all)?)) } else { None };
        }
        let Some(noted) = &self.noted else { return Ok(()) };
        let mut first = 0;
        for (layer, room) in self.layers.iter_mut().zip(rooms) {
            layer.note_verdicts_in(noted, first);
            first += room;
        }
        Ok(())
    }

    /// The shortest length that [`KvCache::truncate`] can go back to, besides 0: layers with a sliding
    /// window forget what no later query can see.
    pub fn oldest_restorable(&self) -> usize {
        self.layers.iter().map(LayerStore::oldest_restorable).max().unwrap_or(0)
    }

    /// Forgets every token from position `len` on. `truncate(0)` always works.
    ///
    /// # Errors
    /// If `len` is beyond the committed tokens, or before [`KvCache::oldest_restorable`].
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            bail!("kv cache: cannot truncate to {len} tokens, only {} are there", self.len);
        }
        self.learn()?;
        let oldest = self.oldest_restorable();
        if len != 0 && len < oldest {
            bail!("kv cache: cannot go back to {len} tokens, sliding layers keep what {oldest} and more need");
        }
        self.changes += 1;
        self.have_none_wait_from(len);
        (self.read, self.uncounted, self.are_tables_brought) = (self.read_count(), None, false);
        for layer in &mut self.layers {
            layer.truncate(len);
        }
        self.len = len;
        self.see_by_position();
        Ok(())
    }

    /// Gives memory back that long steps took and shorter ones do not need, where a token router is at work; on a GPU what the cache was not made
    /// with.
    ///
    /// # Errors
    /// If memory for the copy runs out: nothing is lost then, but some layers have given theirs back and others have not.
    pub fn trim(&mut self) -> Result<()> {
        self.learn()?;
        if self.device.is_cpu() {
            return self.layers.iter_mut().try_for_each(|layer| layer.trim(self.len));
        }
        if !self.layers.iter().any(LayerStore::has_grown) {
            return Ok(());
        }
        // While the keys are where blocks have them. Where tokens wait for verdicts, those that left the window came before: their blocks are summarised.
        if self.waiting.is_none() {
            self.summarise()?;
        }
        // By the old tables, which are on the device, and the new ones.
        self.bring_tables()?;
        let mut after: Vec<_> = self.layers.iter().map(|layer| layer.compaction(self.len)).collect();
        let is_due = |layer: usize| after[layer].as_ref().is_some_and(|(_, is_due)| *is_due);
        let bytes = |layer: usize| after[layer].as_ref().map_or(0, |(places, _)| self.layers[layer].bytes_of(places.pages()));
        let slabs = self.slabs.renew(is_due, bytes, slabs::joins(&self.layers));
        let renewed: Vec<usize> = slabs.iter().cloned().flatten().collect();
        if renewed.is_empty() {
            return Ok(());
        }
        self.are_tables_brought = false;
        let mut places: Vec<Option<Places>> = self.layers.iter().map(|_| None).collect();
        for layer in renewed {
            places[layer] = after[layer].take().map(|(places, _)| places);
        }
        let tables: Vec<_> = self.layers.iter().zip(&places).map(|(layer, places)| layer.tables_after(places.as_ref())).collect();
        let mut staged = self.mirrors.stage(&tables, true);
        // One after the other: only so much is there twice.
        for slab in slabs {
            let (layers, places, layouts) = (&mut self.layers[slab.clone()], &mut places[slab.clone()], &staged.layouts[slab]);
            let places: Vec<Places> = places.iter_mut().filter_map(Option::take).collect();
            let new = slabs::pools_of(layers, |index| places[index].pages())?;
            let jobs = layers.iter().zip(&places).zip(&new).zip(layouts);
            let jobs: Vec<_> = jobs.map(|(((layer, places), new), layout)| layer.compacted(places, new, *layout)).collect();
            cuda::compact(&jobs, staged.beside(&self.device)?)?;
            for ((layer, places), new) in layers.iter_mut().zip(places).zip(new) {
                layer.take_compacted(places, new);
            }
        }
        self.look_up(staged)
    }

    /// A copy of the sequence so far, to go on from in another direction: a shared prefix is computed once.
    ///
    /// # Errors
    /// If the device has no memory for it, or verdicts are still to be made or learned.
    pub fn fork(&self) -> Result<Self> {
        if self.told.is_some() || self.waiting.is_some() {
            bail!("kv cache: verdicts on the newest of its {} tokens are to be made and learned before anything is copied", self.len);
        }
        let (mut layers, mut slabs) = (Vec::with_capacity(self.layers.len()), Slabs::single(self.layers.len()));
        let bytes = |layer: usize| self.layers[layer].bytes_of(self.layers[layer].k().pages());
        for slab in slabs.renew(|_| true, bytes, slabs::joins(&self.layers)) {
            let old = &self.layers[slab];
            for (layer, [k, v]) in old.iter().zip(slabs::pools_of(old, |index| old[index].k().pages())?) {
                k.take_over(layer.k())?;
                v.take_over(layer.v())?;
                layers.push(layer.fork([k, v])?);
            }
        }
        Ok(Self::of(layers, slabs, &self.device, self.len))
    }

    /// Bytes allocated for keys, values, page tables and block summaries, slack included.
    pub fn allocated_bytes(&self) -> usize {
        self.layers.iter().map(LayerStore::allocated_bytes).sum()
    }
}

impl Waiting {
    /// Those before position `len`.
    fn until(self, len: usize) -> Option<Self> {
        self.step.until(len).map(|step| Self { step, ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_step_sees_is_the_sum_over_its_tokens() {
        for (start, len, window) in [(0, 1, 1), (0, 300, 70), (50, 30, 70), (200, 1, 70), (69, 2, 70), (10, 500, usize::MAX)] {
            let step = Step { start, len };
            assert_eq!(step.seen(window), (start..start + len).map(|t| (t + 1).min(window) as u64).sum::<u64>(), "{step:?} {window}");
        }
    }
}
