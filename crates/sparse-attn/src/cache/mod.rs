//! Keys and values of past tokens: what every layer stores, and how much of it is committed.

mod admitted;
mod dtype;
mod hadamard;
mod layer_store;
mod mirror;
mod page_table;
mod pool;
mod scatter;
mod summary;

pub use admitted::Admitted;
pub use dtype::{GROUP, KvDtype, KvDtypes};
pub use layer_store::{LayerSpec, LayerStore, Local, Move};
pub use mirror::DeviceKept;
pub use page_table::{NO_PAGE, PAGE_SIZE, PageTable};
pub use pool::{LANES, OCTET, Order, Pool};
pub use summary::{Summaries, Summary};

pub(crate) use mirror::Layout;
use mirror::{Mirrors, Staged};

use crate::backend::cuda::{self, Pinned};
use crate::parallel;
use candle_core::{Device, Result, bail};
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
    device: Device,
    len: usize,
    read: ReadCount,
    /// The page tables, where a device has the pools.
    mirrors: Mirrors,
    /// Where a device notes verdicts of token routers for the host: every layer's of a step.
    noted: Option<Arc<Pinned<u8>>>,
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

/// Bytes of layers that are there twice while memory is given back.
const COMPACTED_BYTES: usize = 64 << 20;

fn bytes_of<T>((_, pools, _): &(usize, [Pool; 2], T)) -> usize {
    pools.iter().map(Pool::bytes).sum()
}

