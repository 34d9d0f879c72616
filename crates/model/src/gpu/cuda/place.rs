//! Memory that layers use one after the other.

use candle_core::{DType, Device, Result, Tensor};
use sparse_attn::backend::cuda::{address, uninitialised};

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
        place.narrow(0, 0, count)?.reshape((rows, columns))
    }
}

/// Where matrices of bf16 are put that are needed together later on, one for each layer.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    all: Option<Tensor>,
    /// Memory for all of them, where somebody had some.
    given: Option<Tensor>,
    /// Which of how many is next; none: what comes is not needed.
    part: Option<[usize; 2]>,
}

impl Parts {
    /// Some that go to `given`, where there is memory already: as many numbers of bf16 as they have.
    pub(crate) fn new(given: Option<Tensor>) -> Self {
        Self { given, ..Self::default() }
    }

    /// Has what comes next be part `index` of `count`.
    pub(crate) fn expect(&mut self, part: [usize; 2]) {
        self.part = Some(part);
    }

    /// Those that there are, `[count, rows, columns]`.
    pub(crate) fn into_all(self) -> Option<Tensor> {
        self.all
    }

    /// Where the next one goes; 0: it is not needed.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(super) fn take(&mut self, [rows, columns]: [usize; 2], device: &Device) -> Result<u64> {
        let Some([index, count]) = self.part else { return Ok(0) };
        let shape = [count, rows, columns];
        let all = match (self.all.take().filter(|all| all.dims() == shape), self.given.take()) {
            (Some(all), _) => all,
            (None, Some(place)) => place.reshape(&shape)?,
            (None, None) => uninitialised(&shape, DType::BF16, device)?,
        };
        let first = address(&all)?;
        self.all = Some(all);
        Ok(first + (index * rows * columns * DType::BF16.size_in_bytes()) as u64)
    }
}
