//! Devices: memory, streams and events, on a CUDA GPU or on the CPU, behind one small trait.
//!
//! A [`Device`] is a cheap handle. Owned objects ([`DeviceBuffer`], [`PinnedBuffer`], [`Stream`],
//! [`Event`]) keep it alive and release themselves; foreign streams and pointers are used as they are,
//! by [`StreamRef`] and plain addresses. Addresses are `u64` on both devices: on the CPU device "device
//! memory" is host memory and kernels are closures; [`cpu`] says when they run.

mod cgroup;
pub mod cpu;
pub mod cuda;
pub(crate) mod host;
mod memory;
mod numa;
mod stream;

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

pub use memory::{DeviceBuffer, PinnedBuffer, Span};
pub use stream::{CopyBatch, CopyRegion, Event, PitchedCopy, Stream, StreamRef};

use crate::error::Result;

/// Which kind of device a [`Device`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The host processor, running the reference code.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Kind of the device.
    pub kind: DeviceKind,
    /// Marketing name, or the processor's.
    pub name: String,
    /// Compute capability, `(0, 0)` on the CPU.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors, or processor cores.
    pub multiprocessors: u32,
    /// Device memory in bytes (host memory on the CPU).
    pub memory_bytes: u64,
    /// L2 cache in bytes (0 on the CPU).
    pub l2_bytes: u64,
    /// Shared memory a CTA may opt in to, in bytes (0 on the CPU).
    pub shared_memory_bytes: u32,
    /// CUDA version of the driver as `1000 * major + 10 * minor` (0 on the CPU).
    pub driver_version: u32,
}

/// A kernel of the CPU device: what it does once its stream gets to it.
pub type Task = Box<dyn FnOnce() + Send>;

/// The operations every device offers. Raw handles; the owned types below give them lifetimes.
///
/// # Safety
/// Implementations must keep what each function promises; handles passed in must come from the same
/// device and be live.
pub unsafe trait Backend: Send + Sync {
    /// What the device is.
    fn info(&self) -> &DeviceInfo;
    /// Device memory, at least 256-byte aligned, uninitialised.
    fn alloc(&self, bytes: usize) -> Result<u64>;
    /// Frees [`Backend::alloc`] memory after all work submitted to the device has finished with it.
    ///
    /// # Safety
    /// `address` comes from `alloc` and is not used afterwards.
    unsafe fn free(&self, address: u64, bytes: usize);
    /// Page-locked host memory, mapped at the same address on the device, zeroed, 4 KiB aligned.
    fn alloc_pinned(&self, bytes: usize) -> Result<u64>;
    /// Frees [`Backend::alloc_pinned`] memory.
    ///
    /// # Safety
    /// `address` comes from `alloc_pinned` and is not used afterwards, by the device neither.
    unsafe fn free_pinned(&self, address: u64, bytes: usize);
    /// Blocks until all work submitted to the device is done.
    fn synchronize(&self) -> Result<()>;
    /// A new non-blocking stream.
    fn stream_create(&self) -> Result<*mut c_void>;
    /// Destroys a stream once its work is done.
    ///
    /// # Safety
    /// `stream` comes from `stream_create` and is not used afterwards.
    unsafe fn stream_destroy(&self, stream: *mut c_void);
    /// Blocks until all work of the stream is done.
    ///
    /// # Safety
    /// `stream` is live.
    unsafe fn stream_synchronize(&self, stream: *mut c_void) -> Result<()>;
    /// A new event; `timed` ones can be passed to [`Backend::event_elapsed_ms`].
    fn event_create(&self, timed: bool) -> Result<*mut c_void>;
    /// Destroys an event.
    ///
    /// # Safety
    /// `event` comes from `event_create` and is not used afterwards.
    unsafe fn event_destroy(&self, event: *mut c_void);
    /// Records the event behind all work submitted to the stream so far.
    ///
    /// # Safety
    /// Both handles are live.
    unsafe fn event_record(&self, event: *mut c_void, stream: *mut c_void) -> Result<()>;
    /// Whether the work before the last record is done; true when never recorded.
    ///
    /// # Safety
    /// `event` is live.
    unsafe fn event_is_complete(&self, event: *mut c_void) -> Result<bool>;
    /// Blocks the calling thread until the event is complete.
    ///
    /// # Safety
    /// `event` is live.
    unsafe fn event_synchronize(&self, event: *mut c_void) -> Result<()>;
    /// Milliseconds between two recorded, timed, complete events.
    ///
    /// # Safety
    /// Both events are live and were created as timed.
    unsafe fn event_elapsed_ms(&self, start: *mut c_void, end: *mut c_void) -> Result<f32>;
    /// Makes later work of the stream wait for the event, without blocking the host.
    ///
    /// # Safety
    /// Both handles are live.
    unsafe fn stream_wait_event(&self, stream: *mut c_void, event: *mut c_void) -> Result<()>;
    /// Copies in stream order between device and pinned host memory, in any direction. Pageable host
    /// memory is allowed on either side; the driver may then block the calling thread.
    ///
    /// # Safety
    /// The ranges do not overlap. Until the stream has passed the copy both are valid, nothing writes
    /// the source, and nothing reads or writes the destination.
    unsafe fn copy(&self, region: CopyRegion, stream: *mut c_void) -> Result<()>;
    /// Copies many fragments in stream order, by one call where the driver has such a call.
    ///
    /// # Safety
    /// As for [`Backend::copy`], for every fragment; the destinations overlap nothing else of the batch.
    unsafe fn copy_batch(&self, batch: &CopyBatch<'_>, stream: *mut c_void) -> Result<()>;
    /// Copies rows in stream order by one call.
    ///
    /// # Safety
    /// As for [`Backend::copy`], for every row.
    unsafe fn copy_pitched(&self, copy: &PitchedCopy, stream: *mut c_void) -> Result<()>;
    /// Fills device or pinned memory with a byte, in stream order.
    ///
    /// # Safety
    /// Until the stream has passed the fill the range is valid and nothing reads or writes it.
    unsafe fn fill(&self, address: u64, byte: u8, bytes: usize, stream: *mut c_void) -> Result<()>;
    /// Runs a task in stream order: how kernels reach the CPU device. CUDA devices refuse.
    ///
    /// # Safety
    /// `stream` is live, and what the task touches is valid until the stream has passed it.
    unsafe fn submit(&self, task: Task, stream: *mut c_void) -> Result<()>;
    /// The CUDA side of the device, or `None` on the CPU.
    fn as_cuda(&self) -> Option<&cuda::CudaDevice> {
        None
    }
}

/// A device to allocate on and to submit work to. Clones are handles to the same device.
#[derive(Clone)]
pub struct Device {
    backend: Arc<dyn Backend>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(self.info()).finish()
    }
}

