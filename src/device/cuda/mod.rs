//! CUDA devices through the driver API, loaded at run time.
//!
//! A [`CudaDevice`] lives on the device's primary context, the one that the CUDA runtime and PyTorch use,
//! so that foreign pointers and streams mean the same thing here. Functions that need a current context
//! make it current for the duration of the call and leave the calling thread as they found it.

mod copies;
mod driver;
mod graph;
mod launch;
mod memory;
mod module;
mod pinned;

use std::ffi::c_void;
use std::fmt;
use std::sync::{PoisonError, RwLock};

use cudarc::driver::sys;
use rustix::thread::CpuSet;

pub use graph::Graph;
pub use launch::LaunchConfig;
pub(crate) use launch::launch;
pub(crate) use module::{Function, Library};

use super::{Backend, CopyBatch, CopyRegion, DeviceInfo, DeviceKind, PitchedCopy, Task, numa};
use crate::error::{Error, ErrorKind, Result};
use driver::{Driver, Failure};

/// A CUDA device on its primary context.
pub struct CudaDevice {
    driver: &'static Driver,
    ordinal: usize,
    device: i32,
    context: sys::CUcontext,
    info: DeviceInfo,
    /// Addresses at which two registrations of one pinned buffer meet: no single copy may cross one.
    seams: RwLock<Vec<u64>>,
    /// Bytes of pinned memory per registration with the driver.
    registration_bytes: usize,
    /// Processors of the device's NUMA node, where it is known.
    near: Option<CpuSet>,
}

// SAFETY: the driver API is thread safe, and the context handle may be used from any thread.
unsafe impl Send for CudaDevice {}
// SAFETY: as above.
unsafe impl Sync for CudaDevice {}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice").field("ordinal", &self.ordinal).finish_non_exhaustive()
    }
}

impl CudaDevice {
    /// Opens the device of this ordinal, retaining its primary context.
    ///
    /// # Errors
    /// `NoDriver`, `DriverTooOld`, `NoDevice`, or the driver's own error.
    pub fn open(ordinal: usize) -> Result<Self> {
        let driver = Driver::get()?;
        let count = driver.count()?;
        if ordinal >= count {
            return Err(Error::new("open device", ErrorKind::NoDevice { ordinal, count }));
        }
        let mut device = 0;
        // SAFETY: the pointer is to a live integer; the ordinal is below the count.
        unsafe { driver.device_get(&mut device, ordinal as i32)? };
        let info = describe(driver, device)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the pointer is to a live handle; `drop` releases what is retained here.
        unsafe { driver.primary_ctx_retain(&mut context, device)? };
        Ok(Self {
            driver,
            ordinal,
            device,
            context,
            info,
            seams: RwLock::default(),
            registration_bytes: pinned::REGISTRATION_BYTES,
            near: bus_id(driver, device).and_then(|id| numa::near(&id)),
        })
    }

    /// How many devices the driver lists.
    ///
    /// # Errors
    /// `NoDriver`, `DriverTooOld`, or the driver's own error.
    pub fn count() -> Result<usize> {
        Ok(Driver::get()?.count()?)
    }

    /// Ordinal of the device.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Addresses in ascending order that no single copy of the driver may cross: where two registrations of one
    /// pinned buffer meet. [`StreamRef::copy`](crate::device::StreamRef::copy) splits there; kernels need not.
    pub fn pinned_edges(&self, edges: &mut Vec<u64>) {
        edges.clear();
        edges.extend_from_slice(&self.seams.read().unwrap_or_else(PoisonError::into_inner));
    }

    /// Free device memory in bytes at this moment.
    pub fn free_bytes(&self) -> Result<u64> {
        let _current = self.make_current()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both pointers are to live integers.
        unsafe { self.driver.mem_get_info(&mut free, &mut total)? };
        Ok(free as u64)
    }

