use super::{BlockRouter, BlockScores};
use crate::LayerStore;
use candle_core::{Result, Tensor};

/// Every query reads every block: dense attention.
#[derive(Debug, Clone, Copy, Default)]
pub struct All;

impl BlockRouter for All {
    fn name(&self) -> &'static str {
        "all"
    }

    fn score(&self, _q: &Tensor, _scale: f32, _store: &LayerStore, _block_size: usize) -> Result<BlockScores> {
        Ok(BlockScores::Every)
    }
}
