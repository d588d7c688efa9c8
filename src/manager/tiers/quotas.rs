//! What tenants may hold of one tier: a limit for each, and their slots, the next to go first.

use crate::manager::eviction::Lists;
use crate::manager::quota::TenantId;

/// What a tenant holds.
#[derive(Debug, Clone, Copy)]
struct Account {
    most: usize,
    used: usize,
    /// Of these, slots that could be emptied now.
    evictable: usize,
}

/// The accounts of a tier.
pub(in super::super) struct Quotas {
    /// Tenant of each slot; 0 is nobody.
    tenant_of: Vec<TenantId>,
    /// Per tenant, its slots that hold or receive a block, the least recent first, ends of sequences before starts.
    lists: Lists,
    accounts: Vec<Account>,
}

impl Quotas {
    /// Accounts over so many slots, none of which is any tenant's.
    pub fn new(num_slots: u32) -> Self {
        let mut quotas = Self {
            tenant_of: vec![0; num_slots as usize],
            lists: Lists::new(num_slots, 0),
            accounts: Vec::new(),
        };
        quotas.set(0, usize::MAX);
        quotas
    }

    /// Limits a tenant, known or the next one.
    pub fn set(&mut self, tenant: TenantId, most: usize) {
        while self.accounts.len() <= tenant.into() {
            self.accounts.push(Account { most: usize::MAX, used: 0, evictable: 0 });
            self.lists.add();
        }
        self.accounts[usize::from(tenant)].most = most;
    }

    /// Bytes of all that is kept per slot.
    pub fn bytes(&self) -> usize {
        self.lists.bytes() + size_of_val(self.tenant_of.as_slice())
    }

    pub fn tenant_of(&self, slot: u32) -> TenantId {
        self.tenant_of[slot as usize]
    }

    /// Slots that a tenant holds.
    pub fn used(&self, tenant: TenantId) -> usize {
        self.account(tenant).used
    }

    /// Slots that it may take on top without giving up others.
    pub fn left(&self, tenant: TenantId) -> usize {
        let &Account { most, used, .. } = self.account(tenant);
        most.saturating_sub(used)
    }

    /// Slots that it could give up now.
    pub fn evictable(&self, tenant: TenantId) -> usize {
        self.account(tenant).evictable
    }

    /// A tenant that holds more than it may.
    pub fn over(&self) -> Option<TenantId> {
        let over = |account: &Account| account.used > account.most && account.evictable > 0;
        self.accounts.iter().position(over).map(|tenant| tenant as TenantId)
    }

    /// A tenant's slots, the next to go first.
    pub fn slots(&self, tenant: TenantId) -> impl Iterator<Item = u32> + '_ {
        self.lists.iter(tenant.into())
    }

    /// A slot, which nobody holds, is a tenant's.
    pub fn take(&mut self, slot: u32, tenant: TenantId) {
        self.tenant_of[slot as usize] = tenant;
        self.accounts[usize::from(tenant)].used += 1;
        self.lists.push_back(tenant.into(), slot);
    }

    /// What a slot held is gone; it was not evictable any more.
    pub fn give_up(&mut self, slot: u32) {
        let tenant = std::mem::take(&mut self.tenant_of[slot as usize]);
        self.accounts[usize::from(tenant)].used -= 1;
        self.lists.remove(slot);
    }

    /// A slot is its tenant's most recent one.
    pub fn touch(&mut self, slot: u32) {
        self.lists.remove(slot);
        self.lists.push_back(self.tenant_of(slot).into(), slot);
    }

    /// A slot can be emptied, or no longer.
    pub fn can_go(&mut self, slot: u32, can: bool) {
        let account = &mut self.accounts[usize::from(self.tenant_of[slot as usize])];
        match can {
            true => account.evictable += 1,
            false => account.evictable -= 1,
        }
    }

    fn account(&self, tenant: TenantId) -> &Account {
        // A tenant without an account of its own in this tier has no limit here.
        self.accounts.get(usize::from(tenant)).unwrap_or(&self.accounts[0])
    }
}
