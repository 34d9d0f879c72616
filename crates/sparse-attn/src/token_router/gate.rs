use super::{Admission, RouterInput, TokenRouter};
use crate::vectorised;
use candle_core::{DType, Result, Tensor, bail};

/// A trained gate: a token is kept where its score reaches `tau`. The score of head `h` is
/// `w_h . x + b_h` on the attention input `x`, or the same on a hidden layer `gelu(w x + b)`.
#[derive(Debug, Clone)]
pub struct Gate {
    layers: Vec<GateLayer>,
    tau: f32,
    kept_fraction: f32,
}

/// The gate of one decoder layer; f32.
#[derive(Debug, Clone)]
pub struct GateLayer {
    /// `[width, hidden_size]` and `[width]`, of the hidden layer where there is one.
    pub hidden: Option<(Tensor, Tensor)>,
    /// `[kv_heads, width]`, or `[kv_heads, hidden_size]` without a hidden layer.
    pub weight: Tensor,
    /// `[kv_heads]`
    pub bias: Tensor,
}

impl GateLayer {
    /// `x` `[tokens, hidden_size]` -> `[tokens, kv_heads]`. Each row from its token alone, the same in any step.
    ///
    /// # Errors
    /// If the widths differ.
    pub fn score(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(DType::F32)?;
        let x = match &self.hidden {
            Some((weight, bias)) => row_by_row(&x, weight)?.broadcast_add(bias)?.gelu_erf()?,
            None => x,
        };
        row_by_row(&x, &self.weight)?.broadcast_add(&self.bias)
    }
}

impl Gate {
    /// A gate per decoder layer; `kept_fraction` is what `tau` was measured to keep.
    ///
    /// # Errors
    /// If shapes do not fit each other.
    pub fn new(layers: Vec<GateLayer>, tau: f32, kept_fraction: f32) -> Result<Self> {
        for (index, layer) in layers.iter().enumerate() {
            let (kv_heads, width) = layer.weight.dims2()?;
            let hidden = layer.hidden.as_ref().map(|(weight, bias)| Ok::<_, candle_core::Error>((weight.dims2()?.0, bias.dims1()?)));
            let hidden = hidden.transpose()?;
            if layer.bias.dims1()? != kv_heads || hidden.is_some_and(|widths| widths != (width, width)) {
                bail!(
                    "gate of layer {index}: weight {:?} does not fit bias {:?} or its hidden layer",
                    layer.weight.dims(),
                    layer.bias.dims()
                );
            }
        }
        Ok(Self { layers, tau, kept_fraction: kept_fraction.clamp(0.0, 0.999) })
    }
}

impl TokenRouter for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn kept_fraction(&self) -> f32 {
        self.kept_fraction
    }

    fn admit(&self, layer: usize, input: RouterInput<'_>) -> Result<Admission> {
        let Some(gate) = self.layers.get(layer) else { bail!("gate: it has {} layers, this is layer {layer}", self.layers.len()) };
        let scores = gate.score(input.hidden)?;
        if scores.dims() != &input.k.dims()[..2] {
            bail!("gate: scores {:?} for keys {:?} [tokens, kv_heads, head_dim]", scores.dims(), input.k.dims());
        }
        let scores = scores.flatten_all()?.to_vec1::<f32>()?;
        Ok(Admission::Some(scores.into_iter().map(|score| score >= self.tau).collect()))
    }
}

/// `x . weight'`, one row at a time: a product of many rows may add in another order than that of one, and a score at
/// the threshold would then depend on how a prompt was cut.
fn row_by_row(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let width = x.dim(1)?;
    if weight.dims2()?.1 != width {
        bail!("gate: made for a width of {}, got {width}", weight.dims()[1]);
    }
    let rows = x.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
    let columns = weight.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
    let mut out = Vec::with_capacity(rows.len() / width * weight.dims()[0]);
    for row in rows.chunks_exact(width) {
        out.extend(columns.chunks_exact(width).map(|column| dot(row, column)));
    }
    Tensor::from_vec(out, (x.dim(0)?, weight.dim(0)?), x.device())
}

vectorised! {
    fn dot(a: &[f32], b: &[f32]) -> f32 = dot_loop;
}

/// In 16 sums, which the compiler turns into vectors.
#[inline(always)]
fn dot_loop(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..16 {
            sums[i] = a[i].mul_add(b[i], sums[i]);
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Step;
    use candle_core::Device;

    fn layer(hidden: bool) -> Result<GateLayer> {
        let random = |rows: usize, columns: usize| Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu);
        let width = if hidden { 24 } else { 40 };
        let hidden = if hidden { Some((random(24, 40)?, random(1, 24)?.squeeze(0)?)) } else { None };
        Ok(GateLayer { hidden, weight: random(3, width)?, bias: random(1, 3)?.squeeze(0)? })
    }

    #[test]
    fn verdicts_are_the_formula_and_do_not_depend_on_the_step() -> Result<()> {
        for hidden in [false, true] {
            let layer = layer(hidden)?;
            let x = Tensor::randn(0f32, 1.0, (50, 40), &Device::Cpu)?;
            let k = Tensor::zeros((50, 3, 8), DType::F32, &Device::Cpu)?;
            let mut want = x.clone();
            if let Some((weight, bias)) = &layer.hidden {
                want = want.matmul(&weight.t()?)?.broadcast_add(bias)?.gelu_erf()?;
            }
            let want = want.matmul(&layer.weight.t()?)?.broadcast_add(&layer.bias)?;
            assert!((layer.score(&x)? - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()? < 1e-4);
            let gate = Gate::new(vec![layer], 0.3, 0.5)?;
            let admit = |start: usize, len: usize| {
                let (hidden, k) = (x.narrow(0, start, len)?, k.narrow(0, start, len)?);
                match gate.admit(0, RouterInput { hidden: &hidden, k: &k, step: Step { start, len } })? {
                    Admission::Some(verdicts) => Ok::<_, candle_core::Error>(verdicts),
                    Admission::Every => panic!("a gate decides"),
                }
            };
            let whole = admit(0, 50)?;
            assert!(whole.contains(&true) && whole.contains(&false));
            let parts: Vec<bool> = (0..50).map(|t| admit(t, 1)).collect::<Result<Vec<_>>>()?.concat();
            assert_eq!(whole, parts);
            let error = gate.admit(1, RouterInput { hidden: &x, k: &k, step: Step { start: 0, len: 50 } }).unwrap_err().to_string();
            assert!(error.contains("1 layers"), "{error}");
        }
        Ok(())
    }
}
