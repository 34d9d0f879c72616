//! What benches measure with, and what the machine can.

use candle_core::utils::barrier_pool;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Bytes per second that all threads read together.
pub(crate) fn bandwidth() -> f64 {
    let buffer = vec![1u64; 512 << 20 >> 3];
    let parts: Vec<&[u64]> = buffer.chunks(1 << 16).collect();
    let run = || {
        barrier_pool().execute_chunked(parts.len(), |range| {
            for part in &parts[range] {
                black_box(part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x)));
            }
        });
    };
    (buffer.len() * 8) as f64 / median(5, run).as_secs_f64()
}

/// The median time of `run`, of `times` runs.
pub(crate) fn median(times: usize, mut run: impl FnMut()) -> Duration {
    let mut taken: Vec<Duration> = (0..times)
        .map(|_| {
            let started = Instant::now();
            run();
            started.elapsed()
        })
        .collect();
    taken.sort_unstable();
    taken[times / 2]
}
