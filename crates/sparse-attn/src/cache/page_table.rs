//! Where the pages of each head lie in a layer's pools.

use super::Step;

/// Slots (tokens) per page. One page holds keys or values of one head.
pub const PAGE_SIZE: usize = 64;

/// The entry of a logical page that was recycled because no later query can see it.
pub const NO_PAGE: u32 = u32::MAX;

/// Per head, the physical pages of its tokens, and the free pages.
///
/// Recent tokens have a place for every position; those of a head that were kept when the window left them are packed, one
/// after the other.
#[derive(Debug, Clone)]
pub struct PageTable {
    recent: Vec<Vec<u32>>,
    kept: Vec<Vec<u32>>,
    free: Vec<u32>,
    pages: u32,
    window: Option<usize>,
    dense_len: usize,
    version: u64,
}

impl PageTable {
    /// An empty table. `window`: for how many of the newest positions there are places (`None`: all), once there are queries at `dense_len` and beyond.
    pub fn new(kv_heads: usize, window: Option<usize>, dense_len: usize) -> Self {
        let none = vec![Vec::new(); kv_heads];
        Self { recent: none.clone(), kept: none, free: Vec::new(), pages: 0, window, dense_len, version: 0 }
    }

    /// The position before which queries see every token.
    pub fn dense_len(&self) -> usize {
        self.dense_len
    }

    /// Has queries before position `dense_len` see every token, of which none has lost its place.
    pub fn see_all_before(&mut self, dense_len: usize) {
        self.dense_len = dense_len;
    }

    /// A number that is another one whenever a place of a recent token changed.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Whether every position of `step` has a place already, and none is to be recycled.
    pub fn holds(&self, step: Step) -> bool {
        let dead = self.frontier(step) / PAGE_SIZE;
        let is_recycled = |head: &Vec<u32>| dead == 0 || head.get(dead - 1) == Some(&NO_PAGE);
        self.recent.iter().all(|head| head.len() * PAGE_SIZE >= step.end() && is_recycled(head))
    }

    /// Physical pages handed out so far, which the pools must hold.
    pub fn pages(&self) -> usize {
        self.pages as usize
    }

    /// Of those, the ones that hold nothing now.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// The physical page of each logical page (`position / PAGE_SIZE`) of `head`; [`NO_PAGE`] where recycled.
    pub fn recent(&self, head: usize) -> &[u32] {
        &self.recent[head]
    }

    /// The physical pages of the kept tokens of `head`.
    pub fn kept(&self, head: usize) -> &[u32] {
        &self.kept[head]
    }

    /// The slot in the pools of the recent token at `position`.
    pub fn recent_slot(&self, head: usize, position: usize) -> u32 {
        slot(&self.recent[head], position)
    }

    /// The slot in the pools of kept token number `index`.
    pub fn kept_slot(&self, head: usize, index: usize) -> u32 {
        slot(&self.kept[head], index)
    }

    /// The first position that has a place once `step` runs: those before are out of every window.
    pub fn frontier(&self, step: Step) -> usize {
        let window = self.window.filter(|_| step.start >= self.dense_len);
        window.map_or(0, |w| (step.start + 1).saturating_sub(w)) / PAGE_SIZE * PAGE_SIZE
    }

    /// Gives `head` pages for `slots` kept tokens.
    pub fn reserve_kept(&mut self, head: usize, slots: usize) {
        let missing = slots.div_ceil(PAGE_SIZE).saturating_sub(self.kept[head].len());
        self.kept[head].reserve(missing);
        for _ in 0..missing {
            let page = self.next();
            self.kept[head].push(page);
        }
    }

    /// Gives every head pages for the positions of `step`, after recycling those that neither this
    /// step nor a later one can see.
    pub fn reserve(&mut self, step: Step) {
        self.version += 1;
        let dead = self.frontier(step) / PAGE_SIZE;
        let needed = step.end().div_ceil(PAGE_SIZE);
        for head in 0..self.recent.len() {
            for page in self.recent[head].iter_mut().take(dead).rev().take_while(|page| **page != NO_PAGE) {
                self.free.push(std::mem::replace(page, NO_PAGE));
            }
            let missing = needed.saturating_sub(self.recent[head].len());
            self.recent[head].reserve(missing);
            for _ in 0..missing {
                let page = self.next();
                self.recent[head].push(page);
            }
        }
    }

