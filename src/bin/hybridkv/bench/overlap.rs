//! A long prefix comes back from the host beside the prefill of what follows it, and what that computes goes down:
//! the manager, the engine and all kernels of one rank of Llama 4 Scout, a step at a time.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use hybridkv::device::{Device, Event, Stream};
use hybridkv::engine::{
    BatchTables, Engine, EngineConfig, HostSize, Layerwise, LoadMark, SeqSlice,
};
use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::layout::Dtype;
use hybridkv::manager::{
    Direction, Eviction, ExtraKeys, GroupConfig, HostConfig, Manager, ManagerConfig, Outcome,
    Retention, SeqId, Transfer,
};
use hybridkv::ops::Kernels;
use hybridkv::ops::synthetic::history;
use hybridkv::spec::{AttentionKind, GroupPlan, LayerGroup, ModelSpec, Provenance};

use super::Bench;
use super::timing::Timing;
use crate::report::Row;
use crate::run::content::{Content, Elements};
use crate::run::model::{Model, Reach};

const OP: &str = "bench";
const BLOCK_TOKENS: usize = 16;
const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };
/// Samples per figure.
const SAMPLES: usize = 3;

/// Sizes of the case.
struct Sizes {
    /// Tokens of the prefix: the last chunk lacks a block, so that chunked layers have as much as they ever do.
    prefix: usize,
    /// Tokens of a step.
    step: usize,
    num_blocks: u32,
}

impl Sizes {
    fn on(device: &Device) -> Self {
        let (prefix, step, num_blocks) =
            if device.is_cuda() { (128 << 10, 8 << 10, 16 << 10) } else { (256, 64, 128) };
        Self { prefix: prefix - BLOCK_TOKENS, step, num_blocks: num_blocks + 1 }
    }
}

/// When a step starts that needs what is on the host.
#[derive(Clone, Copy, PartialEq)]
enum Loads {
    /// Once all of it has come; the step alone is timed.
    Before,
    /// On the device behind all of it.
    Whole,
    /// Each layer behind its own.
    Layers,
}

/// Times of one step.
struct Sample {
    /// Milliseconds of the loads alone, where they came before.
    restore: f64,
    /// Of the step, and of the loads that it waited for on the device.
    step: f64,
    /// From the submission of the step until all that it computed was on the host.
    stored: f64,
}

impl Bench<'_> {
    /// The rows of this file.
    pub(super) fn overlap(&mut self) -> Result<()> {
        const RESTORE: &str = "restore/scout-tp8/128K";
        const PREFILL: &str = "restore+prefill/scout-tp8/128K";
        const OFFLOAD: &str = "prefill+offload/scout-tp8/128K";
        if ![RESTORE, PREFILL, OFFLOAD].iter().any(|name| name.contains(self.filter)) {
            return Ok(());
        }
        let Some(mut scene) = Scene::new(self.device)? else {
            println!("{RESTORE:<34} skipped: too little device memory");
            return Ok(());
        };
        let before = scene.samples(Loads::Before, false)?;
        let stored_by_layer = scene.samples(Loads::Before, true)?;
        let whole = scene.samples(Loads::Whole, false)?;
        let layers = scene.samples(Loads::Layers, false)?;

        let bytes = scene.restored_bytes as f64;
        let step = median(&before, |sample| sample.step);
        let restore = median(&before, |sample| sample.restore);
        let on_goal = self.device.is_cuda();
        let timing = Timing { us: 0.0, spread: 0.0, samples: SAMPLES };
        let row = |case: &str, ours: f64| Row {
            case: case.to_owned(),
            ours,
            unit: "ms".to_owned(),
            ..Row::default()
        };
        self.add(
            Row {
                gbps: Some(bytes / restore / 1e6),
                goal: on_goal.then_some(20.0),
                ..row(RESTORE, restore)
            },
            timing,
        );
        // All but the first part is hidden.
        let first_part = restore / f64::from(Layerwise::default().parts);
        let peers = [("prefill alone", step), ("behind the loads", median(&whole, |s| s.step))];
        self.add(
            Row {
                goal: on_goal.then_some(step + first_part),
                peers: peers.map(|(name, ms)| (name.to_owned(), ms)).into(),
                ..row(PREFILL, median(&layers, |sample| sample.step))
            },
            timing,
        );
        let peers = [
            ("prefill alone", step),
            ("offload behind its end", median(&before, |sample| sample.stored)),
            ("prefill beside the offload", median(&stored_by_layer, |sample| sample.step)),
        ];
        self.add(
            Row {
                peers: peers.map(|(name, ms)| (name.to_owned(), ms)).into(),
                ..row(OFFLOAD, median(&stored_by_layer, |sample| sample.stored))
            },
            timing,
        );
        Ok(())
    }
}

