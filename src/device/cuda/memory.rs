//! Device memory and page-locked host memory.
//!
//! Pinned memory is anonymous memory of ours, registered with the driver: huge pages where the system
//! gives them and pages touched by several threads make that 3 to 5 times faster than `cuMemHostAlloc`.
//! It is registered in chunks, and all chunks are undone when one fails. Copies must not cross the seam
//! between two chunks (the driver refuses them), so the device keeps the list of seams.

use std::ffi::c_void;
use std::sync::PoisonError;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::driver::{Failure, OUT_OF_MEMORY};
use super::{Backend, CudaDevice};
use crate::device::host;
use crate::error::{Error, ErrorKind, Result};

const PAGE: usize = 4096;
/// Bytes per registration. The driver overflows on single registrations of some hundred GiB.
pub(super) const REGISTRATION_BYTES: usize = 16 << 30;
/// `CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP`.
const REGISTER_FLAGS: u32 = 0x01 | 0x02;
/// Bytes one thread touches at least; fewer are not worth a thread.
const TOUCH_BYTES_PER_THREAD: usize = 64 << 20;
const MAX_TOUCH_THREADS: usize = 16;

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

    pub(super) fn map_pinned(&self, bytes: usize) -> Result<u64> {
        const KIND: &str = "pinned host";
        let refused = |reason: String| {
            out_of_memory(KIND, bytes, format!("{reason}; {}", host::describe_limits()))
        };
        // Touching more than there is ends the process, not the call.
        if host::available_bytes().is_some_and(|available| bytes as u64 > available) {
            return Err(refused("the machine has less available".into()));
        }
        let length = mapped_bytes(bytes).ok_or_else(|| refused("the size overflows".into()))?;
        // SAFETY: a new anonymous mapping, at an address of the kernel's choice.
        let pointer = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(|error| refused(format!("mmap failed: {error}")))?;
        // SAFETY: the range was just mapped. Huge pages are an optimisation: refusal changes nothing.
        let _ = unsafe { madvise(pointer, length, Advice::LinuxHugepage) };
        first_touch(pointer as usize, length);
        match self.register(pointer, length) {
            Ok(()) => Ok(pointer as u64),
            Err(error) => {
                // SAFETY: mapped above, registered nowhere any more.
                let _ = unsafe { munmap(pointer, length) };
                Err(match error {
                    Unregistered::Refused(failure) => refused(failure.error("alloc").to_string()),
                    Unregistered::Aliased => Error::unsupported(
                        "alloc",
                        "pinned memory",
                        "at different host and device addresses",
                        "platforms where the device uses host addresses of registered memory",
                    ),
                })
            }
        }
    }

    /// # Safety
    /// `address` comes from `map_pinned(bytes)` and is not used afterwards, by the device neither.
    pub(super) unsafe fn unmap_pinned(&self, address: u64, bytes: usize) {
        let _ = self.synchronize();
        let Some(length) = mapped_bytes(bytes) else { return };
        self.unregister(address as *mut c_void, length);
        // SAFETY: the caller's promise: mapped by `map_pinned` with this length.
        let _ = unsafe { munmap(address as *mut c_void, length) };
    }

    /// Registers `[pointer, pointer + length)` chunk by chunk: all of it or nothing.
    fn register(&self, pointer: *mut c_void, length: usize) -> Result<(), Unregistered> {
        let _current = self.make_current().map_err(Unregistered::Refused)?;
        for offset in (0..length).step_by(self.registration_bytes) {
            let chunk = pointer.wrapping_byte_add(offset);
            let result = self.register_chunk(chunk, self.registration_bytes.min(length - offset));
            if let Err(error) = result {
                self.unregister(pointer, offset);
                return Err(error);
            }
        }
        let mut seams = self.seams.write().unwrap_or_else(PoisonError::into_inner);
        let offsets = (0..length).step_by(self.registration_bytes);
        seams.extend(offsets.skip(1).map(|offset| pointer as u64 + offset as u64));
        seams.sort_unstable();
        Ok(())
    }

    fn register_chunk(&self, chunk: *mut c_void, length: usize) -> Result<(), Unregistered> {
        let mut alias = 0;
        // SAFETY: the range is mapped memory of ours; the pointer is to a live address.
        unsafe {
            self.driver
                .mem_host_register(chunk, length, REGISTER_FLAGS)
                .map_err(Unregistered::Refused)?;
            let asked = self.driver.mem_host_get_device_pointer(&mut alias, chunk, 0);
            if asked.is_err() || alias != chunk as u64 {
                let _ = self.driver.mem_host_unregister(chunk);
                return Err(Unregistered::Aliased);
            }
        }
        Ok(())
    }

    /// Undoes `register` for the chunks in the first `length` bytes, last one first.
    fn unregister(&self, pointer: *mut c_void, length: usize) {
        let Ok(_current) = self.make_current() else { return };
        for offset in (0..length).step_by(self.registration_bytes).rev() {
            // SAFETY: a chunk that was registered. Nothing can be done about a failure.
            let _ = unsafe { self.driver.mem_host_unregister(pointer.wrapping_byte_add(offset)) };
        }
        let range = pointer as u64..pointer as u64 + length as u64;
        let mut seams = self.seams.write().unwrap_or_else(PoisonError::into_inner);
        seams.retain(|seam| !range.contains(seam));
    }
}

