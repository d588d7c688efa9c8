//! What the threads of an engine share, under a model checker: the same source over shuttle's locks, channels and
//! threads, in thousands of schedules.
//!
//! Between two uses of these no other thread runs, so whoever holds the memory of a slot says so, and gives way
//! while it does.

#![allow(clippy::duplicate_mod, reason = "compiled once more, over what the model checker sees")]

#[allow(dead_code, reason = "only a part is modelled")]
#[path = "file.rs"]
mod file;
#[path = "queue.rs"]
mod queue;
/// What threads share.
mod sync {
    pub use std::sync::PoisonError;

    pub use shuttle::sync::{Arc, Mutex, MutexGuard, mpsc};
    pub use shuttle::thread;
}

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::atomic::AtomicBool;

use self::file::{FileStore, FileStoreConfig, SyncPolicy};
use self::queue::Queue;
use self::sync::{Arc, thread};
use super::{BlockKey, BlockStore, Damage};
use crate::manager::BlockHash;

const SLOTS: usize = 3;
const TRANSFERS: usize = 8;

/// The arena, of which the engine and the threads write one slot each at a time.
#[derive(Default)]
struct Arena {
    held: [AtomicBool; SLOTS],
    /// The transfer that wrote last.
    written_by: [AtomicUsize; SLOTS],
    gone: AtomicBool,
}

impl Arena {
    fn write(&self, slot: usize, by: usize) {
        assert!(!self.gone.load(Ordering::SeqCst), "written after it was freed");
        assert!(!self.held[slot].swap(true, Ordering::SeqCst), "two in one slot");
        thread::yield_now();
        self.written_by[slot].store(by, Ordering::SeqCst);
        assert!(self.held[slot].swap(false, Ordering::SeqCst));
    }
}

/// An engine gives transfers to the queue, polls or waits for reports, and goes, now and then before all have been
/// reported. `early`: it takes a slot for its own before that of its transfer has been.
fn engine(early: bool) {
    let arena = Arc::new(Arena::default());
    let work = {
        let arena = arena.clone();
        move |(transfer, slot): (usize, usize)| {
            arena.write(slot, transfer);
            (transfer, slot)
        }
    };
    let mut queue = Queue::new(2, 1, work).unwrap();
    let mut random = thread_rng();
    let (mut busy, mut reported) = ([false; SLOTS], BTreeSet::new());
    let note = |(transfer, slot): (usize, usize),
                busy: &mut [bool],
                reported: &mut BTreeSet<usize>| {
        assert_eq!(arena.written_by[slot].load(Ordering::SeqCst), transfer, "reported, not done");
        assert!(reported.insert(transfer), "reported twice");
        busy[slot] = false;
    };
    for transfer in 0..TRANSFERS {
        let slot = random.gen_range(0..SLOTS);
        while busy[slot] && !early {
            note(queue.wait().unwrap(), &mut busy, &mut reported);
        }
        arena.write(slot, usize::MAX);
        assert!(queue.start((transfer, slot)));
        busy[slot] = true;
        while random.r#gen()
            && let Some(report) = queue.poll()
        {
            note(report, &mut busy, &mut reported);
        }
        assert_eq!(queue.outstanding(), transfer + 1 - reported.len());
    }
    if random.r#gen() {
        while let Some(report) = queue.wait() {
            note(report, &mut busy, &mut reported);
        }
        assert_eq!(reported.len(), TRANSFERS);
    }
    drop(queue);
    arena.gone.store(true, Ordering::SeqCst);
}

#[test]
fn transfers_are_done_and_reported_once_in_every_schedule() {
    shuttle::check_random(|| engine(false), 4000);
    shuttle::check_pct(|| engine(false), 2000, 3);
}

/// The model sees what it is there for.
#[test]
#[should_panic]
fn a_slot_that_is_taken_before_its_report_is_seen() {
    shuttle::check_random(|| engine(true), 1000);
}

const BLOCK: usize = 64;
/// What its file takes of the budget.
const FILE: u64 = 4096;

fn key(n: usize) -> BlockKey {
    BlockKey { group: 0, hash: BlockHash::from_bytes([n as u8; 16]) }
}

fn open(root: &Path, identity: u8) -> FileStore {
    let config = FileStoreConfig {
        path: root.to_owned(),
        bytes: SLOTS as u64 * FILE,
        block_bytes: BLOCK,
        groups: Vec::new(),
        identity: [identity; 32],
        sync: SyncPolicy::Never,
    };
    FileStore::open(config).unwrap()
}

fn files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files(&path) } else { 1 }).sum()
}

/// Threads write blocks, some of which are found damaged and dropped, while the blocks of another identity give
/// way: in the end every slot holds its block, and the bytes are within the budget.
fn stores(root: &Path) {
    let _ = std::fs::remove_dir_all(root);
    let other = open(root, 1);
    (0..2).for_each(|slot| other.write(slot, key(9), &[9; BLOCK]).unwrap());
    drop(other);
    let store = Arc::new(open(root, 2));
    let write = |slot: usize| {
        let store = store.clone();
        thread::spawn(move || {
            let payload = [slot as u8; BLOCK];
            for _ in 0..3 {
                store.write(slot as u32, key(slot), &payload).unwrap();
                let mut read = [0; BLOCK];
                if thread_rng().r#gen() {
                    store.damage(slot as u32, Damage::Corrupt).unwrap();
                    store.read(slot as u32, key(slot), &mut read).unwrap_err();
                    store.write(slot as u32, key(slot), &payload).unwrap();
                }
                store.read(slot as u32, key(slot), &mut read).unwrap();
                assert_eq!(read, payload);
            }
        })
    };
    let threads: Vec<_> = (0..SLOTS).map(write).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    // The lock is a file, too.
    assert_eq!(files(root), SLOTS + 1, "the budget is kept");
}

#[test]
fn a_file_store_keeps_its_budget_in_every_schedule() {
    let root: PathBuf = std::env::temp_dir().join(format!("hybridkv-model-{}", std::process::id()));
    let folder = root.clone();
    shuttle::check_random(move || stores(&folder), 60);
    let _ = std::fs::remove_dir_all(root);
}
