//! Copies between blocks of the pool, on the compute stream: a ring of descriptor batches in pinned memory,
//! each read by one launch and written again once that has ended.

use std::collections::HashSet;

use crate::abi::hkv_copy;
use crate::device::{Device, Event, PinnedBuffer, Span, StreamRef};
use crate::error::Result;
use crate::manager::{BlockCopy, BlockId};
use crate::ops::{CtaQuota, Kernels, MoveArgs, MoveShape};

/// Batches in flight.
const BATCHES: usize = 4;
/// Copies per batch.
const BATCH_COPIES: usize = 256;

pub(super) struct Copies {
    /// `[BATCHES][BATCH_COPIES]`.
    descriptors: PinnedBuffer,
    /// Behind the last launch that reads each batch.
    ended: Vec<Event>,
    next: usize,
}

impl Copies {
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            descriptors: device.alloc_pinned(BATCHES * BATCH_COPIES * size_of::<hkv_copy>())?,
            ended: (0..BATCHES).map(|_| device.event()).collect::<Result<_>>()?,
            next: 0,
        })
    }

    /// Launches the copies in their order. Blocks are `bytes` apart and lie in `pool`, all of them.
    pub fn start(
        &mut self,
        kernels: &Kernels,
        mut copies: &[BlockCopy],
        pool: Span,
        bytes: u64,
        compute: StreamRef<'_>,
    ) -> Result<()> {
        while !copies.is_empty() {
            let (now, later) = copies.split_at(independent(copies));
            self.launch(kernels, now, pool, bytes, compute)?;
            copies = later;
        }
        Ok(())
    }

    fn launch(
        &mut self,
        kernels: &Kernels,
        copies: &[BlockCopy],
        pool: Span,
        bytes: u64,
        compute: StreamRef<'_>,
    ) -> Result<()> {
        let ended = &self.ended[self.next];
        ended.synchronize()?;
        let first = self.next * BATCH_COPIES * size_of::<hkv_copy>();
        let address = |block: BlockId| pool.address + u64::from(block) * bytes;
        for (i, copy) in copies.iter().enumerate() {
            let row = hkv_copy {
                src: address(copy.from) as *const _,
                dst: address(copy.to) as *mut _,
                bytes,
            };
            let at = self.descriptors.address() as usize + first + i * size_of::<hkv_copy>();
            // SAFETY: row `i < BATCH_COPIES` of this batch's descriptors, which no launch reads: the one
            // that did has ended.
            unsafe { (at as *mut hkv_copy).write(row) };
        }
        let table = Span::new(
            self.descriptors.address() + first as u64,
            (copies.len() * size_of::<hkv_copy>()) as u64,
        );
        let args = MoveArgs {
            copies: table,
            num_copies: copies.len() as u64,
            shape: MoveShape::FRAGMENTS,
            quota: CtaQuota::WHOLE_DEVICE,
        };
        // SAFETY: the descriptors stay as they are until the event behind the launch. Sources and targets
        // are whole blocks of the pool; no target is another copy's source or target. On the compute
        // stream they follow the last use of the targets, and all later uses follow them.
        unsafe { kernels.move_blocks(&args, compute)? };
        if let Err(error) = compute.record(ended) {
            // Nothing else would say when the launch no longer reads its descriptors.
            compute.synchronize()?;
            return Err(error);
        }
        self.next = (self.next + 1) % BATCHES;
        Ok(())
    }

    /// Waits for all launches.
    pub fn drain(&self) -> Result<()> {
        self.ended.iter().try_for_each(Event::synchronize)
    }
}

/// How many of the first copies may run at once: none of them writes what another one reads or writes.
fn independent(copies: &[BlockCopy]) -> usize {
    let (mut read, mut written) = (HashSet::new(), HashSet::new());
    copies
        .iter()
        .take(BATCH_COPIES)
        .take_while(|copy| {
            let apart = !written.contains(&copy.from)
                && !read.contains(&copy.to)
                && written.insert(copy.to);
            read.insert(copy.from);
            apart
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_that_depend_on_one_another_are_not_launched_together() {
        let copy = |(from, to)| BlockCopy { group: 0, from, to };
        let count = |pairs: &[(u32, u32)]| {
            independent(&pairs.iter().copied().map(copy).collect::<Vec<_>>())
        };
        assert_eq!(count(&[(1, 2), (1, 3), (4, 5)]), 3);
        assert_eq!(count(&[(1, 2), (2, 3)]), 1, "reads what is written");
        assert_eq!(count(&[(1, 2), (3, 1)]), 1, "writes what is read");
        assert_eq!(count(&[(1, 2), (3, 2)]), 1, "writes what is written");
        assert_eq!(count(&[(1, 2); 1]), 1);
        let many: Vec<_> = (0..300).map(|i| (1, 2 + i)).collect();
        assert_eq!(count(&many), BATCH_COPIES);
    }
}
