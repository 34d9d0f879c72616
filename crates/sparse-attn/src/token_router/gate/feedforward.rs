use super::rows::{affine, numbers};
use crate::backend::cuda;
use crate::token_router::{Projected, Scores};
use candle_core::{DType, Device, Result, Tensor, bail};

/// One or two layers on the attention input: what `train-router` makes. f32, on the host, or all on the model's GPU, where the weights of the first
/// one are rounded to bf16, as the input is that they are multiplied with.
#[derive(Debug, Clone)]
pub struct Feedforward {
    /// `[width, hidden_size]` and `[width]`, of the hidden layer where there is one.
    pub hidden: Option<(Tensor, Tensor)>,
    /// `[kv_heads, width]`, or `[kv_heads, hidden_size]` without a hidden layer.
    pub weight: Tensor,
    /// `[kv_heads]`
    pub bias: Tensor,
}

impl Feedforward {
    /// `x` `[tokens, hidden_size]` -> `w . x + b`, `[tokens, kv_heads]`, or the same on `gelu(w x + b)`. Each row from its token
    /// alone, the same in any step.
    ///
    /// # Errors
    /// If the widths differ.
    pub fn score(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(scores) = self.ask(x)? {
            return scores.made();
        }
        let x = x.to_dtype(DType::F32)?;
        let x = match &self.hidden {
            Some((weight, bias)) => affine(&x, weight, &numbers(bias)?)?.gelu_erf()?,
            None => x,
        };
        affine(&x, &self.weight, &numbers(&self.bias)?)
    }

    /// What [`Feedforward::score`] is to be, where a GPU makes it.
    pub(super) fn ask(&self, x: &Tensor) -> Result<Option<Scores>> {
        if !self.weight.device().is_cuda() {
            return Ok(None);
        }
        let x = match &self.hidden {
            Some((weight, bias)) => cuda::gate_layer(x, weight, bias, true)?,
            None => x.clone(),
        };
        Ok(Some(Scores::Asked { x, weight: self.weight.clone(), bias: self.bias.clone() }))
    }

    /// What [`Feedforward::score`] is to be, where products with [`Feedforward::projection`] are there.
    pub(super) fn of_projected(&self, sums: &Tensor) -> Scores {
        let last = self.hidden.as_ref().map(|_| (self.weight.clone(), self.bias.clone()));
        let bias = self.hidden.as_ref().map_or(&self.bias, |(_, bias)| bias);
        Scores::Projected(Projected { sums: sums.clone(), bias: bias.clone(), last })
    }

    /// The weights of the first layer in bf16, `[rows, hidden_size]`.
    pub(super) fn projection(&self) -> Result<Tensor> {
        self.hidden.as_ref().map_or(&self.weight, |(weight, _)| weight).to_dtype(DType::BF16)
    }

    /// The same with those weights.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn rounded(&self) -> Result<Self> {
        let first = self.projection()?.to_dtype(DType::F32)?;
        Ok(match &self.hidden {
            Some((_, bias)) => Self { hidden: Some((first, bias.clone())), ..self.clone() },
            None => Self { weight: first, ..self.clone() },
        })
    }

    /// The same, computed on `device`, a GPU.
    ///
    /// # Errors
    /// If it has no memory for it.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let of = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.contiguous()?.to_device(device);
        let Self { hidden, weight, bias } = self.rounded()?;
        let hidden = hidden.map(|(weight, bias)| Ok::<_, candle_core::Error>((of(&weight)?, of(&bias)?)));
        Ok(Self { hidden: hidden.transpose()?, weight: of(&weight)?, bias: of(&bias)? })
    }

    /// `[kv_heads, hidden_size]`
    pub(super) fn shape(&self) -> Result<[usize; 2]> {
        let (kv_heads, width) = self.weight.dims2()?;
        let hidden = self.hidden.as_ref().map(|(weight, bias)| Ok::<_, candle_core::Error>((weight.dims2()?, bias.dims1()?)));
        let hidden = hidden.transpose()?;
        if self.bias.dims1()? != kv_heads || hidden.is_some_and(|((rows, _), bias)| rows != width || bias != width) {
            bail!("weight {:?} does not fit bias {:?} or its hidden layer", self.weight.dims(), self.bias.dims());
        }
        Ok([kv_heads, hidden.map_or(width, |((_, columns), _)| columns)])
    }
}
