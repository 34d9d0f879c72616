use super::rows::{affine, dot, numbers, rms_norm, times};
use crate::parallel;
use candle_core::{Device, Result, Tensor, bail};

/// The gate of Fast KVzip (arXiv:2601.17668), as published: a small query and key of the attention input, which compete with
/// learnt keys, the sinks.
///
/// With `q = norm(W_q x + b_q)` and `k = norm(W_k x)` of `rank` numbers, `l = q . k / sqrt(rank) + b` and `z_s = q . sink_s / sqrt(rank)`, the
/// score is the mean over the group of `1 / (1 + sum_s exp(z_s - l))`, 0 to 1. f32.
#[derive(Debug, Clone)]
pub struct SinkGate {
    /// `[kv_heads * group_size * rank, hidden_size]`
    pub q_weight: Tensor,
    /// `[kv_heads * group_size * rank]`
    pub q_bias: Tensor,
    /// `[kv_heads * rank, hidden_size]`
    pub k_weight: Tensor,
    /// `[rank]`
    pub q_norm: Tensor,
    /// `[rank]`
    pub k_norm: Tensor,
    /// `[kv_heads, 1, sinks, rank]`
    pub k_base: Tensor,
    /// `[kv_heads, 1, group_size]`
    pub b: Tensor,
}

impl SinkGate {
    /// `x` `[tokens, hidden_size]` -> `[tokens, kv_heads]`
    ///
    /// # Errors
    /// If the widths differ.
    pub fn score(&self, x: &Tensor) -> Result<Tensor> {
        let (kv_heads, _, sinks, rank) = self.k_base.dims4()?;
        let group_size = self.b.dim(2)?;
        let q = numbers(&affine(x, &self.q_weight, &numbers(&self.q_bias)?)?)?;
        let k = numbers(&times(x, &self.k_weight)?)?;
        let (q_norm, k_norm) = (numbers(&self.q_norm)?, numbers(&self.k_norm)?);
        let (base, b) = (numbers(&self.k_base)?, numbers(&self.b)?);
        let scale = 1.0 / (rank as f32).sqrt();
        let scores = parallel::map(x.dim(0)? * kv_heads, |index| {
            let head = index % kv_heads;
            let mut k = k[index * rank..][..rank].to_vec();
            rms_norm(&mut k, &k_norm);
            let of_member = |member: usize| {
                let mut q = q[(index * group_size + member) * rank..][..rank].to_vec();
                rms_norm(&mut q, &q_norm);
                let own = dot(&q, &k) * scale + b[head * group_size + member];
                let sinks = base[head * sinks * rank..][..sinks * rank].chunks_exact(rank);
                1.0 / (1.0 + sinks.map(|sink| (dot(&q, sink) * scale - own).exp()).sum::<f32>())
            };
            (0..group_size).map(of_member).sum::<f32>() / group_size as f32
        });
        Tensor::from_vec(scores, (x.dim(0)?, kv_heads), &Device::Cpu)
    }

    /// `[kv_heads, hidden_size]`
    pub(super) fn shape(&self) -> Result<[usize; 2]> {
        let (kv_heads, one, sinks, rank) = self.k_base.dims4()?;
        let ((_, also_one, group_size), (q_rows, hidden_size)) = (self.b.dims3()?, self.q_weight.dims2()?);
        let shapes = [
            ("q_proj.weight", self.q_weight.dims(), vec![kv_heads * group_size * rank, hidden_size]),
            ("q_proj.bias", self.q_bias.dims(), vec![q_rows]),
            ("k_proj.weight", self.k_weight.dims(), vec![kv_heads * rank, hidden_size]),
            ("q_norm.weight", self.q_norm.dims(), vec![rank]),
            ("k_norm.weight", self.k_norm.dims(), vec![rank]),
            ("k_base", self.k_base.dims(), vec![kv_heads, 1, sinks, rank]),
            ("b", self.b.dims(), vec![kv_heads, 1, group_size]),
        ];
        for (name, got, want) in shapes {
            if got != want {
                bail!("{name} is {got:?}, not {want:?} as k_base {:?} and b {:?} ask for", self.k_base.dims(), self.b.dims());
            }
        }
        if one * also_one * sinks * rank * group_size == 0 {
            bail!("k_base {:?} or b {:?} is empty", self.k_base.dims(), self.b.dims());
        }
        Ok([kv_heads, hidden_size])
    }
}
