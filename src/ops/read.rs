//! The yardsticks of the benchmarks. `read_memory` reads a range once, as fast as plain loads can; `read_blocks`
//! reads what attention would, the way decode does, without its arithmetic.

use super::attention::{HEAD_DIMS, Prepared, Way};
use super::split::Variant;
use super::{AttentionArgs, Kernel, Kernels, Loader, cpu};
use crate::abi::{self, hkv_read_blocks_params, hkv_read_params};
use crate::device::cuda::LaunchConfig;
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};
use crate::layout::Dtype;

const OP: &str = "read_memory";
const READ_BLOCKS: &str = "read_blocks";
/// Threads per CTA, as in kernels/read_memory.cu.
const THREADS: u32 = 512;
/// CTAs per multiprocessor: 64 warps, what an SM holds.
const CTAS_PER_SM: u32 = 4;

/// The kernels of a head dimension: the elements and what their names end in.
const READERS: [(&str, &str); 3] = [("16bit", ""), ("e4m3", ""), ("e4m3", "_narrow")];

pub(super) struct Loaded {
    read_memory: Kernel,
    /// By elements and width of the CTAs ([`READERS`]), and head dimension.
    read_blocks: [[Kernel; 3]; READERS.len()],
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        let read_memory = loader.file("read_memory")?("hkv_read_memory", 0)?;
        let kernel = loader.file("read_blocks")?;
        let mut read_blocks = [[Kernel { function: None }; 3]; READERS.len()];
        for ((kv, suffix), by_kv) in READERS.iter().zip(&mut read_blocks) {
            for (dim, by_dim) in HEAD_DIMS.iter().zip(by_kv) {
                if suffix.is_empty() || *dim < 256 {
                    let name = format!("hkv_read_blocks_{kv}_d{dim}{suffix}");
                    *by_dim = kernel(&name, abi::HKV_DECODE_SHARED_BYTES)?;
                }
            }
        }
        Ok(Self { read_memory, read_blocks })
    }
}

impl Kernels {
    /// Reads `data` once and adds the sum of its 32-bit words to the u32 at `checksum`, modulo 2^32.
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

    /// Reads K and V of every key that some query of a decode batch sees, each once, as
    /// [`attention`](Self::attention) would: through the block tables, by the same load path and work list.
    /// Adds the sum of their 32-bit words to the u32 at `checksum`, modulo 2^32. Queries are not read,
    /// outputs and workspace not written.
    ///
    /// # Errors
    /// As [`attention`](Self::attention); a batch with too many query rows for the decode kernel, a checksum
    /// that is misaligned or too short.
    ///
    /// # Safety
    /// As [`attention`](Self::attention); and nothing else accesses `checksum` until the stream has passed
    /// the launch.
    pub unsafe fn read_blocks(
        &self,
        args: &AttentionArgs,
        checksum: Span,
        stream: StreamRef<'_>,
    ) -> Result<()> {
        checksum.check(READ_BLOCKS, "the checksum", 4, 4)?;
        if args.num_tokens == 0 || args.num_seqs == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise about the spans.
        let Prepared { way, ctas, params } = unsafe { self.prepare(args, stream)? };
        let Way::Decode { variant, .. } = way else {
            let supported = "what the decode kernel takes";
            return Err(Error::unsupported(READ_BLOCKS, "max_q_len", args.max_q_len, supported));
        };
        let shape = args.kv.shape;
        let params =
            hkv_read_blocks_params { attention: params, checksum: checksum.address as *mut _ };
        let reader = match shape.dtype {
            Dtype::E4m3 if variant == Variant::Decode8Narrow => 2,
            Dtype::E4m3 => 1,
            _ => 0,
        };
        let dim = HEAD_DIMS.iter().position(|&dim| dim == shape.head_dim).unwrap_or_default();
        let kernel = &self.read.read_blocks[reader][dim];
        let config = self.decode_config(ctas, variant);
        let on_cpu = move |params: &_| {
            // SAFETY: runs when the stream gets to it, while the caller's promise holds.
            unsafe { cpu::read_blocks(params, shape.dtype, shape.head_dim as usize) }
        };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(kernel, config, &params, stream, on_cpu) }
    }
}
