//! Fault injection: transfers that fail, lie, come late or start early.

use std::collections::VecDeque;

use crate::error::{Error, ErrorKind, Result};
use crate::manager::{Direction, Outcome, TransferId};

/// How a transfer misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The target is overwritten with 0xFF (NaN) and the transfer reported as failed.
    Fail,
    /// Nothing is copied, and the transfer reported as succeeded.
    Skip,
    /// The first 16 bytes of the target are overwritten, and the transfer reported as succeeded. Of a
    /// transfer to or from storage: a byte of the stored block is changed after the write, before the read.
    Corrupt,
    /// Only the first half is copied, and the transfer reported as failed. Of a transfer to or from storage:
    /// the stored block loses its end after the write, before the read.
    Short,
    /// The end is reported that many polls late.
    Delay {
        /// Polls.
        polls: u32,
    },
    /// The copy itself is late: its target is filled so often with 0xFF first. Does nothing to storage.
    Late {
        /// Fills.
        fills: u32,
    },
    /// The submission does not wait for the compute stream (breaks R2 and R3).
    Unordered,
    /// A driver call fails when the first copies of a batch are under way.
    Driver,
}

/// Misbehaviour of the next transfers of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Which transfers.
    pub direction: Direction,
    /// What they do.
    pub kind: FaultKind,
    /// How many of them (submissions, for [`FaultKind::Unordered`]; batches, for [`FaultKind::Driver`]).
    pub count: u32,
}

/// Faults to come, and ends that are held back.
#[derive(Default)]
pub(super) struct Faults {
    pending: VecDeque<Fault>,
    delays: Vec<(TransferId, u32)>,
    held: Vec<(TransferId, Outcome)>,
}

impl Faults {
    pub fn inject(&mut self, fault: Fault) {
        self.pending.push_back(fault);
    }

    /// The fault of the next transfer of this direction, used up.
    pub fn take(&mut self, direction: Direction, id: TransferId) -> Option<FaultKind> {
        let of_transfers = |kind| !matches!(kind, FaultKind::Unordered | FaultKind::Driver);
        let kind = self.take_if(direction, of_transfers)?;
        if let FaultKind::Delay { polls } = kind {
            self.delays.push((id, polls));
        }
        Some(kind)
    }

    /// Whether the next submission of this direction is to start unordered, used up.
    pub fn take_unordered(&mut self, direction: Direction) -> bool {
        self.take_if(direction, |kind| kind == FaultKind::Unordered).is_some()
    }

    /// A driver call amid the submission of a batch.
    ///
    /// # Errors
    /// The injected one, used up.
    pub fn driver_call(&mut self, direction: Direction) -> Result<()> {
        match self.take_if(direction, |kind| kind == FaultKind::Driver) {
            None => Ok(()),
            Some(_) => Err(Error::new(
                "engine",
                ErrorKind::Cuda {
                    call: "an injected fault",
                    code: 999,
                    name: "CUDA_ERROR_UNKNOWN".to_owned(),
                    message: "unknown error".to_owned(),
                },
            )),
        }
    }

    fn take_if(
        &mut self,
        direction: Direction,
        wanted: impl Fn(FaultKind) -> bool,
    ) -> Option<FaultKind> {
        let at = self
            .pending
            .iter()
            .position(|fault| fault.direction == direction && wanted(fault.kind))?;
        let fault = &mut self.pending[at];
        let kind = fault.kind;
        fault.count = fault.count.saturating_sub(1);
        if fault.count == 0 {
            self.pending.remove(at);
        }
        Some(kind)
    }

    /// Takes delayed transfers out of `ended` until their polls are over.
    pub fn hold_back(&mut self, ended: &mut Vec<(TransferId, Outcome)>) {
        if self.delays.is_empty() {
            return;
        }
        let Self { delays, held, .. } = self;
        ended.append(held);
        ended.retain(|&(id, outcome)| {
            let Some(at) = delays.iter().position(|&(delayed, _)| delayed == id) else {
                return true;
            };
            if delays[at].1 == 0 {
                delays.swap_remove(at);
                return true;
            }
            delays[at].1 -= 1;
            held.push((id, outcome));
            false
        });
    }

    /// Ends all delays.
    pub fn release(&mut self, ended: &mut Vec<(TransferId, Outcome)>) {
        self.delays.clear();
        ended.append(&mut self.held);
    }

    /// Transfers that have ended and are held back.
    pub fn held(&self) -> usize {
        self.held.len()
    }
}
