//! Weights of a layer in 16 bits, for products with many tokens.

use super::super::Group;
use super::DeviceMatrix;
use super::gemm::{Arithmetic, Gemm};
use super::matrix::OF_A_THREAD;
use super::pack::Format;
use super::params::{Matrix, UnpackParams};
use candle_core::{DType, Result, Tensor, bail};
use sparse_attn::Place;
use sparse_attn::backend::cuda::{Kernels, Spread, address, uninitialised};

/// Matrices that are unpacked by a kernel, and bytes of those that are unpacked before they are needed: more would be much beside the
/// activations, and take so long that a launch less is nothing.
const UNPACKED: usize = 8;
const UNPACKED_BYTES: usize = 64 << 20;

/// Rows of weights whose products lie at multiples of what kernels store at once.
const ROWS_AT_ONCE: usize = 8;

/// Threads of a block.
pub(super) const THREADS: usize = 256;

/// Weights of groups in 16 bits, and the memory that they lie in: the next layer's are put there, too.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    groups: Vec<Tensor>,
    memory: Option<Tensor>,
    /// What is still to be launched.
    due: Option<UnpackParams>,
}

impl Unpacked {
    /// Of each group `[rows, columns]`, bf16, where rows beyond its own are of no meaning; once they are unpacked.
    pub(crate) fn groups(&self) -> &[Tensor] {
        &self.groups
    }

    /// Has them unpacked now, unless they are.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn launch(&mut self) -> Result<()> {
        let (Some(params), Some(group)) = (self.take_due(), self.groups.first()) else { return Ok(()) };
        let spread = Spread::new([blocks(&params), 1, 1], THREADS);
        // SAFETY: there is room for the rows of all matrices, which are as wide as they are said to be.
        unsafe { Kernels::of(group.device())?.launch_following("unpack_matrices", spread, &params) }
    }

    /// What unpacks them, for who launches that with something else.
    pub(super) fn take_due(&mut self) -> Option<UnpackParams> {
        self.due.take()
    }
}

/// Thread blocks that unpack.
pub(super) fn blocks(params: &UnpackParams) -> usize {
    params.blocks[..params.count as usize].last().map_or(0, |blocks| *blocks as usize)
}

