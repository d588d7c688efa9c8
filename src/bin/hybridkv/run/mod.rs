//! `hybridkv run`: the main job. Serves many multi-turn conversations against a device pool too small for
//! them, so that they are evicted to the host and restored, and verifies what comes back.

pub mod content;
mod conversations;
pub mod model;
mod oracle;
mod progress;
mod report;
mod sampling;
mod server;
mod setup;
mod verify;

use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;

use hybridkv::engine::{Fault, FaultKind};
use hybridkv::error::{Error, Result};
use hybridkv::manager::{Direction, Eviction, PrefetchPolicy, WritePolicy};

use crate::report::Report;
use crate::values::parse_eviction;
use content::Scales;
use progress::Progress;
use report::Figures;
use server::Server;
use setup::Setup;

/// Arguments of `hybridkv run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A preset (llama-4-scout, gemma-3-27b, ...) or the path of a Hugging Face config.json
    /// [default: llama-4-scout, one rank of 8].
    #[arg(long)]
    pub model: Option<String>,
    /// Tensor-parallel ranks; this is one of them [default: 1].
    #[arg(long)]
    pub tp: Option<u32>,
    /// Keep only the first layers of the model.
    #[arg(long)]
    pub layers: Option<u32>,
    /// auto, cpu, cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Bytes of the device pool, e.g. 8GiB [default: 2GiB; a few contexts on the CPU].
    #[arg(long)]
    pub device_mem: Option<String>,
    /// Host slots per device block.
    #[arg(long, default_value_t = 2.0)]
    pub host_ratio: f64,
    /// Size of the host tier as a part of the memory that this process may have, by the machine and its memory
    /// cgroup; refused when as much is not available.
    #[arg(long, conflicts_with = "host_ratio")]
    pub host_fraction: Option<f64>,
    /// Which cached block gives way first on the device: lru, fifo, lfu, slru, arc, priority, reuse.
    #[arg(long, value_parser = parse_eviction, default_value = "reuse")]
    pub eviction: Eviction,
    /// The same on the host.
    #[arg(long, value_parser = parse_eviction, default_value = "lru")]
    pub host_eviction: Eviction,
    /// The same in storage.
    #[arg(long, value_parser = parse_eviction, default_value = "lru")]
    pub storage_eviction: Eviction,
    /// When blocks are written to the host: through (as they are computed), selective (when they are used a
    /// second time), back (before they are evicted).
    #[arg(long, value_enum, default_value_t = Write::Through)]
    pub write: Write,
    /// How steps follow the loads that they need: layers (each layer waits for its own part of them), whole (the
    /// first step waits for all).
    #[arg(long, value_enum, default_value_t = Cut::Layers)]
    pub onboard: Cut,
    /// How stores follow the step that computes their blocks: layers (each behind its own layers of it), whole
    /// (behind its end).
    #[arg(long, value_enum, default_value_t = Cut::Layers)]
    pub offload: Cut,
    /// Folder of a storage tier below the host; what an earlier run of the same model left there is used.
    #[arg(long)]
    pub storage: Option<String>,
    /// Bytes of the storage tier, e.g. 64GiB.
    #[arg(long, default_value = "16GiB", requires = "storage")]
    pub storage_bytes: String,
    /// How long a request that waits for its turn gives the fetch of what storage holds of its prompt: best-effort
    /// (it starts with what has arrived), wait (for all of it), timeout (1 s and 0.25 s per 1024 tokens).
    #[arg(long, value_enum, requires = "storage")]
    pub prefetch: Option<PrefetchFor>,
    /// Tokens per block.
    #[arg(long, default_value_t = 16)]
    pub block_size: u32,
    /// Element type of the cached keys and values [default: the model's].
    #[arg(long, value_enum)]
    pub kv_dtype: Option<KvDtype>,
    /// Which keys and values of 8 bits share a scale.
    #[arg(long, value_enum, default_value_t = Scales::Token, requires = "kv_dtype")]
    pub kv_scales: Scales,
    /// A Mooncake trace (JSONL) [default: built-in multi-turn conversations].
    #[arg(long)]
    pub trace: Option<String>,
    /// Requests to serve [default: 600; 2500 on the CPU].
    #[arg(long)]
    pub requests: Option<usize>,
    /// Fraction of blocks read back and compared, and of (sequence, step, layer) of which one attention row is
    /// checked [default: 0.002; 0.05 on the CPU].
    #[arg(long)]
    pub verify: Option<f64>,
    /// Seed of the workload and of all sampling.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Write a report of all figures to this file.
    #[arg(long)]
    pub json: Option<String>,
    /// Sequences that run at once [default: 64; 8 on the CPU].
    #[arg(long)]
    pub max_seqs: Option<usize>,
    /// Tokens of one step [default: 8192; 256 on the CPU].
    #[arg(long)]
    pub max_batch_tokens: Option<usize>,
    /// Fill newly taken blocks with NaN (always on the CPU).
    #[arg(long)]
    pub poison: bool,
    /// Make transfers misbehave, to see that verification notices: KIND:DIRECTION[:COUNT] with fail, skip,
    /// corrupt, short, unordered and offload, onboard, persist, fetch.
    #[arg(long = "fault", value_name = "FAULT")]
    pub faults: Vec<InjectedFault>,
}

