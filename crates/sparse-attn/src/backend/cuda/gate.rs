//! Gates of token routers on the device, and the verdicts by their scores.

use super::params::{DecideParams, GateParams, ProjectedParams, TellParams, ToldLayer, VerdictParams, WaitingLayer};
use super::{Kernels, Mark, Pinned, Spread, address, by_tokens, uninitialised};
use crate::cache::{OCTET, PAGE_SIZE, Step, VerdictMasks};
use crate::token_router::{GateStack, Projected, Scored, Scores};
use candle_core::{DType, Device, Result, Tensor, bail};

/// Tokens of a thread block, rows of a tile, most tiles that a thread block takes, and its threads.
const TOKENS: usize = 16;
const ROWS: usize = 8;
const TILES: usize = 4;
pub(super) const THREADS: usize = 512;

/// Octets of positions that a thread block decides on at once by a gate of one layer.
const OCTETS_AT_ONCE: usize = 32;

/// Layers whose verdicts are made, or brought to the host, by a launch.
const TOLD: usize = 32;

/// A verdict that the device is to make: in `masks` `[kv_heads, octets]` it notes which tokens of `step` a gate keeps, those before position
/// `sinks` anyway.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Verdict<'a> {
    pub(crate) scored: &'a Scored,
    pub(crate) step: Step,
    pub(crate) sinks: usize,
    pub(crate) masks: &'a Tensor,
}

/// Verdicts that the host is to learn: the octets of each head in `masks` go to `noted`, from a place on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Told<'a> {
    pub(crate) masks: VerdictMasks,
    pub(crate) noted: (&'a Pinned<u8>, usize),
}

/// A layer of a gate, ready to run: by [`THREADS`] threads a block.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) params: GateParams,
    /// Whether the input is bf16, not f32.
    pub(super) is_rounded: bool,
    /// Thread blocks.
    pub(super) grid: [usize; 2],
    tiles: usize,
    _x: Tensor, // what `params` leads to
}

/// `x weight' + bias` of a gate, `[tokens, columns]` f32 or bf16 -> `[tokens, rows]` f32, each sum from its token alone; of a hidden layer the
/// GELU of it. All on one GPU.
///
/// # Errors
/// If a shape does not fit, or the device is out of memory.
pub fn gate_layer(x: &Tensor, weight: &Tensor, bias: &Tensor, is_hidden: bool) -> Result<Tensor> {
    let out = uninitialised((x.dim(0)?, weight.dim(0)?), DType::F32, x.device())?;
    let params = GateParams { out: address(&out)?, is_hidden: i32::from(is_hidden), ..GateParams::default() };
    let layer = Layer::new(params, x, weight, bias)?;
    layer.launch(&*Kernels::of(x.device())?)?;
    Ok(out)
}

impl Layer {
    /// A layer, of whose sums becomes what `params` says.
    fn new(params: GateParams, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let ((tokens, columns), (rows, width)) = (x.dims2()?, weight.dims2()?);
        if columns != width || bias.dims() != [rows] {
            bail!("gate: made for a width of {width}, got {columns}; {rows} rows, a bias {:?}", bias.dims());
        }
        if !columns.is_multiple_of(4) {
            bail!("gate: a width of {columns}, the kernel reads four numbers at a time");
        }
        let is_rounded = x.dtype() == DType::BF16 && columns.is_multiple_of(8);
        let x = x.to_dtype(if is_rounded { DType::BF16 } else { DType::F32 })?.contiguous()?;
        let params = GateParams {
            x: address(&x)?,
            weight: address(weight)?,
            bias: address(bias)?,
            tokens: tokens as i32,
            rows: rows as i32,
            columns: columns as i32,
            ..params
        };
        let start = params.start as usize;
        let tiles = if rows > ROWS && params.masks == 0 { TILES } else { 1 };
        let of_tokens = (start + tokens).div_ceil(TOKENS) - start / TOKENS;
        Ok(Self { params, is_rounded, grid: [of_tokens, rows.div_ceil(tiles * ROWS)], tiles, _x: x })
    }

    /// The last layer of a gate, which makes the verdict; `None`: the scores are there.
    pub(super) fn of_verdict(verdict: Verdict<'_>) -> Result<Option<Self>> {
        let (places, start, sinks) = (verdict.places()?, verdict.step.start as i32, verdict.sinks as i32);
        let Scores::Asked { x, weight, bias } = &verdict.scored.scores else { return Ok(None) };
        let params =
            GateParams { masks: places.masks, start, max_pages: places.max_pages, sinks, tau: verdict.scored.tau, ..GateParams::default() };
        Self::new(params, x, weight, bias).map(Some)
    }

