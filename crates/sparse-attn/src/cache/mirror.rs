//! Where the tokens of all layers lie, on the device of their pools: what kernels look rows up by.

use super::admitted::Admitted;
use super::{OCTET, PAGE_SIZE, PageTable};
use crate::backend::cuda;
use candle_core::{DType, Device, Result, Tensor};
use std::ops::Range;

/// Pages of a head that there is room for beyond those that there are, and a quarter of them.
const SPARE: usize = 16;

/// Room for so many pages and some more: until it is full nothing lies elsewhere, and no step is recorded anew.
fn roomy(pages: usize) -> usize {
    (pages + pages / 4 + SPARE).next_multiple_of(16)
}

/// The page tables of all layers in one tensor, which stays where it is until there is no more room: they are brought at once.
#[derive(Debug, Default)]
pub(super) struct Mirrors {
    numbers: Option<Tensor>, // u32
    parts: Vec<Part>,
    /// Whether no layer has kept tokens there.
    none_kept: bool,
}

#[derive(Debug)]
struct Part {
    layout: Layout,
    version: u64,
    mirror: Mirror,
}

/// A layer's part of the tables.
#[derive(Debug, Clone)]
pub(super) struct Mirror {
    /// The page of each recent token, `[kv_heads, room]` u32, with anything beyond the last one.
    pub(super) pages: Tensor,
    /// What the token router leaves, where there is one.
    pub(super) kept: Option<DeviceKept>,
}

/// What a token router leaves, on the device of the pools: `Kept` of kernels/params.h.
#[derive(Debug, Clone)]
pub struct DeviceKept {
    /// The pages of kept tokens, `[kv_heads, room]` u32.
    pub pages: Tensor,
    /// How many tokens of each head are kept before each [`PAGE_SIZE`] positions, up to the frontier, `[kv_heads, room for recent pages]`
    /// u32.
    pub ranks: Tensor,
    /// The frontier, and how many tokens of each head are kept before it, `[1 + kv_heads]` u32.
    pub counts: Tensor,
    /// A bit for each position that is decided, `[kv_heads, room for recent pages * 8]` u8.
    pub masks: Tensor,
    /// Where those are, for launches of many layers: the host looks at no tensor.
    pub(crate) verdicts: VerdictMasks,
}

/// Where a GPU notes verdicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VerdictMasks {
    pub(crate) at: u64,
    pub(crate) kv_heads: usize,
    /// That there is room for.
    pub(crate) octets: usize,
}

/// What is copied: a layer's tables on the host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tables<'a> {
    pub(super) kv_heads: usize,
    pub(super) table: &'a PageTable,
    /// Per head, where a token router decides; and the first position that it does not.
    pub(super) admitted: Option<&'a [Admitted]>,
    pub(super) frontier: usize,
}

/// Where a layer's tables are among the numbers of all: first come the recent pages of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    first: usize,
    /// Of what a token router leaves.
    first_routed: usize,
    /// For recent and kept pages of a head.
    pub(crate) rooms: [usize; 2],
    kv_heads: usize,
    is_routed: bool,
}

/// Tables on their way: all that will be in the tensor of [`Mirrors`], which still says what was, or no more than the recent pages, where no token left
/// a window and none had.
#[derive(Debug)]
pub(crate) struct Staged {
    numbers: Vec<u32>,
    /// The same on the device, beside what was, if somebody asked for them.
    beside: Option<Tensor>,
    none_kept: bool,
    /// Of each layer.
    pub(crate) layouts: Vec<Layout>,
    versions: Vec<u64>,
}

impl Layout {
    /// `[kv_heads, room]`
    pub(crate) fn pages(&self) -> Range<usize> {
        self.first..self.first + self.kv_heads * self.rooms[0]
    }

    /// `[kv_heads, room]`
    pub(crate) fn kept_pages(&self) -> Range<usize> {
        self.first_routed..self.first_routed + self.routed(self.kv_heads * self.rooms[1])
    }

