//! What is put into a stream, recorded once and replayed: as a CUDA graph, or where it is one kernel, as that.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, result, sys};
use candle_core::{Device, Result, bail};
use sparse_attn::backend::cuda::Kernels;
use std::collections::HashMap;
use std::sync::Arc;

/// A recording that is ready to run in its stream.
#[derive(Debug)]
pub(super) struct Graph {
    executable: sys::CUgraphExec,
    stream: Arc<CudaStream>,
}

/// What steps put into a stream again and again, with other arguments each time, at once: that takes the host a fraction of what single launches do. By how
/// many layers it is of.
#[derive(Debug, Default)]
pub(crate) struct Bundles(HashMap<usize, Graph>);

impl Bundles {
    /// Puts what `work` launches into the stream of `device`, which runs nothing of it before all is there.
    ///
    /// # Errors
    /// If `work` fails, does nothing, or does what cannot be recorded.
    pub(crate) fn launch(&mut self, layers: usize, device: &Device, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let kernels = Kernels::of(device)?;
        if kernels.stream().cu_stream().is_null() {
            return work(); // nothing can be recorded in the default stream
        }
        // One that runs still does what it was launched with.
        let graph = Graph::record(kernels.stream(), self.0.remove(&layers), work)?;
        graph.launch()?;
        self.0.insert(layers, graph);
        Ok(())
    }
}

/// What was recorded.
struct Recording(sys::CUgraph);

/// A kernel as somebody launched it, to be launched again with the same arguments.
pub(super) struct RecordedKernel {
    params: sys::CUDA_KERNEL_NODE_PARAMS,
    /// Its clusters of thread blocks, where it has any.
    cluster: Option<sys::CUlaunchAttribute>,
    stream: Arc<CudaStream>,
    _recording: Recording, // what `params` leads to
}

// SAFETY: it is its own, and the driver may be called from any thread, by one at a time.
unsafe impl Send for Graph {}

// SAFETY: what it leads to is its own, and is only read; the driver may be called from any thread.
unsafe impl Send for RecordedKernel {}
// SAFETY: as above.
unsafe impl Sync for RecordedKernel {}

impl Graph {
    /// Records what `launch` puts into the stream, which does not run yet. Where `last` is of the same kernels with other arguments it is brought up
    /// to date: that takes a fraction of the time.
    ///
    /// # Errors
    /// If `launch` fails or does nothing, or what it does cannot be recorded.
    pub(super) fn record(stream: &Arc<CudaStream>, last: Option<Self>, launch: impl FnOnce() -> Result<()>) -> Result<Self> {
        let recording = Recording::of(stream, launch)?;
        if let Some(last) = last
            && last.update(&recording)
        {
            return Ok(last);
        }
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // SAFETY: what was recorded is there, and its context is this thread's, as it is for the capture.
        let executable = unsafe { result::graph::instantiate(recording.0, flags) }.w()?;
        let graph = Self { executable, stream: stream.clone() };
        // Or the first launch would do it.
        // SAFETY: both are there.
        unsafe { result::graph::upload(graph.executable, stream.cu_stream()) }.w()?;
        Ok(graph)
    }

    /// Whether it does what was recorded now: it cannot where other kernels were, or more.
    fn update(&self, recording: &Recording) -> bool {
        let mut info = sys::CUgraphExecUpdateResultInfo {
            result: sys::CUgraphExecUpdateResult::CU_GRAPH_EXEC_UPDATE_ERROR,
            errorNode: std::ptr::null_mut(),
            errorFromNode: std::ptr::null_mut(),
        };
        // SAFETY: both are there.
        let updated = unsafe { sys::cuGraphExecUpdate_v2(self.executable, recording.0, &raw mut info) };
        updated.result().is_ok()
    }

    /// Puts it into its stream.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn launch(&self) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: both are there.
        unsafe { result::graph::launch(self.executable, self.stream.cu_stream()) }.w()
    }
}

