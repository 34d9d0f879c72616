//! The code of kernels/cuda on a GPU: loaded once, launched by name.

use super::{Mark, Pinned};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DevicePtr};
use candle_core::cuda_backend::cudarc::driver::{result, sys};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId, WrapErr};
use candle_core::{DType, Device, Result, Storage, Tensor, bail};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

/// Machine code for several architectures, and PTX.
const BINARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// Shared memory that a thread block surely gets without asking, beside what kernels declare.
const SHARED_BYTES: usize = 32 << 10;

/// Of a device's memory, the part that stays this process's when nothing is in it: by default all goes back to the driver whenever the
/// host waits, and the next step pays for getting it again.
const HELD: usize = 16;

/// What each device has loaded: like candle's own kernels, once for a process.
static LOADED: Mutex<Vec<(DeviceId, Arc<Kernels>)>> = Mutex::new(Vec::new());

/// The kernels of a device, and the stream that they run in.
#[derive(Debug)]
pub struct Kernels {
    module: Arc<CudaModule>,
    stream: Arc<CudaStream>,
    /// By name, with the shared memory that each may have beside what it declares.
    functions: Mutex<HashMap<String, (CudaFunction, usize)>>,
    multiprocessors: usize,
    /// What is fetched comes here first: memory that is not page-locked costs the driver copies of its own.
    landing: Mutex<Option<Pinned<f32>>>,
}

/// How a kernel is spread over the device.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    /// Thread blocks.
    pub grid: [usize; 3],
    /// Threads of each.
    pub threads: usize,
    /// Bytes of shared memory of each, beside what the kernel declares.
    pub shared_bytes: usize,
}

impl Spread {
    /// Without shared memory.
    pub fn new(grid: [usize; 3], threads: usize) -> Self {
        Self { grid, threads, shared_bytes: 0 }
    }
}

impl Kernels {
    /// The kernels on `device`.
    ///
    /// # Errors
    /// If it is no CUDA device, or one that none of the code in this build runs on.
    pub fn of(device: &Device) -> Result<Arc<Self>> {
        let cuda = device.as_cuda_device()?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kernels)) = loaded.iter().find(|(id, _)| *id == cuda.id()) {
            return Ok(kernels.clone());
        }
        let stream = cuda.cuda_stream();
        let context = stream.context();
        hold_memory(context)?;
        let module = context.load_module(Ptx::from_binary(BINARY.to_vec())).w()?;
        let multiprocessors = context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).w()? as usize;
        let kernels = Arc::new(Self { module, stream, functions: Mutex::default(), multiprocessors, landing: Mutex::default() });
        loaded.push((cuda.id(), kernels.clone()));
        Ok(kernels)
    }

    /// The stream that everything of the device runs in, in order.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Multiprocessors of the device.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// What a contiguous tensor of f32 holds, once everything before it in the stream is done, and what the host does `meanwhile`: what it launches
    /// there is not waited for.
    ///
    /// # Errors
    /// If it is no such tensor, the host cannot lock as much memory, or what it does fails.
    pub fn fetch(&self, tensor: &Tensor, meanwhile: impl FnOnce() -> Result<()>) -> Result<Vec<f32>> {
        let (from, count) = (address(tensor)?, tensor.elem_count());
        if tensor.dtype() != DType::F32 {
            bail!("cuda: a tensor of {:?} is fetched as f32", tensor.dtype());
        }
        let mut landing = self.landing.lock().unwrap_or_else(PoisonError::into_inner);
        if landing.as_ref().is_none_or(|landing| landing.len() < count) {
            *landing = Some(Pinned::of_stream(&self.stream, count)?);
        }
        let Some(landing) = landing.as_mut() else { return Ok(Vec::new()) };
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: the tensor has so many numbers, and the memory is there until after the device was waited for.
        unsafe { result::memcpy_dtoh_async(&mut landing.numbers_mut()[..count], from, self.stream.cu_stream()) }.w()?;
        let fetched = Mark::set(self)?;
        let done = meanwhile();
        fetched.wait()?;
        done?;
        Ok(landing.numbers()[..count].to_vec())
    }

    /// Whether what is put into the stream is recorded, and does not run yet.
    pub fn is_recording(&self) -> bool {
        self.stream.capture_status().is_ok_and(|status| status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Whether the code for this device has a kernel of that name: some are for certain devices only.
    pub fn has(&self, name: &str) -> bool {
        self.function(name, 0).is_ok()
    }

    /// Puts a kernel into the stream.
    ///
    /// # Safety
    /// `params` must be what the kernel takes, and every pointer in it lead to memory of the device as large as it says that
    /// lives until the kernel has run.
    ///
    /// # Errors
    /// If there is no kernel of that name, or it cannot be launched.
    pub unsafe fn launch<P>(&self, name: &str, spread: Spread, params: &P) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.put(name, spread, params, false) }
    }

    /// [`Kernels::launch`] of a kernel that itself waits for the one before (`follow` of common.cuh): its launch overlaps with that.
    ///
    /// # Safety
    /// As [`Kernels::launch`], and the kernel must wait.
    ///
    /// # Errors
    /// As [`Kernels::launch`].
    pub unsafe fn launch_following<P>(&self, name: &str, spread: Spread, params: &P) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.put(name, spread, params, true) }
    }

    unsafe fn put<P>(&self, name: &str, spread: Spread, params: &P, follows: bool) -> Result<()> {
        let function = self.function(name, spread.shared_bytes)?;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let [x, y, z] = spread.grid.map(|count| count as u32);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: spread.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: spread.shared_bytes as u32,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(follows),
        };
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: the function is loaded, the one argument is what the caller vouches for, and the driver copies it before it returns.
        let result =
            unsafe { sys::cuLaunchKernelEx(&raw const config, function.cu_function(), arguments.as_mut_ptr(), std::ptr::null_mut()) };
        match result.result() {
            Ok(()) => Ok(()),
            Err(error) => bail!("cuda: {name} with {spread:?}: {error}"),
        }
    }

    fn function(&self, name: &str, shared_bytes: usize) -> Result<CudaFunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((function, most)) = functions.get(name)
            && shared_bytes <= *most
        {
            return Ok(function.clone());
        }
        let load = || self.module.load_function(name).map_err(|error| candle_core::Error::Msg(format!("cuda: kernel {name}: {error}")));
        let function = functions.remove(name).map_or_else(load, |(function, _)| Ok(function))?;
        if shared_bytes > SHARED_BYTES {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, shared_bytes as i32).w()?;
        }
        functions.insert(name.to_string(), (function.clone(), shared_bytes.max(SHARED_BYTES)));
        Ok(function)
    }
}

