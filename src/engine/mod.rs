//! Executes the manager's transfers on a device.
//!
//! An [`Engine`] owns the device pool, the pinned host arena, and one *lane* (stream, descriptor ring,
//! events) per direction; it does not own the manager, so that one manager may drive the engines of
//! several ranks. It keeps the ordering half of the safety rules:
//! - R2: an offload waits for an event recorded on the compute stream at submission; the step that wrote
//!   the block was submitted before the manager emitted the transfer.
//! - R3: an onboard waits for the same event, and so for the last readers and for pending fills of its
//!   target. A step that runs behind its loads waits for them layer by layer ([`Engine::wait_layer`]).
//!
//! A transfer has ended once the event behind its batch is complete; [`Engine::poll`] says so and how it
//! ended. [`BatchTables`] turns the block tables of a batch into the device arrays that kernels read.

mod copies;
mod fault;
mod lane;
mod mover;
mod parts;
mod storage;
mod tables;

pub use fault::{Fault, FaultKind};
pub use lane::{LaneStats, LoadMark};
pub use parts::LayerwiseLoads;
pub use storage::{BlockKey, BlockStore, Damage, FileStore, FileStoreConfig, SyncPolicy};
pub(crate) use tables::map_slots;
pub use tables::{Batch, BatchTables, SeqSlice};

use std::sync::Arc;

use crate::device::{DeviceBuffer, Event, PinnedBuffer, Span, StreamRef, host};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::KvView;
use crate::manager::{
    BlockCopy, Direction, HostSlot, Outcome, Path, Place, SeqId, Transfer, TransferId,
};
use crate::ops::Kernels;
use crate::spec::{GroupPlan, LayerGroup};
use copies::Copies;
use fault::Faults;
use lane::{Lane, Move};
use parts::Parts;
use storage::{Start, Storage};

const OP: &str = "engine";

/// Host slots are multiples of this many bytes, so that direct I/O and registration never split a page.
const SLOT_ALIGN: u64 = 4096;

/// How large the host tier is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HostSize {
    /// Slots per device block (SGLang's `hicache_ratio`; its default is 2.0).
    Ratio(f64),
    /// Bytes of pinned host memory.
    Bytes(u64),
    /// Part of the memory that this process may have: that of the machine, or the limit of its memory cgroup
    /// (v2 or v1) where that is less. Refused when as much is not available now.
    Fraction(f64),
}

/// Sizes of an engine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Bytes of a block: the stride of the pool, a multiple of 128.
    pub block_bytes: usize,
    /// Blocks of the device pool, the null block included.
    pub num_blocks: u32,
    /// Slots of the host arena; 0 for no host tier.
    pub num_slots: u32,
}

impl EngineConfig {
    /// As many blocks as fit into `device_bytes`, and a host tier of the given size.
    ///
    /// # Errors
    /// `InvalidArgument` for a block size of no or odd bytes, a memory too small for two blocks (the null
    /// block and one more), more blocks than 32-bit ids; `Unsupported` for a ratio that is no finite number >= 0, or
    /// a fraction that is not of 0 to 1; `OutOfMemory`, with the arithmetic, for a fraction of the host that is not
    /// available.
    pub fn sized(block_bytes: usize, device_bytes: u64, host: HostSize) -> Result<Self> {
        let ids = |count: u64, what: &str| {
            u32::try_from(count).ok().filter(|n| *n <= i32::MAX as u32).ok_or_else(|| {
                Error::invalid(OP, format!("{count} {what} exceed 31-bit block ids"))
            })
        };
        if block_bytes == 0 || !block_bytes.is_multiple_of(128) {
            return Err(Error::invalid(
                OP,
                format!("{block_bytes} bytes per block are no positive multiple of 128"),
            ));
        }
        let num_blocks = ids(device_bytes / block_bytes as u64, "blocks")?;
        if num_blocks < 2 {
            return Err(Error::invalid(
                OP,
                format!(
                    "{device_bytes} bytes of device memory hold {num_blocks} blocks of {block_bytes} \
                     bytes; at least 2 are needed"
                ),
            ));
        }
        let slots = match host {
            HostSize::Ratio(ratio) if ratio.is_finite() && ratio >= 0.0 => {
                // Saturating: what exceeds the ids is refused below.
                (ratio * num_blocks as f64) as u64
            }
            HostSize::Ratio(ratio) => {
                return Err(Error::unsupported(OP, "host ratio", ratio, "finite numbers >= 0"));
            }
            HostSize::Bytes(bytes) => bytes / slot_bytes(block_bytes),
            HostSize::Fraction(fraction) if (0.0..=1.0).contains(&fraction) => {
                fraction_of_host(fraction)? / slot_bytes(block_bytes)
            }
            HostSize::Fraction(fraction) => {
                return Err(Error::unsupported(OP, "host fraction", fraction, "0 to 1"));
            }
        };
        Ok(Self { block_bytes, num_blocks, num_slots: ids(slots, "host slots")? })
    }

