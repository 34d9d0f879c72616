use super::{BlockRouter, BlockScores, Queries};
use crate::LayerStore;
use candle_core::Result;

/// Every query reads every block: dense attention.
#[derive(Debug, Clone, Copy, Default)]
pub struct All;

impl BlockRouter for All {
    fn name(&self) -> &'static str {
        "all"
    }

    fn score(&self, _queries: &Queries<'_>, _store: &LayerStore) -> Result<BlockScores> {
        Ok(BlockScores::Every)
    }
}
