//! Sliding windows: a prefix needs the blocks with the `window - 1` tokens before its end and no others, so the
//! search goes from right to left for a run of them.

use super::Group;

pub(super) fn longest(
    group: &Group,
    limit: usize,
    alignment: usize,
    present: impl Fn(usize, usize) -> bool,
) -> usize {
    let mut end = limit;
    // Every longer prefix up to the missing block needs it, too.
    while let Some(b) = group.tail(end).rev().find(|&b| !present(b, end)) {
        end = group.without(b, end, alignment);
    }
    end
}
