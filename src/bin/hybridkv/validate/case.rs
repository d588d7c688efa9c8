//! The space of attention cases, and how one is drawn from it.

use std::fmt;

use hybridkv::codec::Codec;
use hybridkv::layout::{Dtype, KvStrides};
use hybridkv::reference;
use hybridkv::spec::AttentionKind;

use crate::random::Rng;

/// How K and V of a pool are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The native one: `[block][layer][K|V][head][token][dim]`.
    BlockFirstHnd,
    /// The same with 64 unused elements behind every block.
    BlockFirstHndPadded,
    /// `[block][layer][K|V][token][head][dim]`.
    BlockFirstNhd,
    /// `[layer][K|V][block][token][head][dim]`, as in vLLM.
    LayerFirstNhd,
    /// `[layer][K|V][block][head][token][dim]`.
    LayerFirstHnd,
    /// `[K|V][layer][token slot][head][dim]`, tokens 16 elements apart, as pools per layer with a pitch.
    LayerFirstNhdPadded,
}

/// Every layout.
pub const LAYOUTS: [Layout; 6] = [
    Layout::BlockFirstHnd,
    Layout::BlockFirstHndPadded,
    Layout::BlockFirstNhd,
    Layout::LayerFirstNhd,
    Layout::LayerFirstHnd,
    Layout::LayerFirstNhdPadded,
];

/// Where the elements of a pool are: K at 0, V at `v_offset`, by strides.
#[derive(Debug, Clone, Copy)]
pub struct PoolShape {
    /// Elements of the pool.
    pub elements: usize,
    /// Elements from a K to its V.
    pub v_offset: usize,
    /// Distances.
    pub strides: KvStrides,
}

impl PoolShape {
    /// The shape of a pool of `blocks` blocks of `layers` layers.
    pub fn new(
        layout: Layout,
        blocks: usize,
        layers: usize,
        block_size: usize,
        heads: usize,
        dim: usize,
    ) -> Self {
        let half = block_size * heads * dim;
        let hnd = (dim * block_size, dim);
        let nhd = (dim, dim * heads);
        // Strides of block, layer, (head, token); V behind K; elements.
        let (block, layer, (head, token), v_offset, elements) = match layout {
            Layout::BlockFirstHnd => {
                (2 * half * layers, 2 * half, hnd, half, 2 * half * layers * blocks)
            }
            Layout::BlockFirstHndPadded => {
                let block = 2 * half * layers + 64;
                (block, 2 * half, hnd, half, block * blocks)
            }
            Layout::BlockFirstNhd => {
                (2 * half * layers, 2 * half, nhd, half, 2 * half * layers * blocks)
            }
            Layout::LayerFirstNhd => {
                (half, 2 * half * blocks, nhd, half * blocks, 2 * half * layers * blocks)
            }
            Layout::LayerFirstHnd => {
                (half, 2 * half * blocks, hnd, half * blocks, 2 * half * layers * blocks)
            }
            Layout::LayerFirstNhdPadded => {
                let token = dim * heads + 16;
                let block = token * block_size;
                let all = block * blocks * layers;
                (block, block * blocks, (dim, token), all, 2 * all)
            }
        };
        let [block, layer, head, token] = [block, layer, head, token].map(|x| x as i64);
        Self { elements, v_offset, strides: KvStrides { block, layer, head, token } }
    }

    /// Index of the first element of a token's K.
    pub fn index(&self, block: usize, layer: usize, head: usize, token: usize) -> usize {
        let s = &self.strides;
        [(block, s.block), (layer, s.layer), (head, s.head), (token, s.token)]
            .iter()
            .map(|&(i, stride)| i * stride as usize)
            .sum()
    }
}

/// What shares a scale of e4m3 keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scales {
    /// Everything.
    Tensor,
    /// A KV head.
    Head,
    /// Nothing: every token of every head has its own.
    Token,
}

impl Scales {
    /// Strides of the scales of a pool of blocks of `layers` layers of `heads` heads, and how many there are.
    pub fn shape(
        self,
        blocks: usize,
        layers: usize,
        heads: usize,
        block_size: usize,
    ) -> (KvStrides, usize) {
        let head = block_size as i64;
        match self {
            Self::Tensor => (KvStrides::NONE, 1),
            Self::Head => (KvStrides { head: 3, ..KvStrides::NONE }, 3 * heads),
            Self::Token => {
                let layer = heads as i64 * head;
                let block = layer * layers as i64 + 7;
                (KvStrides { block, layer, head, token: 1 }, block as usize * blocks)
            }
        }
    }
}