impl KvCache {
    /// An empty cache with room for `capacity` tokens allocated now (it grows beyond when asked to).
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn new(specs: &[LayerSpec], dtypes: KvDtypes, device: &Device, capacity: usize) -> Result<Self> {
        let layers = specs.iter().map(|spec| LayerStore::new(*spec, dtypes, device, capacity)).collect::<Result<Vec<_>>>()?;
        Ok(Self { layers, device: device.clone(), len: 0, read: ReadCount::default(), mirrors: Mirrors::default(), noted: None })
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

    /// One layer's store.
    pub fn layer(&self, layer: usize) -> &LayerStore {
        &self.layers[layer]
    }

    /// One layer's store, to write to.
    pub fn layer_mut(&mut self, layer: usize) -> &mut LayerStore {
        &mut self.layers[layer]
    }

    /// Makes room for `len` more tokens in every layer.
    ///
    /// # Errors
    /// If `len` is zero or the device is out of memory; the cache is then as it was.
    pub fn reserve(&mut self, len: usize) -> Result<Step> {
        if len == 0 {
            bail!("kv cache: a step needs at least one token");
        }
        let step = Step { start: self.len, len };
        // What a failed step left behind is moved before anything takes its place.
        self.reflect()?;
        for layer in &mut self.layers {
            layer.reserve(step)?;
        }
        self.reflect()?;
        self.make_room_for_verdicts(step)?;
        self.read = ReadCount::default();
        Ok(step)
    }

    /// Brings the page tables to the device of the pools, if that is not the host, and moves what has another place by them.
    fn reflect(&mut self) -> Result<()> {
        if self.device.is_cpu() || self.mirrors.are_of(self.layers.iter().map(LayerStore::table)) {
            return Ok(());
        }
        let tables: Vec<_> = self.layers.iter().map(LayerStore::tables).collect();
        let staged = self.mirrors.stage(&tables, &self.device)?;
        let moved = self.layers.iter().zip(&staged.layouts).filter_map(|(layer, layout)| layer.moved(*layout));
        cuda::compact(&moved.collect::<Vec<_>>(), &staged.numbers)?;
        self.look_up(staged)
    }

    /// Makes staged tables those that layers look up.
    fn look_up(&mut self, staged: Staged) -> Result<()> {
        let tables: Vec<_> = self.layers.iter().map(LayerStore::tables).collect();
        let are_elsewhere = self.mirrors.put(staged, &tables)?;
        for (index, layer) in self.layers.iter_mut().enumerate() {
            layer.look_up_in(are_elsewhere.then(|| self.mirrors.part(index).clone()));
        }
        Ok(())
    }

    /// What the newest step read.
    pub fn read_count(&self) -> ReadCount {
        self.read
    }

    /// Adds what a layer read in the running step.
    pub fn count_read(&mut self, count: ReadCount) {
        self.read.add(count);
    }

    /// Makes the tokens of `step` part of the cache.
    ///
    /// # Errors
    /// If `step` is not the one that follows the committed tokens.
    pub fn commit(&mut self, step: Step) -> Result<()> {
        if step.start != self.len {
            bail!("kv cache: the step starts at {}, but {} tokens are committed", step.start, self.len);
        }
        self.settle(step)?;
        self.len = step.end();
        Ok(())
    }

    /// Learns the token router's verdicts that only the device knows, once it made them all, and counts what their layers read: everything
    /// that is visible.
    fn settle(&mut self, step: Step) -> Result<()> {
        if self.layers.iter().all(LayerStore::is_decided) {
            return Ok(());
        }
        self.device.synchronize()?;
        let mut waiting: Vec<_> =
            self.layers.iter_mut().filter(|layer| !layer.is_decided()).map(|layer| (layer, ReadCount::default())).collect();
        parallel::for_each_mut(
            &mut waiting,
            || (),
            |(), _, (layer, count)| {
                layer.settle();
                *count = layer.count_visible(step);
            },
        );
        waiting.iter().for_each(|(_, count)| self.read.add(*count));
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
            layer.note_verdicts_in(noted.clone(), first);
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
        let oldest = self.oldest_restorable();
        if len != 0 && len < oldest {
            bail!("kv cache: cannot go back to {len} tokens, sliding layers keep what {oldest} and more need");
        }
        for layer in &mut self.layers {
            layer.truncate(len);
        }
        self.len = len;
        Ok(())
    }

    /// Gives memory back that long steps took and shorter ones do not need, where a token router is at work; on a GPU what the cache was not made
    /// with.
    ///
    /// # Errors
    /// If memory for the copy runs out: nothing is lost then, but some layers have given theirs back and others have not.
    pub fn trim(&mut self) -> Result<()> {
        if self.device.is_cpu() {
            return self.layers.iter_mut().try_for_each(|layer| layer.trim(self.len));
        }
        // By the old tables, which are on the device, and the new ones.
        self.reflect()?;
        let mut compactions: Vec<_> = self.layers.iter().map(|layer| layer.compaction(self.len)).collect();
        let mut waiting: Vec<usize> = (0..self.layers.len()).filter(|layer| compactions[*layer].is_some()).collect();
        if waiting.is_empty() {
            return Ok(());
        }
        let after = self.layers.iter().zip(&compactions).map(|(layer, compaction)| layer.tables_after(compaction.as_ref()));
        let staged = self.mirrors.stage(&after.collect::<Vec<_>>(), &self.device)?;
        while !waiting.is_empty() {
            // Small layers at once; a large one is there twice for as short as can be.
            let mut new = Vec::new();
            while let Some(index) = waiting.pop_if(|_| new.iter().map(bytes_of).sum::<usize>() < COMPACTED_BYTES) {
                if let Some(compaction) = compactions[index].take() {
                    new.push((index, self.layers[index].pools_for(&compaction)?, compaction));
                }
            }
            let jobs =
                new.iter().map(|(index, pools, compaction)| self.layers[*index].compacted(compaction, pools, staged.layouts[*index]));
            cuda::compact(&jobs.collect::<Vec<_>>(), &staged.numbers)?;
            for (index, pools, compaction) in new {
                self.layers[index].compact(compaction, pools);
            }
        }
        self.look_up(staged)
    }

    /// A copy of the sequence so far, to go on from in another direction: a shared prefix is computed once.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn fork(&self) -> Result<Self> {
        let layers = self.layers.iter().map(LayerStore::fork).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            layers,
            device: self.device.clone(),
            len: self.len,
            read: ReadCount::default(),
            mirrors: Mirrors::default(),
            noted: None,
        })
    }

    /// Bytes allocated for keys, values, page tables and block summaries, slack included.
    pub fn allocated_bytes(&self) -> usize {
        self.layers.iter().map(LayerStore::allocated_bytes).sum()
    }
}
