//! The store of one file per block, and the engine's transfers to and from it: what comes back is what went
//! in, or it does not come back.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hybridkv::codec::Codec;
use hybridkv::device::Device;
use hybridkv::engine::{
    BlockKey, BlockStore, Damage, Engine, EngineConfig, Fault, FaultKind, FileStore,
    FileStoreConfig, SlotFormat, SyncPolicy,
};
use hybridkv::error::ErrorKind;
use hybridkv::manager::{self, BlockHash, Direction, Outcome, StoredBlock, Transfer};
use hybridkv::ops::Kernels;

const BLOCK: usize = 4096 + 128;
/// What a file takes of the budget.
const FILE: u64 = 8192;

/// A folder of the system's temporary one, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hybridkv-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    fn config(&self, identity: u8, blocks: u64) -> FileStoreConfig {
        FileStoreConfig {
            path: self.0.clone(),
            bytes: blocks * FILE,
            block_bytes: BLOCK,
            groups: Vec::new(),
            identity: [identity; 32],
            sync: SyncPolicy::Never,
        }
    }

    fn open(&self, identity: u8, blocks: u64) -> FileStore {
        FileStore::open(self.config(identity, blocks)).unwrap()
    }

    /// All files below, the lock apart.
    fn files(&self) -> Vec<PathBuf> {
        fn below(folder: &Path, files: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => below(&path, files),
                    false => files.push(path),
                }
            }
        }
        let mut files = Vec::new();
        below(&self.0, &mut files);
        files.retain(|path| path.file_name().unwrap() != "lock");
        files
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn key(n: u8) -> BlockKey {
    BlockKey { group: u32::from(n % 3), hash: BlockHash::from_bytes([n; 16]) }
}

fn payload(n: u8) -> Vec<u8> {
    (0..BLOCK).map(|i| (i as u8).wrapping_mul(31) ^ n).collect()
}

fn read(store: &FileStore, slot: u32, n: u8) -> Result<Vec<u8>, hybridkv::Error> {
    let mut bytes = vec![0; BLOCK];
    store.read(slot, key(n), &mut bytes).map(|()| bytes)
}

fn entry(slot: u32, n: u8) -> StoredBlock {
    StoredBlock { slot, group: key(n).group, hash: key(n).hash }
}

#[test]
fn blocks_outlive_the_process_under_every_sync_policy() {
    for sync in [SyncPolicy::Never, SyncPolicy::File, SyncPolicy::FileAndFolder] {
        let folder = Folder::new("outlive");
        let config = FileStoreConfig { sync, ..folder.config(1, 5000) };
        let store = FileStore::open(config.clone()).unwrap();
        assert!(store.stored().is_empty());
        for (slot, n) in [(0, 1), (4097, 2), (4999, 3)] {
            store.write(slot, key(n), &payload(n)).unwrap();
        }
        store.write(0, key(9), &payload(9)).unwrap();
        drop(store);
        let store = FileStore::open(config).unwrap();
        let mut stored = store.stored().to_vec();
        stored.sort_by_key(|block| block.slot);
        assert_eq!(stored, [entry(0, 9), entry(4097, 2), entry(4999, 3)]);
        for (slot, n) in [(0, 9), (4097, 2), (4999, 3)] {
            assert_eq!(read(&store, slot, n).unwrap(), payload(n));
        }
    }
}