/// What the keys are made of; values and queries are N(0, 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    /// N(0, 1).
    Normal,
    /// N(0, 1), with one key of each head at a logit of +20 for the last query.
    Needle,
    /// All keys of a sequence equal: all logits of a query are.
    Equal,
    /// N(0, 1), one channel 16 times as large: logits of +-10 beside many near 0.
    Outlier,
}

/// How a decode batch is planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planned {
    /// Not at all.
    No,
    /// Before every launch, and in every graph.
    Always,
    /// The same, every sequence by its own length.
    ByLength,
    /// Once, for other lengths.
    Stale,
}

/// New and total tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seq {
    /// New (query) tokens.
    pub q_len: usize,
    /// Tokens in all.
    pub kv_len: usize,
}

/// New tokens of a sequence that a tree mask has bits for.
const MAX_TREE_TOKENS: u64 = 32;

/// One case of attention.
#[derive(Debug, Clone)]
pub struct Case {
    /// Type of queries and outputs, and of keys and values without scales.
    pub dtype: Dtype,
    /// Scales of e4m3 keys and values; `None`: they are of `dtype`.
    pub scales: Option<Scales>,
    /// How some of the blocks are sealed, if they are.
    pub sealed: Option<Codec>,
    /// Exponent of 2 that multiplies the queries, and divides the scale of the logits.
    pub query_exponent: i32,
    /// Whether new tokens see each other by a random tree mask.
    pub tree: bool,
    /// Elements of a head.
    pub head_dim: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads per KV head.
    pub group: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Layout of the pool.
    pub layout: Layout,
    /// Layers in a block; one of them is attended.
    pub layers: usize,
    /// What its queries see.
    pub kind: AttentionKind,
    /// Tokens that stay visible.
    pub sink_tokens: usize,
    /// Whether there are learned sink logits.
    pub sink_logits: bool,
    /// Soft cap of the logits, 0 for none.
    pub soft_cap: f32,
    /// Whether the LSE is asked for.
    pub lse: bool,
    /// Whether q and out have gaps between tokens and heads.
    pub padded: bool,
    /// Whether the table starts at the first live block.
    pub trimmed: bool,
    /// What the keys are.
    pub data: Data,
    /// How the batches are planned.
    pub planned: Planned,
    /// The sequences; more than one batch: captured in a graph once, replayed with each.
    pub batches: Vec<Vec<Seq>>,
}

/// How large cases may be.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Longest sequence.
    pub kv_len: u64,
    /// Most new tokens of a sequence.
    pub q_len: u64,
    /// Most elements of the pool, of q and of out.
    pub pool: usize,
    /// Most multiplications of the attention itself; 0 for any number.
    pub work: usize,
    /// Whether graphs can be captured.
    pub graphs: bool,
}

