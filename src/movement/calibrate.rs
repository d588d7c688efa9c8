//! Measures what the paths cost, on scratch memory: about a tenth of a second at start-up.

use crate::abi::hkv_copy;
use crate::device::{
    CopyBatch, DeviceBuffer, Event, PinnedBuffer, PitchedCopy, Span, Stream, StreamRef,
};
use crate::error::{ErrorKind, Result};
use crate::ops::{CtaQuota, Kernels, MoveArgs, MoveShape};

use super::model::{
    BATCH_COPIES, EngineCost, KernelCost, LinkModel, PathCosts, PitchedCost, SizeCosts,
};
use super::plan::Way;

/// Quotas that a plan may choose from.
const QUOTAS: [u32; 3] = [4, 8, 16];
/// Bytes that measured places are scattered over, a power of two: more than a processor caches, since blocks that move
/// were not used just before.
const RANGE: u64 = 128 << 20;
/// The same where memory is short.
const LEAST_RANGE: u64 = 32 << 20;
/// Bytes of a measured move at a rate, a power of two.
const MUCH: u64 = 8 << 20;
/// Bytes of a copy that is cheap for copy engines, and of a row that is long for the kernel.
const LARGE: u64 = 1 << 20;
const LONG: u64 = 64 << 10;
/// Bytes of an item of which only the number counts.
const SMALL: u64 = SizeCosts::SIZES[0];
/// Rows of a measured move at most, a power of two.
const MANY: u64 = 8192;
/// Batches whose time shows, less that of one, what copies cost while the host submits the next ones; and copies of
/// each.
const BATCHES: u64 = 3;
const IN_A_BATCH: u64 = 32;
/// Times that everything is measured, after one that does not count: of what runs alone the best one does, of what runs
/// beside others the median.
const REPEATS: usize = 3;
/// How often work runs in a row when it runs beside others: long enough for the link to settle.
const IN_A_ROW: usize = 4;
/// How much faster than the link gathering has to be for the link not to wait for it.
const AHEAD: f64 = 2.0;

impl LinkModel {
    /// Measures the paths between this host and the device of `kernels`. Takes 256 MiB of either memory meanwhile, or
    /// 64 MiB where there is no more. On the CPU device there is nothing to choose from.
    ///
    /// # Errors
    /// Those of allocation and of the driver.
    pub fn calibrate(kernels: &Kernels) -> Result<Self> {
        if !kernels.device().is_cuda() {
            return Ok(Self::kernels_only(QUOTAS[0]));
        }
        fit(&mut Scratch::new(kernels)?, kernels.device().info().multiprocessors.max(1))
    }
}

/// Moves that can be timed, in microseconds, their submission included. With the link busy: on average, until the move
/// and a copy of [`MUCH`] the other way are both done.
trait Timed {
    /// Copies of so many bytes by the copy engines, in batches one after another.
    fn batches(&mut self, way: Way, busy: bool, count: u64, copies: u64, bytes: u64)
    -> Result<f64>;

    /// Rows of so many bytes by one pitched copy.
    fn pitched(&mut self, way: Way, rows: u64, bytes: u64) -> Result<f64>;

    /// Rows of so many bytes by the kernel with so many CTAs.
    fn kernel(&mut self, way: Way, busy: bool, ctas: u32, rows: u64, bytes: u64) -> Result<f64>;
}

/// The model of a link.
fn fit(link: &mut impl Timed, multiprocessors: u32) -> Result<LinkModel> {
    let mut both = |way| -> Result<[PathCosts; 2]> {
        let alone = paths(link, way)?;
        let beside = busy(link, way, &alone)?;
        Ok([alone, beside])
    };
    let (to_device, to_host) = (both(Way::HostToDevice)?, both(Way::DeviceToHost)?);
    let inside = PathCosts {
        engine: Some(engine(link, Way::Inside)?),
        pitched: None,
        kernels: vec![kernel(link, Way::Inside, multiprocessors)?],
    };
    let fastest = [&to_device, &to_host]
        .into_iter()
        .filter_map(|paths| paths[0].engine)
        .fold(0.0, |rate: f64, engine| rate.max(engine.copies.gbps()));
    let mut staging = kernel(link, Way::Inside, QUOTAS[0])?;
    for quota in &QUOTAS[1..] {
        if staging.rows.gbps() < AHEAD * fastest {
            staging = kernel(link, Way::Inside, *quota)?;
        }
    }
    Ok(LinkModel { to_device, to_host, inside, staging })
}

