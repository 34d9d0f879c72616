//! What stands for the CUDA backend in a build without it: nothing gets here, since no tensor can be on a GPU.

use super::AttentionBackend;
use crate::cache::{LayerStore, Layout, Pool, Step, Summaries, VerdictMasks};
use crate::select::Selection;
use crate::token_router::{GateStack, Scored};
use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use std::ops::Range;

/// The backend that this build does not have.
#[derive(Debug)]
pub enum Cuda {}

impl Cuda {
    /// # Errors
    /// Always.
    pub fn new(_device: &Device) -> Result<Self> {
        absent()
    }
}

impl AttentionBackend for Cuda {
    fn name(&self) -> &'static str {
        match *self {}
    }

    fn write(&self, _k: &Tensor, _v: &Tensor, _step: Step, _store: &mut LayerStore) -> Result<()> {
        match *self {}
    }

    fn attend(&self, _q: &Tensor, _scale: f32, _store: &LayerStore, _step: Step, _selection: &Selection) -> Result<Tensor> {
        match *self {}
    }
}

pub(crate) fn scatter_rows(_pool: &Pool, _rows: &Tensor, _slots: &[u32]) -> Result<()> {
    absent()
}

pub(crate) fn address(_tensor: &Tensor) -> Result<u64> {
    absent()
}

pub(crate) fn put_numbers(_numbers: &[u32], _to: &Tensor) -> Result<()> {
    absent()
}

/// Memory that no kernel fills: zeros.
pub(crate) fn uninitialised(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::zeros(shape, dtype, device)
}

/// A layer whose tokens would go to new pools.
#[derive(Debug)]
#[expect(dead_code, reason = "of builds with a GPU")]
pub(crate) struct Compacted<'a> {
    pub(crate) store: &'a LayerStore,
    pub(crate) new: [&'a Pool; 2],
    pub(crate) layout: Layout,
    pub(crate) pages: [usize; 2],
}

pub(crate) fn compact(_layers: &[Compacted<'_>], _numbers: &Tensor) -> Result<()> {
    absent()
}

/// Blocks that a device would summarise.
#[derive(Debug)]
#[expect(dead_code, reason = "of builds with a GPU")]
pub(crate) struct Summarised<'a> {
    pub(crate) store: &'a LayerStore,
    pub(crate) summaries: &'a Summaries,
    pub(crate) blocks: Range<usize>,
}

pub(crate) fn summarise(_layers: &[Summarised<'_>]) -> Result<()> {
    absent()
}

pub(crate) fn gate_layer(_x: &Tensor, _weight: &Tensor, _bias: &Tensor, _is_hidden: bool) -> Result<Tensor> {
    absent()
}

/// A verdict that a device would make.
#[derive(Debug, Clone, Copy)]
#[expect(dead_code, reason = "of builds with a GPU")]
pub(crate) struct Verdict<'a> {
    pub(crate) scored: &'a Scored,
    pub(crate) step: Step,
    pub(crate) sinks: usize,
    pub(crate) masks: &'a Tensor,
}

/// Verdicts that the host would learn.
#[derive(Debug, Clone, Copy)]
#[expect(dead_code, reason = "of builds with a GPU")]
pub(crate) struct Told<'a> {
    pub(crate) masks: VerdictMasks,
    pub(crate) noted: (&'a Pinned<u8>, usize),
}

pub(crate) fn tell(_layers: &[Told<'_>], _step: Step, _device: &Device) -> Result<Mark> {
    absent()
}

/// A point that no device gets to.
#[derive(Debug)]
pub(crate) enum Mark {}

impl Mark {
    pub(crate) fn wait(&self) -> Result<()> {
        match *self {}
    }
}

pub(crate) fn decide(
    _stack: &GateStack,
    _sums: (&Tensor, usize),
    _step: Step,
    _by: (usize, f32),
    _layers: &[(usize, VerdictMasks)],
) -> Result<()> {
    absent()
}

pub(crate) fn note_verdicts(_verdict: Verdict<'_>) -> Result<()> {
    absent()
}

/// Memory of the host that no kernel reaches.
#[derive(Debug)]
pub enum Pinned<T> {
    #[doc(hidden)]
    Never(std::convert::Infallible, std::marker::PhantomData<T>),
}

impl<T> Pinned<T> {
    pub(crate) fn zeros(_device: &Device, _len: usize) -> Result<Self> {
        absent()
    }

    pub(crate) fn len(&self) -> usize {
        match *self {
            Self::Never(never, _) => match never {},
        }
    }

    pub(crate) fn numbers(&self) -> &[T] {
        match *self {
            Self::Never(never, _) => match never {},
        }
    }
}

fn absent<T>() -> Result<T> {
    bail!("this build has no CUDA: build with --features cuda")
}
