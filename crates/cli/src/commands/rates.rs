//! How fast a sequence is read and continued: what `bench` and `compare` time.

use crate::engine::Engine;
use crate::failure::{Failure, Kind, unexpected};
use crate::interrupt::Interrupt;
use anyhow::Result;
use model::{GenerateOptions, Sampler, SamplerOptions, Session};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Pseudo-random ids for these positions, the same every time; as whole texts have them: not one token again and again.
pub(super) fn fixed_ids(positions: Range<usize>, engine: &Engine) -> Vec<u32> {
    let vocab_size = engine.checkpoint.config().vocab_size as u64;
    positions.map(|i| ((1000 + i as u64 * 7919) % vocab_size) as u32).collect()
}

/// Reads `ids` after what the sequence holds. `progress` is called after each chunk.
pub(super) fn read(
    engine: &Engine,
    session: &mut Session,
    ids: &[u32],
    interrupt: &Interrupt,
    mut progress: impl FnMut(),
) -> Result<Duration> {
    let started = Instant::now();
    let go_on = |_, _| {
        progress();
        interrupt.flow()
    };
    if !ids.is_empty() && !session.prefill(ids, engine.checkpoint.chunk, go_on).map_err(unexpected)? {
        return Err(stopped());
    }
    Ok(started.elapsed())
}

/// Continues the sequence by `tokens` tokens, greedily and past any end.
pub(super) fn decode(session: &mut Session, tokens: usize, interrupt: &Interrupt) -> Result<Duration> {
    let mut sampler = Sampler::new(SamplerOptions::greedy()).map_err(unexpected)?;
    let options = GenerateOptions { max_tokens: Some(tokens), end_tokens: Vec::new(), context: usize::MAX, logprobs: 0 };
    let started = Instant::now();
    for token in session.generate(&mut sampler, options) {
        token.map_err(unexpected)?;
        if interrupt.is_set() {
            return Err(stopped());
        }
    }
    Ok(started.elapsed())
}

/// The user's interrupt.
pub(super) fn stopped() -> anyhow::Error {
    Failure::new(Kind::Interrupted, "stopped").into()
}