fn paths(link: &mut impl Timed, way: Way) -> Result<PathCosts> {
    let engine = engine(link, way)?;
    let kernels = QUOTAS.map(|quota| kernel(link, way, quota));
    Ok(PathCosts {
        engine: Some(engine),
        pitched: Some(pitched(link, way, &engine)?),
        kernels: kernels.into_iter().collect::<Result<_>>()?,
    })
}

/// The same paths while as many bytes go the other way.
fn busy(link: &mut impl Timed, way: Way, alone: &PathCosts) -> Result<PathCosts> {
    let mut busy = alone.clone();
    let rate = |us: f64| MUCH as f64 / us / 1e3;
    if let Some(engine) = &mut busy.engine {
        let us = link.batches(way, true, 1, MUCH / LARGE, LARGE)?;
        engine.copies = engine.copies.at_most(rate(us - engine.start_us));
    }
    if let (Some(pitched), Some(engine)) = (&mut busy.pitched, busy.engine) {
        pitched.gbps = engine.copies.gbps();
    }
    for kernel in &mut busy.kernels {
        let us = link.kernel(way, true, kernel.ctas, MUCH / LONG, LONG)?;
        kernel.rows = kernel.rows.at_most(rate(us - kernel.start_us));
    }
    Ok(busy)
}

fn engine(link: &mut impl Timed, way: Way) -> Result<EngineCost> {
    let whole = BATCH_COPIES as u64;
    let one = link.batches(way, false, 1, 1, SMALL)?;
    let many = link.batches(way, false, 1, whole, SMALL)?;
    let copies = SizeCosts::measured(|bytes| {
        let count = (MUCH / bytes).clamp(1, IN_A_BATCH);
        let first = link.batches(way, false, 1, count, bytes)?;
        let all = link.batches(way, false, BATCHES, count, bytes)?;
        let more = ((BATCHES - 1) * count) as f64;
        // A batch takes no tenth of another one: less is noise.
        Ok((all - first).max(0.1 * first) / more)
    })?;
    let submit_us = ((many - one) / (whole - 1) as f64).max(0.0);
    let start_us = (one - submit_us - copies.us(SMALL)).max(0.0);
    Ok(EngineCost { start_us, submit_us, copies })
}

fn pitched(link: &mut impl Timed, way: Way, engine: &EngineCost) -> Result<PitchedCost> {
    let gbps = engine.copies.gbps();
    let (few, wide, many, narrow) = (64, 4096, MANY / 4, 1024);
    let moving = |rows: u64, bytes: u64| (rows * bytes) as f64 / gbps / 1e3;
    let call = link.pitched(way, few, wide)? - moving(few, wide);
    let rows = link.pitched(way, many, narrow)? - moving(many, narrow);
    let row_us = ((rows - call) / (many - few) as f64).max(0.0);
    let call_us = (call - few as f64 * row_us).max(0.0);
    Ok(PitchedCost { call_us, row_us, gbps })
}

fn kernel(link: &mut impl Timed, way: Way, ctas: u32) -> Result<KernelCost> {
    let start_us = link.kernel(way, false, ctas, 1, SMALL)?;
    let rows = SizeCosts::measured(|bytes| {
        let count = (MUCH / bytes).clamp(1, MANY);
        let us = link.kernel(way, false, ctas, count, bytes)?;
        Ok((us - start_us).max(0.1 * us) / count as f64)
    })?;
    Ok(KernelCost { ctas, start_us, rows })
}

struct Scratch<'a> {
    kernels: &'a Kernels,
    /// Bytes that the places of a move are scattered over.
    range: u64,
    /// Twice the range each: moves go from the first half of one to the first half of the other, what keeps the link
    /// busy the other way uses the second ones, and so do moves inside the device.
    device: DeviceBuffer,
    host: PinnedBuffer,
    table: PinnedBuffer,
    stream: Stream,
    other: Stream,
    start: Event,
    end: Event,
    /// Behind what goes the other way.
    back: Event,
    /// How many samples were taken: each has other places.
    samples: u64,
}

impl<'a> Scratch<'a> {
    fn new(kernels: &'a Kernels) -> Result<Self> {
        let mut range = RANGE;
        loop {
            match Self::of(kernels, range) {
                Err(error)
                    if range > LEAST_RANGE
                        && matches!(error.kind(), ErrorKind::OutOfMemory { .. }) =>
                {
                    range /= 2;
                }
                scratch => return scratch,
            }
        }
    }

    fn of(kernels: &'a Kernels, range: u64) -> Result<Self> {
        let device = kernels.device();
        Ok(Self {
            kernels,
            range,
            device: device.alloc(2 * range as usize)?,
            host: device.alloc_pinned(2 * range as usize)?,
            table: device.alloc_pinned(MANY as usize * size_of::<hkv_copy>())?,
            stream: device.stream()?,
            other: device.stream()?,
            start: device.timed_event()?,
            end: device.timed_event()?,
            back: device.event()?,
            samples: 0,
        })
    }

