//! Codecs of blocks that leave the device: what a block costs in a slower tier, and what it loses there.
//!
//! A block of 16-bit keys and values becomes a *slot*: a header, then a payload whose size is fixed by geometry
//! and codec, so that slots never grow and never fragment (`lxe`, for storage: a payload of at most that size). A block that a codec cannot hold is refused with a
//! [`Fallback`] and stored raw instead. Slots stand alone: whatever decoding needs besides the geometry is in
//! them, and their bytes depend on the block only, on the CPU as on a GPU (kernels/encode.cu).
//!
//! | codec | holds | bits per element (16 tokens, head_dim 128) |
//! |---|---|---|
//! | `raw` | every bit | 16 |
//! | `lx4` | every bit of bf16; exponents in 4 bits, the few others on a list | 12.2 |
//! | `lxe` | likewise, exponents in prefix codes: slots of different sizes, for storage | 10.7 on average |
//! | `fp8` | e4m3 with a scale per token and head (`fp8-head`, `fp8-tensor`: coarser) | 8.25 |
//! | `int8`, `int6`, `int4` | K quantised per channel, V per token (`int4`: rotated) | 9.1, 7.1, 5.1 |
//!
//! Layout of a slot, little endian, every section a multiple of 16 bytes:
//!
//! ```text
//! header      32 bytes, zeros up to where the tables have to begin     (header.rs)
//! tables      per plane    scales, offsets, lists: one array each
//! elements    [plane][token][dim], one array per width: bytes, nibbles, pairs of bits
//! ```
//!
//! The elements begin at a multiple of 128 bytes: in slots that do too, a GPU writes whole lines over the link.
//!
//! A *plane* is one head of K or V of one layer, `[token][dim]`; planes are numbered as a native block
//! has them, `[layer][K|V][head]`.

mod fp8;
mod geometry;
mod hash;
mod header;
mod int;
mod lx4;
mod lxe;
mod pack;
mod raw;
mod rotate;
mod round;
mod sealed;
mod window;

#[cfg(test)]
mod tests;

use std::fmt;

pub use geometry::Geometry;
pub use hash::content_hash;
pub use header::Header;
pub(crate) use int::Int;
pub use sealed::LayerPlaces;

use crate::error::{Error, ErrorKind, Result};

const OP: &str = "codec";

/// Which tokens and heads of an `fp8` slot share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScalePer {
    /// All of one layer's K, all of its V.
    Tensor,
    /// The tokens of a head.
    Head,
    /// Every token of every head has its own.
    Token,
}

/// How a block is written into a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// As it is.
    Raw,
    /// Every bit of bf16 elements, with exponents in 4 bits.
    Lx4,
    /// Every bit of bf16 elements, with exponents in prefix codes: as few bytes as there may be. On the CPU only.
    Lxe,
    /// 8-bit floats, e4m3.
    Fp8(ScalePer),
    /// 8-bit integers, K per channel, V per token.
    Int8,
    /// 6-bit integers, likewise.
    Int6,
    /// 4-bit integers, likewise, V after a Hadamard rotation.
    Int4,
}

impl Codec {
    /// Every codec.
    pub const ALL: [Self; 9] = [
        Self::Raw,
        Self::Lx4,
        Self::Lxe,
        Self::Fp8(ScalePer::Tensor),
        Self::Fp8(ScalePer::Head),
        Self::Fp8(ScalePer::Token),
        Self::Int8,
        Self::Int6,
        Self::Int4,
    ];

