//! Moves by the path that the planner chooses, submission included: fragments and blocks, one way and both ways, a
//! restored prefix, and what a decode step beside them costs. Times are those of the host, from the first
//! submission until all streams are done.

use std::sync::Arc;
use std::time::Instant;

use hybridkv::abi::hkv_copy;
use hybridkv::device::cuda::Graph;
use hybridkv::device::{Device, Event, PinnedBuffer, Span, Stream};
use hybridkv::error::Result;
use hybridkv::movement::{
    BlockLayout, BlockMove, BlockPart, BlockRows, Layers, LinkModel, Mover, Traffic, Way,
};
use hybridkv::ops::{CtaQuota, Kernels, MoveShape};

use super::Bench;
use super::attention::{Attention, Batch};
use super::suites::{FRAGMENTS, STEPS};
use super::timing::{Timing, Workload};
use super::workload::{Arenas, Direction};
use crate::report::Row;

/// Bytes that are planned and submitted in one direction before the other one has its turn: less where blocks need no
/// staging, whose ring runs empty between two submissions.
const CHUNK_BYTES: u64 = 8 << 20;
const STAGED_CHUNK_BYTES: u64 = 64 << 20;
/// Fragments below this size are moved by the kernel alone, from tables that are there: a planner is for what takes
/// the link longer than the host.
const PLANNED_BYTES: u64 = 64 << 10;
/// Bytes of a block of 12 layers of Llama-4-Scout on one of 8 ranks, 16 tokens, and of K or V of one of its layers.
const SCOUT_BLOCK: u64 = 96 << 10;
const SCOUT_ROW: u64 = 4 << 10;
/// Blocks that a prefix of 128K tokens has there: those of the full layers, and a chunk's of three groups.
const SCOUT_BLOCKS: u64 = 8192 + 3 * 512;

/// What the memory on the device looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Near {
    /// Blocks are contiguous, as they are on the host.
    Whole,
    /// A pool by layer and part: rows of so many bytes.
    Rows(u64),
}

/// Blocks in random order that move in one direction, again and again.
struct Lane {
    mover: Mover,
    stream: Stream,
    way: Way,
    shape: MoveShape,
    copies: Vec<hkv_copy>,
    /// As many descriptors, for the mover to put in order.
    table: PinnedBuffer,
    block_bytes: u64,
}

impl Lane {
    /// `count` blocks, or as many as there are places, from the host's part of the arenas to the device's or back.
    fn new(
        bench: &mut Bench<'_>,
        (kernels, model): (&Arc<Kernels>, &Arc<LinkModel>),
        (near_pool, far_pool): (Span, Span),
        way: Way,
        near: Near,
        block_bytes: u64,
        count: u64,
    ) -> Result<Self> {
        let places = near_pool.bytes.min(far_pool.bytes) / block_bytes;
        let order = |bench: &mut Bench<'_>| {
            let mut ids: Vec<u64> = (0..places).collect();
            bench.rng.shuffle(&mut ids);
            ids
        };
        let (near_ids, far_ids) = (order(bench), order(bench));
        let row = match near {
            Near::Whole => block_bytes,
            Near::Rows(row) => row,
        };
        let rows = BlockRows {
            layers: (block_bytes / row) as u32,
            parts: 1,
            heads: 1,
            tokens: 1,
            row_bytes: row as u32,
        };
        let far_layout = BlockLayout::block_first_hnd(rows)?;
        let (near_layout, near_block) = match near {
            Near::Whole => (far_layout.clone(), block_bytes),
            Near::Rows(row) => {
                let layers = Layers::Stride((row * places) as i64);
                (far_layout.clone().in_layers(layers, row as i64), row)
            }
        };
        let up = way == Way::HostToDevice;
        let (src, dst) = if up { (&far_layout, &near_layout) } else { (&near_layout, &far_layout) };
        let between = BlockMove::between(src, dst, &BlockPart::whole(rows))?;
        let copies: Vec<hkv_copy> = near_ids
            .iter()
            .zip(&far_ids)
            .take(count as usize)
            .map(|(near, far)| {
                let near = near_pool.address + near * near_block;
                let far = far_pool.address + far * block_bytes;
                if up { between.block(far, near) } else { between.block(near, far) }
            })
            .collect();
        let device = bench.device;
        Ok(Self {
            mover: Mover::new(kernels, model, copies.len()).with_staging()?,
            stream: device.stream()?,
            way,
            shape: between.shape,
            table: device.alloc_pinned(size_of_val(copies.as_slice()))?,
            copies,
            block_bytes,
        })
    }

    fn bytes(&self) -> u64 {
        self.copies.len() as u64 * self.block_bytes
    }

    fn chunks(&self) -> usize {
        self.copies.len().div_ceil(self.per_chunk())
    }

    fn per_chunk(&self) -> usize {
        let chunk = if self.shape.dims().is_empty() { CHUNK_BYTES } else { STAGED_CHUNK_BYTES };
        (chunk / self.block_bytes).max(1) as usize
    }

    /// Submits so many blocks from `first` on, which nothing in flight belongs to.
    fn submit(&mut self, first: usize, count: usize, both_ways: bool) -> Result<()> {
        let copies = &self.copies[first..self.copies.len().min(first + count)];
        let size = size_of::<hkv_copy>();
        // SAFETY: the table has room for all copies, and nothing in flight reads these rows of it.
        unsafe {
            let rows = (self.table.address() as usize + first * size) as *mut hkv_copy;
            std::ptr::copy_nonoverlapping(copies.as_ptr(), rows, copies.len());
        }
        let table =
            Span::new(self.table.address() + (first * size) as u64, size_of_val(copies) as u64);
        let traffic = Traffic { way: self.way, both_ways };
        // SAFETY: arenas and tables outlive the synchronisation that every caller ends with; rows of the table are
        // written again only after it; blocks are distinct.
        unsafe {
            self.mover.submit(table, copies.len(), &self.shape, traffic, self.stream.as_ref())
        }
    }
}

