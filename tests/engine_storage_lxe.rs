//! What the store makes of host slots whose format it knows: exact blocks are `lxe` in files, lossy ones what they
//! are, and what comes back is what went in, to the bit, or does not come back.

use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use hybridkv::codec::{Codec, Encoded, Geometry};
use hybridkv::engine::{
    BlockKey, BlockStore, FileStore, FileStoreConfig, GroupFormat, Section, SyncPolicy,
};
use hybridkv::error::{Error, ErrorKind};
use hybridkv::layout::Dtype;
use hybridkv::manager::BlockHash;

/// Behind the layers of a block.
const TAIL: usize = 384;
/// Of a file, before its payload.
const HEADER: usize = 128;

fn geometry(layers: u32) -> Geometry {
    Geometry::new(layers, 2, 64, 16, Dtype::Bf16).unwrap()
}

/// Two sections, of two layers and of one.
fn format(codec: Codec) -> GroupFormat {
    let bytes = |geometry: &Geometry| match codec {
        Codec::Raw => geometry.raw_bytes() as u64,
        _ => codec.slot_bytes(geometry).unwrap() as u64,
    };
    let (first, second) = (geometry(2), geometry(1));
    let offset = bytes(&first).next_multiple_of(128);
    let sections = vec![
        Section { first_layer_slot: 0, geometry: first, offset: 0, bytes: bytes(&first) },
        Section { first_layer_slot: 2, geometry: second, offset, bytes: bytes(&second) },
    ];
    GroupFormat { codec, sections }
}

fn slot_bytes(codec: Codec) -> usize {
    let last = format(codec).sections[1];
    (last.offset + last.bytes) as usize + TAIL
}

/// A folder of the system's temporary one, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hybridkv-lxe-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    /// A store of group 0 in a codec; of group 1 nothing is known.
    fn config(&self, codec: Codec) -> FileStoreConfig {
        FileStoreConfig {
            path: self.0.clone(),
            bytes: 1 << 20,
            block_bytes: slot_bytes(codec),
            groups: vec![format(codec)],
            identity: [1; 32],
            sync: SyncPolicy::Never,
        }
    }

    fn file(&self, slot: u32) -> PathBuf {
        self.0.join("01".repeat(32)).join("00000").join(format!("{slot:08x}.kv"))
    }

    fn bytes(&self) -> u64 {
        fn below(folder: &Path) -> u64 {
            let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
            entries
                .map(|entry| match entry.path().is_dir() {
                    true => below(&entry.path()),
                    false => entry.metadata().unwrap().len().next_multiple_of(4096),
                })
                .sum()
        }
        below(&self.0)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// About normal.
    fn element(&mut self) -> u16 {
        let sum: f32 = (0..6).map(|_| (self.next() % 4096) as f32 / 4096.0 - 0.5).sum();
        bf16::from_f32(sum).to_bits()
    }
}

/// A host slot, of a block that shrinks unless `noise`.
fn slot(codec: Codec, seed: u64, noise: bool) -> Vec<u8> {
    let mut random = Random(seed);
    let mut slot: Vec<u8> = (0..slot_bytes(codec)).map(|_| random.next() as u8).collect();
    for Section { geometry, offset, bytes, .. } in format(codec).sections {
        let mut element = || if noise { random.next() as u16 } else { random.element() };
        let block: Vec<u16> = (0..geometry.elements()).map(|_| element()).collect();
        let section = &mut slot[offset as usize..(offset + bytes) as usize];
        if codec == Codec::Raw {
            let pairs = block.iter().flat_map(|element| element.to_le_bytes());
            section.iter_mut().zip(pairs).for_each(|(to, from)| *to = from);
        } else {
            let encoded = codec.encode(&geometry, &block, section).unwrap();
            assert!(matches!(encoded, Encoded::Fits { .. }), "{encoded:?}");
        }
    }
    slot
}

fn key(group: u32, n: u8) -> BlockKey {
    BlockKey { group, hash: BlockHash::from_bytes([n; 16]) }
}

