use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Module, Result, Tensor};
use std::sync::Arc;

/// A weight matrix `[rows, columns]`, dense or in ggml blocks.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// f32.
    Dense(Tensor),
    /// Blocks, multiplied without unpacking.
    Quantized(Arc<QTensor>),
}

impl Matrix {
    /// Unpacks f32, f16 and bf16 "blocks", which candle multiplies faster as a dense matrix.
    pub(super) fn from_qtensor(tensor: QTensor) -> Result<Self> {
        match tensor.dtype() {
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => Ok(Self::Dense(tensor.dequantize(&tensor.device())?)),
            _ => Ok(Self::Quantized(Arc::new(tensor))),
        }
    }

    /// `x W'`: `[tokens, columns]` -> `[tokens, rows]`.
    ///
    /// # Errors
    /// If the widths differ.
    pub fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => x.matmul(&weight.t()?),
            Self::Quantized(weight) => QMatMul::QTensor(weight.clone()).forward(x),
        }
    }

    /// Rows by index: ids `[tokens]` u32 -> `[tokens, columns]` f32.
    ///
    /// # Errors
    /// If an id is beyond the rows.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => weight.index_select(ids, 0),
            Self::Quantized(weight) => weight.embedding(ids),
        }
    }
}
