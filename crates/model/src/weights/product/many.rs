//! Products with many rows of activations: what prefill is made of, with AVX-512 VNNI.
//!
//! Sixteen weight rows are unpacked side by side, so that one instruction multiplies four numbers of each with four
//! activations; sums stay integers as long as a scale lasts. The unpacking is paid once for all tokens of a chunk.

use super::activations::{GROUP, QUAD, round_row};
use super::blocks::{Format, RUN, STEP};
use super::sixteen::*;
use sparse_attn::parallel;
use std::arch::x86_64::*;

/// Activations of all tokens, each token's row after the other.
pub(super) struct Batch {
    pub(super) tokens: usize,
    pub(super) columns: usize,
    pub(super) integers: Vec<i8>,
    /// One for each [`RUN`].
    pub(super) scales: Vec<f32>,
    /// The sum of the integers of each [`RUN`].
    pub(super) sums: Vec<i32>,
    /// The sum of what the integers of each [`GROUP`] stand for.
    pub(super) totals: Vec<f32>,
}

impl Batch {
    /// Rounds `x` `[tokens, columns]`, on all threads.
    pub(super) fn new(x: &[f32], columns: usize) -> Self {
        let (tokens, runs) = (x.len() / columns, columns / RUN);
        let groups = columns / GROUP;
        let (mut integers, mut scales) = (vec![0; x.len()], vec![0.0; tokens * runs]);
        let (mut sums, mut totals) = (vec![0; tokens * runs], vec![0.0; tokens * groups]);
        let parts = integers.chunks_exact_mut(columns).zip(scales.chunks_exact_mut(runs));
        let parts = parts.zip(sums.chunks_exact_mut(runs).zip(totals.chunks_exact_mut(groups)));
        let mut rows: Vec<_> = parts.zip(x.chunks_exact(columns)).collect();
        parallel::for_each_mut(
            &mut rows,
            || vec![0.0; columns / GROUP],
            |of_groups, _, (((integers, scales), (sums, totals)), x)| {
                round_row(x, integers, of_groups);
                for (scales, scale) in scales.chunks_exact_mut(GROUP / RUN).zip(&*of_groups) {
                    scales.fill(*scale);
                }
                for (sum, run) in sums.iter_mut().zip(integers.as_chunks::<RUN>().0) {
                    *sum = run.iter().map(|x| i32::from(*x)).sum();
                }
                for ((total, sums), scale) in totals.iter_mut().zip(sums.chunks_exact(GROUP / RUN)).zip(&*of_groups) {
                    *total = sums.iter().sum::<i32>() as f32 * *scale;
                }
            },
        );
        Self { tokens, columns, integers, scales, sums, totals }
    }
}

/// [`LANES`] unpacked rows.
#[derive(Default)]
pub(super) struct Panel {
    integers: Vec<u8>, // [columns / QUAD, LANES, QUAD]
    scales: Vec<f32>,  // [columns / RUN, LANES]; where a scale lasts for two runs, the first has it
    minima: Vec<f32>,  // as scales; as it was where the format has none
}

impl Panel {
    /// Unpacks `columns` numbers of each row.
    ///
    /// # Safety
    /// The processor must have what [`super::avx512::is_here`] asks for; sixteen rows must be there, as long as that.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vnni,avx2,f16c")]
    pub(super) unsafe fn fill(&mut self, format: Format, rows: Rows, columns: usize) {
        self.integers.resize(columns * LANES, 0);
        self.scales.resize(columns / RUN * LANES, 0.0);
        self.minima.resize(columns / RUN * LANES, 0.0);
        // SAFETY: the caller's; there is room now.
        unsafe { with_layout!(format, L => self.fill_as::<L>(rows, columns)) }
    }