    /// `[kv_heads, room for recent pages]`
    pub(crate) fn ranks(&self) -> Range<usize> {
        let first = self.kept_pages().end;
        first..first + self.routed(self.kv_heads * self.rooms[0])
    }

    /// `[1 + kv_heads]`
    pub(crate) fn counts(&self) -> Range<usize> {
        let first = self.ranks().end;
        first..first + self.routed(1 + self.kv_heads)
    }

    fn routed(&self, count: usize) -> usize {
        if self.is_routed { count } else { 0 }
    }
}

impl Mirrors {
    /// Whether the tensor says what these tables do, layer by layer.
    pub(super) fn are_of<'a>(&self, tables: impl ExactSizeIterator<Item = &'a PageTable>) -> bool {
        self.parts.len() == tables.len() && self.parts.iter().zip(tables).all(|(part, table)| part.version == table.version())
    }

    /// The tables as they are to be: `all` of them, or as little as tells what is new.
    pub(super) fn stage(&self, tables: &[Tables<'_>], all: bool) -> Staged {
        let (mut layouts, mut first) = (Vec::with_capacity(tables.len()), 0);
        let longest: Vec<[usize; 2]> = tables.iter().map(Tables::longest).collect();
        let had: Vec<[usize; 2]> = (0..tables.len()).map(|index| self.parts.get(index).map_or([0; 2], |part| part.layout.rooms)).collect();
        // Where one has no room, all get more.
        let grows = longest.as_flattened().iter().zip(had.as_flattened()).any(|(longest, had)| longest > had);
        for ((tables, longest), had) in tables.iter().zip(longest).zip(had) {
            let room = |kind: usize| if grows { had[kind].max(roomy(longest[kind])) } else { had[kind] };
            let (rooms, is_routed) = ([room(0), room(1)], tables.admitted.is_some());
            let layout = Layout { first, first_routed: 0, rooms, kv_heads: tables.kv_heads, is_routed };
            first = layout.pages().end;
            layouts.push(layout);
        }
        for layout in &mut layouts {
            layout.first_routed = first;
            first = layout.counts().end;
        }
        let none_kept = tables.iter().all(|tables| tables.frontier == 0);
        let is_short = !all && none_kept && self.none_kept && self.has(&layouts);
        let mut numbers = Vec::with_capacity(first);
        for (tables, layout) in tables.iter().zip(&layouts) {
            tables.put_recent(&mut numbers, layout);
        }
        for (tables, layout) in tables.iter().zip(&layouts).filter(|_| !is_short) {
            tables.put_routed(&mut numbers, layout);
        }
        let versions = tables.iter().map(|tables| tables.table.version()).collect();
        Staged { numbers, beside: None, none_kept, layouts, versions }
    }

    /// Makes what was staged of `tables` that which kernels look up on `device`. Returns whether it is somewhere else now: [`Mirrors::part`] tells where.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub(super) fn put(&mut self, mut staged: Staged, tables: &[Tables<'_>], device: &Device) -> Result<bool> {
        self.none_kept = staged.none_kept;
        if let Some(old) = self.numbers.as_ref().filter(|_| self.has(&staged.layouts)) {
            match staged.beside {
                None if device.is_cuda() => cuda::put_numbers(&staged.numbers, old)?,
                _ => old.slice_set(staged.beside(device)?, 0, 0)?,
            }
            self.parts.iter_mut().zip(staged.versions).for_each(|(part, version)| part.version = version);
            return Ok(false);
        }
        let numbers = staged.beside(device)?.clone();
        let mut parts = Vec::with_capacity(tables.len());
        for (((layout, version), tables), index) in staged.layouts.into_iter().zip(staged.versions).zip(tables).zip(0..) {
            let masks = self.parts.get(index).and_then(|part| part.mirror.kept.as_ref()).map(|kept| &kept.masks);
            parts.push(Part { layout, version, mirror: Mirror::of(&numbers, &layout, masks, tables.admitted)? });
        }
        (self.numbers, self.parts) = (Some(numbers), parts);
        Ok(true)
    }

    fn has(&self, layouts: &[Layout]) -> bool {
        self.parts.iter().map(|part| &part.layout).eq(layouts)
    }

    /// Where a layer's tables are.
    pub(super) fn part(&self, layer: usize) -> &Mirror {
        &self.parts[layer].mirror
    }
}

