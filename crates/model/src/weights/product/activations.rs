//! A row of activations in 8 bits.

use sparse_attn::vectorised;

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
}

impl Activations {
    /// `x`: a multiple of [`GROUP`] numbers.
    pub(super) fn new(x: &[f32]) -> Self {
        const QUADS: usize = GROUP / QUAD;
        let mut row = Self { integers: vec![0; x.len()], scales: vec![0.0; x.len() / QUAD], sums: vec![0; x.len() / QUAD] };
        let mut of_groups = vec![0.0; x.len() / GROUP];
        round_row(x, &mut row.integers, &mut of_groups);
        for (scales, scale) in row.scales.chunks_exact_mut(QUADS).zip(of_groups) {
            scales.fill(scale);
        }
        for (sum, quad) in row.sums.iter_mut().zip(row.integers.as_chunks::<QUAD>().0) {
            *sum = quad.iter().map(|x| i32::from(*x)).sum();
        }
        row
    }

    /// What the integers stand for.
    pub(super) fn values(&self) -> Vec<f32> {
        self.integers.iter().enumerate().map(|(i, x)| f32::from(*x) * self.scales[i / QUAD]).collect()
    }
}

vectorised! {
    /// `x[i] ~ integers[i] * scales[i / GROUP]`, for a multiple of [`GROUP`] numbers.
    pub(super) fn round_row(x: &[f32], integers: &mut [i8], scales: &mut [f32]) -> () = round_groups;
}

#[inline(always)]
fn round_groups(x: &[f32], integers: &mut [i8], scales: &mut [f32]) {
    /// Adding this to a number below 2^22 leaves its nearest integer in the last bits.
    const ROUND: f32 = 12_582_912.0;
    for ((x, integers), group_scale) in x.as_chunks::<GROUP>().0.iter().zip(integers.as_chunks_mut::<GROUP>().0).zip(scales) {
        let (mut lanes, mut poison) = ([0f32; 16], [0f32; 16]);
        for part in x.as_chunks::<16>().0 {
            for i in 0..16 {
                let size = part[i].abs();
                lanes[i] = if size > lanes[i] { size } else { lanes[i] };
                poison[i] += part[i] * 0.0;
            }
        }
        // NaN is above nothing, but must not vanish.
        let scale = maximum(lanes) / 127.0 + poison.iter().sum::<f32>();
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (integer, x) in integers.iter_mut().zip(x) {
            *integer = (x * inverse + ROUND).to_bits() as i8;
        }
        *group_scale = scale;
    }
}

/// By halves, so that it is vectors almost to the end.
#[inline(always)]
fn maximum(mut lanes: [f32; 16]) -> f32 {
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

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