    /// Makes the primary context current on this thread until the guard is dropped.
    fn make_current(&self) -> Result<Current, Failure> {
        let mut current = std::ptr::null_mut();
        // SAFETY: the pointer is to a live handle.
        unsafe { self.driver.ctx_get_current(&mut current)? };
        let pushed = current != self.context;
        if pushed {
            // SAFETY: the context is retained as long as `self` lives.
            unsafe { self.driver.ctx_push_current(self.context)? };
        }
        Ok(Current { driver: self.driver, pushed })
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`. Nothing can be done about a failure.
        let _ = unsafe { self.driver.primary_ctx_release(self.device) };
    }
}

/// The primary context is current while this lives.
#[must_use]
struct Current {
    driver: &'static Driver,
    pushed: bool,
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: pops what `make_current` pushed on this thread.
            let _ = unsafe { self.driver.ctx_pop_current(&mut popped) };
        }
    }
}

fn describe(driver: &Driver, device: i32) -> Result<DeviceInfo, Failure> {
    use sys::CUdevice_attribute_enum as Attribute;
    let attribute = |which: Attribute| -> Result<u32, Failure> {
        let mut value = 0;
        // SAFETY: the pointer is to a live integer and the device exists.
        unsafe { driver.device_get_attribute(&mut value, which as u32, device)? };
        Ok(value as u32)
    };
    let mut name = [0u8; 256];
    let mut memory = 0;
    // SAFETY: the buffer and its length belong together; the integer is live; the device exists.
    unsafe {
        driver.device_get_name(name.as_mut_ptr().cast(), name.len() as i32, device)?;
        driver.device_total_mem(&mut memory, device)?;
    }
    let length = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    Ok(DeviceInfo {
        kind: DeviceKind::Cuda,
        name: String::from_utf8_lossy(&name[..length]).into_owned(),
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory_bytes: memory as u64,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as u64,
        shared_memory_bytes: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?,
        driver_version: driver.version()?,
    })
}

/// The PCI address of a device, as sysfs has it.
fn bus_id(driver: &Driver, device: i32) -> Option<String> {
    let mut text = [0u8; 32];
    // SAFETY: the buffer and its length belong together; the device exists.
    unsafe {
        driver.device_get_pci_bus_id(text.as_mut_ptr().cast(), text.len() as i32, device).ok()?
    };
    let length = text.iter().position(|&byte| byte == 0)?;
    std::str::from_utf8(&text[..length]).ok().map(str::to_owned)
}

// SAFETY: every function is the driver call of that meaning on the primary context; handles are the
// driver's own.
unsafe impl Backend for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.alloc_device(bytes)
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.free_device(address) }
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<u64> {
        self.map_pinned(bytes)
    }

    unsafe fn free_pinned(&self, address: u64, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.unmap_pinned(address, bytes) }
    }

    fn synchronize(&self) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: plain call.
        Ok(unsafe { self.driver.ctx_synchronize() }?)
    }

    fn stream_create(&self) -> Result<*mut c_void> {
        let _current = self.make_current()?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is to a live handle.
        unsafe { self.driver.stream_create(&mut stream, flags)? };
        Ok(stream.cast())
    }

    unsafe fn stream_destroy(&self, stream: *mut c_void) {
        if let Ok(_current) = self.make_current() {
            // SAFETY: the caller's promise. Nothing can be done about a failure.
            let _ = unsafe { self.driver.stream_destroy(stream.cast()) };
        }
    }

    unsafe fn stream_synchronize(&self, stream: *mut c_void) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: the caller's promise.
        Ok(unsafe { self.driver.stream_synchronize(stream.cast()) }?)
    }

    fn event_create(&self, timed: bool) -> Result<*mut c_void> {
        use sys::CUevent_flags_enum as Flags;
        let _current = self.make_current()?;
        let flags = if timed { Flags::CU_EVENT_DEFAULT } else { Flags::CU_EVENT_DISABLE_TIMING };
        let mut event = std::ptr::null_mut();
        // SAFETY: the pointer is to a live handle.
        unsafe { self.driver.event_create(&mut event, flags as u32)? };
        Ok(event.cast())
    }

    unsafe fn event_destroy(&self, event: *mut c_void) {
        if let Ok(_current) = self.make_current() {
            // SAFETY: the caller's promise. Nothing can be done about a failure.
            let _ = unsafe { self.driver.event_destroy(event.cast()) };
        }
    }

    unsafe fn event_record(&self, event: *mut c_void, stream: *mut c_void) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: the caller's promise.
        Ok(unsafe { self.driver.event_record(event.cast(), stream.cast()) }?)
    }

    unsafe fn event_is_complete(&self, event: *mut c_void) -> Result<bool> {
        let _current = self.make_current()?;
        // SAFETY: the caller's promise.
        match unsafe { self.driver.event_query(event.cast()) } {
            Ok(()) => Ok(true),
            Err(Failure { code: driver::NOT_READY, .. }) => Ok(false),
            Err(failure) => Err(failure.into()),
        }
    }

    unsafe fn event_synchronize(&self, event: *mut c_void) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: the caller's promise.
        Ok(unsafe { self.driver.event_synchronize(event.cast()) }?)
    }

    unsafe fn event_elapsed_ms(&self, start: *mut c_void, end: *mut c_void) -> Result<f32> {
        let _current = self.make_current()?;
        let mut ms = 0.0;
        // SAFETY: the caller's promise; the pointer is to a live float.
        unsafe { self.driver.event_elapsed_time(&mut ms, start.cast(), end.cast())? };
        Ok(ms)
    }

    unsafe fn stream_wait_event(&self, stream: *mut c_void, event: *mut c_void) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: the caller's promise.
        Ok(unsafe { self.driver.stream_wait_event(stream.cast(), event.cast(), 0) }?)
    }

    unsafe fn copy(&self, region: CopyRegion, stream: *mut c_void) -> Result<()> {
        let _current = self.make_current()?;
        let seams = self.seams.read().unwrap_or_else(PoisonError::into_inner);
        let CopyRegion { mut src, mut dst, mut bytes } = region;
        while bytes > 0 {
            let part =
                pinned::until_seam(&seams, src, bytes).min(pinned::until_seam(&seams, dst, bytes));
            // SAFETY: the caller's promise, for a part of the ranges.
            unsafe { self.driver.memcpy_async(dst, src, part, stream.cast())? };
            src += part as u64;
            dst += part as u64;
            bytes -= part;
        }
        Ok(())
    }

    unsafe fn copy_batch(&self, batch: &CopyBatch<'_>, stream: *mut c_void) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.copy_many(batch, stream) }
    }

    unsafe fn copy_pitched(&self, copy: &PitchedCopy, stream: *mut c_void) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.copy_rows(copy, stream) }
    }

    unsafe fn fill(&self, address: u64, byte: u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        let _current = self.make_current()?;
        let seams = self.seams.read().unwrap_or_else(PoisonError::into_inner);
        let (mut address, mut bytes) = (address, bytes);
        while bytes > 0 {
            let part = pinned::until_seam(&seams, address, bytes);
            // SAFETY: the caller's promise, for a part of the range.
            unsafe { self.driver.memset_d8_async(address, byte, part, stream.cast())? };
            address += part as u64;
            bytes -= part;
        }
        Ok(())
    }

    unsafe fn submit(&self, _task: Task, _stream: *mut c_void) -> Result<()> {
        Err(Error::invalid("submit", "closures run on the CPU device only"))
    }

    fn as_cuda(&self) -> Option<&CudaDevice> {
        Some(self)
    }
}