impl Staged {
    /// The tables on `device`, beside those that are there: for who moves by both.
    ///
    /// # Errors
    /// If it has no memory for them.
    pub(super) fn beside(&mut self, device: &Device) -> Result<&Tensor> {
        let numbers = match self.beside.take() {
            Some(numbers) => numbers,
            None => Tensor::new(self.numbers.as_slice(), device)?,
        };
        Ok(self.beside.insert(numbers))
    }
}

impl Tables<'_> {
    /// The longest lists of a head: of recent pages, and of kept ones.
    fn longest(&self) -> [usize; 2] {
        let longest =
            |list: fn(&PageTable, usize) -> &[u32]| (0..self.kv_heads).map(|head| list(self.table, head).len()).max().unwrap_or(0);
        [longest(PageTable::recent), longest(PageTable::kept)]
    }

    /// Adds the recent pages to those of other layers.
    fn put_recent(&self, numbers: &mut Vec<u32>, layout: &Layout) {
        (0..self.kv_heads).for_each(|head| put(numbers, self.table.recent(head).iter().copied(), layout.rooms[0]));
    }

    /// Adds what a token router leaves to the numbers of other layers.
    fn put_routed(&self, numbers: &mut Vec<u32>, layout: &Layout) {
        let [recent, kept] = layout.rooms;
        let Some(admitted) = self.admitted else { return };
        (0..self.kv_heads).for_each(|head| put(numbers, self.table.kept(head).iter().copied(), kept));
        for admitted in admitted {
            put(numbers, (0..=self.frontier / PAGE_SIZE).map(|page| admitted.rank(page * PAGE_SIZE) as u32), recent);
        }
        numbers.push(self.frontier as u32);
        numbers.extend(admitted.iter().map(|admitted| admitted.rank(self.frontier) as u32));
    }
}

impl Mirror {
    /// A layer's part of the numbers of all, with what `masks` says where there are some already: by the device itself, which may decide on more
    /// tokens than the host knows of.
    fn of(numbers: &Tensor, layout: &Layout, masks: Option<&Tensor>, admitted: Option<&[Admitted]>) -> Result<Self> {
        let part = |range: Range<usize>, rows: usize| numbers.narrow(0, range.start, range.len())?.reshape((rows, range.len() / rows));
        let kv_heads = layout.kv_heads;
        let pages = part(layout.pages(), kv_heads)?;
        let Some(admitted) = admitted else { return Ok(Self { pages, kept: None }) };
        let octets = layout.rooms[0] * (PAGE_SIZE / OCTET);
        let new = || Tensor::zeros((kv_heads, octets), DType::U8, numbers.device());
        let masks_are_new = masks.is_none();
        let masks = match masks {
            Some(masks) if masks.dim(1)? == octets => masks.clone(),
            Some(fewer) => {
                let masks = new()?;
                masks.slice_set(fewer, 1, 0)?;
                masks
            }
            None => new()?,
        };
        let kept = DeviceKept {
            pages: part(layout.kept_pages(), kv_heads)?,
            ranks: part(layout.ranks(), kv_heads)?,
            counts: part(layout.counts(), 1)?.flatten_all()?,
            verdicts: VerdictMasks { at: if masks.device().is_cuda() { cuda::address(&masks)? } else { 0 }, kv_heads, octets },
            masks,
        };
        if masks_are_new {
            kept.put_masks(admitted, 0)?;
        }
        Ok(Self { pages, kept: Some(kept) })
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        let of_kept = |kept: &DeviceKept| {
            let numbers = [&kept.pages, &kept.ranks, &kept.counts].map(Tensor::elem_count);
            numbers.iter().sum::<usize>() * size_of::<u32>() + kept.masks.elem_count()
        };
        self.pages.elem_count() * size_of::<u32>() + self.kept.as_ref().map_or(0, of_kept)
    }
}

