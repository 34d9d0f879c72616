//! Which tokens of a head keep full attention, and where each is among them.

use super::OCTET;
use std::ops::Range;

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

    /// The admitted positions of `range`, ascending.
    pub fn positions(&self, range: Range<usize>) -> impl Iterator<Item = usize> {
        self.words_of(range).flat_map(|(first, mut word)| {
            std::iter::from_fn(move || {
                let position = (word != 0).then(|| first + word.trailing_zeros() as usize);
                word &= word.wrapping_sub(1);
                position
            })
        })
    }

    /// The sum of [`Admitted::rank`] over `range`, without asking for each.
    pub fn sum_of_ranks(&self, range: Range<usize>) -> u64 {
        // Each admitted position counts for all that come after it.
        let after = |(first, word): (usize, u64)| {
            let indices: u64 = INDEX_BITS.iter().zip(0..).map(|(bits, power)| u64::from((word & bits).count_ones()) << power).sum();
            u64::from(word.count_ones()) * (range.end - 1 - first) as u64 - indices
        };
        self.rank(range.start) as u64 * range.len() as u64 + self.words_of(range.clone()).map(after).sum::<u64>()
    }

    /// The words that hold `range`, without the bits of other positions, and the position of each one's first bit.
    fn words_of(&self, range: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
        let Range { start, end } = range;
        (start / 64..end.min(self.len).div_ceil(64)).map(move |word| {
            let first = 64 * word;
            let from = u64::MAX << start.saturating_sub(first).min(63);
            let to = u64::MAX >> (64 - (end - first).min(64));
            (first, self.words[word] & from & to)
        })
    }

    /// The verdicts on the positions from the next one to `end`: bits of octets, the first of which holds the next position.
    pub(crate) fn extend_octets(&mut self, octets: &[u8], end: usize) {
        let first = self.len / OCTET;
        if self.len.is_multiple_of(64) {
            // Whole words, as most of a long step are.
            for bytes in octets.as_chunks::<{ 64 / OCTET }>().0.iter().take((end - self.len) / 64) {
                self.fill_word(u64::from_le_bytes(*bytes), 64);
            }
        }
        while self.len < end {
            let (word, used) = (self.len / 64, self.len % 64);
            // The octets of the word: before the first one are none.
            let (mut of_word, at) = ([0; 64 / OCTET], word * (64 / OCTET));
            let rest = &octets[at.saturating_sub(first).min(octets.len())..];
            let to = &mut of_word[first.saturating_sub(at)..];
            let count = to.len().min(rest.len());
            to[..count].copy_from_slice(&rest[..count]);
            let bits = u64::from_le_bytes(of_word);
            let filled = (end - 64 * word).min(64);
            self.fill_word(bits & u64::MAX << used & u64::MAX >> (64 - filled), filled);
        }
    }

    /// The verdict on the next position.
    pub fn push(&mut self, admitted: bool) {
        let used = self.len % 64;
        self.fill_word(u64::from(admitted) << used, used + 1);
    }

    /// Adds `bits` to the word of the next position, of which then `filled` bits are decided.
    fn fill_word(&mut self, bits: u64, filled: usize) {
        let used = self.len % 64;
        match self.words.last_mut() {
            Some(word) if used > 0 => *word |= bits,
            last => {
                let before = last.zip(self.ranks.last()).map_or(0, |(word, rank)| rank + word.count_ones());
                self.ranks.push(before);
                self.words.push(bits);
            }
        }
        self.len += filled - used;
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

/// The bits of a word at whose index bit 0 is set, then bit 1, and so on.
const INDEX_BITS: [u64; 6] = {
    let ones = u64::MAX;
    [(ones / 3) << 1, (ones / 5) << 2, (ones / 17) << 4, (ones / 257) << 8, (ones / 65_537) << 16, ones << 32]
};

/// The verdicts on the positions that follow.
impl Extend<bool> for Admitted {
    fn extend<I: IntoIterator<Item = bool>>(&mut self, verdicts: I) {
        let mut verdicts = verdicts.into_iter();
        loop {
            let used = self.len % 64;
            let (mut bits, mut end) = (0, used);
            for admitted in verdicts.by_ref().take(64 - used) {
                bits |= u64::from(admitted) << end;
                end += 1;
            }
            if end == used {
                return;
            }
            self.fill_word(bits, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_count_the_bits_before_and_truncation_forgets() {
        let bit = |position: usize| position * position % 7 < 3;
        let mut admitted = Admitted::default();
        admitted.extend((0..100).map(bit));
        admitted.push(bit(100));
        admitted.extend((101..300).map(bit));
        for cut in [300, 257, 256, 64, 63, 1, 0] {
            admitted.truncate(cut);
            for position in 0..=300 {
                assert_eq!(admitted.rank(position), (0..position.min(cut)).filter(|p| bit(*p)).count(), "{position} of {cut}");
                assert_eq!(admitted.contains(position), position < cut && bit(position));
            }
        }
        admitted.extend((0..70).map(bit));
        assert_eq!(admitted.octet(64), (64..70).filter(|p| bit(*p)).map(|p| 1 << (p - 64)).sum::<u8>());
    }

    #[test]
    fn ranges_list_what_they_admit_and_sum_its_ranks() {
        let bit = |position: usize| position * position % 7 < 3 || (128..200).contains(&position);
        let mut admitted = Admitted::default();
        admitted.extend((0..300).map(bit));
        for (start, end) in [(0, 0), (0, 300), (0, 64), (1, 63), (63, 65), (64, 128), (70, 66), (100, 299), (290, 400), (320, 330)] {
            let positions = start..end.min(300);
            assert_eq!(
                admitted.positions(start..end).collect::<Vec<_>>(),
                positions.filter(|p| bit(*p)).collect::<Vec<_>>(),
                "{start}..{end}"
            );
            assert_eq!(admitted.sum_of_ranks(start..end), (start..end).map(|p| admitted.rank(p) as u64).sum::<u64>(), "{start}..{end}");
        }
        assert_eq!(Admitted::default().sum_of_ranks(0..10), 0);
    }

    #[test]
    fn octets_say_the_same_as_one_verdict_after_the_other() {
        let bit = |position: usize| position * position % 7 < 3;
        for (start, end) in [(0, 300), (5, 6), (5, 64), (60, 70), (64, 200), (127, 129), (130, 131)] {
            let (mut one, mut other) = (Admitted::default(), Admitted::default());
            one.extend((0..end).map(bit));
            other.extend((0..start).map(bit));
            // Bits of positions before and after it are not looked at.
            let octets: Vec<u8> =
                (start / OCTET..end.div_ceil(OCTET)).map(|octet| (0..8).map(|i| u8::from(bit(octet * 8 + i)) << i).sum()).collect();
            other.extend_octets(&octets, end);
            assert_eq!((one.len, one.words, one.ranks), (other.len, other.words, other.ranks), "{start}..{end}");
        }
    }
}