impl Recording {
    fn of(stream: &Arc<CudaStream>, launch: impl FnOnce() -> Result<()>) -> Result<Self> {
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let launched = launch();
        // Ends the recording whatever came of it, or the stream could do nothing else.
        // SAFETY: the stream is there, and it records.
        let recording = unsafe { result::stream::end_capture(stream.cu_stream()) }.w().map(Self);
        launched?;
        let recording = recording?;
        if recording.0.is_null() {
            bail!("cuda: nothing was recorded");
        }
        Ok(recording)
    }

    /// What it does if that is one kernel.
    fn kernel(&self) -> Result<Option<(sys::CUgraphNode, sys::CUDA_KERNEL_NODE_PARAMS)>> {
        let (mut node, mut count) = (std::ptr::null_mut(), 1);
        // SAFETY: there is room for one node, and the driver says how many it wrote or, asked without room, how many there are.
        unsafe {
            sys::cuGraphGetNodes(self.0, std::ptr::null_mut(), &raw mut count).result().w()?;
            if count != 1 {
                return Ok(None);
            }
            sys::cuGraphGetNodes(self.0, &raw mut node, &raw mut count).result().w()?;
        }
        let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: the node is there, as below.
        unsafe { sys::cuGraphNodeGetType(node, &raw mut kind) }.result().w()?;
        if kind != sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL {
            return Ok(None);
        }
        let mut params = std::mem::MaybeUninit::zeroed();
        // SAFETY: it is a kernel's; the driver writes all that there is of it.
        let params = unsafe {
            sys::cuGraphKernelNodeGetParams_v2(node, params.as_mut_ptr()).result().w()?;
            params.assume_init()
        };
        Ok(Some((node, params)))
    }
}

impl RecordedKernel {
    /// Records what `launch` puts into the stream, which does not run yet; `None`: it is more than one kernel.
    ///
    /// # Errors
    /// As [`Graph::record`].
    pub(super) fn record(stream: &Arc<CudaStream>, launch: impl FnOnce() -> Result<()>) -> Result<Option<Self>> {
        let recording = Recording::of(stream, launch)?;
        let Some((node, params)) = recording.kernel()? else { return Ok(None) };
        let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        // SAFETY: the node is a kernel's, and the driver writes a size of three numbers.
        let has_clusters = unsafe {
            sys::cuGraphKernelNodeGetAttribute(node, id, &raw mut value).result().w()?;
            value.clusterDim.x > 0
        };
        let cluster = has_clusters.then_some(sys::CUlaunchAttribute { id, pad: [0; 4], value });
        Ok(Some(Self { params, cluster, stream: stream.clone(), _recording: recording }))
    }

    /// Puts it into its stream.
    ///
    /// # Safety
    /// What its arguments lead to must be there until it has run.
    ///
    /// # Errors
    /// If it cannot be launched.
    pub(super) unsafe fn launch(&self) -> Result<()> {
        let params = &self.params;
        let mut attribute = self.cluster;
        let config = sys::CUlaunchConfig {
            gridDimX: params.gridDimX,
            gridDimY: params.gridDimY,
            gridDimZ: params.gridDimZ,
            blockDimX: params.blockDimX,
            blockDimY: params.blockDimY,
            blockDimZ: params.blockDimZ,
            sharedMemBytes: params.sharedMemBytes,
            hStream: self.stream.cu_stream(),
            attrs: attribute.as_mut().map_or(std::ptr::null_mut(), |attribute| &raw mut *attribute),
            numAttrs: u32::from(attribute.is_some()),
        };
        // One that came from a library is launched by its handle there.
        let function = if params.func.is_null() { params.kern.cast() } else { params.func };
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: the caller's; the arguments lie in the recording.
        unsafe { sys::cuLaunchKernelEx(&raw const config, function, params.kernelParams, params.extra) }.result().w()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.stream.context().bind_to_thread().is_ok() {
            // SAFETY: nothing launches it any more; one that runs is destroyed when it is done.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: what was made of it does not need it.
            let _ = unsafe { result::graph::destroy(self.0) };
        }
    }
}
