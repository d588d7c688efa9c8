//! A store of one file per block.
//!
//! ```text
//! <root>/lock                                     one process per root
//! <root>/<identity>/<slot / 4096>/<slot>.kv       a block: header, payload
//! <root>/<identity>/<slot / 4096>/<slot>.tmp      a block that is being written
//! ```
//! A block is written to the temporary file and renamed, so that a slot holds the old block or the new one
//! at any instant. Another identity is another folder: its blocks are never looked at, but their bytes count,
//! and the oldest of them give way when the budget needs them. After a crash the folder is scanned: what has
//! a sound header of this identity and the length that it states is offered again, anything else removed.
//! Payloads are verified when they are read.
//!
//! Header, 128 bytes, little endian: magic `HKVBLOCK`, version u32, codec u32, identity `[32]`, hash `[16]`,
//! group u32, zero u32, payload bytes u64, raw bytes u64, XXH3-64 of the payload u64, zeros, and in the last
//! four bytes the CRC-32 of the bytes before them.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use xxhash_rust::xxh3::xxh3_64;

use super::sync::{Mutex, MutexGuard, PoisonError};
use super::{BlockKey, BlockStore, Damage};
use crate::error::{Error, ErrorKind, Result};
use crate::manager::{BlockHash, StorageSlot, StoredBlock};

const OP: &str = "file store";
const MAGIC: &[u8; 8] = b"HKVBLOCK";
const VERSION: u32 = 1;
const CODEC_RAW: u32 = 0;
const HEADER: usize = 128;
/// Files of one folder.
const FOLDER: u32 = 4096;
/// What a file takes of the budget is a multiple of this.
const FILE_ALIGN: u64 = 4096;

/// What is synchronised before a block counts as stored. Whatever is lost in a crash is found missing or fails
/// to verify: none of the policies can serve wrong bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SyncPolicy {
    /// Nothing: the system writes back when it likes.
    #[default]
    Never,
    /// The file, before it gets its name.
    File,
    /// The file, and the folder after the renaming.
    FileAndFolder,
}

/// What a [`FileStore`] is opened with.
#[derive(Debug, Clone)]
pub struct FileStoreConfig {
    /// Root folder; made when it is missing.
    pub path: PathBuf,
    /// Budget of everything below the root.
    pub bytes: u64,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Identity of the manager: blocks of others are never read.
    pub identity: [u8; 32],
    /// What is synchronised.
    pub sync: SyncPolicy,
}

/// See the module documentation.
pub struct FileStore {
    config: FileStoreConfig,
    folder: PathBuf,
    num_slots: u32,
    stored: Vec<StoredBlock>,
    budget: Mutex<Budget>,
    /// Holds the lock of the root.
    _lock: File,
}

/// Bytes in use.
struct Budget {
    /// Which slots have a file, perhaps.
    files: Vec<bool>,
    used: u64,
    /// Files of other identities, the oldest first.
    others: VecDeque<(PathBuf, u64)>,
}

impl Budget {
    /// Removes files of other identities until all fits into `bytes`.
    fn make_room(&mut self, bytes: u64) {
        let mut others: u64 = self.others.iter().map(|(_, bytes)| bytes).sum();
        while self.used + others > bytes
            && let Some((path, size)) = self.others.pop_front()
        {
            remove(&path);
            others -= size;
        }
    }
}