    fn launch(&self, kernels: &Kernels) -> Result<()> {
        let [x, y] = self.grid;
        let name = format!("gate_{}_{}", if self.is_rounded { "bf16" } else { "f32" }, self.tiles);
        // SAFETY: the tensors have the shapes of the parameters, and live until the stream frees them.
        unsafe { kernels.launch_following(&name, Spread::new([x, y, 1], THREADS), &self.params) }
    }
}

/// Where a verdict is noted, as kernels take it.
struct Places {
    masks: u64,
    max_pages: i32,
}

impl Verdict<'_> {
    fn places(&self) -> Result<Places> {
        let Self { scored, step, masks, .. } = *self;
        let (kv_heads, octets) = masks.dims2()?;
        let dims = scored.scores.dims()?;
        if dims != [step.len, kv_heads] || step.end() > octets * OCTET {
            bail!("gate: scores {dims:?} of {} tokens from {}, with room for {} of {kv_heads} heads", step.len, step.start, octets * OCTET);
        }
        Ok(Places { masks: address(masks)?, max_pages: (octets * OCTET / PAGE_SIZE) as i32 })
    }
}

/// A verdict by products that are there, and the thread blocks that make it; `None`: they are not.
pub(super) fn of_projected(verdict: Verdict<'_>) -> Result<Option<(ProjectedParams, usize)>> {
    let Scores::Projected(Projected { sums, bias, last }) = &verdict.scored.scores else { return Ok(None) };
    let (places, step, rows) = (verdict.places()?, verdict.step, bias.dims1()?);
    let kv_heads = last.as_ref().map_or(rows, |(_, bias)| bias.elem_count());
    let is_odd = last.as_ref().is_some_and(|(weight, _)| weight.dims() != [kv_heads, rows]);
    if sums.dims() != [step.len, rows] || is_odd {
        bail!(
            "gate: products {:?} of {} tokens for a layer of {rows}, then one {:?}",
            sums.dims(),
            step.len,
            last.as_ref().map(|(weight, _)| weight.dims())
        );
    }
    let (sums, at, apart) = by_tokens(sums)?;
    if sums.dtype() != DType::F32 {
        bail!("gate: products in {:?}", sums.dtype());
    }
    let params = ProjectedParams {
        sums: at,
        bias: address(bias)?,
        weight: last.as_ref().map_or(Ok(0), |(weight, _)| address(weight))?,
        last_bias: last.as_ref().map_or(Ok(0), |(_, bias)| address(bias))?,
        masks: places.masks,
        apart: apart as i32,
        start: step.start as i32,
        tokens: step.len as i32,
        rows: rows as i32,
        kv_heads: kv_heads as i32,
        max_pages: places.max_pages,
        sinks: verdict.sinks as i32,
        tau: verdict.scored.tau,
    };
    let octets = step.octets().len();
    Ok(Some((params, if last.is_some() { octets } else { octets.div_ceil(OCTETS_AT_ONCE) })))
}