/// Submits all of the lanes: a lane alone at once, several chunk by chunk, by turns. The streams are not waited for.
fn start(lanes: &mut [Lane]) -> Result<()> {
    if let [lane] = lanes {
        return lane.submit(0, lane.copies.len(), false);
    }
    let chunks = lanes.iter().map(Lane::chunks).max().unwrap_or(0);
    (0..chunks).try_for_each(|chunk| start_chunk(lanes, chunk))
}

fn start_chunk(lanes: &mut [Lane], chunk: usize) -> Result<()> {
    let both_ways = lanes.len() > 1;
    lanes.iter_mut().filter(|lane| chunk < lane.chunks()).try_for_each(|lane| {
        let count = lane.per_chunk();
        lane.submit(chunk * count, count, both_ways)
    })
}

fn wait(lanes: &[Lane]) -> Result<()> {
    lanes.iter().try_for_each(|lane| lane.stream.as_ref().synchronize())
}

/// Medians of samples in microseconds.
fn timing(mut samples: Vec<f64>) -> Timing {
    samples.sort_by(f64::total_cmp);
    let at = |quantile: f64| samples[((samples.len() - 1) as f64 * quantile).round() as usize];
    Timing { us: at(0.5), spread: (at(0.9) - at(0.1)) / at(0.5), samples: samples.len() }
}

