//! The serving loop: continuous batching over one manager and one engine.
//!
//! Every round settles finished steps, takes completions of transfers, admits requests, builds a batch of
//! decode tokens and prefill chunks, and submits it without waiting: up to [`STEPS_IN_FLIGHT`] steps are
//! on the device at once. Older requests come first. A request that finds no blocks waits; when nothing is
//! under way that could free any, the youngest running request is preempted and starts again from what is
//! cached. So the oldest request always gets on, and every request ends.
//!
//! The transfers that all this brings about are in transfers.rs.
//!
//! A prompt is allocated up to its hit first and appended chunk by chunk as it is scheduled: a block is
//! findable only once the step that writes it is submitted.

mod clock;
mod prefetch;
mod transfers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hybridkv::device::{Device, Event, Stream};
use hybridkv::engine::{
    BatchTables, BlockStore, Engine, Fault, FileStore, Pacing, SeqSlice, StepTime,
};
use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::manager::{BlockId, ExtraKeys, Manager, Outcome, SeqId, Transfer, TransferId};
use hybridkv::ops::Kernels;
use hybridkv::ops::synthetic::history;

use super::content::Content;
use super::model::{LayerTimer, Model, Reach, sink_logits};
use super::sampling::{Sampler, Sequence};
use super::setup::{Request, STEPS_IN_FLIGHT, Setup};
use super::verify::{Oracle, Tally};
use clock::Clock;
use prefetch::Fetch;

/// Attention is timed in one step of this many.
pub const TIMED_STEPS: u64 = 8;
/// Threads that move blocks to and from storage.
const STORAGE_THREADS: usize = 4;
/// Requests that wait for the turn before them, at most, while later ones are looked at.
const LOOK_AHEAD: usize = 64;

/// What a run did, besides what manager and engine count.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    pub requests: u64,
    pub preemptions: u64,
    /// Sequences whose first step ran behind their loads.
    pub overlapped: u64,
    /// Loads that failed and were computed instead, by sequence.
    pub failed_loads: u64,
    /// Prompt tokens of all requests, and which tier served them.
    pub prompt_tokens: u64,
    pub device_hit_tokens: u64,
    pub host_hit_tokens: u64,
    pub storage_hit_tokens: u64,
    /// Blocks that were fetched for requests that waited.
    pub prefetched_blocks: u64,
    /// Tokens computed: prefill and decode.
    pub prefill_tokens: u64,
    pub decode_tokens: u64,
    pub steps: u64,
    /// Time of the steps on the device, and the part of it that was measured per layer.
    pub step_ms: f64,
    pub decode_attention: AttentionTime,
    pub mixed_attention: AttentionTime,
    pub peak_live_tokens: u64,
}

/// Attention in the steps that were timed.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttentionTime {
    pub ms: f64,
    /// Bytes of K and V that the queries see, each once per sequence.
    pub bytes: f64,
    /// 4 * head_dim per (query head, query, visible key).
    pub flops: f64,
}

impl AttentionTime {
    fn add(&mut self, other: &Self) {
        self.ms += other.ms;
        self.bytes += other.bytes;
        self.flops += other.flops;
    }
}

/// A request that waits.
struct Job {
    /// Its name once it is allocated, and of its prefetch until then.
    seq: SeqId,
    request: Request,
    /// History hash of every token.
    hashes: Arc<[u64]>,
    /// Tokens to prefill: the prompt, and after a preemption what was put out as well.
    prompt_len: usize,
    preempted: bool,
    fetch: Fetch,
}

impl Job {
    /// Whether the turn before it has ended.
    fn may_start(&self, ended: &[bool]) -> bool {
        self.request.after.is_none_or(|request| ended[request])
    }
}

/// A request that runs.
struct Live {
    seq: SeqId,
    job: Job,
    /// Tokens that the manager knows.
    appended: usize,
    /// Tokens whose step was submitted.
    computed: usize,
    /// Tokens whose step has ended.
    settled: usize,
    hit_tokens: usize,
    /// Blocks that were on their way up.
    loads: Vec<(usize, BlockId)>,
    loads_are: Loads,
}

