use super::fused::add;
use super::{Linear, RmsNorm};
use crate::gpu::{self, Along};
use candle_core::{DType, Result, Tensor};
use sparse_attn::Place;

/// The residual stream of some tokens, `[tokens, hidden_size]` f32: layers read its norm, and add to it.
///
/// What is added last is added when the stream is read next, which on a GPU is one kernel.
#[derive(Debug)]
pub struct Residual<'a> {
    x: Tensor,
    pending: Option<(Tensor, Option<&'a RmsNorm>)>,
}

impl<'a> Residual<'a> {
    /// A stream that begins with `x`, which nobody else may hold: it can change in its place.
    pub fn new(x: Tensor) -> Self {
        Self { x, pending: None }
    }

    /// Adds `y`, or the norm of it.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn add(&mut self, y: Tensor, norm: Option<&'a RmsNorm>) -> Result<()> {
        self.settle()?;
        self.pending = Some((y, norm));
        Ok(())
    }

    /// Adds `linear` of `x`, or the norm of it, by weights that were unpacked, where they were. What cannot be added at once is put in `place` until the
    /// stream is read.
    ///
    /// # Errors
    /// If the widths differ.
    pub(crate) fn add_product(
        &mut self,
        linear: &Linear,
        (unpacked, place): (Option<&Tensor>, &mut Place),
        x: &Tensor,
        norm: Option<&'a RmsNorm>,
    ) -> Result<()> {
        match (unpacked, linear.bias(), norm) {
            (Some(weights), None, None) => {
                self.settle()?;
                gpu::add_product(weights, x, &self.x)
            }
            _ => self.add(linear.forward_by(unpacked, x, place)?, norm),
        }
    }

    /// The norm of the stream, f32, or as products want it: see [`super::Linear::dtype_of_activations`]. On a GPU in `place`, or if it is
    /// rounded where it is kept, with what else its kernel does `along`.
    ///
    /// # Errors
    /// If the widths differ.
    pub(crate) fn norm(&mut self, norm: &RmsNorm, dtype: DType, place: &mut Place, along: Along<'_>) -> Result<Tensor> {
        if self.x.device().is_cuda() {
            let y = self.pending.take();
            let y = y.as_ref().map(|(y, norm)| (y, norm.map(RmsNorm::weight)));
            return gpu::add_norm(&self.x, y, norm.weight(), norm.eps(), dtype, place, along);
        }
        self.settle()?;
        norm.forward(&self.x)
    }

    fn settle(&mut self) -> Result<()> {
        if let Some((y, norm)) = self.pending.take() {
            self.x = add(&self.x, &norm.map_or_else(|| Ok(y.clone()), |norm| norm.forward(&y))?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_stream_is_what_was_added_to_it() -> Result<()> {
        let random = |seed: f32| Tensor::arange(0f32, 24.0, &Device::Cpu)?.affine(seed.into(), -3.0)?.sin()?.reshape((3, 8));
        let norm = RmsNorm::new(Tensor::arange(1f32, 9.0, &Device::Cpu)?, 1e-5);
        let (x, y, z) = (random(0.7)?, random(1.3)?, random(2.9)?);
        let mut stream = Residual::new(x.copy()?);
        assert_eq!(
            stream.norm(&norm, DType::F32, &mut Place::default(), Along::default())?.to_vec2::<f32>()?,
            norm.forward(&x)?.to_vec2::<f32>()?
        );
        stream.add(y.clone(), Some(&norm))?;
        stream.add(z.clone(), None)?;
        let want = norm.forward(&((x + norm.forward(&y)?)? + z)?)?;
        assert_eq!(stream.norm(&norm, DType::F32, &mut Place::default(), Along::default())?.to_vec2::<f32>()?, want.to_vec2::<f32>()?);
        Ok(())
    }
}
