//! Blocks into slots and back: inside the device, and fused with the move between device and pinned memory.
//! Rates are of uncompressed bytes.

use std::collections::BTreeMap;

use hybridkv::codec::{Codec, Geometry, ScalePer};
use hybridkv::device::{DeviceBuffer, PinnedBuffer, Span, StreamRef};
use hybridkv::error::{Error, Result};
use hybridkv::layout::{Dtype, KvShape, KvView};
use hybridkv::ops::synthetic::{Distribution, Tensor};
use hybridkv::ops::{CodecArgs, CtaQuota, Kernels};

use super::timing::Workload;
use crate::random::Rng;

/// The codecs that are timed: `fp8` with its finest scales.
pub const CODECS: [Codec; 6] =
    [Codec::Raw, Codec::Lx4, Codec::Fp8(ScalePer::Token), Codec::Int8, Codec::Int6, Codec::Int4];

/// A block of a full-attention group of Llama-4-Scout on one of 8 ranks: 96 KiB.
const LAYERS: u32 = 12;
const SHAPE: KvShape = KvShape { num_kv_heads: 1, head_dim: 128, dtype: Dtype::Bf16 };
const BLOCK_SIZE: u32 = 16;

/// What a case does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Encode,
    Decode,
    /// Encode into pinned memory.
    Offload,
    /// Decode from there.
    Onboard,
}

/// One row of a codec.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    verb: Verb,
    /// `None`: the whole device.
    pub ctas: Option<u32>,
}

/// Every row of a codec.
pub const CASES: [Case; 10] = [
    Case { verb: Verb::Encode, ctas: None },
    Case { verb: Verb::Decode, ctas: None },
    Case { verb: Verb::Encode, ctas: Some(8) },
    Case { verb: Verb::Decode, ctas: Some(8) },
    Case { verb: Verb::Offload, ctas: Some(4) },
    Case { verb: Verb::Offload, ctas: Some(8) },
    Case { verb: Verb::Offload, ctas: Some(16) },
    Case { verb: Verb::Onboard, ctas: Some(4) },
    Case { verb: Verb::Onboard, ctas: Some(8) },
    Case { verb: Verb::Onboard, ctas: Some(16) },
];

impl Case {
    /// `<codec>/<verb>/<CTAs>`.
    pub fn name(&self, codec: Codec) -> String {
        let verb = match self.verb {
            Verb::Encode => "encode",
            Verb::Decode => "decode",
            Verb::Offload => "offload",
            Verb::Onboard => "onboard",
        };
        let ctas = self.ctas.map_or("full".to_owned(), |ctas| ctas.to_string());
        format!("{codec}/{verb}/{ctas}")
    }

    fn decodes(&self) -> bool {
        matches!(self.verb, Verb::Decode | Verb::Onboard)
    }

    fn on_link(&self) -> bool {
        matches!(self.verb, Verb::Offload | Verb::Onboard)
    }

    /// What the copy engine, or memory, would allow for slots of this ratio.
    pub fn limit(&self, limits: &BTreeMap<String, f64>, ratio: f64) -> Option<f64> {
        let link = |name: &str| limits.get(name).map(|gbps| gbps * ratio);
        match (self.verb, self.ctas) {
            (Verb::Offload, _) => link("copy_engine_d2h_gbps"),
            (Verb::Onboard, _) => link("copy_engine_h2d_gbps"),
            // A block and its slot are read and written.
            (_, None) => limits.get("copy_engine_d2d_gbps").map(|gbps| gbps / (1.0 + 1.0 / ratio)),
            _ => None,
        }
    }

    /// What it should reach.
    pub fn goal(&self, codec: Codec) -> Option<f64> {
        match (codec, self.verb, self.ctas) {
            (Codec::Lx4, Verb::Encode, None) => Some(600.0),
            (Codec::Lx4, Verb::Decode, None) => Some(800.0),
            (Codec::Lx4, Verb::Offload | Verb::Onboard, Some(8)) => Some(68.0),
            (Codec::Fp8(_), Verb::Offload | Verb::Onboard, Some(8)) => Some(100.0),
            (Codec::Int6, Verb::Offload | Verb::Onboard, Some(8)) => Some(110.0),
            (Codec::Int4, Verb::Offload | Verb::Onboard, Some(8)) => Some(150.0),
            _ => None,
        }
    }
}

/// A pool of blocks of real channels, room for as many slots on either side, and one pool more to decode into.
pub struct Bed<'a> {
    kernels: &'a Kernels,
    codec: Codec,
    view: KvView,
    restored: KvView,
    blocks: u64,
    slot_bytes: u64,
    /// Rows of device slots, of pinned slots.
    rows: [DeviceBuffer; 2],
    results: DeviceBuffer,
    _memory: (DeviceBuffer, DeviceBuffer, DeviceBuffer, PinnedBuffer),
}

