//! Executes the manager's transfers on a device.
//!
//! An [`Engine`] owns the device pool, the pinned host arena, and one *lane* (stream, descriptor ring,
//! events) per direction; it does not own the manager, so that one manager may drive the engines of
//! several ranks. It keeps the ordering half of the safety rules:
//! - R2: an offload waits for an event recorded on the compute stream at submission; the step that wrote
//!   the block was submitted before the manager emitted the transfer. Layer by layer it waits for the events of
//!   the step's layers ([`Engine::begin_step`]).
//! - R3: an onboard waits for the same event, and so for the last readers and for pending fills of its
//!   target. A step that runs behind its loads waits for them layer by layer ([`Engine::wait_layer`]).
//!
//! Onboards start at once; offloads start by chunks, when the engine is called ([`Engine::poll`],
//! [`Engine::wait_for`]), as [`Pacing`] has it.
//!
//! A transfer has ended once the event behind its batch is complete; [`Engine::poll`] says so and how it
//! ended. [`BatchTables`] turns the block tables of a batch into the device arrays that kernels read.

mod coder;
mod config;
mod copies;
mod fault;
mod fences;
mod format;
mod lane;
mod parts;
mod schedule;
mod storage;
mod stores;
mod tables;

pub use config::{EngineConfig, HostSize};
pub use fault::{Fault, FaultKind};
pub use fences::StepMarks;
pub use format::{GroupFormat, HostCodecs, Section, SlotFormat};
pub use lane::{LaneStats, LoadMark};
pub use parts::Layerwise;
pub use schedule::{Pacing, StepTime};
pub use storage::{BlockKey, BlockStore, Damage, FileStore, FileStoreConfig, SyncPolicy};
pub(crate) use tables::map_slots;
pub use tables::{Batch, BatchTables, SeqSlice};

use std::sync::Arc;

use crate::device::{DeviceBuffer, Event, PinnedBuffer, Span, StreamRef};
use crate::error::{Error, Result};
use crate::layout::KvView;
use crate::manager::{BlockCopy, Direction, HostSlot, Outcome, Path, SeqId, Transfer, TransferId};
use crate::movement::LinkModel;
use crate::ops::Kernels;
use crate::spec::{GroupPlan, LayerGroup};
use coder::Coder;
use config::addressable;
use copies::Copies;
use fault::Faults;
use fences::{Behind, Fences};
use lane::{Fate, Lane, Move};
use parts::Parts;
use storage::{Start, Storage};
use stores::Stores;

const OP: &str = "engine";

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
    /// Share of the time that offloads get beside the caller's steps, 0 to 1: see [`Engine::report_step`].
    pub store_share: f64,
}

/// The pools of one device and the lanes between them. See the module documentation.
pub struct Engine {
    // Workers and lanes first: they have ended (lanes in `drop`) before the memory goes.
    storage: Option<Storage>,
    offload: Stores,
    onboard: Lane,
    /// Of onboards.
    load_parts: Parts,
    copies: Copies,
    fences: Fences,
    faults: Faults,
    /// Ended and not yet reported.
    ended: Vec<(TransferId, Outcome)>,
    kernels: Arc<Kernels>,
    config: EngineConfig,
    pool: DeviceBuffer,
    /// Shared by the ranks that hold the same heads.
    arena: Arc<PinnedBuffer>,
}

