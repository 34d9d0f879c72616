//! Memory that layers use one after the other.

use candle_core::{DType, Device, Result, Tensor};
use sparse_attn::backend::cuda::uninitialised;

/// Where kernels put numbers that nobody needs any more when the next ones are put there.
#[derive(Debug, Default)]
pub(crate) struct Place {
    kept: Option<Tensor>,
    keeps: bool,
}

impl Place {
    /// Whether what is taken from now on stays for the next time.
    pub(crate) fn keep(&mut self, keeps: bool) {
        self.keeps = keeps;
        if !keeps {
            self.kept = None;
        }
    }

    /// Memory for this many numbers, of which each is to be written before it is read.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(super) fn take(&mut self, [rows, columns]: [usize; 2], dtype: DType, device: &Device) -> Result<Tensor> {
        let count = rows * columns;
        let kept = self.kept.take().filter(|kept| kept.dtype() == dtype && kept.elem_count() >= count);
        let place = kept.map_or_else(|| uninitialised(count, dtype, device), Ok)?;
        if self.keeps {
            self.kept = Some(place.clone());
        }
        if place.elem_count() == count { place.reshape((rows, columns)) } else { place.narrow(0, 0, count)?.reshape((rows, columns)) }
    }
}
