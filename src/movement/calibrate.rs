//! Measures what the paths cost, on scratch memory: some tens of milliseconds at start-up.

use crate::abi::hkv_copy;
use crate::device::{
    CopyBatch, DeviceBuffer, Event, PinnedBuffer, PitchedCopy, Span, Stream, StreamRef,
};
use crate::error::Result;
use crate::ops::{CtaQuota, Kernels, MoveArgs, MoveShape};

use super::model::{EngineCost, KernelCost, LinkModel, PathCosts, PitchedCost};
use super::plan::Way;

/// Quotas that a plan may choose from.
const QUOTAS: [u32; 3] = [4, 8, 16];
/// Bytes of each scratch memory.
const SCRATCH: u64 = 16 << 20;
/// Bytes of a measured copy at a rate.
const MUCH: u64 = 8 << 20;
/// Bytes of a fragment that is cheap for copy engines, and of one that is long for the kernel.
const LARGE: u64 = 1 << 20;
const LONG: u64 = 64 << 10;
/// Rows of a measured copy by the row.
const MANY: u64 = 8192;
/// Times that everything is measured, after one that does not count: of what runs alone the best one does, of what runs
/// beside others the median.
const REPEATS: usize = 3;
/// How often work runs in a row when it runs beside others: long enough for the link to settle.
const IN_A_ROW: usize = 4;
/// How much faster than the link gathering has to be for the link not to wait for it.
const AHEAD: f64 = 2.0;

impl LinkModel {
    /// Measures the paths between this host and the device of `kernels`. Takes 32 MiB of either memory meanwhile. On
    /// the CPU device there is nothing to choose from.
    ///
    /// # Errors
    /// Those of allocation and of the driver.
    pub fn calibrate(kernels: &Kernels) -> Result<Self> {
        if !kernels.device().is_cuda() {
            return Ok(Self::kernels_only(QUOTAS[0]));
        }
        let mut scratch = Scratch::new(kernels)?;
        let mut link = |way| -> Result<[PathCosts; 2]> {
            let alone = scratch.paths(way)?;
            let busy = scratch.busy(way, &alone)?;
            Ok([alone, busy])
        };
        let (to_device, to_host) = (link(Way::HostToDevice)?, link(Way::DeviceToHost)?);
        let whole = kernels.device().info().multiprocessors.max(1);
        let inside = PathCosts {
            engine: Some(scratch.engine(Way::Inside)?),
            pitched: None,
            kernels: vec![scratch.kernel(Way::Inside, whole)?],
        };
        let link = [&to_device, &to_host]
            .into_iter()
            .filter_map(|paths| paths[0].engine)
            .fold(0.0, |rate: f64, engine| rate.max(engine.gbps));
        let mut staging = scratch.kernel(Way::Inside, QUOTAS[0])?;
        for quota in &QUOTAS[1..] {
            if staging.gbps < AHEAD * link {
                staging = scratch.kernel(Way::Inside, *quota)?;
            }
        }
        Ok(Self { to_device, to_host, inside, staging })
    }
}

struct Scratch<'a> {
    kernels: &'a Kernels,
    /// Two halves each: moves go from the first of one to the first of the other, what keeps the link busy the other
    /// way uses the second ones, and so do moves inside the device.
    device: DeviceBuffer,
    host: PinnedBuffer,
    table: PinnedBuffer,
    stream: Stream,
    other: Stream,
    start: Event,
    end: Event,
    /// Behind what goes the other way.
    back: Event,
}

impl<'a> Scratch<'a> {
    fn new(kernels: &'a Kernels) -> Result<Self> {
        let device = kernels.device();
        Ok(Self {
            kernels,
            device: device.alloc(2 * SCRATCH as usize)?,
            host: device.alloc_pinned(2 * SCRATCH as usize)?,
            table: device.alloc_pinned(MANY as usize * size_of::<hkv_copy>())?,
            stream: device.stream()?,
            other: device.stream()?,
            start: device.timed_event()?,
            end: device.timed_event()?,
            back: device.event()?,
        })
    }

