//! What can become of sequences besides being served, in the C ABI: forks, cuts, preemption, prefetches.

use std::ffi::c_char;

use super::guard;
use super::header::*;
use super::manager::{fill, hkv_manager, keys, name};
use super::raw::{array, array_mut, out};
use crate::error::Result;
use crate::manager::{Cut, Manager};

/// A number of tokens; more than memory holds is as good as infinitely many.
fn count(tokens: u64) -> usize {
    usize::try_from(tokens).unwrap_or(usize::MAX)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_reserve(
    manager: *mut hkv_manager,
    seq: u64,
    tokens: u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_reserve";
    // SAFETY: the caller's promise: a live handle that nobody else uses meanwhile.
    guard(|| unsafe { out(OP, "manager", manager)?.manager.reserve(seq, count(tokens)) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_fork(
    manager: *mut hkv_manager,
    parent: u64,
    child: u64,
    tokens: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_fork";
    // SAFETY: as for `hkv_manager_reserve`; a place to write to.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let tokens = out(OP, "tokens", tokens)?;
        *tokens = manager.fork(parent, child)? as u64;
        Ok(())
    })
}

/// Cuts a sequence back one way or the other.
///
/// # Safety
/// A live handle that nobody else uses meanwhile, an array of its length, a place to write to.
unsafe fn cut_back(
    op: &'static str,
    manager: *mut hkv_manager,
    cut: impl FnOnce(&mut Manager) -> Result<Cut>,
    dependents: *mut u64,
    max_dependents: u64,
    num_dependents: *mut u64,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        let manager = &mut out(op, "manager", manager)?.manager;
        let room = array_mut(op, "dependents", dependents, max_dependents)?;
        let num = out(op, "num_dependents", num_dependents)?;
        name(cut(manager)?.dependents, room, num);
    }
    Ok(())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_trim(
    manager: *mut hkv_manager,
    seq: u64,
    tokens: u64,
    dependents: *mut u64,
    max_dependents: u64,
    num_dependents: *mut u64,
) -> hkv_status {
    let cut = |m: &mut Manager| m.trim(seq, count(tokens));
    // SAFETY: the caller's promise: a live handle that nobody else uses meanwhile, an array of its length.
    guard(|| unsafe {
        cut_back("hkv_manager_trim", manager, cut, dependents, max_dependents, num_dependents)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_rollback(
    manager: *mut hkv_manager,
    seq: u64,
    tokens: u64,
    dependents: *mut u64,
    max_dependents: u64,
    num_dependents: *mut u64,
) -> hkv_status {
    let cut = |m: &mut Manager| m.rollback(seq, count(tokens));
    // SAFETY: the caller's promise: a live handle that nobody else uses meanwhile, an array of its length.
    guard(|| unsafe {
        cut_back("hkv_manager_rollback", manager, cut, dependents, max_dependents, num_dependents)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_preempt(
    manager: *mut hkv_manager,
    seq: u64,
    preemption: *mut hkv_preemption,
    dependents: *mut u64,
    max_dependents: u64,
    num_dependents: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_preempt";
    // SAFETY: as for `hkv_manager_trim`.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let preemption = out(OP, "preemption", preemption)?;
        let room = array_mut(OP, "dependents", dependents, max_dependents)?;
        let num = out(OP, "num_dependents", num_dependents)?;
        let kept = manager.preempt(seq)?;
        *preemption = hkv_preemption { tokens: kept.tokens as u64, offloads: kept.offloads as u64 };
        name(kept.dependents, room, num);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_resume(
    manager: *mut hkv_manager,
    seq: u64,
    allocation: *mut hkv_allocation,
) -> hkv_status {
    const OP: &str = "hkv_manager_resume";
    // SAFETY: as for `hkv_manager_fork`.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let allocation = out(OP, "allocation", allocation)?;
        *allocation = manager.resume(seq)?.into();
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_prefetch(
    manager: *mut hkv_manager,
    seq: u64,
    tokens: *const u32,
    num_tokens: u64,
    salt: *const c_char,
    lora: *const c_char,
    now: u64,
    prefetch: *mut hkv_prefetch,
) -> hkv_status {
    const OP: &str = "hkv_manager_prefetch";
    // SAFETY: as for `hkv_manager_fork`; an array of its length, strings that end.
    guard(|| unsafe {
        let manager = &mut out(OP, "manager", manager)?.manager;
        let tokens = array(OP, "tokens", tokens, num_tokens)?;
        let prefetch = out(OP, "prefetch", prefetch)?;
        let prompt = manager.hash(tokens, keys(OP, salt, lora)?);
        let begun = manager.prefetch(seq, &prompt, now)?;
        *prefetch =
            hkv_prefetch { hit_tokens: begun.hit_tokens as u64, blocks: begun.blocks as u64 };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_poll_prefetch(
    manager: *mut hkv_manager,
    now: u64,
    seqs: *mut u64,
    max: u64,
    num: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_poll_prefetch";
    // SAFETY: as for `hkv_manager_fork`; an array of its length.
    guard(|| unsafe {
        let hkv_manager { manager, prefetched, .. } = out(OP, "manager", manager)?;
        let room = array_mut(OP, "seqs", seqs, max)?;
        let num = out(OP, "num", num)?;
        prefetched.extend(manager.poll_prefetch(now)?);
        fill(room, num, std::iter::from_fn(|| prefetched.pop_front()), |seq| seq)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_cancel_prefetch(
    manager: *mut hkv_manager,
    seq: u64,
) -> hkv_status {
    // SAFETY: as for `hkv_manager_reserve`.
    guard(|| unsafe {
        let hkv_manager { manager, prefetched, .. } =
            out("hkv_manager_cancel_prefetch", "manager", manager)?;
        manager.cancel_prefetch(seq);
        prefetched.retain(|&other| other != seq);
        Ok(())
    })
}
