//! A replayed session: the manager that a `config` operation makes, and what the others do to it.

mod swap;
mod transfers;

use std::collections::HashMap;
use std::io::{BufRead, Write};

use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::manager::{
    Cut, Event, ExtraKeys, HashedTokens, Hit, Manager, SeqId, StorageConfig, WritePolicy,
};
use serde_json::{Map, Value, json};

use super::OP;
use super::config::{self, Config};
use super::memory::Memory;
use super::ops::{Id, Line, Op, Tokens};

/// Answers every line of `input` by one line of `output`, at once.
///
/// # Errors
/// Those of reading and writing; an operation that fails is answered.
pub fn serve(mut input: impl BufRead, mut output: impl Write) -> std::io::Result<()> {
    let mut session = None;
    let mut line = Vec::new();
    while input.read_until(b'\n', &mut line)? > 0 {
        let answer = answer(&mut session, &line).unwrap_or_else(|error| refusal(&error));
        writeln!(output, "{answer}")?;
        output.flush()?;
        line.clear();
    }
    Ok(())
}

fn answer(session: &mut Option<Session>, line: &[u8]) -> Result<Value> {
    match (Line::parse(line)?, session) {
        (Line::Config(_), Some(_)) => Err(Error::invalid(OP, "there is a configuration already")),
        (Line::Config(fields), session) => {
            let new = Session::new(&Config::new(fields)?)?;
            let groups: Vec<Value> =
                new.manager.config().groups.iter().map(config::describe_group).collect();
            *session = Some(new);
            Ok(json!({ "ok": true, "groups": groups }))
        }
        (Line::Op(_), None) => Err(Error::invalid(OP, "the first operation must be config")),
        (Line::Op(op), Some(session)) => session.apply(op),
    }
}

fn refusal(error: &Error) -> Value {
    let what = match error.kind() {
        ErrorKind::NoFreeBlocks { .. } | ErrorKind::PoolTooSmall { .. } => "no_free_blocks".into(),
        ErrorKind::TooLong { .. } => "too_long".into(),
        _ => error.to_string(),
    };
    json!({ "ok": false, "error": what })
}

/// Names that are numbers below this one are the manager's, too; all others get one from here on.
const FIRST_NUMBER: SeqId = 1 << 63;

/// See the module documentation.
struct Session {
    manager: Manager,
    /// Bytes of a block of the model.
    block_bytes: u64,
    /// What executes transfers; none without lower tiers.
    memory: Option<Memory>,
    write_back: bool,
    /// Of the storage tier, if there is one.
    storage: Option<StorageConfig>,
    sequences: HashMap<Id, Sequence>,
    names: HashMap<SeqId, Id>,
    /// Number of the next sequence that is not named by a number of its own.
    next: SeqId,
    events: Vec<Event>,
}

struct Sequence {
    seq: SeqId,
    /// Its tokens, to know what its blocks hold; empty without lower tiers.
    tokens: HashedTokens,
    computed: usize,
    /// Whether loads have not ended.
    waiting: bool,
}

impl Session {
    fn new(config: &Config) -> Result<Self> {
        let fields = config.manager()?;
        let mut memory = match &fields.host {
            Some(host) => Some(Memory::new(fields.num_blocks, host.num_slots)?),
            None => None,
        };
        let write_back = fields.host.as_ref().is_some_and(|host| host.write == WritePolicy::Back);
        // Requests longer than the pool are refused when they come.
        let identity = fields.identity;
        let mut manager = Manager::oversubscribed(fields)?;
        manager.record_events(true);
        let mut attached = None;
        if let Some(storage) = config.storage() {
            let (Some(memory), Some(path)) = (&mut memory, &storage.path) else {
                return Err(Error::invalid(OP, "storage needs a path, and a host tier above it"));
            };
            let (slots, stored) = memory.attach_storage(path, storage.bytes, identity)?;
            let storage = storage.config(slots);
            manager.attach_storage(storage, &stored)?;
            attached = Some(storage);
        }
        Ok(Self {
            manager,
            block_bytes: config.block_bytes(),
            memory,
            write_back,
            storage: attached,
            sequences: HashMap::new(),
            names: HashMap::new(),
            next: FIRST_NUMBER,
            events: Vec::new(),
        })
    }

