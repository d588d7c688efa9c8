//! Device memory.

use super::CudaDevice;
use super::driver::{Failure, OUT_OF_MEMORY};
use crate::error::{Error, ErrorKind, Result};

impl CudaDevice {
    pub(super) fn alloc_device(&self, bytes: usize) -> Result<u64> {
        let _current = self.make_current()?;
        let mut address = 0;
        // SAFETY: the pointer is to a live address.
        match unsafe { self.driver.mem_alloc(&mut address, bytes) } {
            Ok(()) => Ok(address),
            Err(Failure { code: OUT_OF_MEMORY, .. }) => {
                let free = self.free_bytes().map_or("unknown".into(), |b| format!("{b} bytes"));
                let reason = format!(
                    "{} has {} bytes in all, {free} free now",
                    self.info.name, self.info.memory_bytes
                );
                Err(out_of_memory("device", bytes, reason))
            }
            Err(failure) => Err(failure.into()),
        }
    }

    /// # Safety
    /// `address` comes from `alloc_device` and is not used afterwards.
    pub(super) unsafe fn free_device(&self, address: u64) {
        if let Ok(_current) = self.make_current() {
            // SAFETY: the caller's promise. The driver waits for all work of the device before it gives
            // the memory back. (Waiting here as well would invalidate captures of other threads.) Nothing
            // can be done about a failure.
            let _ = unsafe { self.driver.mem_free(address) };
        }
    }
}

pub(super) fn out_of_memory(kind: &'static str, bytes: usize, reason: String) -> Error {
    Error::new("alloc", ErrorKind::OutOfMemory { kind, requested: bytes as u64, reason })
}
