//! Products of plain matrices with many tokens, by cuBLASLt: which of its kernels takes a shape is asked once. cuBLAS itself asks with every
//! product, for longer than small ones take. Products of the same matrices at the same places are recorded, and the kernel launched without
//! cuBLASLt, which takes half the time: layers one after the other have theirs there.

use super::graph::RecordedKernel;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{DType, Device, Result, Tensor, bail};
use sparse_attn::backend::cuda::{Kernels, address, uninitialised};
use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::size_of_val;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that cuBLASLt's kernels may work in, as NVIDIA recommends: from compute capability 9 on, and before.
const WORKSPACE: [usize; 2] = [32 << 20, 4 << 20];

/// Bytes of which all addresses are multiples.
const ALIGNED: u32 = 16;

/// Most shapes whose kernels are remembered: prompts have many lengths. And most products that are recorded.
const MOST_PLANS: usize = 512;
const MOST_RECORDED: usize = 256;

/// What each device multiplies with, once for a process.
static MADE: Mutex<Vec<(DeviceId, Arc<Gemm>)>> = Mutex::new(Vec::new());

/// What is multiplied and added in; sums are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Arithmetic {
    F32,
    Tf32,
    Bf16,
}

/// `x W'`: `[tokens, columns]` and `[rows, columns]` -> `[tokens, rows]`, a token's numbers so many after the one's before it, of so many parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    parts: usize,
    tokens: usize,
    rows: usize,
    columns: usize,
    apart: usize,
    arithmetic: Arithmetic,
}

/// A product of what is at certain places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Product {
    shape: Shape,
    adds: bool,
    places: [u64; 3],
}

/// What became of a product.
enum Seen {
    /// It was made by cuBLASLt, once.
    Once,
    /// It is no single kernel, or cannot be recorded.
    Other,
    Recorded(Arc<RecordedKernel>),
}

/// The products of a device.
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    kernels: Arc<Kernels>,
    workspace: Tensor, // u8
    plans: Mutex<HashMap<Shape, Arc<Plan>>>,
    seen: Mutex<HashMap<Product, Seen>>,
}

// SAFETY: cuBLASLt's handles may be used by several threads at once.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

impl std::fmt::Debug for Gemm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gemm").finish_non_exhaustive()
    }
}

/// How a shape is multiplied.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Gemm {
    /// The products of `device`.
    ///
    /// # Errors
    /// If it is no CUDA device, or has no memory to work in.
    pub(super) fn of(device: &Device) -> Result<Arc<Self>> {
        let id = device.as_cuda_device()?.id();
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, gemm)) = made.iter().find(|(other, _)| *other == id) {
            return Ok(gemm.clone());
        }
        let kernels = Kernels::of(device)?;
        let context = kernels.stream().context();
        context.bind_to_thread().w()?;
        let capability = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR).w()?;
        let workspace = uninitialised(WORKSPACE[usize::from(capability < 9)], DType::U8, device)?;
        let handle = result::create_handle().map_err(|error| failed("cuBLASLt cannot be used", error))?;
        let gemm = Arc::new(Self { handle, kernels, workspace, plans: Mutex::default(), seen: Mutex::default() });
        made.push((id, gemm.clone()));
        Ok(gemm)
    }

    /// `x W'`: `[tokens, columns]` and `[rows, columns]` -> `[tokens, rows]` f32.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit each other, or the device is out of memory.
    pub(super) fn multiply(&self, weight: &Tensor, x: &Tensor, arithmetic: Arithmetic) -> Result<Tensor> {
        let out = uninitialised((x.dim(0)?, weight.dim(0)?), DType::F32, x.device())?;
        self.multiply_to(&out, false, weight, x, arithmetic)?;
        Ok(out)
    }

    /// The same to the first numbers that `out` has of each token, beside what they are (`adds`) or in their place; or of each part of tensors of three
    /// axes.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit each other.
    pub(super) fn multiply_to(&self, out: &Tensor, adds: bool, weight: &Tensor, x: &Tensor, arithmetic: Arithmetic) -> Result<()> {
        let (dtype, are_of) = (arithmetic.dtype(), |tensor: &Tensor| (tensor.dims().to_vec(), tensor.dtype()));
        let dims = |tensor: &Tensor| match *tensor.dims() {
            [rows, columns] => [1, rows, columns],
            [parts, rows, columns] => [parts, rows, columns],
            _ => [0; 3],
        };
        let ([parts, rows, columns], [_, tokens, width], [.., apart]) = (dims(weight), dims(x), dims(out));
        let fit = columns == width && dims(x)[0] == parts && dims(out) == [parts, tokens, apart] && apart >= rows;
        if !fit || weight.dtype() != dtype || x.dtype() != dtype || out.dtype() != DType::F32 {
            bail!("cuda: product of {:?} and {:?} to {:?} in {arithmetic:?}", are_of(x), are_of(weight), are_of(out));
        }
        let [weight_at, x_at, out_at] = [address(weight)?, address(x)?, address(out)?];
        if [weight_at, x_at, out_at].iter().any(|at| !at.is_multiple_of(ALIGNED.into())) {
            bail!("cuda: product of {:?} and {:?}, which do not begin at multiples of {ALIGNED} bytes", x.dims(), weight.dims());
        }
        let product = Product { shape: Shape { parts, tokens, rows, columns, apart, arithmetic }, adds, places: [weight_at, x_at, out_at] };
        match self.recorded(product) {
            // SAFETY: the tensors live until the stream frees them, and the workspace is used by one product at a time.
            Some(recorded) => unsafe { recorded.launch() },
            None => self.launch(product),
        }
    }

    /// The kernel that makes a product that was made before; `None`: cuBLASLt is to.
    fn recorded(&self, product: Product) -> Option<Arc<RecordedKernel>> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match seen.get(&product) {
            Some(Seen::Recorded(kernel)) => return Some(kernel.clone()),
            Some(Seen::Other) => return None,
            // Within a recording there is no other one.
            Some(Seen::Once) if self.kernels.is_recording() => return None,
            Some(Seen::Once) => {}
            None => {
                if seen.len() >= MOST_RECORDED {
                    seen.clear();
                }
                seen.insert(product, Seen::Once);
                return None;
            }
        }
        // What cannot be recorded is made as before: if the device fails, so does that.
        let kernel = RecordedKernel::record(self.kernels.stream(), || self.launch(product)).ok().flatten().map(Arc::new);
        seen.insert(product, kernel.clone().map_or(Seen::Other, Seen::Recorded));
        kernel
    }

    /// Has cuBLASLt make a product, of tensors that are there until the stream frees them.
    fn launch(&self, product: Product) -> Result<()> {
        let Product { shape, adds, places: [weight, x, out] } = product;
        let plan = self.plan(shape)?;
        let (one, beta) = (1f32, f32::from(u8::from(adds)));
        self.kernels.stream().context().bind_to_thread().w()?;
        // SAFETY: the plan is of these shapes; the tensors live until the stream frees them, and the workspace is used by one product at a time.
        let done = unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                weight as *const c_void,
                plan.weight,
                x as *const c_void,
                plan.x,
                out as *const c_void,
                plan.out,
                out as *mut c_void,
                plan.out,
                &raw const plan.algorithm,
                address(&self.workspace)? as *mut c_void,
                self.workspace.elem_count(),
                self.kernels.stream().cu_stream().cast(),
            )
        };
        done.map_err(|error| failed(&format!("product of {shape:?}"), error))
    }

    fn plan(&self, shape: Shape) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&shape) {
            return Ok(plan.clone());
        }
        if plans.len() >= MOST_PLANS {
            plans.clear();
        }
        let plan = Plan::new(self.handle, shape, self.workspace.elem_count()).map(Arc::new);
        let plan = plan.map_err(|error| failed(&format!("product of {shape:?}"), error))?;
        plans.insert(shape, plan.clone());
        Ok(plan)
    }
}