    fn apply(&mut self, op: Op) -> Result<Value> {
        let answer = self.answer(op);
        self.note_events();
        answer
    }

    /// Notes the events of an operation: what it did in a row to one group of one tier is one event.
    fn note_events(&mut self) {
        let earlier = self.events.len();
        for mut event in self.manager.events() {
            match self.events[earlier..].last_mut() {
                Some(last)
                    if (last.kind, last.group, last.tier)
                        == (event.kind, event.group, event.tier) =>
                {
                    last.indices.append(&mut event.indices);
                    last.hashes.append(&mut event.hashes);
                }
                _ => self.events.push(event),
            }
        }
    }

    fn answer(&mut self, op: Op) -> Result<Value> {
        match op {
            Op::Lookup { _id, tokens, salt, lora } => {
                self.lookup(tokens, ExtraKeys { salt: &salt, lora: &lora })
            }
            Op::Allocate { id, tokens, salt, lora, num_tokens, lookahead } => {
                let keys = ExtraKeys { salt: &salt, lora: &lora };
                self.allocate(id, tokens, keys, num_tokens, lookahead)
            }
            Op::Append { id, tokens } => self.append(&id, tokens),
            Op::Advance { id, computed, settled } => {
                self.advance(&id, computed, settled.unwrap_or(computed))
            }
            Op::Fork { id, from } => self.fork(id, &from),
            Op::Trim { id, tokens } => self.cut(&id, |m, seq| m.trim(seq, tokens), tokens),
            Op::Rollback { id, tokens } => self.cut(&id, |m, seq| m.rollback(seq, tokens), tokens),
            Op::Preempt { id } => self.preempt(&id),
            Op::Resume { id } => self.resume(&id),
            Op::Free { id } => {
                let seq = self.find(&id)?.seq;
                self.manager.free(seq)?;
                self.end(&id)?;
                Ok(json!({ "ok": true }))
            }
            Op::Abort { id } => self.abort(&id),
            Op::Forget { id, group, block_index } => {
                let seq = self.find(&id)?.seq;
                self.manager.forget(seq, group, block_index)?;
                Ok(json!({ "ok": true }))
            }
            Op::ResetPrefixCache {} => self.reset(),
            Op::State {} => Ok(self.state()),
            Op::Events {} => {
                let events: Vec<Value> = self.events.drain(..).map(|e| event(&e)).collect();
                Ok(json!({ "ok": true, "events": events }))
            }
            Op::Tick { n } => self.tick(n.unwrap_or(usize::MAX)),
            Op::Fault { place, kind, count } => self.fault(place, kind, count),
            Op::Stats {} => self.stats(),
        }
    }

    fn find(&self, id: &Id) -> Result<&Sequence> {
        self.sequences.get(id).ok_or_else(|| unknown(id))
    }

    fn lookup(&self, tokens: Tokens, keys: ExtraKeys<'_>) -> Result<Value> {
        let tokens = tokens.expand()?;
        if tokens.is_empty() {
            return Err(Error::invalid(OP, "no tokens given"));
        }
        let hashed = self.manager.hash(&tokens, keys);
        let hit = self.manager.lookup_hashed(&hashed);
        let mut answer = json!({
            "ok": true,
            "hit_tokens": hit.tokens,
            "hit_blocks": hit.blocks,
            "tiers": self.tier_tokens(&hashed, &hit),
        });
        if self.memory.is_some() {
            answer["device_hit_tokens"] = hit.device_tokens.into();
        }
        Ok(answer)
    }

