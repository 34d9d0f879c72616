//! A row of activations in 8 bits.

/// Numbers that share a scale.
pub(super) const GROUP: usize = 32;

/// Products that an instruction adds up: sums of the integers are kept for as many.
pub(super) const QUAD: usize = 4;

/// `x[i] ~ integers[i] * scales[i / QUAD]`
#[derive(Debug, Default)]
pub(super) struct Activations {
    pub(super) integers: Vec<i8>,
    /// One for each [`QUAD`], the same within a [`GROUP`].
    pub(super) scales: Vec<f32>,
    /// Sum of the integers of each [`QUAD`].
    pub(super) sums: Vec<i32>,
    /// The scale of each [`GROUP`].
    pub(super) group_scales: Vec<f32>,
    /// The sum of what each [`GROUP`] stands for, and of what each half of one does.
    pub(super) group_sums: Vec<f32>,
    pub(super) half_sums: Vec<f32>,
    /// The integers with groups 1 and 2 of every four exchanged: as the low and the high halves of the bytes of Q4_K and Q5_K follow each
    /// other. Empty unless four groups divide the row.
    pub(super) exchanged: Vec<i8>,
}

impl Activations {
    /// `x`: a multiple of [`GROUP`] numbers.
    pub(super) fn new(x: &[f32]) -> Self {
        const QUADS: usize = GROUP / QUAD;
        let (mut integers, mut group_scales) = (vec![0; x.len()], vec![0.0; x.len() / GROUP]);
        round_row(x, &mut integers, &mut group_scales);
        let scales = group_scales.iter().flat_map(|scale| [*scale; QUADS]).collect();
        let sums: Vec<i32> = integers.as_chunks::<QUAD>().0.iter().map(|quad| quad.iter().map(|x| i32::from(*x)).sum()).collect();
        let sum_of = |quads: &[i32], scale: f32| quads.iter().sum::<i32>() as f32 * scale;
        let group_sums = sums.chunks_exact(QUADS).zip(&group_scales).map(|(quads, scale)| sum_of(quads, *scale)).collect();
        let halves = sums.chunks_exact(QUADS / 2).enumerate();
        let half_sums = halves.map(|(half, quads)| sum_of(quads, group_scales[half / 2])).collect();
        let mut exchanged = if x.len().is_multiple_of(4 * GROUP) { integers.clone() } else { Vec::new() };
        for four in exchanged.as_chunks_mut::<{ 4 * GROUP }>().0 {
            let (first, second) = four[GROUP..3 * GROUP].split_at_mut(GROUP);
            first.swap_with_slice(second);
        }
        Self { integers, scales, sums, group_scales, group_sums, half_sums, exchanged }
    }

    /// What the integers stand for.
    pub(super) fn values(&self) -> Vec<f32> {
        self.integers.iter().enumerate().map(|(i, x)| f32::from(*x) * self.scales[i / QUAD]).collect()
    }
}

/// `x[i] ~ integers[i] * scales[i / GROUP]`, for a multiple of [`GROUP`] numbers; a NaN makes its group's scale one.
pub(super) fn round_row(x: &[f32], integers: &mut [i8], scales: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if super::avx512::is_here() {
        // SAFETY: the instructions are here.
        return unsafe { super::avx512::round_groups(x, integers, scales) };
    }
    round_groups(x, integers, scales);
}

fn round_groups(x: &[f32], integers: &mut [i8], scales: &mut [f32]) {
    for ((x, integers), scale) in x.as_chunks::<GROUP>().0.iter().zip(integers.as_chunks_mut::<GROUP>().0).zip(scales) {
        // NaN is above nothing, but must not vanish.
        let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        *scale = if x.iter().any(|x| x.is_nan()) { f32::NAN } else { largest / 127.0 };
        let inverse = if *scale > 0.0 { 1.0 / *scale } else { 0.0 };
        for (integer, x) in integers.iter_mut().zip(x) {
            *integer = (x * inverse).round_ties_even() as i8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_rounds_alike() {
        let x: Vec<f32> = (0..320).map(|i| if i / 32 == 3 { 0.0 } else { ((i * 7919) % 2003) as f32 / 7.0 - 140.0 }).collect();
        let row = Activations::new(&x);
        let (mut integers, mut scales) = (vec![0; x.len()], vec![0.0; x.len() / GROUP]);
        round_groups(&x, &mut integers, &mut scales);
        assert_eq!((row.integers, scales), (integers, row.scales.iter().step_by(GROUP / QUAD).copied().collect()));
    }

    #[test]
    fn a_number_that_is_none_stays_none() {
        for at in [0, 5, 31] {
            let mut x = vec![1.0f32; 64];
            x[at] = f32::NAN;
            let row = Activations::new(&x);
            assert!(row.scales[..8].iter().all(|scale| scale.is_nan()), "{at}: {:?}", row.scales);
            assert!(row.scales[8..].iter().all(|scale| *scale == 1.0 / 127.0));
        }
    }
}
