use super::fused::gated;
use super::{Linear, Workspace, name};
use crate::config::{Activation, Config};
use crate::gpu::Group;
use crate::weights::{Matrix, Scope};
use candle_core::{DType, Result, Tensor};

/// `down(activation(gate(x)) * up(x))`
#[derive(Debug, Clone)]
pub struct GatedMlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
    inner: usize, // width between them
}

impl GatedMlp {
    /// Loads `mlp.{gate,up,down}_proj` or `ffn_{gate,up,down}`.
    ///
    /// # Errors
    /// If a matrix is missing or has another shape.
    pub fn load(scope: &Scope<'_>, config: &Config) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate: Linear::load(scope, name("mlp.gate_proj", "ffn_gate"), inner, hidden)?,
            up: Linear::load(scope, name("mlp.up_proj", "ffn_up"), inner, hidden)?,
            down: Linear::load(scope, name("mlp.down_proj", "ffn_down"), hidden, inner)?,
            activation: config.activation,
            inner,
        })
    }

    /// Gate, up and down.
    pub fn projections(&self) -> [&Linear; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// How the input of so many tokens may come.
    pub fn dtype_of_input(&self, tokens: usize) -> DType {
        Linear::dtype_of_activations([&self.gate, &self.up], tokens)
    }

    /// `[tokens, hidden_size]` -> what `down` is to be multiplied with.
    ///
    /// # Errors
    /// If the widths differ.
    pub(crate) fn forward(&self, x: &Tensor, workspace: &mut Workspace) -> Result<Tensor> {
        let projections = [&self.gate, &self.up];
        let gate_up = workspace.gate_up_or(|| self.gate_up_group(), x)?;
        let (products, _) = Linear::products(projections, gate_up.as_ref(), x, [1, 1], self.inner, 0, &mut workspace.product)?;
        let [gate, up] = Linear::add_biases(projections, products)?;
        let (gate, up) = (gate.squeeze(1)?, up.squeeze(1)?);
        let dtype = self.down.weight().dtype_of_activations(x.dim(0)?);
        gated(self.activation, gate, &up, dtype, &mut workspace.gated)
    }

    /// The last projection.
    pub(crate) fn down(&self) -> &Linear {
        &self.down
    }

    /// The weights that its input is multiplied with.
    pub(crate) fn gate_up_group(&self) -> Group<'_, Matrix> {
        Group { matrices: vec![self.gate.weight(), self.up.weight()], beside: None, whole: 1 }
    }

    /// The weights that are multiplied last.
    pub(crate) fn down_group(&self) -> Group<'_, Matrix> {
        self.down.group()
    }
}
