//! `hybridkv codec`: what codecs cost and lose on captured keys and values.

mod capture;
mod figures;

use std::path::PathBuf;
use std::process::ExitCode;

use hybridkv::codec::{Codec, Geometry};
use hybridkv::error::Result;
use hybridkv::layout::Dtype;

use capture::Capture;
use figures::Figures;

/// Arguments of `hybridkv codec`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A safetensors file of `layerN.{q,k,v}`, each [token, head, head_dim] of BF16, F16 or (bf16 bits) U16.
    file: PathBuf,
    /// Codecs [default: all that hold the file's element type].
    #[arg(long, value_delimiter = ',')]
    codec: Vec<String>,
    /// Tokens per block.
    #[arg(long, default_value_t = 16)]
    block_size: u32,
    /// Make every 16th channel of K an outlier: 40 times as large, and shifted by 100.
    #[arg(long)]
    outliers: bool,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// Prints the tables. Exits with 1 when a lossless codec changed a bit.
pub fn main(args: &Args) -> Result<ExitCode> {
    let mut capture = Capture::read(&args.file)?;
    if args.outliers {
        capture.add_outliers();
    }
    let k = &capture.layers[0].k;
    let geometry = Geometry::new(
        capture.layers.len() as u32,
        k.heads as u32,
        k.dim as u32,
        args.block_size,
        k.dtype,
    )?;
    let codecs = if args.codec.is_empty() {
        let holds = |codec: &Codec| k.dtype == Dtype::Bf16 || codec.slot_bytes(&geometry).is_ok();
        Codec::ALL.into_iter().filter(holds).collect()
    } else {
        args.codec.iter().map(|name| Codec::by_name(name)).collect::<Result<Vec<_>>>()?
    };
    let figures = codecs
        .iter()
        .map(|codec| Figures::of(*codec, &capture, &geometry))
        .collect::<Result<Vec<_>>>()?;
    if args.json {
        println!("{:#}", serde_json::json!(figures));
    } else {
        println!("{} tokens: blocks of {geometry}\n", capture.tokens);
        print_sizes(&figures);
        println!();
        print_errors(&figures);
    }
    let broken =
        codecs.iter().zip(&figures).any(|(codec, figures)| codec.is_exact() && !figures.exact);
    Ok(ExitCode::from(u8::from(broken)))
}

fn print_sizes(figures: &[Figures]) {
    println!(
        "| codec      | bits/element | slot ratio | mean ratio | fallbacks | escapes  | encode GB/s | decode GB/s |"
    );
    println!(
        "|------------|-------------:|-----------:|-----------:|----------:|---------:|------------:|------------:|"
    );
    for f in figures {
        println!(
            "| {:<10} | {:>12.3} | {:>10.3} | {:>10.3} | {:>9} | {:>7.4}% | {:>11.2} | {:>11.2} |",
            f.codec,
            f.bits_per_element,
            f.slot_ratio,
            f.mean_ratio,
            format!("{}/{}", f.fallbacks, f.blocks),
            100.0 * f.escapes as f64 / f.elements.max(1) as f64,
            f.encode_gbps,
            f.decode_gbps,
        );
    }
}

fn print_errors(figures: &[Figures]) {
    println!(
        "| codec      | K error | V error | logit RMSE | attention mean |     p99 |     max | least cosine |"
    );
    println!(
        "|------------|--------:|--------:|-----------:|---------------:|--------:|--------:|-------------:|"
    );
    for f in figures.iter().filter(|f| !f.exact) {
        println!(
            "| {:<10} | {:>6.2}% | {:>6.2}% | {:>10.4} | {:>13.2}% | {:>6.2}% | {:>6.2}% | {:>12.5} |",
            f.codec,
            100.0 * f.k_relative,
            100.0 * f.v_relative,
            f.logit_rmse,
            100.0 * f.attention_mean,
            100.0 * f.attention_p99,
            100.0 * f.attention_max,
            f.least_cosine,
        );
    }
    let exact: Vec<&str> = figures.iter().filter(|f| f.exact).map(|f| f.codec).collect();
    if !exact.is_empty() {
        println!("\nExact, every bit: {}.", exact.join(", "));
    }
}
