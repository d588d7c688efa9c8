//! How transfers are cut into parts of layers, so that a step can begin once the first layers of its blocks have
//! come, and a store once the first layers have been computed.
//!
//! A part is a run of layers of the model, the same for all groups: part `p` of a block are the bytes of those
//! of its layer slots whose layers belong to the run, one fragment, because slots are in the order of layers.
//! Part by part over all blocks of a batch, layers come in the order in which they are needed.

use std::ops::Range;

use super::OP;
use crate::error::{Error, Result};
use crate::manager::Direction;
use crate::spec::GroupPlan;

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
    /// Whether states, of which every layer is part, come with the last part and not with the first.
    states_last: bool,
    /// Part of each model layer.
    of_layer: Vec<u32>,
    /// `[group][part]`: bytes of a block.
    ranges: Vec<Vec<Range<u64>>>,
}

impl Parts {
    /// Blocks that move whole.
    pub fn whole(block_bytes: u64) -> Self {
        Self {
            count: 1,
            min_bytes: 0,
            block_bytes,
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
        direction: Direction,
    ) -> Result<Self> {
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
            let mut of_group = vec![0..0; count];
            for (slot, &layer) in group.layers.iter().enumerate() {
                let range: &mut Range<u64> = &mut of_group[of_layer[layer as usize] as usize];
                if range.is_empty() {
                    range.start = (slot * slot_bytes) as u64;
                }
                range.end = match slot + 1 == group.layers.len() {
                    true => block_bytes,
                    false => ((slot + 1) * slot_bytes) as u64,
                };
            }
            ranges.push(of_group);
        }
        Ok(Self {
            count,
            min_bytes: layerwise.min_bytes,
            block_bytes,
            states_last: direction == Direction::Offload,
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

    /// Bytes of a block of a group that part `part` of `count` moves.
    pub fn range(&self, group: u32, part: usize, count: usize) -> Range<u64> {
        match self.ranges.get(group as usize) {
            Some(ranges) if count > 1 => ranges[part].clone(),
            _ if part == if self.states_last { count - 1 } else { 0 } => 0..self.block_bytes,
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

#[cfg(test)]
mod tests {
    use super::*;
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
                let parts = Parts::of(&plan, layerwise, plan.block_bytes as u64, way).unwrap();
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
}
