//! The threshold of gates that are there already: what part of real text each threshold keeps.

use crate::CausalLm;
use crate::train::calibrated;
use candle_core::{Result, bail};
use sparse_attn::token_router::{Admission, GateLayer, RouterInput, TokenRouter};
use sparse_attn::{KvCache, KvDtype, RoutedAttention, Routing};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

/// How gates are calibrated.
#[derive(Debug, Clone, Copy)]
pub struct CalibrateOptions {
    /// First tokens, which are always kept: their scores do not count.
    pub sinks: usize,
    /// The kept fraction that the threshold is set for.
    pub keep: f32,
    /// Tokens computed at once.
    pub chunk: usize,
}

/// Keeps every token and writes down how the gates score it.
#[derive(Debug)]
struct Scores {
    gates: Vec<GateLayer>,
    sinks: usize,
    seen: Mutex<Vec<f32>>,
}

impl TokenRouter for Scores {
    fn name(&self) -> &'static str {
        "all"
    }

    fn kept_fraction(&self) -> f32 {
        1.0
    }

    fn admit(&self, layer: usize, input: RouterInput<'_>) -> Result<Admission> {
        if let Some(scores) = self.gates.get(layer).map(|gate| gate.score(&input)).transpose()?.flatten() {
            let (kv_heads, sinks) = (scores.dim(1)?, self.sinks.saturating_sub(input.step.start));
            let scores = scores.flatten_all()?.to_vec1::<f32>()?;
            if let Ok(mut seen) = self.seen.lock() {
                seen.extend(scores.into_iter().skip(sinks * kv_heads));
            }
        }
        Ok(Admission::Every)
    }
}

/// What gates keep of real text.
#[derive(Debug, Clone)]
pub struct Calibrated {
    /// The threshold that keeps what was asked for.
    pub tau: f32,
    /// See [`crate::RouterFile::curve`].
    pub curve: Vec<(f32, f32)>,
}

/// Reads `texts`, sequences of token ids, with a gate for each layer, of the model's shapes ([`crate::Published::into_layers`]). `progress`
/// is told how many texts are done, and may stop it before the next.
///
/// # Errors
/// If there is nothing to score, or a text fails.
pub fn calibrate(
    model: &dyn CausalLm,
    dense: &RoutedAttention,
    gates: &[GateLayer],
    texts: &[Vec<u32>],
    options: &CalibrateOptions,
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Calibrated>> {
    let scores = Arc::new(Scores { gates: gates.to_vec(), sinks: options.sinks, seen: Mutex::default() });
    let attention = dense.with_routing(Routing { token_router: scores.clone(), ..Routing::dense() })?;
    for (done, text) in texts.iter().enumerate() {
        if progress(done).is_break() {
            return Ok(None);
        }
        let mut cache = KvCache::new(&model.config().layer_specs(), KvDtype::F16.into(), model.device(), text.len())?;
        for part in text.chunks(options.chunk.max(1)) {
            model.forward(part, &attention, &mut cache)?;
        }
    }
    let seen = scores.seen.lock().map(|mut seen| std::mem::take(&mut *seen)).unwrap_or_default();
    if seen.is_empty() {
        bail!("nothing to set a threshold on: no text, or no layer with a gate");
    }
    Ok(Some(calibrated(seen, options.keep)))
}
