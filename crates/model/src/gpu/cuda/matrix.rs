//! A matrix on the GPU: multiplied as it is with few tokens, unpacked to 16 bits with many.

use super::gemm::{Arithmetic, Gemm};
use super::pack::{self, Format};
use super::params::{Matrix, ProductParams, QuantizeParams, RoundParams, RowsParams};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor, bail};
use sparse_attn::Place;
use sparse_attn::backend::cuda::{Kernels, Spread, address, uninitialised};
use std::borrow::Cow;
use std::sync::Arc;

/// Tokens up to which blocks are multiplied as they are: more are faster through the tensor cores.
const FEW_TOKENS: usize = 8;

/// Weights of a unit: what a lane of the kernels takes at a time.
const UNIT: usize = 32;

/// Rows (warps) of a thread block of `product`.
const WARPS: usize = 4;

/// Threads of `matrix_rows`, and weights of each.
const ROWS_THREADS: usize = 64;
pub(super) const OF_A_THREAD: usize = 8;

/// A weight matrix `[rows, columns]`.
#[derive(Debug)]
pub struct DeviceMatrix {
    format: Format,
    planes: Vec<Tensor>,
    /// Where those are.
    addresses: [u64; 4],
    rows: usize,
    columns: usize,
    kernels: Arc<Kernels>,
    gemm: Arc<Gemm>,
}

