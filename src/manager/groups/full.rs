//! Full attention: every block of the prefix is needed, so hits end at the first miss.

use super::{Group, align_down};

pub(super) fn longest(
    group: &Group,
    limit: usize,
    alignment: usize,
    present: impl Fn(usize) -> bool,
) -> usize {
    let end = limit / group.block_size;
    let hit = (0..end).find(|&b| !present(b)).unwrap_or(end);
    align_down(hit * group.block_size, alignment)
}
