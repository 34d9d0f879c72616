//! What stands for a GPU in a build without one: nothing gets here, since no tensor can be on it.

use super::{Along, DecoderParts, Group};
use crate::arch::TokenStep;
use crate::config::Activation;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Result, Tensor, bail};
use sparse_attn::{KvCache, Place, RoutedAttention, Step};
use std::sync::Arc;

/// A matrix that there is none of.
#[derive(Debug)]
pub enum DeviceMatrix {}

impl DeviceMatrix {
    pub(crate) fn from_blocks(_bytes: &[u8], _dtype: GgmlDType, _shape: [usize; 2], _device: &Device) -> Result<Self> {
        bail!("this build has no CUDA: build with --features cuda")
    }

    pub(crate) fn from_tensor(_tensor: &Tensor) -> Result<Self> {
        bail!("this build has no CUDA: build with --features cuda")
    }

    pub(crate) fn multiply_each(matrices: &[&Self], _x: &Tensor) -> Result<Vec<Tensor>> {
        matrices.iter().map(|matrix| match **matrix {}).collect()
    }

    pub(crate) fn unpack_groups(_groups: &[Group<'_, Self>], _tokens: usize, _last: Unpacked) -> Result<Option<Unpacked>> {
        Ok(None)
    }

    pub(crate) fn is_unpacked(&self, _tokens: usize) -> bool {
        match *self {}
    }

    pub(crate) fn rounds(&self, _tokens: usize) -> bool {
        match *self {}
    }

    pub(crate) fn rows(&self, _ids: &Tensor, _factor: f32, _place: &mut Place) -> Result<Tensor> {
        match *self {}
    }
}

/// What nothing is launched by.
#[derive(Debug, Default)]
pub(crate) struct Bundles {}

impl Bundles {
    pub(crate) fn launch(&mut self, _layers: usize, _device: &Device, work: impl FnOnce() -> Result<()>) -> Result<()> {
        work()
    }
}

/// Matrices that no layer has.
#[derive(Debug, Default)]
pub(crate) struct Parts {}

impl Parts {
    pub(crate) fn clear(&mut self) {}

    pub(crate) fn expect(&mut self, _part: [usize; 2]) {}

    pub(crate) fn all(&self) -> Option<Arc<Tensor>> {
        None
    }
}

/// Weights of no layer.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {}

impl Unpacked {
    pub(crate) fn groups(&self) -> &[Tensor] {
        &[]
    }

    pub(crate) fn launch(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Only tensors of a GPU get there.
pub(crate) fn gated(_activation: Activation, _gate: &Tensor, _up: &Tensor, _dtype: DType, _place: &mut Place) -> Result<Tensor> {
    bail!("this build has no CUDA: build with --features cuda")
}

/// Only tensors of a GPU get there.
pub(crate) fn add_norm(
    _x: &Tensor,
    _y: Option<(&Tensor, Option<&Tensor>)>,
    _weight: &Tensor,
    _eps: f32,
    _dtype: DType,
    _place: &mut Place,
    _along: Along<'_>,
) -> Result<Tensor> {
    bail!("this build has no CUDA: build with --features cuda")
}

/// Only steps on a GPU get there.
pub(crate) fn angles(_frequencies: &Tensor, _magnitude: f64, _step: Step) -> Result<[Tensor; 2]> {
    bail!("this build has no CUDA: build with --features cuda")
}

/// Only tensors of a GPU get there.
pub(crate) fn rotated(_q: &Tensor, _k: &Tensor, _angles: [&Tensor; 2], _dtype: DType) -> Result<(Tensor, Tensor)> {
    bail!("this build has no CUDA: build with --features cuda")
}

/// Only tensors of a GPU get there.
pub(crate) fn multiply_unpacked(_weights: &Tensor, _used: usize, _x: &Tensor, _place: &mut Place) -> Result<Tensor> {
    bail!("this build has no CUDA: build with --features cuda")
}

/// Only tensors of a GPU get there.
pub(crate) fn multiply_parts(_weights: &Tensor, _x: &Tensor) -> Result<Tensor> {
    bail!("this build has no CUDA: build with --features cuda")
}

/// Only tensors of a GPU get there.
pub(crate) fn add_product(_weights: &Tensor, _x: &Tensor, _to: &Tensor) -> Result<()> {
    bail!("this build has no CUDA: build with --features cuda")
}

/// Only tensors of a GPU get there.
pub(crate) fn fetch(_tensor: &Tensor, _meanwhile: impl FnOnce() -> Result<()>) -> Result<Vec<f32>> {
    bail!("this build has no CUDA: build with --features cuda")
}

/// No step runs as a whole on the host.
pub(crate) fn record(_parts: &DecoderParts<'_>, _attention: &RoutedAttention, _cache: &KvCache) -> Result<Option<Box<dyn TokenStep>>> {
    Ok(None)
}
