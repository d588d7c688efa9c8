//! One direction of blocks that slots hold encoded: rows for the codec kernels, a launch per group and section, and
//! what became of them.

use std::sync::Arc;

use super::config::EngineConfig;
use super::format::{GroupFormat, Section, SlotFormat};
use super::lane::Move;
use super::parts::Parts;
use crate::abi::{HKV_SLOT_CORRUPT, HKV_SLOT_OK, hkv_slot_block, hkv_slot_result};
use crate::codec::Codec;
use crate::device::{Device, PinnedBuffer, Span, StreamRef};
use crate::error::Result;
use crate::layout::KvView;
use crate::manager::{Direction, Outcome, TransferId};
use crate::ops::{CodecArgs, CtaQuota, Kernels};

/// Rows that a batch has room for at first.
const ROWS: usize = 256;

/// The rows of a batch: read, and answered, by the device while it is in flight.
pub(super) struct Rows {
    /// [`hkv_slot_block`].
    blocks: PinnedBuffer,
    /// [`hkv_slot_result`], one per row.
    results: PinnedBuffer,
    /// Whose they are.
    transfers: Vec<TransferId>,
    /// What they have grown out of: to free it would be to wait for the device.
    outgrown: Vec<PinnedBuffer>,
}

impl Rows {
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            blocks: device.alloc_pinned(ROWS * size_of::<hkv_slot_block>())?,
            results: device.alloc_pinned(ROWS * size_of::<hkv_slot_result>())?,
            transfers: Vec::new(),
            outgrown: Vec::new(),
        })
    }

    /// Empties the rows of a batch that has ended, and makes room for so many.
    pub fn reserve(&mut self, rows: usize, device: &Device) -> Result<()> {
        self.transfers.clear();
        for (buffer, row) in [
            (&mut self.blocks, size_of::<hkv_slot_block>()),
            (&mut self.results, size_of::<hkv_slot_result>()),
        ] {
            if rows * row > buffer.len() {
                let larger = device.alloc_pinned((rows * row).next_power_of_two())?;
                self.outgrown.push(std::mem::replace(buffer, larger));
            }
        }
        Ok(())
    }

    /// Transfers whose blocks are not where they should be, once the batch has ended: what no slot holds, and what
    /// slots hold no longer.
    pub fn spoilt(&self) -> impl Iterator<Item = (TransferId, Outcome)> + '_ {
        const STATUS: usize = std::mem::offset_of!(hkv_slot_result, status);
        let results = self.results.as_slice().as_chunks::<{ size_of::<hkv_slot_result>() }>().0;
        self.transfers.iter().zip(results).filter_map(|(&id, result)| {
            let mut status = [0; 4];
            status.copy_from_slice(&result[STATUS..STATUS + 4]);
            match i32::from_ne_bytes(status) as u32 {
                HKV_SLOT_OK => None,
                HKV_SLOT_CORRUPT => Some((id, Outcome::Failed)),
                _ => Some((id, Outcome::Unfit)),
            }
        })
    }
}

/// Bytes that were submitted: in slots, and of the blocks.
#[derive(Clone, Copy, Default)]
pub(super) struct Coded {
    pub slot_bytes: u64,
    pub block_bytes: u64,
}

/// Launches codecs, one way.
pub(super) struct Coder {
    kernels: Arc<Kernels>,
    slots: SlotFormat,
    direction: Direction,
    /// The pool, as the kernels of each group's codec see it.
    views: Vec<Option<KvView>>,
}

impl Coder {
    /// # Errors
    /// Groups whose blocks do not fit the pool's.
    pub fn new(
        kernels: &Arc<Kernels>,
        config: &EngineConfig,
        pool: Span,
        direction: Direction,
    ) -> Result<Self> {
        let view = |group: &GroupFormat| match group.is_encoded() {
            true => group.view(pool, config.block_bytes as u64, config.num_blocks.into()),
            false => Ok(None),
        };
        Ok(Self {
            kernels: kernels.clone(),
            views: config.slots.groups().iter().map(view).collect::<Result<_>>()?,
            slots: config.slots.clone(),
            direction,
        })
    }

    /// Whether the blocks of a group are its to move.
    pub fn moves(&self, group: u32) -> bool {
        self.slots.encoded(group).is_some()
    }

    /// Rows that a move takes.
    pub fn rows(&self, group: u32) -> usize {
        self.slots.encoded(group).map_or(0, |format| format.sections.len())
    }

    /// Launches part `part` of `of` of those moves that are its own; their rows are in `rows` from then on.
    ///
    /// # Safety
    /// `rows` has room for them, and is nobody else's until `stream` has passed the launches. Until then, too, blocks
    /// and slots of the moves are live memory; nothing else writes what is read or accesses what is written.
    pub unsafe fn submit(
        &self,
        rows: &mut Rows,
        moves: &[Move],
        parts: &Parts,
        (part, of): (usize, usize),
        stream: StreamRef<'_>,
    ) -> Result<Coded> {
        let mut coded = Coded::default();
        for (group, (format, view)) in (0..).zip(self.slots.groups().iter().zip(&self.views)) {
            let Some(view) = view else { continue };
            let range = parts.range(group, part, of);
            for section in format.sections.iter().filter(|s| range.contains(&s.offset)) {
                let first = rows.transfers.len();
                let end = section.offset + section.bytes;
                for m in moves.iter().filter(|m| m.group == group && end <= m.bytes) {
                    let slot = (m.slot + section.offset) as *mut _;
                    let row = hkv_slot_block { block: m.block.into(), slot };
                    let at = rows.blocks.address() as *mut hkv_slot_block;
                    // SAFETY: the caller's promise: there is room, and no launch reads it.
                    unsafe { at.add(rows.transfers.len()).write(row) };
                    rows.transfers.push(m.id);
                }
                let count = (rows.transfers.len() - first) as u64;
                let args = self.args(format.codec, section, *view, rows, first, count);
                // SAFETY: the caller's promise. The rows name blocks of the view, and slots at multiples of 128
                // bytes that no other move has.
                unsafe {
                    match self.direction {
                        Direction::Offload => self.kernels.encode(&args, stream)?,
                        _ => self.kernels.decode(&args, stream)?,
                    }
                }
                coded.slot_bytes += count * section.bytes;
                coded.block_bytes += count * section.geometry.raw_bytes() as u64;
            }
        }
        Ok(coded)
    }

    fn args(
        &self,
        codec: Codec,
        section: &Section,
        kv: KvView,
        rows: &Rows,
        first: usize,
        count: u64,
    ) -> CodecArgs {
        let span = |buffer: &PinnedBuffer, row: usize| {
            Span::new(buffer.address() + (first * row) as u64, count * row as u64)
        };
        CodecArgs {
            codec,
            kv,
            first_layer_slot: section.first_layer_slot,
            num_layers: section.geometry.layers() as u32,
            blocks: span(&rows.blocks, size_of::<hkv_slot_block>()),
            num_blocks: count,
            results: span(&rows.results, size_of::<hkv_slot_result>()),
            quota: link_quota(codec),
        }
    }
}

/// As many CTAs as it takes to fill a PCIe 5 link (`hybridkv bench codec`, docs/codecs.md): 8 do for what is little
/// arithmetic, quantising takes 16.
fn link_quota(codec: Codec) -> CtaQuota {
    match codec {
        // No kernel runs for lxe.
        Codec::Raw | Codec::Lx4 | Codec::Lxe | Codec::Fp8(_) => CtaQuota::at_most(8),
        Codec::Int8 | Codec::Int6 | Codec::Int4 => CtaQuota::at_most(16),
    }
}
