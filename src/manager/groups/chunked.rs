//! Chunked attention: a prefix needs its last, unfinished chunk only; at a chunk edge it needs nothing.

use super::Group;

pub(super) fn longest(
    group: &Group,
    limit: usize,
    alignment: usize,
    present: impl Fn(usize, usize) -> bool,
) -> usize {
    let mut end = limit;
    // A shorter prefix can end in an earlier chunk, which has needs of its own.
    while let Some(b) = group.tail(end).find(|&b| !present(b, end)) {
        end = group.without(b, end, alignment);
    }
    end
}
