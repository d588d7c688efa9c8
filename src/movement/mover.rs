//! Carries plans out on streams.

use std::sync::Arc;

use crate::abi::hkv_copy;
use crate::device::{CopyBatch, DeviceBuffer, Event, Span, Stream, StreamRef};
use crate::error::{Error, Result};
use crate::ops::{CtaQuota, Kernels, MoveArgs, MoveShape};

use super::model::{BATCH_COPIES, LinkModel};
use super::plan::{Planner, Route, Traffic, Way};

const OP: &str = "move";
/// Slots of a staging ring: one that is filled, one that is emptied, one between them.
const SLOTS: usize = 3;
/// Bytes of a slot: what a link takes 100 to 200 us for, and a launch is little beside.
const SLOT_BYTES: u64 = 8 << 20;

/// Plans moves and submits them, one after another, to streams of one device.
pub struct Mover {
    kernels: Arc<Kernels>,
    model: Arc<LinkModel>,
    planner: Planner,
    /// Addresses of host blocks that are staged, in the order of their descriptors.
    host: Vec<u64>,
    /// Addresses that no copy of the copy engines may cross.
    edges: Vec<u64>,
    staging: Option<Staging>,
}

/// A batch in parts: the copy engine starts on a part when the driver has all of it.
fn batches(batch: CopyBatch<'_>) -> impl Iterator<Item = CopyBatch<'_>> {
    let CopyBatch { srcs, dsts, sizes } = batch;
    let places = srcs.chunks(BATCH_COPIES).zip(dsts.chunks(BATCH_COPIES));
    let parts = places.zip(sizes.chunks(BATCH_COPIES));
    parts.map(|((srcs, dsts), sizes)| CopyBatch { srcs, dsts, sizes })
}

/// A ring in device memory, through which blocks go that are contiguous on the host only.
struct Staging {
    memory: DeviceBuffer,
    /// The copy engine's stream.
    side: Stream,
    /// On the caller's stream, where a move begins.
    begun: Event,
    /// By slot: behind what fills it, and behind what empties it.
    filled: Vec<Event>,
    emptied: Vec<Event>,
    next: usize,
}

impl Mover {
    /// A mover for devices and hosts that cost what the model says, with room for plans of `copies` descriptors;
    /// its lists grow when there are more.
    pub fn new(kernels: &Arc<Kernels>, model: &Arc<LinkModel>, copies: usize) -> Self {
        Self {
            kernels: kernels.clone(),
            model: model.clone(),
            planner: Planner::with_capacity(copies),
            host: Vec::with_capacity(copies),
            edges: Vec::new(),
            staging: None,
        }
    }

    /// Lets blocks go through a ring of 24 MiB in device memory where that is faster.
    ///
    /// # Errors
    /// Those of allocation.
    pub fn with_staging(mut self) -> Result<Self> {
        let device = self.kernels.device();
        let events = || (0..SLOTS).map(|_| device.event()).collect::<Result<Vec<_>>>();
        self.staging = Some(Staging {
            memory: device.alloc(SLOTS * SLOT_BYTES as usize)?,
            side: device.stream()?,
            begun: device.event()?,
            filled: events()?,
            emptied: events()?,
            next: 0,
        });
        self.planner = self.planner.with_staging(SLOT_BYTES);
        Ok(self)
    }

    /// Submits the move of the `num_copies` descriptors of a table in pinned memory. They are put in another order, and
    /// merged. All the work is on `stream` or joined back into it: what is recorded there next has all of it behind
    /// it.
    ///
    /// # Errors
    /// The table is misaligned or too short; the driver's own, after which part of the move may be under way on `stream`,
    /// and on no other one.
    ///
    /// # Safety
    /// As for [`Kernels::move_blocks`]; nobody else reads or writes the table until `stream` has passed the move. Moves of
    /// one mover are submitted to one stream, or to streams that wait for one another.
    pub unsafe fn submit(
        &mut self,
        table: Span,
        num_copies: usize,
        shape: &MoveShape,
        traffic: Traffic,
        stream: StreamRef<'_>,
    ) -> Result<()> {
        if num_copies == 0 {
            return Ok(());
        }
        let bytes = (num_copies as u64)
            .checked_mul(size_of::<hkv_copy>() as u64)
            .ok_or_else(|| Error::invalid(OP, "the descriptor table overflows 64-bit addresses"))?;
        table.check(OP, "the descriptor table", bytes, 8)?;
        // SAFETY: the table is pinned memory, as long as was checked, and nobody else's until the move has ended.
        let copies =
            unsafe { std::slice::from_raw_parts_mut(table.address as *mut hkv_copy, num_copies) };
        self.kernels.device().pinned_edges(&mut self.edges);
        match self.planner.plan(copies, shape, traffic, &self.model, &self.edges) {
            Route::Direct { copies, ctas } => {
                let args = MoveArgs {
                    copies: table,
                    num_copies: copies as u64,
                    shape: *shape,
                    quota: CtaQuota::at_most(ctas),
                };
                // SAFETY: the plan's fragments are those of the caller's rows, cut and put together.
                unsafe {
                    self.kernels.move_blocks(&args, stream)?;
                    for batch in batches(self.planner.engine()) {
                        stream.copy_batch(&batch)?;
                    }
                    self.planner.pitched().iter().try_for_each(|rows| stream.copy_pitched(rows))
                }
            }
            Route::Staged { copies: count, block_bytes, ctas } => {
                let at = |first: usize| {
                    let size = size_of::<hkv_copy>() as u64;
                    Span::new(
                        table.address + first as u64 * size,
                        table.bytes - first as u64 * size,
                    )
                };
                let way = traffic.way;
                // SAFETY: as above.
                let staged = unsafe {
                    self.stage(&mut copies[..count], at, block_bytes, ctas, shape, way, stream)
                };
                if let (Err(_), Some(ring)) = (&staged, &self.staging) {
                    // What it has on the ring's stream was not joined into the caller's. Of two errors the first says
                    // more.
                    let _ = ring.side.as_ref().synchronize();
                }
                staged
            }
        }
    }

    /// Moves blocks through the ring: host side by the copy engine on the ring's stream, device side by the kernel
    /// on the caller's.
    ///
    /// # Safety
    /// As for [`Self::submit`].
    #[allow(clippy::too_many_arguments, reason = "the parts of one plan")]
    unsafe fn stage(
        &mut self,
        copies: &mut [hkv_copy],
        table: impl Fn(usize) -> Span,
        block_bytes: u64,
        ctas: u32,
        shape: &MoveShape,
        way: Way,
        stream: StreamRef<'_>,
    ) -> Result<()> {
        let Some(ring) = &mut self.staging else {
            return Err(Error::invalid(OP, "no staging ring"));
        };
        let side = ring.side.as_ref();
        let per_slot = (SLOT_BYTES / block_bytes).max(1) as usize;
        let up = way == Way::HostToDevice;
        stream.record(&ring.begun)?;
        side.wait(&ring.begun)?;
        let mut first = 0;
        let mut last = None;
        while first < copies.len() {
            let count = per_slot.min(copies.len() - first);
            let slot = ring.next;
            let base = ring.memory.address() + slot as u64 * SLOT_BYTES;
            self.host.clear();
            for (i, copy) in copies[first..first + count].iter_mut().enumerate() {
                let staged = base + i as u64 * block_bytes;
                if up {
                    self.host.push(copy.src as u64);
                    copy.src = staged as *const _;
                } else {
                    self.host.push(copy.dst as u64);
                    copy.dst = staged as *mut _;
                }
            }
            self.planner.clear_engine();
            for (i, &host) in self.host.iter().enumerate() {
                let staged = base + i as u64 * block_bytes;
                let (src, dst) = if up { (host, staged) } else { (staged, host) };
                let block =
                    hkv_copy { src: src as *const _, dst: dst as *mut _, bytes: block_bytes };
                self.planner.push(block, &self.edges);
            }
            let args = MoveArgs {
                copies: table(first),
                num_copies: count as u64,
                shape: *shape,
                quota: CtaQuota::at_most(ctas),
            };
            // SAFETY: the caller's promise for both ends of each block; the slot is this ring's, and whoever fills it
            // waits for whoever emptied it last.
            unsafe {
                let (filler, emptier) = if up { (side, stream) } else { (stream, side) };
                filler.wait(&ring.emptied[slot])?;
                if up {
                    side.copy_batch(&self.planner.engine())?;
                } else {
                    self.kernels.move_blocks(&args, stream)?;
                }
                filler.record(&ring.filled[slot])?;
                emptier.wait(&ring.filled[slot])?;
                if up {
                    self.kernels.move_blocks(&args, stream)?;
                } else {
                    side.copy_batch(&self.planner.engine())?;
                }
                emptier.record(&ring.emptied[slot])?;
            }
            last = Some(slot);
            ring.next = (slot + 1) % SLOTS;
            first += count;
        }
        match last {
            Some(slot) if !up => stream.wait(&ring.emptied[slot]),
            _ => Ok(()),
        }
    }
}
