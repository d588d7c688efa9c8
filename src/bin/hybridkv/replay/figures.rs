//! What a replayed trace is summed up to.

use std::fmt::Write as _;
use std::time::Duration;

use hybridkv::manager::{Manager, Stats, TierStats, Usage};
use serde_json::{Value, json};

use super::config::Config;
use crate::values::format_bytes;

/// A part of the manager's work on one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Hashing the prompt.
    Hash,
    /// Lookup and allocation.
    Allocate,
    /// Advancing over the prompt and appending the output, with the transfers that this emits.
    Append,
    /// Freeing.
    Free,
}

const PHASES: [(Phase, &str); 4] = [
    (Phase::Hash, "hash"),
    (Phase::Allocate, "lookup+allocate"),
    (Phase::Append, "append"),
    (Phase::Free, "free"),
];

/// Time of every phase of every request, in nanoseconds.
#[derive(Debug, Default)]
pub struct Times([Vec<u64>; 4]);

/// Mean and percentiles, in microseconds.
#[derive(Debug, Clone, Copy, serde::Serialize)]
struct Spread {
    mean_us: f64,
    p50_us: f64,
    p99_us: f64,
}

impl Times {
    /// Room for that many requests.
    pub fn with_capacity(requests: usize) -> Self {
        Self(std::array::from_fn(|_| Vec::with_capacity(requests)))
    }

