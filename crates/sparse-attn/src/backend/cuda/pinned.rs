//! Memory of the host that kernels reach by themselves.

use super::Kernels;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, ValidAsZeroBits, result};
use candle_core::{Device, Result};
use std::sync::Arc;

/// Page-locked numbers: the host and kernels of the device's stream read and write them at the same address.
#[derive(Debug)]
pub struct Pinned<T> {
    first: *mut T,
    len: usize,
    stream: Arc<CudaStream>,
}

// SAFETY: it is plain memory that this owns.
unsafe impl<T: Send> Send for Pinned<T> {}
// SAFETY: shared, it is only read.
unsafe impl<T: Sync> Sync for Pinned<T> {}

impl<T: ValidAsZeroBits> Pinned<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// If the host cannot lock that much memory, or `device` is no CUDA device.
    pub fn zeros(device: &Device, len: usize) -> Result<Self> {
        Self::of_stream(Kernels::of(device)?.stream(), len)
    }

    /// The same for kernels of `stream`.
    pub(super) fn of_stream(stream: &Arc<CudaStream>, len: usize) -> Result<Self> {
        stream.context().bind_to_thread().w()?;
        // SAFETY: the context is this thread's; what is returned has room for as many bytes, and zeros are numbers.
        let first = unsafe {
            let first = result::malloc_host(len * size_of::<T>(), 0).w()?.cast::<T>();
            first.write_bytes(0, len);
            first
        };
        Ok(Self { first, len, stream: stream.clone() })
    }

    /// Where kernels find them.
    pub fn address(&self) -> u64 {
        self.first as u64
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The numbers. No kernel may be writing them.
    pub fn numbers(&self) -> &[T] {
        // SAFETY: `len` numbers, which were written at first.
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }

    /// The numbers, to be changed. No kernel may be at work on them.
    pub fn numbers_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and of memory that is this one's alone on the host.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // Kernels may still use it. Where the device fails there is nobody to tell.
        if self.stream.synchronize().is_ok() && self.stream.context().bind_to_thread().is_ok() {
            // SAFETY: it came from `malloc_host`, and nothing uses it any more.
            let _ = unsafe { result::free_host(self.first.cast()) };
        }
    }
}
