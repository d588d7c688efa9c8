//! Memory that releases itself, and address ranges that launchers check.

use super::Device;
use crate::error::{Error, ErrorKind, Result};

/// Owned device memory. Dropping it waits for the device before the memory is given back.
pub struct DeviceBuffer {
    pub(super) device: Device,
    pub(super) address: u64,
    pub(super) bytes: usize,
}

impl DeviceBuffer {
    /// Device address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The buffer as an address range.
    pub fn span(&self) -> Span {
        Span { address: self.address, bytes: self.bytes as u64 }
    }

    /// Copies the buffer to the host as values of `T` (blocking). Work of other streams that writes the
    /// buffer must be done; this waits for its own copy only.
    ///
    /// # Errors
    /// The length is no multiple of `T`, or the copy fails.
    pub fn download<T: bytemuck::Pod>(&self) -> Result<Vec<T>> {
        let size = size_of::<T>();
        if size == 0 || !self.bytes.is_multiple_of(size) {
            return Err(Error::invalid(
                "download",
                format!(
                    "a buffer of {} bytes holds no whole number of {size}-byte values",
                    self.bytes
                ),
            ));
        }
        let mut values = vec![T::zeroed(); self.bytes / size];
        // SAFETY: `values` is as long as the buffer, any bytes make a `T`, and both outlive this call.
        unsafe {
            self.device.copy_blocking(self.address, values.as_mut_ptr() as u64, self.bytes)?;
        }
        Ok(values)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: the address came from `alloc` of this device and is dropped once.
            unsafe { self.device.backend.free(self.address, self.bytes) }
        }
    }
}

/// Owned page-locked host memory, visible to the device at the same address.
pub struct PinnedBuffer {
    pub(super) device: Device,
    pub(super) address: u64,
    pub(super) bytes: usize,
}

impl PinnedBuffer {
    /// Address of the first byte, for host and device alike.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The buffer as an address range.
    pub fn span(&self) -> Span {
        Span { address: self.address, bytes: self.bytes as u64 }
    }

    /// The bytes. What a device is writing at this moment may be seen torn; order reads behind an event.
    pub fn as_slice(&self) -> &[u8] {
        if self.bytes == 0 {
            return &[];
        }
        // SAFETY: the allocation is live, initialised (zeroed when made) and `bytes` long.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) }
    }

    /// The bytes, to write to.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        if self.bytes == 0 {
            return &mut [];
        }
        // SAFETY: as in `as_slice`; the exclusive borrow is of the only owner.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: the address came from `alloc_pinned` of this device and is dropped once.
            unsafe { self.device.backend.free_pinned(self.address, self.bytes) }
        }
    }
}

/// An address range of a device's address space: what a launcher checks strides against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    /// Address of the first byte; 0 stands for "not given" where that is allowed.
    pub address: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Span {
    /// The range `[address, address + bytes)`.
    pub const fn new(address: u64, bytes: u64) -> Self {
        Self { address, bytes }
    }

    /// Whether nothing was given.
    pub fn is_null(&self) -> bool {
        self.address == 0
    }

    /// Checks that the range holds `needed` bytes and starts at a multiple of `align`.
    ///
    /// # Errors
    /// `InvalidArgument`, naming `what`, what was given and what is needed.
    pub fn check(&self, op: &'static str, what: &str, needed: u64, align: u64) -> Result<()> {
        if needed > 0 && self.is_null() {
            return Err(Error::new(op, ErrorKind::InvalidArgument(format!("{what} is null"))));
        }
        if !self.address.is_multiple_of(align) {
            return Err(Error::invalid(
                op,
                format!("{what} at {:#x} is not aligned to {align} bytes", self.address),
            ));
        }
        if self.bytes < needed {
            return Err(Error::invalid(
                op,
                format!("{what} has {} bytes, {needed} are needed", self.bytes),
            ));
        }
        Ok(())
    }
}
