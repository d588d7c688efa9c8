//! Fetching what storage holds of the prompts that wait for their turn, for as long as the policy says.

use hybridkv::error::Result;
use hybridkv::manager::ExtraKeys;

use super::Server;
use super::requests::{Job, LOOK_AHEAD};

/// Requests that are looked at before their turn.
const AHEAD: usize = 8;

/// How the prefetch of a request that waits stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fetch {
    Unasked,
    UnderWay,
    /// Given its time, or not worth it.
    Over,
}

impl Server {
    /// Begins the prefetches of requests that could start, and notes which have been given their time.
    pub(super) fn prefetch(&mut self) -> Result<()> {
        if self.setup.prefetch.is_none() {
            return Ok(());
        }
        let may_start = |server: &Self| {
            server.waiting.iter().filter(|job| job.may_start(&server.ended)).count()
        };
        while may_start(self) < AHEAD && self.waiting.len() < LOOK_AHEAD && !self.all_drawn() {
            self.draw();
        }
        let now = self.clock.now();
        let Self { waiting, manager, ended, counters, .. } = self;
        let may_start = |job: &&mut Job| job.may_start(ended);
        for job in waiting.iter_mut().filter(may_start).take(AHEAD) {
            if job.fetch == Fetch::Unasked {
                let prompt = &job.request.tokens[..job.prompt_len];
                let prompt = manager.hash(prompt, ExtraKeys::default());
                let begun = manager.prefetch(job.seq, &prompt, now)?;
                counters.prefetched_blocks += begun.blocks as u64;
                job.fetch = if begun.blocks > 0 { Fetch::UnderWay } else { Fetch::Over };
            }
        }
        for seq in manager.poll_prefetch(now)? {
            if let Some(job) = waiting.iter_mut().find(|job| job.seq == seq) {
                job.fetch = Fetch::Over;
            }
        }
        self.pump()
    }
}