impl Case {
    /// Draws a case.
    pub fn random(rng: &mut Rng, scale: Scale) -> Self {
        let head_dim = rng.pick(&[64, 128, 128, 256]);
        let group = rng.pick(&[1, 2, 4, 5, 7, 8, 16]);
        let kv_heads = rng.pick(&[1, 1, 2, 3, 8]);
        let block_size = rng.pick(&[8, 16, 16, 32, 64, 128]);
        let extent = match rng.below(4) {
            0 => rng.pick(&[1, 2, 3, block_size - 1, block_size, block_size + 1]),
            1 => rng.pick(&[4 * block_size - 1, 4 * block_size, 4 * block_size + 1]),
            _ => rng.pick(&[16, 100, 128, 513, 1024]),
        } as u32;
        let kind = match rng.below(3) {
            0 => AttentionKind::Full,
            1 => AttentionKind::Sliding { window: extent },
            _ => AttentionKind::Chunked { chunk: extent },
        };
        let mut case = Self {
            dtype: rng.pick(&[Dtype::Bf16, Dtype::F16]),
            scales: rng.pick(&[
                None,
                None,
                Some(Scales::Tensor),
                Some(Scales::Head),
                Some(Scales::Token),
            ]),
            sealed: None,
            query_exponent: 0,
            tree: false,
            head_dim,
            kv_heads,
            group,
            block_size,
            layout: rng.pick(&LAYOUTS),
            layers: rng.pick(&[1, 1, 2, 3]),
            kind,
            sink_tokens: rng.pick(&[0, 0, 0, 1, 4, block_size, block_size + 3, 70]),
            sink_logits: rng.chance(25),
            soft_cap: rng.pick(&[0.0, 0.0, 0.0, 30.0, 50.0]),
            lse: rng.chance(70),
            padded: rng.chance(30),
            trimmed: rng.chance(60),
            data: rng.pick(&[
                Data::Normal,
                Data::Normal,
                Data::Normal,
                Data::Needle,
                Data::Equal,
                Data::Outlier,
            ]),
            planned: rng.pick(&[
                Planned::No,
                Planned::Always,
                Planned::Always,
                Planned::ByLength,
                Planned::Stale,
            ]),
            batches: Vec::new(),
        };
        if case.dtype == Dtype::Bf16 {
            // Beyond what f16 holds, in which products with e4m3 are made.
            case.query_exponent = rng.pick(&[0, 0, 0, 0, 100, -70]);
        }
        if rng.chance(20) {
            case.seal(rng);
        }
        let sequences = rng.pick(&[1, 1, 1, 2, 2, 3, 3, 5, 5, 9, 9, 160]);
        let batches = if scale.graphs && rng.chance(25) { 3 } else { 1 };
        // Most new tokens of a sequence: decode, speculation, or a chunk of a prefill.
        let most_new = match rng.below(10) {
            0..=3 => 1,
            4..=6 => rng.range(2, 8),
            7..=8 => rng.range(9, 100),
            _ => rng.range(101, scale.q_len.max(101)),
        }
        .min(scale.q_len)
        .min(if case.sealed.is_some() { (8 / case.group) as u64 } else { u64::MAX });
        case.tree = (2..=MAX_TREE_TOKENS).contains(&most_new) && rng.chance(40);
        case.batches =
            (0..batches).map(|_| case.draw_batch(rng, scale, sequences, most_new)).collect();
        case
    }

    /// Makes it a case that has sealed blocks.
    fn seal(&mut self, rng: &mut Rng) {
        self.sealed = Some(rng.pick(&[Codec::Int8, Codec::Int4]));
        self.scales = None;
        self.head_dim = self.head_dim.min(128);
        self.block_size = self.block_size.max(16);
        self.group = self.group.min(8);
    }

    /// Draws the sequences of one batch, within what the scale allows.
    fn draw_batch(&self, rng: &mut Rng, scale: Scale, sequences: usize, most_new: u64) -> Vec<Seq> {
        let token = 2 * self.kv_heads * self.head_dim * self.layers;
        let longest = (scale.pool / token / sequences).max(self.block_size) as u64;
        let longest = longest.min(scale.kv_len);
        let most_new =
            most_new.min((scale.pool / self.qo_heads() / self.head_dim / sequences) as u64);
        let mut work = scale.work;
        (0..sequences)
            .map(|_| {
                let mut seq = self.draw_sequence(rng, longest, most_new);
                while scale.work > 0 && self.work(seq) > work / 2 && seq.kv_len > 2 {
                    seq.kv_len = seq.kv_len / 2 + 1;
                    seq.q_len = seq.q_len.div_ceil(2).min(seq.kv_len);
                }
                work = work.saturating_sub(self.work(seq));
                seq
            })
            .collect()
    }

    fn draw_sequence(&self, rng: &mut Rng, longest: u64, most_new: u64) -> Seq {
        let extent = match self.kind {
            AttentionKind::Full => 64,
            AttentionKind::Sliding { window: extent }
            | AttentionKind::Chunked { chunk: extent } => extent,
        };
        let edge = rng.pick(&[self.block_size as u64, u64::from(extent), self.sink_tokens as u64])
            * rng.range(1, 4);
        let kv_len = match rng.below(10) {
            0 => rng.below(2),
            1..=5 => (edge + rng.below(3)).saturating_sub(1),
            _ => {
                let magnitude = rng.range(3, 63 - u64::from(longest.leading_zeros()).min(60));
                rng.below(2 << magnitude)
            }
        }
        .min(longest);
        let q_len = if most_new <= 1 || rng.chance(30) { 1 } else { rng.range(0, most_new) };
        // Now and then more new tokens than there are: padding of a captured batch.
        let q_len = if kv_len == 0 || rng.chance(4) { q_len.min(3) } else { q_len.min(kv_len) };
        Seq { q_len: q_len as usize, kv_len: kv_len as usize }
    }

