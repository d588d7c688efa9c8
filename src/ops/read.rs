//! `read_memory`: reads a range once, as fast as plain loads can. The yardstick of the benchmarks.

use super::{Kernel, Kernels, Loader, cpu};
use crate::abi::hkv_read_params;
use crate::device::cuda::LaunchConfig;
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};

const OP: &str = "read_memory";
/// Threads per CTA, as in kernels/read_memory.cu.
const THREADS: u32 = 512;
/// CTAs per multiprocessor: 64 warps, what an SM holds.
const CTAS_PER_SM: u32 = 4;

pub(super) struct Loaded {
    read_memory: Kernel,
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        let kernel = loader.file("read_memory")?;
        Ok(Self { read_memory: kernel("hkv_read_memory", 0)? })
    }
}

impl Kernels {
    /// Reads `data` once and folds its 32-bit words into the u32 at `checksum` by exclusive or.
    ///
    /// # Errors
    /// `data` is no multiple of 16 bytes, or either range is misaligned or too short.
    ///
    /// # Safety
    /// Until the stream has passed the launch, both spans are device memory of their length, nothing
    /// writes `data`, and nothing else accesses `checksum`.
    pub unsafe fn read_memory(
        &self,
        data: Span,
        checksum: Span,
        stream: StreamRef<'_>,
    ) -> Result<()> {
        data.check(OP, "the data", data.bytes, 16)?;
        checksum.check(OP, "the checksum", 4, 4)?;
        if !data.bytes.is_multiple_of(16) {
            let message = format!("a length of {} bytes is no multiple of 16", data.bytes);
            return Err(Error::invalid(OP, message));
        }
        if data.bytes == 0 {
            return Ok(());
        }
        let params = hkv_read_params {
            data: data.address as *const _,
            bytes: data.bytes as i64,
            checksum: checksum.address as *mut _,
        };
        let ctas = self.device.info().multiprocessors.max(1) * CTAS_PER_SM;
        let config = LaunchConfig::linear(ctas, THREADS);
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu = |params: &_| unsafe { cpu::read_memory(params) };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(&self.read.read_memory, config, &params, stream, on_cpu) }
    }
}