/// Types that keys and values are converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum KvDtype {
    /// 8-bit floats with scales.
    E4m3,
}

/// Write policies as the command line names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Write {
    Through,
    Selective,
    Back,
}

impl From<Write> for WritePolicy {
    fn from(write: Write) -> Self {
        match write {
            Write::Through => Self::Through,
            Write::Selective => Self::Selective { uses: 2 },
            Write::Back => Self::Back,
        }
    }
}

/// Whether blocks move layer by layer, as the command line names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Cut {
    Layers,
    Whole,
}

/// Prefetch policies as the command line names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PrefetchFor {
    BestEffort,
    Wait,
    Timeout,
}

impl From<PrefetchFor> for PrefetchPolicy {
    fn from(prefetch: PrefetchFor) -> Self {
        match prefetch {
            PrefetchFor::BestEffort => Self::BestEffort,
            PrefetchFor::Wait => Self::WaitComplete,
            PrefetchFor::Timeout => Self::default(),
        }
    }
}

/// A fault as the command line writes it.
#[derive(Debug, Clone, Copy)]
pub struct InjectedFault(Fault);

impl FromStr for InjectedFault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let kind = match parts.next() {
            Some("fail") => FaultKind::Fail,
            Some("skip") => FaultKind::Skip,
            Some("corrupt") => FaultKind::Corrupt,
            Some("short") => FaultKind::Short,
            Some("unordered") => FaultKind::Unordered,
            _ => return Err("the kind must be fail, skip, corrupt, short or unordered".into()),
        };
        let direction = match parts.next() {
            Some("offload") => Direction::Offload,
            Some("onboard") => Direction::Onboard,
            Some("persist") => Direction::Persist,
            Some("fetch") => Direction::Fetch,
            _ => return Err("the direction must be offload, onboard, persist or fetch".into()),
        };
        let count = match parts.next() {
            None => 1,
            Some(count) => count.parse().map_err(|_| format!("{count} is no count"))?,
        };
        match parts.next() {
            None => Ok(Self(Fault { direction, kind, count })),
            Some(_) => Err("a fault is KIND:DIRECTION[:COUNT]".into()),
        }
    }
}

/// Runs the subcommand.
pub fn main(args: &Args) -> Result<ExitCode> {
    let device = crate::open_device(&args.device)?;
    let setup = Setup::new(args, &device)?;
    for note in &setup.notes {
        eprintln!("CPU device: {note}");
    }
    let faults: Vec<Fault> = args.faults.iter().map(|fault| fault.0).collect();
    let progress = Progress::new(setup.workload.len() as u64);
    let mut server = Server::new(&device, setup, &faults)?;
    let served = server.serve(|server| progress.show(server));
    progress.finish();
    served?;
    let seconds = server.seconds();
    let tally = server.finish()?;
    let figures = Figures::new(&device, &server, tally, seconds);
    print!("{}", figures.table());
    if let Some(path) = &args.json {
        let mut report = Report::new("run", &device);
        report.rows = figures.rows();
        report.figures = serde_json::to_value(&figures)
            .map_err(|error| Error::invalid("run", error.to_string()))?;
        report.write(Path::new(path))?;
    }
    Ok(if figures.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
