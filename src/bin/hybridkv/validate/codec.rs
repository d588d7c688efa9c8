//! `encode` and `decode` bit by bit against `hybridkv::codec`: slots with everything beside them, blocks with
//! everything beside them, results; blocks that no slot holds; damaged slots.

use hybridkv::abi::{HKV_SLOT_CORRUPT, HKV_SLOT_ESCAPES, HKV_SLOT_NOT_FINITE, HKV_SLOT_OK};
use hybridkv::codec::{Codec, Encoded, Fallback, Geometry, decode};
use hybridkv::device::{Span, StreamRef};
use hybridkv::error::Result;
use hybridkv::layout::{Dtype, KvShape, KvView};
use hybridkv::ops::{CodecArgs, CtaQuota};

use super::bed::{Bed, Fault, Outcome, encode};
use super::case::{LAYOUTS, Layout, PoolShape};
use super::movement::{Memory, Place};
use crate::random::Rng;

/// What a slot or a block holds where nothing is written.
const UNWRITTEN: u8 = 0xa5;

/// What the elements are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Data {
    /// Normal, with channels of different magnitude and offset.
    Channels,
    /// Any bits, in every block.
    Anything,
    /// Normal, with some elements of any bits.
    Speckled,
    /// One value.
    Constant,
}

/// One case.
#[derive(Debug)]
pub struct Case {
    codec: Codec,
    dtype: Dtype,
    head_dim: usize,
    heads: usize,
    block_size: usize,
    layout: Layout,
    /// Of a block, and those of them that go into slots.
    layers: usize,
    encoded: std::ops::Range<usize>,
    blocks: usize,
    /// Blocks that are encoded.
    count: usize,
    data: Data,
    slots: Place,
    ctas: Option<u32>,
}

impl Case {
    /// Draws a case of at most `pool` elements.
    pub fn random(rng: &mut Rng, pool: usize) -> Self {
        let head_dim = rng.pick(&[16, 48, 64, 96, 128, 128, 256]);
        let heads = rng.pick(&[1, 2, 3, 8]);
        let block_size = rng.pick(&[8, 16, 16, 32, 64, 128]);
        let layers = rng.pick(&[1, 2, 4]);
        let block = 2 * head_dim * heads * block_size * layers;
        let blocks = rng.range(1, (pool / block).clamp(1, 60) as u64) as usize;
        let codec = rng.pick(&Codec::ALL.map(|codec| match codec.runs_on_device() {
            true => codec,
            false => Codec::Raw,
        }));
        let dtype =
            if codec == Codec::Lx4 { Dtype::Bf16 } else { rng.pick(&[Dtype::Bf16, Dtype::F16]) };
        let first = rng.below(layers as u64) as usize;
        Self {
            codec,
            dtype,
            head_dim,
            heads,
            block_size,
            layout: rng.pick(&LAYOUTS),
            layers,
            encoded: first..rng.range(first as u64 + 1, layers as u64) as usize,
            blocks,
            count: rng.range(1, blocks as u64) as usize,
            data: rng.pick(&[
                Data::Channels,
                Data::Channels,
                Data::Speckled,
                Data::Anything,
                Data::Constant,
            ]),
            slots: rng.pick(&[Place::Device, Place::Host]),
            ctas: rng.pick(&[None, Some(1), Some(8)]),
        }
    }

    /// The class of the case in the summary.
    pub fn class(&self) -> String {
        format!("codec {}", self.codec)
    }

    /// The case's name.
    pub fn name(&self) -> String {
        format!(
            "codec/{}/{}/{}/d{}/b{} {:?} layers{:?}of{} blocks{}of{} {:?} slots:{:?} ctas:{}",
            self.codec,
            self.dtype.name(),
            self.heads,
            self.head_dim,
            self.block_size,
            self.layout,
            self.encoded,
            self.layers,
            self.count,
            self.blocks,
            self.data,
            self.slots,
            self.ctas.map_or("all".to_owned(), |ctas| ctas.to_string()),
        )
    }

    fn element(&self, rng: &mut Rng, normal: f32, channel: usize, rare: u64) -> u16 {
        let bits = rng.next();
        match self.data {
            Data::Anything => bits as u16,
            Data::Constant => encode(self.dtype, -0.625),
            Data::Speckled if bits.is_multiple_of(rare) => (bits >> 32) as u16,
            _ => {
                let (factor, shift) = if channel % 11 == 3 { (40.0, 90.0) } else { (1.0, 0.0) };
                encode(self.dtype, factor * normal + shift)
            }
        }
    }