#[test]
fn what_does_not_verify_is_a_miss_and_gone() {
    let folder = Folder::new("verify");
    let store = folder.open(1, 16);
    for damage in [Damage::Corrupt, Damage::Short] {
        store.write(3, key(1), &payload(1)).unwrap();
        store.damage(3, damage).unwrap();
        let error = read(&store, 3, 1).unwrap_err();
        let expected = matches!(error.kind(), ErrorKind::Corrupt(_) | ErrorKind::Io { .. });
        assert!(expected, "{error}");
        assert!(folder.files().is_empty(), "removed");
    }
    // The right bytes under another key.
    store.write(3, key(1), &payload(1)).unwrap();
    assert!(matches!(read(&store, 3, 4).unwrap_err().kind(), ErrorKind::Corrupt(_)));
    assert!(read(&store, 3, 1).is_err(), "a slot that lied holds nothing");
    // Any flipped bit of the file.
    for at in [0, 9, 13, 20, 50, 65, 70, 73, 82, 90, 100, 126, 128, 128 + BLOCK - 1] {
        store.write(3, key(1), &payload(1)).unwrap();
        let path = folder.files().pop().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[at] ^= 0x10;
        fs::write(&path, bytes).unwrap();
        assert!(read(&store, 3, 1).is_err(), "byte {at}");
    }
    assert!(store.write(16, key(1), &payload(1)).is_err(), "no such slot");
    assert!(store.write(0, key(1), &payload(1)[1..]).is_err(), "no block of this size");
}

#[test]
fn a_crash_at_any_byte_of_a_write_leaves_a_store_that_opens_and_serves_only_whole_blocks() {
    let folder = Folder::new("crash");
    let store = folder.open(1, 16);
    store.write(0, key(1), &payload(1)).unwrap();
    store.write(1, key(2), &payload(2)).unwrap();
    let path = folder.files().into_iter().find(|path| path.ends_with("00000001.kv")).unwrap();
    let whole = fs::read(&path).unwrap();
    drop(store);
    for length in (0..=whole.len()).step_by(97).chain([127, 128, 129, whole.len() - 1]) {
        // Cut after the renaming, and before it.
        fs::write(&path, &whole[..length]).unwrap();
        fs::write(path.with_extension("tmp"), &whole[..length]).unwrap();
        let store = folder.open(1, 16);
        let expected = if length == whole.len() { 2 } else { 1 };
        assert_eq!(store.stored().len(), expected, "{length}");
        assert_eq!(folder.files().len(), expected, "the rest is removed");
        assert_eq!(read(&store, 0, 1).unwrap(), payload(1));
    }
    // A block of the right length with garbage in it opens, and is found out when it is read.
    let mut garbage = whole.clone();
    garbage[200..].fill(0);
    fs::write(&path, garbage).unwrap();
    let store = folder.open(1, 16);
    assert_eq!(store.stored().len(), 2);
    assert!(read(&store, 1, 2).is_err());
}

#[test]
fn another_identity_is_another_namespace_and_gives_way_to_the_budget() {
    let folder = Folder::new("identity");
    let store = folder.open(1, 4);
    (0..4).for_each(|n| store.write(n.into(), key(n), &payload(n)).unwrap());
    drop(store);
    let store = folder.open(2, 4);
    assert!(store.stored().is_empty());
    assert!(read(&store, 0, 0).is_err());
    // Also not when its file is put where this identity looks.
    let own = folder.0.join("02".repeat(32)).join("00000");
    fs::create_dir_all(&own).unwrap();
    let from = folder.0.join("01".repeat(32)).join("00000/00000001.kv");
    fs::copy(from, own.join("00000001.kv")).unwrap();
    assert!(read(&store, 1, 1).is_err());
    assert_eq!(folder.files().len(), 4);
    // R7: the budget is of everything below the root.
    for n in 0..4u8 {
        store.write(n.into(), key(10 + n), &payload(n)).unwrap();
        assert_eq!(folder.files().len(), 4);
    }
    drop(store);
    assert_eq!(folder.open(2, 4).stored().len(), 4);
    assert_eq!(folder.open(2, 2).stored().len(), 2, "a smaller budget");
    assert_eq!(folder.files().len(), 2);
}

