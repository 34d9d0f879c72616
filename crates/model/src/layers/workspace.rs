use super::{GatedMlp, SelfAttention};
use crate::gpu::{Group, Place};
use crate::weights::Matrix;
use candle_core::{DType, Result, Tensor};
use sparse_attn::RoutedAttention;

/// What the layers of a step of many tokens on a GPU use, one after the other: small models have many layers, and a host that asks for memory,
/// or launches a kernel more, is what they wait for.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// Weights in 16 bits: a layer's are unpacked by one kernel before the first product, if there is room for all at once.
    unpacked: Vec<Tensor>,
    /// Where the norm goes that a part of the layer reads, what its first product gives, and what its last one reads of that.
    pub(crate) normed: Place,
    pub(crate) product: Place,
    pub(crate) gated: Place,
}

impl Workspace {
    /// Makes ready for a layer of a step of `tokens` tokens: unpacks its weights, or none where each product is to see to its own.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn begin(&mut self, layer: &SelfAttention, mlp: &GatedMlp, attention: &RoutedAttention, tokens: usize) -> Result<()> {
        if !attention.is_observed() {
            let groups = [layer.qkv_group(attention), layer.output_group(), mlp.gate_up_group(), mlp.down_group()];
            self.unpacked = Matrix::unpack_groups(&groups, tokens, std::mem::take(&mut self.unpacked))?.unwrap_or_default();
        }
        // Of large models each part gives its memory back: another one may need it.
        let keeps = !self.unpacked.is_empty();
        for place in [&mut self.normed, &mut self.product, &mut self.gated] {
            place.keep(keeps);
        }
        Ok(())
    }

    /// Weights of queries, keys and values, and the matrix that a token router wants beside them; else those of `group` by itself, if they are to be
    /// multiplied with `x`, and little enough.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn qkv_or<'a>(&self, group: impl FnOnce() -> Group<'a, Matrix>, x: &Tensor) -> Result<Option<Tensor>> {
        self.group_or(0, group, x)
    }

    /// Those that attention's output is multiplied with.
    pub(crate) fn output(&self) -> Option<&Tensor> {
        self.unpacked.get(1)
    }

    /// The same of the gate and of what it gates.
    ///
    /// # Errors
    /// As [`Workspace::qkv_or`].
    pub(crate) fn gate_up_or<'a>(&self, group: impl FnOnce() -> Group<'a, Matrix>, x: &Tensor) -> Result<Option<Tensor>> {
        self.group_or(2, group, x)
    }

    /// Those that are multiplied last.
    pub(crate) fn down(&self) -> Option<&Tensor> {
        self.unpacked.get(3)
    }

    fn group_or<'a>(&self, index: usize, group: impl FnOnce() -> Group<'a, Matrix>, x: &Tensor) -> Result<Option<Tensor>> {
        match self.unpacked.get(index) {
            None if x.dtype() == DType::BF16 => Ok(Matrix::unpack_groups(&[group()], x.dim(0)?, Vec::new())?.and_then(|mut one| one.pop())),
            weights => Ok(weights.cloned()),
        }
    }
}
