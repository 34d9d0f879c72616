//! A CUDA graph: what is put into a stream, recorded once and replayed.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, result, sys};
use candle_core::{Result, bail};
use std::sync::Arc;

/// A recording that is ready to run in its stream.
pub(super) struct Graph {
    executable: sys::CUgraphExec,
    stream: Arc<CudaStream>,
}

/// What was recorded, until it is made executable.
struct Recording(sys::CUgraph);

impl Graph {
    /// Records what `launch` puts into the stream, which does not run yet. Where `last` is of the same kernels with other arguments it is brought up
    /// to date: that takes a fraction of the time.
    ///
    /// # Errors
    /// If `launch` fails or does nothing, or what it does cannot be recorded.
    pub(super) fn record(stream: &Arc<CudaStream>, last: Option<Self>, launch: impl FnOnce() -> Result<()>) -> Result<Self> {
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let launched = launch();
        // Ends the recording whatever came of it, or the stream could do nothing else.
        // SAFETY: the stream is there, and it records.
        let recording = unsafe { result::stream::end_capture(stream.cu_stream()) }.w().map(Recording);
        launched?;
        let recording = recording?;
        if recording.0.is_null() {
            bail!("cuda: nothing was recorded");
        }
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
