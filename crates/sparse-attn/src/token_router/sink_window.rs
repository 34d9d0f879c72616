use super::{Admission, RouterInput, TokenRouter};
use candle_core::Result;

/// Only the sinks are kept, and the window: StreamingLLM, arXiv:2309.17453. A baseline; what lies between is lost.
#[derive(Debug, Clone, Copy, Default)]
pub struct SinkWindow;

impl TokenRouter for SinkWindow {
    fn name(&self) -> &'static str {
        "sink_window"
    }

    fn kept_fraction(&self) -> f32 {
        0.0
    }

    fn reads_keys(&self, _layer: usize) -> bool {
        false
    }

    fn admit(&self, _layer: usize, input: RouterInput<'_>) -> Result<Admission> {
        let (tokens, kv_heads, _) = input.k.dims3()?;
        Ok(Admission::Some(vec![false; tokens * kv_heads]))
    }
}
