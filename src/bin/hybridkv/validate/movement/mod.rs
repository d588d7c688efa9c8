//! Moves bit by bit, in every direction: all of the target memory afterwards is what it was before, with what was to
//! move in its place.

mod blocks;
mod fragments;

use hybridkv::abi::hkv_copy;
use hybridkv::device::{Device, DeviceBuffer, PinnedBuffer};
use hybridkv::error::Result;

use super::bed::{Bed, Fault, Outcome};
use crate::random::Rng;

/// One case.
#[derive(Debug)]
pub enum Case {
    Fragments(fragments::Case),
    Blocks(blocks::Case),
}

impl Case {
    /// Draws a case of at most `bytes` bytes.
    pub fn random(rng: &mut Rng, bytes: usize) -> Self {
        if rng.chance(50) {
            Self::Fragments(fragments::Case::random(rng, bytes))
        } else {
            Self::Blocks(blocks::Case::random(rng, bytes))
        }
    }

    /// The class of the case in the summary.
    pub fn class(&self) -> String {
        match self {
            Self::Fragments(case) => case.class(),
            Self::Blocks(case) => case.class(),
        }
    }

    /// The case's name.
    pub fn name(&self) -> String {
        match self {
            Self::Fragments(case) => case.name(),
            Self::Blocks(case) => case.name(),
        }
    }

    /// Runs the case.
    pub fn run(&self, bed: &Bed, rng: &mut Rng) -> Result<Outcome> {
        match self {
            Self::Fragments(case) => case.run(bed, rng),
            Self::Blocks(case) => case.run(bed, rng),
        }
    }
}

/// Where a side of a move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Device,
    Host,
}

/// So many random bytes, a multiple of 8.
fn noise(bytes: usize, rng: &mut Rng) -> Vec<u8> {
    (0..bytes / 8).flat_map(|_| rng.next().to_ne_bytes()).collect()
}

/// Descriptors as they lie in memory.
fn bytes_of(copies: &[hkv_copy]) -> Vec<u8> {
    let words = copies.iter().flat_map(|c| [c.src as u64, c.dst as u64, c.bytes]);
    words.flat_map(u64::to_ne_bytes).collect()
}

/// Damages the descriptors of a move.
fn damage(fault: Option<Fault>, copies: &mut Vec<hkv_copy>) {
    match (fault, &mut copies[..]) {
        (Some(Fault::Swap), [a, b, ..]) if a.bytes == b.bytes => {
            std::mem::swap(&mut a.src, &mut b.src)
        }
        (Some(Fault::Skip), [_, ..]) => drop(copies.pop()),
        (Some(Fault::Length), [first, ..]) => first.bytes -= 16,
        _ => {}
    }
}

/// Compares the target memory with what it should hold. `piece` says which of the pieces that moved a byte belongs to.
fn judge(
    after: &[u8],
    expected: &[u8],
    what: &str,
    piece: impl Fn(usize) -> Option<usize>,
) -> Outcome {
    let mut outcome = Outcome::default();
    let mut wrong = (0..expected.len()).filter(|&at| after[at] != expected[at]);
    if let Some(first) = wrong.next() {
        let count = 1 + wrong.count();
        let place = match piece(first) {
            Some(piece) => format!("in {what} {piece}"),
            None => format!("beside all {what}s"),
        };
        outcome.fail(format!("{count} bytes are wrong, the first at {first}, {place}"));
        outcome.note("wrong", count as f64);
    }
    outcome
}

/// Memory on either side.
pub enum Memory {
    Device(DeviceBuffer),
    Host(PinnedBuffer),
}

impl Memory {
    /// Memory that holds these bytes.
    pub fn new(bed: &Bed, place: Place, bytes: &[u8]) -> Result<Self> {
        let device: &Device = &bed.device;
        Ok(match place {
            Place::Device => Self::Device(device.upload(bytes)?),
            Place::Host => {
                let mut buffer = device.alloc_pinned(bytes.len())?;
                buffer.as_mut_slice().copy_from_slice(bytes);
                Self::Host(buffer)
            }
        })
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        match self {
            Self::Device(buffer) => buffer.address(),
            Self::Host(buffer) => buffer.address(),
        }
    }

    /// What it holds.
    pub fn read(&self) -> Result<Vec<u8>> {
        match self {
            Self::Device(buffer) => buffer.download(),
            Self::Host(buffer) => Ok(buffer.as_slice().to_vec()),
        }
    }

    /// Overwrites what it holds from the start on, and waits.
    pub fn write(&self, bed: &Bed, bytes: &[u8]) -> Result<()> {
        let mut staging = bed.device.alloc_pinned(bytes.len())?;
        staging.as_mut_slice().copy_from_slice(bytes);
        // SAFETY: both live until the stream is synchronised.
        unsafe {
            bed.stream.as_ref().copy(staging.address(), self.address(), bytes.len())?;
        }
        bed.stream.as_ref().synchronize()
    }
}
