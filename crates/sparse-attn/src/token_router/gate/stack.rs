use super::{Feedforward, GateLayer};
use candle_core::{DType, Device, Result, Tensor};

/// Rows of a product on a GPU: whole 16 bytes of f32 and more.
const WHOLE: usize = 8;

/// Layers of a gate that are alike, one after the other, on a GPU: verdicts that nobody asks for yet are made for all of them together.
#[derive(Debug, Clone)]
pub struct GateStack {
    /// The decoder layers that they are of, ascending.
    pub layers: Vec<usize>,
    /// What a layer's input is multiplied with: the weights of the gate's first layer in bf16, and zeros,
    /// `[layers, rows, hidden_size]`.
    pub projection: Tensor,
    /// `[layers, width]`
    pub(crate) bias: Tensor,
    /// `[layers, kv_heads, width]` and `[layers, kv_heads]`: the gate's second layer, where it has one.
    pub(crate) last: Option<(Tensor, Tensor)>,
}

impl GateStack {
    /// The layers that a GPU computes, if `device` is one: those that are alike together.
    pub(super) fn all_of(layers: &[GateLayer], device: &Device) -> Result<Vec<Self>> {
        let dims = |gate: &Feedforward| (gate.weight.dims().to_vec(), gate.hidden.as_ref().map(|(weight, _)| weight.dims().to_vec()));
        let mut alike: Vec<(Vec<usize>, Vec<&Feedforward>)> = Vec::new();
        for (layer, gate) in layers.iter().enumerate().filter(|_| device.is_cuda()) {
            let GateLayer::Feedforward(gate) = gate else { continue };
            match alike.iter_mut().find(|(_, gates)| dims(gates[0]) == dims(gate)) {
                Some((layers, gates)) => {
                    layers.push(layer);
                    gates.push(gate);
                }
                None => alike.push((vec![layer], vec![gate])),
            }
        }
        alike.into_iter().map(|(layers, gates)| Self::of(layers, &gates, device)).collect()
    }

    fn of(layers: Vec<usize>, gates: &[&Feedforward], device: &Device) -> Result<Self> {
        let stack = |of: &dyn Fn(&Feedforward) -> Result<Tensor>| {
            let each = gates.iter().map(|gate| of(gate)).collect::<Result<Vec<_>>>()?;
            Tensor::stack(&each, 0)?.contiguous()?.to_device(device)
        };
        let f32_of = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let projection = stack(&|gate| {
            let own = gate.projection()?;
            let rows = own.dim(0)?;
            own.pad_with_zeros(0, 0, rows.next_multiple_of(WHOLE) - rows)
        })?;
        let bias = stack(&|gate| f32_of(gate.hidden.as_ref().map_or(&gate.bias, |(_, bias)| bias)))?;
        let has_two = gates[0].hidden.is_some();
        let last = has_two.then(|| Ok::<_, candle_core::Error>((stack(&|gate| f32_of(&gate.weight))?, stack(&|gate| f32_of(&gate.bias))?)));
        Ok(Self { layers, projection, bias, last: last.transpose()? })
    }

    /// Heads that it decides on.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "of builds with a GPU"))]
    pub(crate) fn kv_heads(&self) -> Result<usize> {
        self.last.as_ref().map_or(&self.bias, |(_, bias)| bias).dim(1)
    }
}
