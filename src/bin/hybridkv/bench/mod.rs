//! `hybridkv bench`: the kernels on the shapes that others publish, beside the machine's own limits, all
//! measured in one run. Memory rotates past the L2 cache, blocks lie in random order, times are medians
//! of CUDA graph replays.

mod arena;
mod attention;
mod codec;
mod manager;
mod movement;
mod overlap;
mod planning;
mod suites;
mod timing;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use hybridkv::device::Device;
use hybridkv::error::{ErrorKind, Result};
use hybridkv::ops::{CtaQuota, Kernels};

use crate::open_device;
use crate::random::Rng;
use crate::report::{Report, Row};
use attention::{Attention, Batch, BlockReads, layers_beyond_l2};
use planning::Planning;
use suites::{AttentionCase, DECODE, FRAGMENTS, Fragment, PLANS, PREFILL, READS, STEPS};
use timing::{Timing, Workload, measure};
use workload::{Arenas, BothWays, Direction, EngineCopy, Move, Read};

/// Arguments of `hybridkv bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to time.
    #[arg(value_enum, default_values_t = [Suite::Decode, Suite::Prefill, Suite::Movement])]
    suites: Vec<Suite>,
    /// auto, cpu or cuda:N. On the CPU a few tiny cases run, to test the benchmark itself.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Only the decode and prefill cases whose name holds this.
    #[arg(long, default_value = "")]
    filter: String,
    /// Seconds of timing per case.
    #[arg(long, default_value_t = 0.25)]
    seconds: f64,
    /// A Mooncake trace (JSONL) for the manager [default: its cases without one].
    #[arg(long)]
    trace: Option<String>,
    /// Write the reports to this file, or with several suites to `<suite>.json` in this folder.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Paged attention of one or a few new tokens per sequence.
    Decode,
    /// Paged attention of thousands of new tokens.
    Prefill,
    /// Batched moves between device and pinned host memory.
    Movement,
    /// Blocks into slots and back, on the device and over the link.
    Codec,
    /// The machine's own limits alone.
    Limits,
    /// The manager, on one thread of the processor.
    Manager,
}

/// Runs the suites. Exits with 1 when a case is below its floor.
pub fn main(args: &Args) -> Result<ExitCode> {
    let on_device = args.suites.iter().any(|&suite| suite != Suite::Manager);
    let device = if on_device { open_device(&args.device)? } else { Device::cpu() };
    let kernels = Kernels::load(&device)?;
    let mut failures = 0;
    for &suite in &args.suites {
        let of = if suite == Suite::Manager { &Device::cpu() } else { &device };
        let mut bench = Bench {
            report: Report::new(&suite_name(suite), of),
            kernels: &kernels,
            device: &device,
            filter: &args.filter,
            seconds: if device.is_cuda() { args.seconds } else { args.seconds.min(0.02) },
            rng: Rng::new(1),
            clocks: Clocks::new(&device),
        };
        bench.run(suite, args.trace.as_deref())?;
        failures += bench.report.failures();
        if let Some(path) = &args.json {
            let path = match args.suites.len() {
                1 => path.clone(),
                _ => path.join(format!("{}.json", suite_name(suite))),
            };
            bench.report.write(&path)?;
        }
    }
    Ok(ExitCode::from(u8::from(failures > 0)))
}

fn suite_name(suite: Suite) -> String {
    suite.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// One suite on one device.
struct Bench<'a> {
    report: Report,
    kernels: &'a Kernels,
    device: &'a Device,
    filter: &'a str,
    seconds: f64,
    rng: Rng,
    clocks: Clocks,
}

