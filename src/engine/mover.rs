//! How the fragments of a lane get over the link: the one place that chooses.

use std::sync::Arc;

use crate::device::{Span, StreamRef};
use crate::error::Result;
use crate::manager::Direction;
use crate::ops::{CtaQuota, Kernels, MoveArgs, MoveShape};

/// What a batch of fragments is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Traffic {
    /// Which way all of them go: offload or onboard.
    pub direction: Direction,
    /// Whether the other direction is busy, too.
    pub both_ways: bool,
}

/// Moves the fragments of one lane.
pub(super) struct Mover {
    kernels: Arc<Kernels>,
}

impl Mover {
    pub fn new(kernels: &Arc<Kernels>) -> Self {
        Self { kernels: kernels.clone() }
    }

    /// Submits the copies of a descriptor table, as [`MoveArgs`] has it. All the work is on `stream` or joined
    /// back into it: what is recorded there next has all of it behind it.
    ///
    /// # Safety
    /// As for [`Kernels::move_blocks`].
    pub unsafe fn submit(
        &mut self,
        copies: Span,
        num_copies: u64,
        _traffic: Traffic,
        stream: StreamRef<'_>,
    ) -> Result<()> {
        let args = MoveArgs {
            copies,
            num_copies,
            shape: MoveShape::FRAGMENTS,
            quota: CtaQuota::HOST_LINK,
        };
        // SAFETY: the caller's promise.
        unsafe { self.kernels.move_blocks(&args, stream) }
    }
}