    /// Bytes of the device pool.
    pub fn device_bytes(&self) -> u64 {
        self.num_blocks as u64 * self.block_bytes as u64
    }

    /// Bytes of the host arena.
    pub fn host_bytes(&self) -> u64 {
        self.num_slots as u64 * slot_bytes(self.block_bytes)
    }
}

fn addressable(bytes: u64, kind: &'static str) -> Result<usize> {
    usize::try_from(bytes).map_err(|_| {
        let reason = "more than the address space".into();
        Error::new(OP, ErrorKind::OutOfMemory { kind, requested: bytes, reason })
    })
}

/// A part of what this process may have of the host, in bytes, if it is available.
fn fraction_of_host(fraction: f64) -> Result<u64> {
    let limits = host::describe_limits;
    let limit = host::limit_bytes().ok_or_else(|| {
        Error::invalid(OP, format!("the memory of the host is unknown ({}): say bytes", limits()))
    })?;
    let requested = (limit as f64 * fraction) as u64;
    match host::available_bytes() {
        Some(available) if requested > available => {
            let reason =
                format!("{fraction} of {limit} is more than the {available} left; {}", limits());
            Err(Error::new(OP, ErrorKind::OutOfMemory { kind: "pinned host", requested, reason }))
        }
        _ => Ok(requested),
    }
}

fn slot_bytes(block_bytes: usize) -> u64 {
    (block_bytes as u64).next_multiple_of(SLOT_ALIGN)
}

/// Bytes moved and the time it took, per direction.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EngineStats {
    /// Device to host.
    pub offload: LaneStats,
    /// Host to device.
    pub onboard: LaneStats,
    /// Host to storage; the busy time is of all workers together.
    pub persist: LaneStats,
    /// Storage to host; the busy time is of all workers together.
    pub fetch: LaneStats,
}

/// The pools of one device and the lanes between them. See the module documentation.
pub struct Engine {
    // Workers and lanes first: they have ended (lanes in `drop`) before the memory goes.
    storage: Option<Storage>,
    offload: Lane,
    onboard: Lane,
    /// Of onboards, and of offloads.
    load_parts: Parts,
    store_parts: Parts,
    copies: Copies,
    /// Recorded on the compute stream at every submission.
    fence: Event,
    faults: Faults,
    /// Ended and not yet reported.
    ended: Vec<(TransferId, Outcome)>,
    kernels: Arc<Kernels>,
    config: EngineConfig,
    pool: DeviceBuffer,
    /// Shared by the ranks that hold the same heads.
    arena: Arc<PinnedBuffer>,
}

impl Engine {
    /// Allocates pool, arena and lanes on the device of `kernels`.
    ///
    /// # Errors
    /// `OutOfMemory` for device or pinned memory that cannot be had; driver errors.
    pub fn new(kernels: Arc<Kernels>, config: EngineConfig) -> Result<Self> {
        let bytes = addressable(config.host_bytes(), "pinned host")?;
        let arena = Arc::new(kernels.device().alloc_pinned(bytes)?);
        Self::with_arena(kernels, config, arena)
    }

