//! The device arrays of one batch: block tables, slot mapping, lengths.
//!
//! They lie in one device buffer and go up in one copy per step, on the compute stream, so that no step
//! overwrites what an earlier one still reads. The copy comes from one of two pinned staging buffers; a
//! buffer is written again once the copy from it is done. Sections stand at fixed offsets, the block ids
//! last, so that only the used part is copied and addresses change only when the buffers grow.

use std::ops::Range;

use crate::device::{Device, DeviceBuffer, Event, PinnedBuffer, Span, StreamRef};
use crate::error::{Error, Result};
use crate::manager::{BlockRow, Manager, SeqId};
use crate::ops::BlockTables;
use crate::spec::LayerGroup;

const OP: &str = "batch tables";
/// Alignment of sections.
const ALIGN: usize = 256;

/// The new tokens of one sequence in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqSlice {
    /// The sequence.
    pub seq: SeqId,
    /// Absolute position of its first new token: the tokens before it are in the cache.
    pub start: u32,
    /// How many new tokens; their blocks are allocated.
    pub tokens: u32,
}

/// One batch on the device: what the arguments of `append` and `attention` share.
///
/// The spans are valid in stream order on the compute stream until the next build.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    /// Sequences.
    pub num_seqs: u32,
    /// New tokens of all sequences.
    pub num_tokens: u32,
    /// New tokens of the sequence that has most.
    pub max_q_len: u32,
    /// `[num_seqs + 1]` i32.
    pub qo_indptr: Span,
    /// `[num_seqs]` i32, new tokens included.
    pub kv_len: Span,
    /// `[num_groups, num_tokens]` i64.
    pub slot_mapping: Span,
    /// Block tables of all groups.
    pub tables: BlockTables,
    /// `[num_tokens]` u64 of the caller's, one per new token.
    pub payload: Span,
}

/// A pinned staging buffer, and the event behind the last copy from it.
struct Staging {
    buffer: PinnedBuffer,
    copied: Event,
}

/// Builds the device arrays of batches. Grows to the largest batch seen, then allocates no more.
pub struct BatchTables {
    /// Per group.
    block_sizes: Vec<u32>,
    sections: Sections,
    staging: [Staging; 2],
    next: usize,
    device_buffer: DeviceBuffer,
}

impl BatchTables {
    /// Tables for batches of up to `max_seqs` sequences and `max_tokens` new tokens, over the groups of a
    /// plan.
    ///
    /// # Errors
    /// `OutOfMemory`, or driver errors.
    pub fn new(
        device: &Device,
        groups: &[LayerGroup],
        max_seqs: usize,
        max_tokens: usize,
    ) -> Result<Self> {
        let sections = Sections::new(groups.len(), max_seqs, max_tokens)?;
        let bytes = sections.ids_at + 4 * 16 * 1024;
        let staging = || -> Result<Staging> {
            Ok(Staging { buffer: device.alloc_pinned(bytes)?, copied: device.event()? })
        };
        Ok(Self {
            block_sizes: groups.iter().map(|group| group.block_size).collect(),
            sections,
            staging: [staging()?, staging()?],
            next: 0,
            device_buffer: device.alloc(bytes)?,
        })
    }