    /// The name used in reports and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Lx4 => "lx4",
            Self::Lxe => "lxe",
            Self::Fp8(ScalePer::Tensor) => "fp8-tensor",
            Self::Fp8(ScalePer::Head) => "fp8-head",
            Self::Fp8(ScalePer::Token) => "fp8",
            Self::Int8 => "int8",
            Self::Int6 => "int6",
            Self::Int4 => "int4",
        }
    }

    /// The codec of this name.
    ///
    /// # Errors
    /// `Unsupported`, naming all there are.
    pub fn by_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|codec| codec.name() == name).ok_or_else(|| {
            Error::unsupported(OP, "codec", name, Self::ALL.map(Self::name).join(", "))
        })
    }

    /// Whether decoding gives back every bit.
    pub const fn is_exact(self) -> bool {
        matches!(self, Self::Raw | Self::Lx4 | Self::Lxe)
    }

    /// Whether [`Kernels`](crate::ops::Kernels) encode and decode it: all do but `lxe`.
    pub const fn runs_on_device(self) -> bool {
        !matches!(self, Self::Lxe)
    }

    /// The number that stands for the codec in headers and kernel parameters.
    pub const fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Lx4 => 1,
            Self::Lxe => 2,
            Self::Fp8(ScalePer::Tensor) => 3,
            Self::Fp8(ScalePer::Head) => 4,
            Self::Fp8(ScalePer::Token) => 5,
            Self::Int8 => 6,
            Self::Int6 => 7,
            Self::Int4 => 8,
        }
    }

    /// The codec that a number stands for.
    pub(crate) fn of_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.code() == code)
    }

    fn format(self) -> &'static dyn Format {
        match self {
            Self::Raw => &raw::Raw,
            Self::Lx4 => &lx4::Lx4,
            Self::Lxe => &lxe::Lxe,
            Self::Fp8(ScalePer::Tensor) => &fp8::Fp8(ScalePer::Tensor),
            Self::Fp8(ScalePer::Head) => &fp8::Fp8(ScalePer::Head),
            Self::Fp8(ScalePer::Token) => &fp8::Fp8(ScalePer::Token),
            Self::Int8 => &int::INT8,
            Self::Int6 => &int::INT6,
            Self::Int4 => &int::INT4,
        }
    }

    /// Bytes of a slot: of every block of this geometry. Of `lxe` they are the most; a slot's header says how many
    /// it has.
    ///
    /// # Errors
    /// `Unsupported` for an element type that the codec gains nothing on.
    pub fn slot_bytes(self, geometry: &Geometry) -> Result<usize> {
        Ok(Header::BYTES + self.format().arrays(geometry)?.bytes())
    }

    /// Where everything is in a slot of this geometry.
    ///
    /// # Errors
    /// As [`Codec::slot_bytes`].
    pub(crate) fn slot_layout(self, geometry: &Geometry) -> Result<SlotLayout> {
        let arrays = self.format().arrays(geometry)?;
        let mut end = (Header::BYTES + arrays.padding()) as u32;
        let offsets = arrays.lengths.map(|length| {
            let begin = end;
            end += length as u32;
            begin
        });
        let header = Header { codec: self, geometry: *geometry, bytes: end, escapes: 0, hash: 0 };
        Ok(SlotLayout {
            header: header.to_bytes(),
            offsets,
            elements: offsets[arrays.tables],
            bytes: end,
            escapes: if self == Self::Lx4 { lx4::capacity(geometry) as u32 } else { 0 },
            scale_planes: match self {
                Self::Fp8(ScalePer::Head) => 1,
                Self::Fp8(ScalePer::Tensor) => geometry.num_kv_heads() as u32,
                _ => 0,
            },
        })
    }

    /// Writes a block, bit patterns `[layer][K|V][head][token][dim]`, into a slot. Bytes of the slot beyond
    /// [`Codec::slot_bytes`] are left alone. What the slot holds after a fallback is no block.
    ///
    /// # Errors
    /// `InvalidArgument` for a block of another length or a slot that is too small, `Unsupported` as
    /// [`Codec::slot_bytes`].
    pub fn encode(self, geometry: &Geometry, block: &[u16], slot: &mut [u8]) -> Result<Encoded> {
        geometry.check_block(block.len())?;
        let bytes = self.slot_bytes(geometry)?;
        let given = slot.len();
        let Some(slot) = slot.get_mut(..bytes) else {
            return Err(Error::invalid(
                OP,
                format!("a slot of {given} bytes: {} needs {bytes}", self.name()),
            ));
        };
        let (head, payload) = slot.split_at_mut(Header::BYTES);
        let (padding, payload) = payload.split_at_mut(self.format().arrays(geometry)?.padding());
        padding.fill(0);
        let Written { unused, escapes } = match self.format().encode(geometry, block, payload) {
            Ok(written) => written,
            Err(fallback) => {
                head.fill(0);
                return Ok(Encoded::RawFallback(fallback));
            }
        };
        let bytes = (bytes - unused) as u32;
        let header = Header { codec: self, geometry: *geometry, bytes, escapes, hash: 0 };
        head.copy_from_slice(&header.to_bytes());
        let hash = content_hash(&slot[..bytes as usize]);
        slot[..Header::BYTES].copy_from_slice(&Header { hash, ..header }.to_bytes());
        Ok(Encoded::Fits { bytes, hash, escapes })
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What came of encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Encoded {
    /// The slot holds the block.
    Fits {
        /// Bytes of the slot that it takes: all of them, but of `lxe`.
        bytes: u32,
        /// Its content hash, which its header has too.
        hash: u64,
        /// Elements on the list of those that do not follow the others (`lx4` and `lxe`, else 0).
        escapes: u32,
    },
    /// The slot holds nothing: store the block raw.
    RawFallback(Fallback),
}

/// Why a codec does not hold a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// More elements than the slot lists have exponents outside of their window.
    Escapes {
        /// How many.
        needed: usize,
        /// How many a slot lists.
        capacity: usize,
    },
    /// More bytes of prefix codes than a slot has room for.
    Streams {
        /// How many.
        needed: usize,
        /// How many a slot has room for.
        capacity: usize,
    },
    /// An element is NaN or infinite, or the scales would be: no lossy codec says what becomes of it.
    NotFinite,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Escapes { needed, capacity } => {
                write!(f, "{needed} escapes, the slot lists {capacity}")
            }
            Self::Streams { needed, capacity } => {
                write!(f, "{needed} bytes of prefix codes, the slot has {capacity}")
            }
            Self::NotFinite => f.write_str("elements or scales that are not finite"),
        }
    }
}

