//! Where a layer's tokens lie, on the device of its pools: what kernels look rows up by.

use super::admitted::Admitted;
use super::{OCTET, PAGE_SIZE, PageTable};
use candle_core::{DType, Device, Result, Tensor};

/// A copy of the page tables in one tensor, which stays where it is until there is no more room.
#[derive(Debug)]
pub(super) struct Mirror {
    table: Tensor,
    rooms: [usize; 2], // for recent and kept pages of a head
    /// The page of each recent token, `[kv_heads, room]` u32, with anything beyond the last one: a part of the tensor.
    pub(super) pages: Tensor,
    /// What the token router leaves, where there is one.
    pub(super) kept: Option<DeviceKept>,
    version: u64,
}

/// What a token router leaves, on the device of the pools: `Kept` of kernels/params.h.
#[derive(Debug)]
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

impl Mirror {
    /// Whether it says what the tables do.
    pub(super) fn is_of(&self, table: &PageTable) -> bool {
        self.version == table.version()
    }

    /// The tables on `device`: in the place of `old`, if they fit. `enough`: pages that there is room for at least.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub(super) fn new(tables: Tables<'_>, old: Option<Self>, enough: usize, device: &Device) -> Result<Self> {
        let Tables { kv_heads, table, admitted, frontier } = tables;
        let (recent, kept) = ((0..kv_heads).map(|head| table.recent(head)), (0..kv_heads).map(|head| table.kept(head)));
        let had = old.as_ref().map_or([0; 2], |old| old.rooms);
        let room =
            |had: usize, longest: usize| if had >= longest.max(1) { had } else { (longest + longest / 4).max(enough).next_multiple_of(16) };
        let longest = |lists: &mut dyn Iterator<Item = &[u32]>| lists.map(<[u32]>::len).max().unwrap_or(0);
        let rooms = [room(had[0], longest(&mut recent.clone())), room(had[1], longest(&mut kept.clone()))];
        let mut numbers = Vec::with_capacity(kv_heads * (2 * rooms[0] + rooms[1] + 1) + 1);
        recent.for_each(|list| put(&mut numbers, list, rooms[0]));
        if let Some(admitted) = admitted {
            kept.for_each(|list| put(&mut numbers, list, rooms[1]));
            for admitted in admitted {
                let ranks: Vec<u32> = (0..=frontier / PAGE_SIZE).map(|page| admitted.rank(page * PAGE_SIZE) as u32).collect();
                put(&mut numbers, &ranks, rooms[0]);
            }
            numbers.push(frontier as u32);
            numbers.extend(admitted.iter().map(|admitted| admitted.rank(frontier) as u32));
        }
        let count = numbers.len();
        let numbers = Tensor::from_vec(numbers, count, device)?;
        if let Some(old) = old.filter(|old| old.rooms == rooms) {
            old.table.slice_set(&numbers, 0, 0)?;
            return Ok(Self { version: table.version(), ..old });
        }
        let masks = Tensor::zeros((kv_heads, rooms[0] * (PAGE_SIZE / OCTET)), DType::U8, device)?;
        let new = Self::of_table(numbers, rooms, admitted.map(|_| masks), kv_heads, table.version())?;
        if let (Some(kept), Some(admitted)) = (&new.kept, admitted) {
            kept.put_masks(admitted, 0)?;
        }
        Ok(new)
    }

    /// The parts of a tensor.
    fn of_table(table: Tensor, rooms: [usize; 2], masks: Option<Tensor>, kv_heads: usize, version: u64) -> Result<Self> {
        let mut at = 0;
        let mut part = |rows: usize, room: usize| {
            at += rows * room;
            table.narrow(0, at - rows * room, rows * room)?.reshape((rows, room))
        };
        let pages = part(kv_heads, rooms[0])?;
        let kept = match masks {
            Some(masks) => Some(DeviceKept {
                pages: part(kv_heads, rooms[1])?,
                ranks: part(kv_heads, rooms[0])?,
                counts: part(1, 1 + kv_heads)?.flatten_all()?,
                masks,
            }),
            None => None,
        };
        Ok(Self { table, rooms, pages, kept, version })
    }

    /// The same in memory of its own.
    ///
    /// # Errors
    /// If the device has none for it.
    pub(super) fn fork(&self) -> Result<Self> {
        let masks = self.kept.as_ref().map(|kept| kept.masks.copy()).transpose()?;
        Self::of_table(self.table.copy()?, self.rooms, masks, self.pages.dim(0)?, self.version)
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        let masks = self.kept.as_ref().map_or(0, |kept| kept.masks.elem_count());
        self.table.elem_count() * size_of::<u32>() + masks
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
fn put(numbers: &mut Vec<u32>, list: &[u32], room: usize) {
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
        let (mut table, mut mirror) = (PageTable::new(2, Some(100)), None);
        let mut admitted = vec![Admitted::default(), Admitted::default()];
        for (start, len) in [(0, 300), (300, 1), (301, 2000), (2301, 40)] {
            let step = Step { start, len };
            let frontier = table.frontier(step);
            for (head, admitted) in admitted.iter_mut().enumerate() {
                table.reserve_kept(head, admitted.rank(frontier));
            }
            table.reserve(step);
            let tables = Tables { kv_heads: 2, table: &table, admitted: Some(&admitted), frontier };
            let new = Mirror::new(tables, mirror.take(), 4, &Device::Cpu)?;
            assert!(new.is_of(&table));
            for (head, admitted) in admitted.iter_mut().enumerate() {
                let pages = new.pages.to_vec2::<u32>()?;
                assert_eq!(pages[head][..table.recent(head).len()], *table.recent(head));
                let kept = new.kept.as_ref().expect("a token router decides");
                assert_eq!(kept.pages.to_vec2::<u32>()?[head][..table.kept(head).len()], *table.kept(head));
                assert_eq!(kept.counts.to_vec1::<u32>()?[1 + head] as usize, admitted.rank(frontier));
                let (ranks, masks) = (kept.ranks.to_vec2::<u32>()?, kept.masks.to_vec2::<u8>()?);
                assert!((0..=frontier / 64).all(|page| ranks[head][page] as usize == admitted.rank(64 * page)));
                assert!((0..start / 8).all(|octet| masks[head][octet] == admitted.octet(8 * octet)));
                admitted.extend((start..start + len).map(|t| (t + head) % 3 == 0));
            }
            if let Some(kept) = &new.kept {
                kept.put_masks(&admitted, start)?;
            }
            let fork = new.fork()?;
            assert_eq!((fork.bytes(), fork.pages.to_vec2::<u32>()?), (new.bytes(), new.pages.to_vec2::<u32>()?));
            mirror = Some(new);
        }
        Ok(())
    }
}
