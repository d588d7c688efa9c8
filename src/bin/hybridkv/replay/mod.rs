//! `hybridkv replay`: drives a manager from outside, without a model: by operations, one JSON object per
//! line (docs/replay.md), or by a request trace.

mod config;
mod figures;
mod generate;
mod memory;
mod ops;
mod requests;
mod session;

use std::fs::File;
use std::io::{BufReader, stdin, stdout};
use std::process::ExitCode;

use hybridkv::error::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::trace::Trace;
use crate::values::{load_model, parse_count};
pub use config::Config;
use config::{merge, parse_groups};
pub use requests::replay as requests;

const OP: &str = "replay";

/// Arguments of `hybridkv replay`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Operations, one per line; - for standard input.
    #[arg(default_value = "-", conflicts_with = "trace")]
    operations: String,
    /// A request trace in the Mooncake JSONL form, one request at a time at full speed.
    #[arg(long, value_name = "FILE", group = "source")]
    trace: Option<String>,
    /// A generated workload instead of a trace: chat, agents, documents, loop, phases, recency, scans, each with
    /// :REQUESTS[,SEED] behind it [default: 6000 requests, seed 7].
    #[arg(long, value_name = "NAME", group = "source", conflicts_with = "operations")]
    generate: Option<String>,
    /// Only the first requests of the trace.
    #[arg(long, requires = "trace")]
    limit: Option<usize>,
    /// A preset (llama-4-scout, gemma-3-27b, ...) or the path of a Hugging Face config.json
    /// [default: llama-3.1-8b].
    #[arg(long, conflicts_with = "groups")]
    model: Option<String>,
    /// Layer groups instead of a model's, one layer each: full, sliding:WINDOW, chunked:CHUNK, by commas; `*N`
    /// behind one repeats it.
    #[arg(long)]
    groups: Option<String>,
    /// Tokens per block.
    #[arg(long, default_value_t = 16)]
    block_size: u32,
    /// Size of the device pool as block ids times block size, e.g. 4M. (An id holds one group's layers.)
    #[arg(long, default_value = "1M")]
    pool_tokens: String,
    /// Size of the device pool in blocks, the null block included.
    #[arg(long, conflicts_with = "pool_tokens")]
    num_blocks: Option<u32>,
    /// Host slots per device block [default: no host tier].
    #[arg(long)]
    host_ratio: Option<f64>,
    /// Start from the crate's defaults instead of replay's, which are those of vLLM: LRU, every window tail
    /// and chunk cached.
    #[arg(long)]
    crate_defaults: bool,
    /// Fields of the `config` operation, as JSON; they go before the options above.
    #[arg(long, value_name = "JSON")]
    config: Option<String>,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
    /// Print the manager's statistics as Prometheus text instead.
    #[arg(long, requires = "source", conflicts_with = "json")]
    prometheus: bool,
}

/// Runs the subcommand.
pub fn main(args: &Args) -> Result<ExitCode> {
    let trace = match (&args.trace, &args.generate) {
        (Some(path), _) => Trace::read(path, args.limit.unwrap_or(usize::MAX), 1)?,
        (None, Some(name)) => generate::generate(name, 1)?,
        (None, None) => return replay_operations(&args.operations).map(|()| ExitCode::SUCCESS),
    };
    let config = trace_config(args, &trace)?;
    let (manager, figures) = requests::replay(&trace, &config)?;
    if args.prometheus {
        print!("{}", manager.prometheus());
    } else if args.json {
        println!("{:#}", figures.json());
    } else {
        print!("{}", figures.table());
    }
    Ok(ExitCode::SUCCESS)
}

fn replay_operations(path: &str) -> Result<()> {
    let io = |source| Error::new(OP, ErrorKind::Io { path: path.to_owned(), source });
    match path {
        "-" => session::serve(stdin().lock(), stdout().lock()),
        _ => session::serve(BufReader::new(File::open(path).map_err(io)?), stdout().lock()),
    }
    .map_err(io)
}

/// The configuration that the options name.
fn trace_config(args: &Args, trace: &Trace) -> Result<Config> {
    let num_blocks = match args.num_blocks {
        Some(n) => n,
        None => parse_count(&args.pool_tokens)?
            .checked_div(args.block_size.into())
            .and_then(|blocks| u32::try_from(blocks + 1).ok())
            .ok_or_else(|| Error::invalid(OP, "the pool has no number of blocks of 32 bits"))?,
    };
    let mut fields = match args.crate_defaults {
        true => config::crate_defaults(),
        false => json!({}),
    };
    let longest = u32::try_from(trace.longest()).unwrap_or(u32::MAX);
    let (groups, block_bytes) = match &args.groups {
        Some(text) => (parse_groups(text)?, None),
        None => {
            let spec = load_model(args.model.as_deref().unwrap_or("llama-3.1-8b"))?;
            let plan = spec.group(args.block_size)?;
            (config::describe_groups(&plan), Some(plan.block_bytes))
        }
    };
    merge(
        &mut fields,
        json!({
            "block_size": args.block_size,
            "num_blocks": num_blocks,
            "groups": groups,
            "max_model_len": longest,
        }),
    );
    if let Some(bytes) = block_bytes {
        merge(&mut fields, json!({ "block_bytes": bytes }));
    }
    if let Some(ratio) = args.host_ratio {
        if !(ratio.is_finite() && ratio >= 0.0) {
            return Err(Error::unsupported(OP, "--host-ratio", ratio, "finite numbers >= 0"));
        }
        merge(&mut fields, json!({ "host": { "blocks": (ratio * num_blocks as f64) as u64 } }));
    }
    if let Some(text) = &args.config {
        let given: Value = serde_json::from_str(text)
            .map_err(|error| Error::invalid(OP, format!("--config: {error}")))?;
        merge(&mut fields, given);
    }
    Config::new(fields)
}
