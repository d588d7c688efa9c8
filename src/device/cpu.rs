//! The CPU device: host memory, streams that execute at submission.

use std::ffi::c_void;

use super::{Backend, CopyRegion, DeviceInfo};
use crate::error::Result;

/// The CPU as a device.
pub struct CpuDevice {
    info: DeviceInfo,
}

impl CpuDevice {
    /// The CPU device.
    pub fn new() -> Self {
        todo!()
    }
}

// SAFETY: stub.
unsafe impl Backend for CpuDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn alloc(&self, _bytes: usize) -> Result<u64> {
        todo!()
    }
    unsafe fn free(&self, _address: u64, _bytes: usize) {
        todo!()
    }
    fn alloc_pinned(&self, _bytes: usize) -> Result<u64> {
        todo!()
    }
    unsafe fn free_pinned(&self, _address: u64, _bytes: usize) {
        todo!()
    }
    fn stream_create(&self) -> Result<*mut c_void> {
        todo!()
    }
    unsafe fn stream_destroy(&self, _stream: *mut c_void) {
        todo!()
    }
    unsafe fn stream_synchronize(&self, _stream: *mut c_void) -> Result<()> {
        todo!()
    }
    fn event_create(&self, _timed: bool) -> Result<*mut c_void> {
        todo!()
    }
    unsafe fn event_destroy(&self, _event: *mut c_void) {
        todo!()
    }
    unsafe fn event_record(&self, _event: *mut c_void, _stream: *mut c_void) -> Result<()> {
        todo!()
    }
    unsafe fn event_is_complete(&self, _event: *mut c_void) -> Result<bool> {
        todo!()
    }
    unsafe fn event_synchronize(&self, _event: *mut c_void) -> Result<()> {
        todo!()
    }
    unsafe fn event_elapsed_ms(&self, _start: *mut c_void, _end: *mut c_void) -> Result<f32> {
        todo!()
    }
    unsafe fn stream_wait_event(&self, _stream: *mut c_void, _event: *mut c_void) -> Result<()> {
        todo!()
    }
    unsafe fn copy(&self, _region: CopyRegion, _stream: *mut c_void) -> Result<()> {
        todo!()
    }
    unsafe fn fill(
        &self,
        _address: u64,
        _byte: u8,
        _bytes: usize,
        _stream: *mut c_void,
    ) -> Result<()> {
        todo!()
    }
}