    /// Builds the arrays of one batch and submits their upload to `compute`. `payload` has one value per
    /// new token, in the order of the batch.
    ///
    /// # Errors
    /// `InvalidArgument` for a batch above the limits or a payload of another length, `UnknownSequence`,
    /// `OutOfMemory` when the buffers must grow and cannot.
    pub fn build(
        &mut self,
        manager: &Manager,
        seqs: &[SeqSlice],
        payload: &[u64],
        compute: StreamRef<'_>,
    ) -> Result<Batch> {
        let num_tokens: usize = seqs.iter().map(|seq| seq.tokens as usize).sum();
        self.sections.check(seqs, num_tokens, payload.len())?;
        self.staging[self.next].copied.synchronize()?;

        let num_groups = self.block_sizes.len();
        let sections = &self.sections;
        let mut num_ids = 0;
        for (g, block_size) in self.block_sizes.iter().enumerate() {
            let mut token = 0;
            for (s, seq) in seqs.iter().enumerate() {
                let row = manager.block_row(seq.seq, g)?;
                let end = num_ids + row.sinks.len() + row.live.len();
                let needed = sections.ids_at + 4 * end;
                if needed > self.staging[self.next].buffer.len() {
                    grow(&mut self.staging, &mut self.device_buffer, needed, compute)?;
                }
                let staging = self.staging[self.next].buffer.as_mut_slice();
                let at = g * seqs.len() + s;
                put(staging, sections.block_row, at, num_ids as i64);
                put(staging, sections.first_block, at, row.first_block as i32);
                let ids: &mut [u32] =
                    bytemuck::cast_slice_mut(&mut staging[sections.ids_at + 4 * num_ids..needed]);
                let (sinks, live) = ids.split_at_mut(row.sinks.len());
                sinks.copy_from_slice(row.sinks);
                live.copy_from_slice(row.live);
                num_ids = end;
                let slots = sections.slot_mapping + 8 * (g * num_tokens + token);
                let slots: &mut [i64] =
                    bytemuck::cast_slice_mut(&mut staging[slots..slots + 8 * seq.tokens as usize]);
                map_slots(&row, *block_size, seq.start, slots);
                token += seq.tokens as usize;
            }
        }

        let staging = self.staging[self.next].buffer.as_mut_slice();
        let (mut token, mut max_q_len) = (0, 0);
        put(staging, sections.qo_indptr, 0, 0i32);
        for (s, seq) in seqs.iter().enumerate() {
            token += seq.tokens;
            max_q_len = max_q_len.max(seq.tokens);
            put(staging, sections.qo_indptr, s + 1, token as i32);
            put(staging, sections.kv_len, s, (seq.start + seq.tokens) as i32);
        }
        staging[sections.payload..sections.payload + 8 * num_tokens]
            .copy_from_slice(bytemuck::cast_slice(payload));

        let Staging { buffer, copied } = &self.staging[self.next];
        // SAFETY: both buffers live as long as `self`, whose drop waits for the device; the staging buffer
        // is written again only behind `copied`, and the device buffer is read in the order of `compute`.
        unsafe {
            let bytes = sections.ids_at + 4 * num_ids;
            compute.copy(buffer.address(), self.device_buffer.address(), bytes)?;
        }
        compute.record(copied)?;
        self.next = 1 - self.next;

        let base = self.device_buffer.address();
        let section = |at: usize, bytes: usize| Span::new(base + at as u64, bytes as u64);
        let rows = num_groups * seqs.len();
        Ok(Batch {
            num_seqs: seqs.len() as u32,
            num_tokens: num_tokens as u32,
            max_q_len,
            qo_indptr: section(sections.qo_indptr, 4 * (seqs.len() + 1)),
            kv_len: section(sections.kv_len, 4 * seqs.len()),
            slot_mapping: section(sections.slot_mapping, 8 * num_groups * num_tokens),
            tables: BlockTables {
                block_ids: section(sections.ids_at, 4 * num_ids),
                block_row: section(sections.block_row, 8 * rows),
                first_block: Some(section(sections.first_block, 4 * rows)),
                num_groups: num_groups as u32,
            },
            payload: section(sections.payload, 8 * num_tokens),
        })
    }
}

/// The slots of consecutive tokens from position `start` on; -1 where the table has no block.
pub(crate) fn map_slots(row: &BlockRow<'_>, block_size: u32, start: u32, slots: &mut [i64]) {
    for (slot, position) in slots.iter_mut().zip(start..) {
        let block = row.get((position / block_size) as usize);
        *slot =
            block.map_or(-1, |id| id as i64 * block_size as i64 + (position % block_size) as i64);
    }
}