impl DeviceMatrix {
    /// Makes ready to unpack matrices that are multiplied with so many tokens, each group as one product by [`multiply_unpacked`], to the place of the
    /// `last` ones if there is room: [`Unpacked::launch`] does, or the norm before the product. `None`: they are too large to be there at once, or not
    /// unpacked anyway.
    ///
    /// # Errors
    /// If widths of a group differ, or the device is out of memory.
    pub(crate) fn unpack_groups(groups: &[Group<'_, Self>], tokens: usize, last: Unpacked) -> Result<Option<Unpacked>> {
        let count: usize = groups.iter().map(|group| group.matrices.len() + usize::from(group.beside.is_some())).sum();
        let numbers: usize = groups.iter().map(|group| group.rows() * group.columns()).sum();
        let is_little = count <= UNPACKED && numbers * size_of::<u16>() <= UNPACKED_BYTES;
        if numbers == 0 || !is_little || !groups.iter().all(|group| group.matrices.iter().all(|matrix| matrix.is_unpacked(tokens))) {
            return Ok(None);
        }
        made_ready(groups, last).map(Some)
    }

    /// Whether it is unpacked to be multiplied with so many tokens.
    pub(crate) fn is_unpacked(&self, tokens: usize) -> bool {
        self.rounds(tokens) && self.format() != Format::Bf16
    }

    /// It alone.
    pub(super) fn unpacked(&self) -> Result<Tensor> {
        let mut unpacked = made_ready(&[Group { matrices: vec![self], beside: None, whole: 1 }], Unpacked::default())?;
        unpacked.launch()?;
        Ok(unpacked.groups.remove(0))
    }
}

/// [`DeviceMatrix::unpack_groups`] of any size.
fn made_ready(groups: &[Group<'_, DeviceMatrix>], last: Unpacked) -> Result<Unpacked> {
    let mut unpacked = places(groups, last)?;
    let (mut params, mut blocks) = (UnpackParams::default(), 0);
    for (group, out) in groups.iter().zip(&unpacked.groups) {
        let (mut room, columns) = (out.elem_count(), group.columns());
        let mut to = address(out)?;
        let mut parts = Vec::with_capacity(group.matrices.len() + 1);
        for matrix in &group.matrices {
            parts.push((matrix.params(0, 0), matrix.columns()));
        }
        if let Some(plain) = group.beside {
            parts.push((plain_bf16(plain)?, plain.dim(1)?));
        }
        for (matrix, width) in parts {
            let own = matrix.rows as usize * columns;
            let at = params.count as usize;
            if width != columns || own > room || at == UNPACKED {
                let rows = room / columns;
                bail!("cuda: matrix {at} of {UNPACKED}, {} rows of {width}, where {rows} of {columns} are to be", matrix.rows);
            }
            blocks += own.div_ceil(OF_A_THREAD * THREADS);
            (params.matrices[at], params.columns[at]) = (Matrix { out: to, ..matrix }, columns as i32);
            (params.blocks[at], params.count) = (blocks as i32, at as i32 + 1);
            to += (own * size_of::<u16>()) as u64;
            room -= own;
        }
    }
    unpacked.due = Some(params);
    Ok(unpacked)
}

/// Where groups are unpacked to: all in one allocation, the `last` one's if there is room.
fn places(groups: &[Group<'_, DeviceMatrix>], last: Unpacked) -> Result<Unpacked> {
    let is_place = |(group, place): (&Group<'_, DeviceMatrix>, &Tensor)| place.dims() == [group.rows(), group.columns()];
    if last.groups.len() == groups.len() && groups.iter().zip(&last.groups).all(is_place) {
        return Ok(last);
    }
    let Some(first) = groups.first().and_then(|group| group.matrices.first()) else { return Ok(Unpacked::default()) };
    let numbers = groups.iter().map(|group| group.rows() * group.columns()).sum::<usize>();
    let Unpacked { memory, groups: mut places, .. } = last;
    places.clear();
    let memory = match memory.filter(|memory| memory.elem_count() >= numbers) {
        Some(memory) => memory,
        None => uninitialised(numbers, DType::BF16, first.device())?,
    };
    // The first group at the end: whether a token router has rows in it, the others lie where they did, and their products are recorded.
    let mut at = numbers - groups[0].rows() * groups[0].columns();
    for group in groups {
        let shape = (group.rows(), group.columns());
        places.push(memory.narrow(0, at, shape.0 * shape.1)?.reshape(shape)?);
        at = (at + shape.0 * shape.1) % numbers;
    }
    Ok(Unpacked { groups: places, memory: Some(memory), due: None })
}

/// `x W'` of what was unpacked, `[rows, columns]` and `x` `[tokens, columns]`, bf16: `[tokens, rows]` f32, in `place`, of which a token's numbers from
/// `used` on may be anything.
///
/// # Errors
/// If a width differs, or the device is out of memory.
pub(crate) fn multiply_unpacked(weights: &Tensor, used: usize, x: &Tensor, place: &mut Place) -> Result<Tensor> {
    let rows = weights.dim(0)?;
    let out = place.take((x.dim(0)?, rows), DType::F32, x.device())?;
    // No more than kernels take at once: a whole tile of columns more can be another round of thread blocks.
    let used = weights.narrow(0, 0, used.next_multiple_of(ROWS_AT_ONCE).min(rows))?;
    Gemm::of(x.device())?.multiply_to(&out, false, &used, &x.contiguous()?, Arithmetic::Bf16)?;
    Ok(out)
}

/// A matrix of bf16, as kernels take it.
fn plain_bf16(plain: &Tensor) -> Result<Matrix> {
    if plain.dtype() != DType::BF16 {
        bail!("cuda: {:?} {:?} beside other matrices, it should be bf16", plain.dtype(), plain.dims());
    }
    Ok(Matrix { planes: [address(plain)?, 0, 0, 0], rows: plain.dim(0)? as i32, format: Format::Bf16 as i32, ..Matrix::default() })
}

impl Group<'_, DeviceMatrix> {
    fn rows(&self) -> usize {
        let beside = self.beside.map_or(0, |plain| plain.dims().first().copied().unwrap_or(0));
        (self.matrices.iter().map(|matrix| matrix.height()).sum::<usize>() + beside).next_multiple_of(self.whole)
    }

    fn columns(&self) -> usize {
        self.matrices.first().map_or(0, |matrix| matrix.columns())
    }
}