    /// Notes one phase of one request.
    pub fn push(&mut self, phase: Phase, time: Duration) {
        self.0[phase as usize].push(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// The manager's whole time of every request, hashing included or not.
    fn totals(&self, hashing: bool) -> Vec<u64> {
        let [hash, allocate, append, free] = &self.0;
        let hash = hash.iter().map(|&ns| if hashing { ns } else { 0 });
        hash.zip(allocate).zip(append).zip(free).map(|(((a, b), c), d)| a + b + c + d).collect()
    }
}

impl Spread {
    fn new(mut times: Vec<u64>) -> Self {
        times.sort_unstable();
        let us = |ns: u64| ns as f64 / 1e3;
        let at = |percent: usize| {
            us(times
                .get((times.len() * percent / 100).min(times.len().max(1) - 1))
                .copied()
                .unwrap_or(0))
        };
        let sum: u64 = times.iter().sum();
        Self { mean_us: us(sum) / times.len().max(1) as f64, p50_us: at(50), p99_us: at(99) }
    }
}

/// The figures.
pub struct Figures {
    requests: usize,
    stats: Stats,
    usage: Usage,
    groups: Vec<String>,
    block_bytes: u64,
    num_blocks: u32,
    times: Vec<(&'static str, Spread)>,
    /// Seconds of the manager's work, hashing included.
    manager_seconds: f64,
    seconds: f64,
}

impl Figures {
    /// The figures of a manager that has served everything.
    pub fn new(manager: &Manager, config: &Config, times: Times, elapsed: Duration) -> Self {
        let totals = times.totals(true);
        let mut spreads: Vec<(&str, Spread)> = PHASES
            .iter()
            .map(|&(phase, name)| (name, Spread::new(times.0[phase as usize].clone())))
            .collect();
        let manager_seconds = totals.iter().sum::<u64>() as f64 / 1e9;
        spreads.push(("all but hash", Spread::new(times.totals(false))));
        spreads.push(("all", Spread::new(totals)));
        Self {
            requests: times.0[0].len(),
            stats: manager.stats(),
            usage: manager.usage(),
            groups: manager.config().groups.iter().map(|g| g.kind.to_string()).collect(),
            block_bytes: config.block_bytes(),
            num_blocks: manager.config().num_blocks,
            times: spreads,
            manager_seconds,
            seconds: elapsed.as_secs_f64(),
        }
    }

    /// Seconds of the manager's work, hashing included.
    pub fn manager_seconds(&self) -> f64 {
        self.manager_seconds
    }

    /// Name, hit tokens that it added to those of the tiers above, and groups of every tier.
    fn tiers(&self) -> Vec<(&'static str, u64, &[TierStats])> {
        let stats = &self.stats;
        let (device, host) = (stats.device_hit_tokens, stats.host_hit_tokens);
        let mut tiers = vec![("device", device, stats.device.as_slice())];
        if !stats.host.is_empty() {
            tiers.push(("host", host.saturating_sub(device), stats.host.as_slice()));
        }
        if !stats.storage.is_empty() {
            let added = stats.hit_tokens.saturating_sub(host);
            tiers.push(("storage", added, stats.storage.as_slice()));
        }
        tiers
    }

    fn rate(&self, tokens: u64) -> f64 {
        tokens as f64 / self.stats.prompt_tokens.max(1) as f64
    }

    /// As JSON.
    pub fn json(&self) -> Value {
        let moved = |transfers: u64| {
            json!({
                "blocks": transfers, "bytes": transfers * self.block_bytes,
            })
        };
        let tiers: serde_json::Map<String, Value> = self
            .tiers()
            .into_iter()
            .map(|(name, hit_tokens, groups)| {
                let groups: Vec<Value> = groups
                    .iter()
                    .zip(&self.groups)
                    .map(|(stats, kind)| {
                        json!({
                            "kind": kind,
                            "hit_blocks": stats.hit_blocks,
                            "stored_blocks": stats.stored_blocks,
                            "evicted_blocks": stats.evicted_blocks,
                            "cached_blocks": stats.cached_blocks,
                        })
                    })
                    .collect();
                let tier = json!({
                    "hit_tokens": hit_tokens,
                    "hit_rate": self.rate(hit_tokens),
                    "groups": groups,
                });
                (name.to_owned(), tier)
            })
            .collect();
        let times: serde_json::Map<String, Value> =
            self.times.iter().map(|(name, spread)| ((*name).to_owned(), json!(spread))).collect();
        json!({
            "schema": "hybridkv.replay.v1",
            "requests": self.requests,
            "prompt_tokens": self.stats.prompt_tokens,
            "hit_tokens": self.stats.hit_tokens,
            "hit_rate": self.rate(self.stats.hit_tokens),
            "num_blocks": self.num_blocks,
            "block_bytes": self.block_bytes,
            "host_slots": self.usage.host_capacity,
            "tiers": tiers,
            "offloaded": moved(self.stats.offloads.succeeded),
            "onboarded": moved(self.stats.onboards.succeeded),
            "persisted": moved(self.stats.persists.succeeded),
            "fetched": moved(self.stats.fetches.succeeded),
            "times": times,
            "manager_seconds": self.manager_seconds,
            "seconds": self.seconds,
        })
    }

    /// As text.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{} requests, {} prompt tokens, {} hit ({:.2} %); {} blocks of {}, {} host slots",
            self.requests,
            self.stats.prompt_tokens,
            self.stats.hit_tokens,
            100.0 * self.rate(self.stats.hit_tokens),
            self.num_blocks,
            format_bytes(self.block_bytes),
            self.usage.host_capacity,
        );
        let _ = writeln!(
            out,
            "\n{:<8} {:<14} {:>12} {:>8} {:>12} {:>12} {:>12} {:>12}",
            "tier", "group", "hit tokens", "rate", "hit blocks", "stored", "evicted", "cached"
        );
        for (tier, hit_tokens, groups) in self.tiers() {
            let rate = format!("{:.2} %", 100.0 * self.rate(hit_tokens));
            let _ = writeln!(out, "{tier:<8} {:<14} {hit_tokens:>12} {rate:>8}", "");
            for (stats, kind) in groups.iter().zip(&self.groups) {
                let _ = writeln!(
                    out,
                    "{:<8} {kind:<14} {:>12} {:>8} {:>12} {:>12} {:>12} {:>12}",
                    "",
                    "",
                    "",
                    stats.hit_blocks,
                    stats.stored_blocks,
                    stats.evicted_blocks,
                    stats.cached_blocks
                );
            }
        }
        for (what, transfers) in [
            ("offloaded", &self.stats.offloads),
            ("onboarded", &self.stats.onboards),
            ("persisted", &self.stats.persists),
            ("fetched", &self.stats.fetches),
        ] {
            let _ = writeln!(
                out,
                "{what} {} blocks, {}",
                transfers.succeeded,
                format_bytes(transfers.succeeded * self.block_bytes)
            );
        }
        let _ = writeln!(
            out,
            "\n{:<16} {:>10} {:>10} {:>10}   us per request",
            "", "mean", "p50", "p99"
        );
        for (name, Spread { mean_us, p50_us, p99_us }) in &self.times {
            let _ = writeln!(out, "{name:<16} {mean_us:>10.1} {p50_us:>10.1} {p99_us:>10.1}");
        }
        let _ = writeln!(
            out,
            "{:.2} s in the manager, {:.2} s in all",
            self.manager_seconds, self.seconds
        );
        out
    }
}
