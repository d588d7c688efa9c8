//! A request trace through the manager: one request at a time, every transfer ending at once, as in
//! a machine whose device and links take no time.
//!
//! Per request: look up and allocate the prompt, advance over it, append the output, free.

use std::time::{Duration, Instant};

use hybridkv::error::{ErrorKind, Result};
use hybridkv::manager::{ExtraKeys, Manager, Outcome, SeqId, WritePolicy};

use super::config::Config;
use super::figures::{Figures, Phase, Times};
use crate::trace::{Trace, output_token};

const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };

/// Replays a trace; gives the manager as it is afterwards, and the figures.
///
/// # Errors
/// Those of the manager: a pool too small for the longest request.
pub fn replay(trace: &Trace, config: &Config) -> Result<(Manager, Figures)> {
    let mut manager = Manager::new(config.manager()?)?;
    if let Some(storage) = config.storage() {
        let slots = storage.bytes.checked_div(config.block_bytes()).unwrap_or(0);
        let slots = u32::try_from(slots).unwrap_or(u32::MAX);
        manager.attach_storage(storage.config(slots), &[])?;
    }
    let mut times = Times::with_capacity(trace.len());
    let (mut prompt, mut output) = (Vec::new(), Vec::new());
    let start = Instant::now();
    for request in 0..trace.len() {
        trace.expand_prompt(request, &mut prompt);
        output.clear();
        output.extend((0..trace.output_len(request)).map(|j| output_token(request, j)));
        serve(&mut manager, request as SeqId, &prompt, &output, &mut times)?;
    }
    let figures = Figures::new(&manager, config, times, start.elapsed());
    Ok((manager, figures))
}

fn serve(
    manager: &mut Manager,
    seq: SeqId,
    prompt: &[u32],
    output: &[u32],
    times: &mut Times,
) -> Result<()> {
    // Only write-back refuses what it later grants: nothing else needs the hashes twice.
    let retried =
        manager.config().host.as_ref().is_some_and(|host| host.write == WritePolicy::Back);
    let mut clock = Clock(Instant::now());
    let tokens = manager.hash(prompt, KEYS);
    times.push(Phase::Hash, clock.lap());
    let mut once = Some(tokens);
    let allocation = with_room(manager, |m| {
        let tokens = if retried { once.clone() } else { once.take() };
        m.allocate_hashed(seq, tokens.unwrap_or_else(|| m.hash(prompt, KEYS)), 0)
    })?;
    times.push(Phase::Allocate, clock.lap());
    if !allocation.loads.is_empty() {
        complete_transfers(manager)?;
    }
    manager.advance_with(seq, prompt.len(), prompt.len(), |_, _| {})?;
    if !output.is_empty() {
        with_room(manager, |m| m.append_with(seq, output, |_, _| {}))?;
    }
    complete_transfers(manager)?;
    times.push(Phase::Append, clock.lap());
    manager.free(seq)?;
    times.push(Phase::Free, clock.lap());
    Ok(())
}

/// An act that takes blocks: under write-back it is refused until what they hold has been stored.
fn with_room<T>(
    manager: &mut Manager,
    mut act: impl FnMut(&mut Manager) -> Result<T>,
) -> Result<T> {
    loop {
        match act(manager) {
            Err(error)
                if matches!(error.kind(), ErrorKind::NoFreeBlocks { .. })
                    && manager.transfers_in_flight() > 0 =>
            {
                complete_transfers(manager)?;
            }
            result => return result,
        }
    }
}

/// Ends all copies and transfers, in the order in which they were emitted.
fn complete_transfers(manager: &mut Manager) -> Result<()> {
    while manager.next_copy().is_some() {}
    while let Some(transfer) = manager.next_transfer() {
        manager.complete(transfer.id, Outcome::Succeeded)?;
        while manager.next_completion().is_some() {}
    }
    Ok(())
}

struct Clock(Instant);

impl Clock {
    /// The time since the last call.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}
