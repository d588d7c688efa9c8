//! A memory of contents, the lost ones included: 8 bytes per entry, and as many entries as the tier has
//! blocks. Contents share lines of eight entries, of which the oldest makes room; two are taken for the same
//! once in 2^29 uses, which costs a wrong guess of their worth and nothing else.

/// Bits of what is remembered besides the time.
const INFO_BITS: u32 = 5;
/// The most that can be remembered.
const INFO_MASK: u32 = (1 << INFO_BITS) - 1;
/// Times are counted modulo this.
const TIME_MASK: u32 = (1 << (32 - INFO_BITS)) - 1;
const WAYS: usize = 8;

/// One entry; `info` is 0 where there is none.
#[derive(Clone, Copy, Default)]
struct Slot {
    tag: u32,
    /// Time and info.
    data: u32,
}

/// What is remembered of a content: how long ago it was written down, and what was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    pub age: u32,
    pub info: u32,
}

/// What was there when a content was written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    /// The content itself.
    Same(Memory),
    /// Another one, which made room.
    Other(Memory),
    Nothing,
}

pub(super) struct History {
    lines: Vec<[Slot; WAYS]>,
}

impl History {
    pub fn new(entries: u32) -> Self {
        Self { lines: vec![[Slot::default(); WAYS]; (entries as usize).div_ceil(WAYS).max(1)] }
    }

    /// Bytes of all entries.
    pub fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
    }

    /// Places of the first `lines` lines.
    pub fn len(&self, lines: usize) -> usize {
        self.lines.len().min(lines) * WAYS
    }

    /// What is remembered at a place.
    pub fn info(&self, at: usize) -> u32 {
        self.lines[at / WAYS][at % WAYS].data & INFO_MASK
    }

    /// The line of a content.
    pub fn line(&self, key: u64) -> usize {
        // The low half of the key as a fraction of all lines; the high half tells contents apart.
        ((u64::from(key as u32) * self.lines.len() as u64) >> 32) as usize
    }

    /// Reads the line of a content that is about to be written down.
    pub fn warm(&self, key: u64) {
        std::hint::black_box(self.lines[self.line(key)][0].tag);
    }

    /// Writes a content down; `info`, not 0, follows from what is remembered of it. Gives the place, and what was there.
    pub fn write(
        &mut self,
        key: u64,
        now: u32,
        info: impl FnOnce(Option<Memory>) -> u32,
    ) -> (usize, Before) {
        let (number, tag) = (self.line(key), (key >> 32) as u32);
        let line = &mut self.lines[number];
        let same = line.iter().position(|slot| slot.tag == tag && slot.data & INFO_MASK != 0);
        let at = same.unwrap_or_else(|| {
            let age = |slot: &Slot| match slot.data & INFO_MASK {
                0 => u32::MAX,
                _ => memory(slot, now).age,
            };
            (0..WAYS).max_by_key(|&i| age(&line[i])).unwrap_or(0)
        });
        let old = (line[at].data & INFO_MASK != 0).then(|| memory(&line[at], now));
        let info = info(same.and(old)).min(INFO_MASK);
        line[at] = Slot { tag, data: (now & TIME_MASK) << INFO_BITS | info };
        let before = match (same, old) {
            (_, None) => Before::Nothing,
            (Some(_), Some(memory)) => Before::Same(memory),
            (None, Some(memory)) => Before::Other(memory),
        };
        (number * WAYS + at, before)
    }

    /// Takes out what is remembered of a content.
    pub fn take(&mut self, key: u64, now: u32) -> Option<Memory> {
        let (line, tag) = (self.line(key), (key >> 32) as u32);
        let line = &mut self.lines[line];
        let slot = line.iter_mut().find(|slot| slot.tag == tag && slot.data & INFO_MASK != 0)?;
        Some(memory(&std::mem::take(slot), now))
    }

    /// All that is remembered in the first `lines` lines.
    pub fn sample(&self, lines: usize, now: u32) -> impl Iterator<Item = Memory> + '_ {
        let slots = self.lines.iter().take(lines).flatten();
        slots.filter(|slot| slot.data & INFO_MASK != 0).map(move |slot| memory(slot, now))
    }
}

fn memory(slot: &Slot, now: u32) -> Memory {
    let age = now.wrapping_sub(slot.data >> INFO_BITS) & TIME_MASK;
    Memory { age, info: slot.data & INFO_MASK }
}
