//! Moves of fragments, each at a place of its own.

use hybridkv::abi::hkv_copy;
use hybridkv::device::Span;
use hybridkv::error::Result;
use hybridkv::ops::{CtaQuota, MoveArgs, MoveShape};

use super::super::bed::{Bed, Fault, Outcome};
use super::{Memory, Place, bytes_of, damage, judge, noise};
use crate::random::Rng;

/// One case of `move_blocks`.
#[derive(Debug)]
pub struct Case {
    from: Place,
    to: Place,
    /// Bytes of every fragment, multiples of 16.
    fragments: Vec<usize>,
    /// Where the table of descriptors is.
    table: Place,
    /// At most so many CTAs; `None`: the whole device.
    ctas: Option<u32>,
}

impl Case {
    /// Draws a case of at most `bytes` bytes.
    pub fn random(rng: &mut Rng, bytes: usize) -> Self {
        let (from, to) = rng.pick(&[
            (Place::Host, Place::Device),
            (Place::Device, Place::Host),
            (Place::Device, Place::Device),
            (Place::Host, Place::Host),
        ]);
        let size =
            rng.pick(&[16, 48, 256, 512, 1008, 1024, 4096, 4112, 16384, 65536, 98304, 1 << 20]);
        let mixed = rng.chance(30);
        let most = (bytes / size).clamp(1, 2000) as u64;
        let count = rng.pick(&[0, 1, 2, most / 2, most]);
        let fragments = (0..count)
            .map(|_| if mixed { 16 * rng.range(1, size as u64 / 16) as usize } else { size })
            .collect();
        Self {
            from,
            to,
            fragments,
            table: rng.pick(&[Place::Device, Place::Host]),
            ctas: rng.pick(&[None, Some(1), Some(4), Some(16)]),
        }
    }

    /// The class of the case in the summary.
    pub fn class(&self) -> String {
        format!("move {:?} to {:?}", self.from, self.to)
    }

    /// The case's name.
    pub fn name(&self) -> String {
        let largest = self.fragments.iter().max().copied().unwrap_or(0);
        let uniform = self.fragments.iter().all(|&size| size == largest);
        format!(
            "move/{:?}-{:?}/{}{largest}x{} table:{:?} ctas:{}",
            self.from,
            self.to,
            if uniform { "" } else { "<=" },
            self.fragments.len(),
            self.table,
            self.ctas.map_or("all".to_owned(), |ctas| ctas.to_string()),
        )
    }

    /// Runs the case.
    pub fn run(&self, bed: &Bed, rng: &mut Rng) -> Result<Outcome> {
        let (sources, length) = self.scatter(rng);
        let (targets, target_length) = self.scatter(rng);
        let (source, before) = (noise(length, rng), noise(target_length, rng));
        let mut expected = before.clone();
        for ((&from, &to), &bytes) in sources.iter().zip(&targets).zip(&self.fragments) {
            expected[to..to + bytes].copy_from_slice(&source[from..from + bytes]);
        }

        let from = Memory::new(bed, self.from, &source)?;
        let to = Memory::new(bed, self.to, &before)?;
        let mut table: Vec<hkv_copy> = sources
            .iter()
            .zip(&targets)
            .zip(&self.fragments)
            .map(|((&source, &target), &bytes)| hkv_copy {
                src: (from.address() + source as u64) as *const _,
                dst: (to.address() + target as u64) as *mut _,
                bytes: bytes as u64,
            })
            .collect();
        damage(bed.fault, &mut table);
        let bytes = bytes_of(&table);
        let copies = Memory::new(bed, self.table, &bytes)?;
        let args = MoveArgs {
            copies: Span::new(copies.address(), bytes.len() as u64),
            num_copies: table.len() as u64,
            shape: MoveShape::FRAGMENTS,
            quota: self.ctas.map_or(CtaQuota::WHOLE_DEVICE, CtaQuota::at_most),
        };
        let stream = bed.stream.as_ref();
        // SAFETY: all memory lives until the stream is synchronised; the fragments lie apart.
        unsafe {
            bed.kernels.move_blocks(&args, stream)?;
            match bed.fault {
                Some(Fault::Stray) => stream.fill(to.address(), !before[0], 1)?,
                Some(Fault::Nan) if !targets.is_empty() => {
                    let to = to.address() + targets[0] as u64;
                    stream.fill(to, !expected[targets[0]], 1)?;
                }
                _ => {}
            }
        }
        stream.synchronize()?;
        let fragment = |byte| {
            let mut places = targets.iter().zip(&self.fragments);
            places.position(|(&at, &bytes)| (at..at + bytes).contains(&byte))
        };
        Ok(judge(&to.read()?, &expected, "fragment", fragment))
    }

    /// Offsets of the fragments in random order with gaps of 0 to 48 bytes, and the length of it all.
    fn scatter(&self, rng: &mut Rng) -> (Vec<usize>, usize) {
        let mut order: Vec<usize> = (0..self.fragments.len()).collect();
        rng.shuffle(&mut order);
        let mut offsets = vec![0; self.fragments.len()];
        let mut end = 32;
        for index in order {
            end += 16 * rng.below(4) as usize;
            offsets[index] = end;
            end += self.fragments[index];
        }
        (offsets, end + 32)
    }
}