/// How the loads of a request stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loads {
    /// It waits for them.
    Awaited,
    /// Its steps run behind them, on trial.
    Behind,
    /// They have ended, or there were none.
    Ended,
}

impl Live {
    fn total(&self) -> usize {
        self.job.request.tokens.len()
    }

    fn as_sequence(&self) -> Sequence<'_> {
        Sequence { seq: self.seq, hashes: &self.job.hashes }
    }
}

/// A step on the device.
struct Step {
    start: Event,
    end: Event,
    slices: Vec<SeqSlice>,
    /// Of a measured step of decode alone, the bytes that its attention reads: steps beside transfers are judged
    /// by it.
    decode_work: Option<f64>,
    /// What the timer measures, if it does.
    timed: Option<(bool, AttentionTime)>,
}

/// One run. See the module documentation.
pub struct Server {
    setup: Setup,
    /// `None` when nothing is to be verified.
    sampler: Option<Sampler>,
    model: Model,
    tables: BatchTables,
    timer: LayerTimer,
    timer_busy: bool,
    engine: Engine,
    compute: Arc<Stream>,
    manager: Manager,
    next_request: usize,
    next_seq: SeqId,
    /// In the order of their requests, like `running`.
    waiting: VecDeque<Job>,
    running: Vec<Live>,
    /// Requests that have ended.
    ended: Vec<bool>,
    steps: VecDeque<Step>,
    spare_steps: Vec<Step>,
    batch: Vec<SeqSlice>,
    payload: Vec<u64>,
    transfers: Vec<Transfer>,
    completed: Vec<(TransferId, Outcome)>,
    /// Whether the last batch was cut short for want of blocks.
    pressed: bool,
    counters: Counters,
    started: Instant,
    clock: Clock,
}

