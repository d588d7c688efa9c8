//! What a file holds of a host slot: exact blocks of bf16 as `lxe`, anything else as it is.
//!
//! A slot that is lossy stays what it is: nothing is encoded on top of another codec, nor decoded to be. What reading
//! puts back into the slot is what was there, to the bit: `lx4` depends on the block alone.

use std::borrow::Cow;

use crate::codec::{self, Codec, Encoded};
use crate::engine::{GroupFormat, Section};
use crate::error::{Error, ErrorKind, Result};

const OP: &str = "file store";

/// How the bytes of a file stand for those of a slot. The numbers are those of headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Form {
    /// They are the slot's, up to what it uses.
    AsIs = 0,
    /// Slots of `lxe`, one for each section, back to back; then what a block that is kept as it is has behind its
    /// layers.
    Lxe = Codec::Lxe.code() as isize,
}

impl Form {
    /// The form of a number.
    pub fn of_code(code: u32) -> Option<Self> {
        [Self::AsIs, Self::Lxe].into_iter().find(|form| *form as u32 == code)
    }
}

/// The slots of one group as a store sees them: `slot_bytes` each, in a format that is known, or in none.
#[derive(Clone, Copy)]
pub(in crate::engine) struct Slots<'a> {
    pub format: Option<&'a GroupFormat>,
    pub slot_bytes: usize,
}

