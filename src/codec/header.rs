//! The 32 bytes that every slot begins with.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | `HKVC` |
//! | 4, 5, 6, 7 | codec, version, element type, 0 |
//! | 8..16 | layers, heads, head_dim, block_size, 16 bits each |
//! | 16..20 | bytes of the slot, header included |
//! | 20..24 | escapes |
//! | 24..32 | content hash |

use super::{Codec, Geometry, corrupt};
use crate::error::Result;

const MAGIC: [u8; 4] = *b"HKVC";

/// What a slot says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// How the block is encoded.
    pub codec: Codec,
    /// Shape of the block.
    pub geometry: Geometry,
    /// Bytes of the slot, header included.
    pub bytes: u32,
    /// Elements listed apart (`lx4`, else 0).
    pub escapes: u32,
    /// [`content_hash`](super::content_hash) of the slot.
    pub hash: u64,
}

impl Header {
    /// Bytes of a header.
    pub const BYTES: usize = 32;
    /// Of the layout of header and payloads; another one is another number.
    pub const VERSION: u8 = 1;
    /// Index of the 8-byte word that holds the hash.
    pub(super) const HASH_WORD: usize = 3;

    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = self.codec.code();
        bytes[5] = Self::VERSION;
        bytes[6] = self.geometry.dtype().code() as u8;
        for (field, value) in bytes[8..16].chunks_exact_mut(2).zip(self.geometry.fields()) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        bytes[16..20].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.escapes.to_le_bytes());
        bytes[24..].copy_from_slice(&self.hash.to_le_bytes());
        bytes
    }

    /// Reads the header of a slot; nothing is verified but that there is one.
    ///
    /// # Errors
    /// `Corrupt` when these are not the first bytes of a slot, or of one of a version to come.
    pub fn read(slot: &[u8]) -> Result<Self> {
        let Some(&bytes) = slot.first_chunk::<{ Self::BYTES }>() else {
            return Err(corrupt(format!("{} bytes are no header of {}", slot.len(), Self::BYTES)));
        };
        let [m0, m1, m2, m3, codec, version, dtype, zero, fields @ ..] = bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(corrupt("not a slot: the magic number is another"));
        }
        if version != Self::VERSION {
            let known = Self::VERSION;
            return Err(corrupt(format!("version {version}, this build reads {known}")));
        }
        let Some(codec) = Codec::of_code(codec) else {
            return Err(corrupt(format!("codec {codec} is not known to this build")));
        };
        let field = |i: usize| u16::from_le_bytes([fields[2 * i], fields[2 * i + 1]]);
        let geometry = Geometry::from_fields([0, 1, 2, 3].map(field), dtype);
        let (Some(geometry), 0) = (geometry, zero) else {
            return Err(corrupt("the geometry is none"));
        };
        let number = |i: usize| u32::from(field(i)) | u32::from(field(i + 1)) << 16;
        Ok(Self {
            codec,
            geometry,
            bytes: number(4),
            escapes: number(6),
            hash: u64::from(number(8)) | u64::from(number(10)) << 32,
        })
    }
}
