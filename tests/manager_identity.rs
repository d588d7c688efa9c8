//! R9: exact requests are served exact blocks. Managers are of one identity each, element type, shape, scales and
//! layout included: what another one has left in a store that they share is never found, let alone served, and
//! a store gives back what it was given or nothing.

use std::fs;
use std::path::PathBuf;

use hybridkv::engine::{BlockKey, BlockStore, FileStore, FileStoreConfig, SyncPolicy};
use hybridkv::layout::{Dtype, KvShape};
use hybridkv::manager::{
    Eviction, ExtraKeys, GroupConfig, HashedTokens, HostConfig, Manager, ManagerConfig, Outcome,
    Path, Retention, StorageConfig,
};
use hybridkv::spec::{AttentionKind, GroupPlan, LayerGroup, Provenance, StateGroup};

const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };
const OF: Provenance<'static> =
    Provenance { model: "m", revision: "r", positions: "rope 1e4", scales: &[0.5, 2.0] };

fn plan(dtype: Dtype) -> GroupPlan {
    let shape = KvShape { num_kv_heads: 2, head_dim: 64, dtype };
    let group = |kind, layers: &[u32]| LayerGroup {
        kind,
        sink_tokens: 0,
        shape,
        block_size: 16,
        layers: layers.to_vec(),
        layer_slots: 2,
    };
    GroupPlan {
        groups: vec![
            group(AttentionKind::Full, &[0, 2]),
            group(AttentionKind::Sliding { window: 32 }, &[1, 3]),
        ],
        states: vec![StateGroup { state_bytes: 64, block_size: 16, layers: vec![0] }],
        block_bytes: 2 * 16 * shape.token_bytes(),
    }
}

