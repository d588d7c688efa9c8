//! What is held against arbitrary bytes: everything that reads what it did not write itself. Each function takes
//! the bytes of one run and panics when a promise is broken.
//!
//! `cargo +nightly fuzz run NAME` (cargo-fuzz) runs one for as long as it is let; `tests/fuzz_targets.rs` runs all
//! of them on a few inputs with every `cargo test`.

#[allow(dead_code, reason = "only what reads files is run here")]
#[path = "../src/bin/hybridkv/codec/capture.rs"]
mod capture_file;
#[allow(dead_code, reason = "only what reads files is run here")]
#[path = "../src/bin/hybridkv/trace.rs"]
mod trace_file;

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use hybridkv::Error;
use hybridkv::codec::{Codec, Encoded, Geometry, Header, content_hash, decode};
use hybridkv::engine::{
    BlockKey, BlockStore, FileStore, FileStoreConfig, GroupFormat, Section, SyncPolicy,
};
use hybridkv::error::ErrorKind;
use hybridkv::layout::Dtype;
use hybridkv::manager::BlockHash;
use hybridkv::spec::ModelSpec;
use xxhash_rust::xxh3::xxh3_64;

/// A target: its name, what it does with a run's bytes, and inputs that lead somewhere.
pub type Target = (&'static str, fn(&[u8]), &'static [&'static [u8]]);

/// All of them.
pub const TARGETS: [Target; 7] = [
    ("capture", capture, &[include_bytes!("seeds/capture.safetensors")]),
    ("codec_decode", codec_decode, &[]),
    ("codec_round_trip", codec_round_trip, &[]),
    ("file_store", file_store, &[]),
    ("model_config", model_config, &[include_bytes!("seeds/model_config.json")]),
    ("slot_header", slot_header, &[]),
    ("trace", trace, &[include_bytes!("seeds/trace.jsonl")]),
];

/// What an element is before anything is written to it.
const UNWRITTEN: u16 = 0xdead;

/// A small geometry for each number.
fn geometry(number: u8) -> Geometry {
    let bit = |i: u32| u32::from(number >> i & 1);
    let dtype = if bit(4) == 0 { Dtype::Bf16 } else { Dtype::F16 };
    Geometry::new(1 + bit(0), 1 + bit(1), [16, 48][bit(2) as usize], 8 << bit(3), dtype)
        .expect("a geometry that is supported")
}

fn is_corrupt(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt(_))
}

/// Bytes that claim to be a slot: refused as corrupt with nothing written, or a block that is always the same.
///
/// The first byte is the geometry, the second the codec of a header that is put before the rest, with the right
/// hash; 255: what follows is the slot as it is.
pub fn codec_decode(data: &[u8]) {
    let [number, codec, rest @ ..] = data else { return };
    let geometry = geometry(*number);
    let mut slot = rest.to_vec();
    if *codec != 255 {
        let codec = Codec::ALL[usize::from(*codec) % Codec::ALL.len()];
        match forged(codec, &geometry, rest) {
            Some(forged) => slot = forged,
            None => return,
        }
    }
    let mut block = vec![UNWRITTEN; geometry.elements()];
    match decode(&geometry, &slot, &mut block) {
        Err(error) => {
            assert!(is_corrupt(&error), "{error}");
            assert!(block.iter().all(|element| *element == UNWRITTEN), "{error}: written to");
        }
        Ok(header) => {
            assert_eq!(header.geometry, geometry);
            assert!(header.bytes as usize <= slot.len());
            let mut again = vec![!UNWRITTEN; geometry.elements()];
            decode(&geometry, &slot, &mut again).expect("what was accepted is accepted again");
            assert_eq!(block, again, "every element is written");
        }
    }
}

/// The longest slot, with a true header and hash and any payload: the four first bytes are the number of escapes.
fn forged(codec: Codec, geometry: &Geometry, data: &[u8]) -> Option<Vec<u8>> {
    let mut slot = vec![0; codec.slot_bytes(geometry).ok()?];
    // Zeros are held by every codec.
    let held = codec.encode(geometry, &vec![0; geometry.elements()], &mut slot).ok()?;
    assert!(matches!(held, Encoded::Fits { .. }), "{held:?}");
    let bytes = slot.len() as u32;
    let (head, payload) = slot.split_at_mut(Header::BYTES);
    head[16..20].copy_from_slice(&bytes.to_le_bytes());
    let (escapes, data) = data.split_at(data.len().min(4));
    head[20..20 + escapes.len()].copy_from_slice(escapes);
    let given = data.len().min(payload.len());
    payload[..given].copy_from_slice(&data[..given]);
    let hash = content_hash(&slot);
    slot[24..32].copy_from_slice(&hash.to_le_bytes());
    Some(slot)
}

/// A block of any bits: what a codec holds comes back, every bit of it or within what is finite; what it does not
/// hold it refuses; and a flipped bit is found.
///
/// The first byte is the geometry, the next two say which bit is flipped; the rest is repeated to fill the block.
pub fn codec_round_trip(data: &[u8]) {
    let [number, flip @ .., _, _] = data else { return };
    let geometry = geometry(*number);
    let pairs = data.get(3..).unwrap_or_default().as_chunks::<2>().0;
    let elements = pairs.iter().map(|pair| u16::from_le_bytes(*pair));
    let mut block: Vec<u16> = elements.cycle().take(geometry.elements()).collect();
    block.resize(geometry.elements(), 0);
    let flip = flip.first_chunk::<2>().map_or(0, |bytes| usize::from(u16::from_le_bytes(*bytes)));
    for codec in Codec::ALL {
        let Ok(bytes) = codec.slot_bytes(&geometry) else { continue };
        let mut slot = vec![0xa5; bytes];
        let encoded = codec.encode(&geometry, &block, &mut slot).expect("a block and its slot");
        let mut back = vec![UNWRITTEN; geometry.elements()];
        if let Encoded::RawFallback(_) = encoded {
            assert!(codec != Codec::Raw);
            assert!(is_corrupt(&decode(&geometry, &slot, &mut back).expect_err("no block")));
            continue;
        }
        let header = decode(&geometry, &slot, &mut back).expect("what was just written");
        assert_eq!((header.codec, header.geometry), (codec, geometry));
        if codec.is_exact() {
            assert!(back == block, "{codec} of {geometry} is not exact");
        }
        let bit = flip % (8 * header.bytes as usize);
        slot[bit / 8] ^= 1 << (bit % 8);
        assert!(is_corrupt(&decode(&geometry, &slot, &mut back).expect_err("a flipped bit")));
    }
}

/// Bytes that claim to begin with a header.
pub fn slot_header(data: &[u8]) {
    match Header::read(data) {
        Err(error) => assert!(is_corrupt(&error), "{error}"),
        Ok(header) => {
            assert!(data.len() >= Header::BYTES && data.starts_with(b"HKVC"));
            assert!((1..=1 << 29).contains(&header.geometry.elements()));
            assert_eq!(Codec::by_name(header.codec.name()).expect("a codec"), header.codec);
        }
    }
}

/// A block of one layer, and something behind it.
const BLOCK: usize = 2 * 256 + 32;
/// Of a file before its block.
const FILE_HEADER: usize = 128;

/// A store whose only file is one of any bytes: opened without complaint, and its block is served or refused.
///
/// The first byte is 0 for a file as it is; else a sound file of a block in `lxe` whose bytes are changed, at the places
/// (two bytes) and by the amounts (one) that follow; 2: and whose header is given the right checksum again; 3: and
/// the right hash of its payload.
pub fn file_store(data: &[u8]) {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
        std::env::temp_dir().join(format!("hybridkv-fuzz-{}", std::process::id()))
    });
    let Some((mode, data)) = data.split_first() else { return };
    let folder = ROOT.join("07".repeat(32)).join("00000");
    let file = folder.join("00000002.kv");
    let geometry = Geometry::new(1, 1, 16, 8, Dtype::Bf16).expect("a geometry");
    let bytes = geometry.raw_bytes() as u64;
    let section = Section { first_layer_slot: 0, geometry, offset: 0, bytes };
    let open = || {
        FileStore::open(FileStoreConfig {
            path: ROOT.clone(),
            bytes: 8 * 4096,
            block_bytes: BLOCK,
            groups: vec![GroupFormat { codec: Codec::Raw, sections: vec![section] }],
            identity: [7; 32],
            sync: SyncPolicy::Never,
        })
        .expect("a store opens whatever is in it")
    };
    let key = BlockKey { group: 0, hash: BlockHash::from_bytes([3; 16]) };
    let block: Vec<u8> = (0..BLOCK).map(|i| [(7 * i) as u8, 0x3f][i % 2]).collect();
    fs::create_dir_all(&folder).expect("a folder");
    let mut bytes = data.to_vec();
    if *mode != 0 {
        open().write(2, key, &block).expect("room for a block");
        bytes = fs::read(&file).expect("the file just written");
        assert!(bytes.len() < FILE_HEADER + BLOCK);
        for &[low, high, change] in data.as_chunks::<3>().0 {
            let at = usize::from(u16::from_le_bytes([low, high])) % bytes.len();
            bytes[at] ^= change;
        }
        if *mode == 3 {
            let hash = xxh3_64(&bytes[FILE_HEADER..]);
            bytes[88..96].copy_from_slice(&hash.to_le_bytes());
        }
        if *mode >= 2 {
            let crc = crc32fast::hash(&bytes[..FILE_HEADER - 4]);
            bytes[FILE_HEADER - 4..FILE_HEADER].copy_from_slice(&crc.to_le_bytes());
        }
    }
    fs::write(&file, bytes).expect("room for a file");
    let store = open();
    assert!(store.stored().len() <= 1);
    for stored in store.stored() {
        let key = BlockKey { group: stored.group, hash: stored.hash };
        let mut back = vec![0; BLOCK];
        match store.read(stored.slot, key, &mut back) {
            // Nobody finds 64 bits of hash by chance, nor does a fuzzer.
            Ok(()) => assert!(back == block || *mode == 0 || *mode == 3),
            Err(error) => {
                assert!(is_corrupt(&error) || matches!(error.kind(), ErrorKind::Io { .. }));
                assert!(!file.exists(), "what does not verify is removed");
            }
        }
    }
}

/// A `config.json`: refused with the field that is wrong, or a model that can be sized, shared and grouped.
pub fn model_config(data: &[u8]) {
    let Ok(json) = std::str::from_utf8(data) else { return };
    let Ok(model) = ModelSpec::from_hf_config(json) else { return };
    let _ = model.token_bytes();
    for tp in [1, 8] {
        // Either may be refused; neither may panic.
        let _ = model.shard(tp).and_then(|share| share.group(16));
    }
}

/// A file of captured keys and values.
pub fn capture(data: &[u8]) {
    let Ok(capture) = capture_file::Capture::parse(data) else { return };
    for layer in &capture.layers {
        for tensor in [&layer.q, &layer.k, &layer.v] {
            assert_eq!(tensor.elements.len(), capture.tokens * tensor.heads * tensor.dim);
        }
    }
}

/// A trace of requests.
pub fn trace(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for shrink in [1, 32] {
        let Ok(trace) = trace_file::Trace::parse(text, 100, shrink) else { continue };
        if trace.longest() < 1 << 16 {
            assert!((0..trace.len()).all(|i| trace.prompt(i).len() <= trace.longest()));
        }
    }
}