fn read(store: &FileStore, slot: u32, key: BlockKey, codec: Codec) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0xcc; slot_bytes(codec)];
    store.read(slot, key, &mut bytes).map(|()| bytes)
}

/// What of a slot has to come back: of an encoded one not what lies behind its sections.
fn used(codec: Codec, slot: &[u8]) -> &[u8] {
    &slot[..slot.len() - if codec == Codec::Raw { 0 } else { TAIL }]
}

#[test]
fn exact_blocks_shrink_in_files_and_come_back_to_the_bit() {
    for (codec, most) in [(Codec::Raw, 0.72), (Codec::Lx4, 0.93)] {
        let folder = Folder::new("exact");
        let config = folder.config(codec);
        let store = FileStore::open(config.clone()).unwrap();
        for n in 0..8 {
            store.write(n, key(0, n as u8), &slot(codec, n.into(), false)).unwrap();
            let length = fs::metadata(folder.file(n)).unwrap().len() as usize;
            let whole = used(codec, &slot(codec, 0, false)).len();
            assert!(length < HEADER + (most * whole as f64) as usize + TAIL, "{codec}: {length}");
        }
        drop(store);
        let store = FileStore::open(config).unwrap();
        assert_eq!(store.stored().len(), 8);
        for n in 0..8 {
            let back = read(&store, n, key(0, n as u8), codec).unwrap();
            let expected = slot(codec, n.into(), false);
            assert!(used(codec, &back) == used(codec, &expected), "{codec} {n}");
        }
    }
}

#[test]
fn what_is_lossy_or_unknown_or_does_not_shrink_is_stored_as_it_is() {
    let as_is = |folder: &Folder, bytes: &[u8]| {
        let file = fs::read(folder.file(3)).unwrap();
        assert!(&file[HEADER..] == bytes);
    };
    for codec in [Codec::Int8, Codec::Int6, Codec::Int4] {
        let folder = Folder::new("lossy");
        let store = FileStore::open(folder.config(codec)).unwrap();
        let slot = slot(codec, 5, false);
        store.write(3, key(0, 1), &slot).unwrap();
        as_is(&folder, used(codec, &slot));
        let back = read(&store, 3, key(0, 1), codec).unwrap();
        assert!(used(codec, &back) == used(codec, &slot), "{codec}");
    }
    let folder = Folder::new("noise");
    let store = FileStore::open(folder.config(Codec::Raw)).unwrap();
    for (group, noise) in [(0, true), (1, false), (1, true)] {
        let slot = slot(Codec::Raw, 7, noise);
        store.write(3, key(group, 1), &slot).unwrap();
        as_is(&folder, &slot);
        assert!(read(&store, 3, key(group, 1), Codec::Raw).unwrap() == slot);
    }
}

#[test]
fn damage_is_found_and_the_file_is_gone() {
    let folder = Folder::new("damage");
    let store = FileStore::open(folder.config(Codec::Raw)).unwrap();
    let block = slot(Codec::Raw, 1, false);
    store.write(3, key(0, 1), &block).unwrap();
    let sound = fs::read(folder.file(3)).unwrap();
    let mut random = Random(3);
    for n in 0..200 {
        let at = if n < 128 { n } else { random.next() as usize % sound.len() };
        let mut damaged = sound.clone();
        damaged[at] ^= 1 << (random.next() % 8);
        fs::write(folder.file(3), damaged).unwrap();
        let error = read(&store, 3, key(0, 1), Codec::Raw).unwrap_err();
        let expected = matches!(error.kind(), ErrorKind::Corrupt(_) | ErrorKind::Io { .. });
        assert!(expected && !folder.file(3).exists(), "byte {at}: {error}");
    }
    for length in [0, 64, HEADER, HEADER + 40, sound.len() - 1] {
        fs::write(folder.file(3), &sound[..length]).unwrap();
        assert!(read(&store, 3, key(0, 1), Codec::Raw).is_err(), "{length} bytes");
    }
    store.write(3, key(0, 1), &block).unwrap();
    assert!(read(&store, 3, key(0, 1), Codec::Raw).unwrap() == block);
}

