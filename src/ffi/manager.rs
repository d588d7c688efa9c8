//! The manager in the C ABI: every function turns its arguments into those of [`Manager`] and passes them on.

use std::collections::VecDeque;
use std::ffi::c_char;

use super::header::*;
use super::raw::{Arguments, arguments, array, array_mut, hand_out, handle, out, take_back, text};
use super::{config, guard};
use crate::engine::map_slots;
use crate::error::{Error, Result};
use crate::manager::{
    Allocation, Completion, Direction, ExtraKeys, Manager, Outcome, Place, Quota, SeqId, Tier,
    Transfer,
};

/// A manager, and what it has told and nobody has taken: events, sequences whose prefetch is over.
pub(super) struct hkv_manager {
    pub manager: Manager,
    pub events: VecDeque<hkv_event>,
    pub prefetched: VecDeque<u64>,
}

// SAFETY: `struct_bytes` is the first field.
unsafe impl Arguments for hkv_step_args {}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_create(
    config: *const c_char,
    manager: *mut *mut hkv_manager,
) -> hkv_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let config = text("hkv_manager_create", "config", config)?;
        hand_out(manager, || {
            if config.is_empty() {
                return Err(Error::invalid("hkv_manager_create", "config is null or empty"));
            }
            Ok(hkv_manager {
                manager: config::manager(config)?,
                events: VecDeque::new(),
                prefetched: VecDeque::new(),
            })
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_destroy(manager: *mut hkv_manager) {
    // SAFETY: the caller's promise.
    unsafe { take_back(manager) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_lookup(
    manager: *const hkv_manager,
    tokens: *const u32,
    num_tokens: u64,
    salt: *const c_char,
    lora: *const c_char,
    hit: *mut hkv_hit,
) -> hkv_status {
    const OP: &str = "hkv_manager_lookup";
    // SAFETY: the caller's promise: a live handle, arrays of their lengths, strings that end.
    guard(|| unsafe {
        let manager = &handle(OP, "manager", manager)?.manager;
        let tokens = array(OP, "tokens", tokens, num_tokens)?;
        let found = manager.lookup(tokens, keys(OP, salt, lora)?);
        *out(OP, "hit", hit)? = hkv_hit {
            tokens: found.tokens as u64,
            device_tokens: found.device_tokens as u64,
            host_tokens: found.host_tokens as u64,
        };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_allocate(
    manager: *mut hkv_manager,
    seq: u64,
    tokens: *const u32,
    num_tokens: u64,
    budget: u64,
    salt: *const c_char,
    lora: *const c_char,
    allocation: *mut hkv_allocation,
) -> hkv_status {
    const OP: &str = "hkv_manager_allocate";
    // SAFETY: as for `hkv_manager_lookup`; nobody else uses the manager meanwhile.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let tokens = array(OP, "tokens", tokens, num_tokens)?;
        let allocation = out(OP, "allocation", allocation)?;
        let keys = keys(OP, salt, lora)?;
        let budget = match budget {
            0 => tokens.len().max(1),
            budget => usize::try_from(budget).unwrap_or(usize::MAX),
        };
        let given = manager.allocate_prefill(seq, tokens, budget, keys, 0)?;
        *allocation = given.into();
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_append(
    manager: *mut hkv_manager,
    seq: u64,
    tokens: *const u32,
    num_tokens: u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_append";
    // SAFETY: as for `hkv_manager_allocate`.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        manager.append_with(seq, array(OP, "tokens", tokens, num_tokens)?, |_, _| {})
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_step(
    manager: *const hkv_manager,
    args: *const hkv_step_args,
    num_block_ids: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_step";
    // SAFETY: the caller's promise: a live handle, arrays of the lengths that the header gives.
    guard(|| unsafe {
        let manager = &handle(OP, "manager", manager)?.manager;
        let num_block_ids = out(OP, "num_block_ids", num_block_ids)?;
        step(OP, manager, arguments(OP, args)?, num_block_ids)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_advance(
    manager: *mut hkv_manager,
    seq: u64,
    computed: u64,
    settled: u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_advance";
    // SAFETY: the caller's promise: a live handle that nobody else uses meanwhile.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let [computed, settled] =
            [computed, settled].map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX));
        manager.advance_with(seq, computed, settled, |_, _| {})
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_overlap(manager: *mut hkv_manager, seq: u64) -> hkv_status {
    // SAFETY: as for `hkv_manager_advance`.
    guard(|| unsafe { out("hkv_manager_overlap", "manager", manager)?.manager.overlap(seq) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_free(manager: *mut hkv_manager, seq: u64) -> hkv_status {
    // SAFETY: as for `hkv_manager_advance`.
    guard(|| unsafe { out("hkv_manager_free", "manager", manager)?.manager.free(seq) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_abort(
    manager: *mut hkv_manager,
    seq: u64,
    dependents: *mut u64,
    max_dependents: u64,
    num_dependents: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_abort";
    // SAFETY: as for `hkv_manager_advance`; an array of its length.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let room = array_mut(OP, "dependents", dependents, max_dependents)?;
        let num = out(OP, "num_dependents", num_dependents)?;
        name(manager.abort(seq)?, room, num);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_copies(
    manager: *mut hkv_manager,
    copies: *mut hkv_block_copy,
    max: u64,
    num: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_copies";
    // SAFETY: as for `hkv_manager_abort`.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let room = array_mut(OP, "copies", copies, max)?;
        let next = || manager.next_copy();
        fill(room, out(OP, "num", num)?, std::iter::from_fn(next), |copy| hkv_block_copy {
            group: copy.group,
            from: copy.from,
            to: copy.to,
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_transfers(
    manager: *mut hkv_manager,
    transfers: *mut hkv_transfer,
    max: u64,
    num: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_transfers";
    // SAFETY: as for `hkv_manager_abort`.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let room = array_mut(OP, "transfers", transfers, max)?;
        let next = || manager.next_transfer();
        fill(room, out(OP, "num", num)?, std::iter::from_fn(next), hkv_transfer::from)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_complete(
    manager: *mut hkv_manager,
    id: u64,
    succeeded: u32,
    completion: *mut hkv_completion,
) -> hkv_status {
    const OP: &str = "hkv_manager_complete";
    // SAFETY: as for `hkv_manager_advance`; a place to write to.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let completion = out(OP, "completion", completion)?;
        let outcome = if succeeded == 1 { Outcome::Succeeded } else { Outcome::Failed };
        *completion = manager.complete(id, outcome)?.into();
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_next_completion(
    manager: *mut hkv_manager,
    completion: *mut hkv_completion,
) -> hkv_status {
    const OP: &str = "hkv_manager_next_completion";
    // SAFETY: as for `hkv_manager_complete`.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let completion = out(OP, "completion", completion)?;
        *completion = manager.next_completion().unwrap_or(Completion::Pending).into();
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_pin(
    manager: *mut hkv_manager,
    tier: u32,
    tokens: *const u32,
    num_tokens: u64,
    salt: *const c_char,
    lora: *const c_char,
    pin: *mut hkv_pin,
) -> hkv_status {
    const OP: &str = "hkv_manager_pin";
    // SAFETY: as for `hkv_manager_allocate`.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let tokens = array(OP, "tokens", tokens, num_tokens)?;
        let place = out(OP, "pin", pin)?;
        let prompt = manager.hash(tokens, keys(OP, salt, lora)?);
        let pin = manager.pin(to_tier(OP, tier)?, &prompt)?;
        *place = hkv_pin { id: pin.id, tokens: pin.tokens as u64, blocks: pin.blocks as u64 };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_unpin(manager: *mut hkv_manager, pin: u64) -> hkv_status {
    // SAFETY: as for `hkv_manager_advance`.
    guard(|| unsafe { out("hkv_manager_unpin", "manager", manager)?.manager.unpin(pin) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_set_quota(
    manager: *mut hkv_manager,
    tier: u32,
    salt: *const c_char,
    bytes: u64,
    block_bytes: u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_set_quota";
    // SAFETY: as for `hkv_manager_advance`; a string that ends.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let quota = match bytes {
            u64::MAX => None,
            bytes => Some(Quota::of_bytes(bytes, block_bytes)?),
        };
        manager.set_quota(to_tier(OP, tier)?, text(OP, "salt", salt)?, quota)
    })
}

fn to_tier(op: &'static str, tier: u32) -> Result<Tier> {
    match tier {
        HKV_DEVICE => Ok(Tier::Device),
        HKV_HOST => Ok(Tier::Host),
        HKV_STORAGE => Ok(Tier::Storage),
        _ => Err(Error::unsupported(op, "tier", tier, "enum hkv_tier, 0 to 2")),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_tick(manager: *mut hkv_manager, now: u64) -> hkv_status {
    // SAFETY: as for `hkv_manager_advance`.
    guard(|| unsafe { out("hkv_manager_tick", "manager", manager)?.manager.tick(now) })
}

impl From<Allocation> for hkv_allocation {
    fn from(given: Allocation) -> Self {
        Self {
            hit_tokens: given.hit_tokens as u64,
            device_hit_tokens: given.device_hit_tokens as u64,
            host_hit_tokens: given.host_hit_tokens as u64,
            num_tokens: given.num_tokens as u64,
            num_loads: given.loads.len() as u64,
        }
    }
}

impl From<Transfer> for hkv_transfer {
    fn from(transfer: Transfer) -> Self {
        let index = |place| match place {
            Place::Device(index) | Place::Host(index) | Place::Storage(index) => index,
        };
        Self {
            id: transfer.id,
            seq: transfer.seq.unwrap_or(0),
            has_seq: u32::from(transfer.seq.is_some()),
            direction: match transfer.path.direction() {
                Direction::Offload => HKV_OFFLOAD,
                Direction::Onboard => HKV_ONBOARD,
                Direction::Persist => HKV_PERSIST,
                Direction::Fetch => HKV_FETCH,
            },
            group: transfer.group,
            from: index(transfer.path.from()),
            to: index(transfer.path.to()),
            reserved: 0,
            hash: *transfer.hash.as_bytes(),
        }
    }
}

impl From<Completion> for hkv_completion {
    fn from(completion: Completion) -> Self {
        let (kind, seq, valid_tokens) = match completion {
            Completion::Pending => (HKV_COMPLETION_NONE, 0, 0),
            Completion::Ready { seq, valid_tokens } => (HKV_COMPLETION_READY, seq, valid_tokens),
            Completion::Dropped { seq } => (HKV_COMPLETION_DROPPED, seq, 0),
            Completion::Void { seq } => (HKV_COMPLETION_VOID, seq, 0),
        };
        Self { kind, reserved: 0, seq, valid_tokens: valid_tokens as u64 }
    }
}

/// Writes the arrays of a step, or, without room for block ids, only how many of them there are.
///
/// # Safety
/// The arrays have the lengths that the header gives.
unsafe fn step(
    op: &'static str,
    manager: &Manager,
    args: &hkv_step_args,
    num_block_ids: &mut u64,
) -> Result<()> {
    let groups = &manager.config().groups;
    let num_groups = args.num_groups as usize;
    if num_groups > groups.len() {
        return Err(Error::invalid(
            op,
            format!("num_groups is {num_groups}, the manager has {}", groups.len()),
        ));
    }
    // SAFETY: the caller's promise.
    let seqs = unsafe { array(op, "seqs", args.seqs, args.num_seqs.into())? };
    let tokens: u64 = seqs.iter().map(|slice| u64::from(slice.tokens)).sum();
    if tokens != u64::from(args.num_tokens) {
        return Err(Error::invalid(
            op,
            format!("num_tokens is {}, the slices have {tokens}", args.num_tokens),
        ));
    }
    let mut needed = 0;
    for slice in seqs {
        let end = u64::from(slice.start) + u64::from(slice.tokens);
        if i32::try_from(end).is_err() {
            return Err(Error::unsupported(op, "tokens of a sequence:", end, "up to 2^31 - 1"));
        }
        for (g, group) in groups.iter().enumerate().take(num_groups) {
            let row = manager.block_row(slice.seq, g)?;
            needed += row.sinks.len() + row.live.len();
            let slots = u64::from(row.blocks) * u64::from(group.block_size);
            if slots < end {
                return Err(Error::invalid(
                    op,
                    format!("sequence {} has slots for {slots} tokens, not {end}", slice.seq),
                ));
            }
        }
    }
    *num_block_ids = needed as u64;
    if args.block_ids.is_null() {
        return Ok(());
    }
    if (needed as u64) > args.max_block_ids {
        return Err(Error::invalid(
            op,
            format!("there are {needed} block ids, and room for {}", args.max_block_ids),
        ));
    }
    let (rows, tokens) = (num_groups as u64 * seqs.len() as u64, num_groups as u64 * tokens);
    // SAFETY: the caller's promise: arrays of these lengths, which overlap nothing.
    let (qo_indptr, kv_len, slot_mapping, block_row, first_block, block_ids) = unsafe {
        (
            array_mut(op, "qo_indptr", args.qo_indptr, seqs.len() as u64 + 1)?,
            array_mut(op, "kv_len", args.kv_len, seqs.len() as u64)?,
            array_mut(op, "slot_mapping", args.slot_mapping, tokens)?,
            array_mut(op, "block_row", args.block_row, rows)?,
            array_mut(op, "first_block", args.first_block, rows)?,
            array_mut(op, "block_ids", args.block_ids, needed as u64)?,
        )
    };
    let mut ids = 0;
    let mut slots = slot_mapping;
    for (g, group) in groups.iter().enumerate().take(num_groups) {
        for (s, slice) in seqs.iter().enumerate() {
            let row = manager.block_row(slice.seq, g)?;
            block_row[g * seqs.len() + s] = ids as i64;
            first_block[g * seqs.len() + s] = row.first_block as i32;
            for &id in row.sinks.iter().chain(row.live) {
                block_ids[ids] = id;
                ids += 1;
            }
            let (own, rest) = slots.split_at_mut(slice.tokens as usize);
            map_slots(&row, group.block_size, slice.start, own);
            slots = rest;
        }
    }
    let mut end = 0;
    qo_indptr[0] = 0;
    for (s, slice) in seqs.iter().enumerate() {
        end += slice.tokens;
        qo_indptr[s + 1] = end as i32;
        kv_len[s] = (slice.start + slice.tokens) as i32;
    }
    Ok(())
}

/// Names sequences as far as there is room, and says how many there are.
pub(super) fn name(seqs: Vec<SeqId>, room: &mut [u64], num: &mut u64) {
    *num = seqs.len() as u64;
    room.iter_mut().zip(seqs).for_each(|(place, seq)| *place = seq);
}

/// Fills an array from the front with what there is.
pub(super) fn fill<T, U>(
    room: &mut [U],
    num: &mut u64,
    items: impl Iterator<Item = T>,
    convert: impl Fn(T) -> U,
) -> Result<()> {
    *num = 0;
    let mut places = room.iter_mut();
    let mut items = items;
    // Nothing is taken that there is no place for.
    while let Some(place) = places.next()
        && let Some(item) = items.next()
    {
        *place = convert(item);
        *num += 1;
    }
    Ok(())
}

/// # Safety
/// That of [`text`], for both.
pub(super) unsafe fn keys<'a>(
    op: &'static str,
    salt: *const c_char,
    lora: *const c_char,
) -> Result<ExtraKeys<'a>> {
    // SAFETY: the caller's promise.
    unsafe { Ok(ExtraKeys { salt: text(op, "salt", salt)?, lora: text(op, "lora", lora)? }) }
}
