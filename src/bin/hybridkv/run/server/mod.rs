//! The serving loop: continuous batching over one manager and one engine.
//!
//! Every round settles finished steps, takes completions of transfers, admits requests, builds a batch of
//! decode tokens and prefill chunks, and submits it without waiting: up to [`STEPS_IN_FLIGHT`] steps are
//! on the device at once. Older requests come first. A request that finds no blocks waits; when nothing is
//! under way that could free any, the youngest running request is preempted and starts again from what is
//! cached. So the oldest request always gets on, and every request ends.
//!
//! The requests are in requests.rs, the steps in steps.rs, the transfers that they bring about in transfers.rs.
//!
//! A prompt is allocated up to its hit first and appended chunk by chunk as it is scheduled: a block is
//! findable only once the step that writes it is submitted.

mod clock;
mod prefetch;
mod requests;
mod steps;
mod transfers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hybridkv::device::{Device, Stream};
use hybridkv::engine::{BatchTables, BlockStore, Engine, Fault, FileStore, Pacing, SeqSlice};
use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::manager::{Manager, Outcome, SeqId, Transfer, TransferId};
use hybridkv::ops::Kernels;

use super::content::Content;
use super::model::{LayerTimer, Model, sink_logits};
use super::oracle::Oracle;
use super::sampling::Sampler;
use super::setup::{STEPS_IN_FLIGHT, Setup};
use super::verify::Tally;
use clock::Clock;
use prefetch::Fetch;
use requests::{Job, Live};
use steps::Step;

/// Attention is timed in one step of this many.
pub const TIMED_STEPS: u64 = 8;
/// Threads that move blocks to and from storage.
const STORAGE_THREADS: usize = 4;

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
}

impl Drop for Server {
    fn drop(&mut self) {
        // After an error, copies into the verifier's memory may still be under way.
        let _ = (*self.compute).as_ref().synchronize();
    }
}
