//! What a running softmax needs of its scores: plain loops, compiled for each instruction set.

/// Numbers at a time.
const LANES: usize = 16;

vectorised! {
    /// Replaces each score by `exp(score - max)` and returns their sum. `-inf` becomes exactly 0.
    pub(crate) fn exp_sum(scores: &mut [f32], max: f32) -> f32 = exp_sum_lanes;

    /// The largest score; `-inf` if there is none, or none that is a number.
    pub(crate) fn max(scores: &[f32]) -> f32 = max_lanes;

    /// `best[i] = max(best[i], scores[i])`; NaN changes nothing.
    pub(crate) fn raise(best: &mut [f32], scores: &[f32]) -> () = raise_lanes;

    /// Whether all are numbers and finite.
    pub(crate) fn all_finite(values: &[f32]) -> bool = all_finite_lanes;
}

#[inline(always)]
fn raise_lanes(best: &mut [f32], scores: &[f32]) {
    for (best, score) in best.iter_mut().zip(scores) {
        *best = if *score > *best { *score } else { *best };
    }
}

#[inline(always)]
fn all_finite_lanes(values: &[f32]) -> bool {
    // 0 times anything finite is 0, times anything else NaN, which stays.
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i] * 0.0;
        }
    }
    lanes.iter().chain(rest).all(|x| x.is_finite())
}

/// Plain code in 16 lanes, which the compiler turns into the vectors of its caller. The order of the sum
/// is the same whatever the width.
#[inline(always)]
fn exp_sum_lanes(scores: &mut [f32], max: f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - max);
            sums[i] += chunk[i];
        }
    }
    for (score, sum) in rest.iter_mut().zip(&mut sums) {
        *score = exp(*score - max);
        *sum += *score;
    }
    halved(sums, |a, b| a + b)
}

/// Joins 16 numbers to one by halves: vectors almost to the end, and the same whatever the width.
#[inline(always)]
pub fn halved(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = join(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn max_lanes(scores: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = scores.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    rest.iter().copied().fold(halved(lanes, larger), larger)
}

/// `e^x` for `x <= 88`, relative error below 2e-7; exactly 0 below -88 (where the smallest normal number is near).
///
/// `2^n * e^r` with `r` in `[-ln2/2, ln2/2]`; the polynomial is Cephes' `expf` (public domain). Written without a branch, so that
/// loops over it become vectors in functions that are compiled for them.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Adding this to a number below 2^22 leaves its nearest integer in the last bits.
    const ROUND: f32 = 12_582_912.0;
    const BIAS: u32 = 127;
    // At -88 the exponent's bits become 0, and so the power. NaN stays NaN.
    let x = if x < -88.0 { -88.0 } else { x };
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let value = p.mul_add(r * r, r) + 1.0;
    value * f32::from_bits(rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(BIAS) << 23)
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
        assert!(exp(f32::NAN).is_nan());
        assert!((f64::from(exp(80.0)) / 80f64.exp() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn the_largest_is_found_wherever_it_is() {
        for len in [0, 1, 15, 16, 17, 64, 203] {
            for at in 0..len {
                let scores: Vec<f32> = (0..len).map(|i| if i == at { -0.5 } else { -1.0 - i as f32 }).collect();
                assert!(max(&scores) == -0.5 && max_lanes(&scores) == -0.5, "{len} {at}");
            }
            assert_eq!(max(&vec![f32::NEG_INFINITY; len]), f32::NEG_INFINITY);
        }
    }

    #[test]
    fn what_is_not_finite_is_found_wherever_it_is() {
        for len in [1, 15, 16, 17, 203] {
            assert!(all_finite(&vec![f32::MAX; len]) && all_finite_lanes(&vec![-1e-40; len]));
            for (at, odd) in (0..len).zip([f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().cycle()) {
                let mut values = vec![1.0; len];
                values[at] = odd;
                assert!(!all_finite(&values) && !all_finite_lanes(&values), "{len} {at}");
            }
        }
    }

    #[test]
    fn every_width_gives_the_same_sum() {
        let scores: Vec<f32> = (0..203).map(|i| ((i * 37) % 101) as f32 / -7.0).collect();
        let (mut a, mut b) = (scores.clone(), scores);
        let (fast, plain) = (exp_sum(&mut a, 0.0), exp_sum_lanes(&mut b, 0.0));
        assert_eq!((a, fast), (b, plain));
    }
}
