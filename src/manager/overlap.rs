//! Steps that run behind their loads: instead of waiting until all of a hit is on the device, a sequence's steps
//! are submitted at once, and each layer of them waits on the device for its own part of the loads
//! ([`Engine::wait_layer`](crate::engine::Engine::wait_layer)).
//!
//! Until all the loads have succeeded, what such steps compute is on trial: none of it is findable, offered to
//! the host, freed or forked. When a load fails it is void, all of it: the first step has attended what never
//! came, and the others what that one wrote. The sequence then ends ([`Completion::Void`]), so that no later
//! report of its steps can vouch for it.

use super::*;

impl Manager {
    /// Lets the steps of a sequence be submitted while its loads are under way. Every layer of them has to wait
    /// for that layer's part of the loads before it appends or attends (R3). What leaves the windows meanwhile is
    /// freed when the loads have ended; [`Self::block_row`] says what is left then.
    ///
    /// # Errors
    /// `UnknownSequence`; `NotReady` while some of its loads have not been handed out by
    /// [`Self::next_transfer`]: there is nothing to wait for yet. Nothing is changed.
    pub fn overlap(&mut self, seq: SeqId) -> Result<()> {
        const OP: &str = "overlap";
        let Some(sequence) = self.sequences.get_mut(&seq) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(seq)));
        };
        if sequence.pending > 0 {
            let transfers = sequence.pending;
            return Err(Error::new(OP, ErrorKind::NotReady { seq, transfers }));
        }
        sequence.overlapped |= sequence.loading > 0;
        Ok(())
    }

    /// Blocks of a group on their way to the device for a sequence: layers of a group without any have nothing to
    /// wait for.
    ///
    /// # Errors
    /// `UnknownSequence`; `InvalidArgument` for a group that does not exist.
    pub fn loading(&self, seq: SeqId, group: usize) -> Result<usize> {
        Ok(self.row("loading", seq, group)?.0.loading)
    }
}

/// Refuses a sequence that waits for loads.
pub(super) fn check_loaded(op: &'static str, seq: SeqId, sequence: &Sequence) -> Result<()> {
    match sequence.loading {
        0 => Ok(()),
        n => Err(Error::invalid(op, format!("sequence {seq} still waits for {n} load(s)"))),
    }
}

/// Refuses a sequence whose steps wait for loads.
pub(super) fn check_runs(op: &'static str, seq: SeqId, sequence: &Sequence) -> Result<()> {
    if sequence.overlapped { Ok(()) } else { check_loaded(op, seq, sequence) }
}
