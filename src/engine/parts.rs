//! How transfers are cut into parts of layers, so that a step can begin once the first layers of its blocks have
//! come, and a store once the first layers have been computed.
//!
//! A part is a run of layers of the model, the same for all groups: part `p` of a block are the bytes of those
//! of its layer slots whose layers belong to the run, one fragment, because slots are in the order of layers.
//! Part by part over all blocks of a batch, layers come in the order in which they are needed.
//!
//! A slot that a codec wrote is read by sections: a section of several parts comes with that of its first layer, and
//! goes with that of its last one.

use std::ops::Range;

use super::OP;
use super::format::{GroupFormat, SlotFormat};
use crate::error::{Error, Result};
use crate::manager::Direction;
use crate::spec::{GroupPlan, LayerGroup};

/// Transfers of one batch of whole blocks.
const WHOLE_BATCH: usize = 1024;
/// Transfers of one batch in parts: larger, because the first layer of a batch waits for all of the one before.
const LAYERED_BATCH: usize = 16 * 1024;

/// Transfers by layer. See [`Engine::load_by_layer`](super::Engine::load_by_layer) and
/// [`Engine::store_by_layer`](super::Engine::store_by_layer).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layerwise {
    /// Parts that a block comes in, at most one per layer. Each costs a launch and an event.
    pub parts: u32,
    /// What is submitted together and has fewer bytes than this comes in one part: launches would take longer than
    /// bytes.
    pub min_bytes: u64,
}

impl Default for Layerwise {
    /// 16 parts; 4 MiB, which are 80 us of a PCIe 5 link.
    fn default() -> Self {
        Self { parts: 16, min_bytes: 4 << 20 }
    }
}

/// The parts of blocks.
pub(super) struct Parts {
    count: usize,
    min_bytes: u64,
    block_bytes: u64,
    slots: SlotFormat,
    /// Whether states, of which every layer is part, come with the last part and not with the first.
    states_last: bool,
    /// Part of each model layer.
    of_layer: Vec<u32>,
    /// `[group][part]`: bytes of a block, or of a slot that a codec wrote.
    ranges: Vec<Vec<Range<u64>>>,
}

impl Parts {
    /// Blocks that move whole.
    pub fn whole(block_bytes: u64, slots: &SlotFormat) -> Self {
        Self {
            count: 1,
            min_bytes: 0,
            block_bytes,
            slots: slots.clone(),
            states_last: false,
            of_layer: Vec::new(),
            ranges: Vec::new(),
        }
    }

    /// The parts of the blocks of a plan, one way: loads bring the states with the first part, because every layer
    /// reads all of them; stores take them with the last, because every layer writes to them.
    pub fn of(
        plan: &GroupPlan,
        layerwise: Layerwise,
        block_bytes: u64,
        slots: &SlotFormat,
        direction: Direction,
    ) -> Result<Self> {
        let states_last = direction == Direction::Offload;
        let layers = || plan.groups.iter().flat_map(|group| &group.layers);
        let num_layers = layers().max().map_or(0, |last| *last as usize + 1);
        if layerwise.parts == 0 {
            return Err(Error::unsupported(OP, "parts of a block:", 0, "1 or more"));
        }
        let count = (layerwise.parts as usize).min(num_layers).max(1);
        let of_layer: Vec<u32> = (0..num_layers).map(|l| (l * count / num_layers) as u32).collect();
        let mut ranges = Vec::new();
        for (g, group) in plan.groups.iter().enumerate() {
            let slot_bytes = (group.block_size as usize)
                .checked_mul(group.shape.token_bytes())
                .filter(|bytes| bytes.is_multiple_of(16));
            let fits = slot_bytes
                .and_then(|bytes| bytes.checked_mul(group.layers.len()))
                .is_some_and(|bytes| bytes as u64 <= block_bytes);
            let (Some(slot_bytes), true) = (slot_bytes, fits && group.layers.is_sorted()) else {
                return Err(Error::invalid(
                    OP,
                    format!(
                        "group {g} cannot be moved by layer: its {} layers must be in ascending order and their \
                         slots, multiples of 16 bytes, must fit {block_bytes} bytes",
                        group.layers.len()
                    ),
                ));
            };
            let of_layer = |slot: usize| of_layer[group.layers[slot] as usize] as usize;
            ranges.push(match slots.encoded(g as u32) {
                Some(format) => sections(format, count, states_last, of_layer),
                None => layers_of(group, count, slot_bytes as u64, block_bytes, of_layer),
            });
        }
        Ok(Self {
            count,
            min_bytes: layerwise.min_bytes,
            block_bytes,
            slots: slots.clone(),
            states_last,
            of_layer,
            ranges,
        })
    }

    /// Transfers of one batch at most.
    pub fn batch(&self) -> usize {
        if self.count == 1 { WHOLE_BATCH } else { LAYERED_BATCH }
    }

    /// Parts that a batch of so many bytes comes in.
    pub fn count(&self, bytes: u64) -> usize {
        if bytes < self.min_bytes { 1 } else { self.count }
    }

    /// Bytes of a block of a group, or of its slot where a codec writes it, that part `part` of `count` moves.
    pub fn range(&self, group: u32, part: usize, count: usize) -> Range<u64> {
        match self.ranges.get(group as usize) {
            Some(ranges) if count > 1 => ranges[part].clone(),
            _ if part == if self.states_last { count - 1 } else { 0 } => {
                0..self.slots.moved_bytes(group, self.block_bytes)
            }
            _ => 0..0,
        }
    }

    /// Parts of a block at most.
    pub fn most(&self) -> usize {
        self.count
    }

