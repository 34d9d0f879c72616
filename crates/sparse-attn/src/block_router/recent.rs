use super::{BlockRouter, BlockScores, Queries};
use crate::LayerStore;
use candle_core::Result;

/// The first block and the window only: StreamingLLM, arXiv:2309.17453. A baseline; what lies between is lost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Recent;

impl BlockRouter for Recent {
    fn name(&self) -> &'static str {
        "recent"
    }

    fn fills_budget(&self) -> bool {
        false
    }

    fn score(&self, _queries: &Queries<'_>, _store: &LayerStore) -> Result<BlockScores> {
        Ok(BlockScores::Forced)
    }
}
