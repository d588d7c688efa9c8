//! The progress of a run: a bar on a terminal, a line every few seconds elsewhere.

use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::server::Server;

const REDRAW: Duration = Duration::from_millis(100);
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows how far a server is and how full its tiers are.
pub struct Progress {
    /// `None` when standard error is no terminal.
    bar: Option<ProgressBar>,
    requests: u64,
    last: Cell<Instant>,
}

impl Progress {
    /// Progress towards that many requests.
    pub fn new(requests: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(requests);
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} [{elapsed}] {msg}");
            style.map(|style| bar.set_style(style)).ok();
            bar
        });
        Self { bar, requests, last: Cell::new(Instant::now()) }
    }

    /// Shows the state of the server, if it is time to.
    pub fn show(&self, server: &Server) {
        let pause = if self.bar.is_some() { REDRAW } else { LINE_EVERY };
        if self.last.get().elapsed() < pause {
            return;
        }
        self.last.set(Instant::now());
        let message = occupancy(server);
        match &self.bar {
            Some(bar) => {
                bar.set_position(server.counters().requests);
                bar.set_message(message);
            }
            None => {
                let (done, of) = (server.counters().requests, self.requests);
                eprintln!("{done}/{of} requests, {:.0} s: {message}", server.seconds());
            }
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn occupancy(server: &Server) -> String {
    let usage = server.manager().usage();
    let percent = |part: usize, whole: usize| 100 * part / whole.max(1);
    let live = usage.device_live.iter().sum::<usize>();
    let cached = usage.device_cached.iter().sum::<usize>();
    let tally = server.tally();
    format!(
        "device {}% live, {}% cached | host {}% of {} | {:.0} tokens/s | {} blocks, {} rows verified",
        percent(live, usage.device_capacity),
        percent(cached, usage.device_capacity),
        percent(usage.host_used, usage.host_capacity),
        usage.host_capacity,
        (server.counters().prefill_tokens + server.counters().decode_tokens) as f64
            / server.seconds().max(1e-9),
        tally.blocks(),
        tally.rows,
    )
}