    /// An engine of the same sizes that has no host arena of its own but loads from that of `owner`, which
    /// holds the same heads (see [`crate::manager::RankSet::owner`]). What it is given to store lands there, too.
    ///
    /// # Errors
    /// Those of [`Self::new`].
    pub fn replica(kernels: Arc<Kernels>, owner: &Self) -> Result<Self> {
        Self::with_arena(kernels, owner.config, Arc::clone(&owner.arena))
    }

    fn with_arena(
        kernels: Arc<Kernels>,
        config: EngineConfig,
        arena: Arc<PinnedBuffer>,
    ) -> Result<Self> {
        let device = kernels.device();
        let pool = device.alloc(addressable(config.device_bytes(), "device")?)?;
        let whole = || Parts::whole(config.block_bytes as u64);
        Ok(Self {
            storage: None,
            load_parts: whole(),
            store_parts: whole(),
            offload: Lane::new(&kernels, Direction::Offload)?,
            onboard: Lane::new(&kernels, Direction::Onboard)?,
            copies: Copies::new(device)?,
            fence: device.event()?,
            faults: Faults::default(),
            ended: Vec::new(),
            kernels,
            config,
            pool,
            arena,
        })
    }

    /// The sizes it was built with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The device pool.
    pub fn pool(&self) -> Span {
        self.pool.span()
    }

    /// The memory of one block of the device pool.
    pub fn block(&self, block: u32) -> Result<Span> {
        let count = self.config.num_blocks;
        if block >= count {
            return Err(Error::invalid(OP, format!("block {block} of a pool of {count} blocks")));
        }
        let bytes = self.config.block_bytes as u64;
        Ok(Span::new(self.pool.address() + block as u64 * bytes, bytes))
    }

    /// The bytes of one host slot. They are stable while no transfer to the slot is outstanding.
    pub fn slot(&self, slot: HostSlot) -> Result<&[u8]> {
        let span = self.slot_span(slot)?;
        let start = (span.address - self.arena.address()) as usize;
        Ok(&self.arena.as_slice()[start..start + span.bytes as usize])
    }

    fn slot_span(&self, slot: HostSlot) -> Result<Span> {
        let count = self.config.num_slots;
        if slot >= count {
            return Err(Error::invalid(OP, format!("slot {slot} of an arena of {count} slots")));
        }
        let stride = slot_bytes(self.config.block_bytes);
        let address = self.arena.address() + slot as u64 * stride;
        Ok(Span::new(address, self.config.block_bytes as u64))
    }

    /// The pool as kernels see it through one layer group of `plan`.
    pub fn kv_view(&self, group: &LayerGroup) -> Result<KvView> {
        KvView::block_first(
            self.pool(),
            group.shape,
            group.block_size,
            group.layer_slots,
            self.config.num_blocks as u64,
            self.config.block_bytes as u64,
        )
    }

    /// The views of all groups of a plan.
    pub fn kv_views(&self, plan: &GroupPlan) -> Result<Vec<KvView>> {
        plan.groups.iter().map(|group| self.kv_view(group)).collect()
    }

    /// Copies blocks inside the pool on `compute`, in the order given: behind everything submitted to it so
    /// far, before everything submitted later. All the copies of a manager come before its next transfers.
    ///
    /// # Errors
    /// `InvalidArgument` for a block out of range: nothing was started.
    pub fn copy_blocks(&mut self, copies: &[BlockCopy], compute: StreamRef<'_>) -> Result<()> {
        for copy in copies {
            self.block(copy.from)?;
            self.block(copy.to)?;
        }
        let bytes = self.config.block_bytes as u64;
        self.copies.start(&self.kernels, copies, self.pool.span(), bytes, compute)
    }