    /// Runs the case.
    pub fn run(&self, bed: &Bed, rng: &mut Rng) -> Result<Outcome> {
        let pool = PoolShape::new(
            self.layout,
            self.blocks,
            self.layers,
            self.block_size,
            self.heads,
            self.head_dim,
        );
        let geometry = Geometry::new(
            self.encoded.len() as u32,
            self.heads as u32,
            self.head_dim as u32,
            self.block_size as u32,
            self.dtype,
        )?;
        // One odd element in about two slots, and in more elements than a list has room for.
        let rare = rng.pick(&[2 * geometry.elements() as u64, 5000, 300]);
        let normals: Vec<f32> = rng.normals(pool.elements).collect();
        let elements: Vec<u16> = normals
            .iter()
            .enumerate()
            .map(|(i, x)| self.element(rng, *x, i % self.head_dim, rare))
            .collect();
        let mut order: Vec<usize> = (0..self.blocks).collect();
        rng.shuffle(&mut order);
        let named = &order[..self.count];
        // Slots lie in another order than their blocks, with gaps.
        let slot_bytes = self.codec.slot_bytes(&geometry)?;
        let pitch = slot_bytes + 16 * rng.below(3) as usize;
        let mut places: Vec<usize> = (0..self.count).map(|i| 16 + i * pitch).collect();
        rng.shuffle(&mut places);

        // What should come of it.
        let mut slots = vec![UNWRITTEN; 32 + self.count * pitch];
        let mut expected = Vec::new();
        for (&block, &place) in named.iter().zip(&places) {
            let block = self.gather(&pool, &elements, block);
            let slot = &mut slots[place..place + slot_bytes];
            expected.push(self.codec.encode(&geometry, &block, slot)?);
        }

        let bytes: Vec<u8> = elements.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut damaged = bytes.clone();
        if bed.fault == Some(Fault::Nan) {
            let at = 2 * pool.index(named[0], self.encoded.start, 0, 0);
            damaged[at..at + 2].copy_from_slice(&encode(self.dtype, f32::NAN).to_le_bytes());
        }
        let source = Memory::new(bed, Place::Device, &damaged)?;
        let target = Memory::new(bed, Place::Device, &vec![UNWRITTEN; bytes.len()])?;
        let arena = Memory::new(bed, self.slots, &vec![UNWRITTEN; slots.len()])?;
        let mut rows: Vec<[u64; 2]> = named
            .iter()
            .zip(&places)
            .map(|(&block, &place)| [block as u64, arena.address() + place as u64])
            .collect();
        match (bed.fault, &mut rows[..]) {
            (Some(Fault::Swap), [a, b, ..]) => std::mem::swap(&mut a[1], &mut b[1]),
            (Some(Fault::Skip | Fault::Length), [_, ..]) => drop(rows.pop()),
            _ => {}
        }
        let table = Memory::new(bed, Place::Host, bytemuck::cast_slice(&rows))?;
        let results = Memory::new(bed, Place::Device, &vec![UNWRITTEN; 16 * self.count])?;
        let args = |pool_memory: &Memory| CodecArgs {
            codec: self.codec,
            kv: self.view(&pool, pool_memory, bytes.len() as u64),
            first_layer_slot: self.encoded.start as u32,
            num_layers: self.encoded.len() as u32,
            blocks: Span::new(table.address(), 16 * rows.len() as u64),
            num_blocks: rows.len() as u64,
            results: Span::new(results.address(), 16 * self.count as u64),
            quota: self.ctas.map_or(CtaQuota::WHOLE_DEVICE, CtaQuota::at_most),
        };
        let stream = bed.stream.as_ref();
        let mut outcome = Outcome::default();

        // SAFETY: all memory lives until the stream is synchronised; slots lie apart.
        unsafe { bed.kernels.encode(&args(&source), stream)? };
        stream.synchronize()?;
        stray(bed, &arena, stream)?;
        let written = arena.read()?;
        let statuses = statuses(&results.read()?);
        self.judge_slots(&mut outcome, &slots, &written, &places, slot_bytes, &expected);
        for (i, (expected, &(hash, escapes, status))) in expected.iter().zip(&statuses).enumerate()
        {
            let right = match *expected {
                Encoded::Fits { hash, escapes, .. } => (hash, escapes, HKV_SLOT_OK),
                Encoded::RawFallback(Fallback::Escapes { needed, .. }) => {
                    (0, needed as u32, HKV_SLOT_ESCAPES)
                }
                Encoded::RawFallback(Fallback::NotFinite | Fallback::Streams { .. }) => {
                    (0, 0, HKV_SLOT_NOT_FINITE)
                }
            };
            if (hash, escapes, status) != (right.0, right.1, right.2 as i32) {
                outcome
                    .fail(format!("result {i} is {hash:x}, {escapes}, {status}, not {expected:?}"));
            }
        }
        if outcome.failure.is_some() {
            return Ok(outcome);
        }

        // A flipped bit in one of the slots; those of fallbacks hold nothing anyway.
        let flipped = rng.below(self.count as u64) as usize;
        let bit = rng.below(8 * slot_bytes as u64) as usize;
        let mut damaged = written.clone();
        damaged[places[flipped] + bit / 8] ^= 1 << (bit % 8);
        arena.write(bed, &damaged)?;
        // SAFETY: as above; blocks are named once.
        unsafe { bed.kernels.decode(&args(&target), stream)? };
        stream.synchronize()?;
        let restored = target.read()?;
        let mut right: Vec<u8> = vec![UNWRITTEN; bytes.len()];
        let mut ignored = vec![false; bytes.len()];
        let mut block = vec![0; geometry.elements()];
        for (i, &(hash, _, status)) in self::statuses(&results.read()?).iter().enumerate() {
            let Encoded::Fits { hash: stored, .. } = expected[i] else {
                self.scatter(&pool, named[i], |at, _| ignored[2 * at..2 * at + 2].fill(true));
                if status != HKV_SLOT_CORRUPT as i32 {
                    outcome.fail(format!("slot {i} holds nothing, and was taken for sound"));
                }
                continue;
            };
            if i == flipped {
                self.scatter(&pool, named[i], |at, _| ignored[2 * at..2 * at + 2].fill(true));
                if status != HKV_SLOT_CORRUPT as i32 {
                    outcome.fail(format!("bit {bit} of slot {i} was flipped, and nobody noticed"));
                }
                continue;
            }
            if (hash, status) != (stored, HKV_SLOT_OK as i32) {
                outcome.fail(format!("slot {i} is sound, and was refused: {hash:x}, {status}"));
            }
            decode(&geometry, &written[places[i]..places[i] + slot_bytes], &mut block)?;
            self.scatter(&pool, named[i], |at, from| {
                right[2 * at..2 * at + 2].copy_from_slice(&block[from].to_le_bytes());
            });
        }
        let wrong: Vec<usize> =
            (0..right.len()).filter(|&i| !ignored[i] && right[i] != restored[i]).collect();
        if let Some(first) = wrong.first() {
            outcome.fail(format!(
                "{} bytes of the blocks are wrong, the first of element {}",
                wrong.len(),
                first / 2
            ));
            outcome.note("wrong", wrong.len() as f64);
        }
        Ok(outcome)
    }