impl Bench<'_> {
    fn run(&mut self, suite: Suite, trace: Option<&str>) -> Result<()> {
        println!("{}: {} (commit {})", self.report.suite, self.report.device, self.report.commit);
        if suite != Suite::Manager && !self.device.is_cuda() {
            println!(
                "No GPU: tiny cases on the CPU device, which tests the benchmark and measures nothing."
            );
        }
        match suite {
            Suite::Decode => {
                self.memory_limits()?;
                header();
                self.block_reads()?;
                self.attention(DECODE)?;
                self.steps()?;
                self.plans()?;
            }
            Suite::Prefill => {
                self.memory_limits()?;
                header();
                self.attention(PREFILL)?;
            }
            Suite::Movement => self.movement()?,
            Suite::Codec => self.codecs()?,
            Suite::Manager => {
                header();
                manager::measure(trace, |row, timing| self.add(row, timing))?;
            }
            Suite::Limits => {
                self.memory_limits()?;
                let arenas = self.arenas()?;
                self.link_limits(&arenas)?;
            }
        }
        self.report.limits.extend(self.clocks.seen());
        for (name, value) in &self.report.limits {
            println!("  {name} {value:.1}");
        }
        Ok(())
    }

    fn measure(&mut self, work: &dyn Workload) -> Result<Timing> {
        let clocks = &mut self.clocks;
        measure(self.device, work, self.seconds, &mut || clocks.sample())
    }

    /// Bytes of a buffer of ordinarily `bytes`, less on smaller machines, tiny on the CPU.
    fn scaled(&self, bytes: u64) -> u64 {
        let info = self.device.info();
        let most = if self.device.is_cuda() { info.memory_bytes / 6 } else { 4 << 20 };
        bytes.min(most) / 4096 * 4096
    }

    fn limit(&mut self, name: &str, bytes: f64, timing: Timing) {
        self.report.limits.insert(name.to_owned(), bytes / timing.us / 1e3);
    }

    /// What plain loads and a copy inside the device reach.
    fn memory_limits(&mut self) -> Result<()> {
        let read = Read::new(self.kernels, self.scaled(8 << 30), &mut self.rng)?;
        let timing = self.measure(&read)?;
        self.limit("hbm_read_gbps", read.bytes() as f64, timing);
        Ok(())
    }

    fn arenas(&mut self) -> Result<Arenas> {
        Arenas::new(self.device, self.scaled(2 << 30), &mut self.rng)
    }

    /// What the copy engines reach.
    fn link_limits(&mut self, arenas: &Arenas) -> Result<()> {
        for direction in [Direction::H2d, Direction::D2h, Direction::D2d] {
            let copy = EngineCopy::new(arenas, direction);
            let timing = self.measure(&copy)?;
            let touched = if direction == Direction::D2d { 2.0 } else { 1.0 };
            let name = format!("copy_engine_{}_gbps", direction.name());
            self.limit(&name, touched * copy.bytes() as f64, timing);
        }
        let both = BothWays::new(self.device, arenas)?;
        let timing = self.measure(&both)?;
        self.limit("copy_engine_duplex_gbps", both.bytes() as f64, timing);
        Ok(())
    }

    /// The reads of attention without its arithmetic, one launch per case and layer.
    fn block_reads(&mut self) -> Result<()> {
        let filter = self.filter;
        for case in READS.iter().filter(|case| case.name().contains(filter)) {
            let (name, shape) = (case.name(), case.on(self.device));
            let (model, lengths) = (shape.model(2), shape.lengths());
            let batch = Batch::of(&model, &lengths, &shape);
            let Some(timing) = self.time(&name, |bench| {
                let Some(work) = BlockReads::new(bench.kernels, &batch, &mut bench.rng)? else {
                    return Ok(None);
                };
                let timing = bench.measure(&work)?;
                work.check()?;
                Ok(Some(timing))
            }) else {
                continue;
            };
            let mut row = self.read_row(name, batch.bytes(), timing);
            row.goal = row.limit.and_then(|limit| case.goal(&self.report.device, limit));
            self.add(row, timing);
        }
        Ok(())
    }

    /// One launch per case and layer.
    fn attention(&mut self, cases: &[AttentionCase]) -> Result<()> {
        let (read_limit, filter) = (self.report.limits["hbm_read_gbps"], self.filter);
        let mut last = None;
        for case in cases.iter().filter(|case| case.name().contains(filter)) {
            let (name, shape) = (case.name(), case.on(self.device));
            let lengths = shape.lengths();
            let one_layer = shape.model(1);
            let bytes = Batch::of(&one_layer, &lengths, &shape).bytes();
            let layers = match self.device.is_cuda() {
                true => layers_beyond_l2(bytes, self.device.info().l2_bytes),
                false => 2,
            };
            let model = shape.model(layers);
            let batch = Batch::of(&model, &lengths, &shape);
            let Some(timing) = self.time_attention(&name, &batch) else { continue };
            let tflops = shape.flops() / timing.us / 1e6;
            let (ours, unit) = if case.by_flops { (tflops, "TFLOP/s") } else { (timing.us, "us") };
            let row = Row {
                case: name,
                ours,
                unit: unit.to_owned(),
                gbps: Some(bytes / timing.us / 1e3),
                limit: (!case.by_flops).then_some(bytes / read_limit / 1e3),
                goal: case.goal(&self.report.device, last),
                tolerance: case.floor_in_unit(bytes, read_limit),
                ..Row::default()
            };
            last = Some(ours);
            self.add(row, timing);
        }
        Ok(())
    }

    /// All layers of a model in one graph.
    fn steps(&mut self) -> Result<()> {
        let filter = self.filter;
        for case in STEPS.iter().filter(|case| case.name().contains(filter)) {
            let (model, lengths) = (case.model()?, case.lengths(self.device));
            let batch = Batch {
                model: &model,
                lengths: &lengths,
                q_len: 1,
                block_size: 16,
                layers_per_round: model.layers.len(),
            };
            let Some(timing) = self.time_attention(&case.name(), &batch) else { continue };
            self.add(self.read_row(case.name(), batch.bytes(), timing), timing);
        }
        Ok(())
    }

    /// What a step pays for planning.
    fn plans(&mut self) -> Result<()> {
        let filter = self.filter;
        for case in PLANS.iter().filter(|case| case.name().contains(filter)) {
            let work = Planning::new(self.kernels, &case.model(), &case.lengths())?;
            let timing = self.measure(&work)?;
            let goal = case.goal.filter(|_| self.device.is_cuda());
            let (case, unit) = (case.name(), "us".to_owned());
            self.add(Row { case, ours: timing.us, unit, goal, ..Row::default() }, timing);
        }
        Ok(())
    }

    /// A time beside that of a read of as many bytes at the machine's limit.
    fn read_row(&self, case: String, bytes: f64, timing: Timing) -> Row {
        Row {
            case,
            ours: timing.us,
            unit: "us".to_owned(),
            gbps: Some(bytes / timing.us / 1e3),
            limit: Some(bytes / self.report.limits["hbm_read_gbps"] / 1e3),
            ..Row::default()
        }
    }

    /// Times attention and checks that it happened.
    fn time_attention(&mut self, case: &str, batch: &Batch<'_>) -> Option<Timing> {
        self.time(case, |bench| {
            let Some(work) = Attention::new(bench.kernels, batch, &mut bench.rng)? else {
                return Ok(None);
            };
            let timing = bench.measure(&work)?;
            work.check()?;
            Ok(Some(timing))
        })
    }

    /// The time of a case. `None`, and a row that says why, where the device has too little memory or no
    /// kernel for it, or it fails: the other cases are still worth their time.
    fn time(
        &mut self,
        case: &str,
        time: impl FnOnce(&mut Self) -> Result<Option<Timing>>,
    ) -> Option<Timing> {
        let (pass, note) = match time(self) {
            Ok(Some(timing)) => return Some(timing),
            Ok(None) => (true, "skipped: too little device memory".to_owned()),
            Err(error) => match error.kind() {
                ErrorKind::Unsupported { .. } | ErrorKind::OutOfMemory { .. } => {
                    (true, format!("skipped: {error}"))
                }
                _ => (false, error.to_string()),
            },
        };
        println!("{case:<34} {note}");
        let note = Some(note);
        self.report.rows.push(Row { case: case.to_owned(), pass, note, ..Row::default() });
        None
    }

    fn movement(&mut self) -> Result<()> {
        let arenas = self.arenas()?;
        self.memory_limits()?;
        self.link_limits(&arenas)?;
        header();
        self.arena()?;
        self.overlap()?;
        self.routes(&arenas)?;
        for direction in [Direction::H2d, Direction::D2h, Direction::D2d] {
            for fragment in FRAGMENTS {
                if direction == Direction::D2d {
                    let quota = CtaQuota::WHOLE_DEVICE;
                    self.fragments(&arenas, direction, fragment, quota, String::new())?;
                    continue;
                }
                for ctas in [4, 8, 16].into_iter().filter(|_| self.device.is_cuda()) {
                    let (quota, suffix) = (CtaQuota::at_most(ctas), format!("/{ctas}ctas"));
                    self.fragments(&arenas, direction, fragment, quota, suffix)?;
                }
            }
        }
        Ok(())
    }

    /// Every codec in every direction: inside the device, and between device and pinned memory.
    fn codecs(&mut self) -> Result<()> {
        let arenas = self.arenas()?;
        self.memory_limits()?;
        self.link_limits(&arenas)?;
        drop(arenas);
        header();
        let bytes = self.scaled(128 << 20);
        let filter = self.filter;
        for codec in codec::CODECS {
            let bed = codec::Bed::new(self.kernels, codec, bytes, &mut self.rng)?;
            for case in codec::CASES {
                let name = case.name(codec);
                if !name.contains(filter) || case.ctas.is_some() && !self.device.is_cuda() {
                    continue;
                }
                let Some(timing) = self.time(&name, |bench| {
                    let work = bed.run(case)?;
                    let timing = bench.measure(&work)?;
                    work.check()?;
                    Ok(Some(timing))
                }) else {
                    continue;
                };
                let gbps = bed.raw_bytes() / timing.us / 1e3;
                let row = Row {
                    case: name,
                    ours: gbps,
                    unit: "GB/s".to_owned(),
                    gbps: Some(gbps),
                    limit: case.limit(&self.report.limits, bed.slot_ratio()),
                    goal: case.goal(codec),
                    ..Row::default()
                };
                self.add(row, timing);
            }
        }
        Ok(())
    }

    /// Fragments at random addresses by `move_blocks`, from a table that is there.
    fn fragments(
        &mut self,
        arenas: &Arenas,
        direction: Direction,
        fragment: &Fragment,
        quota: CtaQuota,
        suffix: String,
    ) -> Result<()> {
        let most = self.scaled(512 << 20).min(arenas.side_bytes());
        if fragment.bytes > most {
            return Ok(());
        }
        let (size, bytes) = (fragment.bytes, most.min(fragment.bytes << 16));
        let work = Move::new(self.kernels, arenas, direction, size, bytes, quota, &mut self.rng)?;
        let timing = self.measure(&work)?;
        let touched = if direction == Direction::D2d { 2.0 } else { 1.0 };
        let gbps = touched * work.bytes() as f64 / timing.us / 1e3;
        let judged = suffix.is_empty() && direction != Direction::D2d;
        let limit = self.report.limits[&format!("copy_engine_{}_gbps", direction.name())];
        let row = Row {
            case: fragment.case(direction) + &suffix,
            ours: gbps,
            unit: "GB/s".to_owned(),
            gbps: Some(gbps),
            limit: Some(limit),
            goal: match direction {
                Direction::D2d => (size >= 1 << 10).then_some(0.85 * limit),
                _ => fragment.goal(direction).filter(|_| judged),
            }
            .filter(|_| self.device.is_cuda()),
            tolerance: fragment.floor.filter(|_| judged),
            ..Row::default()
        };
        self.add(row, timing);
        Ok(())
    }

    /// Judges, prints and keeps a row. On the CPU device there is nothing to judge.
    fn add(&mut self, mut row: Row, timing: Timing) {
        if !self.device.is_cuda() {
            row.tolerance = None;
        }
        row.error.insert("spread".to_owned(), timing.spread);
        row.error.insert("samples".to_owned(), timing.samples as f64);
        row.pass = row.tolerance.is_none_or(|floor| row.reaches(floor));
        let bound = |value: Option<f64>| {
            let sign = if row.less_is_better() { "<=" } else { ">=" };
            value.map_or("-".to_owned(), |value| format!("{sign} {value:.1}"))
        };
        println!(
            "{:<34} {:>9.1} {:<7} {:>8.1} {:>9} {:>7} {:>6.1}%  {:>9} {:>9}  {}",
            row.case,
            row.ours,
            row.unit,
            row.gbps.unwrap_or(0.0),
            row.limit.map_or("-".to_owned(), |limit| format!("{limit:.1}")),
            row.of_limit().map_or("-".to_owned(), |share| format!("{:.1}%", 100.0 * share)),
            100.0 * timing.spread,
            bound(row.tolerance),
            bound(row.goal),
            match row.goal {
                _ if !row.pass => "BELOW ITS FLOOR",
                Some(goal) if !row.reaches(goal) => "short of the goal",
                _ => "",
            },
        );
        self.report.rows.push(row);
    }
}

