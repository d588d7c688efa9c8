//! The transfers of a session: handed over when the manager emits them, and ended by ticks.

use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::manager::{Completion, Direction, Manager};
use serde_json::{Value, json};

use super::super::OP;
use super::super::ops::{Misbehaviour, Place};
use super::Session;

impl Session {
    /// Executes emitted copies and hands emitted transfers to the memory.
    pub(super) fn collect_transfers(&mut self) -> Result<()> {
        while let Some(copy) = self.manager.next_copy() {
            if let Some(memory) = &mut self.memory {
                memory.copy(&[copy])?;
            }
        }
        if let Some(memory) = &mut self.memory {
            while let Some(transfer) = self.manager.next_transfer() {
                memory.push(transfer);
            }
        }
        Ok(())
    }

    /// An act that takes blocks. Under write-back it is refused while what they hold is being stored: here
    /// that ends at once, and the act is tried again.
    pub(super) fn with_room<T>(
        &mut self,
        mut act: impl FnMut(&mut Manager) -> Result<T>,
    ) -> Result<T> {
        loop {
            let refused = match act(&mut self.manager) {
                Err(error) if matches!(error.kind(), ErrorKind::NoFreeBlocks { .. }) => error,
                result => return result,
            };
            self.collect_transfers()?;
            let mut stored = false;
            while let Some(memory) = &mut self.memory
                && self.write_back
                && let Some((id, outcome)) = memory.end_next(Some(Direction::Offload))?
            {
                self.manager.complete(id, outcome)?;
                stored = true;
            }
            if !stored {
                return Err(refused);
            }
        }
    }

    pub(super) fn tick(&mut self, n: usize) -> Result<Value> {
        let mut ended = 0;
        let (mut ready, mut failed, mut dropped) = (vec![], vec![], vec![]);
        while ended < n
            && let Some(memory) = &mut self.memory
            && let Some((id, outcome)) = memory.end_next(None)?
        {
            ended += 1;
            let mut next = Some(self.manager.complete(id, outcome)?);
            while let Some(completion) = next {
                match completion {
                    Completion::Pending => {}
                    Completion::Ready { seq, valid_tokens } => {
                        if let Some(id) = self.names.get(&seq)
                            && let Some(sequence) = self.sequences.get_mut(id)
                        {
                            match valid_tokens == sequence.computed {
                                true => ready.push(json!(id)),
                                false => {
                                    failed.push(json!({ "id": id, "valid_tokens": valid_tokens }))
                                }
                            }
                            sequence.waiting = false;
                            sequence.computed = valid_tokens;
                        }
                    }
                    Completion::Dropped { seq } | Completion::Void { seq } => {
                        if let Some(id) = self.names.get(&seq).cloned() {
                            self.end(&id)?;
                            dropped.push(json!(id));
                        }
                    }
                }
                // One transfer may be what several sequences have waited for.
                next = self.manager.next_completion();
            }
            self.collect_transfers()?;
        }
        if let Some(memory) = &mut self.memory {
            memory.end_tick();
        }
        Ok(json!({
            "ok": true, "ended": ended, "ready": ready, "failed": failed, "dropped": dropped,
        }))
    }

    pub(super) fn fault(&mut self, place: Place, kind: Misbehaviour, count: u32) -> Result<Value> {
        let Some(memory) = &mut self.memory else {
            return Err(Error::invalid(OP, "there are no transfers without a host tier"));
        };
        let of_storage = matches!(place, Place::StorageRead | Place::StorageWrite);
        if of_storage && self.storage.is_none() {
            return Err(Error::invalid(OP, "there is no storage tier"));
        }
        memory.inject(place, kind, count);
        Ok(json!({ "ok": true }))
    }
}
