//! One token with sixteen weight rows, with AVX-512 VNNI, its sums made as [`super::many`] makes them: integers as long as a scale lasts, then scale
//! by scale along a row. So a token's products are the same bits however many tokens come with it; [`super::avx512::dot`], which sums
//! each lane by itself, is up to half faster.

use super::blocks::{Format, RUN, STEP};
use super::many::Batch;
use super::sixteen::*;
use std::arch::x86_64::*;

/// `rows . x[token]`
///
/// # Safety
/// The processor must have what [`super::avx512::is_here`] asks for; sixteen rows must be there, as wide as `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vnni,avx2,f16c")]
pub(super) unsafe fn multiply(format: Format, rows: Rows, x: &Batch, token: usize) -> [f32; LANES] {
    // SAFETY: the caller's.
    unsafe { with_layout!(format, L => dot::<L>(rows, x, token)) }
}

#[inline(always)]
unsafe fn dot<L: Layout>(rows: Rows, x: &Batch, token: usize) -> [f32; LANES] {
    // SAFETY: the caller's: blocks for as many numbers as a row of `x` has.
    unsafe {
        let (runs, columns) = (x.columns / RUN, x.columns);
        let integers = x.integers.as_ptr().add(token * columns);
        let x_scales = x.scales.as_ptr().add(token * runs);
        let x_sums = x.sums.as_ptr().add(token * runs);
        let x_totals = x.totals.as_ptr().add(token * runs / 2);
        let mut total = _mm512_setzero_ps();
        let mut of_rows = Scales::zero();
        let next = rows.first.wrapping_add(LANES * rows.row_bytes);
        for block in 0..columns / L::NUMBERS {
            // The next rows' bytes, one after the other: sixteen streams are too many for the processor to follow by itself.
            for line in (0..LANES * L::BYTES).step_by(64) {
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(block * LANES * L::BYTES + line).cast());
            }
            let rows = rows.from(block * L::BYTES);
            L::scales(rows, &mut of_rows);
            for step in 0..L::NUMBERS / STEP {
                let first = block * L::NUMBERS + step * STEP;
                let values = _mm512_loadu_si512(integers.add(first).cast());
                let mut products = [_mm512_setzero_si512(); LANES];
                for (lane, product) in products.iter_mut().enumerate() {
                    *product = _mm512_dpbusd_epi32(*product, L::numbers(rows.at(lane), step), values);
                }
                let products = run_sums(products, L::RUNS);
                for (index, product) in products.into_iter().take(STEP / RUN / L::RUNS).enumerate() {
                    let run = first / RUN + index * L::RUNS;
                    let of_run = step * (STEP / RUN / L::RUNS) + index;
                    let mut product = product;
                    if L::OFFSET != 0 {
                        let sum = *x_sums.add(run) + if L::RUNS == 2 { *x_sums.add(run + 1) } else { 0 };
                        product = _mm512_sub_epi32(product, _mm512_set1_epi32(L::OFFSET * sum));
                    }
                    if L::MINIMUM {
                        total = _mm512_fmadd_ps(of_rows.minima[of_run], _mm512_set1_ps(*x_totals.add(run / 2)), total);
                    }
                    let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(product), of_rows.scales[of_run]);
                    total = _mm512_fmadd_ps(scaled, _mm512_set1_ps(*x_scales.add(run)), total);
                }
            }
        }
        let mut out = [0.0; LANES];
        _mm512_storeu_ps(out.as_mut_ptr(), total);
        out
    }
}