/// What of a submission others are to report now.
#[derive(Default)]
struct Handed {
    /// Transfers that storage was offered, its own or not.
    storage: usize,
    /// Loads in flight.
    loads: usize,
    /// Whether stores are queued.
    stores: bool,
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
        Self::with_arena(kernels, owner.config.clone(), Arc::clone(&owner.arena))
    }

    fn with_arena(
        kernels: Arc<Kernels>,
        config: EngineConfig,
        arena: Arc<PinnedBuffer>,
    ) -> Result<Self> {
        let device = kernels.device();
        let pool = device.alloc(addressable(config.device_bytes(), "device")?)?;
        let model = Arc::new(LinkModel::calibrate(&kernels)?);
        let whole = || Parts::whole(config.block_bytes as u64, &config.slots);
        let coder = |way| Coder::new(&kernels, &config, pool.span(), way);
        Ok(Self {
            storage: None,
            load_parts: whole(),
            offload: Stores::new(&kernels, &model, coder(Direction::Offload)?, whole())?,
            onboard: {
                let way = Direction::Onboard;
                Lane::new(&kernels, &model, coder(way)?, way)?
            },
            copies: Copies::new(device)?,
            fences: Fences::new(device),
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

    /// The bytes of one host slot that blocks use. They are stable while no transfer to the slot is outstanding.
    pub fn slot(&self, slot: HostSlot) -> Result<&[u8]> {
        let span = self.slot_span(slot)?;
        let start = (span.address - self.arena.address()) as usize;
        Ok(&self.arena.as_slice()[start..start + span.bytes as usize])
    }

    /// Reads the block of a group out of its host slot: the bits `[layer][K|V][head][token][dim]` of it that the
    /// slot holds, verified where a codec wrote them.
    ///
    /// # Errors
    /// `Corrupt` for a slot that does not hold a block of this group and codec, whole; `InvalidArgument` for a slot
    /// out of range, or a group whose elements no codec knows.
    pub fn read_slot(&self, slot: HostSlot, group: u32) -> Result<Vec<u16>> {
        let Some(format) = self.config.slots.groups().get(group as usize) else {
            return Err(Error::invalid(
                OP,
                format!("group {group}: what its slots hold is not known"),
            ));
        };
        format.read(self.slot(slot)?)
    }

    /// Makes one bit of what the host slots hold wrong: for tests of what stands on them.
    ///
    /// # Errors
    /// `InvalidArgument` for a bit beyond the slot, or while transfers are outstanding.
    pub fn damage_slot(&mut self, slot: HostSlot, bit: u64) -> Result<()> {
        let span = self.slot_span(slot)?;
        if self.outstanding() > 0 || bit / 8 >= span.bytes {
            return Err(Error::invalid(
                OP,
                format!(
                    "bit {bit} of a slot of {} bytes, {} transfers outstanding",
                    span.bytes,
                    self.outstanding()
                ),
            ));
        }
        let byte = (span.address + bit / 8) as *mut u8;
        // SAFETY: a byte of the arena, which nothing else accesses while no transfer is outstanding: slices of slots
        // borrow the engine.
        unsafe { *byte ^= 1 << (bit % 8) };
        Ok(())
    }

    fn slot_span(&self, slot: HostSlot) -> Result<Span> {
        let count = self.config.num_slots;
        if slot >= count {
            return Err(Error::invalid(OP, format!("slot {slot} of an arena of {count} slots")));
        }
        let stride = self.config.slots.stride(self.config.block_bytes);
        let address = self.arena.address() + slot as u64 * stride;
        Ok(Span::new(address, self.config.slot_bytes() as u64))
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
        if !copies.is_empty() {
            self.fences.forget_step();
        }
        self.copies.start(&self.kernels, copies, self.pool.span(), bytes, compute)
    }

    /// Starts transfers, in order per direction, behind all work submitted to `compute` so far (R2, R3).
    ///
    /// Blocks when a lane's ring is full, until its oldest batch has ended.
    ///
    /// # Errors
    /// `InvalidArgument` for a block or slot out of range, or a slot of another codec: nothing was started. After a
    /// driver error every transfer is still reported by later polls: what was not handed over by then as failed, with
    /// nothing of it under way. What the driver could not even wait for is never reported: its blocks and slots must
    /// not be used, and later transfers of its direction are refused.
    pub fn submit(&mut self, transfers: &[Transfer], compute: StreamRef<'_>) -> Result<()> {
        if transfers.is_empty() {
            return Ok(());
        }
        for transfer in transfers {
            if let Some(block) = transfer.path.block() {
                self.block(block)?;
            }
            self.slot_span(transfer.path.slot())?;
            let codec = self.config.slots.codec(transfer.group);
            if transfer.codec != codec {
                return Err(Error::invalid(
                    OP,
                    format!(
                        "a slot of group {} in {}, the engine's are in {codec}: build the manager's host tier with \
                         EngineConfig::host",
                        transfer.group, transfer.codec
                    ),
                ));
            }
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
        let mut handed = Handed::default();
        let started = self.start(transfers, compute, &mut handed);
        if started.is_err() {
            let direction = |t: &&Transfer| t.path.direction();
            let of_direction = |wanted| transfers.iter().filter(move |t| direction(t) == wanted);
            let storage = transfers[handed.storage..]
                .iter()
                .filter(|t| matches!(direction(t), Direction::Persist | Direction::Fetch));
            let loads = of_direction(Direction::Onboard)
                .skip(handed.loads)
                .filter(|_| !self.onboard.is_poisoned());
            let stores = of_direction(Direction::Offload).filter(|_| !handed.stores);
            self.ended.extend(storage.chain(loads).chain(stores).map(|t| (t.id, Outcome::Failed)));
        }
        started
    }

    fn start(
        &mut self,
        transfers: &[Transfer],
        compute: StreamRef<'_>,
        handed: &mut Handed,
    ) -> Result<()> {
        for transfer in transfers {
            self.start_storage(transfer)?;
            handed.storage += 1;
        }
        let of_direction =
            |wanted| transfers.iter().filter(move |t| t.path.direction() == wanted).peekable();
        let fence = self.fences.record(compute)?;
        let (pool, arena) = (self.pool.address(), self.arena.address());
        let block_bytes = self.config.block_bytes as u64;
        let (slots, stride) =
            (self.config.slots.clone(), self.config.slots.stride(self.config.block_bytes));
        let as_move = |transfer: &Transfer| {
            let Transfer { id, group, seq, path, .. } = *transfer;
            let block = path.block().unwrap_or_default();
            let (at, slot) =
                (pool + u64::from(block) * block_bytes, arena + u64::from(path.slot()) * stride);
            let bytes = slots.moved_bytes(group, block_bytes);
            let (src, dst, dst_bytes) = match path.direction() {
                Direction::Onboard => (slot, at, block_bytes),
                _ => (at, slot, bytes),
            };
            Move { id, group, seq, block, src, dst, slot, bytes, dst_bytes, fate: Fate::default() }
        };
        let mut loads = of_direction(Direction::Onboard);
        if loads.peek().is_some() && !self.faults.take_unordered(Direction::Onboard) {
            self.onboard.wait(fence.whole())?;
        }
        while loads.peek().is_some() {
            self.onboard.make_room(&mut self.ended)?;
            let stores = self.offload.is_busy();
            let loads = loads.by_ref().map(as_move);
            handed.loads +=
                self.onboard.start_whole(loads, &self.load_parts, stores, &mut self.faults)?;
        }
        let mut stores = of_direction(Direction::Offload);
        if stores.peek().is_some() {
            let behind = match self.faults.take_unordered(Direction::Offload) {
                true => Behind::Nothing,
                false => self.fences.behind(&fence),
            };
            self.offload.push(stores.map(as_move), behind);
        }
        handed.stores = true;
        self.pump(false)
    }

    /// Starts the stores that may run now.
    fn pump(&mut self, urgent: bool) -> Result<()> {
        self.offload.pump(urgent, self.onboard.is_busy(), &mut self.faults)
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
        self.move_on()?;
        if let Some(storage) = &mut self.storage {
            storage.poll(&mut self.ended);
        }
        self.faults.hold_back(&mut self.ended);
        ended.append(&mut self.ended);
        Ok(())
    }

    /// Retires what has ended and starts the stores whose turn it is.
    fn move_on(&mut self) -> Result<()> {
        self.offload.poll(&mut self.ended)?;
        self.onboard.poll(&mut self.ended)?;
        self.pump(false)
    }

    /// Blocks until an event of the caller's is complete, as [`Event::synchronize`] does, and keeps stores moving
    /// meanwhile: they start by chunks, when the engine is called.
    pub fn wait_for(&mut self, event: &Event) -> Result<()> {
        while self.offload.outstanding() > 0 {
            if event.is_complete()? {
                return Ok(());
            }
            self.move_on()?;
            std::thread::yield_now();
        }
        event.synchronize()
    }

    /// Blocks until every transfer submitted so far has ended; appends what was not reported yet.
    pub fn wait(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        self.drain()?;
        if let Some(storage) = &mut self.storage {
            storage.drain(&mut self.ended);
        }
        self.faults.release(&mut self.ended);
        ended.append(&mut self.ended);
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        self.pump(true)?;
        while self.offload.outstanding() > 0 {
            self.offload.wait_oldest(&mut self.ended)?;
            self.pump(true)?;
        }
        self.onboard.drain(&mut self.ended)
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
    pub fn load_by_layer(&mut self, plan: &GroupPlan, loads: Layerwise) -> Result<()> {
        if self.onboard.outstanding() > 0 {
            return Err(Error::invalid(OP, "onboards are under way: wait until they have ended"));
        }
        let bytes = self.config.block_bytes as u64;
        self.load_parts = Parts::of(plan, loads, bytes, &self.config.slots, Direction::Onboard)?;
        Ok(())
    }

    /// From now on offloads come layer by layer, each part behind its own layers of the step that wrote the blocks,
    /// where the caller marks them: see [`Self::begin_step`].
    ///
    /// # Errors
    /// Those of [`Self::load_by_layer`], with offloads.
    pub fn store_by_layer(&mut self, plan: &GroupPlan, stores: Layerwise) -> Result<()> {
        if self.offload.outstanding() > 0 {
            return Err(Error::invalid(OP, "offloads are under way: wait until they have ended"));
        }
        let bytes = self.config.block_bytes as u64;
        let parts = Parts::of(plan, stores, bytes, &self.config.slots, Direction::Offload)?;
        self.fences.set_parts(parts.most());
        self.offload.set_parts(parts);
        Ok(())
    }

    /// Begins to mark a step, before its first layer is submitted: [`StepMarks::layer_computed`] follows the append
    /// of every layer, [`Self::end_step`] the last one.
    ///
    /// Offloads submitted then, up to the next step, start part by part behind these marks and not behind the
    /// stream (R2). What they store must have been written by this step or before it: until the next step begins
    /// nothing else on the stream may write blocks that the manager gives out for offload. The engine's own
    /// [`Self::copy_blocks`] may: offloads wait for the whole stream again after it.
    ///
    /// # Errors
    /// Driver errors.
    pub fn begin_step(&mut self) -> Result<StepMarks> {
        self.fences.begin_step(self.offload.parts())
    }

    /// Ends a step whose layers were all submitted.
    pub fn end_step(&mut self, marks: StepMarks) {
        self.fences.end_step(marks);
    }

    /// How stores share the link and the device with loads and steps.
    ///
    /// # Errors
    /// `InvalidArgument` for figures that make no sense: nothing is changed.
    pub fn set_pacing(&mut self, pacing: Pacing) -> Result<()> {
        pacing.check()?;
        self.offload.set_pacing(pacing);
        Ok(())
    }

    /// Reports how long a step took on the device, in the order of the steps. From steps with and without stores
    /// beside them the engine finds how much of the time stores may have ([`Pacing::tolerated_slowdown`]);
    /// [`EngineStats::store_share`] says it. Without reports stores have all of it.
    pub fn report_step(&mut self, step: StepTime) {
        self.offload.step(step);
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
        let (offload, onboard) = (self.offload.stats(), self.onboard.stats());
        EngineStats { offload, onboard, persist, fetch, store_share: self.offload.share() }
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
