//! Which tokens of a head keep full attention, and where each is among them.

/// A bit per position, with the number of bits before every 64.
#[derive(Debug, Clone, Default)]
pub struct Admitted {
    words: Vec<u64>,
    ranks: Vec<u32>, // [words]: bits before each word
    len: usize,
}

impl Admitted {
    /// Positions that were decided.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The verdict on the next position.
    pub fn push(&mut self, admitted: bool) {
        if self.len.is_multiple_of(64) {
            let before = match (self.ranks.last(), self.words.last()) {
                (Some(rank), Some(word)) => rank + word.count_ones(),
                _ => 0,
            };
            self.ranks.push(before);
            self.words.push(0);
        }
        if let (true, Some(word)) = (admitted, self.words.last_mut()) {
            *word |= 1 << (self.len % 64);
        }
        self.len += 1;
    }

    /// Forgets positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len {
            return;
        }
        self.words.truncate(len.div_ceil(64));
        self.ranks.truncate(len.div_ceil(64));
        if let (Some(word), used @ 1..) = (self.words.last_mut(), len % 64) {
            *word &= (1 << used) - 1;
        }
        self.len = len;
    }

    /// Whether `position` is admitted.
    pub fn contains(&self, position: usize) -> bool {
        self.words.get(position / 64).is_some_and(|word| word >> (position % 64) & 1 == 1)
    }

    /// Admitted positions before `position`: also the slot of `position` among them.
    pub fn rank(&self, position: usize) -> usize {
        let position = position.min(self.len);
        let word = position / 64;
        match self.words.get(word) {
            Some(bits) => self.ranks[word] as usize + (bits & ((1u64 << (position % 64)) - 1)).count_ones() as usize,
            None => self.words.last().map_or(0, |bits| self.ranks[word - 1] as usize + bits.count_ones() as usize),
        }
    }

    /// The bits of the `OCTET` positions from `position` on, a multiple of it.
    pub(crate) fn octet(&self, position: usize) -> u8 {
        self.words.get(position / 64).map_or(0, |word| (word >> (position % 64)) as u8)
    }

    /// Bytes of the bits and counts.
    pub fn bytes(&self) -> usize {
        self.words.capacity() * size_of::<u64>() + self.ranks.capacity() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_count_the_bits_before_and_truncation_forgets() {
        let bit = |position: usize| position * position % 7 < 3;
        let mut admitted = Admitted::default();
        (0..300).for_each(|position| admitted.push(bit(position)));
        for cut in [300, 257, 256, 64, 63, 1, 0] {
            admitted.truncate(cut);
            for position in 0..=300 {
                assert_eq!(admitted.rank(position), (0..position.min(cut)).filter(|p| bit(*p)).count(), "{position} of {cut}");
                assert_eq!(admitted.contains(position), position < cut && bit(position));
            }
        }
        (0..70).for_each(|position| admitted.push(bit(position)));
        assert_eq!(admitted.octet(64), (64..70).filter(|p| bit(*p)).map(|p| 1 << (p - 64)).sum::<u8>());
    }
}
