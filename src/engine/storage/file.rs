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
//! What is exact in the host tier is `lxe` in a file (src/codec), encoded and decoded by the threads that write and
//! read; what is lossy there, or does not shrink, is as it is there. So files differ in size. There are as many slots
//! as the budget has room for when every block takes what a slot of `lxe` takes at most, 12 bits per element, and
//! about a tenth of it is left for the few that do not shrink; when that is used up, they are not stored.
//!
//! Header, 128 bytes, little endian: magic `HKVBLOCK`, version u32, form u32 (0: as it is, 2: `lxe`), identity `[32]`,
//! hash `[16]`, group u32, zero u32, payload bytes u64, bytes of the host slot u64, XXH3-64 of the payload u64, zeros,
//! and in the last four bytes the CRC-32 of the bytes before them.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use xxhash_rust::xxh3::xxh3_64;

use super::sync::{Mutex, MutexGuard, PoisonError};
use super::{BlockKey, BlockStore, Damage};
use crate::engine::GroupFormat;
use crate::engine::storage::form::{Form, Slots};
use crate::error::{Error, ErrorKind, Result};
use crate::manager::{BlockHash, StorageSlot, StoredBlock};

const OP: &str = "file store";
const MAGIC: &[u8; 8] = b"HKVBLOCK";
const VERSION: u32 = 2;
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
    /// Bytes of a host slot: of a block, where those hold it as it is.
    pub block_bytes: usize,
    /// How host slots hold the blocks of each group ([`SlotFormat`](crate::engine::SlotFormat)). Of groups that are
    /// not there nothing is known, and their blocks are stored as they are.
    pub groups: Vec<GroupFormat>,
    /// Identity of the manager and of the format: blocks of others are never read.
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
    /// Of the file of each slot; 0: it has none.
    files: Vec<u64>,
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
    /// `InvalidArgument` for a budget below one block, formats that slots of this size do not have, or a root that
    /// another process has open; `Unsupported` for a codec that does not know a format's elements; `Io`.
    pub fn open(config: FileStoreConfig) -> Result<Self> {
        let slots = |format| Slots { format, slot_bytes: config.block_bytes };
        config.groups.iter().try_for_each(|format| slots(Some(format)).check())?;
        let most = config.groups.iter().map(|format| slots(Some(format)).file_bytes()).max();
        let file_bytes = file_bytes(most.unwrap_or(config.block_bytes));
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
        let mut found: HashMap<BlockKeyBytes, Found> = HashMap::new();
        for (path, modified, bytes) in files_below(&self.folder)? {
            let block = self.inspect(&path);
            let keep = block.and_then(|block| {
                let key = (block.group, *block.hash.as_bytes());
                match found.get(&key) {
                    Some(newer) if newer.modified >= modified => None,
                    _ => Some((key, Found { modified, bytes: on_disk(bytes), block })),
                }
            });
            match keep {
                Some((key, newer)) => {
                    if let Some(older) = found.insert(key, newer) {
                        remove(&self.path_of(older.block.slot));
                    }
                }
                None => drop(remove(&path)),
            }
        }
        let mut found: Vec<Found> = found.into_values().collect();
        found.sort_by_key(|found| (found.modified, found.block.slot));
        let mut used: u64 = found.iter().map(|found| found.bytes).sum();
        let mut files = vec![0; self.num_slots as usize];
        for Found { bytes, block, .. } in found {
            if used > self.config.bytes {
                remove(&self.path_of(block.slot));
                used -= bytes;
                continue;
            }
            files[block.slot as usize] = bytes;
            self.stored.push(block);
        }
        let budget = self.budget.get_mut().unwrap_or_else(PoisonError::into_inner);
        (budget.files, budget.used) = (files, used);
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
        let expected = (HEADER as u64).checked_add(header.payload_bytes)?;
        let whole = file.metadata().ok()?.len() == expected && self.could_hold(&header);
        whole.then_some(StoredBlock { slot, group: header.key.group, hash: header.key.hash })
    }

    fn path_of(&self, slot: StorageSlot) -> PathBuf {
        self.folder.join(format!("{:05x}", slot / FOLDER)).join(format!("{slot:08x}.kv"))
    }

    fn budget(&self) -> MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots(&self, group: u32) -> Slots<'_> {
        let format = self.config.groups.get(group as usize);
        Slots { format, slot_bytes: self.config.block_bytes }
    }

    /// Whether a payload is one of slots of this size, and no larger than they are.
    fn could_hold(&self, header: &Header) -> bool {
        let used = self.slots(header.key.group).used_bytes() as u64;
        header.slot_bytes == self.config.block_bytes as u64 && header.payload_bytes <= used
    }

    /// Counts a slot's file of so many bytes, in place of the one it has, and makes room for it.
    fn take(&self, slot: StorageSlot, bytes: u64) -> Result<()> {
        let mut budget = self.budget();
        let others = budget.used - budget.files[slot as usize];
        if others + bytes > self.config.bytes {
            let reason = format!("{others} of {} are in use", self.config.bytes);
            let kind = ErrorKind::OutOfMemory { kind: "storage", requested: bytes, reason };
            return Err(Error::new(OP, kind));
        }
        budget.files[slot as usize] = bytes;
        budget.used = others + bytes;
        budget.make_room(self.config.bytes);
        Ok(())
    }

    /// Removes a slot's file.
    fn drop_slot(&self, slot: StorageSlot) {
        if remove(&self.path_of(slot)) {
            let mut budget = self.budget();
            budget.used -= std::mem::take(&mut budget.files[slot as usize]);
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

    fn try_write(&self, slot: StorageSlot, key: BlockKey, block: &[u8]) -> Result<()> {
        let (form, payload) = self.slots(key.group).shrink(block)?;
        self.take(slot, file_bytes(payload.len()))?;
        let path = self.path_of(slot);
        let temporary = path.with_extension("tmp");
        let folder = path.parent().unwrap_or(&self.folder);
        let header = Header {
            key,
            form,
            payload_bytes: payload.len() as u64,
            slot_bytes: block.len() as u64,
            payload_hash: xxh3_64(&payload),
        };
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(folder)?;
            let mut file = File::create(&temporary)?;
            file.write_all(&header.bytes(&self.config.identity))?;
            file.write_all(&payload)?;
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

    fn try_read(&self, slot: StorageSlot, key: BlockKey, block: &mut [u8]) -> Result<()> {
        let path = self.path_of(slot);
        let mut file = File::open(&path).map_err(|e| io(&path, e))?;
        let corrupt =
            |what: &str| Error::new(OP, ErrorKind::Corrupt(format!("{}: {what}", path.display())));
        let mut header = [0; HEADER];
        file.read_exact(&mut header).map_err(|e| io(&path, e))?;
        let header = Header::parse(&header, &self.config.identity).map_err(|e| corrupt(&e))?;
        if header.key != key || !self.could_hold(&header) {
            return Err(corrupt("the header is of another block"));
        }
        let slots = self.slots(key.group);
        let length = header.payload_bytes as usize;
        if header.form == Form::AsIs && length == slots.used_bytes() {
            let payload = &mut block[..length];
            file.read_exact(payload).map_err(|e| io(&path, e))?;
            return match xxh3_64(payload) == header.payload_hash {
                true => Ok(()),
                false => Err(corrupt(OTHER_HASH)),
            };
        }
        let mut payload = vec![0; length];
        file.read_exact(&mut payload).map_err(|e| io(&path, e))?;
        if xxh3_64(&payload) != header.payload_hash {
            return Err(corrupt(OTHER_HASH));
        }
        slots.restore(header.form, &payload, block).map_err(|e| corrupt(&e.to_string()))
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
        budget.files.fill(0);
        budget.used = 0;
        Ok(())
    }

    fn damage(&self, slot: StorageSlot, damage: Damage) -> Result<()> {
        let path = self.path_of(slot);
        let damage = || -> std::io::Result<()> {
            let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
            let middle = (HEADER as u64 + file.metadata()?.len()) / 2;
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

const OTHER_HASH: &str = "the payload does not have the hash that the header states";

/// A sound file.
struct Found {
    modified: SystemTime,
    /// Of the budget.
    bytes: u64,
    block: StoredBlock,
}

/// What differs between the headers of one store's files.
struct Header {
    key: BlockKey,
    form: Form,
    payload_bytes: u64,
    slot_bytes: u64,
    payload_hash: u64,
}

impl Header {
    fn bytes(&self, identity: &[u8; 32]) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.form as u32).to_le_bytes());
        bytes[16..48].copy_from_slice(identity);
        bytes[48..64].copy_from_slice(self.key.hash.as_bytes());
        bytes[64..68].copy_from_slice(&self.key.group.to_le_bytes());
        bytes[72..80].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[80..88].copy_from_slice(&self.slot_bytes.to_le_bytes());
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
        let (version, form) = (word(8), word(12));
        let Some(form) = Form::of_code(form).filter(|_| version == VERSION) else {
            return Err(format!("version {version} with form {form} is not known"));
        };
        if bytes[16..48] != identity[..] {
            return Err("a block of another identity".into());
        }
        let mut hash = [0; 16];
        hash.copy_from_slice(&bytes[48..64]);
        Ok(Self {
            key: BlockKey { group: word(64), hash: BlockHash::from_bytes(hash) },
            form,
            payload_bytes: long(72),
            slot_bytes: long(80),
            payload_hash: long(88),
        })
    }
}

/// Bytes of the budget that a payload takes.
fn file_bytes(payload_bytes: usize) -> u64 {
    on_disk((HEADER as u64).saturating_add(payload_bytes as u64))
}

/// Bytes of the budget that a file takes.
fn on_disk(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(FILE_ALIGN).unwrap_or(u64::MAX)
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
    Ok(files.into_iter().map(|(path, _, bytes)| (path, on_disk(bytes))).collect())
}
