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
}

impl Activations {
    /// `x`: a multiple of [`GROUP`] numbers.
    pub(super) fn new(x: &[f32]) -> Self {
        let quads = x.len() / QUAD;
        let mut row = Self { integers: vec![0; x.len()], scales: vec![0.0; quads], sums: vec![0; quads] };
        #[cfg(target_arch = "x86_64")]
        {
            if super::avx512::is_here() {
                // SAFETY: the processor has AVX-512, just asked.
                unsafe { row.fill_avx512(x) };
                return row;
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has AVX2, just asked.
                unsafe { row.fill_avx2(x) };
                return row;
            }
        }
        row.fill(x);
        row
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx2")]
    fn fill_avx512(&mut self, x: &[f32]) {
        self.fill(x);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn fill_avx2(&mut self, x: &[f32]) {
        self.fill(x);
    }

    /// In plain loops, which the compiler turns into the vectors of its caller.
    #[inline(always)]
    fn fill(&mut self, x: &[f32]) {
        const QUADS: usize = GROUP / QUAD;
        let groups = x.as_chunks::<GROUP>().0.iter().zip(self.integers.as_chunks_mut::<GROUP>().0);
        let quads = self.scales.as_chunks_mut::<QUADS>().0.iter_mut().zip(self.sums.as_chunks_mut::<QUADS>().0);
        for ((x, integers), (scales, sums)) in groups.zip(quads) {
            let (mut lanes, mut poison) = ([0f32; 8], [0f32; 8]);
            for part in x.as_chunks::<8>().0 {
                for i in 0..8 {
                    lanes[i] = lanes[i].max(part[i].abs());
                    poison[i] += part[i] * 0.0;
                }
            }
            // NaN is the maximum of nothing, but must not vanish.
            let scale = lanes.iter().fold(0f32, |max, x| max.max(*x)) / 127.0 + poison.iter().sum::<f32>();
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            for (integer, x) in integers.iter_mut().zip(x) {
                *integer = round(x * inverse) as i32 as i8;
            }
            *scales = [scale; QUADS];
            for (sum, quad) in sums.iter_mut().zip(integers.as_chunks::<QUAD>().0) {
                *sum = quad.iter().map(|x| i32::from(*x)).sum();
            }
        }
    }

    /// What the integers stand for.
    #[cfg(test)]
    pub(super) fn values(&self) -> Vec<f32> {
        self.integers.iter().enumerate().map(|(i, x)| f32::from(*x) * self.scales[i / QUAD]).collect()
    }
}

/// The nearest integer of a number below 2^22, by adding and subtracting.
#[inline(always)]
fn round(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    (x + ROUND) - ROUND
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