    fn next(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.pages += 1;
            self.pages - 1
        })
    }

    /// The first position whose page is still there.
    pub fn first_position(&self) -> usize {
        let recycled = self.recent.first().map_or(0, |head| head.iter().take_while(|page| **page == NO_PAGE).count());
        recycled * PAGE_SIZE
    }

    /// Forgets everything: no page is handed out.
    pub fn clear(&mut self) {
        *self = Self { version: self.version + 1, ..Self::new(self.recent.len(), self.window, self.dense_len) };
    }

    /// Gives back the pages of all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.version += 1;
        let keep = len.div_ceil(PAGE_SIZE);
        for head in &mut self.recent {
            if head.len() > keep {
                self.free.extend(head.drain(keep..).filter(|page| *page != NO_PAGE));
            }
        }
    }

    /// A table for the same positions from `frontier` on and for as many kept tokens as `kept` says of each head, in which no page is free.
    pub fn compacted(&self, frontier: usize, kept: impl Fn(usize) -> usize) -> Self {
        let mut pages = 0;
        let mut take = |count: usize| {
            let first = pages;
            pages += count as u32;
            first..pages
        };
        let dead = frontier / PAGE_SIZE;
        let recent = self.recent.iter().map(|head| [NO_PAGE].repeat(dead).into_iter().chain(take(head.len() - dead)).collect()).collect();
        let kept = (0..self.kept.len()).map(|head| take(kept(head).div_ceil(PAGE_SIZE)).collect()).collect();
        Self { recent, kept, free: Vec::new(), pages, version: self.version + 1, ..*self }
    }

    /// Renames the pages so that none is free: the pages in use, in the order of their new names.
    pub fn compact(&mut self) -> Vec<u32> {
        let mut used = Vec::new();
        for page in self.recent.iter_mut().chain(&mut self.kept).flatten().filter(|page| **page != NO_PAGE) {
            used.push(*page);
            *page = used.len() as u32 - 1;
        }
        if used.iter().zip(0..).any(|(page, name)| *page != name) {
            self.version += 1;
        }
        self.pages = used.len() as u32;
        self.free = Vec::new();
        used
    }

    /// Bytes of the table itself.
    pub fn bytes(&self) -> usize {
        let entries = self.free.capacity() + self.recent.iter().chain(&self.kept).map(Vec::capacity).sum::<usize>();
        entries * size_of::<u32>()
    }
}

/// The slot of member `index` of a list of pages.
fn slot(pages: &[u32], index: usize) -> u32 {
    pages[index / PAGE_SIZE] * PAGE_SIZE as u32 + (index % PAGE_SIZE) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(table: &mut PageTable, from: usize, to: usize) {
        for start in from..to {
            table.reserve(Step { start, len: 1 });
        }
    }

    #[test]
    fn a_window_bounds_the_pages_however_long_the_sequence() {
        let mut table = PageTable::new(3, Some(100), 0);
        run(&mut table, 0, 5000);
        // 100 positions touch at most three pages of 64.
        assert!(table.pages() <= 3 * 3, "{} pages", table.pages());
        assert!(table.first_position() + 100 <= 5000);
        assert_eq!(table.recent(0).len(), 5000usize.div_ceil(PAGE_SIZE));
    }

    #[test]
    fn a_compacted_table_has_the_same_places_and_no_free_page() {
        let mut table = PageTable::new(2, Some(70), 0);
        for (start, len) in [(0, 300), (300, 40)] {
            let step = Step { start, len };
            let frontier = table.frontier(step);
            (0..2).for_each(|head| table.reserve_kept(head, frontier / (head + 2)));
            table.reserve(step);
        }
        let step = Step { start: 339, len: 1 };
        let (frontier, kept) = (table.frontier(step), |head: usize| 256 / (head + 2));
        let new = table.compacted(frontier, kept);
        assert_ne!(new.version(), table.version());
        // What the host does in place.
        (0..2).for_each(|head| table.reserve_kept(head, kept(head)));
        table.reserve(step);
        table.compact();
        for head in 0..2 {
            let lens = |table: &PageTable| (table.recent(head).len(), table.kept(head).len());
            assert_eq!(lens(&new), lens(&table));
            assert!(new.recent(head).iter().zip(table.recent(head)).all(|(new, old)| (*new == NO_PAGE) == (*old == NO_PAGE)));
        }
        assert_eq!((new.pages(), new.free_pages()), (table.pages(), 0));
        let mut used: Vec<u32> =
            (0..2).flat_map(|head| [new.recent(head), new.kept(head)].concat()).filter(|page| *page != NO_PAGE).collect();
        used.sort_unstable();
        assert!(used.iter().zip(0..).all(|(page, name)| *page == name) && used.len() == new.pages());
    }

    #[test]
    fn no_two_live_pages_share_a_place() {
        let mut table = PageTable::new(2, Some(70), 0);
        let live = |table: &PageTable| -> Vec<u32> {
            let all = (0..2).flat_map(|h| table.recent(h).iter().chain(table.kept(h)));
            let mut live: Vec<u32> = all.copied().filter(|page| *page != NO_PAGE).collect();
            live.sort_unstable();
            live
        };
        let check = |table: &PageTable| {
            let live = live(table);
            assert!(live.windows(2).all(|pair| pair[0] != pair[1]), "{live:?}");
            assert!(live.iter().all(|page| (*page as usize) < table.pages()));
            assert_eq!(live.len() + table.free_pages(), table.pages());
        };
        run(&mut table, 0, 1000);
        table.reserve_kept(0, 300);
        table.reserve_kept(1, 10);
        check(&table);
        table.truncate(970);
        run(&mut table, 970, 1300);
        check(&table);
        table.compact();
        check(&table);
        assert_eq!(table.free_pages(), 0);
        run(&mut table, 1300, 1400);
        check(&table);
    }
}
