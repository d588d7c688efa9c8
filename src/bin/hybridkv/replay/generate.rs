//! Generated workloads, on which policies are judged besides traces. A name, a number of requests and a seed
//! give the same requests on every machine.
//!
//! | name | what comes |
//! |---|---|
//! | `chat` | conversations behind one system prompt, turn by turn, each turn after a pause; replies become part of the prompt |
//! | `agents` | tasks that branch: a call goes on from the latest state of a task, or from one before it |
//! | `documents` | questions about 2,000 documents, asked for by Zipf's law |
//! | `loop` | 500 documents one after the other, again and again |
//! | `phases` | questions about documents, of which others are in favour in every eighth of the time |
//! | `recency` | what was used last is the most likely to come next, and nothing else counts |
//! | `scans` | `chat`, and between its turns long prompts that never come back |

use hybridkv::error::{Error, Result};

use super::OP;
use crate::random::Rng;
use crate::trace::{Request, Run, Trace};

/// The workloads by name.
pub const NAMES: [&str; 7] = ["chat", "agents", "documents", "loop", "phases", "recency", "scans"];

/// Requests and seed where none are given.
const REQUESTS: usize = 6000;
const SEED: u64 = 7;

/// The workload that is named `NAME`, `NAME:REQUESTS` or `NAME:REQUESTS,SEED`, every length divided by `shrink`.
///
/// # Errors
/// `Unsupported` for anything else.
pub fn generate(text: &str, shrink: usize) -> Result<Trace> {
    let refuse = || {
        let supported = format!("{}, each with :REQUESTS[,SEED] behind it", NAMES.join(", "));
        Error::unsupported(OP, "workload", text, supported)
    };
    let (name, size) = text.split_once(':').unwrap_or((text, ""));
    let (requests, seed) = size.split_once(',').unwrap_or((size, ""));
    let number = |text: &str, default: u64| match text {
        "" => Ok(default),
        _ => text.parse::<u64>().map_err(|_| refuse()),
    };
    let (requests, seed) = (number(requests, REQUESTS as u64)?, number(seed, SEED)?);
    let requests = u32::try_from(requests).map_err(|_| refuse())? as usize;
    let mut world = World { rng: Rng::new(seed), texts: 0, requests: Vec::new() };
    match name {
        "chat" => world.chat(requests, false),
        "agents" => world.agents(requests),
        "documents" => world.documents(requests),
        "loop" => world.cycle(requests),
        "phases" => world.phases(requests),
        "recency" => world.recency(requests),
        "scans" => world.chat(requests, true),
        _ => return Err(refuse()),
    }
    Trace::new(world.requests, shrink)
}

struct World {
    rng: Rng,
    /// Texts made so far.
    texts: u64,
    requests: Vec<Request>,
}

impl World {
    /// A text that nobody has had before.
    fn text(&mut self, len: usize) -> Run {
        self.texts += 1;
        Run::Text { first: self.texts << 32, len: len.max(1) }
    }

    /// A length of this mean, exponentially distributed behind the least one.
    fn length(&mut self, least: usize, mean: usize) -> usize {
        least + (-(1.0 - self.rng.unit()).ln() * mean as f64) as usize
    }

    /// Asks; gives the prompt with its answer behind it, as the next one may begin.
    fn ask(&mut self, prompt: Vec<Run>, output: usize) -> Vec<Run> {
        let output_len = self.length(1, output);
        let answer = Run::Output { request: self.requests.len(), len: output_len };
        self.requests.push(Request { prompt: prompt.clone(), output_len });
        [prompt, vec![answer]].concat()
    }

    fn chat(&mut self, requests: usize, scans: bool) {
        const LONGEST: usize = 60_000;
        let system = self.text(1000);
        // Conversations that go on, with the turn for which they are due.
        let mut waiting: Vec<(usize, Vec<Run>)> = Vec::new();
        let mut turn = 0;
        while self.requests.len() < requests {
            if scans && self.requests.len() % 2 == 1 {
                let len = self.length(500, 20_000);
                let prompt = vec![self.text(len)];
                self.ask(prompt, 250);
                continue;
            }
            let due = (0..waiting.len()).min_by_key(|&i| waiting[i].0);
            let (mut prompt, more, stays) = match due.filter(|&i| waiting[i].0 <= turn) {
                Some(i) => (waiting.swap_remove(i).1, self.length(50, 1500), 70),
                None => (vec![system], self.length(200, 6000), 40),
            };
            prompt.push(self.text(more));
            let so_far = self.ask(prompt, 300);
            if self.rng.chance(stays) && so_far.iter().map(Run::len).sum::<usize>() < LONGEST {
                waiting.push((turn + self.length(20, 200), so_far));
            }
            turn += 1;
        }
    }

