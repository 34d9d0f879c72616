//! Points in what a device does.

use super::Kernels;
use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaEvent;

/// The end of all that was in the device's stream when it was set.
#[derive(Debug)]
pub(crate) struct Mark(CudaEvent);

impl Mark {
    /// Here.
    pub(super) fn set(kernels: &Kernels) -> Result<Self> {
        kernels.stream().record_event(None).w().map(Self)
    }

    /// Waits until the device gets there.
    ///
    /// # Errors
    /// If it fails before.
    pub(crate) fn wait(&self) -> Result<()> {
        self.0.synchronize().w()
    }
}
