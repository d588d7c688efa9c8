//! `hybridkv validate`: every kernel against the f64 reference, on cases drawn from the whole supported
//! space by a seed. What a case cannot see is NaN, what it must write is poisoned, what it must not write
//! is compared afterwards. A case that fails prints the command that runs it alone.

mod append;
mod attention;
mod bed;
mod case;
mod codec;
mod large;
mod merge;
mod movement;
mod problem;
mod sealed;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::ValueEnum;
use hybridkv::error::{ErrorKind, Result};
use hybridkv::ops::Kernels;

use crate::open_device;
use crate::random::Rng;
use crate::report::{Report, Row};
use bed::{Bed, Fault, Outcome};
use case::Scale;

/// Arguments of `hybridkv validate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to check.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Suite::value_variants().to_vec())]
    suite: Vec<Suite>,
    /// Random cases per suite (default: on a GPU 400 of attention, 240 of moves and 120 of the others, on the CPU 40).
    #[arg(long)]
    cases: Option<u64>,
    /// Seed of all cases and of their data.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run only this case of every suite.
    #[arg(long)]
    only: Option<u64>,
    /// auto, cpu or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Small cases only, few of them: for compute-sanitizer.
    #[arg(long)]
    quick: bool,
    /// Write the report to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Damage the inputs of every kernel in this way: the run must then fail.
    #[arg(long, value_enum, hide = true)]
    inject: Option<Fault>,
}

/// A kernel, or a kind of case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Paged attention, decode and prefill.
    Attention,
    /// Paged attention of millions of tokens, and over pools of more than 2^32 elements.
    Large,
    /// N-way merge of attention states.
    Merge,
    /// The slot-mapped write of new K and V.
    Append,
    /// Movement of fragments, and of blocks from one layout to another, between device and host.
    Move,
    /// Blocks into slots and back.
    Codec,
}

impl Suite {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn cases(self, args: &Args, on_gpu: bool) -> u64 {
        let random = args.cases.unwrap_or(match (args.quick, on_gpu) {
            // Of fragments and of blocks.
            (true, _) if self == Self::Move => 48,
            (true, _) => 24,
            (_, false) => 40,
            (_, true) if self == Self::Attention => 400,
            (_, true) if self == Self::Move => 240,
            (_, true) => 120,
        });
        if self == Self::Large { large::CASES.len() as u64 } else { random }
    }
}

/// What a case is called, the class it counts in, and how it went.
struct Judged {
    name: String,
    class: String,
    outcome: Outcome,
}

/// Runs the suites, prints the table, writes the report. Exits with 1 when a case failed.
pub fn main(args: &Args) -> Result<ExitCode> {
    let device = open_device(&args.device)?;
    let on_gpu = device.is_cuda();
    let bed = Bed {
        kernels: Arc::new(Kernels::load(&device)?),
        stream: device.stream()?,
        device,
        fault: args.inject,
    };
    let mut report = Report::new("validate", &bed.device);
    println!("{} ({}), seed {}", report.device, report.commit, args.seed);
    let mut table = Table::default();
    let start = Instant::now();
    'suites: for &suite in &args.suite {
        let cases = suite.cases(args, on_gpu);
        let indices = match args.only {
            Some(index) => index..index + 1,
            None => 0..cases,
        };
        for index in indices {
            let mut rng = Rng::for_item(args.seed, (suite as u64) << 32 | index);
            let scale = scale(on_gpu, args.quick);
            let Some(judged) = run(&bed, suite, index, scale, &mut rng) else { continue };
            if let Some(failure) = &judged.outcome.failure {
                println!(
                    "FAILED {}\n  {failure}\n  hybridkv validate --suite {} --seed {} --only {index}{}{}",
                    judged.name,
                    suite.name(),
                    args.seed,
                    if args.quick { " --quick" } else { "" },
                    if on_gpu { "" } else { " --device cpu" },
                );
            }
            let device_is_lost = judged.outcome.device_is_lost;
            table.add(&judged);
            report.rows.push(row(suite, judged));
            if device_is_lost {
                println!("The device is lost; the cases that follow are not run.");
                break 'suites;
            }
        }
    }
    table.print();
    let failures = report.failures();
    println!(
        "{} cases, {failures} failed, {:.1} s",
        report.rows.len(),
        start.elapsed().as_secs_f64()
    );
    if let Some(path) = &args.json {
        report.write(path)?;
    }
    Ok(ExitCode::from(u8::from(failures > 0)))
}

