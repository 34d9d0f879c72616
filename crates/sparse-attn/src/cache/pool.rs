//! Pages of rows (keys, values or block summaries) in tensors that backends write in place.

use super::{GROUP, KvDtype, PAGE_SIZE, hadamard};
use crate::backend::cuda;
use crate::parallel;
use candle_core::{DType, Device, Result, Shape, Tensor};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use std::borrow::Cow;

/// Slots whose keys lie side by side, so that one vector instruction scores all of them.
pub const LANES: usize = 16;

/// Half a tile: the fewest neighbouring slots that are read at once.
pub const OCTET: usize = LANES / 2;

/// Rows that a thread encodes at a time.
const ROWS_AT_ONCE: usize = 32;

/// How the rows of a page lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Tiles of [`LANES`] slots, dimension by dimension: `[pages, PAGE_SIZE / LANES, width, LANES]`. For dot products
    /// of many rows with one vector; any [`LANES`] slots of a page are contiguous.
    Tiles,
    /// Row after row: `[pages, PAGE_SIZE, width]`. For weighted sums of rows.
    Rows,
}

impl Order {
    /// Where a slot's numbers lie in rows of `width`: the first one, and the distance to the next.
    pub(crate) fn place(self, slot: u32, width: usize) -> (usize, usize) {
        let slot = slot as usize;
        match self {
            Self::Tiles => (slot / LANES * LANES * width + slot % LANES, LANES),
            Self::Rows => (slot * width, 1),
        }
    }
}

/// Pages of [`PAGE_SIZE`] rows.
#[derive(Debug, Clone)]
pub struct Pool {
    dtype: KvDtype,
    order: Order,
    width: usize,
    transformed: bool,
    values: Tensor,
    /// Of [`KvDtype::Q8_0`]: as `values`, with a scale for each group in the place of a dimension; f16.
    scales: Option<Tensor>,
}

