//! Sequences that are swapped out to the host and come back.

use hybridkv::error::Result;
use hybridkv::manager::{Allocation, Path, Preemption};
use serde_json::{Value, json};

use super::super::ops::Id;
use super::{Session, unknown};

impl Session {
    pub fn preempt(&mut self, id: &Id) -> Result<Value> {
        let sequence = self.sequences.get_mut(id).ok_or_else(|| unknown(id))?;
        let Preemption { tokens, offloads, dependents } = self.manager.preempt(sequence.seq)?;
        sequence.tokens.truncate(tokens);
        while let Some(memory) = &mut self.memory
            && let Some(transfer) = self.manager.next_transfer()
        {
            let group = transfer.group as usize;
            let mut names = self.manager.block_hashes(group, &sequence.tokens);
            // What has no name that others know is known by what it holds.
            if let Path::Offload { from, .. } = transfer.path
                && names.all(|name| name != transfer.hash)
            {
                memory.keep(from, group, transfer.hash)?;
            }
            memory.push(transfer);
        }
        let dependents = self.ids(&dependents);
        Ok(json!({
            "ok": true, "tokens": tokens, "offloads": offloads, "dependents": dependents,
        }))
    }

    pub fn resume(&mut self, id: &Id) -> Result<Value> {
        let seq = self.find(id)?.seq;
        let Allocation { hit_tokens, new_blocks, loads, .. } =
            self.with_room(|manager| manager.resume(seq))?;
        self.collect_transfers()?;
        let waiting = !loads.is_empty();
        if let Some(sequence) = self.sequences.get_mut(id) {
            (sequence.computed, sequence.waiting) = (hit_tokens, waiting);
        }
        Ok(json!({
            "ok": true,
            "hit_tokens": hit_tokens,
            "new_blocks": new_blocks,
            "blocks": self.blocks(seq)?,
            "ready": !waiting,
        }))
    }
}