    fn allocate(
        &mut self,
        id: Id,
        tokens: Tokens,
        keys: ExtraKeys<'_>,
        num_tokens: usize,
        lookahead: usize,
    ) -> Result<Value> {
        if self.sequences.contains_key(&id) {
            return Err(exists(&id));
        }
        let tokens = tokens.expand()?;
        let max_model_len = self.manager.config().max_model_len as usize;
        if num_tokens > max_model_len {
            let kind = ErrorKind::TooLong { tokens: num_tokens, max_model_len };
            return Err(Error::new(OP, kind));
        }
        let slots = num_tokens.saturating_sub(tokens.len()).saturating_add(lookahead);
        let hashed = self.manager.hash(&tokens, keys);
        let kept = match self.memory {
            Some(_) => hashed.clone(),
            None => self.manager.hash(&[], keys),
        };
        let seq = self.number(&id);
        let hit = self.memory.is_some().then(|| {
            let hit = self.manager.lookup_hashed(&hashed);
            let tiers = self.tier_tokens(&hashed, &hit);
            (hit, tiers)
        });
        let allocation =
            self.with_room(|manager| manager.allocate_hashed(seq, hashed.clone(), slots))?;
        self.collect_transfers()?;
        let waiting = !allocation.loads.is_empty();
        let sequence = Sequence { seq, tokens: kept, computed: allocation.hit_tokens, waiting };
        self.begin(id, sequence);
        let mut answer = json!({
            "ok": true,
            "hit_tokens": allocation.hit_tokens,
            "new_blocks": allocation.new_blocks,
            "blocks": self.blocks(seq)?,
        });
        if let Some((hit, tiers)) = hit {
            // What the table has of the hit and the device had not.
            let loads: Vec<usize> = (hit.blocks.iter().zip(self.blocks(seq)?))
                .map(|(found, table)| {
                    found.iter().zip(table).filter(|&(found, id)| *found == 0 && id != 0).count()
                })
                .collect();
            answer["device_hit_tokens"] = allocation.device_hit_tokens.into();
            answer["tiers"] = tiers;
            answer["loads"] = loads.into();
            answer["ready"] = (!waiting).into();
        }
        Ok(answer)
    }

    fn append(&mut self, id: &Id, tokens: Tokens) -> Result<Value> {
        let tokens = tokens.expand()?;
        let seq = self.find(id)?.seq;
        let new_blocks = self.with_room(|manager| manager.append(seq, &tokens))?;
        if self.memory.is_some()
            && let Some(sequence) = self.sequences.get_mut(id)
        {
            sequence.tokens.push(&tokens);
        }
        self.collect_transfers()?;
        Ok(json!({ "ok": true, "new_blocks": new_blocks }))
    }

    fn advance(&mut self, id: &Id, computed: usize, settled: usize) -> Result<Value> {
        let sequence = self.sequences.get_mut(id).ok_or_else(|| unknown(id))?;
        let tables: Vec<Vec<u32>> = match self.memory {
            Some(_) => (0..self.manager.config().groups.len())
                .map(|g| self.manager.table(sequence.seq, g))
                .collect::<Result<_>>()?,
            None => Vec::new(),
        };
        let freed = self.manager.advance(sequence.seq, computed, settled)?;
        if let Some(memory) = &mut self.memory {
            // The step that was submitted writes the blocks that it fills, before any transfer reads them.
            let groups = &self.manager.config().groups;
            for (g, (group, table)) in groups.iter().zip(&tables).enumerate() {
                let size = group.block_size as usize;
                let keys = self.manager.block_hashes(g, &sequence.tokens);
                let filled = sequence.computed / size..computed / size;
                for (b, hash) in keys.enumerate().take(filled.end).skip(filled.start) {
                    if table[b] != 0 {
                        memory.write(table[b], g, &hash)?;
                    }
                }
            }
        }
        sequence.computed = computed;
        self.collect_transfers()?;
        Ok(json!({ "ok": true, "freed": freed }))
    }

    fn reset(&mut self) -> Result<Value> {
        let done = self.manager.reset_prefix_cache();
        if let (true, Some(memory), Some(storage)) = (done, &mut self.memory, self.storage) {
            // The manager has let go of the storage tier: emptied, it comes back.
            memory.clear_storage()?;
            self.manager.attach_storage(storage, &[])?;
        }
        Ok(json!({ "ok": done }))
    }

    fn fork(&mut self, id: Id, from: &Id) -> Result<Value> {
        if self.sequences.contains_key(&id) {
            return Err(exists(&id));
        }
        let (seq, parent) = (self.number(&id), self.find(from)?);
        let mut tokens = parent.tokens.clone();
        let shared = self.manager.fork(parent.seq, seq)?;
        tokens.truncate(shared);
        self.begin(id, Sequence { seq, tokens, computed: shared, waiting: false });
        Ok(json!({ "ok": true, "tokens": shared, "blocks": self.blocks(seq)? }))
    }