/// Keeps some of what is freed, where tensors come from the driver's pool.
fn hold_memory(context: &CudaContext) -> Result<()> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut most = (context.total_mem().w()? / HELD) as u64;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is the context's, the pool is the device's, and the attribute is one number of 64 bits.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device()).w()?;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut most).cast()).w()
    }
}

/// Where the numbers of a contiguous tensor begin on its GPU. Valid as long as the tensor lives.
///
/// # Errors
/// If it is not contiguous, or not on a GPU.
pub fn address(tensor: &Tensor) -> Result<u64> {
    if !tensor.is_contiguous() {
        bail!("cuda: a tensor {:?} is not contiguous", tensor.shape());
    }
    first_of(tensor)
}

/// `tensor`, or a copy of it, such that what it has for each token (its first axis) is contiguous: with the address of the first number, and how
/// many numbers lie between a token's first one and the next one's.
///
/// # Errors
/// If it is not on a GPU, or that is out of memory.
pub fn by_tokens(tensor: &Tensor) -> Result<(Tensor, u64, usize)> {
    let apart = |tensor: &Tensor| tensor.stride().first().copied().unwrap_or(1);
    // What follows the first axis, from the last one on: each as far apart as what comes after it is long.
    let mut length = 1;
    let is_by_tokens = tensor.dims().iter().zip(tensor.stride()).skip(1).rev().all(|(count, stride)| {
        let is_contiguous = *count <= 1 || *stride == length;
        length *= count;
        is_contiguous
    });
    let tensor = if is_by_tokens { tensor.clone() } else { tensor.contiguous()? };
    Ok((tensor.clone(), first_of(&tensor)?, apart(&tensor)))
}

fn first_of(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("cuda: a tensor is on {:?}", tensor.device().location()) };
    let stream = storage.device.cuda_stream();
    // The guard orders streams by events, of which candle's device has one and none.
    macro_rules! pointer {
        ($slice:expr) => {
            $slice.device_ptr(&stream).0
        };
    }
    let first = match &storage.slice {
        CudaStorageSlice::U8(slice) => pointer!(slice),
        CudaStorageSlice::U32(slice) => pointer!(slice),
        CudaStorageSlice::I64(slice) => pointer!(slice),
        CudaStorageSlice::BF16(slice) => pointer!(slice),
        CudaStorageSlice::F16(slice) => pointer!(slice),
        CudaStorageSlice::F32(slice) => pointer!(slice),
        CudaStorageSlice::F64(slice) => pointer!(slice),
        _ => bail!("cuda: tensors of {:?} are not handed to kernels", tensor.dtype()),
    };
    Ok(first + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}
