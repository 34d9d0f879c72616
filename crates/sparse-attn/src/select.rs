//! From block scores to the blocks that are read.

use crate::block_router::BlockScores;

/// The blocks that the queries of a step read.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Selection {
    /// All that is visible: causality and the model's own sliding window are the only limits.
    Every,
}

/// Turns scores into a selection. Deterministic: equal scores, equal selection.
pub fn select(scores: &BlockScores) -> Selection {
    match scores {
        BlockScores::Every => Selection::Every,
    }
}