    /// The part whose last layer this is, if it is one.
    pub fn ends_with(&self, layer: u32) -> Option<usize> {
        let part = *self.of_layer.get(layer as usize)?;
        (self.of_layer.get(layer as usize + 1) != Some(&part)).then_some(part as usize)
    }

    /// The part that a layer comes with.
    pub fn of_layer(&self, layer: u32) -> usize {
        self.of_layer.get(layer as usize).map_or(self.count - 1, |&part| part as usize)
    }
}

/// The parts of a block that is kept as it is.
fn layers_of(
    group: &LayerGroup,
    count: usize,
    layer_bytes: u64,
    block_bytes: u64,
    of_layer: impl Fn(usize) -> usize,
) -> Vec<Range<u64>> {
    let mut ranges = vec![0..0; count];
    for slot in 0..group.layers.len() {
        let end = match slot + 1 == group.layers.len() {
            true => block_bytes,
            false => (slot as u64 + 1) * layer_bytes,
        };
        extend(&mut ranges[of_layer(slot)], slot as u64 * layer_bytes..end);
    }
    ranges
}

/// The parts of a slot that a codec wrote: sections with the part of their first layer, or of their last one.
fn sections(
    format: &GroupFormat,
    count: usize,
    last: bool,
    of_layer: impl Fn(usize) -> usize,
) -> Vec<Range<u64>> {
    let mut ranges = vec![0..0; count];
    for section in &format.sections {
        let first = section.first_layer_slot as usize;
        let layer = if last { first + section.geometry.layers() - 1 } else { first };
        extend(&mut ranges[of_layer(layer)], section.offset..section.offset + section.bytes);
    }
    ranges
}

/// Makes a range reach to the end of one behind it.
fn extend(range: &mut Range<u64>, by: Range<u64>) {
    *range = if range.is_empty() { by } else { range.start..by.end };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::HostCodecs;
    use crate::spec::ModelSpec;

    #[test]
    fn parts_cover_every_block_once_and_every_layer_by_its_own_part() {
        for name in ModelSpec::preset_names() {
            let Ok(plan) = ModelSpec::preset(name).and_then(|spec| spec.group(16)) else {
                continue;
            };
            let ways = [Direction::Onboard, Direction::Offload];
            for (parts, way) in [1, 2, 7, 16, 1000].into_iter().flat_map(|p| ways.map(|w| (p, w))) {
                let layerwise = Layerwise { parts, min_bytes: 0 };
                let as_is = SlotFormat::AS_IS;
                let parts =
                    Parts::of(&plan, layerwise, plan.block_bytes as u64, &as_is, way).unwrap();
                let count = parts.count(1);
                let layers = 0..plan.groups.iter().map(|group| group.layers.len()).sum::<usize>();
                let ends: Vec<_> = layers.filter_map(|l| parts.ends_with(l as u32)).collect();
                assert_eq!(ends, (0..count).collect::<Vec<_>>(), "{name}: every part ends once");
                for (g, group) in plan.groups.iter().enumerate() {
                    let mut end = 0;
                    for range in (0..count).map(|part| parts.range(g as u32, part, count)) {
                        if !range.is_empty() {
                            assert_eq!(range.start, end, "{name}: a gap, or twice");
                            end = range.end;
                        }
                    }
                    assert_eq!(end, plan.block_bytes as u64, "{name}");
                    let slot = (group.block_size as usize * group.shape.token_bytes()) as u64;
                    for (s, &layer) in group.layers.iter().enumerate() {
                        let range = parts.range(g as u32, parts.of_layer(layer), count);
                        let s = s as u64;
                        assert!(range.start <= s * slot && (s + 1) * slot <= range.end, "{name}");
                    }
                }
                let states = plan.groups.len() as u32;
                let with = if way == Direction::Onboard { 0 } else { count - 1 };
                for part in 0..count {
                    let bytes = if part == with { plan.block_bytes as u64 } else { 0 };
                    assert_eq!(parts.range(states, part, count), 0..bytes);
                }
            }
        }
    }

    /// A section comes no later than the first of its layers is needed, and goes no sooner than the last is computed.
    #[test]
    fn sections_come_with_their_first_layer_and_go_with_their_last() {
        for (name, asked) in [("llama-4-scout", 1), ("llama-4-scout", 5), ("gpt-oss-20b", 12)] {
            let plan = ModelSpec::preset(name).unwrap().group(16).unwrap();
            let codecs = HostCodecs::default().in_sections(asked);
            let slots = SlotFormat::of(&plan, &codecs).unwrap();
            let ways = [Direction::Onboard, Direction::Offload];
            for (parts, way) in [1, 3, 16, 1000].into_iter().flat_map(|p| ways.map(|w| (p, w))) {
                let layerwise = Layerwise { parts, min_bytes: 0 };
                let parts =
                    Parts::of(&plan, layerwise, plan.block_bytes as u64, &slots, way).unwrap();
                let count = parts.count(1);
                for (g, (group, format)) in plan.groups.iter().zip(slots.groups()).enumerate() {
                    assert!(format.sections.len() >= asked as usize, "{name}");
                    for section in &format.sections {
                        let comes = (0..count)
                            .filter(|&p| parts.range(g as u32, p, count).contains(&section.offset));
                        let comes: Vec<usize> = comes.collect();
                        assert_eq!(comes.len(), 1, "{name}: once");
                        let first = section.first_layer_slot as usize;
                        for &layer in &group.layers[first..first + section.geometry.layers()] {
                            match way {
                                Direction::Onboard => assert!(comes[0] <= parts.of_layer(layer)),
                                _ => assert!(comes[0] >= parts.of_layer(layer)),
                            }
                        }
                    }
                }
            }
        }
    }
}
