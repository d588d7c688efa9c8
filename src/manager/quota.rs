//! Quotas: how much of a lower tier the blocks of one tenant (a cache salt) may take.
//!
//! A tenant that is at its quota makes room by its own blocks alone; one that is over it, because the quota was
//! lowered, gives way before everybody else. So nobody's prefixes are evicted by a tenant that has had its share.
//! On the device, where blocks are those of running sequences, admission limits a tenant, not a quota.

use std::collections::HashMap;

use super::*;

/// A tenant with a quota in some tier; 0 is everybody else.
pub(super) type TenantId = u16;

/// What a tenant may hold of a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    blocks: usize,
}

impl Quota {
    /// So many bytes, in a tier of blocks of `block_bytes`; what is left of them holds no block.
    ///
    /// # Errors
    /// `QuotaTooSmall` for fewer bytes than a block has, or blocks of none.
    pub fn of_bytes(bytes: u64, block_bytes: u64) -> Result<Self> {
        match bytes.checked_div(block_bytes) {
            None | Some(0) => {
                Err(Error::new("quota", ErrorKind::QuotaTooSmall { bytes, block_bytes }))
            }
            Some(blocks) => Ok(Self { blocks: usize::try_from(blocks).unwrap_or(usize::MAX) }),
        }
    }

    /// Blocks that it allows.
    pub fn blocks(&self) -> usize {
        self.blocks
    }
}

/// The tenants that have quotas, by what their tokens say of their salt.
#[derive(Default)]
pub(super) struct Tenants {
    ids: HashMap<BlockHash, TenantId>,
    /// Of each tenant from 1 on: blocks in the host and in the storage tier.
    limits: Vec<[usize; 2]>,
}

impl Tenants {
    /// The tenant of tokens.
    pub fn of(&self, tokens: &HashedTokens) -> TenantId {
        if self.ids.is_empty() { 0 } else { self.ids.get(&tokens.salt()).copied().unwrap_or(0) }
    }

    /// Makes a tier keep to the quotas.
    pub fn apply(&self, tier: &mut SlotTier, place: usize) {
        for (tenant, limits) in (1..).zip(&self.limits) {
            tier.set_quota(tenant, limits[place]);
        }
    }
}

/// The index of a lower tier's limits.
pub(super) const HOST: usize = 0;
pub(super) const STORAGE: usize = 1;

impl Manager {
    /// Limits what the blocks of a cache salt may take of the host or the storage tier, or, with `None`, no longer.
    /// It holds across tiers that come and go. Blocks that a tier has already are counted where the salt had a quota in
    /// any tier when they were stored. What such a tenant loses to its own quota goes least recently used first,
    /// whatever the tier's policy.
    ///
    /// # Errors
    /// `Unsupported` for the device, and for more than 65,535 salts; nothing is changed.
    pub fn set_quota(&mut self, tier: Tier, salt: &str, quota: Option<Quota>) -> Result<()> {
        const OP: &str = "quota";
        let place = match tier {
            Tier::Host => HOST,
            Tier::Storage => STORAGE,
            Tier::Device => {
                let supported =
                    "the host and storage tiers; on the device admission limits a tenant";
                return Err(Error::unsupported(OP, "a quota on", "the device", supported));
            }
        };
        let key = HashedTokens::salt_of(salt);
        let next = self.tenants.limits.len() + 1;
        let tenant = match self.tenants.ids.get(&key) {
            Some(&tenant) => tenant,
            None => {
                let Ok(tenant) = TenantId::try_from(next) else {
                    let most = format!("up to {}", TenantId::MAX);
                    return Err(Error::unsupported(OP, "a number of salts of", next, most));
                };
                self.tenants.ids.insert(key, tenant);
                self.tenants.limits.push([usize::MAX; 2]);
                for sequence in self.sequences.values_mut() {
                    sequence.tenant = self.tenants.of(&sequence.tokens);
                }
                tenant
            }
        };
        self.tenants.limits[usize::from(tenant) - 1][place] =
            quota.map_or(usize::MAX, |quota| quota.blocks);
        for (tier, place) in [(&mut self.host, HOST), (&mut self.storage, STORAGE)] {
            if let Some(tier) = tier {
                self.tenants.apply(tier, place);
            }
        }
        Ok(())
    }

    /// Blocks of the host or the storage tier that count for a salt; `None` without quotas for it, and for the
    /// device.
    pub fn quota_used(&self, tier: Tier, salt: &str) -> Option<usize> {
        let &tenant = self.tenants.ids.get(&HashedTokens::salt_of(salt))?;
        let tier = match tier {
            Tier::Host => self.host.as_ref(),
            Tier::Storage => self.storage.as_ref(),
            Tier::Device => return None,
        };
        Some(tier.map_or(0, |tier| tier.used_by(tenant)))
    }
}