fn header() {
    println!(
        "{:<34} {:>9} {:<7} {:>8} {:>9} {:>7} {:>7}  {:>9} {:>9}",
        "case", "ours", "", "GB/s", "limit", "of it", "spread", "floor", "goal"
    );
}

/// Clocks, power and temperature of the GPU while it was busy, by NVML.
struct Clocks {
    nvml: Option<nvml_wrapper::Nvml>,
    ordinal: u32,
    samples: Vec<[f64; 4]>,
}

impl Clocks {
    fn new(device: &Device) -> Self {
        let cuda = device.backend().as_cuda();
        let nvml = cuda.and_then(|_| nvml_wrapper::Nvml::init().ok());
        let ordinal = cuda.map_or(0, |cuda| cuda.ordinal() as u32);
        Self { nvml, ordinal, samples: Vec::new() }
    }

    fn sample(&mut self) {
        use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
        let Some(nvml) = &self.nvml else { return };
        let Ok(gpu) = nvml.device_by_index(self.ordinal) else { return };
        let read = || -> Result<[f64; 4], nvml_wrapper::error::NvmlError> {
            Ok([
                gpu.clock_info(Clock::SM)?.into(),
                gpu.clock_info(Clock::Memory)?.into(),
                f64::from(gpu.power_usage()?) / 1e3,
                gpu.temperature(TemperatureSensor::Gpu)?.into(),
            ])
        };
        self.samples.extend(read());
    }

    /// Lowest SM and memory clocks, highest power and temperature.
    fn seen(&self) -> impl Iterator<Item = (String, f64)> + '_ {
        let fold = |i: usize, f: fn(f64, f64) -> f64| {
            self.samples.iter().map(|sample| sample[i]).reduce(f)
        };
        [
            ("sm_clock_min_mhz", fold(0, f64::min)),
            ("memory_clock_min_mhz", fold(1, f64::min)),
            ("power_max_w", fold(2, f64::max)),
            ("temperature_max_c", fold(3, f64::max)),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
    }
}