impl FileStore {
    /// Opens or makes a store, and scans what it holds.
    ///
    /// # Errors
    /// `InvalidArgument` for a budget below one block, or a root that another process has open; `Io`.
    pub fn open(config: FileStoreConfig) -> Result<Self> {
        let file_bytes = file_bytes(config.block_bytes);
        let num_slots = u32::try_from(config.bytes / file_bytes).unwrap_or(u32::MAX - 1);
        let num_slots = num_slots.min(u32::MAX - 1);
        if num_slots == 0 || config.block_bytes == 0 {
            return Err(Error::invalid(
                OP,
                format!(
                    "a budget of {} bytes holds no block: one of {} bytes takes {file_bytes}",
                    config.bytes, config.block_bytes
                ),
            ));
        }
        let folder = config.path.join(name_of(&config.identity));
        fs::create_dir_all(&folder).map_err(|e| io(&folder, e))?;
        let path = config.path.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|e| io(&path, e))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Error::invalid(OP, format!("{} is in use by another process", config.path.display()))
        })?;
        let budget = Mutex::new(Budget {
            files: Vec::new(),
            used: 0,
            others: others(&config.path, &folder)?,
        });
        let mut store = Self { config, folder, num_slots, stored: Vec::new(), budget, _lock: lock };
        store.scan()?;
        store.budget().make_room(store.config.bytes);
        Ok(store)
    }

    /// Finds the blocks of the folder, the oldest first, and removes everything else from it.
    fn scan(&mut self) -> Result<()> {
        let mut found: HashMap<BlockKeyBytes, (SystemTime, StoredBlock)> = HashMap::new();
        for (path, modified, _) in files_below(&self.folder)? {
            let block = self.inspect(&path);
            let keep = block.and_then(|block| {
                let key = (block.group, *block.hash.as_bytes());
                match found.get(&key) {
                    Some((newer, _)) if *newer >= modified => None,
                    _ => Some((key, block)),
                }
            });
            match keep {
                Some((key, block)) => {
                    if let Some((_, older)) = found.insert(key, (modified, block)) {
                        remove(&self.path_of(older.slot));
                    }
                }
                None => drop(remove(&path)),
            }
        }
        let mut found: Vec<(SystemTime, StoredBlock)> = found.into_values().collect();
        found.sort_by_key(|(modified, block)| (*modified, block.slot));
        self.stored = found.into_iter().map(|(_, block)| block).collect();
        let budget = self.budget.get_mut().unwrap_or_else(PoisonError::into_inner);
        budget.files = vec![false; self.num_slots as usize];
        for block in &self.stored {
            budget.files[block.slot as usize] = true;
            budget.used += file_bytes(self.config.block_bytes);
        }
        Ok(())
    }

    /// The block that a file holds, when its name, header and length are sound.
    fn inspect(&self, path: &Path) -> Option<StoredBlock> {
        let name = path.file_name()?.to_str()?.strip_suffix(".kv")?;
        let slot = u32::from_str_radix(name, 16).ok().filter(|slot| *slot < self.num_slots)?;
        if self.path_of(slot) != path {
            return None;
        }
        let mut file = File::open(path).ok()?;
        let mut header = [0; HEADER];
        file.read_exact(&mut header).ok()?;
        let header = Header::parse(&header, &self.config.identity).ok()?;
        let bytes = self.config.block_bytes as u64;
        let whole = file.metadata().ok()?.len() == HEADER as u64 + bytes;
        (whole && header.payload_bytes == bytes).then_some(StoredBlock {
            slot,
            group: header.key.group,
            hash: header.key.hash,
        })
    }

    fn path_of(&self, slot: StorageSlot) -> PathBuf {
        self.folder.join(format!("{:05x}", slot / FOLDER)).join(format!("{slot:08x}.kv"))
    }

    fn budget(&self) -> MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a slot's file, and makes room for it.
    fn take(&self, slot: StorageSlot) {
        let mut budget = self.budget();
        if !std::mem::replace(&mut budget.files[slot as usize], true) {
            budget.used += file_bytes(self.config.block_bytes);
            budget.make_room(self.config.bytes);
        }
    }

    /// Removes a slot's file.
    fn drop_slot(&self, slot: StorageSlot) {
        if remove(&self.path_of(slot)) {
            let mut budget = self.budget();
            if std::mem::take(&mut budget.files[slot as usize]) {
                budget.used -= file_bytes(self.config.block_bytes);
            }
        }
    }

    fn check(&self, slot: StorageSlot, bytes: usize) -> Result<()> {
        if slot >= self.num_slots || bytes != self.config.block_bytes {
            return Err(Error::invalid(
                OP,
                format!(
                    "slot {slot} and {bytes} bytes; the store has {} slots of {} bytes",
                    self.num_slots, self.config.block_bytes
                ),
            ));
        }
        Ok(())
    }

    fn try_write(&self, slot: StorageSlot, key: BlockKey, payload: &[u8]) -> Result<()> {
        let path = self.path_of(slot);
        let temporary = path.with_extension("tmp");
        let folder = path.parent().unwrap_or(&self.folder);
        let header =
            Header { key, payload_bytes: payload.len() as u64, payload_hash: xxh3_64(payload) };
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(folder)?;
            let mut file = File::create(&temporary)?;
            file.write_all(&header.bytes(&self.config.identity))?;
            file.write_all(payload)?;
            if self.config.sync != SyncPolicy::Never {
                file.sync_data()?;
            }
            fs::rename(&temporary, &path)?;
            if self.config.sync == SyncPolicy::FileAndFolder {
                File::open(folder)?.sync_all()?;
            }
            Ok(())
        };
        write().map_err(|e| {
            remove(&temporary);
            io(&path, e)
        })
    }

    fn try_read(&self, slot: StorageSlot, key: BlockKey, payload: &mut [u8]) -> Result<()> {
        let path = self.path_of(slot);
        let mut file = File::open(&path).map_err(|e| io(&path, e))?;
        let corrupt =
            |what: &str| Error::new(OP, ErrorKind::Corrupt(format!("{}: {what}", path.display())));
        let mut header = [0; HEADER];
        file.read_exact(&mut header).map_err(|e| io(&path, e))?;
        let header = Header::parse(&header, &self.config.identity).map_err(|e| corrupt(&e))?;
        if header.key != key || header.payload_bytes != payload.len() as u64 {
            return Err(corrupt("the header is of another block"));
        }
        file.read_exact(payload).map_err(|e| io(&path, e))?;
        if xxh3_64(payload) != header.payload_hash {
            return Err(corrupt("the payload does not have the hash that the header states"));
        }
        Ok(())
    }
}

impl BlockStore for FileStore {
    fn num_slots(&self) -> u32 {
        self.num_slots
    }

    fn stored(&self) -> &[StoredBlock] {
        &self.stored
    }

