//! Full attention: every block of the prefix is needed, so hits end at the first miss.

use super::Group;

pub(super) fn longest(
    group: &Group,
    limit: usize,
    alignment: usize,
    present: impl Fn(usize, usize) -> bool,
) -> usize {
    let mut end = limit;
    // What misses is the same for every shorter prefix, but for a shorter front.
    let mut from = 0;
    while let Some(b) = (from..end.div_ceil(group.block_size)).find(|&b| !present(b, end)) {
        from = b;
        end = group.without(b, end, alignment);
    }
    end
}
