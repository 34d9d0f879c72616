//! Trained gates: a score for every token and head, and a threshold.

mod feedforward;
mod keys;
mod rows;
mod sink;
mod stack;

pub use feedforward::Feedforward;
pub use keys::KeyGate;
pub use sink::SinkGate;
pub use stack::GateStack;

use super::{Admission, RouterInput, Scored, Scores, TokenRouter};
use candle_core::{Device, Result, Tensor, bail};

/// A trained gate: a token is kept where its score reaches `tau`.
#[derive(Debug, Clone)]
pub struct Gate {
    layers: Vec<GateLayer>,
    projections: Vec<Option<Tensor>>, // of each layer, where a GPU multiplies them beside others
    stacks: Vec<GateStack>,
    tau: f32,
    kept_fraction: f32,
}

/// The gate of one decoder layer.
#[derive(Debug, Clone)]
pub enum GateLayer {
    /// None: every token is kept. Layers with a sliding window forget anyway.
    Open,
    /// One or two layers on the attention input.
    Feedforward(Feedforward),
    /// Fast KVzip's.
    Sink(SinkGate),
    /// WG-KV's.
    Keys(KeyGate),
}

impl GateLayer {
    /// Scores `[tokens, kv_heads]`, each from its token alone, the same in any step; `None`: every token is kept.
    ///
    /// # Errors
    /// If the widths differ.
    pub fn score(&self, input: &RouterInput<'_>) -> Result<Option<Tensor>> {
        Ok(Some(match self {
            Self::Open => return Ok(None),
            Self::Feedforward(gate) => gate.score(input.hidden)?,
            Self::Sink(gate) => gate.score(input.hidden)?,
            Self::Keys(gate) => gate.score(input.k_before_rope, input.k)?,
        }))
    }

    /// Whether its tensors fit each other and a model: `kv_heads`, `head_dim` and `hidden_size`.
    ///
    /// # Errors
    /// If they do not: which, and both shapes.
    pub fn check(&self, kv_heads: usize, head_dim: usize, hidden_size: usize) -> Result<()> {
        let (of, width) = if matches!(self, Self::Keys(_)) { ("head_dim", head_dim) } else { ("hidden_size", hidden_size) };
        match self.shape()? {
            Some(own) if own != [kv_heads, width] => bail!("made for [kv_heads, {of}] {own:?}, the model has {:?}", [kv_heads, width]),
            _ => Ok(()),
        }
    }

    /// `[kv_heads, hidden_size]`, of keys `[kv_heads, head_dim]`, if its tensors fit each other.
    fn shape(&self) -> Result<Option<[usize; 2]>> {
        Ok(Some(match self {
            Self::Open => return Ok(None),
            Self::Feedforward(gate) => gate.shape()?,
            Self::Sink(gate) => gate.shape()?,
            Self::Keys(gate) => gate.shape()?,
        }))
    }
}

impl Gate {
    /// A gate per decoder layer; `kept_fraction` is what `tau` was measured to keep.
    ///
    /// # Errors
    /// If shapes do not fit each other.
    pub fn new(layers: Vec<GateLayer>, tau: f32, kept_fraction: f32) -> Result<Self> {
        for (index, layer) in layers.iter().enumerate() {
            if let Err(error) = layer.shape() {
                bail!("gate of layer {index}: {error}");
            }
        }
        let projections = vec![None; layers.len()];
        Ok(Self { layers, projections, stacks: Vec::new(), tau, kept_fraction: kept_fraction.clamp(0.0, 0.999) })
    }

    /// The same, computed where the model is, as far as there are kernels: for one layer or two on the attention input.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let of = |layer: &GateLayer| match layer {
            GateLayer::Feedforward(gate) if device.is_cuda() => gate.to_device(device).map(GateLayer::Feedforward),
            other => Ok(other.clone()),
        };
        let projection = |layer: &GateLayer| match layer {
            GateLayer::Feedforward(gate) if device.is_cuda() => gate.projection()?.to_device(device).map(Some),
            _ => Ok(None),
        };
        Ok(Self {
            layers: self.layers.iter().map(of).collect::<Result<_>>()?,
            projections: self.layers.iter().map(projection).collect::<Result<_>>()?,
            stacks: GateStack::all_of(&self.layers, device)?,
            ..*self
        })
    }

    /// The gate of each decoder layer.
    pub fn layers(&self) -> &[GateLayer] {
        &self.layers
    }

    /// The layers that a GPU has, those that are alike together.
    pub fn stacks(&self) -> &[GateStack] {
        &self.stacks
    }

    /// Which of [`Gate::stacks`] has the gate of this decoder layer, and which layer of it that is.
    pub fn stacked(&self, layer: usize) -> Option<[usize; 2]> {
        let of = |(index, stack): (usize, &GateStack)| Some([index, stack.layers.binary_search(&layer).ok()?]);
        self.stacks.iter().enumerate().find_map(of)
    }

    /// The score from which a token is kept.
    pub fn tau(&self) -> f32 {
        self.tau
    }
}

