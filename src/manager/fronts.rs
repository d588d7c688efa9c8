//! Fronts: blocks that are found by what their first units hold, so that where groups have blocks of different
//! sizes hits end at multiples of the hashed unit instead of those of every block size.
//!
//! A block that others find is never written, and a sequence that hits a front goes on inside of it. So it goes on
//! in a block of its own: a copy of the one that was found ([`BlockCopy`]), or the one that a lower tier's copy is
//! loaded into. Copies are executed before any step that is submitted later, and nobody knows of a block that is not
//! settled whether the step that writes it has been submitted, or will fail: blocks are found at once, their fronts
//! when their tokens are settled.
//!
//! The keys of a block's fronts are those of its units. What a sequence leaves in an unfinished last block is kept
//! under the key of its last whole unit, as a block of its own that happens to hold less.

use super::offload::{OfferParts, offer_block};
use super::*;

impl Manager {
    /// Keeps what a sequence that ends has in its unfinished last blocks, and offers it to the host.
    pub(super) fn keep_unfinished(&mut self, sequence: &mut Sequence) {
        let Self { groups, policy, device, host, config, events, .. } = self;
        let mut parts: OfferParts<'_> =
            (&mut self.flights, events, &mut self.stats, &mut self.to_persist);
        let tokens = sequence.tokens.len();
        for (g, group) in groups.iter().enumerate().filter(|(_, group)| group.fronts) {
            let b = tokens / group.block_size;
            let id = sequence.rows[g].table.get(b);
            let block = device.pool.block(id);
            let Some((&key, fronts)) =
                sequence.tokens.hashes()[group.units_in(b, tokens)].split_last()
            else {
                continue;
            };
            // Who shares the block goes on in it; and one that is found by this key is enough.
            if id == NULL
                || block.users > 1
                || block.cached
                || !policy.finds(group, &sequence.boundaries, b)
                || device.find(g, &key) != NULL
            {
                continue;
            }
            device.insert((g, key), b, id, 0, parts.1);
            device.insert_fronts(id, fronts, parts.1);
            let block = device.pool.block_mut(id);
            (block.tenant, block.settled) = (sequence.tenant, true);
            if let (Some(host), Some(config)) = (&mut *host, &config.host)
                && sequence.computed == tokens
            {
                offer_block(config, device, host, &mut parts, sequence, (g, b));
            }
        }
    }
}
