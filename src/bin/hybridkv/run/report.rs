//! What a run ends with: a table for people, and the same figures in JSON, behind the rows of every report.

use std::collections::BTreeMap;
use std::fmt::Write;

use hybridkv::device::Device;
use hybridkv::engine::LaneStats;
use hybridkv::manager::Usage;
use hybridkv::spec::{AttentionKind, GroupPlan};
use serde::Serialize;

use super::server::{AttentionTime, Server};
use super::setup::Setup;
use super::verify::Tally;
use crate::report::Row;
use crate::values::format_bytes;

/// All figures of a run.
#[derive(Debug, Serialize)]
pub struct Figures {
    pub passed: bool,
    pub device: String,
    pub model: Model,
    pub workload: String,
    pub seed: u64,
    /// What was taken down for the CPU device.
    pub notes: Vec<String>,
    pub requests: u64,
    pub preemptions: u64,
    /// Sequences whose first step ran behind their loads.
    pub overlapped: u64,
    pub failed_loads: u64,
    pub steps: u64,
    pub seconds: f64,
    pub step_seconds: f64,
    pub computed_tokens: u64,
    pub tokens_per_second: f64,
    pub hits: Hits,
    pub device_tier: Tier,
    pub host_tier: Tier,
    pub offload: Moved,
    /// Share of the time that offloads got beside decode steps, at the end.
    pub store_share: f64,
    pub onboard: Moved,
    pub persist: Moved,
    pub fetch: Moved,
    pub decode_attention: Attention,
    pub mixed_attention: Attention,
    pub verified: Verified,
}

/// The model as it was run.
#[derive(Debug, Serialize)]
pub struct Model {
    pub name: String,
    pub layers: usize,
    pub groups: Vec<String>,
    pub num_qo_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    /// Type of the cached keys and values, in words.
    pub kv: String,
    pub block_bytes: usize,
}

/// Prompt tokens by what served them.
#[derive(Debug, Serialize)]
pub struct Hits {
    pub prompt_tokens: u64,
    pub device_tokens: u64,
    pub host_tokens: u64,
    pub storage_tokens: u64,
    /// Blocks that were fetched from storage for requests that waited.
    pub prefetched_blocks: u64,
}

/// What a tier holds at the end.
#[derive(Debug, Serialize)]
pub struct Tier {
    pub blocks: u64,
    pub bytes: u64,
    pub cached_blocks: u64,
    pub stored_blocks: u64,
    pub evicted_blocks: u64,
    pub hit_blocks: u64,
    /// Tokens of context that the cached blocks hold.
    pub tokens: f64,
    /// Tokens that a cache without layer groups holds in the bytes of the same blocks.
    pub uniform_tokens: f64,
}

/// Transfers of one direction.
#[derive(Debug, Serialize)]
pub struct Moved {
    pub transfers: u64,
    pub bytes: u64,
    pub busy_ms: f64,
    pub gbps: f64,
}

/// Attention in the steps that were timed.
#[derive(Debug, Serialize)]
pub struct Attention {
    pub ms: f64,
    pub gbps: f64,
    pub tflops: f64,
}

/// What was checked.
#[derive(Debug, Serialize)]
pub struct Verified {
    pub fraction: f64,
    pub row_tolerance: f64,
    #[serde(flatten)]
    pub tally: Tally,
}

impl Figures {
    /// The figures of a server that has served, and what its verifier found.
    pub fn new(device: &Device, server: &Server, tally: Tally, seconds: f64) -> Self {
        let setup = server.setup();
        let counters = server.counters();
        let (stats, usage) = (server.manager().stats(), server.manager().usage());
        let shape = setup.spec.layers[0].shape;
        let computed_tokens = counters.prefill_tokens + counters.decode_tokens;
        let moved = server.engine().stats();
        let tiers = tiers(setup, &usage, &stats);
        Self {
            passed: tally.passed(),
            device: device.info().name.clone(),
            model: Model {
                name: setup.spec.name.clone(),
                layers: setup.spec.layers.len(),
                groups: describe_groups(&setup.plan),
                num_qo_heads: setup.spec.num_qo_heads,
                num_kv_heads: shape.num_kv_heads,
                head_dim: shape.head_dim,
                kv: setup.elements.describe_kv(),
                block_bytes: setup.plan.block_bytes,
            },
            workload: setup.workload.describe(),
            seed: setup.seed,
            notes: setup.notes.clone(),
            requests: counters.requests,
            preemptions: counters.preemptions,
            overlapped: counters.overlapped,
            failed_loads: counters.failed_loads,
            steps: counters.steps,
            seconds,
            step_seconds: counters.step_ms / 1e3,
            computed_tokens,
            tokens_per_second: computed_tokens as f64 / seconds.max(1e-9),
            hits: Hits {
                prompt_tokens: counters.prompt_tokens,
                device_tokens: counters.device_hit_tokens,
                host_tokens: counters.host_hit_tokens,
                storage_tokens: counters.storage_hit_tokens,
                prefetched_blocks: counters.prefetched_blocks,
            },
            device_tier: tiers.0,
            host_tier: tiers.1,
            offload: Moved::new(&moved.offload),
            store_share: moved.store_share,
            onboard: Moved::new(&moved.onboard),
            persist: Moved::new(&moved.persist),
            fetch: Moved::new(&moved.fetch),
            decode_attention: Attention::new(&counters.decode_attention),
            mixed_attention: Attention::new(&counters.mixed_attention),
            verified: Verified {
                fraction: setup.verify,
                row_tolerance: setup.elements.row_tolerance(),
                tally,
            },
        }
    }

