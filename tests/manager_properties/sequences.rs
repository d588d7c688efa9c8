//! What a runtime does to the sequences of a world, and what has to come of it.

use std::collections::{HashSet, VecDeque};

use hybridkv::ErrorKind;
use hybridkv::manager::{BlockId, ExtraKeys, Tier};
use proptest::prelude::*;

use super::prefixes::Node;
use super::sees;
use super::world::{Access, Check, GARBAGE, KEYS, Read, Sequence, Snapshot, World, kv};

impl World {
    pub fn allocate(
        &mut self,
        prompt: &[u32],
        keys: ExtraKeys<'static>,
        budget: usize,
        lookahead: usize,
    ) -> Check {
        let max_model_len = self.config.max_model_len as usize;
        let too_long = prompt.len() > max_model_len;
        let found = self.lookup(prompt, keys)?;
        let path = self.path(keys, prompt)?;
        // One that was prefetched goes with what has arrived.
        let arrived = self.prefetched == Some(self.next);
        let hit = match arrived {
            true => self.longest(&path, &[Tier::Device, Tier::Host]),
            false => found.tokens,
        };
        let before = self.snapshot();
        let writing = self.writing();
        let given = self.m.allocate_prefill(self.next, prompt, budget, keys, lookahead);

        // What it takes: new blocks, and hits that nobody uses.
        let now = prompt.len().min(hit.saturating_add(budget));
        let slots = (now + lookahead).min(max_model_len);
        let (mut least, mut most) = (0, 0);
        let (mut loads, mut inside) = (0, 0);
        for g in self.groups() {
            let size = self.size(g);
            let fresh = match self.is_state(g) {
                true => now.div_ceil(size) - hit / size,
                false => slots.div_ceil(size).saturating_sub(hit.div_ceil(size)),
            };
            most += fresh;
            least += if self.is_state(g) { 1 } else { fresh };
            for &b in &self.needed[g][hit] {
                let end = self.end_of(g, &path, b, hit);
                let on_device = self.finds(&[Tier::Device], g, end);
                loads += usize::from(!on_device);
                let id = found.blocks[g].get(b).copied().unwrap_or(0);
                let unused = !on_device || before.queue.contains(&id);
                // One that the hit ends inside of is copied; where room is short and nobody uses it, it is taken.
                let copied = on_device && hit < (b + 1) * size;
                inside += usize::from(copied);
                least += usize::from(unused || copied);
                most += usize::from(unused || hit < found.tokens) + usize::from(copied);
            }
        }
        let room = |blocks: usize| !too_long && blocks <= before.queue.len();
        let Ok(given) = given else { return self.refused(room(most), room(least), before) };
        prop_assert!(room(least), "accepted without room");
        prop_assert_eq!(given.hit_tokens, hit);
        prop_assert_eq!(given.device_hit_tokens, found.device_tokens.min(hit));
        prop_assert_eq!((given.num_tokens, given.loads.len()), (now, loads));
        let taken: Vec<BlockId> = given.new_blocks.concat();
        prop_assert!(taken.iter().all(|id| before.queue.contains(id)), "took a block in use");
        let turn = self.turn();
        let sequence = Sequence {
            keys,
            tokens: prompt[..now].to_vec(),
            path: path[..now].to_vec(),
            prompt: prompt.len(),
            finished: 0,
            computed: hit,
            settled: hit,
            ready: given.loads.is_empty(),
            trial: None,
            repaired: false,
            swapped: false,
            resumed: 0,
            turn,
            steps: VecDeque::new(),
        };
        let seq = self.next;
        self.sequences.insert(seq, sequence);
        self.next += 1;
        self.prefetched = self.prefetched.filter(|_| !arrived);
        if self.end_of_call(&writing, taken.len() + inside)? {
            // A load that cannot be had at once may have been repaired at once.
            return Ok(());
        }
        for g in self.groups() {
            let (size, table) = (self.size(g), self.table(seq, g));
            let tokens = if self.is_state(g) { now } else { slots };
            prop_assert_eq!(table.len(), tokens.div_ceil(size));
            for (b, &id) in found.blocks[g].iter().enumerate().filter(|_| hit == found.tokens) {
                let load = id == 0 && self.needed[g][hit].contains(&b);
                let copied = id != 0 && hit < (b + 1) * size && taken.contains(&table[b]);
                let right = if load { taken.contains(&table[b]) } else { table[b] == id || copied };
                prop_assert!(right, "block {} of group {}", b, g);
            }
        }
        Ok(())
    }