    fn write(&self, slot: StorageSlot, key: BlockKey, payload: &[u8]) -> Result<()> {
        self.check(slot, payload.len())?;
        self.take(slot);
        self.try_write(slot, key, payload).inspect_err(|_| self.drop_slot(slot))
    }

    fn read(&self, slot: StorageSlot, key: BlockKey, payload: &mut [u8]) -> Result<()> {
        self.check(slot, payload.len())?;
        self.try_read(slot, key, payload).inspect_err(|_| self.drop_slot(slot))
    }

    fn clear(&self) -> Result<()> {
        fs::remove_dir_all(&self.folder).map_err(|e| io(&self.folder, e))?;
        fs::create_dir_all(&self.folder).map_err(|e| io(&self.folder, e))?;
        let mut budget = self.budget();
        budget.files.fill(false);
        budget.used = 0;
        Ok(())
    }

    fn damage(&self, slot: StorageSlot, damage: Damage) -> Result<()> {
        let path = self.path_of(slot);
        let damage = || -> std::io::Result<()> {
            let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
            let middle = HEADER as u64 + self.config.block_bytes as u64 / 2;
            if damage == Damage::Short {
                return file.set_len(middle);
            }
            let mut byte = [0];
            file.seek(SeekFrom::Start(middle))?;
            file.read_exact(&mut byte)?;
            file.seek(SeekFrom::Start(middle))?;
            file.write_all(&[!byte[0]])
        };
        damage().map_err(|e| io(&path, e))
    }
}

type BlockKeyBytes = (u32, [u8; 16]);

/// What differs between the headers of one store's files.
struct Header {
    key: BlockKey,
    payload_bytes: u64,
    payload_hash: u64,
}

impl Header {
    fn bytes(&self, identity: &[u8; 32]) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&CODEC_RAW.to_le_bytes());
        bytes[16..48].copy_from_slice(identity);
        bytes[48..64].copy_from_slice(self.key.hash.as_bytes());
        bytes[64..68].copy_from_slice(&self.key.group.to_le_bytes());
        bytes[72..80].copy_from_slice(&self.payload_bytes.to_le_bytes());
        // Raw blocks are stored as they are.
        bytes[80..88].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[88..96].copy_from_slice(&self.payload_hash.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..HEADER - 4]);
        bytes[HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header that this version wrote for this identity; says what is wrong with any other.
    fn parse(bytes: &[u8; HEADER], identity: &[u8; 32]) -> Result<Self, String> {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if &bytes[..8] != MAGIC || crc32fast::hash(&bytes[..HEADER - 4]) != word(HEADER - 4) {
            return Err("no sound header".into());
        }
        if (word(8), word(12)) != (VERSION, CODEC_RAW) || long(80) != long(72) {
            return Err(format!("version {} with codec {} is not known", word(8), word(12)));
        }
        if bytes[16..48] != identity[..] {
            return Err("a block of another identity".into());
        }
        let mut hash = [0; 16];
        hash.copy_from_slice(&bytes[48..64]);
        let key = BlockKey { group: word(64), hash: BlockHash::from_bytes(hash) };
        Ok(Self { key, payload_bytes: long(72), payload_hash: long(88) })
    }
}

/// Bytes of the budget that one block takes.
fn file_bytes(block_bytes: usize) -> u64 {
    (HEADER as u64).saturating_add(block_bytes as u64).next_multiple_of(FILE_ALIGN)
}

fn name_of(identity: &[u8; 32]) -> String {
    identity.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::new(OP, ErrorKind::Io { path: path.display().to_string(), source })
}

/// Removes a file; whether it is gone.
fn remove(path: &Path) -> bool {
    match fs::remove_file(path) {
        Ok(()) => true,
        Err(error) => {
            let gone = error.kind() == std::io::ErrorKind::NotFound;
            if !gone {
                tracing::warn!(path = %path.display(), %error, "a file of the store cannot be removed");
            }
            gone
        }
    }
}

/// Files in the folders of a folder, with their times and sizes.
fn files_below(folder: &Path) -> Result<Vec<(PathBuf, SystemTime, u64)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| io(folder, e))? {
        let path = entry.map_err(|e| io(folder, e))?.path();
        if !path.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&path).map_err(|e| io(&path, e))? {
            let entry = entry.map_err(|e| io(&path, e))?;
            if let Ok(metadata) = entry.metadata()
                && metadata.is_file()
            {
                let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                files.push((entry.path(), modified, metadata.len()));
            }
        }
    }
    Ok(files)
}

/// Blocks of other identities, the oldest first.
fn others(root: &Path, own: &Path) -> Result<VecDeque<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(root).map_err(|e| io(root, e))? {
        let path = entry.map_err(|e| io(root, e))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // Whatever else lies there is not ours to remove.
        let is_identity = name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
        if path.is_dir() && is_identity && path != own {
            files.extend(files_below(&path)?);
        }
    }
    files.sort_by_key(|(_, modified, _)| *modified);
    Ok(files
        .into_iter()
        .map(|(path, _, bytes)| (path, bytes.next_multiple_of(FILE_ALIGN)))
        .collect())
}