impl DeviceMatrix {
    /// Of ggml blocks, or of floats as GGUF has them. Types that there are no kernels for (of 2 and 3 bits) are unpacked to bf16.
    ///
    /// # Errors
    /// If the device has no memory for it, or rows are no multiple of 32.
    pub(crate) fn from_blocks(bytes: &[u8], dtype: GgmlDType, [rows, columns]: [usize; 2], device: &Device) -> Result<Self> {
        let plain = match dtype {
            GgmlDType::F32 => Some(DType::F32),
            GgmlDType::F16 => Some(DType::F16),
            GgmlDType::BF16 => Some(DType::BF16),
            _ => None,
        };
        if let Some(dtype) = plain {
            return Self::from_tensor(&Tensor::from_raw_buffer(bytes, dtype, &[rows, columns], device)?);
        }
        let (format, planes) = match pack::planes(bytes, dtype)? {
            Some(packed) => packed,
            None => {
                let blocks = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, dtype)?;
                let plain = QTensor::new(blocks, (rows, columns))?.dequantize(&Device::Cpu)?.to_dtype(DType::BF16)?;
                return Self::from_tensor(&plain.to_device(device)?);
            }
        };
        let upload = |plane: Vec<u8>| Tensor::new(plane, device);
        Self::new(format, planes.into_iter().map(upload).collect::<Result<_>>()?, rows, columns, device)
    }

    /// Of f32, f16 or bf16.
    ///
    /// # Errors
    /// As [`DeviceMatrix::from_blocks`].
    pub(crate) fn from_tensor(tensor: &Tensor) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        let format = match tensor.dtype() {
            DType::F16 => Format::F16,
            DType::BF16 => Format::Bf16,
            DType::F32 => Format::F32,
            other => bail!("cuda: a matrix of {other:?}"),
        };
        Self::new(format, vec![tensor.contiguous()?], rows, columns, tensor.device())
    }

    fn new(format: Format, planes: Vec<Tensor>, rows: usize, columns: usize, device: &Device) -> Result<Self> {
        if !columns.is_multiple_of(UNIT) {
            bail!("cuda: rows of {columns} weights, there are kernels for multiples of {UNIT}");
        }
        let mut addresses = [0; 4];
        for (to, plane) in addresses.iter_mut().zip(&planes) {
            *to = address(plane)?;
        }
        Ok(Self { format, planes, addresses, rows, columns, kernels: Kernels::of(device)?, gemm: Gemm::of(device)? })
    }

    pub(super) fn device(&self) -> &Device {
        self.planes.first().map_or(&Device::Cpu, Tensor::device)
    }

    pub(super) fn height(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// As kernels take it; the product goes to `out`.
    pub(super) fn params(&self, out: u64, bias: u64) -> Matrix {
        Matrix { planes: self.addresses, out, bias, rows: self.rows as i32, format: self.format as i32 }
    }

    /// `x W'` of matrices that are multiplied with the same `x` `[tokens, columns]`: `[tokens, rows]` f32 each. Where all of them round `x`
    /// ([`DeviceMatrix::rounds`]), it may come as bf16.
    ///
    /// # Errors
    /// If a width differs, or the device is out of memory.
    pub(crate) fn multiply_each(matrices: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let (tokens, columns) = x.dims2()?;
        if let Some(other) = matrices.iter().find(|matrix| matrix.columns != columns) {
            bail!("cuda: x {:?} and a matrix {:?}", x.dims(), [other.rows, other.columns]);
        }
        if x.dtype() == DType::BF16 && matrices.iter().all(|matrix| matrix.rounds(tokens)) {
            let x = x.contiguous()?;
            return matrices.iter().map(|matrix| matrix.multiply_many(&x, Some(&x))).collect();
        }
        let x = x.to_dtype(DType::F32)?.contiguous()?;
        if tokens <= FEW_TOKENS {
            return matrices
                .chunks(3)
                .map(|matrices| Self::multiply_few(matrices, &x))
                .collect::<Result<Vec<_>>>()
                .map(|parts| parts.concat());
        }
        let rounded = matrices.iter().any(|matrix| matrix.is_halved()).then(|| round(&x)).transpose()?;
        matrices.iter().map(|matrix| matrix.multiply_many(&x, rounded.as_ref())).collect()
    }

    fn multiply_few(matrices: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let [first, ..] = matrices else { return Ok(Vec::new()) };
        let (tokens, columns) = x.dims2()?;
        let device = x.device();
        let outs = matrices.iter().map(|matrix| uninitialised((tokens, matrix.rows), DType::F32, device)).collect::<Result<Vec<_>>>()?;
        let x_q8 = uninitialised(tokens * activation_bytes(columns), DType::U8, device)?;
        let quantize = QuantizeParams { x: address(x)?, out: address(&x_q8)?, columns: columns as i32, tokens: tokens as i32 };
        let spread = Spread::new([(columns / UNIT).div_ceil(8), tokens, 1], 256);
        // SAFETY: the tensors have these shapes, and live until the stream frees them.
        unsafe { first.kernels.launch("quantize_activations", spread, &quantize) }?;
        let products = matrices.iter().zip(&outs).map(|(matrix, out)| Ok(Product { matrix, out: address(out)?, bias: 0 }));
        let products = products.collect::<Result<Vec<_>>>()?;
        // SAFETY: as above.
        unsafe { product(&first.kernels, &products, [address(x)?, address(&x_q8)?], columns, tokens) }?;
        Ok(outs)
    }

    /// Whether so many tokens are rounded to bf16 before they are multiplied.
    pub(crate) fn rounds(&self, tokens: usize) -> bool {
        tokens > FEW_TOKENS && self.is_halved()
    }

    /// Whether it is multiplied with many tokens in bf16. f16 would lose in bf16, and f32 even more.
    fn is_halved(&self) -> bool {
        !matches!(self.format, Format::F32 | Format::F16)
    }

    fn multiply_many(&self, x: &Tensor, rounded: Option<&Tensor>) -> Result<Tensor> {
        match (self.format, rounded) {
            (Format::F32, _) => self.gemm.multiply(&self.planes[0], x, Arithmetic::F32),
            // The 10 bits of f16 are those of tf32, whose exponents are f32's.
            (Format::F16, _) => self.gemm.multiply(&self.planes[0].to_dtype(DType::F32)?, x, Arithmetic::Tf32),
            (Format::Bf16, Some(rounded)) => self.gemm.multiply(&self.planes[0], rounded, Arithmetic::Bf16),
            (_, Some(rounded)) => self.gemm.multiply(&self.unpacked()?, rounded, Arithmetic::Bf16),
            (_, None) => bail!("cuda: activations were not rounded"),
        }
    }

    /// Rows by index, times `factor`: ids `[tokens]` u32 -> `[tokens, columns]` f32, in `place`.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn rows(&self, ids: &Tensor, factor: f32, place: &mut Place) -> Result<Tensor> {
        let out = place.take((ids.dim(0)?, self.columns), DType::F32, ids.device())?;
        // SAFETY: the model checked that ids are inside the vocabulary; the tensors have these shapes.
        unsafe { self.put_rows(address(ids)?, ids.dim(0)?, address(&out)?, factor) }?;
        Ok(out)
    }

    /// # Safety
    /// `count` ids inside the rows, and room for as many rows.
    pub(super) unsafe fn put_rows(&self, ids: u64, count: usize, out: u64, factor: f32) -> Result<()> {
        let params = RowsParams { matrix: self.params(0, 0), ids, out, columns: self.columns as i32, factor };
        let spread = Spread::new([count, (self.columns / OF_A_THREAD).div_ceil(ROWS_THREADS), 1], ROWS_THREADS);
        // Begins when all before it is done, unlike kernels that follow: those further on may read a step's position before they wait.
        // SAFETY: the caller's.
        unsafe { self.kernels.launch("matrix_rows", spread, &params) }
    }
}