fn scale(on_gpu: bool, quick: bool) -> Scale {
    match (on_gpu, quick) {
        (true, false) => {
            Scale { kv_len: 20_000, q_len: 2_500, pool: 12 << 20, work: 0, graphs: true }
        }
        (true, true) => Scale { kv_len: 700, q_len: 150, pool: 1 << 20, work: 0, graphs: true },
        (false, _) => {
            Scale { kv_len: 3_000, q_len: 200, pool: 1 << 20, work: 10_000_000, graphs: false }
        }
    }
}

/// Runs case `index` of a suite; `None` when it does not fit on this device.
fn run(bed: &Bed, suite: Suite, index: u64, scale: Scale, rng: &mut Rng) -> Option<Judged> {
    let (name, class, result) = match suite {
        Suite::Attention => {
            let case = case::Case::random(rng, scale);
            (case.to_string(), case.class(), attention::run(bed, &case, rng))
        }
        Suite::Large => {
            let case = large::CASES.get(index as usize)?;
            (case.name(bed)?, "large".to_owned(), case.run(bed, rng))
        }
        Suite::Merge => {
            let case = merge::Case::random(rng, scale.pool / 4);
            (case.name(), case.class(), case.run(bed, rng))
        }
        Suite::Append => {
            let case = append::Case::random(rng, scale.pool);
            (case.name(), case.class(), case.run(bed, rng))
        }
        Suite::Move => {
            let case = movement::Case::random(rng, 2 * scale.pool);
            (case.name(), case.class(), case.run(bed, rng))
        }
        Suite::Codec => {
            let case = codec::Case::random(rng, scale.pool);
            (case.name(), case.class(), case.run(bed, rng))
        }
    };
    let outcome = result.unwrap_or_else(|error| Outcome {
        failure: Some(error.to_string()),
        device_is_lost: matches!(error.kind(), ErrorKind::Cuda { .. }),
        ..Outcome::default()
    });
    Some(Judged { name, class, outcome })
}

fn row(suite: Suite, judged: Judged) -> Row {
    let Outcome { errors, tolerance, failure, .. } = judged.outcome;
    let error: BTreeMap<String, f64> =
        errors.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Row {
        case: format!("{}: {}", suite.name(), judged.name),
        ours: error.get("relative").or(error.get("wrong")).copied().unwrap_or(0.0),
        unit: if error.contains_key("relative") { "relative error" } else { "wrong elements" }
            .into(),
        tolerance: Some(tolerance),
        pass: failure.is_none(),
        note: failure,
        error,
        ..Row::default()
    }
}

/// Cases, failures and worst errors by class.
#[derive(Default)]
struct Table {
    classes: BTreeMap<String, Class>,
}

#[derive(Default)]
struct Class {
    cases: usize,
    failed: usize,
    tolerance: f64,
    worst: BTreeMap<&'static str, f64>,
}

impl Table {
    fn add(&mut self, judged: &Judged) {
        let class = self.classes.entry(judged.class.clone()).or_default();
        class.cases += 1;
        class.failed += usize::from(judged.outcome.failure.is_some());
        class.tolerance = class.tolerance.max(judged.outcome.tolerance);
        for &(name, value) in &judged.outcome.errors {
            let worst = class.worst.entry(name).or_default();
            *worst = worst.max(value);
        }
    }

    fn print(&self) {
        println!(
            "{:<30} {:>5} {:>6}  {:>9} {:>9} {:>9} {:>9} {:>9}",
            "class", "cases", "failed", "relative", "allowed", "worst row", "max abs", "lse"
        );
        for (name, class) in &self.classes {
            let exact = !class.worst.contains_key("relative");
            let error = |name: &str| match class.worst.get(name) {
                Some(value) => format!("{value:.2e}"),
                None => "-".to_owned(),
            };
            println!(
                "{name:<30} {:>5} {:>6}  {:>9} {:>9} {:>9} {:>9} {:>9}",
                class.cases,
                class.failed,
                if exact { "bit-exact".to_owned() } else { error("relative") },
                if exact { "bit-exact".to_owned() } else { format!("{:.0e}", class.tolerance) },
                error("worst_row"),
                error("max_abs"),
                error("lse"),
            );
        }
    }
}
