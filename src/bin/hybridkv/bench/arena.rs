//! How long it takes to have pinned memory: ours beside the driver's own allocator, in turns.

use std::ffi::c_void;
use std::time::Instant;

use cudarc::driver::sys;
use hybridkv::device::Device;
use hybridkv::error::{Error, Result};

use super::Bench;
use super::timing::Timing;
use crate::report::Row;

/// Turns.
const TURNS: usize = 3;
/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`.
const FLAGS: u32 = 0x01 | 0x02;

impl Bench<'_> {
    /// Time until all of an arena can be copied to, and what `cuMemHostAlloc` takes for as much.
    pub(super) fn arena(&mut self) -> Result<()> {
        const CASE: &str = "arena/2GiB";
        if !CASE.contains(self.filter) {
            return Ok(());
        }
        let bytes = self.scaled(2 << 30) as usize;
        let (mut ours, mut driver) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            ours.push(until_used(
                self.device,
                || {
                    let arena = self.device.alloc_pinned(bytes)?;
                    Ok((arena.address(), arena))
                },
                bytes,
            )?);
            if self.device.is_cuda() {
                driver.push(until_used(
                    self.device,
                    || {
                        let memory = DriverMemory::new(bytes)?;
                        Ok((memory.0 as u64, memory))
                    },
                    bytes,
                )?);
            }
        }
        let (ours, spread) = median(ours);
        let mut row = Row {
            case: CASE.to_owned(),
            ours,
            unit: "ms".to_owned(),
            gbps: Some(bytes as f64 / ours / 1e6),
            ..Row::default()
        };
        if !driver.is_empty() {
            let (driver, _) = median(driver);
            row.goal = Some(driver / 3.0);
            row.peers.insert("cuMemHostAlloc".to_owned(), driver);
        }
        self.add(row, Timing { us: 1e3 * ours, spread, samples: TURNS });
        Ok(())
    }
}

/// Milliseconds to get memory and to copy from it, its last page included. Giving it back is not timed.
fn until_used<M>(
    device: &Device,
    alloc: impl FnOnce() -> Result<(u64, M)>,
    bytes: usize,
) -> Result<f64> {
    const PAGE: usize = 4096;
    let (target, stream) = (device.alloc(PAGE)?, device.stream()?);
    let start = Instant::now();
    let (address, memory) = alloc()?;
    // SAFETY: the last page of the memory and all of the target; both outlive the synchronisation.
    unsafe {
        let last_page = address + (bytes - PAGE) as u64;
        stream.as_ref().copy(last_page, target.address(), PAGE)?;
    }
    stream.as_ref().synchronize()?;
    let ms = start.elapsed().as_secs_f64() * 1e3;
    drop(memory);
    Ok(ms)
}

/// The median, and the range over it.
fn median(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let middle = values[values.len() / 2];
    (middle, (values[values.len() - 1] - values[0]) / middle)
}

/// Pinned memory of the driver's own.
struct DriverMemory(*mut c_void);

impl DriverMemory {
    /// For the first device.
    fn new(bytes: usize) -> Result<Self> {
        let mut pointer = std::ptr::null_mut();
        // SAFETY: the driver is loaded and initialised: a device is open. The pointers are to live variables, and
        // the primary context is retained for as long as that device is open.
        let code = unsafe {
            let mut context = std::ptr::null_mut();
            sys::cuDevicePrimaryCtxRetain(&mut context, 0);
            sys::cuCtxSetCurrent(context);
            sys::cuMemHostAlloc(&mut pointer, bytes, FLAGS)
        };
        match code {
            sys::CUresult::CUDA_SUCCESS => Ok(Self(pointer)),
            code => {
                Err(Error::invalid("bench", format!("cuMemHostAlloc of {bytes} bytes: {code:?}")))
            }
        }
    }
}

impl Drop for DriverMemory {
    fn drop(&mut self) {
        // SAFETY: allocated above, copied from by nobody any more; releases what was retained above.
        unsafe {
            sys::cuMemFreeHost(self.0);
            sys::cuCtxSetCurrent(std::ptr::null_mut());
            sys::cuDevicePrimaryCtxRelease_v2(0);
        }
    }
}
