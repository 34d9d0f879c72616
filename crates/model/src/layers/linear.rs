use crate::gpu::{self, Group};
use crate::weights::{Matrix, Name, Scope};
use candle_core::{DType, Result, Tensor};
use sparse_attn::Place;

/// `x W' + b`, where the checkpoint has a bias.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Matrix,       // [out, in]
    bias: Option<Tensor>, // [out]
}

impl Linear {
    /// A projection from these parts.
    pub fn new(weight: Matrix, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// Loads `<hf>.weight` or `<gguf>.weight`, and the bias where there is one.
    ///
    /// # Errors
    /// If the weight is missing or a shape is not `[width_out, width_in]`.
    pub fn load(scope: &Scope<'_>, name: Name<'_>, width_out: usize, width_in: usize) -> Result<Self> {
        let weight = scope.matrix(suffixed(name, "weight").name(), width_out, width_in)?;
        Ok(Self { weight, bias: Self::load_bias(scope, name, width_out)? })
    }

    /// Loads `<hf>.bias` or `<gguf>.bias` where there is one.
    ///
    /// # Errors
    /// If it has another shape.
    pub fn load_bias(scope: &Scope<'_>, name: Name<'_>, width_out: usize) -> Result<Option<Tensor>> {
        scope.optional_tensor(suffixed(name, "bias").name(), &[width_out])
    }

    /// `[out, in]`.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }

    /// Its weight, to be unpacked by itself.
    pub(crate) fn group(&self) -> Group<'_, Matrix> {
        Group { matrices: vec![&self.weight], beside: None, whole: 1 }
    }

    /// `[out]`, where there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// `[tokens, in]` -> `[tokens, out]`.
    ///
    /// # Errors
    /// If the widths differ.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.add_bias(self.weight.multiply(x)?)
    }

    /// [`Linear::forward`] by weights that were unpacked, where they were, before a bias in `place`.
    ///
    /// # Errors
    /// If the widths differ.
    pub(crate) fn forward_by(&self, unpacked: Option<&Tensor>, x: &Tensor, place: &mut Place) -> Result<Tensor> {
        match unpacked {
            Some(weights) => self.add_bias(gpu::multiply_unpacked(weights, weights.dim(0)?, x, place)?),
            None => self.forward(x),
        }
    }

    /// Products of projections that read the same `x`, to so many heads of `width` numbers each, `[tokens, heads, width]`, without biases. What they
    /// give for a token is contiguous, but may lie among what the others give. Where their weights were unpacked, `beside` rows of another matrix after
    /// them give the last tensor, `[tokens, beside]`, and all of it is in `place`.
    ///
    /// # Errors
    /// If a width differs.
    pub(crate) fn products<const N: usize>(
        projections: [&Self; N],
        unpacked: Option<&Tensor>,
        x: &Tensor,
        heads: [usize; N],
        width: usize,
        beside: usize,
        place: &mut Place,
    ) -> Result<([Tensor; N], Option<Tensor>)> {
        let (tokens, own) = (x.dim(0)?, heads.iter().sum::<usize>());
        let Some(weights) = unpacked else {
            let each = Matrix::multiply_each(&projections.map(|projection| &projection.weight), x)?;
            let each = each.iter().zip(heads).map(|(y, heads)| y.reshape((tokens, heads, width))).collect::<Result<_>>()?;
            return Ok((all_of(each)?, None));
        };
        let all = gpu::multiply_unpacked(weights, own * width + beside, x, place)?;
        let beside = if beside > 0 { Some(all.narrow(1, own * width, beside)?) } else { None };
        let all = all.reshape((tokens, all.dim(1)? / width, width))?;
        let mut first = 0;
        let part = |heads: &usize| {
            first += heads;
            all.narrow(1, first - heads, *heads)
        };
        Ok((all_of(heads.iter().map(part).collect::<Result<Vec<_>>>()?)?, beside))
    }

    /// Adds the biases to [`Linear::products`].
    ///
    /// # Errors
    /// If a shape differs.
    pub(crate) fn add_biases<const N: usize>(projections: [&Self; N], products: [Tensor; N]) -> Result<[Tensor; N]> {
        all_of(projections.iter().zip(products).map(|(projection, y)| projection.add_bias(y)).collect::<Result<Vec<_>>>()?)
    }

    /// How so many tokens may come that all of these multiply: bf16 where all round to it, f32 otherwise.
    pub fn dtype_of_activations<const N: usize>(projections: [&Self; N], tokens: usize) -> DType {
        let rounds = |projection: &&Self| projection.weight.dtype_of_activations(tokens) == DType::BF16;
        if projections.iter().all(rounds) { DType::BF16 } else { DType::F32 }
    }

    /// Of a product `[tokens, out]`, or by heads `[tokens, heads, width]`.
    fn add_bias(&self, y: Tensor) -> Result<Tensor> {
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.reshape(&y.dims()[1..])?),
            None => Ok(y),
        }
    }
}

/// One tensor for each projection.
fn all_of<const N: usize>(tensors: Vec<Tensor>) -> Result<[Tensor; N]> {
    tensors.try_into().map_err(|_| candle_core::Error::Msg("linear: a product is missing".into()))
}

/// Both names with `.suffix` appended.
pub(super) struct Suffixed {
    hf: String,
    gguf: String,
}

impl Suffixed {
    pub(super) fn name(&self) -> Name<'_> {
        Name { hf: &self.hf, gguf: &self.gguf }
    }
}

pub(super) fn suffixed(name: Name<'_>, suffix: &str) -> Suffixed {
    Suffixed { hf: format!("{}.{suffix}", name.hf), gguf: format!("{}.{suffix}", name.gguf) }
}
