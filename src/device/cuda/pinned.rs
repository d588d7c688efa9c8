//! Page-locked host memory.
//!
//! It is anonymous memory of ours, registered with the driver: huge pages where the system gives them and pages
//! touched by several threads make that 3 to 5 times faster than `cuMemHostAlloc`, which `hybridkv bench movement`
//! measures beside it. The threads run on processors of the GPU's NUMA node, so that the pages lie there.
//! Memory is registered in chunks, and all chunks are undone when one fails. Kernels see one contiguous range;
//! single copies must not cross the seam between two chunks (the driver refuses them), so the device keeps the
//! list of seams.

use std::ffi::c_void;
use std::sync::PoisonError;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::CudaDevice;
use super::driver::Failure;
use super::memory::out_of_memory;
use crate::device::{Backend, host};
use crate::error::{Error, Result};

const KIND: &str = "pinned host";
const PAGE: usize = 4096;
/// Mappings of at least this much begin at a multiple of it.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes per registration. The driver overflows on single registrations of some hundred GiB.
pub(super) const REGISTRATION_BYTES: usize = 16 << 30;
/// `CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP`.
const REGISTER_FLAGS: u32 = 0x01 | 0x02;
/// Bytes one thread touches at least; fewer are not worth a thread.
const TOUCH_BYTES_PER_THREAD: usize = 64 << 20;
const MAX_TOUCH_THREADS: usize = 16;

impl CudaDevice {
    /// Zeroed memory that the device reads and writes at the same address.
    pub(super) fn map_pinned(&self, bytes: usize) -> Result<u64> {
        let refused = |reason: String| {
            out_of_memory(KIND, bytes, format!("{reason}; {}", host::describe_limits()))
        };
        // Touching more than there is ends the process, not the call.
        if let Some(left) = host::available_bytes().filter(|&left| bytes as u64 > left) {
            let lack = bytes as u64 - left;
            return Err(refused(format!("{left} bytes are left, {lack} too few")));
        }
        let length = mapped_bytes(bytes).ok_or_else(|| refused("the size overflows".into()))?;
        let mapping = Mapping::new(length).map_err(|e| refused(format!("mmap failed: {e}")))?;
        mapping.first_touch(self.near.as_ref());
        match self.register(mapping.pointer(), length) {
            Ok(()) => Ok(mapping.keep()),
            Err(Unregistered::Refused(failure)) => Err(refused(failure.error("alloc").to_string())),
            Err(Unregistered::Aliased) => Err(Error::unsupported(
                "alloc",
                "pinned memory",
                "at different host and device addresses",
                "platforms where the device uses host addresses of registered memory",
            )),
        }
    }

    /// # Safety
    /// `address` comes from `map_pinned(bytes)` and is not used afterwards, by the device neither.
    pub(super) unsafe fn unmap_pinned(&self, address: u64, bytes: usize) {
        let _ = self.synchronize();
        let Some(length) = mapped_bytes(bytes) else { return };
        self.unregister(address as *mut c_void, length);
        drop(Mapping { start: address as usize, length });
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

fn mapped_bytes(bytes: usize) -> Option<usize> {
    bytes.checked_next_multiple_of(PAGE)
}

/// An anonymous mapping of whole pages, given back when dropped.
struct Mapping {
    start: usize,
    length: usize,
}

impl Mapping {
    /// A new mapping, of huge pages where the system gives them.
    fn new(length: usize) -> rustix::io::Result<Self> {
        let slack = if length < HUGE_PAGE { 0 } else { HUGE_PAGE - PAGE };
        let reserved = length.checked_add(slack).ok_or(rustix::io::Errno::NOMEM)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping, at an address of the kernel's choice.
        let pointer =
            unsafe { mmap_anonymous(std::ptr::null_mut(), reserved, access, MapFlags::PRIVATE)? };
        let mut mapping = Self { start: pointer as usize, length: reserved };
        if slack > 0 {
            mapping.trim(length);
        }
        // SAFETY: the range was just mapped. Huge pages are an optimisation: refusal changes nothing.
        let _ = unsafe { madvise(mapping.pointer(), mapping.length, Advice::LinuxHugepage) };
        Ok(mapping)
    }

    /// Gives back what lies around the first `length` bytes that begin at a multiple of a huge page.
    fn trim(&mut self, length: usize) {
        let (start, end) = (self.start.next_multiple_of(HUGE_PAGE), self.start + self.length);
        drop(Self { start: self.start, length: start - self.start });
        drop(Self { start: start + length, length: end - start - length });
        (self.start, self.length) = (start, length);
    }

    fn pointer(&self) -> *mut c_void {
        self.start as *mut c_void
    }

    /// Makes the system back every page, from several threads: faults are what pinning costs. With `near`, the
    /// threads run on those processors, and the pages lie in their memory.
    fn first_touch(&self, near: Option<&CpuSet>) {
        let (start, end) = (self.start, self.start + self.length);
        let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
        let cores = near.map_or(allowed, |set| allowed.min(set.count() as usize));
        let wanted = self.length.div_ceil(TOUCH_BYTES_PER_THREAD);
        let threads = wanted.min(cores).clamp(1, MAX_TOUCH_THREADS);
        let share = self.length.div_ceil(threads).next_multiple_of(HUGE_PAGE);
        std::thread::scope(|scope| {
            for first in (start..end).step_by(share) {
                scope.spawn(move || {
                    if let Some(set) = near {
                        // A preference: without it the pages lie where the threads happen to run.
                        let _ = sched_setaffinity(None, set);
                    }
                    for page in (first..end.min(first + share)).step_by(PAGE) {
                        // SAFETY: inside the fresh mapping, which no one else knows yet.
                        unsafe { (page as *mut u8).write_volatile(0) };
                    }
                });
            }
        });
    }

    /// Leaves the memory mapped and gives its address.
    fn keep(self) -> u64 {
        std::mem::ManuallyDrop::new(self).start as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: a whole mapping of ours, or a part of one, that nobody uses any more.
            let _ = unsafe { munmap(self.pointer(), self.length) };
        }
    }
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
    use rustix::thread::sched_getaffinity;

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
        let mapping = Mapping::new(3 * CHUNK).unwrap();
        let pointer = mapping.pointer();
        let last = pointer.wrapping_byte_add(2 * CHUNK);
        let _current = device.make_current().unwrap();
        assert!(device.register_chunk(last, CHUNK).is_ok());
        assert!(device.register(pointer, mapping.length).is_err(), "the last chunk is registered");
        assert!(device.seams.read().unwrap().is_empty());
        // SAFETY: registered above.
        unsafe { device.driver.mem_host_unregister(last).unwrap() };
        assert!(device.register(pointer, mapping.length).is_ok(), "the first chunks were released");
        device.unregister(pointer, mapping.length);
    }

    #[test]
    fn mappings_begin_at_huge_pages_and_are_zeroed() {
        for length in [PAGE, HUGE_PAGE - PAGE, HUGE_PAGE, 3 * HUGE_PAGE + PAGE] {
            let mapping = Mapping::new(length).unwrap();
            mapping.first_touch(sched_getaffinity(None).ok().as_ref());
            assert!(length < HUGE_PAGE || mapping.start.is_multiple_of(HUGE_PAGE));
            assert_eq!(mapping.length, length);
            // SAFETY: the whole mapping, which lives as long as the slice.
            let bytes = unsafe { std::slice::from_raw_parts_mut(mapping.start as *mut u8, length) };
            assert!(bytes.iter().all(|&byte| byte == 0));
            bytes.fill(7);
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
