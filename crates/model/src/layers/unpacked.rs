use super::{GatedMlp, SelfAttention};
use crate::weights::Matrix;
use candle_core::{Result, Tensor};
use sparse_attn::RoutedAttention;

/// Weights of a layer in 16 bits, where a GPU multiplies many tokens with them: unpacked by one kernel before the first product, if there is room for
/// all at once, one layer after the other to the same place. Small models have many layers, and each launch counts.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    groups: Vec<Tensor>,
}

impl Unpacked {
    /// Unpacks those of a layer for a step of `tokens` tokens; none where each product is to see to its own.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn unpack(&mut self, layer: &SelfAttention, mlp: &GatedMlp, attention: &RoutedAttention, tokens: usize) -> Result<()> {
        if !attention.is_observed() {
            let groups = [layer.qkv_group(attention), layer.output_group(), mlp.gate_up_group(), mlp.down_group()];
            self.groups = Matrix::unpack_groups(&groups, tokens, std::mem::take(&mut self.groups))?.unwrap_or_default();
        }
        Ok(())
    }

    /// Those of queries, keys and values, and the matrix that a token router wants beside them.
    pub(crate) fn qkv(&self) -> Option<&Tensor> {
        self.groups.first()
    }

    /// Those that attention's output is multiplied with.
    pub(crate) fn output(&self) -> Option<&Tensor> {
        self.groups.get(1)
    }

    /// Those of the gate and of what it gates.
    pub(crate) fn gate_up(&self) -> Option<&Tensor> {
        self.groups.get(2)
    }

    /// Those that are multiplied last.
    pub(crate) fn down(&self) -> Option<&Tensor> {
        self.groups.get(3)
    }
}