/// Reads the block that a slot holds, of whatever codec, into `block`. Everything is verified first: a slot
/// in which any one bit has flipped is refused, as is every other damage but with a chance of 2^-64.
///
/// # Errors
/// `Corrupt` for a slot that is truncated, damaged, of another geometry, not a slot at all, or of a codec
/// or version that is not known; nothing is written then. `InvalidArgument` for a `block` of another length.
pub fn decode(geometry: &Geometry, slot: &[u8], block: &mut [u16]) -> Result<Header> {
    geometry.check_block(block.len())?;
    let header = verify(geometry, slot)?;
    let format = header.codec.format();
    let payload = Header::BYTES + format.arrays(geometry)?.padding();
    let payload = &slot[payload..header.bytes as usize];
    format.decode(&header, payload, block).map_err(corrupt)?;
    Ok(header)
}

/// Verifies header and content hash of a slot that is to hold a block of this geometry.
///
/// # Errors
/// `Corrupt`, as [`decode`].
pub fn verify(geometry: &Geometry, slot: &[u8]) -> Result<Header> {
    let header = Header::read(slot)?;
    if header.geometry != *geometry {
        return Err(corrupt(format!("a slot of {}, not of {geometry}", header.geometry)));
    }
    let most = header.codec.slot_bytes(geometry).map_err(|error| corrupt(error.to_string()))?;
    let least = most - header.codec.format().variable_bytes(geometry);
    let needed = header.bytes as usize;
    if !(least..=most).contains(&needed) {
        let codec = header.codec;
        return Err(corrupt(format!("a slot of {needed} bytes, {codec} has {least} to {most}")));
    }
    let Some(slot) = slot.get(..needed) else {
        return Err(corrupt(format!("truncated to {} of {needed} bytes", slot.len())));
    };
    let hash = content_hash(slot);
    if hash != header.hash {
        return Err(corrupt(format!(
            "content hash {hash:016x}, the header says {:016x}",
            header.hash
        )));
    }
    Ok(header)
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(OP, ErrorKind::Corrupt(what.into()))
}

/// Most arrays of a payload.
const MOST_ARRAYS: usize = 7;

/// Of what offset in a slot its elements begin at a multiple.
const LINE: usize = 128;

/// The arrays of a payload: first tables, then those that have something of every element.
struct Arrays {
    /// Bytes, multiples of 16; 0 past the last.
    lengths: [usize; MOST_ARRAYS],
    /// How many are tables.
    tables: usize,
}

impl Arrays {
    fn new<const N: usize>(lengths: [usize; N], tables: usize) -> Self {
        let mut all = [0; MOST_ARRAYS];
        all[..N].copy_from_slice(&lengths);
        Self { lengths: all, tables }
    }

    /// Zeros between header and tables.
    fn padding(&self) -> usize {
        let end = Header::BYTES + self.lengths[..self.tables].iter().sum::<usize>();
        end.next_multiple_of(LINE) - end
    }

    fn bytes(&self) -> usize {
        self.padding() + self.lengths.iter().sum::<usize>()
    }
}

/// What a kernel is told of a slot.
pub(crate) struct SlotLayout {
    /// Without escapes and hash.
    pub header: [u8; Header::BYTES],
    /// Of the arrays.
    pub offsets: [u32; MOST_ARRAYS],
    /// Where the elements begin, behind header and tables.
    pub elements: u32,
    pub bytes: u32,
    /// How many escapes the slot lists.
    pub escapes: u32,
    /// Planes that share a scale; 0: every token has its own.
    pub scale_planes: u32,
}

/// What there is to say of a payload that has been written.
#[derive(Default)]
struct Written {
    /// Bytes at the end that are not part of it, a multiple of 8.
    unused: usize,
    escapes: u32,
}

/// One codec's payload. Slices have the lengths that geometry and [`Format::arrays`] give them.
trait Format {
    fn arrays(&self, geometry: &Geometry) -> Result<Arrays>;

    /// How many bytes at the end of a payload it may lack.
    fn variable_bytes(&self, _geometry: &Geometry) -> usize {
        0
    }

    /// Writes every byte of the payload that it uses.
    fn encode(
        &self,
        geometry: &Geometry,
        block: &[u16],
        payload: &mut [u8],
    ) -> Result<Written, Fallback>;

    /// Writes every element of the block, or, for a payload that no encoder writes, none.
    fn decode(&self, header: &Header, payload: &[u8], block: &mut [u16]) -> Result<(), String>;
}