impl Arithmetic {
    fn dtype(self) -> DType {
        match self {
            Self::F32 | Self::Tf32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl Plan {
    /// In cuBLAS's order of columns: out' `[rows, tokens]` = weight'' x'.
    fn new(handle: sys::cublasLtHandle_t, shape: Shape, workspace: usize) -> std::result::Result<Self, result::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preferred;
        let Shape { parts, tokens, rows, columns, apart, arithmetic } = shape;
        let (kind, compute) = match arithmetic {
            Arithmetic::F32 => (sys::cudaDataType::CUDA_R_32F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
            Arithmetic::Tf32 => (sys::cudaDataType::CUDA_R_32F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32),
            Arithmetic::Bf16 => (sys::cudaDataType::CUDA_R_16BF, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
        };
        let mut plan = Self {
            operation: std::ptr::null_mut(),
            weight: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            out: std::ptr::null_mut(),
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        plan.operation = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?;
        plan.weight = result::create_matrix_layout(kind, columns as u64, rows as u64, columns as i64)?;
        plan.x = result::create_matrix_layout(kind, columns as u64, tokens as u64, columns as i64)?;
        plan.out = result::create_matrix_layout(sys::cudaDataType::CUDA_R_32F, rows as u64, tokens as u64, apart as i64)?;
        if parts > 1 {
            use sys::cublasLtMatrixLayoutAttribute_t::{CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET};
            for (layout, numbers) in [(plan.weight, rows * columns), (plan.x, tokens * columns), (plan.out, tokens * apart)] {
                let (count, apart) = (parts as i32, numbers as i64);
                // SAFETY: the layout is there, and each attribute is a number of this size.
                unsafe {
                    let set = |attribute, at: *const c_void, bytes| result::set_matrix_layout_attribute(layout, attribute, at, bytes);
                    set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const count).cast(), size_of_val(&count))?;
                    set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const apart).cast(), size_of_val(&apart))?;
                }
            }
        }
        let (transposed, aligned) = (cublasOperation_t::CUBLAS_OP_T, ALIGNED);
        let preference = Preference(result::create_matmul_pref()?);
        // SAFETY: the descriptors are there, and each attribute is a number of this size.
        unsafe {
            result::set_matmul_desc_attribute(
                plan.operation,
                CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of_val(&transposed),
            )?;
            let set = |attribute, at: *const c_void, bytes| result::set_matmul_pref_attribute(preference.0, attribute, at, bytes);
            set(Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), size_of_val(&workspace))?;
            for matrix in [
                Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                set(matrix, (&raw const aligned).cast(), size_of_val(&aligned))?;
            }
            let found = result::get_matmul_algo_heuristic(handle, plan.operation, plan.weight, plan.x, plan.out, plan.out, preference.0)?;
            plan.algorithm = found.algo;
        }
        Ok(plan)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each is null or was made by `new`, and nothing uses it any more: the driver copies what a product needs.
        unsafe {
            for layout in [self.weight, self.x, self.out].into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
            if !self.operation.is_null() {
                let _ = result::destroy_matmul_desc(self.operation);
            }
        }
    }
}

/// What a kernel is chosen by.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it is there, and nothing uses it any more.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn failed(what: &str, error: result::CublasError) -> candle_core::Error {
    candle_core::Error::Msg(format!("cuda: {what}: {error}"))
}