    /// Starts transfers, in order per direction, behind all work submitted to `compute` so far (R2, R3).
    ///
    /// Blocks when a lane's ring is full, until its oldest batch has ended.
    ///
    /// # Errors
    /// `InvalidArgument` for a block or slot out of range: nothing was started.
    pub fn submit(&mut self, transfers: &[Transfer], compute: StreamRef<'_>) -> Result<()> {
        if transfers.is_empty() {
            return Ok(());
        }
        for transfer in transfers {
            if let Some(block) = transfer.path.block() {
                self.block(block)?;
            }
            self.slot_span(transfer.path.slot())?;
            if let Path::Persist { to: slot, .. } | Path::Fetch { from: slot, .. } = transfer.path {
                let slots = self.storage.as_ref().map_or(0, |s| s.store().num_slots());
                if slot >= slots {
                    return Err(Error::invalid(
                        OP,
                        format!("slot {slot} of a storage tier of {slots}"),
                    ));
                }
            }
        }
        for transfer in transfers {
            self.start_storage(transfer)?;
        }
        compute.record(&self.fence)?;
        for direction in [Direction::Offload, Direction::Onboard] {
            let of_direction = |t: &&Transfer| t.path.direction() == direction;
            let mut moves = transfers.iter().filter(of_direction).peekable();
            if moves.peek().is_none() {
                continue;
            }
            let (lane, parts, other) = match direction {
                Direction::Offload => (&mut self.offload, &self.store_parts, &self.onboard),
                _ => (&mut self.onboard, &self.load_parts, &self.offload),
            };
            if !self.faults.take_unordered(direction) {
                lane.wait(&self.fence)?;
            }
            while moves.peek().is_some() {
                lane.make_room(&mut self.ended)?;
                lane.start(
                    &mut self.faults,
                    parts,
                    other.is_busy(),
                    moves.by_ref().map(|transfer| {
                        let bytes = self.config.block_bytes as u64;
                        let address = |place| match place {
                            Place::Device(block) => self.pool.address() + block as u64 * bytes,
                            Place::Host(slot) | Place::Storage(slot) => {
                                self.arena.address() + slot as u64 * slot_bytes(bytes as usize)
                            }
                        };
                        let (src, dst) =
                            (address(transfer.path.from()), address(transfer.path.to()));
                        let Transfer { id, group, seq, .. } = *transfer;
                        Move { id, group, seq, src, dst, bytes }
                    }),
                )?;
            }
        }
        Ok(())
    }

    /// Hands a transfer to the storage workers, if it is theirs.
    fn start_storage(&mut self, transfer: &Transfer) -> Result<()> {
        let (slot, persists) = match transfer.path {
            Path::Persist { to, .. } => (to, true),
            Path::Fetch { from, .. } => (from, false),
            Path::Offload { .. } | Path::Onboard { .. } => return Ok(()),
        };
        let span = self.slot_span(transfer.path.slot())?;
        let Some(storage) = &mut self.storage else { return Ok(()) };
        let start = Start {
            id: transfer.id,
            slot,
            key: BlockKey { group: transfer.group, hash: transfer.hash },
            address: span.address,
            bytes: span.bytes as usize,
            persists,
            fault: self.faults.take(transfer.path.direction(), transfer.id),
        };
        // SAFETY: a whole slot of the arena, which goes after the storage. The manager reserves it for this
        // transfer until it is reported as ended; the transfers that used it before were reported.
        unsafe { storage.start(start) }
    }

    /// Attaches a storage tier, with so many threads that move blocks to and from it.
    ///
    /// # Errors
    /// `InvalidArgument` when there is one; `Io` when a thread cannot be started.
    pub fn attach_storage(&mut self, store: Arc<dyn BlockStore>, threads: usize) -> Result<()> {
        if self.storage.is_some() {
            return Err(Error::invalid(OP, "a storage tier is attached already; detach it first"));
        }
        self.storage = Some(Storage::new(store, threads)?);
        Ok(())
    }