    /// The rows of a report: what was served, moved and verified.
    pub fn rows(&self) -> Vec<Row> {
        let row = |case: &str, ours: f64, unit: &str| Row {
            case: case.to_owned(),
            ours,
            unit: unit.to_owned(),
            pass: true,
            ..Row::default()
        };
        let mut rows = vec![row("served", self.tokens_per_second, "tokens/s")];
        let hits = &self.hits;
        for (tier, tokens) in [
            ("device", hits.device_tokens),
            ("host", hits.host_tokens),
            ("storage", hits.storage_tokens),
        ] {
            rows.push(row(&format!("hits/{tier}"), tokens as f64, "tokens"));
        }
        for (direction, moved) in [
            ("offload", &self.offload),
            ("onboard", &self.onboard),
            ("persist", &self.persist),
            ("fetch", &self.fetch),
        ] {
            if moved.transfers > 0 {
                rows.push(row(direction, moved.gbps, "GB/s"));
            }
        }
        rows.push(row("attention/decode", self.decode_attention.gbps, "GB/s"));
        rows.push(row("attention/mixed", self.mixed_attention.tflops, "TFLOP/s"));
        let Verified { row_tolerance, tally, .. } = &self.verified;
        let verified = |what: &str, right: u64, wrong: u64| Row {
            pass: wrong == 0,
            note: (wrong > 0).then(|| format!("{wrong} more were wrong")),
            ..row(&format!("verified/{what}"), right as f64, what)
        };
        rows.push(verified("blocks", tally.blocks() - tally.wrong_blocks, tally.wrong_blocks));
        rows.push(Row {
            error: BTreeMap::from([("relative".to_owned(), tally.worst_row_error)]),
            tolerance: Some(*row_tolerance),
            ..verified("rows", tally.rows - tally.wrong_rows, tally.wrong_rows)
        });
        rows
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut rows: Vec<(&str, String)> = vec![
            ("device", self.device.clone()),
            (
                "model",
                format!(
                    "{}: {} layers in {} groups ({}), {} query and {} KV heads of {}, {} keys and values",
                    self.model.name,
                    self.model.layers,
                    self.model.groups.len(),
                    self.model.groups.join(", "),
                    self.model.num_qo_heads,
                    self.model.num_kv_heads,
                    self.model.head_dim,
                    self.model.kv
                ),
            ),
            ("workload", self.workload.clone()),
        ];
        rows.extend(self.notes.iter().map(|note| ("taken down", note.clone())));
        rows.extend([
            (
                "served",
                format!(
                    "{} requests in {:.1} s, {} tokens computed ({:.0}/s), {} steps ({:.1} s on the device), \
                     {} preemptions",
                    self.requests,
                    self.seconds,
                    self.computed_tokens,
                    self.tokens_per_second,
                    self.steps,
                    self.step_seconds,
                    self.preemptions
                ),
            ),
            (
                "prefix hits",
                format!(
                    "{:.1} % of {} prompt tokens: device {:.1} %, host {:.1} %, storage {:.1} %, {} blocks prefetched; {} requests ran \
                     behind their loads, {} failed loads",
                    self.hits.percent(
                        self.hits.device_tokens + self.hits.host_tokens + self.hits.storage_tokens
                    ),
                    self.hits.prompt_tokens,
                    self.hits.percent(self.hits.device_tokens),
                    self.hits.percent(self.hits.host_tokens),
                    self.hits.percent(self.hits.storage_tokens),
                    self.hits.prefetched_blocks,
                    self.overlapped,
                    self.failed_loads
                ),
            ),
            ("device tier", self.device_tier.line()),
            ("host tier", self.host_tier.line()),
            ("offload", self.offload.line()),
            ("onboard", self.onboard.line()),
            ("to storage", self.persist.line()),
            ("from storage", self.fetch.line()),
            (
                "attention",
                format!(
                    "decode {:.1} GB/s, with prefill {:.3} TFLOP/s (in one step of {}: {:.0} and {:.0} ms)",
                    self.decode_attention.gbps,
                    self.mixed_attention.tflops,
                    super::server::TIMED_STEPS,
                    self.decode_attention.ms,
                    self.mixed_attention.ms
                ),
            ),
            ("blocks verified", self.verified.blocks_line()),
            (
                "rows verified",
                format!(
                    "{}, worst relative error {:.1e} (at most {:.1e}); {} wrong",
                    self.verified.tally.rows,
                    self.verified.tally.worst_row_error,
                    self.verified.row_tolerance,
                    self.verified.tally.wrong_rows
                ),
            ),
            ("result", self.result().into()),
        ]);
        let mut table = String::new();
        for (name, value) in rows {
            // Writing to a string cannot fail.
            let _ = writeln!(table, "{name:<16} {value}");
        }
        for mismatch in &self.verified.tally.mismatches {
            let _ = writeln!(table, "{:<16} {mismatch}", "mismatch");
        }
        table
    }
}

