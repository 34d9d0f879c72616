//! Where the pages of each head lie in a layer's pools.

use super::Step;

/// Slots (tokens) per page. One page holds keys or values of one head.
pub const PAGE_SIZE: usize = 64;

/// The entry of a logical page that was recycled because no later query can see it.
pub const NO_PAGE: u32 = u32::MAX;

/// Per head, the physical page of every logical page (`position / PAGE_SIZE`), and the free pages.
#[derive(Debug, Clone)]
pub struct PageTable {
    heads: Vec<Vec<u32>>,
    free: Vec<u32>,
    pages: u32,
    window: Option<usize>,
}

impl PageTable {
    /// An empty table. `window`: how many of the newest positions a query can see (`None`: all).
    pub fn new(kv_heads: usize, window: Option<usize>) -> Self {
        Self { heads: vec![Vec::new(); kv_heads], free: Vec::new(), pages: 0, window }
    }

    /// Physical pages handed out so far, which the pools must hold.
    pub fn pages(&self) -> usize {
        self.pages as usize
    }

    /// The physical page of each logical page of `head`; [`NO_PAGE`] where recycled.
    pub fn head(&self, head: usize) -> &[u32] {
        &self.heads[head]
    }

    /// Gives every head pages for the positions of `step`, after recycling those that neither this
    /// step nor a later one can see.
    pub fn reserve(&mut self, step: Step) {
        let dead = self.window.map_or(0, |w| (step.start + 1).saturating_sub(w)) / PAGE_SIZE;
        let needed = step.end().div_ceil(PAGE_SIZE);
        for head in &mut self.heads {
            for page in head.iter_mut().take(dead).rev().take_while(|page| **page != NO_PAGE) {
                self.free.push(std::mem::replace(page, NO_PAGE));
            }
            while head.len() < needed {
                head.push(self.free.pop().unwrap_or_else(|| {
                    self.pages += 1;
                    self.pages - 1
                }));
            }
        }
    }

    /// The first position whose page is still there.
    pub fn first_position(&self) -> usize {
        let recycled = self.heads.first().map_or(0, |head| head.iter().take_while(|page| **page == NO_PAGE).count());
        recycled * PAGE_SIZE
    }

    /// Gives back the pages of all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        let keep = len.div_ceil(PAGE_SIZE);
        for head in &mut self.heads {
            if head.len() > keep {
                self.free.extend(head.drain(keep..).filter(|page| *page != NO_PAGE));
            }
        }
    }

    /// Bytes of the table itself.
    pub fn bytes(&self) -> usize {
        let entries = self.free.capacity() + self.heads.iter().map(Vec::capacity).sum::<usize>();
        entries * size_of::<u32>()
    }
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
        let mut table = PageTable::new(3, Some(100));
        run(&mut table, 0, 5000);
        // 100 positions touch at most three pages of 64.
        assert!(table.pages() <= 3 * 3, "{} pages", table.pages());
        assert!(table.first_position() + 100 <= 5000);
        assert_eq!(table.head(0).len(), 5000usize.div_ceil(PAGE_SIZE));
    }

    #[test]
    fn no_two_live_pages_share_a_place() {
        let mut table = PageTable::new(2, Some(70));
        run(&mut table, 0, 1000);
        table.truncate(970);
        run(&mut table, 970, 1300);
        let mut live: Vec<u32> = (0..2).flat_map(|h| table.head(h).to_vec()).filter(|p| *p != NO_PAGE).collect();
        let count = live.len();
        live.sort_unstable();
        live.dedup();
        assert_eq!(live.len(), count);
        assert!(live.iter().all(|page| (*page as usize) < table.pages()));
    }
}
