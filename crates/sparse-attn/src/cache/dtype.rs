//! How keys and values are stored.

use candle_core::DType;

/// Dimensions that share a scale in [`KvDtype::Q8_0`].
pub const GROUP: usize = 32;

/// The storage of a key or a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 16-bit floats with the exponent of 32-bit ones.
    Bf16,
    /// 8-bit integers; each [`GROUP`] of dimensions has a 16-bit scale (ggml's `q8_0`). Keys are rotated first, see `hadamard.rs`.
    Q8_0,
}

impl KvDtype {
    /// Every storage.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0];

    /// The name users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// The dtype of the tensor that holds the numbers.
    pub fn tensor_dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Q8_0 => DType::U8,
        }
    }

    /// Scales per row of `width` numbers.
    pub(crate) fn scales(self, width: usize) -> usize {
        if self == Self::Q8_0 { width.div_ceil(GROUP) } else { 0 }
    }

    /// Bytes of a row of `width` numbers.
    pub fn row_bytes(self, width: usize) -> usize {
        width * self.tensor_dtype().size_in_bytes() + 2 * self.scales(width)
    }
}

/// The storage of keys and that of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvDtypes {
    /// Of keys.
    pub k: KvDtype,
    /// Of values.
    pub v: KvDtype,
}

impl KvDtypes {
    /// Bytes of one token of one head.
    pub fn bytes(self, head_dim: usize) -> usize {
        self.k.row_bytes(head_dim) + self.v.row_bytes(head_dim)
    }
}

impl From<KvDtype> for KvDtypes {
    fn from(dtype: KvDtype) -> Self {
        Self { k: dtype, v: dtype }
    }
}
