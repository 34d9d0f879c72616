//! A row of activations in 8 bits.

/// Numbers that share a scale.
pub(super) const GROUP: usize = 32;

/// Products that an instruction adds up: sums of the integers are kept for as many.
pub(super) const QUAD: usize = 4;

/// `x[i] ~ integers[i] * scales[i / QUAD]`
#[derive(Debug)]
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
        let quads = x.len() / QUAD;
        let mut row = Self { integers: Vec::with_capacity(x.len()), scales: Vec::with_capacity(quads), sums: Vec::with_capacity(quads) };
        for group in x.chunks_exact(GROUP) {
            let mut lanes = [0f32; 16];
            for half in group.chunks_exact(16) {
                lanes.iter_mut().zip(half).for_each(|(max, x)| *max = max.max(x.abs()));
            }
            let largest = lanes.iter().fold(0f32, |max, x| max.max(*x));
            let scale = largest / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            // Rounded to even; the bounds hold by the choice of the scale. NaN becomes 0, its scale does not.
            row.integers.extend(group.iter().map(|x| round(x * inverse) as i8));
            let scale = if group.iter().any(|x| x.is_nan()) { f32::NAN } else { scale };
            row.scales.extend([scale; GROUP / QUAD]);
        }
        row.sums.extend(row.integers.chunks_exact(QUAD).map(|quad| quad.iter().map(|x| i32::from(*x)).sum::<i32>()));
        row
    }

    /// What the integers stand for.
    #[cfg(test)]
    pub(super) fn values(&self) -> Vec<f32> {
        self.integers.iter().enumerate().map(|(i, x)| f32::from(*x) * self.scales[i / QUAD]).collect()
    }
}

/// The nearest integer of a number below 2^22, by adding and subtracting.
fn round(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    (x + ROUND) - ROUND
}
