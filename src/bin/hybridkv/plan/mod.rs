//! `hybridkv plan`: how many tokens a model's KV cache holds in given memory.

use std::process::ExitCode;

use hybridkv::error::Result;
use hybridkv::plan::{Capacity, capacity, longest_request};
use hybridkv::spec::ModelSpec;

use crate::values::{format_bytes, load_model, parse_bytes};

/// Arguments of `hybridkv plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A preset (llama-4-scout, gemma-3-27b, ...) or the path of a Hugging Face config.json
    /// [default: llama-4-scout, one rank of 8].
    #[arg(long)]
    model: Option<String>,
    /// Tensor-parallel ranks; the figures are those of one of them [default: 1].
    #[arg(long)]
    tp: Option<u32>,
    /// Memory for KV on one rank, e.g. 72.3GB.
    #[arg(long, default_value = "8GiB")]
    device_mem: String,
    /// Tokens per block.
    #[arg(long, default_value_t = 16)]
    block_size: u32,
    /// Length of the requests [default: the model's longest, or the longest that fits].
    #[arg(long)]
    request_tokens: Option<usize>,
    /// Tokens of a request that are computed and not settled, at most.
    #[arg(long, default_value_t = 8192)]
    in_flight_tokens: usize,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn main(args: &Args) -> Result<ExitCode> {
    let (name, default_tp) = match &args.model {
        Some(name) => (name.as_str(), 1),
        None => ("llama-4-scout", 8),
    };
    let tp = args.tp.unwrap_or(default_tp);
    let spec = load_model(name)?.shard(tp)?;
    let memory = parse_bytes(&args.device_mem)?;
    let plan = spec.group(args.block_size)?;
    let usable = (memory / plan.block_bytes as u64).saturating_sub(1);
    let longest = longest_request(
        &plan,
        usize::try_from(usable).unwrap_or(usize::MAX),
        args.in_flight_tokens,
    );
    let request_tokens =
        args.request_tokens.unwrap_or(longest.min(spec.max_model_len as usize).max(1));
    let figures = capacity(&spec, args.block_size, memory, request_tokens, args.in_flight_tokens)?;
    match args.json {
        true => println!("{:#}", json(&spec, tp, memory, &figures)),
        false => print(&spec, tp, memory, &figures),
    }
    Ok(ExitCode::SUCCESS)
}

fn print(spec: &ModelSpec, tp: u32, memory: u64, figures: &Capacity) {
    println!("{}, one rank of {tp}: {} layers", spec.name, spec.layers.len());
    println!(
        "{} of KV: {} blocks of {}",
        format_bytes(memory),
        figures.num_blocks,
        format_bytes(figures.block_bytes as u64)
    );
    println!();
    println!(
        "{:<16} {:>6} {:>16} {:>20} {:>20} {:>18}",
        "group",
        "layers",
        "tokens per block",
        "blocks per request",
        "of a request",
        "padding per block"
    );
    for group in &figures.groups {
        println!(
            "{:<16} {:>6} {:>16} {:>20} {:>20} {:>18}",
            group.kind.to_string(),
            group.num_layers,
            group.block_size,
            group.request_blocks,
            format_bytes(group.request_bytes),
            format_bytes(group.padding_bytes as u64)
        );
    }
    println!();
    let row = |what: &str, value: String| println!("{what:<42} {value:>14}");
    row("tokens per request", figures.request_tokens.to_string());
    row("blocks per request, at most", figures.request_blocks.to_string());
    row("requests at once", format!("{:.2}", figures.concurrency));
    row("tokens of them", figures.tokens.to_string());
    row("tokens if every layer kept everything", figures.uniform_tokens.to_string());
    row("gain", format!("{:.2}", figures.gain()));
    row("longest single request that would fit", figures.longest_request.to_string());
    row("max_model_len", figures.max_model_len.to_string());
}

fn json(spec: &ModelSpec, tp: u32, memory: u64, figures: &Capacity) -> serde_json::Value {
    let groups: Vec<serde_json::Value> = figures
        .groups
        .iter()
        .map(|group| {
            serde_json::json!({
                "kind": group.kind.to_string(),
                "layers": group.num_layers,
                "block_size": group.block_size,
                "request_blocks": group.request_blocks,
                "padding_bytes": group.padding_bytes,
                "request_bytes": group.request_bytes,
            })
        })
        .collect();
    serde_json::json!({
        "schema": "hybridkv.plan.v1",
        "model": spec.name,
        "tp": tp,
        "memory_bytes": memory,
        "block_bytes": figures.block_bytes,
        "num_blocks": figures.num_blocks,
        "request_tokens": figures.request_tokens,
        "request_blocks": figures.request_blocks,
        "concurrency": figures.concurrency,
        "tokens": figures.tokens,
        "uniform_tokens": figures.uniform_tokens,
        "gain": figures.gain(),
        "longest_request": figures.longest_request,
        "max_model_len": figures.max_model_len,
        "groups": groups,
    })
}