impl Device {
    /// The CPU device: always there, runs every operation from the reference code at submission.
    pub fn cpu() -> Self {
        Self { backend: Arc::new(cpu::CpuDevice::eager()) }
    }

    /// A CPU device that runs submitted work late and in an order across streams drawn from `seed`,
    /// bound only by stream order and event waits: a missing wait corrupts bytes under some seed.
    pub fn cpu_deferred(seed: u64) -> Self {
        Self { backend: Arc::new(cpu::CpuDevice::deferred(seed)) }
    }

    /// The CUDA device of this ordinal, on its primary context.
    ///
    /// # Errors
    /// `NoDriver`, `DriverTooOld`, `NoDevice`, or the driver's own error.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self { backend: Arc::new(cuda::CudaDevice::open(ordinal)?) })
    }

    /// How many CUDA devices the driver lists.
    ///
    /// # Errors
    /// `NoDriver`, `DriverTooOld`, or the driver's own error.
    pub fn cuda_count() -> Result<usize> {
        cuda::CudaDevice::count()
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        self.backend.info()
    }

    /// Whether this is a CUDA device.
    pub fn is_cuda(&self) -> bool {
        self.info().kind == DeviceKind::Cuda
    }

    /// The raw operations.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Uninitialised device memory, at least 256-byte aligned. Zero bytes are allowed.
    pub fn alloc(&self, bytes: usize) -> Result<DeviceBuffer> {
        let address = if bytes == 0 { 0 } else { self.backend.alloc(bytes)? };
        Ok(DeviceBuffer { device: self.clone(), address, bytes })
    }

    /// Device memory filled from a host slice (blocking).
    pub fn upload<T: bytemuck::Pod>(&self, data: &[T]) -> Result<DeviceBuffer> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let buffer = self.alloc(bytes.len())?;
        // SAFETY: the slice is borrowed and the buffer is new; both outlive this call.
        unsafe { self.copy_blocking(bytes.as_ptr() as u64, buffer.address(), bytes.len())? };
        Ok(buffer)
    }

    /// Copies on a stream of its own and waits for it.
    ///
    /// # Safety
    /// As for [`StreamRef::copy`], until this returns.
    unsafe fn copy_blocking(&self, src: u64, dst: u64, bytes: usize) -> Result<()> {
        let stream = self.stream()?;
        // SAFETY: passed on from the caller.
        let submitted = unsafe { stream.as_ref().copy(src, dst, bytes) };
        // Also after a failure: part of the copy may be under way.
        submitted.and(stream.as_ref().synchronize())
    }

    /// Blocks until all work submitted to the device is done.
    pub fn synchronize(&self) -> Result<()> {
        self.backend.synchronize()
    }

    /// Whether both handles are of the same device, so that streams, events and memory may be mixed.
    pub fn is_same(&self, other: &Device) -> bool {
        match (self.backend.as_cuda(), other.backend.as_cuda()) {
            (Some(a), Some(b)) => a.ordinal() == b.ordinal(),
            _ => Arc::ptr_eq(&self.backend, &other.backend),
        }
    }

    /// Zeroed, page-locked host memory that the device reads and writes at the same address.
    pub fn alloc_pinned(&self, bytes: usize) -> Result<PinnedBuffer> {
        let address = if bytes == 0 { 0 } else { self.backend.alloc_pinned(bytes)? };
        Ok(PinnedBuffer { device: self.clone(), address, bytes })
    }

    /// Addresses that no single driver copy may cross; see [`cuda::CudaDevice::pinned_edges`]. None on the CPU.
    pub fn pinned_edges(&self, edges: &mut Vec<u64>) {
        edges.clear();
        if let Some(cuda) = self.backend.as_cuda() {
            cuda.pinned_edges(edges);
        }
    }

    /// A new stream.
    pub fn stream(&self) -> Result<Stream> {
        Ok(Stream { raw: self.backend.stream_create()?, device: self.clone() })
    }

    /// A new event for ordering work.
    pub fn event(&self) -> Result<Event> {
        Ok(Event { raw: self.backend.event_create(false)?, device: self.clone() })
    }

    /// A new event that also takes the time.
    pub fn timed_event(&self) -> Result<Event> {
        Ok(Event { raw: self.backend.event_create(true)?, device: self.clone() })
    }

    /// A stream of somebody else, by its raw handle (`CUstream` / `cudaStream_t`).
    ///
    /// # Safety
    /// `raw` is a live stream of this device's context for as long as the reference is used. The null
    /// (legacy default) stream is allowed.
    pub unsafe fn foreign_stream(&self, raw: *mut c_void) -> StreamRef<'_> {
        StreamRef { raw, device: self }
    }
}