    pub fn append(&mut self, seq: u64, tokens: &[u32]) -> Check {
        let sequence = &self.sequences[&seq];
        let (keys, start) = (sequence.keys, sequence.tokens.len());
        let end = start + tokens.len();
        let all = [&sequence.tokens[..], tokens].concat();
        let runs = sequence.runs();
        let before = self.snapshot();
        let writing = self.writing();
        let own: Vec<Vec<BlockId>> = self.groups().map(|g| self.table(seq, g).to_vec()).collect();
        // A partly filled tail moves when anybody counts on what lies behind its end.
        let (mut least, mut most) = (0, 0);
        for g in self.groups() {
            let (size, table) = (self.size(g), self.table(seq, g));
            let fresh = end.div_ceil(size).saturating_sub(table.len());
            if self.is_state(g) {
                // The slot goes along, or what follows it is kept, too.
                most += fresh + 1;
                continue;
            }
            let tail = table.get(start / size).filter(|_| start % size > 0);
            let shared = tail.is_some_and(|id| {
                before.users.iter().any(|&(user, users)| user == *id && users > 1)
                    || sequence.trial.is_none()
                        && self
                            .flying
                            .iter()
                            .any(|flight| flight.transfer.path.block() == Some(*id))
            });
            least += fresh + usize::from(shared);
            most += fresh + usize::from(tail.is_some());
        }
        let fits = runs && end <= self.config.max_model_len as usize;
        let (sure, room) =
            (fits && most <= before.queue.len(), fits && least <= before.queue.len());
        let Ok(new_blocks) = self.m.append(seq, tokens) else {
            return self.refused(sure, room, before);
        };
        let taken = new_blocks.concat();
        prop_assert!(room, "accepted without room");
        prop_assert!((least..=most).contains(&taken.len()));
        // A group may take what the one before it has left.
        let free = |id: &BlockId| before.queue.contains(id) || own.iter().any(|t| t.contains(id));
        prop_assert!(taken.iter().all(free), "took a block in use");
        let path = self.path(keys, &all)?;
        let tables: Vec<BlockId> =
            self.groups().flat_map(|g| self.table(seq, g).to_vec()).collect();
        // The copy of a forgotten block is one, too.
        let copies: Vec<BlockId> = self
            .groups()
            .flat_map(|g| own[g].iter().zip(self.table(seq, g)))
            .filter_map(|(was, is)| self.forgotten.contains(was).then_some(is))
            .collect();
        self.forgotten.extend(copies);
        let sequence = self.sequences.get_mut(&seq).unwrap();
        (sequence.tokens, sequence.path) = (all, path);
        // What reuses the block that a tail left is submitted behind the steps that read it there.
        for (_, reads) in &mut sequence.steps {
            reads.retain(|(id, ..)| tables.contains(id));
        }
        self.end_of_call(&writing, taken.len())?;
        Ok(())
    }

    /// A refusal: it is not `sure` that there was room, and nothing has changed. Under write-back what is to be
    /// evicted for a request that has `room` may have to be stored first, which begins now.
    fn refused(&mut self, sure: bool, room: bool, before: Snapshot) -> Check {
        let flying = self.flying.len();
        self.end_of_call(&self.writing(), 0)?;
        let back = self.writes_back();
        prop_assert!(!sure || back && !self.flying.is_empty(), "refused with room");
        if back && room {
            prop_assert_eq!(before.tables, self.snapshot().tables);
            return Ok(());
        }
        prop_assert_eq!(self.flying.len(), flying);
        prop_assert_eq!(before, self.snapshot());
        Ok(())
    }

    /// The sequences in the order in which their work is submitted.
    fn in_turn(&self) -> Vec<u64> {
        let mut order: Vec<u64> = self.sequences.keys().copied().collect();
        order.sort_by_key(|seq| self.sequences[seq].turn);
        order
    }

