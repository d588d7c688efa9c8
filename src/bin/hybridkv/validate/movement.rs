//! `move_blocks` bit by bit, in every direction: all of the target memory afterwards is what it was
//! before, with the fragments in their places.

use hybridkv::abi::hkv_copy;
use hybridkv::device::{Device, DeviceBuffer, PinnedBuffer};
use hybridkv::error::Result;
use hybridkv::ops::{CtaQuota, MoveArgs, MoveShape};

use super::bed::{Bed, Fault, Outcome};
use crate::random::Rng;

/// Where a side of a move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Device,
    Host,
}

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
        let mut random = |n: usize| -> Vec<u64> { (0..n / 8).map(|_| rng.next()).collect() };
        let (source, before) = (random(length), random(target_length));
        let mut expected: Vec<u8> = bytemuck::cast_slice(&before).to_vec();
        for ((&from, &to), &bytes) in sources.iter().zip(&targets).zip(&self.fragments) {
            let fragment = &bytemuck::cast_slice::<u64, u8>(&source)[from..from + bytes];
            expected[to..to + bytes].copy_from_slice(fragment);
        }

        let from = Memory::new(bed, self.from, bytemuck::cast_slice(&source))?;
        let to = Memory::new(bed, self.to, bytemuck::cast_slice(&before))?;
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
        match (bed.fault, &mut table[..]) {
            (Some(Fault::Swap), [a, b, ..]) if a.bytes == b.bytes => {
                std::mem::swap(&mut a.src, &mut b.src)
            }
            (Some(Fault::Skip), [_, ..]) => drop(table.pop()),
            (Some(Fault::Length), [first, ..]) => first.bytes -= 16,
            _ => {}
        }
        let bytes: Vec<u8> = table
            .iter()
            .flat_map(|c| [c.src as u64, c.dst as u64, c.bytes].map(u64::to_ne_bytes))
            .flatten()
            .collect();
        let copies = Memory::new(bed, self.table, &bytes)?;
        let args = MoveArgs {
            copies: hybridkv::device::Span::new(copies.address(), bytes.len() as u64),
            num_copies: table.len() as u64,
            shape: MoveShape::FRAGMENTS,
            quota: self.ctas.map_or(CtaQuota::WHOLE_DEVICE, CtaQuota::at_most),
        };
        let stream = bed.stream.as_ref();
        // SAFETY: all memory lives until the stream is synchronised; the fragments lie apart.
        unsafe {
            bed.kernels.move_blocks(&args, stream)?;
            match bed.fault {
                Some(Fault::Stray) => stream.fill(to.address(), !(before[0] as u8), 1)?,
                Some(Fault::Nan) if !targets.is_empty() => {
                    let to = to.address() + targets[0] as u64;
                    stream.fill(to, !expected[targets[0]], 1)?;
                }
                _ => {}
            }
        }
        stream.synchronize()?;
        let after = to.read()?;
        let mut outcome = Outcome::default();
        let wrong = after.iter().zip(&expected).filter(|(a, b)| a != b).count();
        if wrong > 0 {
            let first = after.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(0);
            let fragment = targets
                .iter()
                .zip(&self.fragments)
                .position(|(&at, &bytes)| (at..at + bytes).contains(&first));
            let place =
                fragment.map_or("beside all fragments".to_owned(), |f| format!("in fragment {f}"));
            outcome.fail(format!("{wrong} bytes are wrong, the first at {first}, {place}"));
            outcome.note("wrong", wrong as f64);
        }
        Ok(outcome)
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
