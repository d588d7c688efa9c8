//! Prefetching: while a request waits for its turn, what storage holds of its prompt is fetched into the host.
//! The manager reads no clock: its caller says what time it is.

use std::collections::BTreeMap;

use super::pool::NULL;
use super::prefix::Found;
use super::quota::TenantId;
use super::storage::Waiter;
use super::*;

/// Of the host tier, prefetches hold one part in this many at most.
const HOST_SHARE: usize = 2;

/// What a prefetch does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prefetch {
    /// Tokens of the prompt that hit once all has arrived.
    pub hit_tokens: usize,
    /// Blocks that are fetched for it; 0 when it was not started.
    pub blocks: usize,
}

/// One under way.
pub(super) struct State {
    generation: u64,
    /// Whose quotas it counts for.
    tenant: TenantId,
    /// Ready at this time at the latest.
    deadline: Option<u64>,
    /// Blocks that have not come.
    pending: usize,
    blocks: usize,
    /// Pinned slots of what has.
    slots: Vec<HostSlot>,
    announced: bool,
}

impl State {
    pub fn arrived(&mut self, slot: HostSlot) {
        self.pending -= 1;
        self.slots.push(slot);
    }

    pub fn lost(&mut self) {
        self.pending -= 1;
    }
}

/// All of them, by the name that the sequence will have.
#[derive(Default)]
pub(super) struct Prefetches {
    live: BTreeMap<SeqId, State>,
    generation: u64,
}

impl Prefetches {
    pub fn contains(&self, seq: SeqId) -> bool {
        self.live.contains_key(&seq)
    }

    pub fn tenant(&self, seq: SeqId) -> TenantId {
        self.live.get(&seq).map_or(0, |state| state.tenant)
    }

    pub fn is_live(&self, seq: SeqId, generation: u64) -> bool {
        self.live.get(&seq).is_some_and(|state| state.generation == generation)
    }

    pub fn get_mut(&mut self, seq: SeqId, generation: u64) -> Option<&mut State> {
        self.live.get_mut(&seq).filter(|state| state.generation == generation)
    }
}

impl Manager {
    /// Begins to fetch what storage holds of a prompt beyond device and host, for a sequence of this name to
    /// come: it is allocated with what has arrived by then, which stays on the host for it. Not started when it
    /// would save too few tokens, or when prefetches would hold too much of the host; such a sequence
    /// loads from storage itself.
    ///
    /// # Errors
    /// `DuplicateSequence` for a live or preempted sequence or one with a prefetch; `InvalidArgument` for a time that
    /// goes back, and for tokens that were hashed under another identity or unit; nothing is changed.
    pub fn prefetch(&mut self, seq: SeqId, prompt: &HashedTokens, now: u64) -> Result<Prefetch> {
        const OP: &str = "prefetch";
        self.check_name(OP, seq)?;
        if self.prefetches.contains(seq) {
            return Err(Error::new(OP, ErrorKind::DuplicateSequence(seq)));
        }
        self.check_hashed(OP, prompt)?;
        self.tick(now)?;
        let Some(config) = self.storage_config else { return Ok(Prefetch::default()) };
        let Found { tokens, host_tokens, rows, .. } = self.search(prompt, prompt.len(), true);
        let (Some(host), Some(storage)) = (&self.host, &self.storage) else {
            return Ok(Prefetch::default());
        };
        let mut wants = Vec::new();
        for (g, (group, row)) in self.groups.iter().zip(&rows).enumerate() {
            for b in group.needed(tokens).filter(|&b| row.get(b) == NULL) {
                let hash = prompt.hashes()[group.key_index_in(b, tokens)];
                if host.find(g, &hash).is_none()
                    && let Some(from) = storage.find(g, &hash)
                {
                    wants.push((from, g, hash, b));
                }
            }
        }
        let held: usize = self.prefetches.live.values().map(|state| state.blocks).sum();
        let saved = tokens - host_tokens;
        if wants.is_empty()
            || saved < config.prefetch_threshold as usize
            || held + wants.len() > host.capacity() / HOST_SHARE
        {
            return Ok(Prefetch { hit_tokens: host_tokens, blocks: 0 });
        }
        self.events.seal();
        self.prefetches.generation += 1;
        let generation = self.prefetches.generation;
        let deadline = match config.prefetch {
            PrefetchPolicy::BestEffort => Some(now),
            PrefetchPolicy::WaitComplete => None,
            PrefetchPolicy::Timeout { base_ns, per_1024_tokens_ns } => {
                let tokens = (saved as u64).saturating_mul(per_1024_tokens_ns) / 1024;
                Some(now.saturating_add(base_ns).saturating_add(tokens))
            }
        };
        let blocks = wants.len();
        let state = State {
            generation,
            tenant: self.tenants.of(prompt),
            deadline,
            pending: blocks,
            blocks,
            slots: Vec::new(),
            announced: false,
        };
        self.prefetches.live.insert(seq, state);
        for (from, group, hash, index) in wants {
            self.want(from, Waiter::Prefetch { seq, generation, group, hash, index });
        }
        self.pump();
        Ok(Prefetch { hit_tokens: tokens, blocks })
    }

    /// The sequences whose prefetch has been given its time, each once, in the order of their names.
    ///
    /// # Errors
    /// `InvalidArgument` for a time that goes back; nothing is changed.
    pub fn poll_prefetch(&mut self, now: u64) -> Result<Vec<SeqId>> {
        self.tick(now)?;
        let mut ready = Vec::new();
        for (&seq, state) in &mut self.prefetches.live {
            let over = state.deadline.is_some_and(|deadline| now >= deadline);
            if !state.announced && (state.pending == 0 || over) {
                state.announced = true;
                ready.push(seq);
            }
        }
        Ok(ready)
    }

    /// Ends a prefetch: what has arrived stays on the host like anything else. Whether there was one.
    pub fn cancel_prefetch(&mut self, seq: SeqId) -> bool {
        let Some(state) = self.prefetches.live.remove(&seq) else { return false };
        if let Some(host) = &mut self.host {
            state.slots.iter().for_each(|&slot| host.unpin(slot));
        }
        true
    }

    /// Ends all of them.
    pub(super) fn cancel_prefetches(&mut self) {
        while let Some((&seq, _)) = self.prefetches.live.first_key_value() {
            self.cancel_prefetch(seq);
        }
    }
}