    #[inline(always)]
    unsafe fn fill_as<L: Layout>(&mut self, rows: Rows, columns: usize) {
        // SAFETY: the caller's: whole blocks, and room for what is in them.
        unsafe {
            let mut of_rows = Scales::zero();
            for block in 0..columns / L::NUMBERS {
                let rows = rows.from(block * L::BYTES);
                L::scales(rows, &mut of_rows);
                for of_run in 0..L::NUMBERS / RUN / L::RUNS {
                    let at = (block * L::NUMBERS / RUN + of_run * L::RUNS) * LANES;
                    _mm512_storeu_ps(self.scales.as_mut_ptr().add(at), of_rows.scales[of_run]);
                    if L::MINIMUM {
                        _mm512_storeu_ps(self.minima.as_mut_ptr().add(at), of_rows.minima[of_run]);
                    }
                }
                for step in 0..L::NUMBERS / STEP {
                    let mut numbers = [_mm512_setzero_si512(); LANES];
                    for (lane, numbers) in numbers.iter_mut().enumerate() {
                        *numbers = L::numbers(rows.at(lane), step);
                    }
                    let to = self.integers.as_mut_ptr().add((block * L::NUMBERS + step * STEP) * LANES);
                    for (quad, lanes) in transpose(numbers).into_iter().enumerate() {
                        _mm512_storeu_si512(to.add(quad * LANES * QUAD).cast(), lanes);
                    }
                }
            }
        }
    }
}

/// `out[token * stride + lane] = panel[lane] . x[token]` for `lanes` lanes.
///
/// # Safety
/// The processor must have AVX-512 VNNI; `out` must have room for `x.tokens` rows of `stride`, the last one `lanes` long; the panel
/// must be as wide as `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vnni,avx2,f16c")]
pub(super) unsafe fn multiply(format: Format, panel: &Panel, x: &Batch, out: *mut f32, stride: usize, lanes: usize) {
    assert!(panel.integers.len() == x.columns * LANES && lanes <= LANES, "product: a panel of another width");
    // SAFETY: the caller's; the panel's length was checked.
    unsafe { with_layout!(format, L => tokens::<L>(panel, x, out, stride, lanes)) }
}

#[inline(always)]
unsafe fn tokens<L: Layout>(panel: &Panel, x: &Batch, out: *mut f32, stride: usize, lanes: usize) {
    let mut token = 0;
    while token < x.tokens {
        // SAFETY: as many tokens are left as each takes.
        token += unsafe {
            match x.tokens - token {
                8.. => tile::<L, 8>(panel, x, token, out, stride, lanes),
                4.. => tile::<L, 4>(panel, x, token, out, stride, lanes),
                _ => tile::<L, 1>(panel, x, token, out, stride, lanes),
            }
        };
    }
}

/// `T` tokens from `token` on; returns `T`.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "lists in registers, side by side")]
unsafe fn tile<L: Layout, const T: usize>(panel: &Panel, x: &Batch, token: usize, out: *mut f32, stride: usize, lanes: usize) -> usize {
    let runs = x.columns / RUN;
    // SAFETY: the caller's: T tokens from `token` on, and a panel of `x.columns`.
    unsafe {
        // Loops, not closures: those would not be compiled for the instructions.
        let x_integers = x.integers.as_ptr().add(token * x.columns);
        let x_scales = x.scales.as_ptr().add(token * runs);
        let x_sums = x.sums.as_ptr().add(token * runs);
        let x_totals = x.totals.as_ptr().add(token * runs / 2);
        let mut total = [_mm512_setzero_ps(); T];
        let mut run = 0;
        while run < runs {
            let mut products = [_mm512_setzero_si512(); T];
            if L::OFFSET != 0 {
                for t in 0..T {
                    let at = x_sums.add(t * runs + run);
                    products[t] = _mm512_set1_epi32(-L::OFFSET * if L::RUNS == 2 { *at + *at.add(1) } else { *at });
                }
            }
            for quad in run * (RUN / QUAD)..(run + L::RUNS) * (RUN / QUAD) {
                let weights = _mm512_loadu_si512(panel.integers.as_ptr().add(quad * LANES * QUAD).cast());
                for t in 0..T {
                    let four = _mm512_set1_epi32(x_integers.add(t * x.columns + quad * QUAD).cast::<i32>().read_unaligned());
                    products[t] = _mm512_dpbusd_epi32(products[t], weights, four);
                }
            }
            let scale = _mm512_loadu_ps(panel.scales.as_ptr().add(run * LANES));
            let minimum = _mm512_loadu_ps(panel.minima.as_ptr().add(run * LANES));
            for t in 0..T {
                if L::MINIMUM {
                    total[t] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(*x_totals.add((t * runs + run) / 2)), total[t]);
                }
                let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(products[t]), scale);
                total[t] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(*x_scales.add(t * runs + run)), total[t]);
            }
            run += L::RUNS;
        }
        let mask = ((1u32 << lanes) - 1) as u16;
        for t in 0..T {
            _mm512_mask_storeu_ps(out.add((token + t) * stride), mask, total[t]);
        }
    }
    T
}