/// Under one identity, as no caller should have it: the slots of `lxe` say what they hold themselves.
#[test]
fn a_file_of_another_geometry_or_codec_is_refused() {
    let folder = Folder::new("foreign");
    let write = |config: FileStoreConfig, codec| {
        FileStore::open(config).unwrap().write(3, key(0, 1), &slot(codec, 1, false)).unwrap();
    };
    // Heads of 32 for twice as many tokens: blocks of the same size.
    let mut other = folder.config(Codec::Raw);
    for section in &mut other.groups[0].sections {
        let layers = section.geometry.layers() as u32;
        section.geometry = Geometry::new(layers, 2, 32, 32, Dtype::Bf16).unwrap();
    }
    write(other, Codec::Raw);
    let store = FileStore::open(folder.config(Codec::Raw)).unwrap();
    assert_eq!(store.stored().len(), 1, "its header is sound");
    let error = read(&store, 3, key(0, 1), Codec::Raw).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Corrupt(_)), "{error}");
    assert!(error.to_string().contains("2 heads of 32") && !folder.file(3).exists(), "{error}");
    drop(store);
    // Slots of another size are another form of block, before they are read.
    write(folder.config(Codec::Raw), Codec::Raw);
    let store = FileStore::open(folder.config(Codec::Lx4)).unwrap();
    assert!(store.stored().is_empty() && !folder.file(3).exists());
    // A damaged slot does not become a sound file.
    let mut damaged = slot(Codec::Lx4, 1, false);
    damaged[1000] ^= 4;
    let error = store.write(3, key(0, 1), &damaged).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Corrupt(_)) && !folder.file(3).exists(), "{error}");
}

#[test]
fn the_budget_holds_a_third_more_blocks_and_is_never_exceeded() {
    let folder = Folder::new("budget");
    let raw = 32 * slot_bytes(Codec::Raw).next_multiple_of(4096) as u64;
    let config = FileStoreConfig { bytes: raw, ..folder.config(Codec::Raw) };
    let store = FileStore::open(config.clone()).unwrap();
    let slots = store.num_slots();
    assert!((38..=44).contains(&slots), "{slots}");
    for n in 0..slots {
        store.write(n, key(0, n as u8), &slot(Codec::Raw, n.into(), false)).unwrap();
    }
    assert!(folder.bytes() <= raw);
    // Blocks that do not shrink take what is left, and no more.
    let mut refused = 0;
    for n in 0..slots {
        match store.write(n, key(0, n as u8), &slot(Codec::Raw, n.into(), true)) {
            Ok(()) => {}
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::OutOfMemory { .. }), "{error}");
                assert!(read(&store, n, key(0, n as u8), Codec::Raw).is_err(), "gone");
                refused += 1;
            }
        }
        assert!(folder.bytes() <= raw, "{n}");
    }
    assert!(refused > 0 && refused <= slots - 28, "{refused}");
    drop(store);
    // A smaller budget drops the oldest, whatever their sizes.
    let half = FileStoreConfig { bytes: raw / 2, ..config };
    let store = FileStore::open(half).unwrap();
    assert!(folder.bytes() <= raw / 2 && !store.stored().is_empty());
}

#[test]
fn formats_that_slots_cannot_have_are_refused() {
    let folder = Folder::new("formats");
    let refused = |change: fn(&mut Section)| {
        let mut config = folder.config(Codec::Lx4);
        change(&mut config.groups[0].sections[1]);
        let error = FileStore::open(config).err().expect("refused");
        assert!(matches!(error.kind(), ErrorKind::InvalidArgument(_)), "{error}");
    };
    refused(|section| section.offset = 0);
    refused(|section| section.offset = u64::MAX - 8);
    refused(|section| section.offset += 512);
    refused(|section| section.bytes -= 16);
    refused(|section| section.geometry = geometry(2));
}
