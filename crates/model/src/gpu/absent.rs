//! What stands for a GPU in a build without one: nothing gets here, since no tensor can be on it.

use super::DecoderParts;
use crate::arch::TokenStep;
use candle_core::quantized::GgmlDType;
use candle_core::{Device, Result, Tensor, bail};
use sparse_attn::{KvCache, RoutedAttention};

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

    pub(crate) fn rows(&self, _ids: &Tensor) -> Result<Tensor> {
        match *self {}
    }
}

/// No step runs as a whole on the host.
pub(crate) fn record(_parts: &DecoderParts<'_>, _attention: &RoutedAttention, _cache: &KvCache) -> Result<Option<Box<dyn TokenStep>>> {
    Ok(None)
}