impl TokenRouter for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn kept_fraction(&self) -> f32 {
        self.kept_fraction
    }

    fn as_gate(&self) -> Option<&Gate> {
        Some(self)
    }

    fn projection(&self, layer: usize) -> Option<&Tensor> {
        self.projections.get(layer)?.as_ref()
    }

    fn reads_keys(&self, layer: usize) -> bool {
        matches!(self.layers.get(layer), Some(GateLayer::Keys(_)))
    }

    fn admit(&self, layer: usize, input: RouterInput<'_>) -> Result<Admission> {
        let Some(gate) = self.layers.get(layer) else { bail!("gate: it has {} layers, this is layer {layer}", self.layers.len()) };
        let asked = match (gate, input.projected) {
            (GateLayer::Feedforward(gate), Some(sums)) => Some(gate.of_projected(sums)),
            (GateLayer::Feedforward(gate), None) => gate.ask(input.hidden)?,
            _ => None,
        };
        let scores = match asked {
            Some(scores) => scores,
            None => match gate.score(&input)? {
                Some(scores) => Scores::Made(scores),
                None => return Ok(Admission::Every),
            },
        };
        if scores.dims()? != input.k.dims()[..2] {
            bail!("gate: scores {:?} for keys {:?} [tokens, kv_heads, head_dim]", scores.dims()?, input.k.dims());
        }
        match scores {
            Scores::Made(scores) if scores.device().is_cpu() => {
                let scores = scores.flatten_all()?.to_vec1::<f32>()?;
                Ok(Admission::Some(scores.into_iter().map(|score| score >= self.tau).collect()))
            }
            scores => Ok(Admission::Scored(Scored { scores, tau: self.tau })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Step;
    use candle_core::DType;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    fn feedforward(hidden: bool) -> Feedforward {
        let hidden = hidden.then(|| (random(&[24, 40]), random(&[24])));
        Feedforward { weight: random(&[3, if hidden.is_some() { 24 } else { 40 }]), bias: random(&[3]), hidden }
    }

    /// Three heads of 8, two queries each, and a width of 40.
    fn sink() -> SinkGate {
        SinkGate {
            q_weight: random(&[24, 40]),
            q_bias: random(&[24]),
            k_weight: random(&[12, 40]),
            q_norm: random(&[4]),
            k_norm: random(&[4]),
            k_base: random(&[3, 1, 5, 4]),
            b: random(&[3, 1, 2]),
        }
    }

    fn keys() -> KeyGate {
        KeyGate {
            pre_key_norm: random(&[8]),
            post_key_norm: random(&[8]),
            conv1: (random(&[36, 16, 1]), random(&[36])),
            conv2: (random(&[3, 12, 1]), random(&[3])),
        }
    }

    #[test]
    fn scores_are_the_same_by_products_that_others_make() {
        for exact in [feedforward(false), feedforward(true)] {
            let (gate, x) = (exact.rounded().unwrap(), random(&[7, 40]));
            let products = x.matmul(&gate.projection().unwrap().to_dtype(DType::F32).unwrap().t().unwrap()).unwrap();
            let scores = gate.of_projected(&products);
            assert_eq!(scores.dims().unwrap(), [7, 3]);
            let largest = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            let scale = largest(exact.score(&x).unwrap());
            let error_of = |other: &Feedforward| largest((scores.made().unwrap() - other.score(&x).unwrap()).unwrap()) / scale;
            let (rounded, rounding) = (error_of(&gate), error_of(&exact));
            assert!(rounded < 1e-5 && rounding > 1e-5 && rounding < 2e-2, "{rounded} and {rounding}");
        }
    }

    fn layers() -> Vec<GateLayer> {
        vec![
            GateLayer::Feedforward(feedforward(false)),
            GateLayer::Feedforward(feedforward(true)),
            GateLayer::Sink(sink()),
            GateLayer::Keys(keys()),
        ]
    }

    #[test]
    fn scores_of_a_feedforward_gate_are_the_formula() -> Result<()> {
        for hidden in [false, true] {
            let (gate, x) = (feedforward(hidden), random(&[50, 40]));
            let mut want = x.clone();
            if let Some((weight, bias)) = &gate.hidden {
                want = want.matmul(&weight.t()?)?.broadcast_add(bias)?.gelu_erf()?;
            }
            let want = want.matmul(&gate.weight.t()?)?.broadcast_add(&gate.bias)?;
            assert!((gate.score(&x)? - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()? < 1e-4);
        }
        Ok(())
    }

    #[test]
    fn verdicts_do_not_depend_on_the_step() -> Result<()> {
        let (x, k, k_before_rope) = (random(&[50, 40]), random(&[50, 3, 8]), random(&[50, 3, 8]));
        for layer in layers() {
            layer.check(3, 8, 40)?;
            let input = |start: usize, len: usize| -> Result<[Tensor; 3]> {
                Ok([x.narrow(0, start, len)?, k.narrow(0, start, len)?, k_before_rope.narrow(0, start, len)?])
            };
            let [hidden, keys, before] = input(0, 50)?;
            let step = Step { start: 0, len: 50 };
            let scores = layer.score(&RouterInput { hidden: &hidden, projected: None, k: &keys, k_before_rope: &before, step })?.unwrap();
            // The middle score: half are kept.
            let mut sorted = scores.flatten_all()?.to_vec1::<f32>()?;
            sorted.sort_by(f32::total_cmp);
            let gate = Gate::new(vec![layer], sorted[75], 0.5)?;
            let admit = |start: usize, len: usize| {
                let [hidden, k, k_before_rope] = input(start, len)?;
                let input =
                    RouterInput { hidden: &hidden, projected: None, k: &k, k_before_rope: &k_before_rope, step: Step { start, len } };
                match gate.admit(0, input)? {
                    Admission::Some(verdicts) => Ok::<_, candle_core::Error>(verdicts),
                    other => panic!("a gate decides, on the host: {other:?}"),
                }
            };
            let whole = admit(0, 50)?;
            assert_eq!(whole.iter().filter(|kept| **kept).count(), 75);
            let parts: Vec<bool> = (0..50).map(|t| admit(t, 1)).collect::<Result<Vec<_>>>()?.concat();
            assert_eq!(whole, parts);
            let error = gate.admit(1, RouterInput { hidden: &x, projected: None, k: &k, k_before_rope: &k, step }).unwrap_err().to_string();
            assert!(error.contains("1 layers"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn an_open_layer_keeps_all_and_other_shapes_are_refused() -> Result<()> {
        let gate = Gate::new(vec![GateLayer::Open], f32::MAX, 0.5)?;
        let (x, k) = (random(&[2, 40]), Tensor::zeros((2, 3, 8), DType::F32, &Device::Cpu)?);
        let input = RouterInput { hidden: &x, projected: None, k: &k, k_before_rope: &k, step: Step { start: 0, len: 2 } };
        assert!(matches!(gate.admit(0, input)?, Admission::Every));
        for layer in layers() {
            let error = layer.check(4, 8, 40).unwrap_err().to_string();
            assert!(error.contains("[3, ") && error.contains("[4, "), "{error}");
        }
        let refused = |layer: GateLayer, words: &str| {
            let error = Gate::new(vec![GateLayer::Open, layer], 0.0, 0.5).unwrap_err().to_string();
            assert!(error.contains("layer 1") && error.contains(words), "{error}");
        };
        refused(GateLayer::Sink(SinkGate { k_norm: random(&[5]), ..sink() }), "k_norm.weight is [5]");
        refused(GateLayer::Keys(KeyGate { conv2: (random(&[3, 12, 1]), random(&[2])), ..keys() }), "conv2.bias is [2]");
        refused(GateLayer::Feedforward(Feedforward { bias: random(&[2]), ..feedforward(true) }), "bias");
        Ok(())
    }
}
