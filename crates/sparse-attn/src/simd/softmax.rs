//! The exponentials of a running softmax, vectorised.

/// Replaces each score by `exp(score - max)` and returns their sum. `-inf` becomes exactly 0.
pub(crate) fn exp_sum(scores: &mut [f32], max: f32) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F, just asked.
            return unsafe { exp_sum_avx512(scores, max) };
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: the processor has AVX2 and FMA, just asked.
            return unsafe { exp_sum_avx2(scores, max) };
        }
    }
    exp_sum_lanes(scores, max)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn exp_sum_avx512(scores: &mut [f32], max: f32) -> f32 {
    exp_sum_lanes(scores, max)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn exp_sum_avx2(scores: &mut [f32], max: f32) -> f32 {
    exp_sum_lanes(scores, max)
}

/// Plain code in 16 lanes, which the compiler turns into the vectors of its caller. The order of the sum
/// is the same whatever the width.
#[inline(always)]
fn exp_sum_lanes(scores: &mut [f32], max: f32) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    let mut chunks = scores.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (score, sum) in chunk.iter_mut().zip(&mut sums) {
            *score = exp(*score - max);
            *sum += *score;
        }
    }
    for (score, sum) in chunks.into_remainder().iter_mut().zip(&mut sums) {
        *score = exp(*score - max);
        *sum += *score;
    }
    sums.iter().sum()
}

/// `e^x` for `x <= 0`, relative error below 2e-7; exactly 0 below the smallest normal number.
///
/// `2^n * e^r` with `r` in `[-ln2/2, ln2/2]`; the polynomial is Cephes' `expf` (public domain).
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Adding and subtracting this rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.max(-87.0);
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.0 { 0.0 } else { value * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_as_good_as_the_library_and_exact_at_the_ends() {
        for i in 0..=870_000 {
            let x = -(i as f32) / 1e4;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - want).abs() <= 3e-7 * want, "exp({x}) = {got}, not {want}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e9), 0.0);
    }

    #[test]
    fn every_width_gives_the_same_sum() {
        let scores: Vec<f32> = (0..203).map(|i| ((i * 37) % 101) as f32 / -7.0).collect();
        let (mut a, mut b) = (scores.clone(), scores);
        let (fast, plain) = (exp_sum(&mut a, 0.0), exp_sum_lanes(&mut b, 0.0));
        assert!((fast - plain).abs() <= 1e-5 * plain);
    }
}