/// What changes the bytes of a block, or what they mean.
const CHANGES: &[fn(&mut GroupPlan, &mut Provenance<'static>)] = &[
    |_, of| of.model = "n",
    |_, of| of.revision = "s",
    |_, of| of.positions = "rope 1e6",
    |_, of| of.scales = &[2.0, 0.5],
    |_, of| of.scales = &[],
    |_, of| (of.model, of.revision) = ("mr", ""),
    |_, of| (of.model, of.revision) = ("", "mr"),
    |p, _| p.block_bytes += 128,
    |p, _| p.groups[0].shape.dtype = Dtype::F16,
    |p, _| p.groups[1].shape.dtype = Dtype::E4m3,
    |p, _| p.groups[0].shape.num_kv_heads = 4,
    |p, _| p.groups[0].shape.head_dim = 128,
    |p, _| p.groups[0].block_size = 32,
    |p, _| p.groups[0].layer_slots = 3,
    |p, _| p.groups[0].sink_tokens = 4,
    |p, _| p.groups[0].layers = vec![2, 0],
    |p, _| p.groups[1].kind = AttentionKind::Sliding { window: 33 },
    |p, _| p.groups[1].kind = AttentionKind::Chunked { chunk: 32 },
    |p, _| p.groups.swap(0, 1),
    |p, _| drop(p.groups.pop()),
    |p, _| p.states[0].state_bytes = 128,
    |p, _| p.states[0].block_size = 32,
    |p, _| p.states[0].layers = vec![1],
    |p, _| p.states.clear(),
];

#[test]
fn r9_whatever_changes_a_byte_or_its_meaning_is_another_identity() {
    let mut seen = vec![plan(Dtype::Bf16).identity(&OF)];
    assert_eq!(seen[0], plan(Dtype::Bf16).identity(&OF), "a function of what it is given");
    for change in CHANGES {
        let (mut plan, mut of) = (plan(Dtype::Bf16), OF);
        change(&mut plan, &mut of);
        let identity = plan.identity(&of);
        assert!(!seen.contains(&identity), "{plan:?} {of:?} is not told from another one");
        seen.push(identity);
    }
}

/// The framing and the chain of prefix hashes, by their definition.
#[test]
fn r9_hashes_are_those_of_the_definition_however_the_tokens_came() {
    let (identity, unit) = ([3; 32], 3u64);
    let all: Vec<u32> = (0..17).map(|n| n * 0x0101_0101).collect();
    let mut frames = Vec::new();
    for (tag, bytes) in [(b'b', &unit.to_le_bytes()[..]), (b's', b"tenant"), (b'l', b"")] {
        frames.push(tag);
        frames.extend((bytes.len() as u64).to_le_bytes());
        frames.extend(bytes);
    }
    let mut parent = blake3::keyed_hash(&identity, &frames);
    let chain = all.chunks_exact(unit as usize).map(|tokens| {
        let mut key = [0; 32];
        key[..16].copy_from_slice(&parent.as_bytes()[..16]);
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        parent = blake3::keyed_hash(&key, &bytes);
        parent.as_bytes()[..16].to_vec()
    });
    let chain: Vec<Vec<u8>> = chain.collect();
    let keys = ExtraKeys { salt: "tenant", ..KEYS };
    let hashes = |hashed: &HashedTokens| -> Vec<Vec<u8>> {
        hashed.hashes().iter().map(|hash| hash.as_bytes().to_vec()).collect()
    };
    for piece in [1, 2, 5, 17] {
        let mut hashed = HashedTokens::new(&identity, unit as usize, keys);
        all.chunks(piece).for_each(|tokens| hashed.push(tokens));
        assert_eq!(hashes(&hashed), chain);
        // What is taken back leaves no trace.
        hashed.push(&[9, 9, 9]);
        hashed.truncate(4);
        hashed.push(&all[4..]);
        assert_eq!(hashes(&hashed), chain);
    }
}

/// A folder of the system's temporary one, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("hybridkv-identity-{name}-{}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const BLOCK: usize = 256;

/// A manager of KV of this type, on the store below `root`.
fn open(root: &Folder, dtype: Dtype) -> (Manager, FileStore) {
    let plan = plan(dtype);
    let identity = plan.identity(&OF);
    let mut manager = Manager::new(ManagerConfig {
        groups: GroupConfig::of(&plan),
        num_blocks: 64,
        prefix_caching: true,
        retention: Retention::dense(),
        eviction: Eviction::Lru,
        max_model_len: 128,
        in_flight_tokens: 128,
        host: Some(HostConfig::new(32)),
        identity,
    })
    .unwrap();
    let store = FileStore::open(FileStoreConfig {
        path: root.0.clone(),
        bytes: 1 << 20,
        block_bytes: BLOCK,
        groups: Vec::new(),
        identity,
        sync: SyncPolicy::Never,
    })
    .unwrap();
    manager.attach_storage(StorageConfig::new(store.num_slots()), store.stored()).unwrap();
    (manager, store)
}

/// Ends all transfers; what is persisted gets `byte`s.
fn run(manager: &mut Manager, store: &FileStore, byte: u8) {
    while let Some(transfer) = manager.next_transfer() {
        if let Path::Persist { to, .. } = transfer.path {
            let key = BlockKey { group: transfer.group, hash: transfer.hash };
            store.write(to, key, &[byte; BLOCK]).unwrap();
        }
        manager.complete(transfer.id, Outcome::Succeeded).unwrap();
    }
}

fn prompt() -> Vec<u32> {
    (0..81).collect()
}

/// Computes the prompt and leaves it in the store.
fn compute(root: &Folder, dtype: Dtype, byte: u8) {
    let (mut manager, store) = open(root, dtype);
    manager.allocate(1, &prompt(), KEYS, 0).unwrap();
    manager.advance(1, 81, 81).unwrap();
    run(&mut manager, &store, byte);
    manager.free(1).unwrap();
    run(&mut manager, &store, byte);
}

#[test]
fn r9_exact_and_lossy_blocks_of_the_same_prompt_never_serve_each_other() {
    let root = Folder::new("lossy");
    compute(&root, Dtype::E4m3, 8);
    let (exact, _store) = open(&root, Dtype::Bf16);
    assert_eq!(exact.lookup(&prompt(), KEYS).tokens, 0, "a lossy block for an exact request");
    let hashed = |dtype| open(&Folder::new("hashed"), dtype).0.hash(&prompt(), KEYS);
    let (exact, lossy) = (hashed(Dtype::Bf16), hashed(Dtype::E4m3));
    assert!(exact.hashes().iter().all(|hash| !lossy.hashes().contains(hash)));
    drop(_store);
    // Both of them, side by side, and each finds its own.
    compute(&root, Dtype::Bf16, 16);
    for (dtype, byte) in [(Dtype::E4m3, 8), (Dtype::Bf16, 16)] {
        let (manager, store) = open(&root, dtype);
        assert_eq!(manager.lookup(&prompt(), KEYS).tokens, 80);
        for stored in store.stored() {
            let (key, mut payload) =
                (BlockKey { group: stored.group, hash: stored.hash }, [0; BLOCK]);
            store.read(stored.slot, key, &mut payload).unwrap();
            assert_eq!(payload, [byte; BLOCK]);
        }
    }
}

#[test]
fn r9_a_stored_block_of_another_codec_is_not_offered_and_not_read() {
    const CODEC: std::ops::Range<usize> = 12..16;
    const HEADER: usize = 128;
    let root = Folder::new("codec");
    compute(&root, Dtype::Bf16, 1);
    let (_, store) = open(&root, Dtype::Bf16);
    let (all, first) = (store.stored().len(), store.stored()[0]);
    let mut folders = vec![root.0.clone()];
    let mut file = None;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.ends_with(format!("{:08x}.kv", first.slot)) {
                file = Some(entry);
            }
        }
    }
    // A sound header, but that it says that the payload is encoded.
    let file = file.unwrap();
    let mut bytes = fs::read(&file).unwrap();
    bytes[CODEC].copy_from_slice(&1u32.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..HEADER - 4]);
    bytes[HEADER - 4..HEADER].copy_from_slice(&crc.to_le_bytes());
    fs::write(&file, &bytes).unwrap();
    let key = BlockKey { group: first.group, hash: first.hash };
    store.read(first.slot, key, &mut [0; BLOCK]).unwrap_err();
    fs::write(&file, &bytes).unwrap();
    drop(store);
    let (_, store) = open(&root, Dtype::Bf16);
    assert_eq!(store.stored().len(), all - 1);
    assert!(store.stored().iter().all(|stored| *stored != first));
}