impl Server {
    /// A server that has not served yet.
    pub fn new(device: &Device, setup: Setup, faults: &[Fault]) -> Result<Self> {
        let mut manager = Manager::new(setup.manager.clone())?;
        let kernels = Arc::new(Kernels::load(device)?);
        let mut engine = Engine::new(kernels.clone(), setup.engine.clone())?;
        if let Some(config) = &setup.storage {
            let store = Arc::new(FileStore::open(config.clone())?);
            manager.attach_storage(setup.storage_config(store.num_slots()), store.stored())?;
            engine.attach_storage(store, STORAGE_THREADS)?;
        }
        if let Some(loads) = setup.layerwise {
            engine.load_by_layer(&setup.plan, loads)?;
        }
        if let Some(stores) = setup.layerwise_stores {
            engine.store_by_layer(&setup.plan, stores)?;
        }
        for fault in faults {
            engine.inject(*fault);
        }
        if !device.is_cuda() {
            // Pauses are of measured time.
            engine.set_pacing(Pacing { beside_loads: 1.0, ..Pacing::default() })?;
        }
        let compute = Arc::new(device.stream()?);
        if setup.poison {
            let pool = engine.pool();
            // SAFETY: the pool is new, and everything later is ordered behind this stream.
            unsafe { (*compute).as_ref().fill(pool.address, 0xFF, pool.bytes as usize)? };
        }
        let sinks = sink_logits(&setup.spec);
        let content = Arc::new(Content::new(setup.elements)?);
        let (spec, plan) = (&setup.spec, &setup.plan);
        let most = setup.max_batch_tokens;
        let model = Model::new(kernels, &engine, spec, plan, &sinks, &content, most)?;
        let sampler = match setup.verify > 0.0 {
            true => {
                let (spec, plan) = (spec.clone(), plan.clone());
                let oracle = Oracle { spec, plan, sink_logits: sinks, content };
                Some(Sampler::new(device, &setup, oracle)?)
            }
            false => None,
        };
        Ok(Self {
            tables: BatchTables::new(
                device,
                &setup.plan.groups,
                setup.max_seqs,
                setup.max_batch_tokens,
            )?,
            timer: LayerTimer::new(device, setup.spec.layers.len())?,
            timer_busy: false,
            ended: vec![false; setup.workload.len()],
            sampler,
            model,
            engine,
            compute,
            manager,
            next_request: 0,
            next_seq: 0,
            waiting: VecDeque::new(),
            running: Vec::new(),
            steps: VecDeque::new(),
            spare_steps: Vec::new(),
            batch: Vec::new(),
            payload: Vec::new(),
            transfers: Vec::new(),
            completed: Vec::new(),
            pressed: false,
            counters: Counters::default(),
            started: Instant::now(),
            clock: Clock::new(device.is_cuda()),
            setup,
        })
    }

    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    pub fn manager(&self) -> &Manager {
        &self.manager
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    pub fn tally(&self) -> Tally {
        self.sampler.as_ref().map(Sampler::tally).unwrap_or_default()
    }

    /// Seconds since the server was made.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Serves every request; `each_round` sees the server after every round.
    pub fn serve(&mut self, mut each_round: impl FnMut(&Self)) -> Result<()> {
        self.started = Instant::now();
        self.clock = Clock::new(self.clock.is_measured());
        loop {
            self.clock.round();
            self.collect()?;
            self.admit()?;
            self.schedule()?;
            if !self.batch.is_empty() {
                self.submit()?;
            } else if self.running.is_empty() && self.waiting.is_empty() && self.all_drawn() {
                break;
            } else {
                self.wait()?;
            }
            each_round(self);
        }
        // The last blocks on their way down; each can be followed by another transfer.
        while self.engine.outstanding() > 0 {
            self.engine.wait(&mut self.completed)?;
            self.take_completions()?;
        }
        Ok(())
    }

    /// Checks what is still to be checked.
    pub fn finish(&mut self) -> Result<Tally> {
        match self.sampler.take() {
            Some(sampler) => sampler.finish((*self.compute).as_ref()),
            None => Ok(Tally::default()),
        }
    }

    fn all_drawn(&self) -> bool {
        self.next_request == self.setup.workload.len()
    }

    /// Settles steps that have ended and takes completions, without waiting for more than the oldest step
    /// when too many are on the device.
    fn collect(&mut self) -> Result<()> {
        while let Some(step) = self.steps.front()
            && (self.steps.len() >= STEPS_IN_FLIGHT || step.end.is_complete()?)
        {
            self.settle_oldest()?;
        }
        self.manager.tick(self.clock.now())?;
        self.engine.poll(&mut self.completed)?;
        self.take_completions()
    }

    /// Nothing can be submitted now: waits for what is under way, or makes room.
    fn wait(&mut self) -> Result<()> {
        if !self.steps.is_empty() {
            return self.settle_oldest();
        }
        self.pump()?;
        if self.engine.outstanding() > 0 {
            self.engine.wait(&mut self.completed)?;
            return self.take_completions();
        }
        if self.running.len() > 1 {
            return self.preempt_youngest();
        }
        if self.running.is_empty() && self.waiting.iter().any(|job| job.fetch == Fetch::UnderWay) {
            // For a prefetch that will be given up at its time.
            std::thread::sleep(Duration::from_millis(1));
            return Ok(());
        }
        // One request has the pool to itself and its sizes were checked: the manager must have room.
        Err(Error::new(
            "run",
            ErrorKind::NoFreeBlocks {
                needed: self.manager.max_blocks(self.setup.workload.longest()),
                free: self.manager.free_blocks(),
            },
        ))
    }

    /// Waits for the oldest step, settles its tokens and ends the requests that are done.
    fn settle_oldest(&mut self) -> Result<()> {
        let Some(mut step) = self.steps.pop_front() else { return Ok(()) };
        self.engine.wait_for(&step.end)?;
        let ms = f64::from(step.end.elapsed_ms_since(&step.start)?);
        self.counters.step_ms += ms;
        if let Some(work) = step.decode_work {
            self.engine.report_step(StepTime { ms, work });
        }
        if let Some((decode_only, mut time)) = step.timed.take() {
            time.ms = self.timer.total_ms()?;
            self.timer_busy = false;
            match decode_only {
                true => self.counters.decode_attention.add(&time),
                false => self.counters.mixed_attention.add(&time),
            }
        }
        if self.running.iter().any(|live| live.loads_are == Loads::Behind) {
            // The loads that the step ran behind have ended, too: whether it counts is known now.
            self.engine.poll(&mut self.completed)?;
            self.take_completions()?;
        }
        for slice in step.slices.drain(..) {
            // A preempted sequence is gone, and its name is never used again.
            let Some(at) = self.running.iter().position(|live| live.seq == slice.seq) else {
                continue;
            };
            let live = &mut self.running[at];
            live.settled = (slice.start + slice.tokens) as usize;
            self.manager.advance_with(live.seq, live.computed, live.settled, |_, _| {})?;
            if live.settled == live.total() && live.loads_are == Loads::Ended {
                self.end(at)?;
            }
        }
        self.spare_steps.push(step);
        self.pump()
    }

    /// Ends a request whose tokens are all settled.
    fn end(&mut self, at: usize) -> Result<()> {
        let live = self.running.remove(at);
        if let Some(sampler) = &mut self.sampler {
            let compute = (*self.compute).as_ref();
            let sequence = live.as_sequence();
            sampler.sample_turn_end(
                sequence,
                live.settled,
                &self.manager,
                &self.engine,
                compute,
            )?;
        }
        self.manager.free(live.seq)?;
        self.ended[live.job.request.index] = true;
        self.counters.requests += 1;
        Ok(())
    }

    /// Admits waiting requests, oldest first, while there is room for their prompts. Outputs are not
    /// reserved for: what they lack later is taken from the youngest request.
    fn admit(&mut self) -> Result<()> {
        self.prefetch()?;
        while self.running.len() < self.setup.max_seqs
            && (!self.pressed || self.running.is_empty())
            && let Some(at) = self.next_job()
        {
            let promised: usize = self
                .running
                .iter()
                .map(|live| live.job.prompt_len.saturating_sub(live.computed))
                .map(|tokens| self.manager.max_blocks(tokens))
                .sum();
            let job = &self.waiting[at];
            let needed = promised + self.manager.max_blocks(job.prompt_len);
            if !self.running.is_empty() && needed > self.manager.free_blocks() {
                break;
            }
            let seq = job.seq;
            let prompt = &job.request.tokens[..job.prompt_len];
            let allocated = self.manager.allocate_prefill(seq, prompt, 1, ExtraKeys::default(), 0);
            let allocation = match allocated {
                Ok(allocation) => allocation,
                Err(error) if matches!(error.kind(), ErrorKind::NoFreeBlocks { .. }) => break,
                Err(error) => return Err(error),
            };
            for &block in allocation.new_blocks.iter().flatten() {
                self.poison(block)?;
            }
            let Some(job) = self.waiting.remove(at) else { break };
            if !job.preempted {
                let hit = allocation.hit_tokens as u64;
                self.counters.prompt_tokens += job.prompt_len as u64;
                self.counters.device_hit_tokens += allocation.device_hit_tokens as u64;
                let host_hit = allocation.host_hit_tokens as u64;
                self.counters.host_hit_tokens += host_hit - allocation.device_hit_tokens as u64;
                self.counters.storage_hit_tokens += hit - host_hit;
            }
            let index = job.request.index;
            let at = self.running.partition_point(|live| live.job.request.index < index);
            let live = Live {
                seq,
                job,
                appended: allocation.num_tokens,
                computed: allocation.hit_tokens,
                settled: allocation.hit_tokens,
                hit_tokens: allocation.hit_tokens,
                loads: Vec::new(),
                loads_are: if allocation.loads.is_empty() { Loads::Ended } else { Loads::Awaited },
            };
            self.running.insert(at, live);
            self.pump()?;
            if allocation.loads.is_empty() {
                self.sample_hit(at)?;
            }
            self.hear_all()?;
        }
        Ok(())
    }

    /// Where in `waiting` the oldest request stands that may start: turns of one conversation follow each
    /// other.
    fn next_job(&mut self) -> Option<usize> {
        let may_start = |job: &Job| job.may_start(&self.ended) && job.fetch == Fetch::Over;
        if let Some(at) = self.waiting.iter().position(may_start) {
            return Some(at);
        }
        while self.waiting.len() < LOOK_AHEAD && !self.all_drawn() && self.setup.prefetch.is_none()
        {
            self.draw();
            if self.waiting.back().is_some_and(|job| job.may_start(&self.ended)) {
                return Some(self.waiting.len() - 1);
            }
        }
        None
    }

    /// Draws the next request.
    fn draw(&mut self) {
        let request = self.setup.workload.request(self.next_request);
        self.next_request += 1;
        let mut hash = 0;
        let hashes = request
            .tokens
            .iter()
            .map(|&token| {
                hash = history(hash, token);
                hash
            })
            .collect();
        let (seq, fetch) = (self.name(), self.unfetched());
        let prompt_len = request.prompt_len;
        self.waiting.push_back(Job { seq, request, hashes, prompt_len, preempted: false, fetch });
    }

    /// A name that no sequence has had.
    fn name(&mut self) -> SeqId {
        self.next_seq += 1;
        self.next_seq - 1
    }

    fn unfetched(&self) -> Fetch {
        if self.setup.prefetch.is_some() { Fetch::Unasked } else { Fetch::Over }
    }

    /// Fills a newly taken block with NaN, so that whatever is read before it is written shows.
    fn poison(&self, block: BlockId) -> Result<()> {
        if !self.setup.poison {
            return Ok(());
        }
        let span = self.engine.block(block)?;
        // SAFETY: the block was free until now: its readers were submitted to this stream before, no
        // transfer uses it, and its onboard, if any, is fenced behind this stream.
        unsafe { (*self.compute).as_ref().fill(span.address, 0xFF, span.bytes as usize) }
    }

    /// Puts a batch together: one token of every decoding request, then prefill chunks, oldest first.
    fn schedule(&mut self) -> Result<()> {
        self.batch.clear();
        self.pressed = false;
        let mut budget = self.setup.max_batch_tokens;
        for decoding in [true, false] {
            for at in 0..self.running.len() {
                let live = &self.running[at];
                let is_decoding = live.computed >= live.job.prompt_len;
                if live.loads_are == Loads::Awaited
                    || live.computed == live.total()
                    || is_decoding != decoding
                {
                    continue;
                }
                let wanted = if decoding { 1 } else { live.job.prompt_len - live.computed };
                let tokens = wanted.min(budget);
                if tokens == 0 {
                    return Ok(());
                }
                if !self.append(at, live.computed + tokens)? {
                    self.pressed = true;
                    return Ok(());
                }
                let live = &mut self.running[at];
                self.batch.push(SeqSlice {
                    seq: live.seq,
                    start: live.computed as u32,
                    tokens: tokens as u32,
                });
                live.computed += tokens;
                budget -= tokens;
                match decoding {
                    true => self.counters.decode_tokens += tokens as u64,
                    false => self.counters.prefill_tokens += tokens as u64,
                }
            }
        }
        Ok(())
    }

    /// Makes the manager know a request's tokens up to `end`; `false`, with nothing changed, when there are
    /// no blocks.
    fn append(&mut self, at: usize, end: usize) -> Result<bool> {
        let live = &mut self.running[at];
        if end <= live.appended {
            return Ok(true);
        }
        let tokens = &live.job.request.tokens[live.appended..end];
        let mut new_blocks = Vec::new();
        match self.manager.append_with(live.seq, tokens, |_, block| new_blocks.push(block)) {
            Ok(()) => live.appended = end,
            Err(error) if matches!(error.kind(), ErrorKind::NoFreeBlocks { .. }) => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        for block in new_blocks {
            self.poison(block)?;
        }
        Ok(true)
    }

    /// Submits the batch as one step.
    fn submit(&mut self) -> Result<()> {
        let stream = self.compute.clone();
        let compute = (*stream).as_ref();
        let mut step = match self.spare_steps.pop() {
            Some(step) => step,
            None => {
                let device = compute.device();
                let (start, end) = (device.timed_event()?, device.timed_event()?);
                Step { start, end, slices: Vec::new(), decode_work: None, timed: None }
            }
        };
        step.slices.extend_from_slice(&self.batch);
        self.payload.clear();
        for slice in &self.batch {
            let range = slice.start as usize..(slice.start + slice.tokens) as usize;
            if let Some(live) = self.running.iter().find(|live| live.seq == slice.seq) {
                self.payload.extend_from_slice(&live.job.hashes[range]);
            }
        }
        if let Some(sampler) = &mut self.sampler {
            sampler.note_step(&self.manager, &self.batch, &self.payload)?;
        }
        let batch = self.tables.build(&self.manager, &self.batch, &self.payload, compute)?;
        let reaches: Vec<Reach> = self
            .setup
            .plan
            .groups
            .iter()
            .map(|group| Reach::of(group.kind, group.sink_tokens, &self.batch))
            .collect();
        let (decode_only, work) = (batch.max_q_len == 1, attention_work(&self.setup, &reaches));
        step.decode_work = (decode_only && self.clock.is_measured()).then_some(work.bytes);
        if !self.timer_busy && self.counters.steps.is_multiple_of(TIMED_STEPS) {
            step.timed = Some((decode_only, work));
            self.timer_busy = true;
        }

        compute.record(&step.start)?;
        let mut marks = self.engine.begin_step()?;
        let load = self.engine.last_load(self.batch.iter().map(|slice| slice.seq));
        let Self { model, sampler, running, batch: slices, timer, manager, engine, .. } = self;
        let loads =
            |slice: &SeqSlice, group| manager.loading(slice.seq, group).is_ok_and(|n| n > 0);
        // R3, for exactly the layers that are on their way.
        let before_layer = |layer, group| match load {
            Some(load) if slices.iter().any(|slice| loads(slice, group)) => {
                engine.wait_layer(load, layer, compute)
            }
            _ => Ok(()),
        };
        let hashes = |seq| running.iter().find(|live| live.seq == seq).map(|live| &live.job.hashes);
        let timer = step.timed.is_some().then_some(&*timer);
        model.step(&batch, &reaches, timer, compute, before_layer, |layer, out| {
            marks.layer_computed(layer, compute)?;
            match sampler {
                Some(sampler) => sampler.sample_rows(layer, out, slices, hashes, compute),
                None => Ok(()),
            }
        })?;
        self.engine.end_step(marks);
        compute.record(&step.end)?;
        self.steps.push_back(step);
        self.counters.steps += 1;

        for live in &self.running {
            if self.batch.iter().any(|slice| slice.seq == live.seq) {
                self.manager.advance_with(live.seq, live.computed, live.settled, |_, _| {})?;
            }
        }
        let live_tokens: u64 = self.running.iter().map(|live| live.computed as u64).sum();
        self.counters.peak_live_tokens = self.counters.peak_live_tokens.max(live_tokens);
        self.pump()?;
        if let Some(sampler) = &mut self.sampler {
            sampler.fence(compute)?;
        }
        Ok(())
    }

    /// Frees the youngest running request and puts it back in line.
    fn preempt_youngest(&mut self) -> Result<()> {
        let at = self.running.len() - 1;
        self.manager.free(self.running[at].seq)?;
        self.end_trial(at, false);
        self.counters.preemptions += 1;
        self.requeue(at);
        Ok(())
    }

    /// Puts a request, of which the manager knows nothing any more, back in line.
    fn requeue(&mut self, at: usize) {
        let live = self.running.remove(at);
        let prompt_len = live.job.prompt_len.max(live.appended);
        let index = live.job.request.index;
        let at = self.waiting.partition_point(|job| job.request.index < index);
        let (seq, fetch) = (self.name(), self.unfetched());
        self.waiting.insert(at, Job { seq, prompt_len, preempted: true, fetch, ..live.job });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After an error, copies into the verifier's memory may still be under way.
        let _ = (*self.compute).as_ref().synchronize();
    }
}

/// Bytes and operations of the attention of all layers of a step.
fn attention_work(setup: &Setup, reaches: &[Reach]) -> AttentionTime {
    let mut work = AttentionTime::default();
    for (group, reach) in setup.plan.groups.iter().zip(reaches) {
        let layers = group.layers.len() as f64;
        let heads = setup.spec.num_qo_heads as f64;
        work.bytes += layers * reach.keys as f64 * group.shape.token_bytes() as f64;
        work.flops += layers * reach.pairs as f64 * 4.0 * heads * group.shape.head_dim as f64;
    }
    work
}