#[test]
fn a_store_has_one_owner_a_key_one_slot_and_a_budget_of_a_block_at_least() {
    let folder = Folder::new("owner");
    let store = folder.open(1, 4);
    let error = FileStore::open(folder.config(1, 4)).err().unwrap();
    assert!(error.to_string().contains("in use by another process"), "{error}");
    store.write(0, key(1), &payload(1)).unwrap();
    let hour = std::time::Duration::from_secs(3600);
    let older = fs::File::options().write(true).open(&folder.files()[0]).unwrap();
    older.set_modified(std::time::SystemTime::now() - hour).unwrap();
    store.write(2, key(1), &payload(1)).unwrap();
    drop(store);
    assert_eq!(folder.open(1, 4).stored(), [entry(2, 1)], "the newer one");
    let small = FileStoreConfig { bytes: FILE - 1, ..folder.config(1, 0) };
    assert!(FileStore::open(small).err().unwrap().to_string().contains("takes 8192"));
    let store = folder.open(1, 4);
    store.clear().unwrap();
    assert!(folder.files().is_empty());
    store.write(1, key(1), &payload(1)).unwrap();
    assert_eq!(read(&store, 1, 1).unwrap(), payload(1));
}

fn engine(folder: &Folder) -> (Device, Engine) {
    let device = Device::cpu();
    let config =
        EngineConfig { block_bytes: BLOCK, num_blocks: 9, num_slots: 16, slots: SlotFormat::AS_IS };
    let mut engine = Engine::new(Arc::new(Kernels::load(&device).unwrap()), config).unwrap();
    engine.attach_storage(Arc::new(folder.open(1, 64)), 3).unwrap();
    (device, engine)
}

fn transfer(id: u64, path: manager::Path, n: u8) -> Transfer {
    Transfer { id, path, group: key(n).group, hash: key(n).hash, codec: Codec::Raw, seq: None }
}

/// Runs transfers to their ends, by polling; gives the outcomes in the order of the names, and the polls.
fn run(device: &Device, engine: &mut Engine, transfers: &[Transfer]) -> (Vec<Outcome>, usize) {
    let compute = device.stream().unwrap();
    engine.submit(transfers, compute.as_ref()).unwrap();
    assert_eq!(engine.outstanding(), transfers.len());
    let (mut ended, mut polls) = (Vec::new(), 0);
    while engine.outstanding() > 0 {
        engine.poll(&mut ended).unwrap();
        polls += usize::from(ended.len() < transfers.len());
        std::thread::yield_now();
    }
    ended.sort_by_key(|(id, _)| *id);
    assert_eq!(ended.len(), transfers.len());
    (ended.into_iter().map(|(_, outcome)| outcome).collect(), polls)
}

fn down(id: u64, block: u32, slot: u32) -> Transfer {
    transfer(id, manager::Path::Offload { from: block, to: slot }, slot as u8)
}

fn persist(id: u64, slot: u32, to: u32) -> Transfer {
    transfer(id, manager::Path::Persist { from: slot, to }, slot as u8)
}

fn fetch(id: u64, n: u8, from: u32, slot: u32) -> Transfer {
    transfer(id, manager::Path::Fetch { from, to: slot }, n)
}

#[test]
fn blocks_go_down_through_the_host_to_storage_and_come_back() {
    let folder = Folder::new("engine");
    let (device, mut engine) = engine(&folder);
    let compute = device.stream().unwrap();
    for slot in 0..8 {
        let block = engine.block(1 + slot).unwrap();
        // SAFETY: a block of the pool, which outlives the stream's work.
        unsafe { compute.as_ref().fill(block.address, slot as u8, BLOCK).unwrap() };
    }
    let all = |make: &dyn Fn(u32) -> Transfer| (0..8).map(make).collect::<Vec<_>>();
    run(&device, &mut engine, &all(&|s| down(s.into(), 1 + s, s)));
    let (outcomes, _) = run(&device, &mut engine, &all(&|s| persist(s.into(), s, 40 + s)));
    assert_eq!(outcomes, [Outcome::Succeeded; 8]);
    let (outcomes, _) =
        run(&device, &mut engine, &all(&|s| fetch(s.into(), s as u8, 40 + s, 15 - s)));
    assert_eq!(outcomes, [Outcome::Succeeded; 8]);
    for slot in 0..8u32 {
        let bytes = engine.slot(15 - slot).unwrap();
        assert!(bytes[..BLOCK].iter().all(|b| u32::from(*b) == slot));
    }
    let stats = engine.stats();
    assert_eq!((stats.persist.transfers, stats.fetch.bytes), (8, 8 * BLOCK as u64));
    // Out of range, and without a storage tier: refused, and nothing is started.
    let refused = |engine: &mut Engine, t| engine.submit(&[t], compute.as_ref()).is_err();
    assert!(refused(&mut engine, persist(1, 1, 64)));
    assert!(engine.attach_storage(Arc::new(folder_store(&folder)), 1).is_err());
    engine.detach_storage();
    assert!(refused(&mut engine, persist(1, 1, 2)));
    assert_eq!(engine.outstanding(), 0);
}

