//! The circuit breaker of a tier: after some failures in a row the tier is left alone for a while, then one
//! transfer tries it.

use serde::Serialize;

/// When a tier is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerConfig {
    /// Failures in a row that open it.
    pub failures: u32,
    /// Nanoseconds after which one transfer may try the tier again, by the clock of
    /// [`Manager::tick`](crate::manager::Manager::tick).
    pub retry_ns: u64,
}

/// What a breaker lets through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// Everything.
    #[default]
    Closed,
    /// Nothing: the tier has failed too often.
    Open,
    /// One transfer, which is under way, to see whether the tier works again.
    HalfOpen,
}

#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Breaker {
    config: BreakerConfig,
    state: BreakerState,
    /// In a row.
    failures: u32,
    opened_at: u64,
}

impl Breaker {
    pub fn new(config: BreakerConfig) -> Self {
        Self { config, state: BreakerState::Closed, failures: 0, opened_at: 0 }
    }

    pub fn state(&self) -> BreakerState {
        self.state
    }

    pub fn is_closed(&self) -> bool {
        self.state == BreakerState::Closed
    }

    /// Whether a transfer may start.
    pub fn lets_through(&self, now: u64) -> bool {
        match self.state {
            BreakerState::Closed => true,
            BreakerState::Open => now.saturating_sub(self.opened_at) >= self.config.retry_ns,
            BreakerState::HalfOpen => false,
        }
    }

    /// A transfer has started that was let through.
    pub fn started(&mut self) {
        if self.state == BreakerState::Open {
            self.state = BreakerState::HalfOpen;
        }
    }

    /// A transfer has ended. Ends of what was under way when it opened change nothing.
    pub fn ended(&mut self, succeeded: bool, now: u64) {
        match (self.state, succeeded) {
            (BreakerState::Open, _) => {}
            (_, true) => {
                self.state = BreakerState::Closed;
                self.failures = 0;
            }
            (state, false) => {
                self.failures = self.failures.saturating_add(1);
                if state == BreakerState::HalfOpen || self.failures >= self.config.failures {
                    self.state = BreakerState::Open;
                    self.opened_at = now;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_in_a_row_open_it_and_one_probe_decides() {
        let mut breaker = Breaker::new(BreakerConfig { failures: 3, retry_ns: 100 });
        for succeeded in [false, false, true, false, false] {
            breaker.ended(succeeded, 0);
            assert!(breaker.lets_through(0), "not in a row");
        }
        breaker.ended(false, 10);
        assert_eq!(breaker.state(), BreakerState::Open);
        breaker.ended(true, 11);
        assert!(!breaker.lets_through(109), "what was under way changes nothing");
        assert!(breaker.lets_through(110));
        breaker.started();
        assert!(
            breaker.state() == BreakerState::HalfOpen && !breaker.lets_through(1000),
            "one only"
        );
        breaker.ended(false, 1000);
        assert!(!breaker.lets_through(1099) && breaker.lets_through(1100));
        breaker.started();
        breaker.ended(true, 1200);
        assert!(breaker.is_closed() && breaker.lets_through(1200));
    }
}
