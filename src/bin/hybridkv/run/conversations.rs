//! The built-in workload: multi-turn conversations of Zipf-like popularity under shared system prompts.
//!
//! A turn's prompt is the whole history (system prompt, earlier user turns and our outputs) and a new user
//! turn. A conversation that has become too long is replaced by a fresh one.

use hybridkv::ops::synthetic::splitmix64;

use crate::trace::output_token;

/// Exponent of the popularity of conversations by rank.
const ZIPF_EXPONENT: f64 = 0.6;

/// A seeded sequence of random numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(splitmix64(seed))
    }

    /// The next 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        splitmix64(self.0)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        ((self.next() as u128 * bound as u128) >> 64) as usize
    }

    /// A number in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// A length spread evenly between half and one and a half of `mean`, at least 1.
    fn about(&mut self, mean: usize) -> usize {
        (mean / 2 + self.below(mean.max(1))).max(1)
    }
}

/// Sizes of the workload, in tokens where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Conversations alive at once.
    pub conversations: usize,
    /// System prompts that they share.
    pub system_prompts: usize,
    /// Length of a system prompt.
    pub system: usize,
    /// Mean length of a user turn.
    pub user: usize,
    /// Mean length of an output.
    pub output: usize,
    /// A conversation longer than this is replaced.
    pub context: usize,
}

impl Sizes {
    /// Every length divided by `factor`.
    pub fn shrunk(self, factor: usize) -> Self {
        let by = |n: usize| (n / factor).max(1);
        Self {
            system: by(self.system),
            user: by(self.user),
            output: by(self.output),
            context: by(self.context),
            ..self
        }
    }

    /// No request is longer: prompt and output.
    pub fn longest(&self) -> usize {
        self.system.max(self.context) + 2 * (self.user + self.output) + 2
    }
}

#[derive(Debug)]
struct Conversation {
    history: Vec<u32>,
    /// Index of its latest request.
    latest: Option<usize>,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// History and user turn.
    pub prompt: Vec<u32>,
    /// Tokens to put out.
    pub output_len: usize,
    /// The request whose output is in the history: it must have ended.
    pub after: Option<usize>,
}

/// Generates turns; request `i` is the `i`-th one drawn.
#[derive(Debug)]
pub struct Conversations {
    sizes: Sizes,
    random: Random,
    systems: Vec<Vec<u32>>,
    live: Vec<Conversation>,
    /// Cumulative popularity by rank.
    popularity: Vec<f64>,
    drawn: usize,
}

impl Conversations {
    /// Conversations of these sizes; equal seeds give equal turns.
    pub fn new(sizes: Sizes, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let systems =
            (0..sizes.system_prompts.max(1)).map(|_| tokens(&mut random, sizes.system)).collect();
        let mut total = 0.0;
        let popularity = (0..sizes.conversations.max(1))
            .map(|rank| {
                total += (rank as f64 + 1.0).powf(-ZIPF_EXPONENT);
                total
            })
            .collect();
        let live = (0..sizes.conversations.max(1))
            .map(|_| Conversation { history: Vec::new(), latest: None })
            .collect();
        Self { sizes, random, systems, live, popularity, drawn: 0 }
    }

    /// The next turn.
    pub fn next(&mut self) -> Turn {
        let total = self.popularity.last().copied().unwrap_or(1.0);
        let at = self.random.unit() * total;
        let rank = self.popularity.partition_point(|&p| p <= at).min(self.live.len() - 1);
        let conversation = &mut self.live[rank];
        if conversation.history.is_empty() || conversation.history.len() > self.sizes.context {
            let system = &self.systems[self.random.below(self.systems.len())];
            *conversation = Conversation { history: system.clone(), latest: None };
        }
        let user = self.random.about(self.sizes.user);
        conversation.history.extend(tokens(&mut self.random, user));
        let turn = Turn {
            prompt: conversation.history.clone(),
            output_len: self.random.about(self.sizes.output),
            after: conversation.latest,
        };
        conversation.history.extend((0..turn.output_len).map(|j| output_token(self.drawn, j)));
        conversation.latest = Some(self.drawn);
        self.drawn += 1;
        turn
    }
}

fn tokens(random: &mut Random, count: usize) -> Vec<u32> {
    (0..count).map(|_| random.below(100_000) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes {
        conversations: 5,
        system_prompts: 2,
        system: 40,
        user: 20,
        output: 10,
        context: 200,
    };

    #[test]
    fn turns_repeat_by_seed_and_extend_what_came_before() {
        let draw = |seed| {
            let mut source = Conversations::new(SIZES, seed);
            (0..60).map(|_| source.next()).collect::<Vec<_>>()
        };
        let turns = draw(3);
        assert_eq!(turns, draw(3));
        assert_ne!(turns, draw(4));
        assert!(turns.iter().any(|turn| turn.after.is_some()));
        for turn in &turns {
            assert!(turn.prompt.len() + turn.output_len <= SIZES.longest());
            if let Some(after) = turn.after {
                let before = &turns[after];
                let outputs = (0..before.output_len).map(|j| output_token(after, j));
                let history: Vec<u32> = before.prompt.iter().copied().chain(outputs).collect();
                assert_eq!(turn.prompt[..history.len()], history);
                assert!(turn.prompt.len() > history.len());
            }
        }
        let mut systems: Vec<_> = turns.iter().map(|turn| turn.prompt[..40].to_vec()).collect();
        systems.sort();
        systems.dedup();
        assert_eq!(systems.len(), 2);
    }

    #[test]
    fn low_ranks_are_more_popular() {
        let mut source = Conversations::new(Sizes { context: usize::MAX / 2, ..SIZES }, 1);
        for _ in 0..500 {
            source.next();
        }
        let lengths: Vec<usize> = source.live.iter().map(|c| c.history.len()).collect();
        assert!(lengths[0] > 3 * lengths[4] / 2, "{lengths:?}");
    }
}