    /// Submits one step: up to `most` tokens of everything that is ready, in turn. Who reads what another one has
    /// yet to compute waits for it.
    pub fn step(&mut self, most: usize) -> Check {
        let mut unwritten: HashSet<BlockId> = HashSet::new();
        for seq in self.in_turn() {
            let Some(sequence) = self.sequences.get(&seq) else { continue };
            let (start, mut end) = (
                sequence.computed,
                sequence.tokens.len().min(sequence.computed.saturating_add(most)),
            );
            let waits =
                self.groups().any(|g| self.table(seq, g).iter().any(|id| unwritten.contains(id)));
            if !sequence.runs() || waits {
                end = start;
            }
            let mut done: Vec<Access> = Vec::new();
            let mut reads: Vec<Read> = Vec::new();
            for g in self.groups().filter(|_| !sequence.swapped) {
                let (size, table) = (self.size(g), self.m.table(seq, g).unwrap());
                if end < sequence.tokens.len() {
                    unwritten.extend(&table[(end / size).min(table.len())..]);
                }
                if self.is_state(g) && start < end {
                    let step = self.m.state_step(seq, g, start, end).unwrap();
                    let begun = start.checked_sub(1).map(|last| kv(g, sequence.path[last]));
                    prop_assert_eq!(step.source != 0, begun.is_some(), "a state to begin with");
                    done.extend(begun.map(|begun| Access::Reads((step.source, 0, begun))));
                    prop_assert_eq!(step.writes.last().map(|write| write.0), Some(end));
                    let states = step.writes.iter();
                    done.extend(states.map(|&(tokens, block)| {
                        Access::State(block, kv(g, sequence.path[tokens - 1]))
                    }));
                    continue;
                }
                for i in start..end {
                    let id = table[i / size];
                    let another = self.sequences.iter().any(|(&name, other)| {
                        name != seq
                            && (other.computed..other.tokens.len()).contains(&i)
                            && self.table(name, g).get(i / size) == Some(&id)
                    });
                    prop_assert!(id != 0 && !another, "a new token has a slot of its own");
                    done.push(Access::Writes((id, i % size, kv(g, sequence.path[i]))));
                }
                let group = &self.config.groups[g];
                for j in (0..end).filter(|&j| (start.max(j)..end).any(|i| sees(group, i, j))) {
                    reads.push((table[j / size], j % size, kv(g, sequence.path[j])));
                }
            }
            unwritten.remove(&0);
            if end == start {
                continue;
            }
            done.extend(reads.iter().copied().map(Access::Reads));
            let sequence = self.sequences.get_mut(&seq).unwrap();
            sequence.computed = end;
            sequence.steps.push_back((end, reads));
            match &mut sequence.trial {
                Some(trial) => trial.append(&mut done),
                None => self.carry_out(done)?,
            }
            self.advance(seq)?;
        }
        Ok(())
    }

    /// Does what a step does, or steps that have waited for loads.
    pub fn carry_out(&mut self, done: Vec<Access>) -> Check {
        for access in done {
            match access {
                Access::Reads(read) => self.check_reads(&[read])?,
                Access::Writes((block, offset, kv)) => self.device[block as usize][offset] = kv,
                Access::State(block, kv) => {
                    self.device[block as usize] = GARBAGE;
                    self.device[block as usize][0] = kv;
                }
            }
        }
        Ok(())
    }

    /// Lets the steps of a sequence run behind its loads, when all of these have begun.
    pub fn overlap(&mut self, seq: u64) -> Check {
        let sequence = &self.sequences[&seq];
        let before = self.snapshot();
        let allowed = self.m.overlap(seq).is_ok();
        prop_assert_eq!(&before, &self.snapshot());
        let (mut begun, mut loading) = (true, 0);
        for g in self.groups().filter(|_| !sequence.swapped) {
            let flying = self.flying.iter().filter(|flight| {
                flight.transfer.seq == Some(seq) && flight.transfer.group as usize == g
            });
            let waiting = self.m.loading(seq, g).unwrap();
            loading += waiting;
            begun &= flying.count() == waiting;
        }
        prop_assert_eq!(loading > 0, !sequence.ready && !sequence.swapped);
        prop_assert_eq!(allowed, !sequence.swapped && begun);
        if allowed && loading > 0 {
            self.sequences.get_mut(&seq).unwrap().trial.get_or_insert_default();
        }
        Ok(())
    }

