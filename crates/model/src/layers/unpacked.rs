use super::{GatedMlp, SelfAttention};
use crate::gpu::Group;
use crate::weights::Matrix;
use candle_core::{DType, Result, Tensor};
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

    /// Those of queries, keys and values, and the matrix that a token router wants beside them; else those of `group` by itself, if they are to be
    /// multiplied with `x`, and little enough.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn qkv_or<'a>(&self, group: impl FnOnce() -> Group<'a, Matrix>, x: &Tensor) -> Result<Option<Tensor>> {
        self.group_or(0, group, x)
    }

    /// Those that attention's output is multiplied with.
    pub(crate) fn output(&self) -> Option<&Tensor> {
        self.groups.get(1)
    }

    /// The same of the gate and of what it gates.
    ///
    /// # Errors
    /// As [`Unpacked::qkv_or`].
    pub(crate) fn gate_up_or<'a>(&self, group: impl FnOnce() -> Group<'a, Matrix>, x: &Tensor) -> Result<Option<Tensor>> {
        self.group_or(2, group, x)
    }

    /// Those that are multiplied last.
    pub(crate) fn down(&self) -> Option<&Tensor> {
        self.groups.get(3)
    }

    fn group_or<'a>(&self, index: usize, group: impl FnOnce() -> Group<'a, Matrix>, x: &Tensor) -> Result<Option<Tensor>> {
        match self.groups.get(index) {
            None if x.dtype() == DType::BF16 => Ok(Matrix::unpack_groups(&[group()], x.dim(0)?, Vec::new())?.and_then(|mut one| one.pop())),
            weights => Ok(weights.cloned()),
        }
    }
}