impl<'a> Slots<'a> {
    /// Whether sections are as large as their codec makes them, apart from each other and within a slot.
    ///
    /// # Errors
    /// `InvalidArgument` for others, `Unsupported` for elements that the codec does not know.
    pub fn check(self) -> Result<()> {
        let Some(format) = self.format else { return Ok(()) };
        let mut end = 0;
        for section in &format.sections {
            let Section { geometry, offset, bytes, .. } = *section;
            let needed = match format.codec {
                Codec::Raw => geometry.raw_bytes(),
                codec => codec.slot_bytes(&geometry)?,
            };
            let behind = offset.checked_add(bytes).filter(|_| offset >= end);
            match behind.filter(|behind| *behind <= self.slot_bytes as u64) {
                Some(behind) if bytes == needed as u64 => end = behind,
                _ => {
                    return Err(Error::invalid(
                        OP,
                        format!(
                            "a section of {bytes} bytes from {offset} on, where {needed} are one of {}, \
                             the one before ends at {end} and slots have {}",
                            format.codec, self.slot_bytes
                        ),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Bytes of a slot that count.
    pub fn used_bytes(self) -> usize {
        let encoded = self.format.filter(|format| format.is_encoded());
        encoded.map_or(self.slot_bytes, |format| format.end() as usize).min(self.slot_bytes)
    }

    /// Bytes that a block takes in a file, unless it is one in a few that does not shrink.
    pub fn file_bytes(self) -> usize {
        let lxe = |sections: &[Section]| -> Option<usize> {
            let bytes = sections.iter().map(|s| Codec::Lxe.slot_bytes(&s.geometry).ok());
            Some(bytes.sum::<Option<usize>>()? + self.rest().len())
        };
        self.exact().and_then(lxe).unwrap_or(usize::MAX).min(self.used_bytes())
    }

    /// The sections, if their blocks can be shrunk.
    fn exact(self) -> Option<&'a [Section]> {
        let format = self.format.filter(|format| format.codec.is_exact())?;
        let fits = format.end() <= self.slot_bytes as u64;
        let lxe = |s: &Section| Codec::Lxe.slot_bytes(&s.geometry).is_ok();
        (fits && !format.sections.is_empty() && format.sections.iter().all(lxe))
            .then_some(&format.sections)
    }

    /// What a slot has behind its sections that has to be kept.
    fn rest(self) -> std::ops::Range<usize> {
        let begin = match self.format {
            Some(format) if !format.is_encoded() => format.end() as usize,
            _ => self.slot_bytes,
        };
        begin.min(self.slot_bytes)..self.slot_bytes
    }

    /// What a file is to hold of a slot.
    ///
    /// # Errors
    /// `Corrupt` for a slot that does not hold what its format says.
    pub fn shrink(self, slot: &[u8]) -> Result<(Form, Cow<'_, [u8]>)> {
        let as_is = Cow::Borrowed(&slot[..self.used_bytes()]);
        let Some(sections) = self.exact() else { return Ok((Form::AsIs, as_is)) };
        let mut bytes = Vec::new();
        let mut block = Vec::new();
        for section in sections {
            block.resize(section.geometry.elements(), 0);
            self.read(section, slot, &mut block)?;
            let begin = bytes.len();
            bytes.resize(begin + Codec::Lxe.slot_bytes(&section.geometry)?, 0);
            match Codec::Lxe.encode(&section.geometry, &block, &mut bytes[begin..])? {
                Encoded::Fits { bytes: used, .. } => bytes.truncate(begin + used as usize),
                Encoded::RawFallback(_) => return Ok((Form::AsIs, as_is)),
            }
        }
        bytes.extend_from_slice(&slot[self.rest()]);
        Ok(if bytes.len() < as_is.len() {
            (Form::Lxe, Cow::Owned(bytes))
        } else {
            (Form::AsIs, as_is)
        })
    }

    /// Puts what a file holds back into a slot.
    ///
    /// # Errors
    /// `Corrupt` for what no slot of this format has been shrunk to.
    pub fn restore(self, form: Form, mut bytes: &[u8], slot: &mut [u8]) -> Result<()> {
        if form == Form::AsIs {
            let used = slot.get_mut(..bytes.len()).filter(|used| used.len() == self.used_bytes());
            used.ok_or_else(|| corrupt("it is of another length"))?.copy_from_slice(bytes);
            return Ok(());
        }
        let sections = self.exact().ok_or_else(|| corrupt("nothing of this group is in lxe"))?;
        let mut block = Vec::new();
        for section in sections {
            block.resize(section.geometry.elements(), 0);
            let header = codec::decode(&section.geometry, bytes, &mut block)?;
            if header.codec != Codec::Lxe {
                return Err(corrupt("a section in another codec"));
            }
            bytes = bytes.get(header.bytes as usize..).unwrap_or_default();
            self.write(section, &block, slot)?;
        }
        let rest = &mut slot[self.rest()];
        if rest.len() != bytes.len() {
            return Err(corrupt("what follows its sections is of another length"));
        }
        rest.copy_from_slice(bytes);
        Ok(())
    }

    /// Reads the elements of a section.
    fn read(self, section: &Section, slot: &[u8], block: &mut [u16]) -> Result<()> {
        let bytes = &slot[within(section)];
        if self.format.is_some_and(GroupFormat::is_encoded) {
            return codec::decode(&section.geometry, bytes, block).map(drop);
        }
        for (element, pair) in block.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *element = u16::from_le_bytes(*pair);
        }
        Ok(())
    }

    /// Writes the elements of a section.
    fn write(self, section: &Section, block: &[u16], slot: &mut [u8]) -> Result<()> {
        let bytes = &mut slot[within(section)];
        if let Some(format) = self.format.filter(|format| format.is_encoded()) {
            return match format.codec.encode(&section.geometry, block, bytes)? {
                Encoded::Fits { .. } => Ok(()),
                Encoded::RawFallback(why) => Err(corrupt(&format!("no slot had this: {why}"))),
            };
        }
        for (pair, element) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(block) {
            *pair = element.to_le_bytes();
        }
        Ok(())
    }
}

/// Where a section is in a slot.
fn within(section: &Section) -> std::ops::Range<usize> {
    section.offset as usize..(section.offset + section.bytes) as usize
}

fn corrupt(what: &str) -> Error {
    Error::new(OP, ErrorKind::Corrupt(what.into()))
}