impl<'a> Bed<'a> {
    /// Sets up `bytes` of blocks in random order, encoded on both sides.
    pub fn new(kernels: &'a Kernels, codec: Codec, bytes: u64, rng: &mut Rng) -> Result<Self> {
        let device = kernels.device();
        let geometry =
            Geometry::new(LAYERS, SHAPE.num_kv_heads, SHAPE.head_dim, BLOCK_SIZE, SHAPE.dtype)?;
        let block_bytes = geometry.raw_bytes() as u64;
        let blocks = (bytes / block_bytes).max(2);
        let slot_bytes = codec.slot_bytes(&geometry)? as u64;
        // A few hundred different rows, so that set-up takes no time.
        let distribution = Distribution::embedded(SHAPE.dtype)?;
        let dim = SHAPE.head_dim as usize;
        let plane = dim * BLOCK_SIZE as usize;
        let mut elements = vec![0u16; (blocks * block_bytes / 2) as usize];
        let mut parts = [vec![0u16; 64 * plane], vec![0u16; 64 * plane]];
        for (part, tensor) in parts.iter_mut().zip([Tensor::K, Tensor::V]) {
            for row in part.chunks_exact_mut(dim) {
                distribution.fill(rng.next(), 0, tensor, 0, row);
            }
        }
        for (index, to) in elements.chunks_exact_mut(plane).enumerate() {
            let from = rng.below(64) as usize * plane;
            to.copy_from_slice(&parts[index % 2][from..from + plane]);
        }
        let pool = device.upload(&elements)?;
        let target = device.alloc(pool.len())?;
        let view = |memory: &DeviceBuffer| {
            KvView::block_first(memory.span(), SHAPE, BLOCK_SIZE, LAYERS, blocks, block_bytes)
        };
        // Whole lines cross the link.
        let pitch = slot_bytes.next_multiple_of(128);
        let slots = device.alloc((blocks * pitch) as usize)?;
        let pinned = device.alloc_pinned((blocks * pitch) as usize)?;
        let mut rows = |base: u64| {
            let mut order: Vec<u64> = (0..blocks).collect();
            rng.shuffle(&mut order);
            let rows: Vec<[u64; 2]> =
                (0..blocks).map(|i| [order[i as usize], base + i * pitch]).collect();
            device.upload(&rows)
        };
        let bed = Self {
            kernels,
            codec,
            view: view(&pool)?,
            restored: view(&target)?,
            blocks,
            slot_bytes,
            rows: [rows(slots.address())?, rows(pinned.address())?],
            results: device.alloc(blocks as usize * 16)?,
            _memory: (pool, target, slots, pinned),
        };
        // Decoding needs slots on both sides.
        let stream = device.stream()?;
        for verb in [Verb::Encode, Verb::Offload] {
            let work = bed.run(Case { verb, ctas: None })?;
            work.submit(0, stream.as_ref())?;
            stream.as_ref().synchronize()?;
            work.check()?;
        }
        Ok(bed)
    }

    /// Uncompressed bytes of a round.
    pub fn raw_bytes(&self) -> f64 {
        self.blocks as f64 * self.block_bytes()
    }

    /// Bytes of a block over those of a slot.
    pub fn slot_ratio(&self) -> f64 {
        self.block_bytes() / self.slot_bytes as f64
    }

    fn block_bytes(&self) -> f64 {
        f64::from(LAYERS) * f64::from(BLOCK_SIZE) * SHAPE.token_bytes() as f64
    }

    /// The work of a case.
    pub fn run(&self, case: Case) -> Result<Run<'_>> {
        let rows = &self.rows[usize::from(case.on_link())];
        Ok(Run {
            bed: self,
            decodes: case.decodes(),
            args: CodecArgs {
                codec: self.codec,
                kv: if case.decodes() { self.restored } else { self.view },
                first_layer_slot: 0,
                num_layers: LAYERS,
                blocks: rows.span(),
                num_blocks: self.blocks,
                results: Span::new(self.results.address(), self.blocks * 16),
                quota: case.ctas.map_or(CtaQuota::WHOLE_DEVICE, CtaQuota::at_most),
            },
        })
    }
}

/// One case, ready to run.
pub struct Run<'a> {
    bed: &'a Bed<'a>,
    decodes: bool,
    args: CodecArgs,
}

impl Run<'_> {
    /// Fails unless every slot of the last round was sound.
    pub fn check(&self) -> Result<()> {
        let results: Vec<u64> = self.bed.results.download()?;
        match results.chunks_exact(2).position(|result| result[1] >> 32 != 0) {
            Some(slot) => Err(Error::invalid("bench", format!("slot {slot} was refused"))),
            None => Ok(()),
        }
    }
}

impl Workload for Run<'_> {
    fn rounds(&self) -> usize {
        1
    }

    fn submit(&self, _round: usize, stream: StreamRef<'_>) -> Result<()> {
        // SAFETY: all memory lives as long as the bed; `measure` waits before it returns.
        unsafe {
            match self.decodes {
                true => self.bed.kernels.decode(&self.args, stream),
                false => self.bed.kernels.encode(&self.args, stream),
            }
        }
    }
}
