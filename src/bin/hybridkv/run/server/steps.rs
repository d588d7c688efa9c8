//! The steps of a run: put together, submitted without waiting, and settled when they have ended.

use hybridkv::device::Event;
use hybridkv::engine::{SeqSlice, StepTime};
use hybridkv::error::{ErrorKind, Result};
use hybridkv::manager::BlockId;

use super::super::model::Reach;
use super::super::setup::Setup;
use super::requests::Loads;
use super::{AttentionTime, Server, TIMED_STEPS};

/// A step on the device.
pub(super) struct Step {
    pub start: Event,
    pub end: Event,
    pub slices: Vec<SeqSlice>,
    /// Of a measured step of decode alone, the bytes that its attention reads: steps beside transfers are judged
    /// by it.
    pub decode_work: Option<f64>,
    /// What the timer measures, if it does.
    pub timed: Option<(bool, AttentionTime)>,
}

impl Server {
    /// Waits for the oldest step, settles its tokens and ends the requests that are done.
    pub(super) fn settle_oldest(&mut self) -> Result<()> {
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

    /// Fills a newly taken block with NaN, so that whatever is read before it is written shows.
    pub(super) fn poison(&self, block: BlockId) -> Result<()> {
        if !self.setup.poison {
            return Ok(());
        }
        let span = self.engine.block(block)?;
        // SAFETY: the block was free until now: its readers were submitted to this stream before, no
        // transfer uses it, and its onboard, if any, is fenced behind this stream.
        unsafe { (*self.compute).as_ref().fill(span.address, 0xFF, span.bytes as usize) }
    }

    /// Puts a batch together: one token of every decoding request, then prefill chunks, oldest first.
    pub(super) fn schedule(&mut self) -> Result<()> {
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
    pub(super) fn submit(&mut self) -> Result<()> {
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