    /// Whether the query at `position` sees the key at `key`.
    pub fn sees(&self, position: i64, key: i64) -> bool {
        reference::sees(self.kind, self.sink_tokens as u32, position, key)
    }

    /// Type of keys and values.
    pub fn kv_dtype(&self) -> Dtype {
        if self.scales.is_some() { Dtype::E4m3 } else { self.dtype }
    }

    /// Which tokens of a sequence any of its new tokens sees by the layer's kind.
    pub fn needed(&self, seq: Seq) -> Vec<bool> {
        let first = seq.kv_len as i64 - seq.q_len as i64;
        let last = seq.kv_len as i64 - 1;
        let probe = |key: i64| (first.max(key)..=last).any(|position| self.sees(position, key));
        (0..seq.kv_len as i64).map(probe).collect()
    }

    /// Multiplications of the attention of one sequence.
    pub fn work(&self, seq: Seq) -> usize {
        let visible = match self.kind {
            AttentionKind::Full => seq.kv_len,
            AttentionKind::Sliding { window: extent }
            | AttentionKind::Chunked { chunk: extent } => {
                seq.kv_len.min(extent as usize + self.sink_tokens)
            }
        };
        2 * seq.q_len * visible * self.qo_heads() * self.head_dim
    }

    /// Query heads.
    pub fn qo_heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// Factor of the logits.
    pub fn sm_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt() / 2f32.powi(self.query_exponent)
    }

    /// The class of the case in the summary.
    pub fn class(&self) -> String {
        let kind = match self.kind {
            AttentionKind::Full => "full",
            AttentionKind::Sliding { .. } => "sliding",
            AttentionKind::Chunked { .. } => "chunked",
        };
        let rows = self.batches.iter().flatten().map(|seq| seq.q_len).max().unwrap_or(0);
        let most = if self.head_dim < 256 { 16 } else { 8 };
        let what = if rows * self.group <= most { "decode" } else { "prefill" };
        let kv = match (self.scales, self.sealed) {
            (Some(_), _) => "/e4m3".to_owned(),
            (None, Some(codec)) => format!("+{codec}"),
            (None, None) => String::new(),
        };
        format!("{what} {}{kv} d{} {kind}", self.dtype.name(), self.head_dim)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let batch = self.batches.first().map(Vec::as_slice).unwrap_or_default();
        let longest = batch.iter().map(|seq| seq.kv_len).max().unwrap_or(0);
        write!(f, "{}x{longest}", batch.len())?;
        match self.kind {
            AttentionKind::Full => {}
            AttentionKind::Sliding { window } => write!(f, "/W{window}")?,
            AttentionKind::Chunked { chunk } => write!(f, "/C{chunk}")?,
        }
        let rows = batch.iter().map(|seq| seq.q_len).max().unwrap_or(0);
        if rows != 1 {
            write!(f, "/q{rows}")?;
        }
        write!(f, "/{}-{}", self.qo_heads(), self.kv_heads)?;
        if self.head_dim != 128 {
            write!(f, "/d{}", self.head_dim)?;
        }
        write!(f, "/{}", self.dtype.name())?;
        if let Some(scales) = self.scales {
            write!(f, "/e4m3 per {scales:?}")?;
        }
        if self.block_size != 16 {
            write!(f, "/b{}", self.block_size)?;
        }
        write!(f, " {:?} {:?}", self.layout, self.data)?;
        let flags = [
            (self.sink_tokens > 0, format!(" sinks{}", self.sink_tokens)),
            (self.sink_logits, " sink-logits".to_owned()),
            (self.soft_cap > 0.0, format!(" cap{}", self.soft_cap)),
            (self.lse, " lse".to_owned()),
            (self.padded, " padded".to_owned()),
            (self.trimmed, " trimmed".to_owned()),
            (self.query_exponent != 0, format!(" q*2^{}", self.query_exponent)),
            (self.tree, " tree".to_owned()),
            (self.planned != Planned::No, format!(" planned {:?}", self.planned)),
            (self.batches.len() > 1, " graph".to_owned()),
        ];
        flags.iter().filter(|(on, _)| *on).try_for_each(|(_, text)| f.write_str(text))
    }
}
