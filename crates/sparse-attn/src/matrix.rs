//! Products of matrices in slices.

use gemm::Parallelism;

/// A matrix in a slice, with the distance between neighbours along either axis.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: &'a [f32],
    row_stride: isize,
    column_stride: isize,
}

impl<'a> Matrix<'a> {
    /// Rows of `width` values, one after the other.
    pub(crate) fn rows(values: &'a [f32], width: usize) -> Self {
        Self { values, row_stride: width as isize, column_stride: 1 }
    }

    /// The transpose of [`Matrix::rows`].
    pub(crate) fn columns(values: &'a [f32], width: usize) -> Self {
        Self { values, row_stride: 1, column_stride: width as isize }
    }
}

/// `out[m, n] = alpha * a[m, k] . b[k, n]`, or `+=`. On the calling thread.
pub(crate) fn multiply(alpha: f32, a: Matrix<'_>, b: Matrix<'_>, [m, n, k]: [usize; 3], out: &mut [f32], add: bool) {
    assert!(a.values.len() >= m * k && b.values.len() >= k * n && out.len() >= m * n, "multiply: a slice is too short");
    // SAFETY: every index that gemm reaches is below m*k, k*n or m*n, as asserted; `out` is borrowed
    // mutably, so it overlaps neither `a` nor `b`. In gemm's terms `alpha` scales `out` and `beta` the product.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.values.as_ptr(),
            a.column_stride,
            a.row_stride,
            b.values.as_ptr(),
            b.column_stride,
            b.row_stride,
            1.0,
            alpha,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
