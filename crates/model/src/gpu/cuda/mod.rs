//! The model on an NVIDIA GPU: matrices that kernels/cuda multiplies, and a decode step recorded as a CUDA graph.

mod matrix;
mod pack;
mod params;
mod step;

pub use matrix::DeviceMatrix;
pub(crate) use step::record;