    /// First addresses of source and destination.
    fn sides(&self, way: Way) -> (u64, u64) {
        match way {
            Way::HostToDevice => (self.host.address(), self.device.address()),
            Way::DeviceToHost => (self.device.address(), self.host.address()),
            Way::Inside => (self.device.address(), self.device.address() + self.range),
        }
    }

    /// Where items lie at source and destination: apart, in no order, and elsewhere in the next sample.
    fn places(&self, way: Way, count: u64, bytes: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (src, dst) = self.sides(way);
        let slots = count.next_power_of_two();
        let slot = self.range / slots;
        let inside = self.samples % (slot / bytes).max(1) * bytes;
        // Odd steps meet every slot once, as their number is a power of two.
        let place = move |i: u64, step: u64| i.wrapping_mul(step) % slots * slot + inside;
        (0..count).map(move |i| {
            (src + place(i, 0x9e37_79b9_7f4a_7c15), dst + place(i, 0xd1b5_4a32_d192_ed03))
        })
    }

    /// The time of some work: see [`REPEATS`].
    fn repeated(
        &mut self,
        busy: bool,
        mut sample: impl FnMut(&mut Self) -> Result<f64>,
    ) -> Result<f64> {
        let mut times = [0.0; REPEATS + 1];
        for time in &mut times {
            self.samples += 1;
            *time = sample(self)?;
        }
        let counted = &mut times[1..];
        counted.sort_by(f64::total_cmp);
        Ok(if busy { counted[REPEATS / 2] / IN_A_ROW as f64 } else { counted[0] })
    }

    /// Microseconds of some work by events; with the link busy, of [`IN_A_ROW`] times that work.
    fn us(&self, way: Way, busy: bool, work: impl Fn(StreamRef<'_>) -> Result<()>) -> Result<f64> {
        let (stream, other) = (self.stream.as_ref(), self.other.as_ref());
        let second = |address| address + self.range;
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
        let submitted = run();
        stream.synchronize().and(other.synchronize())?;
        submitted?;
        Ok(f64::from(self.end.elapsed_ms_since(&self.start)?) * 1e3)
    }
}

impl Timed for Scratch<'_> {
    fn batches(
        &mut self,
        way: Way,
        busy: bool,
        count: u64,
        copies: u64,
        bytes: u64,
    ) -> Result<f64> {
        self.repeated(busy, |scratch| {
            let (srcs, dsts): (Vec<u64>, Vec<u64>) =
                scratch.places(way, count * copies, bytes).unzip();
            let sizes = vec![bytes as usize; copies as usize];
            let places = || srcs.chunks(copies as usize).zip(dsts.chunks(copies as usize));
            scratch.us(way, busy, |stream| {
                places().try_for_each(|(srcs, dsts)| {
                    let batch = CopyBatch { srcs, dsts, sizes: &sizes };
                    // SAFETY: scratch memory, which lives until the stream has passed the copies; they lie apart.
                    unsafe { stream.copy_batch(&batch) }
                })
            })
        })
    }

    fn pitched(&mut self, way: Way, rows: u64, bytes: u64) -> Result<f64> {
        let (src, dst) = self.sides(way);
        let pitch = 2 * bytes as usize;
        let (row_bytes, rows) = (bytes as usize, rows as usize);
        let copy = PitchedCopy { src, dst, row_bytes, rows, src_pitch: pitch, dst_pitch: pitch };
        self.repeated(false, |scratch| {
            // SAFETY: as above.
            scratch.us(way, false, |stream| unsafe { stream.copy_pitched(&copy) })
        })
    }

    fn kernel(&mut self, way: Way, busy: bool, ctas: u32, rows: u64, bytes: u64) -> Result<f64> {
        let args = MoveArgs {
            copies: Span::new(self.table.address(), self.table.len() as u64),
            num_copies: rows,
            shape: MoveShape::FRAGMENTS,
            quota: CtaQuota::at_most(ctas),
        };
        let kernels = self.kernels;
        self.repeated(busy, |scratch| {
            let places = scratch.places(way, rows, bytes);
            let table: &mut [[u64; 3]] = bytemuck::cast_slice_mut(scratch.table.as_mut_slice());
            for (row, (src, dst)) in table.iter_mut().zip(places) {
                *row = [src, dst, bytes];
            }
            // SAFETY: as above; the table is written again only after the stream was synchronised.
            scratch.us(way, busy, |stream| unsafe { kernels.move_blocks(&args, stream) })
        })
    }
}

#[cfg(test)]
mod tests;
