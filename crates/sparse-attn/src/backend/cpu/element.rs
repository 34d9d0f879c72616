use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A number as keys and values are stored.
pub(super) trait Element: Copy + Send + Sync {
    /// `out[i] = values[i]` as f32. The lengths must be equal.
    fn widen(values: &[Self], out: &mut [f32]);
}

impl Element for f32 {
    fn widen(values: &[Self], out: &mut [f32]) {
        out.copy_from_slice(values);
    }
}

impl Element for f16 {
    fn widen(values: &[Self], out: &mut [f32]) {
        values.convert_to_f32_slice(out);
    }
}

impl Element for bf16 {
    fn widen(values: &[Self], out: &mut [f32]) {
        values.convert_to_f32_slice(out);
    }
}
