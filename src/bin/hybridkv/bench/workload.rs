//! Memory to time work on; moves of fragments at random addresses, plain reads and the copy engines.

use hybridkv::abi::hkv_copy;
use hybridkv::device::{Device, DeviceBuffer, Event, PinnedBuffer, Span, Stream, StreamRef};
use hybridkv::e4m3;
use hybridkv::error::Result;
use hybridkv::layout::Dtype;
use hybridkv::ops::{CtaQuota, Kernels, MoveArgs, MoveShape};

use super::timing::Workload;
use crate::random::Rng;

/// Device memory full of random numbers N(0, 1) of a type: 32 MiB of them, repeated.
pub fn random_memory(
    device: &Device,
    bytes: u64,
    dtype: Dtype,
    rng: &mut Rng,
) -> Result<DeviceBuffer> {
    let buffer = device.alloc(bytes as usize)?;
    let first = (bytes as usize).min(32 << 20);
    let numbers: Vec<u8> = match dtype {
        Dtype::E4m3 => rng.normals(first).map(e4m3::from_f32).collect(),
        _ => rng.normals(first / 2).flat_map(|x| half::bf16::from_f32(x).to_ne_bytes()).collect(),
    };
    let staging = device.upload(&numbers)?;
    let stream = device.stream()?;
    let mut filled = 0;
    while filled < bytes as usize {
        let count = (bytes as usize - filled).min(numbers.len());
        // SAFETY: both buffers live until the stream is synchronised below.
        unsafe {
            stream.as_ref().copy(staging.address(), buffer.address() + filled as u64, count)?
        };
        filled += count;
    }
    stream.as_ref().synchronize()?;
    Ok(buffer)
}

/// Where a move starts and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Pinned host to device.
    H2d,
    /// Device to pinned host.
    D2h,
    /// Device to device.
    D2d,
}

impl Direction {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::H2d => "h2d",
            Self::D2h => "d2h",
            Self::D2d => "d2d",
        }
    }
}

/// Memory on both sides of the link, for all moves of a run.
pub struct Arenas {
    device: DeviceBuffer,
    host: PinnedBuffer,
}

impl Arenas {
    /// Arenas of `bytes` on the device and half as much on the host, filled with random bits.
    pub fn new(device: &Device, bytes: u64, rng: &mut Rng) -> Result<Self> {
        let arena = random_memory(device, bytes, Dtype::Bf16, rng)?;
        let mut host = device.alloc_pinned(bytes as usize / 2)?;
        for (i, word) in host.as_mut_slice().chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&(i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_ne_bytes());
        }
        Ok(Self { device: arena, host })
    }

    /// Bytes of each side of a move.
    pub fn side_bytes(&self) -> u64 {
        self.host.len() as u64
    }

    /// The memory that a move over the link starts in.
    pub fn side(&self, direction: Direction) -> Span {
        let (source, _, bytes) = self.sides(direction);
        Span::new(source, bytes)
    }

    /// First address and length of the source and of the target of a move. The source of a move inside
    /// the device is its first half, the target its second.
    fn sides(&self, direction: Direction) -> (u64, u64, u64) {
        let (device, host) = (self.device.address(), self.host.address());
        let bytes = self.host.len() as u64;
        match direction {
            Direction::H2d => (host, device, bytes),
            Direction::D2h => (device, host, bytes),
            Direction::D2d => (device, device + bytes, bytes),
        }
    }
}

/// `move_blocks` of many fragments of one size, from random addresses to random addresses.
pub struct Move<'a> {
    kernels: &'a Kernels,
    tables: Vec<DeviceBuffer>,
    copies: u64,
    quota: CtaQuota,
    bytes: u64,
}

impl<'a> Move<'a> {
    /// Sets the work up: about `bytes` per round, in fragments no larger than a side of the arenas.
    pub fn new(
        kernels: &'a Kernels,
        arenas: &Arenas,
        direction: Direction,
        fragment: u64,
        bytes: u64,
        quota: CtaQuota,
        rng: &mut Rng,
    ) -> Result<Self> {
        let (source, target, length) = arenas.sides(direction);
        let places = length / fragment;
        let copies = (bytes / fragment).clamp(1, places);
        let tables = (0..2)
            .map(|_| {
                let mut places = |start: u64| -> Vec<u64> {
                    let mut order: Vec<u64> = (0..places).collect();
                    rng.shuffle(&mut order);
                    order[..copies as usize].iter().map(|i| start + i * fragment).collect()
                };
                let (from, to) = (places(source), places(target));
                let words: Vec<u64> =
                    from.iter().zip(&to).flat_map(|(&src, &dst)| [src, dst, fragment]).collect();
                debug_assert_eq!(words.len() * 8, from.len() * size_of::<hkv_copy>());
                kernels.device().upload(&words)
            })
            .collect::<Result<_>>()?;
        Ok(Self { kernels, tables, copies, quota, bytes: copies * fragment })
    }