    /// Detaches the storage tier once the transfers given to it have ended; their ends are reported by the
    /// next [`Self::poll`]. The manager must have detached it before.
    pub fn detach_storage(&mut self) {
        if let Some(mut storage) = self.storage.take() {
            storage.drain(&mut self.ended);
        }
    }

    /// The store of the storage tier.
    pub fn store(&self) -> Option<&dyn BlockStore> {
        self.storage.as_ref().map(Storage::store)
    }

    /// Appends to `ended` the transfers that have ended since the last call, and how.
    pub fn poll(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        self.offload.poll(&mut self.ended)?;
        self.onboard.poll(&mut self.ended)?;
        if let Some(storage) = &mut self.storage {
            storage.poll(&mut self.ended);
        }
        self.faults.hold_back(&mut self.ended);
        ended.append(&mut self.ended);
        Ok(())
    }

    /// Blocks until every transfer submitted so far has ended; appends what was not reported yet.
    pub fn wait(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        self.offload.drain(&mut self.ended)?;
        self.onboard.drain(&mut self.ended)?;
        if let Some(storage) = &mut self.storage {
            storage.drain(&mut self.ended);
        }
        self.faults.release(&mut self.ended);
        ended.append(&mut self.ended);
        Ok(())
    }

    /// Makes later work of `compute` wait for all onboards submitted so far, without blocking the host.
    /// Whether they *succeeded* is known only once they were polled.
    pub fn wait_onboarded(&self, compute: StreamRef<'_>) -> Result<()> {
        self.onboard.make_wait(compute)
    }

    /// From now on onboards come layer by layer, for steps that wait by [`Self::wait_layer`].
    ///
    /// # Errors
    /// `InvalidArgument` while onboards are under way, and for groups whose layers lie otherwise than the native
    /// layout has them; `Unsupported` for no parts.
    pub fn load_by_layer(&mut self, plan: &GroupPlan, loads: LayerwiseLoads) -> Result<()> {
        if self.onboard.outstanding() > 0 {
            return Err(Error::invalid(OP, "onboards are under way: wait until they have ended"));
        }
        self.load_parts = Parts::of(plan, loads, self.config.block_bytes as u64)?;
        Ok(())
    }

    /// What the steps of these sequences have to wait for: the last onboard submitted for any of them. `None` when
    /// all have ended.
    pub fn last_load(&self, seqs: impl IntoIterator<Item = SeqId>) -> Option<LoadMark> {
        self.onboard.last_load(seqs)
    }

    /// Makes later work of `compute` wait until this layer of the loads up to `load` has come, without blocking
    /// the host (R3); before the layer's append and attention. Recurrent layers wait for layer 0, which the states
    /// come with. Whether the loads *succeeded* is known only once they were polled.
    pub fn wait_layer(&self, load: LoadMark, layer: u32, compute: StreamRef<'_>) -> Result<()> {
        self.onboard.make_wait_for_layer(load, layer, &self.load_parts, compute)
    }

    /// Transfers submitted and not yet reported.
    pub fn outstanding(&self) -> usize {
        self.offload.outstanding()
            + self.onboard.outstanding()
            + self.storage.as_ref().map_or(0, Storage::outstanding)
            + self.faults.held()
            + self.ended.len()
    }

    /// Bytes moved so far and the time it took, by events, of the transfers that have ended.
    pub fn stats(&self) -> EngineStats {
        let (persist, fetch) = self.storage.as_ref().map(Storage::stats).unwrap_or_default();
        EngineStats { offload: self.offload.stats(), onboard: self.onboard.stats(), persist, fetch }
    }

    /// Makes later transfers misbehave: for tests of what stands on the engine.
    pub fn inject(&mut self, fault: Fault) {
        self.faults.inject(fault);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // The arena and the descriptors must outlive the copies. An error leaves nothing to do but free.
        let _ = self.offload.drain(&mut self.ended);
        let _ = self.onboard.drain(&mut self.ended);
        let _ = self.copies.drain();
    }
}
