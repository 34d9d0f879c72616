//! Memory that layers fill, each a part of it.

use candle_core::{DType, Device, Result, Tensor};
use sparse_attn::backend::cuda::{address, uninitialised};
use std::sync::Arc;

/// Bytes of all parts from which on the outcome itself lies there. Of fewer a copy does, which no cache keeps, and what is read at once stays where it
/// was for the layer before: that is faster up to about here (H100; 67 MiB of SmolLM2's prompts 0.5 %, 84 of Qwen2.5-0.5B's slower by as much).
const ALONE_BYTES: usize = 72 << 20;

/// A part that is to be filled.
pub(super) enum Part {
    /// By a copy, to this address.
    Copy(u64),
    /// By the outcome itself.
    Outcome(Tensor),
}

/// Where matrices of bf16 are put that are needed together later on, one for each layer.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    /// Memory for all of them.
    memory: Option<Tensor>,
    /// Those that there are, `[count, rows, columns]`, which are in it, and where: every layer of a prompt asks.
    all: Option<(Arc<Tensor>, u64)>,
    /// Which of how many is next; none: what comes is not needed.
    part: Option<[usize; 2]>,
}

impl Parts {
    /// Begins anew, in the same memory unless somebody still holds what is there.
    pub(crate) fn clear(&mut self) {
        if self.all.take().is_some_and(|(all, _)| Arc::strong_count(&all) > 1) {
            self.memory = None;
        }
    }

    /// Has what comes next be part `index` of `count`.
    pub(crate) fn expect(&mut self, part: [usize; 2]) {
        self.part = Some(part);
    }

    /// Those that there are, `[count, rows, columns]`.
    pub(crate) fn all(&self) -> Option<Arc<Tensor>> {
        self.all.as_ref().map(|(all, _)| all.clone())
    }

    /// Where the next one goes; `None`: it is not needed.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(super) fn take(&mut self, [rows, columns]: [usize; 2], device: &Device) -> Result<Option<Part>> {
        let Some([index, count]) = self.part else { return Ok(None) };
        let shape = [count, rows, columns];
        if self.all.as_ref().is_some_and(|(all, _)| all.dims() != shape) {
            self.clear();
        }
        let (all, first) = match &self.all {
            Some(all) => all,
            None => {
                let numbers = count * rows * columns;
                let kept = self.memory.take().filter(|memory| memory.elem_count() >= numbers);
                let memory = kept.map_or_else(|| uninitialised(numbers, DType::BF16, device), Ok)?;
                let (all, first) = (memory.narrow(0, 0, numbers)?.reshape(&shape)?, address(&memory)?);
                self.memory = Some(memory);
                self.all.insert((Arc::new(all), first))
            }
        };
        let bytes = rows * columns * DType::BF16.size_in_bytes();
        Ok(Some(match count * bytes {
            ALONE_BYTES.. => Part::Outcome(all.narrow(0, index, 1)?.squeeze(0)?),
            _ => Part::Copy(first + (index * bytes) as u64),
        }))
    }
}
