//! CUDA graphs: work captured from a stream once, replayed with one launch.

use cudarc::driver::sys;

use super::CudaDevice;
use super::driver::Driver;
use crate::device::{Device, StreamRef};
use crate::error::{Error, Result};

const OP: &str = "graph";

/// Work captured from a stream, ready to be launched any number of times.
///
/// Kernel parameters are frozen at capture; the device arrays they point to are read anew by every launch.
pub struct Graph {
    device: Device,
    driver: &'static Driver,
    exec: sys::CUgraphExec,
}

// SAFETY: an executable graph may be used from any thread, one at a time; launches take `&self` only to
// enqueue it, which the driver serialises.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `work` submits to `stream` (and to streams joined to it by events), without running
    /// it. Meanwhile no thread may wait for the whole device, which dropping pinned memory, graphs and
    /// kernels does too: the driver would give the capture up.
    ///
    /// # Errors
    /// The stream is not of a CUDA device, `work` fails (its own error), or it did something that cannot
    /// be captured, such as allocating or synchronising.
    pub fn capture(
        stream: StreamRef<'_>,
        work: impl FnOnce(StreamRef<'_>) -> Result<()>,
    ) -> Result<Self> {
        let device = stream.device();
        let cuda = cuda_of(device)?;
        let driver = cuda.driver;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as u32;
        let _current = cuda.make_current()?;
        // SAFETY: the stream is live while it is borrowed.
        unsafe { driver.stream_begin_capture(stream.raw().cast(), mode) }
            .map_err(|failure| failure.error(OP))?;
        let submitted = work(stream);
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream is capturing; the pointer is to a live handle.
        let ended = unsafe { driver.stream_end_capture(stream.raw().cast(), &mut graph) };
        let graph = Captured { driver, graph };
        submitted?;
        ended.map_err(|failure| failure.error(OP))?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph was just captured; the pointer is to a live handle.
        unsafe { driver.graph_instantiate(&mut exec, graph.graph, 0) }
            .map_err(|failure| failure.error(OP))?;
        Ok(Self { device: device.clone(), driver, exec })
    }

    /// Enqueues the captured work on a stream of the same device.
    ///
    /// # Safety
    /// What the captured work touches is valid until the stream has passed the launch.
    pub unsafe fn launch(&self, stream: StreamRef<'_>) -> Result<()> {
        stream.check_same(OP, &self.device)?;
        let _current = cuda_of(&self.device)?.make_current()?;
        // SAFETY: the graph is instantiated, the stream is live while it is borrowed.
        unsafe { self.driver.graph_launch(self.exec, stream.raw().cast()) }
            .map_err(|failure| failure.error(OP))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.device.synchronize();
        // SAFETY: instantiated once. Nothing can be done about a failure.
        let _ = unsafe { self.driver.graph_exec_destroy(self.exec) };
    }
}

/// A captured graph, or none after a failed capture.
struct Captured {
    driver: &'static Driver,
    graph: sys::CUgraph,
}

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.graph.is_null() {
            // SAFETY: captured once. Nothing can be done about a failure.
            let _ = unsafe { self.driver.graph_destroy(self.graph) };
        }
    }
}

fn cuda_of(device: &Device) -> Result<&CudaDevice> {
    device
        .backend()
        .as_cuda()
        .ok_or_else(|| Error::unsupported(OP, "device", "CPU", "CUDA devices"))
}