/// Makes the verdicts on `step` of `layers`, by their number in a gate's `stack`, in their masks: by the products of their inputs with its
/// [`GateStack::projection`], `[layers, tokens, rows]`, from the token `first` on.
///
/// # Errors
/// If a shape does not fit, or the device fails.
pub(crate) fn decide(
    stack: &GateStack,
    (sums, first): (&Tensor, usize),
    step: Step,
    (sinks, tau): (usize, f32),
    layers: &[(usize, VerdictMasks)],
) -> Result<()> {
    let ((count, rows), kv_heads) = (stack.bias.dims2()?, stack.kv_heads()?);
    let apart = stack.projection.dim(1)?;
    let (layers_there, tokens, columns) = sums.dims3()?;
    let is_odd = [layers_there, columns] != [count, apart] || first + step.len > tokens || rows > apart;
    if is_odd || sums.dtype() != DType::F32 {
        let (dims, end) = (sums.dims(), first + step.len);
        bail!("gate: products {dims:?} {:?}, for the tokens {first}..{end} of {count} layers of {rows} rows", sums.dtype());
    }
    let first = ProjectedParams {
        sums: address(sums)? + (first * apart * size_of::<f32>()) as u64,
        bias: address(&stack.bias)?,
        weight: stack.last.as_ref().map_or(Ok(0), |(weight, _)| address(weight))?,
        last_bias: stack.last.as_ref().map_or(Ok(0), |(_, bias)| address(bias))?,
        masks: 0,
        apart: apart as i32,
        start: step.start as i32,
        tokens: step.len as i32,
        rows: rows as i32,
        kv_heads: kv_heads as i32,
        max_pages: 0,
        sinks: sinks as i32,
        tau,
    };
    let (octets, has_two) = (step.octets().len(), stack.last.is_some());
    let (name, blocks) = if has_two { ("decide_layers_2", octets) } else { ("decide_layers_1", octets.div_ceil(OCTETS_AT_ONCE)) };
    for layers in layers.chunks(TOLD) {
        let mut params = DecideParams {
            first,
            sums_apart: (tokens * apart) as i64,
            bias_apart: rows as i32,
            weight_apart: if has_two { (kv_heads * rows) as i32 } else { 0 },
            last_bias_apart: if has_two { kv_heads as i32 } else { 0 },
            ..DecideParams::default()
        };
        for (to, (layer, VerdictMasks { at, kv_heads: heads, octets: room })) in params.layers.iter_mut().zip(layers) {
            if *layer >= count || *heads != kv_heads || step.end() > room * OCTET {
                let fits = room * OCTET;
                bail!("gate: layer {layer} of {count}, {heads} heads of {kv_heads}, {} tokens where there is room for {fits}", step.end());
            }
            *to = WaitingLayer { masks: *at, layer: *layer as i32, max_pages: (room * OCTET / PAGE_SIZE) as i32 };
        }
        let spread = Spread::new([blocks, layers.len(), 1], 256);
        // SAFETY: the tensors have these shapes, and live until the stream frees them.
        unsafe { Kernels::of(sums.device())?.launch_following(name, spread, &params) }?;
    }
    Ok(())
}

/// Makes a verdict.
///
/// # Errors
/// If a shape does not fit, or the device fails.
pub(crate) fn note_verdicts(verdict: Verdict<'_>) -> Result<()> {
    let kernels = Kernels::of(verdict.masks.device())?;
    if let Some(layer) = Layer::of_verdict(verdict)? {
        return layer.launch(&kernels);
    }
    let (Places { masks, max_pages }, step) = (verdict.places()?, verdict.step);
    let scores = verdict.scored.scores.made()?.contiguous()?;
    let kv_heads = scores.dim(1)?;
    let params = VerdictParams {
        scores: address(&scores)?,
        masks,
        start: step.start as i32,
        tokens: step.len as i32,
        kv_heads: kv_heads as i32,
        max_pages,
        sinks: verdict.sinks as i32,
        tau: verdict.scored.tau,
    };
    let spread = Spread::new([step.octets().len().div_ceil(256), kv_heads, 1], 256);
    // SAFETY: the tensors have these shapes, and live until the stream frees them.
    unsafe { kernels.launch("note_verdicts", spread, &params) }
}

/// Brings the verdicts on `step` to the host, which has them once the device got to the mark. In one go: from kernels that decide, each octet
/// would be a transfer of its own.
///
/// # Errors
/// If there is no room for them, or the device fails.
pub(crate) fn tell(layers: &[Told<'_>], step: Step, device: &Device) -> Result<Mark> {
    let (kernels, octets) = (Kernels::of(device)?, step.octets());
    for layers in layers.chunks(TOLD) {
        let mut params = TellParams { first: octets.start as i32, octets: octets.len() as i32, ..TellParams::default() };
        let mut most = 0;
        for (to, Told { masks, noted: (noted, first) }) in params.layers.iter_mut().zip(layers) {
            let VerdictMasks { at, kv_heads, octets: room } = *masks;
            if octets.end > room || first + kv_heads * octets.len() > noted.len() {
                bail!("gate: verdicts on {octets:?} of {kv_heads} heads, with room for {room} and, on the host, {}", noted.len() - first);
            }
            let max_pages = (room * OCTET / PAGE_SIZE) as i32;
            *to = ToldLayer { masks: at, told: noted.address() + *first as u64, kv_heads: kv_heads as i32, max_pages };
            most = most.max(kv_heads);
        }
        let spread = Spread::new([octets.len().div_ceil(256), most, layers.len()], 256);
        // SAFETY: the octets are inside the masks and inside the memory of the host, which lives until the device was waited for.
        unsafe { kernels.launch("tell_verdicts", spread, &params) }?;
    }
    Mark::set(&kernels)
}
