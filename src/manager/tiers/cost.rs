//! Whether a hit in a lower tier is worth loading, or faster computed again.

use crate::error::{Error, Result};

/// Measured rates, and what follows from them. All of them positive and finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostModel {
    /// Prompt tokens computed per second.
    pub prefill_tokens_per_s: f64,
    /// Bytes per second from the host to the device.
    pub onboard_bytes_per_s: f64,
    /// Bytes per second from storage to the host.
    pub fetch_bytes_per_s: f64,
    /// Bytes of a block.
    pub block_bytes: u64,
}

/// One way to serve a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Candidate {
    /// Tokens that need not be computed.
    pub hit_tokens: usize,
    /// Blocks that must come from the host, those from storage included.
    pub onboards: usize,
    /// Blocks that must come from storage.
    pub fetches: usize,
}

impl CostModel {
    pub(in super::super) fn check(&self, op: &'static str) -> Result<()> {
        let rates = [self.prefill_tokens_per_s, self.onboard_bytes_per_s, self.fetch_bytes_per_s];
        if rates.iter().all(|rate| rate.is_finite() && *rate > 0.0) {
            return Ok(());
        }
        let given = format!("{rates:?}");
        Err(Error::unsupported(op, "rates of a cost model", given, "positive finite numbers"))
    }

    /// Seconds until a prompt of `tokens` is computed or in place. Links work one after the other for a
    /// block, and side by side for many: the slower one counts.
    pub fn seconds(&self, tokens: usize, candidate: &Candidate) -> f64 {
        let link = |blocks: usize, rate: f64| blocks as f64 * self.block_bytes as f64 / rate;
        let onboard = link(candidate.onboards, self.onboard_bytes_per_s);
        let fetch = link(candidate.fetches, self.fetch_bytes_per_s);
        let computed = tokens.saturating_sub(candidate.hit_tokens) as f64;
        onboard.max(fetch) + computed / self.prefill_tokens_per_s
    }

    /// Index of the fastest candidate, the first of equals; 0 when there is none.
    pub fn choose(&self, tokens: usize, candidates: &[Candidate]) -> usize {
        let seconds = |i: &usize| self.seconds(tokens, &candidates[*i]);
        (0..candidates.len()).min_by(|a, b| seconds(a).total_cmp(&seconds(b))).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: CostModel = CostModel {
        prefill_tokens_per_s: 10_000.0,
        onboard_bytes_per_s: 50e9,
        fetch_bytes_per_s: 2e9,
        block_bytes: 96 << 10,
    };

    fn candidate(hit_tokens: usize, onboards: usize, fetches: usize) -> Candidate {
        Candidate { hit_tokens, onboards, fetches }
    }

    #[test]
    fn a_link_that_is_faster_than_computing_is_used() {
        // 128K tokens: 8192 blocks of 96 KiB are 0.8 GB: 16 ms from the host, 0.4 s from storage.
        let all = [candidate(0, 0, 0), candidate(131_072, 8192, 0), candidate(131_072, 8192, 8192)];
        assert_eq!(MODEL.choose(140_000, &all), 1);
        assert!((MODEL.seconds(131_072, &all[1]) - 0.0161).abs() < 1e-3);
        assert!((MODEL.seconds(131_072, &all[2]) - 0.4026).abs() < 1e-3);
        // Storage adds 64K tokens that would take 6.5 s.
        let deeper = [candidate(65_536, 4096, 0), candidate(131_072, 8192, 4096)];
        assert_eq!(MODEL.choose(131_072, &deeper), 1);
    }

    #[test]
    fn a_slow_link_loses_to_computing_and_ties_keep_the_cheaper_tier() {
        let slow = CostModel { fetch_bytes_per_s: 10e6, ..MODEL };
        // 16 tokens take 1.6 ms to compute and 9.8 ms to fetch.
        let candidates = [candidate(1024, 0, 0), candidate(1040, 1, 1)];
        assert_eq!(slow.choose(2000, &candidates), 0);
        assert_eq!(MODEL.choose(2000, &candidates), 1);
        assert_eq!(MODEL.choose(100, &[candidate(50, 0, 0), candidate(50, 0, 0)]), 0);
        assert_eq!(MODEL.choose(100, &[]), 0);
    }

    #[test]
    fn rates_that_are_none_are_refused() {
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(CostModel { fetch_bytes_per_s: rate, ..MODEL }.check("cost").is_err());
        }
        assert!(MODEL.check("cost").is_ok());
    }
}
