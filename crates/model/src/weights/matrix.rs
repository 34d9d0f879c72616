use super::{Arithmetic, Tiles, product};
use crate::gpu::{DeviceMatrix, Group, Unpacked};
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor};
use sparse_attn::Place;
use std::sync::Arc;

/// Rows of activations from which unpacking a matrix once costs less than multiplying its blocks row by row.
const UNPACK_ROWS: usize = 12;

/// Whether many rows are faster through an unpacked copy: types that candle 0.11 has no prefill kernel for
/// multiply at 10 to 20 GFLOP/s on two AVX-512 cores, f32 at about 100.
fn unpacks(weight: &QTensor) -> bool {
    weight.device().is_cpu()
        && matches!(weight.dtype(), GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1 | GgmlDType::Q2K | GgmlDType::Q3K)
}

/// A weight matrix `[rows, columns]`, dense or in ggml blocks.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// f32.
    Dense(Tensor),
    /// 16-bit floats on the host.
    Tiles(Arc<Tiles>),
    /// Blocks, multiplied without unpacking.
    Quantized(Arc<QTensor>, Arithmetic),
    /// Of any type, on a GPU.
    Device(Arc<DeviceMatrix>),
}

impl Matrix {
    /// f32, f16 and bf16 "blocks" become dense matrices and tiles.
    pub(super) fn from_qtensor(tensor: QTensor, arithmetic: Arithmetic) -> Result<Self> {
        let dense = || tensor.dequantize(&tensor.device());
        match tensor.dtype() {
            GgmlDType::F32 => Ok(Self::Dense(dense()?)),
            // Back to what they were, which f32 holds exactly.
            GgmlDType::F16 => Self::from_dense(dense()?.to_dtype(DType::F16)?),
            GgmlDType::BF16 => Self::from_dense(dense()?.to_dtype(DType::BF16)?),
            _ => Ok(Self::Quantized(Arc::new(tensor), arithmetic)),
        }
    }

    /// ggml blocks on their way to a GPU.
    pub(super) fn to_device(bytes: &[u8], dtype: GgmlDType, shape: [usize; 2], device: &Device) -> Result<Self> {
        Ok(Self::Device(Arc::new(DeviceMatrix::from_blocks(bytes, dtype, shape, device)?)))
    }

    /// A matrix of f32, f16 or bf16.
    pub(super) fn from_dense(tensor: Tensor) -> Result<Self> {
        match tensor.dtype() {
            _ if tensor.device().is_cuda() => Ok(Self::Device(Arc::new(DeviceMatrix::from_tensor(&tensor)?))),
            DType::F16 | DType::BF16 if tensor.device().is_cpu() => Ok(Self::Tiles(Arc::new(Tiles::new(&tensor)?))),
            _ => Ok(Self::Dense(tensor.to_dtype(DType::F32)?)),
        }
    }

    /// `x W'`: `[tokens, columns]` -> `[tokens, rows]`.
    ///
    /// # Errors
    /// If the widths differ.
    pub fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => x.matmul(&weight.t()?),
            Self::Tiles(weight) => weight.multiply(x),
            Self::Device(weight) => Ok(DeviceMatrix::multiply_each(&[weight.as_ref()], x)?.remove(0)),
            Self::Quantized(weight, arithmetic) if product::supports(weight, x.dim(0)?, arithmetic.order) => {
                Ok(product::multiply(x, &[weight.as_ref()], *arithmetic)?.remove(0))
            }
            Self::Quantized(weight, _) if x.dim(0)? >= UNPACK_ROWS && unpacks(weight) => {
                x.matmul(&weight.dequantize(&weight.device())?.t()?)
            }
            Self::Quantized(weight, _) => QMatMul::QTensor(weight.clone()).forward(x),
        }
    }

    /// The dtype to which so many tokens are rounded before they are multiplied: they may come in it.
    pub(crate) fn dtype_of_activations(&self, tokens: usize) -> DType {
        match self {
            Self::Device(weight) if weight.rounds(tokens) => DType::BF16,
            _ => DType::F32,
        }
    }

    /// [`Matrix::multiply`] of several matrices with the same `x`, which is prepared once where that helps.
    ///
    /// # Errors
    /// If a width differs.
    pub fn multiply_each(matrices: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let tokens = x.dim(0)?;
        if let Some(matrices) = Self::on_device(matrices) {
            return DeviceMatrix::multiply_each(&matrices, x);
        }
        let quantized = matrices.iter().map(|matrix| match matrix {
            Self::Quantized(weight, arithmetic) if product::supports(weight, tokens, arithmetic.order) => Some(weight.as_ref()),
            _ => None,
        });
        // The matrices of a checkpoint are all multiplied alike.
        match (quantized.collect::<Option<Vec<&QTensor>>>(), matrices.first()) {
            (Some(weights), Some(Self::Quantized(_, arithmetic))) => product::multiply(x, &weights, *arithmetic),
            _ => matrices.iter().map(|matrix| matrix.multiply(x)).collect(),
        }
    }

    /// Weights of groups of matrices in 16 bits, where a GPU unpacks them to multiply them with so many tokens; see [`DeviceMatrix::unpack_groups`].
    pub(crate) fn unpack_groups(groups: &[Group<'_, Self>], tokens: usize, last: Unpacked) -> Result<Option<Unpacked>> {
        let mut on_device = Vec::with_capacity(groups.len());
        for group in groups {
            let Some(matrices) = Self::on_device(&group.matrices) else { return Ok(None) };
            on_device.push(Group { matrices, beside: group.beside, whole: group.whole });
        }
        DeviceMatrix::unpack_groups(&on_device, tokens, last)
    }

    /// Whether a GPU unpacks it to multiply it with so many tokens.
    pub(crate) fn is_unpacked(&self, tokens: usize) -> bool {
        matches!(self, Self::Device(weight) if weight.is_unpacked(tokens))
    }

    /// The matrices, where all are on a GPU.
    fn on_device<'a>(matrices: &[&'a Self]) -> Option<Vec<&'a DeviceMatrix>> {
        matrices.iter().map(|matrix| if let Self::Device(weight) = matrix { Some(weight.as_ref()) } else { None }).collect()
    }

    /// Rows by index: ids `[tokens]` u32 -> `[tokens, columns]` f32.
    ///
    /// # Errors
    /// If an id is beyond the rows.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => weight.index_select(ids, 0),
            Self::Tiles(weight) => weight.rows(ids),
            Self::Device(weight) => weight.rows(ids, 1.0, &mut Place::default()),
            Self::Quantized(weight, _) => weight.embedding(ids),
        }
    }
}