/// `x W'` of each part of `[parts, rows, columns]` and `x` `[parts, tokens, columns]`, bf16: `[parts, tokens, rows]` f32.
///
/// # Errors
/// If a shape does not fit, or the device is out of memory.
pub(crate) fn multiply_parts(weights: &Tensor, x: &Tensor) -> Result<Tensor> {
    let ((parts, tokens, _), rows) = (x.dims3()?, weights.dim(1)?);
    let out = uninitialised((parts, tokens, rows), DType::F32, x.device())?;
    Gemm::of(x.device())?.multiply_to(&out, false, weights, x, Arithmetic::Bf16)?;
    Ok(out)
}

/// Adds to `to` `[tokens, rows]`, f32, which nobody else may hold, what [`multiply_unpacked`] gives.
///
/// # Errors
/// If a width differs.
pub(crate) fn add_product(weights: &Tensor, x: &Tensor, to: &Tensor) -> Result<()> {
    Gemm::of(x.device())?.multiply_to(to, true, weights, &x.contiguous()?, Arithmetic::Bf16)
}

/// Bytes from one token's activations in 8 bits to the next one's.
pub(super) fn activation_bytes(columns: usize) -> usize {
    (columns + columns / UNIT * 12).next_multiple_of(16)
}

/// One of the products of a kernel: it goes to `out`, with a bias added where there is one (0: none).
#[derive(Debug, Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) matrix: &'a DeviceMatrix,
    pub(super) out: u64,
    pub(super) bias: u64,
}

/// Products of up to four matrices with few tokens, `x` as it is and in 8 bits.
///
/// # Safety
/// The addresses must be of what layer_params.h says, and live until the kernel has run.
pub(super) unsafe fn product(
    kernels: &Kernels,
    products: &[Product<'_>],
    [x, x_q8]: [u64; 2],
    columns: usize,
    tokens: usize,
) -> Result<()> {
    let mut params = ProductParams { x, x_q8, count: products.len() as i32, columns: columns as i32, ..ProductParams::default() };
    for (to, product) in params.matrices.iter_mut().zip(products) {
        *to = product.matrix.params(product.out, product.bias);
    }
    let name = Format::kernel("product", products.iter().map(|product| product.matrix.format));
    let rows: usize = products.iter().map(|product| product.matrix.rows).sum();
    let spread = Spread::new([rows.div_ceil(WARPS), tokens, 1], WARPS * 32);
    // SAFETY: the caller's.
    unsafe { kernels.launch_following(&name, spread, &params) }
}

/// `x` as bf16.
fn round(x: &Tensor) -> Result<Tensor> {
    let out = uninitialised(x.shape(), DType::BF16, x.device())?;
    let count = x.elem_count();
    let params = RoundParams { x: address(x)?, out: address(&out)?, count: count as i64 };
    // SAFETY: both tensors have `count` numbers, a multiple of 32.
    unsafe { Kernels::of(x.device())?.launch_following("round_to_bf16", Spread::new([count.div_ceil(1024), 1, 1], 256), &params) }?;
    Ok(out)
}
