//! Moves of blocks between two layouts: whole ones, some of their layers, or the live tokens of a window. Rows are found
//! by their definition here, one by one, where the library merges them into as few and as long ones as it can.

use std::ops::Range;
use std::sync::Arc;

use hybridkv::abi::hkv_copy;
use hybridkv::device::Span;
use hybridkv::error::Result;
use hybridkv::movement::{
    BlockLayout, BlockMove, BlockPart, BlockRows, EngineCost, KernelCost, Layers, LinkModel, Mover,
    PathCosts, PitchedCost, SizeCosts, Traffic, Way, live_blocks,
};
use hybridkv::ops::{CtaQuota, MoveArgs};

use super::super::bed::{Bed, Fault, Outcome};
use super::{Memory, Place, bytes_of, damage, judge, noise};
use crate::random::Rng;

/// Most rows of a case.
const MAX_ROWS: usize = 100_000;

/// One case.
#[derive(Debug)]
pub struct Case {
    from: Place,
    to: Place,
    rows: BlockRows,
    src: Pool,
    dst: Pool,
    /// Layers that move.
    layers: Range<u32>,
    /// Tokens of the sequence that do.
    tokens: Range<u64>,
    /// How its blocks lie in both pools.
    order: Order,
    route: Route,
}

/// How the blocks of a pool lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pool {
    /// `[block][layer][K|V][rows]`.
    BlockFirst(Rows),
    /// `[block][head][layer][K|V][token]`, of the heads of several ranks: where the first one of ours is among them.
    HeadsOutermost { rank: u32, ranks: u32 },
    /// One tensor `[layer][K|V][block][rows]`.
    LayerFirst(Rows),
    /// Two tensors `[layer][block][rows]`.
    PartFirst(Rows),
    /// A tensor `[block][K|V][rows]` per layer, in any order.
    Tensors(Rows),
}

/// Rows of one layer's K or V in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rows {
    /// `[head][token]`.
    Hnd,
    /// `[token][head]`.
    Nhd,
}

/// Which blocks of the pools a sequence has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Shuffled,
    /// Runs that may be merged.
    Ascending,
    Descending,
}

/// Who moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    /// `move_blocks`, with so many CTAs (`None`: the whole device) and a table there.
    Kernel { ctas: Option<u32>, table: Place },
    /// Whatever is planned when one path costs next to nothing.
    Planned { cheap: Path, both_ways: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    Kernel,
    /// In batches, through the ring where blocks do not lie in one piece.
    Engine,
    Pitched,
}

impl Case {
    /// Draws a case of at most `bytes` bytes, gaps not counted.
    pub fn random(rng: &mut Rng, bytes: usize) -> Self {
        let mut rows = BlockRows {
            layers: rng.pick(&[1, 2, 3, 5, 12, 48]),
            parts: rng.pick(&[1, 2, 2, 2]),
            heads: rng.pick(&[1, 1, 2, 3, 8]),
            tokens: rng.pick(&[8, 16, 16, 32, 64]),
            row_bytes: rng.pick(&[16, 48, 128, 256, 256, 512]),
        };
        let bytes = bytes.min(MAX_ROWS * rows.row_bytes as usize);
        let of_layer = (rows.parts * rows.heads * rows.tokens * rows.row_bytes) as usize;
        rows.layers = rows.layers.min((bytes / of_layer).max(1) as u32);
        let most = (bytes / (of_layer * rows.layers as usize)).clamp(1, 300) as u64;
        let blocks = rng.pick(&[1, 2, 3, most / 2, most]).clamp(1, most);
        let all = blocks * u64::from(rows.tokens);
        let tokens = if rng.chance(50) {
            0..all
        } else {
            let start = rng.below(all);
            start..rng.range(start + 1, all)
        };
        let layers = if rng.chance(50) {
            0..rows.layers
        } else {
            let first = rng.below(rows.layers.into());
            first as u32..rng.range(first + 1, rows.layers.into()) as u32
        };
        let (from, to) = rng.pick(&[
            (Place::Host, Place::Device),
            (Place::Device, Place::Host),
            (Place::Device, Place::Device),
        ]);
        let kernel = Route::Kernel {
            ctas: rng.pick(&[None, Some(1), Some(4), Some(16)]),
            table: rng.pick(&[Place::Device, Place::Host]),
        };
        let planned = Route::Planned {
            cheap: rng.pick(&[Path::Kernel, Path::Engine, Path::Engine, Path::Pitched]),
            both_ways: rng.chance(50),
        };
        Self {
            from,
            to,
            rows,
            src: Pool::random(rng),
            dst: Pool::random(rng),
            layers,
            tokens,
            order: rng.pick(&[Order::Shuffled, Order::Ascending, Order::Descending]),
            route: rng.pick(&[kernel, planned]),
        }
    }

    /// The class of the case in the summary.
    pub fn class(&self) -> String {
        format!("move blocks {:?} to {:?}", self.from, self.to)
    }

