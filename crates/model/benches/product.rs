//! Products with ggml blocks, alone: what decoding (one token) and prefill (512) reach of what the machine can.
//!
//! `cargo bench -p model` (`-- 14336 4096` for matrices of that many rows and columns). Medians, on all threads; as many matrices as
//! it takes to be larger than the caches.

#![allow(clippy::print_stdout, reason = "a table is what it is for")]

#[path = "../../sparse-attn/benches/machine/mod.rs"]
mod machine;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::utils::{barrier_pool, get_num_threads};
use candle_core::{Device, Result, Tensor};
use machine::{bandwidth, median};
use model::weights::{Arithmetic, Matrix};
use std::hint::black_box;
use std::sync::Arc;

/// More than any cache holds.
const BEYOND_CACHES: usize = 160 << 20;

/// Tokens of a chunk of a prompt.
const CHUNK: usize = 512;

const FORMATS: [GgmlDType; 8] =
    [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q5_0, GgmlDType::Q5_1, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K];

fn main() -> Result<()> {
    let asked: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let (rows, columns) = if let [rows, columns] = asked[..] { (rows, columns) } else { (4096, 4096) };
    let (read, integers) = (bandwidth(), integer_peak());
    println!(
        "{} threads, {rows} x {columns}; the machine reads {:.1} GB/s{}",
        get_num_threads(),
        read / 1e9,
        match integers {
            Some(peak) => format!(" and multiplies bytes at {:.0} G/s (a product and a sum are two)", peak / 1e9),
            None => "; its peak in byte products is measured with AVX-512 VNNI only".to_string(),
        }
    );
    println!("| blocks | 1 token: us | GB/s | of the machine's | {CHUNK} tokens: ms | G/s | of the machine's |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let dense = Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu)?;
    let one = Tensor::randn(0f32, 1.0, (1, columns), &Device::Cpu)?;
    let many = Tensor::randn(0f32, 1.0, (CHUNK, columns), &Device::Cpu)?;
    for format in FORMATS {
        let bytes = rows * columns / format.block_size() * format.type_size();
        let copies = (0..BEYOND_CACHES.div_ceil(bytes))
            .map(|_| Ok(Matrix::Quantized(Arc::new(QTensor::quantize(&dense, format)?), Arithmetic::default())))
            .collect::<Result<Vec<_>>>()?;
        let mut failed = Ok(());
        let mut time = |x: &Tensor, count: usize| {
            let total = median(7, || {
                for matrix in &copies[..count] {
                    match matrix.multiply(x) {
                        Ok(product) => drop(black_box(product)),
                        Err(error) => failed = Err(error),
                    }
                }
            });
            total.as_secs_f64() / count as f64
        };
        let (decode, prefill) = (time(&one, copies.len()), time(&many, 1));
        failed?;
        let (rate, work) = (bytes as f64 / decode, 2.0 * (rows * columns * CHUNK) as f64 / prefill);
        println!(
            "| {format:?} | {:.0} | {:.1} | {:.0} % | {:.1} | {:.0} | {} |",
            decode * 1e6,
            rate / 1e9,
            100.0 * rate / read,
            prefill * 1e3,
            work / 1e9,
            integers.map_or("".to_string(), |peak| format!("{:.0} %", 100.0 * work / peak))
        );
    }
    Ok(())
}

/// Products and sums of bytes per second, two for each, on all threads, with nothing to load.
fn integer_peak() -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512vnni") {
        const ROUNDS: usize = 1 << 22;
        let threads = get_num_threads();
        let time = median(5, || {
            // SAFETY: the instructions are here.
            barrier_pool().execute(|_| _ = black_box(unsafe { byte_products(ROUNDS) }));
        });
        return Some((threads * ROUNDS * SUMS * 64 * 2) as f64 / time.as_secs_f64());
    }
    None
}

/// Sums that do not wait for each other.
#[cfg(target_arch = "x86_64")]
const SUMS: usize = 12;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn byte_products(rounds: usize) -> i32 {
    use std::arch::x86_64::*;
    let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(2)));
    let mut sums = [_mm512_setzero_si512(); SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    sums.into_iter().fold(0, |total, sum| total.wrapping_add(_mm512_reduce_add_epi32(sum)))
}