impl Figures {
    fn result(&self) -> &'static str {
        match (self.passed, self.verified.tally.blocks() + self.verified.tally.rows) {
            (false, _) => "WRONG: see the mismatches",
            (true, 0) => "nothing was verified",
            (true, _) => "everything verified is right",
        }
    }
}

impl Hits {
    fn percent(&self, tokens: u64) -> f64 {
        100.0 * tokens as f64 / self.prompt_tokens.max(1) as f64
    }
}

impl Tier {
    fn line(&self) -> String {
        if self.blocks == 0 {
            return "none".into();
        }
        format!(
            "{}, {} of {} blocks cached: {:.0} tokens held, {:.0} by uniform allocation ({:.2}x); \
             {} stored, {} evicted, {} hit",
            format_bytes(self.bytes),
            self.cached_blocks,
            self.blocks,
            self.tokens,
            self.uniform_tokens,
            self.tokens / self.uniform_tokens.max(1.0),
            self.stored_blocks,
            self.evicted_blocks,
            self.hit_blocks
        )
    }
}

impl Moved {
    fn new(lane: &LaneStats) -> Self {
        Self {
            transfers: lane.transfers,
            bytes: lane.bytes,
            busy_ms: lane.busy_ms,
            gbps: lane.gbps(),
        }
    }

    fn line(&self) -> String {
        format!("{} blocks, {}, {:.1} GB/s", self.transfers, format_bytes(self.bytes), self.gbps)
    }
}

impl Attention {
    fn new(time: &AttentionTime) -> Self {
        let per_ms =
            |amount: f64, unit: f64| if time.ms == 0.0 { 0.0 } else { amount / time.ms / unit };
        Self { ms: time.ms, gbps: per_ms(time.bytes, 1e6), tflops: per_ms(time.flops, 1e9) }
    }
}

impl Verified {
    fn blocks_line(&self) -> String {
        let tally = &self.tally;
        format!(
            "{}, bit-exact: {} hit on the device, {} onboarded, {} at the end of a turn, {} host slots; \
             {} wrong",
            tally.blocks(),
            tally.hit_blocks,
            tally.onboarded_blocks,
            tally.turn_end_blocks,
            tally.host_slots,
            tally.wrong_blocks
        )
    }
}

/// What both tiers hold.
fn tiers(setup: &Setup, usage: &Usage, stats: &hybridkv::manager::Stats) -> (Tier, Tier) {
    let uniform_token: usize =
        setup.spec.layers.iter().map(|layer| layer.shape.token_bytes()).sum();
    let tier = |blocks: usize, block_bytes: u64, cached: &[usize], stats: &[_]| {
        let cached_blocks: usize = cached.iter().sum();
        let sum = |count: fn(&hybridkv::manager::TierStats) -> u64| stats.iter().map(count).sum();
        let held = cached_blocks as f64 * setup.plan.block_bytes as f64;
        Tier {
            blocks: blocks as u64,
            bytes: blocks as u64 * block_bytes,
            cached_blocks: cached_blocks as u64,
            stored_blocks: sum(|s| s.stored_blocks),
            evicted_blocks: sum(|s| s.evicted_blocks),
            hit_blocks: sum(|s| s.hit_blocks),
            tokens: context_tokens(&setup.plan, cached),
            uniform_tokens: held / uniform_token as f64,
        }
    };
    let slots = setup.engine.num_slots as usize;
    let slot_bytes = setup.engine.host_bytes().checked_div(slots as u64).unwrap_or(0);
    (
        tier(
            usage.device_capacity,
            setup.plan.block_bytes as u64,
            &usage.device_cached,
            &stats.device,
        ),
        tier(usage.host_capacity, slot_bytes, &usage.host_cached, &stats.host),
    )
}

/// Tokens of context that cached blocks hold: those of the full groups, which need every block of a prefix
/// while windowed ones need a tail; of all groups where no group is full.
fn context_tokens(plan: &GroupPlan, cached: &[usize]) -> f64 {
    let has_full = plan.groups.iter().any(|group| group.kind == AttentionKind::Full);
    let counted: Vec<f64> = plan
        .groups
        .iter()
        .zip(cached)
        .filter(|(group, _)| !has_full || group.kind == AttentionKind::Full)
        .map(|(group, &blocks)| blocks as f64 * group.block_size as f64)
        .collect();
    counted.iter().sum::<f64>() / counted.len().max(1) as f64
}

fn describe_groups(plan: &GroupPlan) -> Vec<String> {
    plan.groups
        .iter()
        .map(|group| {
            let kind = match group.kind {
                AttentionKind::Full => "full".to_string(),
                AttentionKind::Sliding { window } => format!("window {window}"),
                AttentionKind::Chunked { chunk } => format!("chunk {chunk}"),
            };
            format!("{} x {kind}", group.layers.len())
        })
        .collect()
}
