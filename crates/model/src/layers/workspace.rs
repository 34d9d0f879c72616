use super::{GatedMlp, SelfAttention};
use crate::config::Config;
use crate::gpu::{self, Group, Parts, Place};
use crate::weights::Matrix;
use candle_core::{DType, Result, Tensor};
use sparse_attn::token_router::Gate;
use sparse_attn::{KvCache, RoutedAttention, Step};

/// Bytes of the attention inputs of all layers that are kept until verdicts on them are made.
const INPUT_BYTES: usize = 64 << 20;

/// What the layers of a step of many tokens on a GPU use, one after the other: small models have many layers, and a host that asks for memory,
/// or launches a kernel more, is what they wait for.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// `[layers, hidden_size]`
    shape: [usize; 2],
    /// Weights in 16 bits: a layer's are unpacked by one kernel before the first product, if there is room for all at once.
    unpacked: Vec<Tensor>,
    /// Attention inputs of layers on which verdicts are made when all are done.
    pub(crate) inputs: Parts,
    decides_later: bool,
    /// Where the input of a part goes, what its first product gives, and what its last one reads of that.
    pub(crate) normed: Place,
    pub(crate) product: Place,
    pub(crate) gated: Place,
}

impl Workspace {
    /// For the layers of this model.
    pub(crate) fn new(config: &Config) -> Self {
        Self { shape: [config.num_layers, config.hidden_size], ..Self::default() }
    }

    /// Makes ready for a layer of a step: unpacks its weights, or none where each product is to see to its own.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn begin(
        &mut self,
        layer: &SelfAttention,
        mlp: &GatedMlp,
        attention: &RoutedAttention,
        step: Step,
        cache: &KvCache,
    ) -> Result<()> {
        let [layers, hidden_size] = self.shape;
        self.decides_later = layers * step.len * hidden_size * size_of::<u16>() <= INPUT_BYTES
            && attention.decides_later(layer.index(), step, cache.layer(layer.index()));
        if !attention.is_observed() {
            let groups = [layer.qkv_group(attention, self.decides_later), layer.output_group(), mlp.gate_up_group(), mlp.down_group()];
            self.unpacked = Matrix::unpack_groups(&groups, step.len, std::mem::take(&mut self.unpacked))?.unwrap_or_default();
        }
        // Of large models each part gives its memory back: another one may need it.
        let keeps = !self.unpacked.is_empty();
        self.decides_later &= keeps;
        for place in [&mut self.normed, &mut self.product, &mut self.gated] {
            place.keep(keeps);
        }
        self.inputs.expect(self.decides_later.then_some([layer.index(), layers]));
        Ok(())
    }

    /// Whether the token router decides when all layers are done.
    pub(crate) fn decides_later(&self) -> bool {
        self.decides_later
    }

    /// Leaves `cache` what the token router is to decide by.
    pub(crate) fn end(self, cache: &mut KvCache) {
        if let Some(inputs) = self.inputs.into_all() {
            cache.keep_inputs(inputs);
        }
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

/// Has a token router make the verdicts on `step` that layers wait for.
///
/// # Errors
/// If the device is out of memory, or shapes do not fit.
pub(crate) fn decide(attention: &RoutedAttention, step: Step, cache: &mut KvCache) -> Result<()> {
    match (cache.take_inputs(), attention.routing().token_router.as_gate().and_then(Gate::stack)) {
        (Some(inputs), Some(stack)) => attention.decide(&gpu::multiply_parts(&stack.projection, &inputs)?, step, cache),
        _ => Ok(()),
    }
}
