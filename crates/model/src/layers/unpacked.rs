use super::{GatedMlp, SelfAttention};
use crate::weights::Matrix;
use candle_core::{Result, Tensor};
use sparse_attn::RoutedAttention;

/// Weights of a layer in 16 bits, where a GPU multiplies many tokens with them: unpacked by one kernel before the first product, if there is room for
/// all at once. Small models have many layers, and each launch counts.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    /// Those of queries, keys and values, and the matrix that a token router wants beside them.
    pub(crate) qkv: Option<Tensor>,
    pub(crate) output: Option<Tensor>,
    /// Those of the gate and of what it gates.
    pub(crate) gate_up: Option<Tensor>,
    pub(crate) down: Option<Tensor>,
}

impl Unpacked {
    /// Those of a layer for a step of `tokens` tokens; none where each product is to see to its own.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn of(layer: &SelfAttention, mlp: &GatedMlp, attention: &RoutedAttention, tokens: usize) -> Result<Self> {
        if attention.is_observed() {
            return Ok(Self::default());
        }
        let groups = [layer.qkv_group(attention), layer.output_group(), mlp.gate_up_group(), mlp.down_group()];
        let Some(mut all) = Matrix::unpack_groups(&groups, tokens)? else { return Ok(Self::default()) };
        let mut next = || all.pop();
        let (down, gate_up, output, qkv) = (next(), next(), next(), next());
        Ok(Self { qkv, output, gate_up, down })
    }
}