    fn judge_slots(
        &self,
        outcome: &mut Outcome,
        right: &[u8],
        written: &[u8],
        places: &[usize],
        slot_bytes: usize,
        expected: &[Encoded],
    ) {
        // What a slot without a block holds behind its header is nobody's business.
        let mut ignored = vec![false; right.len()];
        for (&place, encoded) in places.iter().zip(expected) {
            if matches!(encoded, Encoded::RawFallback(_)) {
                ignored[place + 32..place + slot_bytes].fill(true);
            }
        }
        let wrong: Vec<usize> =
            (0..right.len()).filter(|&i| !ignored[i] && right[i] != written[i]).collect();
        if let Some(&first) = wrong.first() {
            let slot = places.iter().position(|&at| (at..at + slot_bytes).contains(&first));
            let place = slot.map_or("beside all slots".to_owned(), |slot| {
                format!("byte {} of slot {slot}", first - places[slot])
            });
            outcome.fail(format!("{} bytes are wrong, the first is {place}", wrong.len()));
            outcome.note("wrong", wrong.len() as f64);
        }
    }

    fn view(&self, pool: &PoolShape, memory: &Memory, bytes: u64) -> KvView {
        let v = 2 * pool.v_offset as u64;
        KvView {
            k: Span::new(memory.address(), bytes),
            v: Span::new(memory.address() + v, bytes - v),
            strides: pool.strides,
            shape: KvShape {
                num_kv_heads: self.heads as u32,
                head_dim: self.head_dim as u32,
                dtype: self.dtype,
            },
            block_size: self.block_size as u32,
            num_blocks: self.blocks as u64,
            num_layer_slots: self.layers as u32,
            scales: None,
        }
    }

    /// Calls `visit` with the index in the pool and in the slot's order of every element of a block.
    fn scatter(&self, pool: &PoolShape, block: usize, mut visit: impl FnMut(usize, usize)) {
        let mut from = 0;
        for layer in self.encoded.clone() {
            for offset in [0, pool.v_offset] {
                for head in 0..self.heads {
                    for token in 0..self.block_size {
                        let at = offset + pool.index(block, layer, head, token);
                        for i in 0..self.head_dim {
                            visit(at + i, from + i);
                        }
                        from += self.head_dim;
                    }
                }
            }
        }
    }

    fn gather(&self, pool: &PoolShape, elements: &[u16], block: usize) -> Vec<u16> {
        let mut gathered = Vec::new();
        self.scatter(pool, block, |at, _| gathered.push(elements[at]));
        gathered
    }
}

/// Hash, escapes and status of every result.
fn statuses(bytes: &[u8]) -> Vec<(u64, u32, i32)> {
    let words: Vec<u64> =
        bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    words.chunks_exact(2).map(|r| (r[0], r[1] as u32, (r[1] >> 32) as i32)).collect()
}

/// Overwrites the byte before the first slot, when that is the damage to do.
fn stray(bed: &Bed, arena: &Memory, stream: StreamRef<'_>) -> Result<()> {
    if bed.fault == Some(Fault::Stray) {
        // SAFETY: the arena is memory of the device's, longer than a byte, and waited for.
        unsafe { stream.fill(arena.address(), !UNWRITTEN, 1)? };
        stream.synchronize()?;
    }
    Ok(())
}