    fn paths(&mut self, way: Way) -> Result<PathCosts> {
        let engine = self.engine(way)?;
        let kernels = QUOTAS.map(|quota| self.kernel(way, quota));
        Ok(PathCosts {
            engine: Some(engine),
            pitched: Some(self.pitched(way, &engine)?),
            kernels: kernels.into_iter().collect::<Result<_>>()?,
        })
    }

    /// The same paths while as many bytes go the other way.
    fn busy(&mut self, way: Way, alone: &PathCosts) -> Result<PathCosts> {
        let mut busy = alone.clone();
        let rate = |us: f64| MUCH as f64 / us / 1e3;
        if let Some(engine) = &mut busy.engine {
            let us = self.batch_us(way, true, MUCH / LARGE, LARGE)?;
            engine.gbps = engine.gbps.min(rate(us - engine.start_us));
        }
        if let (Some(pitched), Some(engine)) = (&mut busy.pitched, busy.engine) {
            pitched.gbps = engine.gbps;
        }
        for kernel in &mut busy.kernels {
            let us = self.kernel_us(way, true, kernel.ctas, MUCH / LONG, LONG)?;
            kernel.gbps = kernel.gbps.min(rate(us - kernel.start_us));
        }
        Ok(busy)
    }

    /// First addresses of source and destination.
    fn sides(&self, way: Way) -> (u64, u64) {
        match way {
            Way::HostToDevice => (self.host.address(), self.device.address()),
            Way::DeviceToHost => (self.device.address(), self.host.address()),
            Way::Inside => (self.device.address(), self.device.address() + SCRATCH),
        }
    }

    fn engine(&mut self, way: Way) -> Result<EngineCost> {
        let (few, small) = (64, 4096);
        let one = self.batch_us(way, false, 1, small)?;
        let many = self.batch_us(way, false, few, small)?;
        let much = self.batch_us(way, false, MUCH / LARGE, LARGE)?;
        let copy_us = ((many - one) / (few - 1) as f64).max(0.0);
        let start_us = (one - copy_us).max(0.0);
        let moving = (much - start_us - (MUCH / LARGE) as f64 * copy_us).max(0.1 * much);
        let gbps = MUCH as f64 / moving / 1e3;
        // What was measured of a small copy holds its bytes, too.
        let copy_us = (copy_us - small as f64 / gbps / 1e3).max(0.0);
        Ok(EngineCost { start_us, copy_us, gbps })
    }

    fn pitched(&mut self, way: Way, engine: &EngineCost) -> Result<PitchedCost> {
        let rate = engine.gbps * 1e3;
        let (few, wide, many, narrow) = (64, 4096, MANY / 4, 1024);
        let call = self.rows_us(way, few, wide)? - (few * wide) as f64 / rate;
        let rows = self.rows_us(way, many, narrow)? - (many * narrow) as f64 / rate;
        let row_us = ((rows - call) / (many - few) as f64).max(0.0);
        let call_us = (call - few as f64 * row_us).max(0.0);
        Ok(PitchedCost { call_us, row_us, gbps: engine.gbps })
    }

    fn kernel(&mut self, way: Way, ctas: u32) -> Result<KernelCost> {
        let start_us = self.kernel_us(way, false, ctas, 1, 4096)?;
        let much = self.kernel_us(way, false, ctas, MUCH / LONG, LONG)?;
        let many = self.kernel_us(way, false, ctas, MANY, 256)?;
        let gbps = MUCH as f64 / (much - start_us).max(0.1 * much) / 1e3;
        Ok(KernelCost { ctas, start_us, row_us: (many - start_us).max(0.0) / MANY as f64, gbps })
    }