/// Byte offsets of the sections, and the limits they were made for.
struct Sections {
    max_seqs: usize,
    max_tokens: usize,
    qo_indptr: usize,
    kv_len: usize,
    first_block: usize,
    block_row: usize,
    slot_mapping: usize,
    payload: usize,
    /// The block ids, to the end of the buffer.
    ids_at: usize,
}

impl Sections {
    fn new(num_groups: usize, max_seqs: usize, max_tokens: usize) -> Result<Self> {
        let too_large = || {
            Error::invalid(
                OP,
                format!("tables of {max_seqs} sequences and {max_tokens} tokens overflow"),
            )
        };
        // Kernels index sequences and tokens with i32.
        if max_seqs >= i32::MAX as usize || max_tokens > i32::MAX as usize {
            return Err(too_large());
        }
        let mut end = 0usize;
        let mut section = |count: Option<usize>, element: usize| -> Result<usize> {
            let start = end;
            end = count
                .and_then(|count| count.checked_mul(element))
                .and_then(|bytes| start.checked_add(bytes))
                .and_then(|end| end.checked_next_multiple_of(ALIGN))
                .ok_or_else(too_large)?;
            Ok(start)
        };
        let (rows, slots) = (num_groups.checked_mul(max_seqs), num_groups.checked_mul(max_tokens));
        Ok(Self {
            max_seqs,
            max_tokens,
            qo_indptr: section(Some(max_seqs + 1), 4)?,
            kv_len: section(Some(max_seqs), 4)?,
            first_block: section(rows, 4)?,
            block_row: section(rows, 8)?,
            slot_mapping: section(slots, 8)?,
            payload: section(Some(max_tokens), 8)?,
            ids_at: section(Some(0), 4)?,
        })
    }

    fn check(&self, seqs: &[SeqSlice], tokens: usize, payload: usize) -> Result<()> {
        if seqs.len() > self.max_seqs || tokens > self.max_tokens || payload != tokens {
            return Err(Error::invalid(
                OP,
                format!(
                    "a batch of {} sequences, {tokens} tokens and a payload of {payload}; the tables are \
                     made for {} sequences, {} tokens and one payload value per token",
                    seqs.len(),
                    self.max_seqs,
                    self.max_tokens
                ),
            ));
        }
        let too_long = |seq: &&SeqSlice| seq.start as u64 + seq.tokens as u64 > i32::MAX as u64;
        if let Some(seq) = seqs.iter().find(too_long) {
            return Err(Error::unsupported(
                OP,
                "sequence length",
                seq.start as u64 + seq.tokens as u64,
                "up to 2^31 - 1 tokens",
            ));
        }
        Ok(())
    }
}

/// Writes element `index` of the section at `at`.
fn put<T: bytemuck::Pod>(staging: &mut [u8], at: usize, index: usize, value: T) {
    let bytes: Range<usize> = at + index * size_of::<T>()..at + (index + 1) * size_of::<T>();
    staging[bytes].copy_from_slice(bytemuck::bytes_of(&value));
}

/// Doubles all buffers until they hold `bytes`. What is staged already is kept; the device buffer is
/// replaced once the work that reads it is done.
fn grow(
    staging: &mut [Staging; 2],
    device_buffer: &mut DeviceBuffer,
    bytes: usize,
    compute: StreamRef<'_>,
) -> Result<()> {
    let device = compute.device();
    let bytes = bytes.checked_next_power_of_two().ok_or_else(|| {
        Error::invalid(OP, format!("tables of {bytes} bytes exceed the address space"))
    })?;
    for Staging { buffer, copied } in staging {
        copied.synchronize()?;
        let mut larger = device.alloc_pinned(bytes)?;
        larger.as_mut_slice()[..buffer.len()].copy_from_slice(buffer.as_slice());
        *buffer = larger;
    }
    compute.synchronize()?;
    *device_buffer = device.alloc(bytes)?;
    Ok(())
}