    fn agents(&mut self, requests: usize) {
        const TASKS: usize = 24;
        const LONGEST: usize = 75_000;
        let systems: Vec<Run> = (0..8).map(|_| self.text(6000)).collect();
        let mut tasks: Vec<Vec<Vec<Run>>> = Vec::new();
        for _ in 0..requests {
            if tasks.len() < TASKS || self.rng.chance(5) {
                let skewed = self.rng.unit() * self.rng.unit() * systems.len() as f64;
                let task = vec![systems[skewed as usize], self.text(3000)];
                match tasks.len() {
                    TASKS => tasks[self.rng.below(TASKS as u64) as usize] = vec![task],
                    _ => tasks.push(vec![task]),
                }
            }
            let task = self.rng.below(tasks.len() as u64) as usize;
            let states = tasks[task].len();
            let state = match self.rng.chance(70) {
                true => states - 1,
                false => self.rng.below(states as u64) as usize,
            };
            let mut prompt = tasks[task][state].clone();
            let len = self.length(100, 1000);
            prompt.push(self.text(len));
            let so_far = self.ask(prompt, 150);
            if so_far.iter().map(Run::len).sum::<usize>() < LONGEST {
                tasks[task].push(so_far);
            }
        }
    }

    fn library(&mut self, documents: usize) -> Vec<Run> {
        (0..documents)
            .map(|_| {
                let len = self.length(2000, 10_000);
                self.text(len)
            })
            .collect()
    }

    fn question(&mut self, document: Run) {
        let len = self.length(20, 400);
        let prompt = vec![document, self.text(len)];
        self.ask(prompt, 250);
    }

    fn documents(&mut self, requests: usize) {
        const EXPONENT: f64 = 0.9;
        let library = self.library(2000);
        let mut sum = 0.0;
        let until: Vec<f64> = (1..=library.len())
            .map(|rank| {
                sum += (rank as f64).powf(-EXPONENT);
                sum
            })
            .collect();
        for _ in 0..requests {
            let at = self.rng.unit() * sum;
            let rank = until.partition_point(|&until| until < at).min(library.len() - 1);
            self.question(library[rank]);
        }
    }

    fn cycle(&mut self, requests: usize) {
        let library: Vec<Run> = (0..500).map(|_| self.text(12_288)).collect();
        for request in 0..requests {
            self.ask(vec![library[request % library.len()]], 60);
        }
    }

    fn phases(&mut self, requests: usize) {
        const PHASES: usize = 8;
        let library = self.library(500 * PHASES);
        for request in 0..requests {
            let favourites = &library[request * PHASES / requests * 500..][..500];
            let skewed = self.rng.unit() * self.rng.unit() * self.rng.unit();
            let document = favourites[(skewed * 500.0) as usize];
            self.question(document);
        }
    }

    fn recency(&mut self, requests: usize) {
        // The latest last.
        let mut stack: Vec<Run> = Vec::new();
        for _ in 0..requests {
            let document = match stack.is_empty() || self.rng.chance(30) {
                true => {
                    let len = self.length(2000, 8000);
                    self.text(len)
                }
                false => {
                    let depth = self.length(1, 40).min(stack.len());
                    stack.remove(stack.len() - depth)
                }
            };
            stack.push(document);
            self.ask(vec![document], 120);
        }
    }
}

#[cfg(test)]
mod tests {
    use hybridkv::manager::Eviction;

    use super::super::{Config, requests};
    use super::*;

    #[test]
    fn the_same_name_gives_the_same_requests() {
        for name in NAMES {
            let [one, two] = [1, 1].map(|_| generate(&format!("{name}:50,3"), 1).unwrap());
            let other = generate(&format!("{name}:50,4"), 1).unwrap();
            let prompts = |trace: &Trace| (0..50).map(|i| trace.prompt(i)).collect::<Vec<_>>();
            assert_eq!((one.len(), prompts(&one)), (50, prompts(&two)), "{name}");
            assert!(name == "loop" || prompts(&one) != prompts(&other), "{name}");
        }
        for wrong in ["", "chats", "chat:x", "chat:5,x", "chat:0"] {
            assert!(generate(wrong, 1).is_err(), "{wrong}");
        }
    }

    /// An eighth of the lengths, and pools that hold a part of each workload.
    #[test]
    fn the_default_policy_has_the_hits_of_lru_or_nearly() {
        const SHRINK: usize = 8;
        for name in NAMES {
            let trace = generate(&format!("{name}:1500"), SHRINK).unwrap();
            for groups in ["full", "full,sliding:128", "full,chunked:1024*3"] {
                let [lru, reuse] = [Eviction::Lru, Eviction::Reuse].map(|eviction| {
                    let config = Config::of_crate(groups, 16, 1 << 17, trace.longest()).unwrap();
                    let config = config.with_eviction(eviction);
                    requests(&trace, &config).unwrap().0.stats().hit_tokens
                });
                assert!(reuse as f64 >= 0.96 * lru as f64, "{name}, {groups}: {reuse}, LRU {lru}");
            }
        }
    }
}
