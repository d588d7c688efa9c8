//! Sliding windows: a prefix needs the `ceil((window - 1) / block_size)` blocks before its end and no
//! others, so the search goes from right to left for a run of them.

use super::{Group, align_down};

pub(super) fn longest(
    group: &Group,
    limit: usize,
    alignment: usize,
    present: impl Fn(usize) -> bool,
) -> usize {
    let mut end = limit;
    loop {
        let needed = group.first_needed(end)..end / group.block_size;
        match needed.rev().find(|&b| !present(b)) {
            None => return end,
            // Every longer end up to here needs the missing block, too.
            Some(b) => end = align_down(b * group.block_size, alignment),
        }
    }
}