    fn cut(
        &mut self,
        id: &Id,
        cut: impl Fn(&mut Manager, SeqId) -> Result<Cut>,
        tokens: usize,
    ) -> Result<Value> {
        let sequence = self.sequences.get_mut(id).ok_or_else(|| unknown(id))?;
        let Cut { freed, dependents } = cut(&mut self.manager, sequence.seq)?;
        sequence.tokens.truncate(tokens);
        sequence.computed = sequence.computed.min(tokens);
        self.collect_transfers()?;
        Ok(json!({ "ok": true, "freed": freed, "dependents": self.ids(&dependents) }))
    }

    fn ids(&self, sequences: &[SeqId]) -> Vec<&Id> {
        sequences.iter().filter_map(|seq| self.names.get(seq)).collect()
    }

    /// The manager's name of a sequence to come.
    fn number(&self, id: &Id) -> SeqId {
        match *id {
            Id::Number(n) if n < FIRST_NUMBER => n,
            _ => self.next,
        }
    }

    fn begin(&mut self, id: Id, sequence: Sequence) {
        self.next += u64::from(sequence.seq == self.next);
        self.names.insert(sequence.seq, id.clone());
        self.sequences.insert(id, sequence);
    }

    fn abort(&mut self, id: &Id) -> Result<Value> {
        let seq = self.find(id)?.seq;
        let dependents = self.manager.abort(seq)?;
        self.end(id)?;
        Ok(json!({ "ok": true, "dependents": self.ids(&dependents) }))
    }

    /// Forgets a sequence that the manager has ended.
    fn end(&mut self, id: &Id) -> Result<()> {
        if let Some(sequence) = self.sequences.remove(id) {
            self.names.remove(&sequence.seq);
        }
        self.collect_transfers()
    }

    /// Whole tables, with 0 at freed and skipped positions.
    fn blocks(&self, seq: SeqId) -> Result<Vec<Vec<u32>>> {
        (0..self.manager.config().groups.len()).map(|g| self.manager.table(seq, g)).collect()
    }

    /// Tokens of a hit by the slowest tier that any group needs for them.
    fn tier_tokens(&self, tokens: &HashedTokens, hit: &Hit) -> Value {
        let [device, host, storage] = self.manager.tier_tokens(tokens, hit);
        json!({ "device": device, "host": host, "storage": storage })
    }

    fn state(&self) -> Value {
        let m = &self.manager;
        let ref_counts: Map<String, Value> =
            m.ref_counts().into_iter().map(|(id, users)| (id.to_string(), users.into())).collect();
        let cached: Vec<Vec<u32>> =
            (0..m.config().groups.len()).map(|g| m.cached_indices(g)).collect();
        let usage = m.usage();
        let tier = |blocks: usize, capacity: usize, pinned: usize| {
            json!({
                "blocks": blocks,
                "capacity": capacity,
                "pinned": pinned,
                "bytes": blocks as u64 * self.block_bytes,
            })
        };
        let pinned = usage.device_capacity - usage.device_free;
        let mut tiers = json!({ "device": tier(usage.device_used, usage.device_capacity, pinned) });
        if self.memory.is_some() {
            tiers["host"] = tier(usage.host_used, usage.host_capacity, usage.host_pinned);
        }
        if self.storage.is_some() {
            tiers["storage"] =
                tier(usage.storage_used, usage.storage_capacity, usage.storage_pinned);
        }
        json!({
            "ok": true,
            "free": m.free_blocks(),
            "free_queue": m.free_queue(),
            "ref_counts": ref_counts,
            "cached": cached,
            "tiers": tiers,
        })
    }

    fn stats(&self) -> Result<Value> {
        let mut answer = json!({ "ok": true });
        let stats = serde_json::to_value(self.manager.stats())
            .map_err(|e| Error::invalid(OP, e.to_string()))?;
        config::merge(&mut answer, stats);
        Ok(answer)
    }
}

fn event(event: &Event) -> Value {
    let Event { kind, group, tier, indices, .. } = event;
    json!({ "event": kind, "group": group, "tier": tier, "indices": indices })
}

fn exists(id: &Id) -> Error {
    Error::invalid(OP, format!("sequence {} exists already", name(id)))
}

fn unknown(id: &Id) -> Error {
    Error::invalid(OP, format!("sequence {} is not known", name(id)))
}

fn name(id: &Id) -> String {
    match id {
        Id::Number(n) => n.to_string(),
        Id::Name(name) => format!("{name:?}"),
    }
}