    /// The oldest step of a sequence ends.
    pub fn settle(&mut self, seq: u64) -> Check {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return Ok(()) };
        let Some((end, reads)) = sequence.steps.pop_front() else { return Ok(()) };
        sequence.settled = end;
        if sequence.trial.is_none() {
            self.check_reads(&reads)?;
        }
        self.advance(seq)
    }

    pub fn settle_all(&mut self, seq: u64) -> Check {
        while self.sequences.get(&seq).is_some_and(|sequence| !sequence.steps.is_empty()) {
            self.settle(seq)?;
        }
        Ok(())
    }

    fn check_reads(&self, reads: &[Read]) -> Check {
        for &(block, offset, expected) in reads {
            prop_assert_ne!(block, 0, "a visible key lies in the null block");
            prop_assert_eq!(self.device[block as usize][offset], expected, "block {}", block);
        }
        Ok(())
    }

    fn advance(&mut self, seq: u64) -> Check {
        let Sequence { computed, settled, .. } = self.sequences[&seq];
        let tables: Vec<Vec<BlockId>> =
            self.groups().map(|g| self.table(seq, g).to_vec()).collect();
        let writing = self.writing();
        let freed = self.m.advance(seq, computed, settled).unwrap();
        for g in self.groups() {
            let left = tables[g].iter().zip(self.table(seq, g)).rev();
            let left: Vec<BlockId> =
                left.filter(|(was, is)| *was != is).map(|(was, _)| *was).collect();
            prop_assert_eq!(&freed[g], &left);
        }
        self.end_of_call(&writing, 0)?;
        Ok(())
    }

    /// A step fails: what it wrote is garbage, and so is what others made of that.
    pub fn abort(&mut self, seq: u64) -> Check {
        let mut failed = vec![seq];
        while let Some(seq) = failed.pop() {
            let Some(sequence) = self.sequences.get(&seq) else { continue };
            let done = sequence.settled.max(sequence.finished);
            for g in self.groups().filter(|_| !sequence.swapped) {
                let (size, table) = (self.size(g), self.m.table(seq, g).unwrap());
                if self.is_state(g) && done < sequence.computed {
                    let spoilt = table.iter().enumerate().filter(|(b, _)| (b + 1) * size > done);
                    spoilt.for_each(|(_, &id)| self.device[id as usize] = GARBAGE);
                    continue;
                }
                for i in done..sequence.computed {
                    self.device[table[i / size] as usize][i % size] = 0;
                }
            }
            let settled = sequence.settled;
            self.is_void(seq, settled);
            let path = self.sequences.remove(&seq).unwrap().path;
            let writing = self.writing();
            let (taken, table) = (self.config.num_blocks as usize, self.table(seq, 0).len());
            let dependents = self.m.abort(seq).unwrap();
            self.count_on(&dependents, &path, settled)?;
            failed.extend(dependents);
            // What it had not finished leaves the index, whatever of it there was.
            self.end_of_call(&writing, taken.max(table))?;
        }
        Ok(())
    }

    /// Whether all these count on a token of this path beyond the first `done`.
    fn count_on(&self, dependents: &[u64], path: &[Node], done: usize) -> Check {
        for seq in dependents {
            let first = self.sequences.get(seq).and_then(|sequence| sequence.path.get(done));
            prop_assert!(first.is_some() && first == path.get(done), "{} loses nothing", seq);
        }
        Ok(())
    }

    /// Ends a sequence: it is freed, or aborted when some of its work was never submitted.
    pub fn end(&mut self, seq: u64) -> Check {
        let sequence = &self.sequences[&seq];
        if sequence.runs() && sequence.computed < sequence.tokens.len() {
            return self.abort(seq);
        }
        let writing = self.writing();
        self.m.free(seq).unwrap();
        self.sequences.remove(&seq);
        self.end_of_call(&writing, 0)?;
        Ok(())
    }

    /// Whether a sequence counts on tokens that another one has yet to compute.
    pub fn waits(&self, seq: u64) -> bool {
        self.sequences.iter().any(|(&name, other)| {
            name != seq
                && self.groups().any(|g| {
                    let unwritten = other.computed / self.size(g);
                    let (own, others) = (self.table(seq, g), self.table(name, g));
                    (unwritten..own.len().min(others.len()))
                        .any(|b| own[b] != 0 && own[b] == others[b])
                })
        })
    }

    pub fn fork(&mut self, parent: u64) -> Check {
        let turn = self.turn();
        let sequence = &self.sequences[&parent];
        let before = self.snapshot();
        let forked = self.m.fork(parent, self.next);
        let whole = !self.has_states() || sequence.computed == sequence.tokens.len();
        prop_assert_eq!(forked.is_ok(), sequence.ready && sequence.computed > 0 && whole);
        let Ok(shared) = forked else {
            prop_assert_eq!(before, self.snapshot());
            return Ok(());
        };
        prop_assert_eq!(shared, sequence.computed);
        let mut child =
            Sequence { steps: VecDeque::new(), finished: shared, turn, ..sequence.clone() };
        child.tokens.truncate(shared);
        child.path.truncate(shared);
        // A prefetch under its name is given up.
        self.prefetched = self.prefetched.filter(|&seq| seq != self.next);
        self.sequences.insert(self.next, child);
        self.next += 1;
        Ok(())
    }

    /// Cuts a sequence back to its first `n` tokens, once its steps have ended.
    pub fn cut(&mut self, seq: u64, n: usize, rollback: bool) -> Check {
        let sequence = self.sequences.get_mut(&seq).unwrap();
        if sequence.trial.is_none() {
            sequence.finished = sequence.computed;
            for (_, reads) in std::mem::take(&mut sequence.steps) {
                self.check_reads(&reads)?;
            }
        }
        self.is_void(seq, n);
        let (path, computed) = (self.sequences[&seq].path.clone(), self.sequences[&seq].computed);
        let before = self.snapshot();
        let writing = self.writing();
        let cut = match rollback {
            true => self.m.rollback(seq, n),
            false => self.m.trim(seq, n),
        };
        let states = self.has_states();
        let sequence = self.sequences.get_mut(&seq).unwrap();
        let Ok(cut) = cut else {
            // Nothing that is not settled has been freed; of states there is one.
            let freed = n < if states { sequence.computed } else { sequence.settled };
            prop_assert!(!sequence.ready || n == 0 || freed);
            prop_assert_eq!(before, self.snapshot());
            return Ok(());
        };
        sequence.tokens.truncate(n);
        sequence.path.truncate(n);
        sequence.computed = sequence.computed.min(n);
        sequence.settled = sequence.settled.min(n);
        sequence.finished = sequence.finished.min(n);
        sequence.resumed = sequence.resumed.min(n);
        // What is cut off leaves the index, or not.
        let gone = self.config.num_blocks as usize;
        self.end_of_call(&writing, gone)?;
        self.count_on(&cut.dependents, &path, computed)?;
        for seq in cut.dependents {
            self.abort(seq)?;
        }
        Ok(())
    }

    /// Swaps a sequence out, once its steps have ended.
    pub fn preempt(&mut self, seq: u64) -> Check {
        self.settle_all(seq)?;
        let Some(sequence) = self.sequences.get_mut(&seq) else { return Ok(()) };
        if sequence.ready && sequence.settled < sequence.computed {
            sequence.settled = sequence.computed;
            self.advance(seq)?;
        }
        let (path, computed) = (self.sequences[&seq].path.clone(), self.sequences[&seq].computed);
        self.is_void(seq, computed);
        let before = self.snapshot();
        let writing = self.writing();
        let swapped = self.m.preempt(seq);
        let sequence = self.sequences.get_mut(&seq).unwrap();
        let given = match swapped {
            Ok(given) => given,
            Err(err) => {
                let full = matches!(err.kind(), ErrorKind::NoHostSlots { .. });
                let runs = sequence.ready && sequence.computed > 0;
                let detached = self.m.config().host.is_none();
                // It may not have computed anything of its own.
                prop_assert!(full || detached || !runs || err.to_string().contains("besides"));
                prop_assert_eq!(before, self.snapshot());
                return Ok(());
            }
        };
        prop_assert!(sequence.ready && !sequence.swapped);
        prop_assert_eq!(given.tokens, sequence.computed);
        sequence.tokens.truncate(given.tokens);
        sequence.path.truncate(given.tokens);
        (sequence.swapped, sequence.ready) = (true, false);
        let flying = self.flying.len();
        // What it had not computed leaves the index.
        self.end_of_call(&writing, self.config.num_blocks as usize)?;
        prop_assert_eq!(self.flying.len(), flying + given.offloads);
        self.count_on(&given.dependents, &path, computed)?;
        for seq in given.dependents {
            self.abort(seq)?;
        }
        Ok(())
    }

    pub fn resume(&mut self, seq: u64) -> Check {
        let turn = self.turn();
        let before = self.snapshot();
        let writing = self.writing();
        let resumed = self.m.resume(seq);
        let back = self.writes_back();
        let sequence = self.sequences.get_mut(&seq).unwrap();
        let given = match resumed {
            Ok(given) => given,
            Err(err) => {
                let room = matches!(err.kind(), ErrorKind::NoFreeBlocks { .. });
                let later = room || matches!(err.kind(), ErrorKind::NotReady { .. });
                prop_assert!(later || !sequence.swapped, "{}", err);
                if !(back && room) {
                    prop_assert_eq!(before, self.snapshot());
                }
                self.end_of_call(&writing, 0)?;
                return Ok(());
            }
        };
        prop_assert!(sequence.swapped && given.hit_tokens <= sequence.computed);
        // As it was, or allocated anew.
        match given.hit_tokens == sequence.computed {
            true => sequence.resumed = given.hit_tokens,
            false => (sequence.resumed, sequence.prompt) = (0, sequence.tokens.len()),
        }
        (sequence.swapped, sequence.ready) = (false, given.loads.is_empty());
        (sequence.computed, sequence.settled) = (given.hit_tokens, given.hit_tokens);
        (sequence.finished, sequence.turn, sequence.repaired) = (given.hit_tokens, turn, false);
        let taken = given.new_blocks.concat();
        prop_assert!(taken.iter().all(|id| before.queue.contains(id)), "took a block in use");
        self.end_of_call(&writing, taken.len())?;
        Ok(())
    }

    /// A whole turn: it is computed, stored, and gone.
    pub fn serve(&mut self, prompt: &[u32], keys: ExtraKeys<'static>, failures: u8) -> Check {
        let seq = self.next;
        self.allocate(prompt, keys, usize::MAX, 0)?;
        self.complete_all(failures)?;
        self.step(usize::MAX)?;
        self.settle_all(seq)?;
        self.complete_all(failures)?;
        if self.sequences.contains_key(&seq) {
            self.end(seq)?;
        }
        Ok(())
    }

    /// Tokens that nobody else has pass through most of the free blocks.
    pub fn flood(&mut self) -> Check {
        let first = self.next;
        for _ in 0..3 {
            let start = 1000 + self.next as u32 * 1000;
            let tokens: Vec<u32> = (start..start + self.config.max_model_len).collect();
            self.allocate(&tokens, KEYS[0], usize::MAX, 0)?;
        }
        for seq in first..self.next {
            self.abort(seq)?;
        }
        Ok(())
    }

    pub fn forget(&mut self, seq: u64, g: usize, index: usize) -> Check {
        let swapped = self.sequences[&seq].swapped;
        let id = self.table(seq, g).get(index).copied().unwrap_or(0);
        let first = index * self.size(g);
        // Of what it was cut back from it may still hold the whole block.
        let first = self.sequences[&seq].path.get(first).copied().filter(|_| id != 0);
        let pinned = self.pins.values().flat_map(|pin| &pin.blocks);
        let held = pinned.filter(|&&(of, node)| {
            (of, (self.prefixes.len(node) - 1) / self.size(g)) == (g, index)
                && first.is_some_and(|first| self.prefixes.begins_with(node, first))
        });
        let void: Vec<_> = held.map(|&(_, node)| (Tier::Device, g, node)).collect();
        self.void.extend(void);
        let writing = self.writing();
        prop_assert_eq!(self.m.forget(seq, g, index).is_err(), swapped);
        if id != 0 {
            self.forgotten.insert(id);
        }
        self.end_of_call(&writing, usize::from(id != 0))?;
        Ok(())
    }

    pub fn prioritize(&mut self, seq: u64, priority: u8) -> Check {
        let swapped = self.sequences[&seq].swapped;
        prop_assert_eq!(self.m.prioritize(seq, priority).is_err(), swapped);
        Ok(())
    }
}