    /// The case's name.
    pub fn name(&self) -> String {
        let BlockRows { layers, parts, heads, tokens, row_bytes } = self.rows;
        format!(
            "move/{:?}-{:?}/{:?}-{:?} rows:{layers}x{parts}x{heads}x{tokens}x{row_bytes} layers:{:?} \
             tokens:{:?} {:?} {:?}",
            self.from,
            self.to,
            self.src,
            self.dst,
            self.layers,
            self.tokens,
            self.order,
            self.route
        )
    }

    /// Runs the case.
    pub fn run(&self, bed: &Bed, rng: &mut Rng) -> Result<Outcome> {
        let live: Vec<_> = live_blocks(self.tokens.clone(), self.rows.tokens).collect();
        let src = Places::new(self.src, self.rows, live.len(), self.order, rng)?;
        let dst = Places::new(self.dst, self.rows, live.len(), self.order, rng)?;
        let (source, before) = (noise(src.bytes, rng), noise(dst.bytes, rng));
        let mut expected = before.clone();
        let row_bytes = self.rows.row_bytes as usize;
        let rows: Vec<[usize; 3]> = self.moved_rows(&live, &src, &dst).collect();
        for &[_, from, to] in &rows {
            expected[to..to + row_bytes].copy_from_slice(&source[from..from + row_bytes]);
        }

        let from = Memory::new(bed, self.from, &source)?;
        let to = Memory::new(bed, self.to, &before)?;
        let mut first = 0;
        // All but the first and the last block have the same part of their tokens live.
        for blocks in live.chunk_by(|a, b| a.1 == b.1) {
            let part = BlockPart { layers: self.layers.clone(), tokens: blocks[0].1.clone() };
            let between = BlockMove::between(&src.layout, &dst.layout, &part)?;
            let places = src.blocks[first..].iter().zip(&dst.blocks[first..]).take(blocks.len());
            let address = |memory: &Memory, offset: usize| memory.address() + offset as u64;
            let mut copies: Vec<hkv_copy> =
                places.map(|(&a, &b)| between.block(address(&from, a), address(&to, b))).collect();
            damage(bed.fault, &mut copies);
            self.submit(bed, &between, &copies)?;
            first += blocks.len();
        }
        let stream = bed.stream.as_ref();
        let overwritten = match bed.fault {
            Some(Fault::Stray) => Some(0),
            Some(Fault::Nan) => Some(rows[0][2]),
            _ => None,
        };
        if let Some(at) = overwritten {
            // SAFETY: the memory is longer than that, and lives until the stream is synchronised.
            unsafe { stream.fill(to.address() + at as u64, !expected[at], 1)? };
        }
        stream.synchronize()?;
        let block = |byte| {
            let row = rows.iter().find(|row| (row[2]..row[2] + row_bytes).contains(&byte));
            row.map(|row| row[0])
        };
        Ok(judge(&to.read()?, &expected, "block", block))
    }

    /// Every row that moves: its block in the sequence, and where it lies in the two pools.
    fn moved_rows<'a>(
        &'a self,
        live: &'a [(u64, Range<u32>)],
        src: &'a Places,
        dst: &'a Places,
    ) -> impl Iterator<Item = [usize; 3]> + 'a {
        let (parts, heads) = (self.rows.parts, self.rows.heads);
        live.iter().enumerate().flat_map(move |(block, (_, tokens))| {
            self.layers.clone().flat_map(move |layer| {
                (0..parts * heads).flat_map(move |index| {
                    let (part, head) = (index / heads, index % heads);
                    tokens.clone().map(move |token| {
                        let row = |side: &Places| side.row(block, layer, part, head, token);
                        [block, row(src), row(dst)]
                    })
                })
            })
        })
    }

    /// Moves blocks, and waits.
    fn submit(&self, bed: &Bed, between: &BlockMove, copies: &[hkv_copy]) -> Result<()> {
        let stream = bed.stream.as_ref();
        let (shape, _offsets) = between.on(&bed.device)?;
        let place = match self.route {
            Route::Kernel { table, .. } => table,
            // Plans reorder their descriptors.
            Route::Planned { .. } => Place::Host,
        };
        let bytes = bytes_of(copies);
        let table = Memory::new(bed, place, &bytes)?;
        let span = Span::new(table.address(), bytes.len() as u64);
        match self.route {
            Route::Kernel { ctas, .. } => {
                let args = MoveArgs {
                    copies: span,
                    num_copies: copies.len() as u64,
                    shape,
                    quota: ctas.map_or(CtaQuota::WHOLE_DEVICE, CtaQuota::at_most),
                };
                // SAFETY: the caller keeps the pools, the tables live until the stream is synchronised below; blocks
                // lie apart.
                unsafe { bed.kernels.move_blocks(&args, stream)? };
                stream.synchronize()
            }
            Route::Planned { cheap, both_ways } => {
                let way = match (self.from, self.to) {
                    (Place::Host, _) => Way::HostToDevice,
                    (_, Place::Host) => Way::DeviceToHost,
                    _ => Way::Inside,
                };
                let model = Arc::new(model(cheap));
                let mut mover = Mover::new(&bed.kernels, &model, copies.len()).with_staging()?;
                let traffic = Traffic { way, both_ways };
                // SAFETY: as above; the mover lives as long.
                unsafe { mover.submit(span, copies.len(), &shape, traffic, stream)? };
                stream.synchronize()
            }
        }
    }
}