/// Why host memory could not be registered.
enum Unregistered {
    Refused(Failure),
    Aliased,
}

fn out_of_memory(kind: &'static str, bytes: usize, reason: String) -> Error {
    Error::new("alloc", ErrorKind::OutOfMemory { kind, requested: bytes as u64, reason })
}

fn mapped_bytes(bytes: usize) -> Option<usize> {
    bytes.checked_next_multiple_of(PAGE)
}

/// Makes the system back every page of fresh memory, from several threads: faults are what pinning costs.
fn first_touch(address: usize, length: usize) {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = length.div_ceil(TOUCH_BYTES_PER_THREAD).min(cores).clamp(1, MAX_TOUCH_THREADS);
    let share = length.div_ceil(threads).next_multiple_of(PAGE);
    std::thread::scope(|scope| {
        for start in (0..length).step_by(share) {
            scope.spawn(move || {
                for offset in (start..length.min(start + share)).step_by(PAGE) {
                    // SAFETY: inside the fresh mapping, which no one else knows yet.
                    unsafe { ((address + offset) as *mut u8).write_volatile(0) };
                }
            });
        }
    });
}

/// How many of the `bytes` from `address` on lie before the next seam.
pub(super) fn until_seam(seams: &[u64], address: u64, bytes: usize) -> usize {
    match seams.get(seams.partition_point(|&seam| seam <= address)) {
        Some(seam) => bytes.min((seam - address) as usize),
        None => bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CopyRegion;

    /// A GPU that registers memory in small chunks; says loudly when there is none.
    fn cuda(registration_bytes: usize) -> Option<CudaDevice> {
        match CudaDevice::open(0) {
            Ok(mut device) => {
                device.registration_bytes = registration_bytes;
                Some(device)
            }
            Err(error) => {
                eprintln!("SKIPPED: no CUDA device ({error})");
                None
            }
        }
    }

    #[test]
    fn copies_and_fills_cross_registrations() {
        const CHUNK: usize = 1 << 20;
        const BYTES: usize = 3 * CHUNK + 4096;
        let Some(device) = cuda(CHUNK) else { return };
        let (from, to) = (device.map_pinned(BYTES).unwrap(), device.map_pinned(BYTES).unwrap());
        assert_eq!(device.seams.read().unwrap().len(), 6);
        let stream = device.stream_create().unwrap();
        // SAFETY: both buffers are live until they are unmapped at the end, after the stream is done.
        unsafe {
            device.fill(from, 5, BYTES, stream).unwrap();
            let region = CopyRegion { src: from + 100, dst: to + 300, bytes: BYTES - 300 };
            device.copy(region, stream).unwrap();
            device.stream_synchronize(stream).unwrap();
            let copied = std::slice::from_raw_parts(to as *const u8, BYTES);
            assert!(copied[..300].iter().all(|&byte| byte == 0));
            assert!(copied[300..].iter().all(|&byte| byte == 5));
            device.stream_destroy(stream);
            device.unmap_pinned(from, BYTES);
            device.unmap_pinned(to, BYTES);
        }
        assert!(device.seams.read().unwrap().is_empty());
    }

    #[test]
    fn a_registration_that_fails_half_way_is_undone() {
        const CHUNK: usize = 1 << 20;
        let Some(device) = cuda(CHUNK) else { return };
        let length = 3 * CHUNK;
        // SAFETY: a new anonymous mapping, unmapped at the end.
        let pointer = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            mmap_anonymous(std::ptr::null_mut(), length, access, MapFlags::PRIVATE).unwrap()
        };
        let last = pointer.wrapping_byte_add(2 * CHUNK);
        let _current = device.make_current().unwrap();
        assert!(device.register_chunk(last, CHUNK).is_ok());
        assert!(device.register(pointer, length).is_err(), "the last chunk is registered already");
        // SAFETY: registered above; mapped above and registered no more at the end.
        unsafe {
            device.driver.mem_host_unregister(last).unwrap();
            assert!(device.register(pointer, length).is_ok(), "the first chunks were released");
            device.unregister(pointer, length);
            munmap(pointer, length).unwrap();
        }
    }

    #[test]
    fn copies_stop_at_seams() {
        let seams = [100, 200];
        assert_eq!(until_seam(&seams, 0, 50), 50);
        assert_eq!(until_seam(&seams, 0, 150), 100);
        assert_eq!(until_seam(&seams, 100, 50), 50);
        assert_eq!(until_seam(&seams, 150, 500), 50);
        assert_eq!(until_seam(&seams, 200, 500), 500);
        assert_eq!(until_seam(&[], 7, 500), 500);
    }
}
