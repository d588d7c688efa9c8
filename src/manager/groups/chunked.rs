//! Chunked attention: a prefix needs its last, unfinished chunk only; at a chunk edge it needs nothing.

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
        match needed.into_iter().find(|&b| !present(b)) {
            None => return end,
            // Alignment can carry the end back into an earlier chunk, which has needs of its own.
            Some(b) => end = align_down(b * group.block_size, alignment),
        }
    }
}