impl Pool {
    fn random(rng: &mut Rng) -> Self {
        let rows = rng.pick(&[Rows::Hnd, Rows::Nhd]);
        let ranks = rng.pick(&[1, 2, 4]);
        let rank = rng.below(ranks.into()) as u32;
        rng.pick(&[
            Self::BlockFirst(rows),
            Self::HeadsOutermost { rank, ranks },
            Self::LayerFirst(rows),
            Self::PartFirst(rows),
            Self::Tensors(rows),
        ])
    }
}

/// Where the blocks of a sequence are in a pool, from the start of its memory on.
struct Places {
    layout: BlockLayout,
    /// The address of each.
    blocks: Vec<usize>,
    /// Of the memory.
    bytes: usize,
}

impl Places {
    /// Places of so many blocks, in a pool that may be larger, with gaps of 0 to 48 bytes.
    fn new(
        pool: Pool,
        rows: BlockRows,
        blocks: usize,
        order: Order,
        rng: &mut Rng,
    ) -> Result<Self> {
        const GUARD: i64 = 32;
        let places = blocks + rng.below(4) as usize;
        let mut gap = || 16 * rng.below(4) as i64;
        let (layers, parts) = (i64::from(rows.layers), i64::from(rows.parts));
        let piece = rows.bytes()? / layers / parts;
        let count = places as i64;
        let ordered = |order: Rows| match order {
            Rows::Hnd => BlockLayout::block_first_hnd(rows),
            Rows::Nhd => BlockLayout::block_first_nhd(rows),
        };
        let (layout, first, stride, bytes) = match pool {
            Pool::BlockFirst(order) => {
                let block = rows.bytes()? + gap();
                (ordered(order)?, 0, block, block * count)
            }
            Pool::HeadsOutermost { rank, ranks } => {
                let page = rows.bytes()? * i64::from(ranks) + gap();
                let first = rows.bytes()? * i64::from(rank);
                (BlockLayout::heads_outermost(rows)?, first, page, page * count)
            }
            Pool::LayerFirst(order) => {
                let block = piece + gap();
                let part = block * count + gap();
                let layer = part * parts + gap();
                let layout = ordered(order)?.in_layers(Layers::Stride(layer), part);
                (layout, 0, block, layer * layers)
            }
            Pool::PartFirst(order) => {
                let block = piece + gap();
                let layer = block * count + gap();
                let part = layer * layers + gap();
                let layout = ordered(order)?.in_layers(Layers::Stride(layer), part);
                (layout, 0, block, part * parts)
            }
            Pool::Tensors(order) => {
                let block = piece * parts + gap();
                let mut bases = Vec::new();
                let mut end = 0;
                for _ in 0..layers {
                    bases.push(end as u64);
                    end += block * count + gap();
                }
                rng.shuffle(&mut bases);
                let first = bases[0] as i64;
                let layers = BlockLayout::layers_at(&bases);
                (ordered(order)?.in_layers(layers, piece), first, block, end)
            }
        };
        let mut ids: Vec<i64> = (0..count).collect();
        match order {
            Order::Shuffled => rng.shuffle(&mut ids),
            Order::Ascending => {}
            Order::Descending => ids.reverse(),
        }
        let place = |&id: &i64| (GUARD + first + id * stride) as usize;
        let blocks = ids.iter().take(blocks).map(place).collect();
        Ok(Self { layout, blocks, bytes: (bytes + 2 * GUARD) as usize })
    }

    /// Where a row is.
    fn row(&self, block: usize, layer: u32, part: u32, head: u32, token: u32) -> usize {
        let BlockLayout {
            layers, part: part_stride, head: head_stride, token: token_stride, ..
        } = &self.layout;
        let layer = match layers {
            Layers::Stride(stride) => i64::from(layer) * stride,
            Layers::Offsets(offsets) => offsets[layer as usize],
        };
        let inside = layer
            + i64::from(part) * part_stride
            + i64::from(head) * head_stride
            + i64::from(token) * token_stride;
        (self.blocks[block] as i64 + inside) as usize
    }
}

/// A model in which one path costs next to nothing, and the others much.
fn model(cheap: Path) -> LinkModel {
    let gbps = |path| if path == cheap { 1000.0 } else { 0.001 };
    let costs = |gbps| SizeCosts::at_rate(0.0, gbps);
    let kernel = |gbps| KernelCost { ctas: 4, start_us: 5.0, rows: costs(gbps) };
    let paths = PathCosts {
        engine: Some(EngineCost {
            start_us: 0.0,
            submit_us: 0.0,
            copies: costs(gbps(Path::Engine)),
        }),
        pitched: Some(PitchedCost { call_us: 0.0, row_us: 0.0, gbps: gbps(Path::Pitched) }),
        kernels: vec![kernel(gbps(Path::Kernel))],
    };
    LinkModel {
        to_device: [paths.clone(), paths.clone()],
        to_host: [paths.clone(), paths.clone()],
        inside: paths,
        staging: kernel(1000.0),
    }
}