    fn batch_us(&mut self, way: Way, busy: bool, count: u64, bytes: u64) -> Result<f64> {
        let (src, dst) = self.sides(way);
        let places = |first: u64| (0..count).map(|i| first + i * 2 * bytes % SCRATCH).collect();
        let (srcs, dsts): (Vec<u64>, Vec<u64>) = (places(src), places(dst));
        let sizes = vec![bytes as usize; count as usize];
        let batch = CopyBatch { srcs: &srcs, dsts: &dsts, sizes: &sizes };
        // SAFETY: scratch memory, which lives until the stream has passed the copies; they lie apart.
        self.us(way, busy, |stream| unsafe { stream.copy_batch(&batch) })
    }

    fn rows_us(&mut self, way: Way, rows: u64, bytes: u64) -> Result<f64> {
        let (src, dst) = self.sides(way);
        let pitch = 2 * bytes as usize;
        let (row_bytes, rows) = (bytes as usize, rows as usize);
        let copy = PitchedCopy { src, dst, row_bytes, rows, src_pitch: pitch, dst_pitch: pitch };
        // SAFETY: as above.
        self.us(way, false, |stream| unsafe { stream.copy_pitched(&copy) })
    }

    fn kernel_us(
        &mut self,
        way: Way,
        busy: bool,
        ctas: u32,
        count: u64,
        bytes: u64,
    ) -> Result<f64> {
        let (src, dst) = self.sides(way);
        let words: &mut [[u64; 3]] = bytemuck::cast_slice_mut(self.table.as_mut_slice());
        for (i, row) in words[..count as usize].iter_mut().enumerate() {
            // Counts are powers of two: odd steps meet every place.
            let place = |step: u64| (i as u64 * step) % count * (SCRATCH / count);
            *row = [src + place(7), dst + place(5), bytes];
        }
        let args = MoveArgs {
            copies: Span::new(self.table.address(), self.table.len() as u64),
            num_copies: count,
            shape: MoveShape::FRAGMENTS,
            quota: CtaQuota::at_most(ctas),
        };
        let kernels = self.kernels;
        // SAFETY: as above; the table is written again only after the stream was synchronised.
        self.us(way, busy, |stream| unsafe { kernels.move_blocks(&args, stream) })
    }

    /// Microseconds of some work by events, its submission included. With the link busy: on average, until the work and
    /// a copy of [`MUCH`] the other way are both done.
    fn us(&self, way: Way, busy: bool, work: impl Fn(StreamRef<'_>) -> Result<()>) -> Result<f64> {
        let (stream, other) = (self.stream.as_ref(), self.other.as_ref());
        let second = |address| address + SCRATCH;
        let (host, device) = (second(self.host.address()), second(self.device.address()));
        let back = match way {
            Way::HostToDevice => Some((device, host)),
            Way::DeviceToHost => Some((host, device)),
            Way::Inside => None,
        };
        let run = || -> Result<()> {
            stream.record(&self.start)?;
            if let Some((src, dst)) = back.filter(|_| busy) {
                other.wait(&self.start)?;
                for _ in 0..IN_A_ROW {
                    // SAFETY: scratch memory that nothing else uses, live until the synchronisation below.
                    unsafe { other.copy(src, dst, MUCH as usize)? };
                }
                other.record(&self.back)?;
                (0..IN_A_ROW).try_for_each(|_| work(stream))?;
                stream.wait(&self.back)?;
            } else {
                work(stream)?;
            }
            stream.record(&self.end)
        };
        let mut samples = [0.0; REPEATS + 1];
        for sample in &mut samples {
            let submitted = run();
            stream.synchronize().and(other.synchronize())?;
            submitted?;
            *sample = f64::from(self.end.elapsed_ms_since(&self.start)?) * 1e3;
        }
        let counted = &mut samples[1..];
        counted.sort_by(f64::total_cmp);
        Ok(if busy { counted[REPEATS / 2] / IN_A_ROW as f64 } else { counted[0] })
    }
}
