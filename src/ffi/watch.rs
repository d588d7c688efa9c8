//! What can be seen of a manager in the C ABI: events, counters, texts.

use std::ffi::c_char;

use super::guard;
use super::header::*;
use super::manager::{fill, hkv_manager};
use super::raw::{array_mut, handle, out};
use crate::error::{Error, Result};
use crate::manager::{Event, EventKind, Tier};

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_record_events(manager: *mut hkv_manager, on: u32) -> hkv_status {
    // SAFETY: as for `hkv_manager_advance`.
    guard(|| unsafe {
        out("hkv_manager_record_events", "manager", manager)?.manager.record_events(on != 0);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_events(
    manager: *mut hkv_manager,
    events: *mut hkv_event,
    max: u64,
    num: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_events";
    // SAFETY: as for `hkv_manager_abort`.
    guard(|| unsafe {
        let hkv_manager { manager, events: told, .. } = out(OP, "manager", manager)?;
        let room = array_mut(OP, "events", events, max)?;
        let num = out(OP, "num", num)?;
        told.extend(manager.events().iter().flat_map(blocks));
        fill(room, num, std::iter::from_fn(|| told.pop_front()), |event| event)
    })
}

/// An event, block by block.
fn blocks(event: &Event) -> Vec<hkv_event> {
    let kind = match event.kind {
        EventKind::Stored => HKV_STORED,
        EventKind::Removed => HKV_REMOVED,
        EventKind::Cleared => HKV_CLEARED,
    };
    let tier = match event.tier {
        Tier::Device => HKV_DEVICE,
        Tier::Host => HKV_HOST,
        Tier::Storage => HKV_STORAGE,
    };
    let one = |index, hash| hkv_event { kind, tier, group: event.group, index, hash };
    match event.kind {
        EventKind::Cleared => vec![one(0, [0; 16])],
        _ => {
            let hashes = event.hashes.iter().map(|hash| *hash.as_bytes());
            event.indices.iter().zip(hashes).map(|(&index, hash)| one(index, hash)).collect()
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_stats(
    manager: *const hkv_manager,
    text: *mut c_char,
    max: u64,
    size: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_stats";
    // SAFETY: the caller's promise: a live handle, an array of its length, a place to write to.
    guard(|| unsafe {
        let manager = &handle(OP, "manager", manager)?.manager;
        let all = serde_json::json!({
            "stats": manager.stats(),
            "usage": manager.usage(),
            "metadata": manager.metadata(),
        });
        write(OP, &all.to_string(), array_mut(OP, "text", text, max)?, out(OP, "size", size)?)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_manager_prometheus(
    manager: *const hkv_manager,
    text: *mut c_char,
    max: u64,
    size: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_manager_prometheus";
    // SAFETY: as for `hkv_manager_stats`.
    guard(|| unsafe {
        let all = handle(OP, "manager", manager)?.manager.prometheus();
        write(OP, &all, array_mut(OP, "text", text, max)?, out(OP, "size", size)?)
    })
}

/// Writes a text with a zero behind it where there is room for all of it, and says how much it takes.
fn write(op: &'static str, text: &str, room: &mut [c_char], size: &mut u64) -> Result<()> {
    let bytes = text.as_bytes();
    if bytes.contains(&0) {
        return Err(Error::invalid(op, "a zero inside of the text"));
    }
    *size = bytes.len() as u64 + 1;
    if room.len() > bytes.len() {
        let all = bytes.iter().chain(&[0]);
        room.iter_mut().zip(all).for_each(|(place, &byte)| *place = byte as c_char);
    }
    Ok(())
}
