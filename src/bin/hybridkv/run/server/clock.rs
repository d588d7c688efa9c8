//! The clock of a run.

use std::time::Instant;

/// What a round takes by a counted clock: about what it takes on a CPU.
const ROUND_NS: u64 = 20_000_000;

/// Nanoseconds since a run began.
pub(super) enum Clock {
    /// Of a GPU, which is there to be fast.
    Measured(Instant),
    /// Of the CPU device, which is there to be verified: without a storage tier, whose threads have a pace of their
    /// own, a run is the same wherever it is run.
    Counted(u64),
}

impl Clock {
    pub fn new(is_measured: bool) -> Self {
        if is_measured { Self::Measured(Instant::now()) } else { Self::Counted(0) }
    }

    pub fn is_measured(&self) -> bool {
        matches!(self, Self::Measured(_))
    }

    /// A round of the serving loop begins.
    pub fn round(&mut self) {
        if let Self::Counted(ns) = self {
            *ns += ROUND_NS;
        }
    }

    pub fn now(&self) -> u64 {
        match self {
            Self::Measured(start) => start.elapsed().as_nanos() as u64,
            Self::Counted(ns) => *ns,
        }
    }
}
