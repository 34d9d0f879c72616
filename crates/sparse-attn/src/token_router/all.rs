use super::{Admission, RouterInput, TokenRouter};
use candle_core::Result;

/// Every token keeps full attention: dense memory, nothing lost.
#[derive(Debug, Clone, Copy, Default)]
pub struct All;

impl TokenRouter for All {
    fn name(&self) -> &'static str {
        "all"
    }

    fn kept_fraction(&self) -> f32 {
        1.0
    }

    fn reads_keys(&self, _layer: usize) -> bool {
        false
    }

    fn admit(&self, _layer: usize, _input: RouterInput<'_>) -> Result<Admission> {
        Ok(Admission::Every)
    }
}