fn median(samples: &[Sample], figure: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(figure).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One rank with a prefix on the host.
struct Scene {
    // First: waits for the device before the memory goes.
    engine: Engine,
    manager: Manager,
    model: Model,
    tables: BatchTables,
    compute: Arc<Stream>,
    plan: GroupPlan,
    sizes: Sizes,
    /// Sequences so far, each with tokens of its own behind the prefix.
    sequences: SeqId,
    restored_bytes: u64,
    /// Around the loads, and around what is timed.
    events: [Event; 3],
}

impl Scene {
    /// Computes the prefix and stores it; `None` when the device has too little memory.
    fn new(device: &Device) -> Result<Option<Self>> {
        let sizes = Sizes::on(device);
        let mut spec = ModelSpec::preset("llama-4-scout")?.shard(8)?;
        if !device.is_cuda() {
            spec.layers.truncate(8);
            for layer in &mut spec.layers {
                if let AttentionKind::Chunked { chunk } = &mut layer.kind {
                    *chunk = sizes.step as u32;
                }
            }
        }
        let plan = spec.group(BLOCK_TOKENS as u32)?;
        let pool_bytes = u64::from(sizes.num_blocks) * plan.block_bytes as u64;
        if pool_bytes > device.info().memory_bytes / 4 {
            return Ok(None);
        }
        // Every block of the prefix, and of a few steps behind it.
        let blocks = plan.groups.len() * (sizes.prefix + 3 * sizes.step) / BLOCK_TOKENS;
        let host = HostSize::Bytes((blocks * plan.block_bytes.next_multiple_of(4096)) as u64);
        let memory = EngineConfig::sized(plan.block_bytes, pool_bytes, host)?;
        let manager = Manager::new(ManagerConfig {
            groups: GroupConfig::of(&plan),
            num_blocks: memory.num_blocks,
            prefix_caching: true,
            retention: Retention::dense(),
            eviction: Eviction::Lru,
            max_model_len: (sizes.prefix + sizes.step) as u32,
            in_flight_tokens: 2 * sizes.step as u32,
            host: Some(HostConfig::new(memory.num_slots)),
            identity: plan.identity(&Provenance { model: "synthetic", ..Provenance::default() }),
        })?;
        let kernels = Arc::new(Kernels::load(device)?);
        let engine = Engine::new(kernels.clone(), memory)?;
        let content = Content::new(Elements { dtype: Dtype::Bf16, scales: None })?;
        let model = Model::new(kernels, &engine, &spec, &plan, &[], &content, sizes.step)?;
        let event = || device.timed_event();
        let mut scene = Self {
            tables: BatchTables::new(device, &plan.groups, 1, sizes.step)?,
            compute: Arc::new(device.stream()?),
            events: [event()?, event()?, event()?],
            engine,
            manager,
            model,
            plan,
            sizes,
            sequences: 0,
            restored_bytes: 0,
        };
        scene.store_prefix()?;
        Ok(Some(scene))
    }

    /// Tokens of the prefix and of a step behind it that no other sequence has.
    fn tokens(&self, seq: SeqId) -> Vec<u32> {
        let Sizes { prefix, step, .. } = self.sizes;
        let own = (1 + seq as usize) * (prefix + step);
        (0..prefix).chain(own..own + step).map(|token| token as u32).collect()
    }

    fn store_prefix(&mut self) -> Result<()> {
        let (seq, all) = (self.sequences, self.tokens(self.sequences));
        self.sequences += 1;
        let prefix = &all[..self.sizes.prefix];
        let given = self.manager.allocate_prefill(seq, prefix, self.sizes.step, KEYS, 0)?;
        let (mut start, mut end) = (0, given.num_tokens);
        loop {
            self.step(seq, prefix, start..end, None, false)?;
            self.manager.advance(seq, end, start)?;
            let transfers = self.transfers();
            self.submit(&transfers)?;
            self.finish()?;
            self.manager.advance(seq, end, end)?;
            if end == prefix.len() {
                break;
            }
            (start, end) = (end, (end + self.sizes.step).min(prefix.len()));
            self.manager.append(seq, &prefix[start..end])?;
        }
        self.manager.free(seq)?;
        self.finish()
    }

    /// Submits one step of a sequence: all layers, each behind its own loads where there is a mark.
    fn step(
        &mut self,
        seq: SeqId,
        tokens: &[u32],
        range: Range<usize>,
        load: Option<LoadMark>,
        marked: bool,
    ) -> Result<()> {
        let mut hash = 0;
        let mut hashes: Vec<u64> = Vec::with_capacity(range.end);
        for &token in &tokens[..range.end] {
            hash = history(hash, token);
            hashes.push(hash);
        }
        let (start, count) = (range.start as u32, range.len() as u32);
        let slice = [SeqSlice { seq, start, tokens: count }];
        let stream = self.compute.clone();
        let compute = (*stream).as_ref();
        let batch = self.tables.build(&self.manager, &slice, &hashes[range], compute)?;
        let reach = |group: &LayerGroup| Reach::of(group.kind, group.sink_tokens, &slice);
        let reaches: Vec<Reach> = self.plan.groups.iter().map(reach).collect();
        let mut marks = if marked { Some(self.engine.begin_step()?) } else { None };
        let Self { model, engine, .. } = self;
        let before = |layer, _| match load {
            Some(load) => engine.wait_layer(load, layer, compute),
            None => Ok(()),
        };
        model.step(&batch, &reaches, None, compute, before, |layer, _| match &mut marks {
            Some(marks) => marks.layer_computed(layer, compute),
            None => Ok(()),
        })?;
        if let Some(marks) = marks {
            self.engine.end_step(marks);
        }
        Ok(())
    }

    fn transfers(&mut self) -> Vec<Transfer> {
        std::iter::from_fn(|| self.manager.next_transfer()).collect()
    }

    fn submit(&mut self, transfers: &[Transfer]) -> Result<()> {
        self.engine.submit(transfers, (*self.compute).as_ref())
    }

    /// Waits for the device, and for transfers until there are none.
    fn finish(&mut self) -> Result<()> {
        (*self.compute).as_ref().synchronize()?;
        loop {
            let transfers = self.transfers();
            self.submit(&transfers)?;
            let mut ended = Vec::new();
            self.engine.wait(&mut ended)?;
            if ended.is_empty() {
                return Ok(());
            }
            for (id, outcome) in ended {
                if outcome != Outcome::Succeeded {
                    return Err(Error::invalid(OP, "a transfer failed"));
                }
                self.manager.complete(id, outcome)?;
            }
        }
    }

    /// Leaves nothing of any prefix on the device: all blocks but a few are taken by prompts that come to nothing.
    fn evict(&mut self) -> Result<()> {
        let mut fillers = Vec::new();
        for tokens in [self.sizes.step, BLOCK_TOKENS] {
            let filler: Vec<u32> = (0..tokens as u32).map(|token| u32::MAX - token).collect();
            loop {
                match self.manager.allocate(self.sequences, &filler, KEYS, 0) {
                    Ok(_) => fillers.push(self.sequences),
                    Err(error) if matches!(error.kind(), ErrorKind::NoFreeBlocks { .. }) => break,
                    Err(error) => return Err(error),
                }
                self.sequences += 1;
            }
        }
        for seq in fillers {
            self.manager.abort(seq)?;
        }
        self.finish()
    }

    fn samples(&mut self, loads: Loads, store_by_layer: bool) -> Result<Vec<Sample>> {
        let cut = |layers: bool| match (layers, self.engine.config().num_slots) {
            (true, slots) if slots < 10_000 => Layerwise { min_bytes: 0, ..Layerwise::default() },
            (true, _) => Layerwise::default(),
            (false, _) => Layerwise { parts: 1, ..Layerwise::default() },
        };
        let (down, up) = (cut(store_by_layer), cut(loads == Loads::Layers));
        self.engine.load_by_layer(&self.plan, up)?;
        self.engine.store_by_layer(&self.plan, down)?;
        // The first one warms up.
        let all = (0..=SAMPLES).map(|_| self.sample(loads, store_by_layer));
        all.skip(1).collect()
    }

    fn sample(&mut self, loads: Loads, store_by_layer: bool) -> Result<Sample> {
        self.evict()?;
        let (seq, tokens) = (self.sequences, self.tokens(self.sequences));
        self.sequences += 1;
        let prefix = self.sizes.prefix;
        let given = self.manager.allocate(seq, &tokens, KEYS, 0)?;
        if given.hit_tokens != prefix || given.device_hit_tokens > BLOCK_TOKENS {
            let message = format!(
                "{} tokens on the device and {} of {prefix} in all hit",
                given.device_hit_tokens, given.hit_tokens
            );
            return Err(Error::new(OP, ErrorKind::Corrupt(message)));
        }
        let transfers = self.transfers();
        let is_load = |transfer: &&Transfer| transfer.path.direction() == Direction::Onboard;
        let loaded = transfers.iter().filter(is_load).count() as u64;
        self.restored_bytes = loaded * self.plan.block_bytes as u64;

        let stream = self.compute.clone();
        let compute = (*stream).as_ref();
        compute.record(&self.events[0])?;
        self.submit(&transfers)?;
        let (mut mark, mut restore) = (None, 0.0);
        match loads {
            Loads::Before => {
                self.engine.wait_onboarded(compute)?;
                compute.record(&self.events[1])?;
                self.finish()?;
                restore = f64::from(self.events[1].elapsed_ms_since(&self.events[0])?);
                compute.record(&self.events[0])?;
            }
            Loads::Whole => {
                self.manager.overlap(seq)?;
                self.engine.wait_onboarded(compute)?;
            }
            Loads::Layers => {
                self.manager.overlap(seq)?;
                mark = self.engine.last_load([seq]);
            }
        }
        let begun = Instant::now();
        self.step(seq, &tokens, prefix..tokens.len(), mark, store_by_layer)?;
        compute.record(&self.events[2])?;
        self.manager.advance(seq, tokens.len(), prefix)?;
        let stores = self.transfers();
        self.submit(&stores)?;
        self.engine.wait_for(&self.events[2])?;
        self.finish()?;
        let stored = begun.elapsed().as_secs_f64() * 1e3;
        let step = f64::from(self.events[2].elapsed_ms_since(&self.events[0])?);
        self.manager.advance(seq, tokens.len(), tokens.len())?;
        self.manager.free(seq)?;
        self.finish()?;
        Ok(Sample { restore, step, stored })
    }
}
