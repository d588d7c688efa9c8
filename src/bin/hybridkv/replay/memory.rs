//! The memory behind a replayed session's tiers: an engine on the CPU device, whose blocks hold what names
//! them, so that a wrong copy shows.
//!
//! Transfers wait here until a tick ends them, in the order in which the manager emitted them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use hybridkv::device::{Device, PinnedBuffer, Stream};
use hybridkv::engine::{
    BlockStore, Engine, EngineConfig, Fault, FaultKind, FileStore, FileStoreConfig, SlotFormat,
    SyncPolicy,
};
use hybridkv::error::Result;
use hybridkv::manager::{
    BlockCopy, BlockHash, BlockId, Direction, Outcome, StoredBlock, Transfer, TransferId,
};
use hybridkv::ops::Kernels;

use super::ops::{Misbehaviour, Place};

/// Bytes of a block in this memory, whatever a block of the model has.
const BLOCK: usize = 128;

/// See the module documentation.
pub struct Memory {
    engine: Engine,
    /// Stands for the stream of the steps.
    compute: Stream,
    /// One block on its way to or from the device pool.
    staging: PinnedBuffer,
    pending: VecDeque<Transfer>,
    /// Put off to the next tick.
    delayed: Vec<Transfer>,
    /// What blocks hold that are stored under names of one sequence alone.
    kept: HashMap<(usize, BlockHash), Vec<u8>>,
    faults: VecDeque<(Place, Misbehaviour, u32)>,
    ended: Vec<(TransferId, Outcome)>,
}

impl Memory {
    /// Memory of that many blocks and host slots.
    pub fn new(num_blocks: u32, num_slots: u32) -> Result<Self> {
        let device = Device::cpu();
        let kernels = Arc::new(Kernels::load(&device)?);
        Ok(Self {
            engine: Engine::new(
                kernels,
                EngineConfig {
                    block_bytes: BLOCK,
                    num_blocks,
                    num_slots,
                    slots: SlotFormat::AS_IS,
                },
            )?,
            compute: device.stream()?,
            staging: device.alloc_pinned(BLOCK)?,
            pending: VecDeque::new(),
            delayed: Vec::new(),
            kept: HashMap::new(),
            faults: VecDeque::new(),
            ended: Vec::new(),
        })
    }

    /// Attaches a storage tier of files below `path`; gives its slots and what they hold.
    pub fn attach_storage(
        &mut self,
        path: &str,
        bytes: u64,
        identity: [u8; 32],
    ) -> Result<(u32, Vec<StoredBlock>)> {
        let store = FileStore::open(FileStoreConfig {
            path: path.into(),
            bytes,
            block_bytes: BLOCK,
            groups: Vec::new(),
            identity,
            sync: SyncPolicy::Never,
        })?;
        let found = (store.num_slots(), store.stored().to_vec());
        self.engine.attach_storage(Arc::new(store), 1)?;
        Ok(found)
    }

    /// Empties the storage tier, to which no transfer may be outstanding.
    pub fn clear_storage(&mut self) -> Result<()> {
        self.engine.store().map_or(Ok(()), BlockStore::clear)
    }

    /// Stands for the step that computes a block.
    pub fn write(&mut self, block: BlockId, group: usize, hash: &BlockHash) -> Result<()> {
        self.staging.as_mut_slice().copy_from_slice(&contents(group, hash));
        let target = self.engine.block(block)?.address;
        // SAFETY: a whole block of the engine's pool and the staging buffer, both of this size; the copy
        // has ended when this returns.
        unsafe { self.compute.as_ref().copy(self.staging.address(), target, BLOCK)? };
        self.compute.as_ref().synchronize()
    }

    /// Reads a block into the staging buffer.
    fn read(&self, block: BlockId) -> Result<&[u8]> {
        let source = self.engine.block(block)?.address;
        // SAFETY: as in `write`, the other way.
        unsafe { self.compute.as_ref().copy(source, self.staging.address(), BLOCK)? };
        self.compute.as_ref().synchronize()?;
        Ok(self.staging.as_slice())
    }