/// Some store.
fn folder_store(folder: &Folder) -> FileStore {
    let path = folder.0.join("other");
    FileStore::open(FileStoreConfig { path, ..folder.config(1, 4) }).unwrap()
}

#[test]
fn detaching_waits_for_what_was_given_and_reports_it() {
    let folder = Folder::new("detach");
    let (device, mut engine) = engine(&folder);
    let compute = device.stream().unwrap();
    let transfers: Vec<_> = (0..16).map(|s| persist(s.into(), s, s)).collect();
    engine.submit(&transfers, compute.as_ref()).unwrap();
    engine.detach_storage();
    let mut ended = Vec::new();
    engine.poll(&mut ended).unwrap();
    assert_eq!(ended.len(), 16);
    assert_eq!(folder.files().len(), 16);
}

#[test]
fn injected_storage_faults_are_found_and_never_serve_wrong_bytes() {
    let folder = Folder::new("faults");
    let (device, mut engine) = engine(&folder);
    for kind in [FaultKind::Fail, FaultKind::Corrupt, FaultKind::Short] {
        for direction in [Direction::Persist, Direction::Fetch] {
            engine.inject(Fault { direction, kind, count: 1 });
            let (stored, _) = run(&device, &mut engine, &[persist(0, 1, 7)]);
            let failed_at_once = kind == FaultKind::Fail && direction == Direction::Persist;
            assert_eq!(stored[0] == Outcome::Failed, failed_at_once, "{kind:?} {direction:?}");
            let (fetched, _) = run(&device, &mut engine, &[fetch(1, 1, 7, 9)]);
            assert_eq!(fetched, [Outcome::Failed], "{kind:?} {direction:?}");
        }
    }
    engine.inject(Fault {
        direction: Direction::Persist,
        kind: FaultKind::Delay { polls: 5 },
        count: 1,
    });
    let (outcomes, polls) = run(&device, &mut engine, &[persist(0, 1, 7)]);
    assert!(outcomes == [Outcome::Succeeded] && polls >= 5);
    let (fetched, _) = run(&device, &mut engine, &[fetch(1, 1, 7, 9)]);
    assert_eq!(fetched, [Outcome::Succeeded], "all faults are used up");
}

/// A store of somebody else's with a bug.
struct Panicking;

impl BlockStore for Panicking {
    fn num_slots(&self) -> u32 {
        64
    }
    fn stored(&self) -> &[StoredBlock] {
        &[]
    }
    fn write(&self, _: u32, _: BlockKey, _: &[u8]) -> hybridkv::Result<()> {
        panic!("injected")
    }
    fn read(&self, _: u32, _: BlockKey, _: &mut [u8]) -> hybridkv::Result<()> {
        panic!("injected")
    }
    fn clear(&self) -> hybridkv::Result<()> {
        Ok(())
    }
    fn damage(&self, _: u32, _: Damage) -> hybridkv::Result<()> {
        Ok(())
    }
}

#[test]
fn transfers_of_a_store_that_panics_fail_and_nobody_waits_for_ever() {
    let folder = Folder::new("panics");
    let (device, mut engine) = engine(&folder);
    engine.detach_storage();
    engine.attach_storage(Arc::new(Panicking), 2).unwrap();
    // More than there are threads.
    let transfers = [persist(0, 1, 7), fetch(1, 1, 8, 9), persist(2, 2, 3), persist(3, 3, 4)];
    let (outcomes, _) = run(&device, &mut engine, &transfers);
    assert_eq!(outcomes, [Outcome::Failed; 4]);
}
