//! Statistics in the text form that Prometheus scrapes (exposition format 0.0.4).

use std::fmt::Write as _;

use super::*;

/// Name, type and help of a metric, and its value for each set of labels.
struct Metric<'a> {
    name: &'a str,
    kind: &'a str,
    help: &'a str,
    samples: Vec<(String, u64)>,
}

impl Manager {
    /// All counters and the occupancy of the tiers as Prometheus text, for the server of a runtime to answer
    /// scrapes with. Looks at every block of the pool: for once in some seconds, not for every step.
    pub fn prometheus(&self) -> String {
        let (stats, usage) = (self.stats(), self.usage());
        let plain = |value: u64| vec![(String::new(), value)];
        let counter = |name, help, samples| Metric { name, kind: "counter", help, samples };
        let gauge = |name, help, samples| Metric { name, kind: "gauge", help, samples };

        let directions = [
            ("offload", stats.offloads),
            ("onboard", stats.onboards),
            ("persist", stats.persists),
            ("fetch", stats.fetches),
        ];
        let by_direction = |value: fn(&TransferStats) -> u64| -> Vec<(String, u64)> {
            directions.iter().map(|(d, s)| (format!("direction=\"{d}\""), value(s))).collect()
        };
        let tiers = [("device", &stats.device), ("host", &stats.host), ("storage", &stats.storage)];
        let by_group = |value: fn(&TierStats) -> u64| -> Vec<(String, u64)> {
            let mut samples = Vec::new();
            for (tier, groups) in tiers {
                for (g, (group, stats)) in self.config.groups.iter().zip(groups).enumerate() {
                    let labels = format!("tier=\"{tier}\",group=\"{g}\",kind=\"{}\"", group.kind);
                    samples.push((labels, value(stats)));
                }
            }
            samples
        };
        let lower = [
            ("host", self.host.is_some(), stats.host_breaker),
            ("storage", self.storage.is_some(), stats.storage_breaker),
        ];
        let there = lower.iter().filter(|(_, there, _)| *there);
        let of_tiers = |device: usize, host: usize, storage: usize| -> Vec<(String, u64)> {
            let blocks = |tier: &str| if tier == "host" { host } else { storage };
            let lower = there.clone().map(|&(tier, ..)| (tier, blocks(tier)));
            let all = std::iter::once(("device", device)).chain(lower);
            all.map(|(tier, blocks)| (format!("tier=\"{tier}\""), blocks as u64)).collect()
        };
        let closed = there.clone().map(|(tier, _, breaker)| {
            (format!("tier=\"{tier}\""), u64::from(*breaker == BreakerState::Closed))
        });

        let metrics = [
            counter("allocations_total", "Sequences allocated.", plain(stats.allocations)),
            counter("refused_total", "Allocations and appends refused.", plain(stats.refused)),
            counter("prompt_tokens_total", "Prompt tokens allocated.", plain(stats.prompt_tokens)),
            counter("hit_tokens_total", "Prompt tokens that hit.", plain(stats.hit_tokens)),
            counter(
                "device_hit_tokens_total",
                "Prompt tokens that the device alone could serve.",
                plain(stats.device_hit_tokens),
            ),
            counter(
                "host_hit_tokens_total",
                "Prompt tokens that device and host could serve.",
                plain(stats.host_hit_tokens),
            ),
            counter(
                "offloads_refused_total",
                "Offers that found no slot and were put off.",
                plain(stats.offloads_refused),
            ),
            counter(
                "evictions_dropped_total",
                "Blocks evicted under write-back that the host could not take.",
                plain(stats.evictions_dropped),
            ),
            counter("transfers_started_total", "Transfers begun.", by_direction(|s| s.started)),
            counter(
                "transfers_succeeded_total",
                "Transfers that ended with every byte in place.",
                by_direction(|s| s.succeeded),
            ),
            counter("transfers_failed_total", "Other ended ones.", by_direction(|s| s.failed)),
            counter("hit_blocks_total", "Blocks that served hits.", by_group(|s| s.hit_blocks)),
            counter("stored_blocks_total", "Blocks made findable.", by_group(|s| s.stored_blocks)),
            counter(
                "evicted_blocks_total",
                "Findable blocks dropped to make room.",
                by_group(|s| s.evicted_blocks),
            ),
            gauge("cached_blocks", "Blocks findable now.", by_group(|s| s.cached_blocks)),
            gauge(
                "capacity_blocks",
                "Blocks that a tier can hold.",
                of_tiers(usage.device_capacity, usage.host_capacity, usage.storage_capacity),
            ),
            gauge(
                "used_blocks",
                "Blocks that hold something.",
                of_tiers(usage.device_used, usage.host_used, usage.storage_used),
            ),
            gauge(
                "pinned_blocks",
                "Blocks that cannot be evicted now.",
                of_tiers(
                    usage.device_capacity - usage.device_free,
                    usage.host_pinned,
                    usage.storage_pinned,
                ),
            ),
            gauge(
                "tier_in_service",
                "1 where a tier is used, 0 where it is left alone because transfers failed.",
                closed.collect(),
            ),
            gauge("sequences", "Live sequences.", plain(self.sequences.len() as u64)),
        ];
        let mut text = String::new();
        for Metric { name, kind, help, samples } in metrics {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "# HELP hybridkv_{name} {help}\n# TYPE hybridkv_{name} {kind}");
            for (labels, value) in samples {
                let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
                let _ = writeln!(text, "hybridkv_{name}{labels} {value}");
            }
        }
        text
    }
}
