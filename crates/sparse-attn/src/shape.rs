//! The head layout of one attention layer.

use candle_core::{Result, bail};

/// How many heads a layer has and how wide they are. Checked once, when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl HeadShape {
    /// # Errors
    /// If a count is zero or `kv_heads` does not divide `q_heads`.
    pub fn new(q_heads: usize, kv_heads: usize, head_dim: usize) -> Result<Self> {
        if q_heads == 0 || kv_heads == 0 || head_dim == 0 {
            bail!("heads: q_heads {q_heads}, kv_heads {kv_heads} and head_dim {head_dim} must all be above zero");
        }
        if !q_heads.is_multiple_of(kv_heads) {
            bail!("heads: kv_heads {kv_heads} does not divide q_heads {q_heads}");
        }
        Ok(Self { q_heads, kv_heads, head_dim })
    }

    /// Query heads.
    pub fn q_heads(&self) -> usize {
        self.q_heads
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Numbers per head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Query heads that share one key/value head.
    pub fn group_size(&self) -> usize {
        self.q_heads / self.kv_heads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_do_not_divide_are_refused_with_both_numbers() {
        let error = HeadShape::new(9, 4, 64).unwrap_err().to_string();
        assert!(error.contains('9') && error.contains('4'), "{error}");
        assert_eq!(HeadShape::new(9, 3, 64).unwrap().group_size(), 3);
    }
}
