use super::{GatedMlp, SelfAttention};
use crate::config::Config;
use crate::gpu::{self, Along, Bundles, Group, Parts, Unpacked};
use crate::weights::Matrix;
use candle_core::{DType, Result, Tensor};
use sparse_attn::{KvCache, Place, RoutedAttention, Step};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of the attention inputs of all layers that are kept until verdicts on them are made: enough for prompts of small models that a gate beside
/// each layer would slow down.
const INPUT_BYTES: usize = 128 << 20;

/// What the layers of a step of many tokens on a GPU use, one after the other: small models have many layers, and a host that asks for memory,
/// or launches a kernel more, is what they wait for. Of small models it stays for the next step, whose products are then launched as they were recorded.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// `[layers, hidden_size]`
    shape: [usize; 2],
    /// Weights in 16 bits: a layer's are unpacked by one kernel before the first product, if there is room for all at once.
    unpacked: Unpacked,
    /// Attention inputs of layers on which verdicts are made later, of each of a gate's stacks, and which of them has the layer.
    inputs: Vec<Parts>,
    waits_in: Option<usize>,
    /// What launches layers together.
    pub(crate) bundles: Bundles,
    /// Where the residual stream is.
    pub(crate) stream: Place,
    /// Where the input of a part goes, what its first product gives, what is made of that on the way, what its last one reads and, before a norm, gives.
    pub(crate) normed: Place,
    pub(crate) product: Place,
    pub(crate) queries: Place,
    pub(crate) attended: Place,
    pub(crate) gated: Place,
    added: Place,
}

/// What a model's steps use, one after the other; of those at the same time the later one has its own.
#[derive(Debug, Clone, Default)]
pub(crate) struct Workspaces(Arc<Mutex<Option<Workspace>>>);

impl Workspaces {
    /// For a step of this model, until [`Workspace::end`].
    pub(crate) fn take(&self, config: &Config) -> Workspace {
        let mut workspace = self.spare().take().unwrap_or_default();
        workspace.shape = [config.num_layers, config.hidden_size];
        workspace.inputs.iter_mut().for_each(Parts::clear);
        workspace
    }

    /// What no step uses.
    fn spare(&self) -> MutexGuard<'_, Option<Workspace>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Workspace {
    /// Makes ready for a layer of a step: has its weights unpacked with the norm of its input, or none where each product is to see to its own.
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
        let is_little = layers * step.len * hidden_size * size_of::<u16>() <= INPUT_BYTES;
        let decides_later = is_little && attention.decides_later(layer.index(), step, cache.layer(layer.index()));
        let gate = attention.routing().token_router.as_gate().filter(|_| decides_later);
        let unpacked = std::mem::take(&mut self.unpacked);
        if !attention.is_observed() {
            let groups = [layer.qkv_group(attention, decides_later), layer.output_group(), mlp.gate_up_group(), mlp.down_group()];
            self.unpacked = Matrix::unpack_groups(&groups, step.len, unpacked)?.unwrap_or_default();
        }
        // Of large models each part gives its memory back: another one may need it.
        let keeps = self.keeps();
        let Self { stream, normed, product, queries, attended, gated, added, .. } = self;
        for place in [stream, normed, product, queries, attended, gated, added] {
            place.keep(keeps);
        }
        self.waits_in = None;
        if let Some(gate) = gate.filter(|_| keeps)
            && let Some([stack, index]) = gate.stacked(layer.index())
        {
            self.inputs.resize_with(gate.stacks().len(), Parts::default);
            self.inputs[stack].expect([index, gate.stacks()[stack].layers.len()]);
            self.waits_in = Some(stack);
        }
        Ok(())
    }

    /// Whether what layers use stays from one to the next.
    pub(crate) fn keeps(&self) -> bool {
        !self.unpacked.groups().is_empty()
    }

    /// Where attention's input goes, where it is kept if the token router decides later, and weights that are to be there with it.
    pub(crate) fn attention_input(&mut self) -> (&mut Place, Along<'_>) {
        (&mut self.normed, Along { kept: self.waits_in.map(|stack| &mut self.inputs[stack]), unpacked: Some(&mut self.unpacked) })
    }

    /// Whether the token router decides later on the layer's tokens.
    pub(crate) fn decides_later(&self) -> bool {
        self.waits_in.is_some()
    }

    /// Leaves `cache` what the token router is to decide by, and `workspaces` all else.
    ///
    /// # Errors
    /// If other tokens wait there.
    pub(crate) fn end(self, workspaces: &Workspaces, step: Step, cache: &mut KvCache) -> Result<()> {
        let inputs: Vec<_> = self.inputs.iter().map(Parts::all).collect();
        if inputs.iter().any(Option::is_some) {
            cache.wait_for_verdicts(step, &inputs, 0)?;
        }
        *workspaces.spare() = Some(self);
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

    /// Those that attention's output is multiplied with, and where that goes.
    pub(crate) fn output(&mut self) -> (Option<&Tensor>, &mut Place) {
        (self.unpacked.groups().get(1), &mut self.added)
    }

    /// The same of the gate and of what it gates.
    ///
    /// # Errors
    /// As [`Workspace::qkv_or`].
    pub(crate) fn gate_up_or<'a>(&self, group: impl FnOnce() -> Group<'a, Matrix>, x: &Tensor) -> Result<Option<Tensor>> {
        self.group_or(2, group, x)
    }

    /// Those that are multiplied last, and where that goes.
    pub(crate) fn down(&mut self) -> (Option<&Tensor>, &mut Place) {
        (self.unpacked.groups().get(3), &mut self.added)
    }

    fn group_or<'a>(&self, index: usize, group: impl FnOnce() -> Group<'a, Matrix>, x: &Tensor) -> Result<Option<Tensor>> {
        match self.unpacked.groups().get(index) {
            None if x.dtype() == DType::BF16 => {
                let Some(mut one) = Matrix::unpack_groups(&[group()], x.dim(0)?, Unpacked::default())? else { return Ok(None) };
                one.launch()?;
                Ok(one.groups().first().cloned())
            }
            weights => Ok(weights.cloned()),
        }
    }
}

/// Has a token router make the verdicts that tokens of `cache` wait for.
///
/// # Errors
/// If the device is out of memory, or shapes do not fit.
pub(crate) fn decide(attention: &RoutedAttention, cache: &mut KvCache) -> Result<()> {
    attention.decide(cache, gpu::multiply_parts)
}

/// [`decide`], and learns all verdicts that are on their way.
///
/// # Errors
/// As there, or if the device fails.
pub(crate) fn settle(attention: &RoutedAttention, cache: &mut KvCache) -> Result<()> {
    decide(attention, cache)?;
    cache.learn()
}
