//! The model on an NVIDIA GPU: matrices that kernels/cuda multiplies, and a decode step recorded as a CUDA graph.

mod gated;
mod gemm;
mod graph;
mod matrix;
mod norm;
mod pack;
mod params;
mod rotated;
mod step;

pub(crate) use gated::gated;
pub use matrix::DeviceMatrix;
pub(crate) use matrix::multiply_unpacked;
pub(crate) use norm::add_norm;
pub(crate) use rotated::{angles, rotated};
pub(crate) use step::record;

use candle_core::{Result, Tensor};
use sparse_attn::backend::cuda::Kernels;

/// What a contiguous tensor of f32 holds, once the device has made it.
///
/// # Errors
/// If it is no such tensor.
pub(crate) fn fetch(tensor: &Tensor) -> Result<Vec<f32>> {
    Kernels::of(tensor.device())?.fetch(tensor)
}