impl Bench<'_> {
    /// All of the cases.
    pub(super) fn routes(&mut self, arenas: &Arenas) -> Result<()> {
        let kernels = Arc::new(Kernels::load(self.device)?);
        let begin = Instant::now();
        let model = Arc::new(LinkModel::calibrate(&kernels)?);
        self.report.limits.insert("calibration_ms".to_owned(), begin.elapsed().as_secs_f64() * 1e3);
        if self.device.is_cuda() {
            println!("{model:.3?}");
        }
        let [near, far] = [Direction::D2h, Direction::H2d].map(|side| arenas.side(side));
        let half = |span: Span, which: u64| {
            let bytes = span.bytes / 2 / 4096 * 4096;
            Span::new(span.address + which * bytes, bytes)
        };
        let ways = [(Way::HostToDevice, Direction::H2d), (Way::DeviceToHost, Direction::D2h)];
        let most = self.scaled(512 << 20).min(far.bytes);
        let cuda = self.device.is_cuda();

        for (way, direction) in ways {
            for fragment in FRAGMENTS.iter().filter(|f| f.bytes <= most) {
                let count = most.min(fragment.bytes << 16) / fragment.bytes;
                if fragment.bytes < PLANNED_BYTES {
                    let traffic = Traffic { way, both_ways: false };
                    let bytes = count * fragment.bytes;
                    let quota = CtaQuota::at_most(model.quota(traffic, count, bytes));
                    self.fragments(arenas, direction, fragment, quota, String::new())?;
                    continue;
                }
                let pools = (near, far);
                let lane = Lane::new(
                    self,
                    (&kernels, &model),
                    pools,
                    way,
                    Near::Whole,
                    fragment.bytes,
                    count,
                )?;
                let (goal, floor) = (fragment.goal(direction), fragment.floor);
                self.one_way(fragment.case(direction), direction, lane, goal, floor)?;
            }
            let name = |what: &str| format!("{what}/{}", direction.name());
            let block = 4 * SCOUT_BLOCK;
            let (rows, count) = (Near::Rows(SCOUT_ROW), most / block);
            let lane = Lane::new(self, (&kernels, &model), (near, far), way, rows, block, count)?;
            self.one_way(name("scout48"), direction, lane, Some(50.0), None)?;
            let (rows, count) = (Near::Rows(512), most / SCOUT_BLOCK);
            let lane =
                Lane::new(self, (&kernels, &model), (near, far), way, rows, SCOUT_BLOCK, count)?;
            self.one_way(name("pages/512"), direction, lane, Some(40.0), None)?;
        }

        for (name, rows) in [("BlockFirst", Near::Whole), ("LayerFirst", Near::Rows(SCOUT_ROW))] {
            let (pools, way) = ((near, far), Way::HostToDevice);
            let lane =
                Lane::new(self, (&kernels, &model), pools, way, rows, SCOUT_BLOCK, SCOUT_BLOCKS)?;
            let bytes = lane.bytes() as f64;
            let timing = self.sample(&mut [lane])?;
            let limit = self.report.limits["copy_engine_h2d_gbps"];
            let row = Row {
                case: format!("restore/128K/{name}"),
                ours: timing.us / 1e3,
                unit: "ms".to_owned(),
                gbps: Some(bytes / timing.us / 1e3),
                limit: Some(bytes / limit / 1e6),
                goal: cuda.then_some(20.0),
                ..Row::default()
            };
            self.add(row, timing);
        }

        let both = |bench: &mut Self, near_rows: Near, block: u64| -> Result<[Lane; 2]> {
            let mut lane = |way, which| {
                let pools = (half(near, which), half(far, which));
                Lane::new(bench, (&kernels, &model), pools, way, near_rows, block, u64::MAX)
            };
            Ok([lane(Way::HostToDevice, 0)?, lane(Way::DeviceToHost, 1)?])
        };
        let duplex = [
            ("duplex/512", Near::Rows(512), SCOUT_BLOCK, None),
            ("duplex/1K", Near::Rows(1 << 10), SCOUT_BLOCK, None),
            ("duplex/4K", Near::Rows(SCOUT_ROW), SCOUT_BLOCK, Some(80.0)),
            ("scout48/duplex", Near::Rows(SCOUT_ROW), 4 * SCOUT_BLOCK, Some(80.0)),
            ("block96K/duplex", Near::Whole, SCOUT_BLOCK, Some(84.0)),
            ("duplex/1M", Near::Whole, 1 << 20, Some(84.0)),
        ];
        for (case, rows, block, goal) in duplex.into_iter().filter(|case| case.2 <= far.bytes / 2) {
            let mut lanes = both(self, rows, block)?;
            let bytes = lanes.iter().map(Lane::bytes).sum::<u64>() as f64;
            let timing = self.sample(&mut lanes)?;
            let gbps = bytes / timing.us / 1e3;
            let row = Row {
                case: case.to_owned(),
                ours: gbps,
                unit: "GB/s".to_owned(),
                gbps: Some(gbps),
                limit: self.report.limits.get("copy_engine_duplex_gbps").copied(),
                goal: goal.filter(|_| cuda),
                ..Row::default()
            };
            self.add(row, timing);
        }
        self.submissions(&model, &kernels, (near, far))?;
        let lanes = both(self, Near::Whole, SCOUT_BLOCK)?;
        self.interference(lanes)
    }

    fn one_way(
        &mut self,
        case: String,
        direction: Direction,
        lane: Lane,
        goal: Option<f64>,
        floor: Option<f64>,
    ) -> Result<()> {
        let bytes = lane.bytes() as f64;
        let timing = self.sample(&mut [lane])?;
        let gbps = bytes / timing.us / 1e3;
        let row = Row {
            case,
            ours: gbps,
            unit: "GB/s".to_owned(),
            gbps: Some(gbps),
            limit: Some(self.report.limits[&format!("copy_engine_{}_gbps", direction.name())]),
            goal: goal.filter(|_| self.device.is_cuda()),
            tolerance: floor,
            ..Row::default()
        };
        self.add(row, timing);
        Ok(())
    }

    /// Runs the lanes again and again for about as long as a case is timed.
    fn sample(&mut self, lanes: &mut [Lane]) -> Result<Timing> {
        let mut samples = Vec::new();
        start(lanes)?;
        wait(lanes)?;
        let begin = Instant::now();
        while samples.len() < 5 || begin.elapsed().as_secs_f64() < self.seconds {
            let sample = Instant::now();
            start(lanes)?;
            self.clocks.sample();
            wait(lanes)?;
            samples.push(sample.elapsed().as_secs_f64() * 1e6);
        }
        Ok(timing(samples))
    }

    /// What it takes the host to plan and submit a move, per block.
    fn submissions(
        &mut self,
        model: &Arc<LinkModel>,
        kernels: &Arc<Kernels>,
        pools: (Span, Span),
    ) -> Result<()> {
        for (case, both_ways) in [("submit/10000", false), ("submit/10000/both-ways", true)] {
            let way = Way::HostToDevice;
            let mut lane =
                Lane::new(self, (kernels, model), pools, way, Near::Whole, SCOUT_BLOCK, 10_000)?;
            let count = lane.copies.len();
            let mut samples = Vec::new();
            for _ in 0..8 {
                let begin = Instant::now();
                lane.submit(0, count, both_ways)?;
                samples.push(begin.elapsed().as_secs_f64() * 1e6 / count as f64);
                lane.stream.as_ref().synchronize()?;
            }
            let timing = timing(samples.split_off(1));
            let goal = self.device.is_cuda().then_some(1.0);
            let (case, unit) = (case.to_owned(), "us".to_owned());
            self.add(Row { case, ours: timing.us, unit, goal, ..Row::default() }, timing);
        }
        Ok(())
    }

    /// The 99th percentile of a decode step, alone and beside moves both ways, on a GPU.
    fn interference(&mut self, mut lanes: [Lane; 2]) -> Result<()> {
        if !self.device.is_cuda() {
            return Ok(());
        }
        let (case, seconds) = (&STEPS[1], self.seconds.max(0.5));
        let (model, lengths) = (case.model()?, case.lengths(self.device));
        let batch = Batch {
            model: &model,
            lengths: &lengths,
            q_len: 1,
            block_size: 16,
            layers_per_round: model.layers.len(),
        };
        let Some(step) = Attention::new(self.kernels, &batch, &mut self.rng)? else {
            return Ok(());
        };
        let stream = self.device.stream()?;
        let graph = Graph::capture(stream.as_ref(), |stream| {
            (0..step.rounds()).try_for_each(|round| step.submit(round, stream))
        })?;
        let mut runs =
            Steps { device: self.device, graph: &graph, stream: &stream, events: Vec::new() };
        (0..320).try_for_each(|_| runs.start())?;
        let alone = runs.times(20)?;
        start(&mut lanes)?;
        wait(&lanes)?;
        let begin = Instant::now();
        start(&mut lanes)?;
        wait(&lanes)?;
        let chunks = lanes[0].chunks();
        let chunk_us = begin.elapsed().as_secs_f64() * 1e6 / chunks as f64;
        // A step every so many chunks, so that the moves last longer than the steps; the first ones lead.
        let every = (1.2 * quantile(&alone, 0.5) / chunk_us).ceil().max(1.0) as usize;
        let (begin, mut beside) = (Instant::now(), Vec::new());
        while beside.len() < 300 || begin.elapsed().as_secs_f64() < seconds {
            for chunk in 0..chunks {
                start_chunk(&mut lanes, chunk)?;
                if chunk > every && chunk % every == 0 {
                    runs.start()?;
                }
            }
            wait(&lanes)?;
            beside.extend(runs.times(0)?);
        }
        beside.sort_by(f64::total_cmp);
        let slower = |q: f64| 100.0 * (quantile(&beside, q) / quantile(&alone, q) - 1.0);
        let timing = Timing {
            us: quantile(&beside, 0.5),
            spread: (quantile(&beside, 0.9) - quantile(&beside, 0.1)) / quantile(&beside, 0.5),
            samples: beside.len(),
        };
        for (case, q) in [("interference/p50", 0.5), ("interference/p99", 0.99)] {
            let mut row = Row {
                case: case.to_owned(),
                ours: slower(q),
                unit: "%".to_owned(),
                goal: Some(5.0),
                ..Row::default()
            };
            row.error.insert("alone_us".to_owned(), quantile(&alone, q));
            row.error.insert("beside_us".to_owned(), quantile(&beside, q));
            self.add(row, timing);
        }
        Ok(())
    }
}

/// Replays of a step, each between two events.
struct Steps<'a> {
    device: &'a Device,
    graph: &'a Graph,
    stream: &'a Stream,
    events: Vec<(Event, Event)>,
}

impl Steps<'_> {
    fn start(&mut self) -> Result<()> {
        let (start, end) = (self.device.timed_event()?, self.device.timed_event()?);
        let stream = self.stream.as_ref();
        stream.record(&start)?;
        // SAFETY: whoever made the graph keeps its memory until all replays were waited for.
        unsafe { self.graph.launch(stream)? };
        stream.record(&end)?;
        self.events.push((start, end));
        Ok(())
    }

    /// Waits for the replays; their times in microseconds but the first ones', sorted.
    fn times(&mut self, skipped: usize) -> Result<Vec<f64>> {
        self.stream.as_ref().synchronize()?;
        let mut times = self
            .events
            .drain(..)
            .skip(skipped)
            .map(|(start, end)| Ok(f64::from(end.elapsed_ms_since(&start)?) * 1e3))
            .collect::<Result<Vec<f64>>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times)
    }
}

/// A quantile of sorted times.
fn quantile(times: &[f64], quantile: f64) -> f64 {
    times[((times.len() - 1) as f64 * quantile).round() as usize]
}