impl DeviceKept {
    /// Notes what was decided on the tokens from `position` on.
    ///
    /// # Errors
    /// If it cannot be brought to the device.
    pub(super) fn put_masks(&self, admitted: &[Admitted], position: usize) -> Result<()> {
        let decided = admitted.iter().map(Admitted::len).max().unwrap_or(0);
        let octets = position / OCTET..decided.div_ceil(OCTET);
        if octets.is_empty() {
            return Ok(());
        }
        let bits: Vec<u8> = admitted.iter().flat_map(|admitted| octets.clone().map(|octet| admitted.octet(octet * OCTET))).collect();
        self.masks.slice_set(&Tensor::from_vec(bits, (admitted.len(), octets.len()), self.masks.device())?, 1, octets.start)
    }
}

/// Adds a list to others, with zeros up to `room`.
fn put(numbers: &mut Vec<u32>, list: impl Iterator<Item = u32>, room: usize) {
    let end = numbers.len() + room;
    numbers.extend(list);
    numbers.resize(end, 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Step;

    #[test]
    fn what_kernels_look_up_is_what_the_host_has() -> Result<()> {
        // A layer whose tokens a router decides on, and one that keeps all.
        let (mut routed, mut plain) = (PageTable::new(2, Some(100), 0), PageTable::new(1, None, 0));
        let mut admitted = vec![Admitted::default(), Admitted::default()];
        let mut mirrors = Mirrors::default();
        for (start, len) in [(0, 60), (60, 1), (61, 239), (300, 1), (301, 2000), (2301, 40)] {
            let step = Step { start, len };
            let frontier = routed.frontier(step);
            for (head, admitted) in admitted.iter_mut().enumerate() {
                routed.reserve_kept(head, admitted.rank(frontier));
            }
            routed.reserve(step);
            plain.reserve(step);
            let tables = [
                Tables { kv_heads: 2, table: &routed, admitted: Some(&admitted), frontier },
                Tables { kv_heads: 1, table: &plain, admitted: None, frontier: 0 },
            ];
            assert!(!mirrors.are_of([&routed, &plain].into_iter()));
            let mut staged = mirrors.stage(&tables, false);
            let whole = mirrors.stage(&tables, true).numbers.len();
            assert_eq!(staged.numbers.len() < whole, matches!(start, 60 | 61), "what a router leaves comes once it leaves something");
            if start % 2 == 1 {
                assert_eq!(staged.beside(&Device::Cpu)?.elem_count(), staged.numbers.len());
            }
            assert_eq!(mirrors.put(staged, &tables, &Device::Cpu)?, start == 0 || start == 301, "only tables that need more room move");
            assert!(mirrors.are_of([&routed, &plain].into_iter()));
            let own = mirrors.part(1);
            assert_eq!(own.pages.to_vec2::<u32>()?[0][..plain.recent(0).len()], *plain.recent(0));
            let new = mirrors.part(0);
            for (head, admitted) in admitted.iter_mut().enumerate() {
                let pages = new.pages.to_vec2::<u32>()?;
                assert_eq!(pages[head][..routed.recent(head).len()], *routed.recent(head));
                let kept = new.kept.as_ref().expect("a token router decides");
                assert_eq!(kept.pages.to_vec2::<u32>()?[head][..routed.kept(head).len()], *routed.kept(head));
                assert_eq!(kept.counts.to_vec1::<u32>()?[1 + head] as usize, admitted.rank(frontier));
                let (ranks, masks) = (kept.ranks.to_vec2::<u32>()?, kept.masks.to_vec2::<u8>()?);
                assert!((0..=frontier / 64).all(|page| ranks[head][page] as usize == admitted.rank(64 * page)));
                assert!((0..start / 8).all(|octet| masks[head][octet] == admitted.octet(8 * octet)));
                admitted.extend((start..start + len).map(|t| (t + head) % 3 == 0));
            }
            if let Some(kept) = &new.kept {
                kept.put_masks(&admitted, start)?;
            }
        }
        Ok(())
    }
}