    /// Bytes that one round moves.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Workload for Move<'_> {
    fn rounds(&self) -> usize {
        self.tables.len()
    }

    fn submit(&self, round: usize, stream: StreamRef<'_>) -> Result<()> {
        let args = MoveArgs {
            copies: self.tables[round].span(),
            num_copies: self.copies,
            shape: MoveShape::FRAGMENTS,
            quota: self.quota,
        };
        // SAFETY: the tables live as long as `self`, the arenas longer; `measure` waits before it returns.
        unsafe { self.kernels.move_blocks(&args, stream) }
    }
}

/// One large copy by the copy engines.
pub struct EngineCopy {
    source: u64,
    target: u64,
    bytes: u64,
}

impl EngineCopy {
    /// A copy of a whole side of the arenas.
    pub fn new(arenas: &Arenas, direction: Direction) -> Self {
        let (source, target, bytes) = arenas.sides(direction);
        Self { source, target, bytes }
    }

    /// Bytes of the copy.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Workload for EngineCopy {
    fn rounds(&self) -> usize {
        1
    }

    fn submit(&self, _round: usize, stream: StreamRef<'_>) -> Result<()> {
        // SAFETY: the arenas outlive the work; `measure` waits before it returns.
        unsafe { stream.copy(self.source, self.target, self.bytes as usize) }
    }

    fn in_graph(&self) -> bool {
        false
    }
}

/// One large copy each way at once by the copy engines, in pieces so that neither runs alone at the end.
pub struct BothWays {
    host: u64,
    device: u64,
    /// Of each direction.
    bytes: u64,
    other: Stream,
    begun: Event,
    ended: Event,
}

impl BothWays {
    /// Half of the host's arena up, the other half down.
    pub fn new(device: &Device, arenas: &Arenas) -> Result<Self> {
        let bytes = arenas.side_bytes() / 2 / 4096 * 4096;
        Ok(Self {
            host: arenas.host.address(),
            device: arenas.device.address(),
            bytes,
            other: device.stream()?,
            begun: device.event()?,
            ended: device.event()?,
        })
    }

    /// Bytes of both copies.
    pub fn bytes(&self) -> u64 {
        2 * self.bytes
    }
}

impl Workload for BothWays {
    fn rounds(&self) -> usize {
        1
    }

    fn submit(&self, _round: usize, stream: StreamRef<'_>) -> Result<()> {
        let (other, bytes) = (self.other.as_ref(), self.bytes as usize);
        stream.record(&self.begun)?;
        other.wait(&self.begun)?;
        // SAFETY: the arenas outlive the work, and the halves are apart; `measure` waits before it returns.
        unsafe {
            stream.copy(self.host, self.device, bytes)?;
            other.copy(self.device + self.bytes, self.host + self.bytes, bytes)?;
        }
        other.record(&self.ended)?;
        stream.wait(&self.ended)
    }

    fn in_graph(&self) -> bool {
        false
    }
}

/// Plain loads of all of a buffer.
pub struct Read<'a> {
    kernels: &'a Kernels,
    data: DeviceBuffer,
    checksum: DeviceBuffer,
}

impl<'a> Read<'a> {
    /// Sets the work up over `bytes` bytes.
    pub fn new(kernels: &'a Kernels, bytes: u64, rng: &mut Rng) -> Result<Self> {
        let data = random_memory(kernels.device(), bytes / 16 * 16, Dtype::Bf16, rng)?;
        let checksum = kernels.device().upload(&[0u32])?;
        Ok(Self { kernels, data, checksum })
    }

    /// Bytes that are read.
    pub fn bytes(&self) -> u64 {
        self.data.len() as u64
    }
}

impl Workload for Read<'_> {
    fn rounds(&self) -> usize {
        1
    }

    fn submit(&self, _round: usize, stream: StreamRef<'_>) -> Result<()> {
        // SAFETY: both buffers live as long as `self`; `measure` waits before it returns.
        unsafe { self.kernels.read_memory(self.data.span(), self.checksum.span(), stream) }
    }
}
