//! Memory of the host that kernels reach by themselves.

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::result;
use sparse_attn::backend::cuda::Kernels;
use std::sync::Arc;

/// Page-locked numbers: the host and kernels of the device's stream read and write them at the same address.
#[derive(Debug)]
pub(super) struct Pinned {
    first: *mut u32,
    len: usize,
    kernels: Arc<Kernels>,
}

impl Pinned {
    /// `len` zeros.
    ///
    /// # Errors
    /// If the host cannot lock that much memory.
    pub(super) fn zeros(kernels: &Arc<Kernels>, len: usize) -> Result<Self> {
        kernels.stream().context().bind_to_thread().w()?;
        // SAFETY: the context is this thread's; what is returned has room for as many bytes.
        let first = unsafe {
            let first = result::malloc_host(len * size_of::<u32>(), 0).w()?.cast::<u32>();
            first.write_bytes(0, len);
            first
        };
        Ok(Self { first, len, kernels: kernels.clone() })
    }

    /// Where kernels find them.
    pub(super) fn address(&self) -> u64 {
        self.first as u64
    }

    /// The numbers. No kernel may be writing them.
    pub(super) fn numbers(&mut self) -> &mut [u32] {
        // SAFETY: `len` numbers, which were written at first, of memory that is this one's alone on the host.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let stream = self.kernels.stream();
        // Kernels may still use it. Where the device fails there is nobody to tell.
        if stream.synchronize().is_ok() && stream.context().bind_to_thread().is_ok() {
            // SAFETY: it came from `malloc_host`, and nothing uses it any more.
            let _ = unsafe { result::free_host(self.first.cast()) };
        }
    }
}