    /// Notes what a block holds that is about to be stored under a name of its sequence alone.
    pub fn keep(&mut self, block: BlockId, group: usize, hash: BlockHash) -> Result<()> {
        let bytes = self.read(block)?.to_vec();
        self.kept.insert((group, hash), bytes);
        Ok(())
    }

    /// Whether a block holds what it should.
    fn holds(&mut self, block: BlockId, group: usize, hash: &BlockHash) -> Result<bool> {
        let kept = self.kept.remove(&(group, *hash));
        let expected = kept.unwrap_or_else(|| contents(group, hash).to_vec());
        Ok(self.read(block)? == expected)
    }

    /// Copies blocks inside the pool.
    pub fn copy(&mut self, copies: &[BlockCopy]) -> Result<()> {
        self.engine.copy_blocks(copies, self.compute.as_ref())
    }

    /// Takes a transfer that the manager has emitted.
    pub fn push(&mut self, transfer: Transfer) {
        self.pending.push_back(transfer);
    }

    /// Makes the next `count` transfers of a kind misbehave.
    pub fn inject(&mut self, place: Place, kind: Misbehaviour, count: u32) {
        if count > 0 {
            self.faults.push_back((place, kind, count));
        }
    }

    /// Ends the oldest pending transfer, or the oldest of `only` one direction, unless it is put off to the
    /// next tick; gives it and how it ended. `None` when none is pending.
    pub fn end_next(&mut self, only: Option<Direction>) -> Result<Option<(TransferId, Outcome)>> {
        let wanted = |t: &Transfer| only.is_none_or(|only| only == t.path.direction());
        while let Some(transfer) =
            self.pending.iter().position(wanted).and_then(|at| self.pending.remove(at))
        {
            let direction = transfer.path.direction();
            let fault = match self.take_fault(direction) {
                Some(Misbehaviour::Delay) => {
                    self.delayed.push(transfer);
                    continue;
                }
                Some(Misbehaviour::Fail) => Some(FaultKind::Fail),
                Some(Misbehaviour::Short) => Some(FaultKind::Short),
                Some(Misbehaviour::Corrupt) => Some(FaultKind::Corrupt),
                None => None,
            };
            if let Some(kind) = fault {
                self.engine.inject(Fault { direction, kind, count: 1 });
            }
            self.engine.submit(&[transfer], self.compute.as_ref())?;
            self.engine.wait(&mut self.ended)?;
            let Some((id, mut outcome)) = self.ended.pop() else { continue };
            // What came back is looked at before it may be used (R8).
            if direction == Direction::Onboard
                && outcome == Outcome::Succeeded
                && let Some(block) = transfer.path.block()
                && !self.holds(block, transfer.group as usize, &transfer.hash)?
            {
                outcome = Outcome::Failed;
            }
            return Ok(Some((id, outcome)));
        }
        Ok(None)
    }

    /// Ends a tick: what it put off is next.
    pub fn end_tick(&mut self) {
        self.pending.extend(self.delayed.drain(..));
        self.pending.make_contiguous().sort_by_key(|transfer| transfer.id);
    }

    /// The fault of the next transfer of a direction, used up.
    fn take_fault(&mut self, direction: Direction) -> Option<Misbehaviour> {
        let of = match direction {
            Direction::Offload => Place::Store,
            Direction::Onboard => Place::Load,
            Direction::Persist => Place::StorageWrite,
            Direction::Fetch => Place::StorageRead,
        };
        let at = self.faults.iter().position(|&(place, ..)| place == of)?;
        let (_, kind, count) = &mut self.faults[at];
        let kind = *kind;
        *count -= 1;
        if *count == 0 {
            self.faults.remove(at);
        }
        Some(kind)
    }
}

/// What a computed block holds.
fn contents(group: usize, hash: &BlockHash) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    for piece in bytes.chunks_exact_mut(16) {
        piece.copy_from_slice(hash.as_bytes());
    }
    bytes[..8].copy_from_slice(&(group as u64).to_le_bytes());
    bytes
}
