//! Whether learning pays. A tier cannot run two policies at once, but what LRU would have had is known without
//! it: a use of a content whose last use is less than a turnover of the tier ago. So the hits of the policy are
//! counted beside those, over the same sample of contents. Where LRU would have had clearly more, it rules for
//! a while; then the policy gets another chance, after a time that doubles with every one that it did not use.

/// Of what was counted a lesson ago, this much counts now.
const DECAY: f64 = 0.98;
/// Lessons that the policy is given before it is judged again, and that LRU rules for after the first defeat.
const CHANCE: u32 = 24;
const REST: u32 = 128;
/// The longest rest is `REST << MAX_DEFEATS`.
const MAX_DEFEATS: u32 = 10;
/// LRU is better when it would have had so many hits more: this share of the policy's, this many standard
/// deviations of its own number, and a few.
const SHARE: f64 = 0.02;
const DEVIATIONS: f64 = 2.0;
const FEW: f64 = 4.0;

#[derive(Default)]
pub(super) struct Duel {
    /// Uses that LRU would have had, and that the tier had; faded.
    lru: f64,
    own: f64,
    lru_rules: bool,
    defeats: u32,
    lesson: u32,
    /// The lesson at which the present state ends: the chance, or the rest.
    until: u32,
}

impl Duel {
    /// Whether the tier goes by LRU now.
    pub fn lru_rules(&self) -> bool {
        self.lru_rules
    }

    /// Notes a use that LRU would have had, or not, and the tier had, or not.
    pub fn used(&mut self, lru: bool, own: bool) {
        self.lru += f64::from(u8::from(lru));
        self.own += f64::from(u8::from(own));
    }

    /// Judges, once per lesson.
    pub fn judge(&mut self) {
        self.lesson = self.lesson.saturating_add(1);
        self.lru *= DECAY;
        self.own *= DECAY;
        if self.lesson < self.until {
            return;
        }
        if self.lru_rules {
            *self = Self {
                defeats: self.defeats,
                lesson: self.lesson,
                until: self.lesson.saturating_add(CHANCE),
                ..Self::default()
            };
        } else if self.lru > self.own * (1.0 + SHARE) + DEVIATIONS * self.lru.sqrt() + FEW {
            self.lru_rules = true;
            self.until = self.lesson.saturating_add(REST << self.defeats);
            self.defeats = (self.defeats + 1).min(MAX_DEFEATS);
        }
    }
}
