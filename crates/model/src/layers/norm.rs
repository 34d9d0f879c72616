use super::fused;
use super::linear::suffixed;
use crate::weights::{Name, Scope};
use candle_core::{Result, Tensor};

/// `x / sqrt(mean(x^2) + eps) * weight`
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor, // [width]
    eps: f32,
}

impl RmsNorm {
    /// Loads `<hf>.weight` or `<gguf>.weight`.
    ///
    /// # Errors
    /// If it is missing or not `[width]`.
    pub fn load(scope: &Scope<'_>, name: Name<'_>, width: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: scope.tensor(suffixed(name, "weight").name(), &[width])?, eps: eps as f32 })
    }

    /// Gemma's norm multiplies by `1 + weight`; llama.cpp's converter has added the 1 already.
    ///
    /// # Errors
    /// If it is missing or not `[width]`.
    pub fn load_plus_one(scope: &Scope<'_>, name: Name<'_>, width: usize, eps: f64) -> Result<Self> {
        let plain = Self::load(scope, name, width, eps)?;
        if scope.is_gguf() { Ok(plain) } else { Ok(Self { weight: (plain.weight + 1.0)?, eps: plain.eps }) }
    }

    /// A norm of these parts: `[width]`, f32.
    pub fn new(weight: Tensor, eps: f32) -> Self {
        Self { weight, eps }
    }

    /// `[width]`, f32.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f32 {
        self.eps
    }

    /// Over the last axis.
    ///
    /// # Errors
    /// If the widths differ.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        fused::rms_norm(x, &self.weight, self.eps)
    }
}