impl Pool {
    /// `pages` pages of rows of `width` numbers. `order` is that on the host; kernels elsewhere read rows.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn new(dtype: KvDtype, order: Order, width: usize, pages: usize, device: &Device) -> Result<Self> {
        let order = if device.is_cpu() { order } else { Order::Rows };
        let pages_of = |width: usize, dtype: DType| match order {
            Order::Tiles => zeros((pages, PAGE_SIZE / LANES, width, LANES), dtype, device),
            Order::Rows => zeros((pages, PAGE_SIZE, width), dtype, device),
        };
        let scales = dtype.scales(width);
        let scales = (scales > 0).then(|| pages_of(scales, DType::F16)).transpose()?;
        Ok(Self { dtype, order, width, transformed: false, values: pages_of(width, dtype.tensor_dtype())?, scales })
    }

    /// [`Pool::new`] for keys: those in 8 bits are stored as their Hadamard transform, by groups of [`GROUP`] dimensions.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn of_keys(dtype: KvDtype, width: usize, pages: usize, device: &Device) -> Result<Self> {
        Ok(Self { transformed: dtype == KvDtype::Q8_0, ..Self::new(dtype, Order::Tiles, width, pages, device)? })
    }

    /// How rows are stored.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// How the rows of a page lie.
    pub fn order(&self) -> Order {
        self.order
    }

    /// Numbers per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Whether rows are stored as their Hadamard transform: what they are multiplied with must be transformed, too.
    pub fn is_transformed(&self) -> bool {
        self.transformed
    }

    /// Pages there are.
    pub fn pages(&self) -> usize {
        self.values.dims()[0]
    }

    /// The numbers, or the integers of [`KvDtype::Q8_0`] in two's complement.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// The scales of [`KvDtype::Q8_0`].
    pub fn scales(&self) -> Option<&Tensor> {
        self.scales.as_ref()
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        let of = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        of(&self.values) + self.scales.as_ref().map_or(0, of)
    }

    /// Bytes of `pages` pages.
    pub fn page_bytes(dtype: KvDtype, width: usize, pages: usize) -> usize {
        pages * PAGE_SIZE * dtype.row_bytes(width)
    }

    /// Pools like these on a GPU, with so many pages each, side by side in one allocation: anything may be in them, and kernels read no slot that
    /// is not written. All have rows of one width, stored alike.
    ///
    /// # Errors
    /// If the device has no memory for them.
    pub(super) fn side_by_side(like: &[(&Self, usize)]) -> Result<Vec<Self>> {
        let Some(((first, _), total)) = like.first().zip(Some(like.iter().map(|(_, pages)| pages).sum::<usize>())) else {
            return Ok(Vec::new());
        };
        let all = |tensor: &Tensor| {
            let (_, rows, width) = tensor.dims3()?;
            let (shape, dtype, device) = ((total, rows, width), tensor.dtype(), tensor.device());
            if device.is_cuda() { cuda::uninitialised(shape, dtype, device) } else { Tensor::zeros(shape, dtype, device) }
        };
        let (values, scales) = (all(&first.values)?, first.scales.as_ref().map(all).transpose()?);
        let mut place = 0;
        let own = |(pool, pages): &(&Self, usize)| {
            let part = |tensor: &Tensor| tensor.narrow(0, place, *pages);
            let new = Self { values: part(&values)?, scales: scales.as_ref().map(part).transpose()?, ..**pool };
            place += pages;
            Ok(new)
        };
        like.iter().map(own).collect()
    }

    /// Whether [`Pool::side_by_side`] takes both.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (self.dtype, self.width) == (other.dtype, other.width)
    }

    /// The same rows with room for `pages` pages.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn grown(&self, pages: usize) -> Result<Self> {
        let larger = self.empty(pages)?;
        larger.take_over(self)?;
        Ok(larger)
    }

    /// Copies the rows of another pool, which has no more pages and shares no memory with this one.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn take_over(&self, other: &Self) -> Result<()> {
        if other.pages() > 0 {
            for (to, from) in self.tensors().zip(other.tensors()) {
                to.slice_set(from, 0, 0)?;
            }
        }
        Ok(())
    }

    /// A pool like this one with room for `pages` pages, of which nothing is written yet.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn empty(&self, pages: usize) -> Result<Self> {
        let device = self.values.device();
        Ok(Self { transformed: self.transformed, ..Self::new(self.dtype, self.order, self.width, pages, device)? })
    }

    /// The same rows on the host, where code for the host reads them: itself, if it is there.
    ///
    /// # Errors
    /// If they cannot be fetched.
    pub fn on_host(&self) -> Result<Cow<'_, Self>> {
        if self.values.device().is_cpu() {
            return Ok(Cow::Borrowed(self));
        }
        // Other devices keep rows as rows; the host scores tiles.
        let tiles = |tensor: &Tensor| -> Result<Tensor> {
            let (pages, _, width) = tensor.dims3()?;
            let tensor = tensor.to_device(&Device::Cpu)?.reshape((pages, PAGE_SIZE / LANES, LANES, width))?;
            tensor.transpose(2, 3)?.contiguous()
        };
        let scales = self.scales.as_ref().map(tiles).transpose()?;
        Ok(Cow::Owned(Self { values: tiles(&self.values)?, scales, order: Order::Tiles, ..*self }))
    }

    /// Only the pages `ids`, in this order.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn selected(&self, ids: &[u32]) -> Result<Self> {
        let are_first = ids.iter().zip(0..).all(|(id, place)| *id == place);
        let index = (!are_first).then(|| Tensor::new(ids, self.values.device())).transpose()?;
        let select = |tensor: &Tensor| match &index {
            Some(index) => tensor.index_select(index, 0),
            None => tensor.narrow(0, 0, ids.len())?.force_contiguous(),
        };
        let scales = self.scales.as_ref().map(select).transpose()?;
        Ok(Self { values: select(&self.values)?, scales, ..*self })
    }

    /// The tensors of the pool: numbers, then scales where the storage has them.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.values).chain(&self.scales)
    }

    /// `rows` `[n, width]` as the pool stores them, one tensor for each of [`Pool::tensors`]: `[n, width]`, `[n, scales]`.
    ///
    /// # Errors
    /// If the rows cannot be read.
    pub fn encode(&self, rows: &Tensor) -> Result<Vec<Tensor>> {
        if self.dtype != KvDtype::Q8_0 {
            return Ok(vec![rows.to_dtype(self.dtype.tensor_dtype())?.contiguous()?]);
        }
        let (count, width) = rows.dims2()?;
        let rows = self.transformed(rows.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
        let encoded = parallel::map(count.div_ceil(ROWS_AT_ONCE), |part| {
            let rows = rows.chunks_exact(width).skip(part * ROWS_AT_ONCE).take(ROWS_AT_ONCE);
            let (mut integers, mut scales) = (Vec::with_capacity(ROWS_AT_ONCE * width), Vec::new());
            for group in rows.flat_map(|row| row.chunks(GROUP)) {
                // NaN is not the maximum of anything, but must not vanish either.
                let largest = group.iter().fold(0f32, |max, x| if x.is_nan() { f32::NAN } else { max.max(x.abs()) });
                let scale = largest / 127.0;
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                integers.extend(group.iter().map(|x| (x * inverse).round() as i8 as u8));
                scales.push(f16::from_f32(scale));
            }
            (integers, scales)
        });
        let (integers, scales): (Vec<Vec<u8>>, Vec<Vec<f16>>) = encoded.into_iter().unzip();
        let (integers, scales) = (integers.concat(), scales.concat());
        let groups = self.dtype.scales(width);
        let device = self.values.device();
        Ok(vec![Tensor::from_vec(integers, (count, width), device)?, Tensor::from_vec(scales, (count, groups), device)?])
    }

    /// The rows of the pages `ids`, one after the other, transformed back: `[ids * PAGE_SIZE, width]`, f32. Plain tensor code.
    ///
    /// # Errors
    /// If the pages cannot be read.
    pub fn read(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::new(ids, self.values.device())?;
        let rows = |tensor: &Tensor| -> Result<Tensor> {
            let pages = tensor.index_select(&ids, 0)?.to_dtype(DType::F32)?;
            match self.order {
                Order::Tiles => pages.transpose(2, 3)?.flatten_to(2), // [ids * PAGE_SIZE, width]
                Order::Rows => pages.flatten_to(1),
            }
        };
        let values = rows(&self.values)?;
        let Some(scales) = &self.scales else { return Ok(values) };
        let scales = rows(scales)?; // [rows, groups]
        let (count, groups) = scales.dims2()?;
        let scales = scales.unsqueeze(2)?.broadcast_as((count, groups, GROUP))?.flatten_from(1)?.narrow(1, 0, self.width)?;
        let negative = values.ge(128f64)?.to_dtype(DType::F32)?;
        let rows = ((values - (negative * 256f64)?)? * scales)?;
        if self.transformed { hadamard::product(&rows) } else { Ok(rows) }
    }
}

/// Zeros. 16-bit ones come from the allocator as they are on the host, where candle would write each.
fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let bits = || vec![0u16; shape.elem_count()];
    match dtype {
        DType::F16 if device.is_cpu() => Tensor::from_vec(bits().reinterpret_into::<f16>(), shape, device),
        DType::BF16 if device.is_cpu() => Tensor::from_vec(bits().reinterpret_into::<bf16>(), shape, device),
        _ => Tensor::zeros(shape, dtype, device),
    }
}
