//! The model on an NVIDIA GPU: matrices that kernels/cuda multiplies, and a decode step recorded as a CUDA graph.

mod gated;
mod gemm;
mod graph;
mod matrix;
mod norm;
mod pack;
mod params;
mod parts;
mod rotated;
mod step;
mod unpack;

pub(crate) use gated::gated;
pub(crate) use graph::Bundles;
pub use matrix::DeviceMatrix;
pub(crate) use matrix::{add_product, multiply_parts};
pub(crate) use norm::add_norm;
pub(crate) use parts::Parts;
pub(crate) use rotated::{angles, rotated};
pub(crate) use step::record;
pub(crate) use unpack::{Unpacked, multiply_unpacked};

use candle_core::{Result, Tensor};
use sparse_attn::backend::cuda::Kernels;

/// What a contiguous tensor of f32 holds, once the device has made it, and what the host does `meanwhile`.
///
/// # Errors
/// If it is no such tensor, or what the host does fails.
pub(crate) fn fetch(tensor: &Tensor, meanwhile: impl FnOnce() -> Result<()>) -> Result<Vec<f32>> {
    Kernels::of(tensor.device())?.fetch(tensor, meanwhile)
}
