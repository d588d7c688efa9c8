//! From arguments to a model, a workload and memory sizes that belong together.

use hybridkv::codec::Codec;
use hybridkv::device::Device;
use hybridkv::engine::{
    EngineConfig, FileStoreConfig, HostCodecs, HostSize, Layerwise, SlotFormat, SyncPolicy,
};
use hybridkv::error::{Error, Result};
use hybridkv::layout::KvShape;
use hybridkv::manager::{
    Eviction, GroupConfig, HostConfig, ManagerConfig, PrefetchPolicy, Retention, StorageConfig,
};
use hybridkv::spec::{AttentionKind, GroupPlan, LayerSpec, ModelSpec, Provenance};

use super::content::Elements;
use super::conversations::{Conversations, Sizes};
use super::{Args, Cut, KvDtype};
use crate::trace::{Trace, output_token};
use crate::values::{load_model, parse_bytes};

/// Every length is divided by this on the CPU device.
const CPU_SHRINK: usize = 32;
/// Layers, query heads per KV head and head_dim on the CPU device.
const CPU_LAYERS: usize = 6;
const CPU_QO_HEADS: u32 = 2;
const CPU_HEAD_DIM: u32 = 64;
/// A shrunk window keeps this many tokens at least.
const CPU_WINDOW: u32 = 16;

/// Conversations of the built-in workload on a GPU; the CPU device divides the lengths.
const SIZES: Sizes = Sizes {
    conversations: 48,
    system_prompts: 4,
    system: 2048,
    user: 1024,
    output: 320,
    context: 40_960,
};

/// Steps whose tokens may be in flight at once.
pub const STEPS_IN_FLIGHT: usize = 2;

/// One request to serve.
pub struct Request {
    pub index: usize,
    /// Prompt, then outputs.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// A request that must have ended before this one starts.
    pub after: Option<usize>,
}

/// Where requests come from.
pub enum Workload {
    Trace { trace: Trace, name: String },
    Conversations { source: Conversations, sizes: Sizes, requests: usize },
}

impl Workload {
    /// Requests in all.
    pub fn len(&self) -> usize {
        match self {
            Self::Trace { trace, .. } => trace.len(),
            Self::Conversations { requests, .. } => *requests,
        }
    }

    /// Tokens of the longest request.
    pub fn longest(&self) -> usize {
        match self {
            Self::Trace { trace, .. } => trace.longest(),
            Self::Conversations { sizes, .. } => sizes.longest(),
        }
    }

    /// Request `index`; asked for in order.
    pub fn request(&mut self, index: usize) -> Request {
        let (mut tokens, output_len, after) = match self {
            Self::Trace { trace, .. } => (trace.prompt(index), trace.output_len(index), None),
            Self::Conversations { source, .. } => {
                let turn = source.next();
                (turn.prompt, turn.output_len, turn.after)
            }
        };
        let prompt_len = tokens.len();
        tokens.extend((0..output_len).map(|j| output_token(index, j)));
        Request { index, tokens, prompt_len, after }
    }

    /// What it is, in words.
    pub fn describe(&self) -> String {
        match self {
            Self::Trace { trace, name } => format!("{} requests of {name}", trace.len()),
            Self::Conversations { sizes, requests, .. } => format!(
                "{requests} turns of {} conversations under {} shared system prompts",
                sizes.conversations, sizes.system_prompts
            ),
        }
    }
}

/// Everything a run is made of.
pub struct Setup {
    pub elements: Elements,
    pub spec: ModelSpec,
    pub plan: GroupPlan,
    pub workload: Workload,
    pub engine: EngineConfig,
    pub manager: ManagerConfig,
    pub storage: Option<FileStoreConfig>,
    pub storage_eviction: Eviction,
    /// How long waiting requests give their prefetches; `None` when there are none.
    pub prefetch: Option<PrefetchPolicy>,
    /// Tokens that a prefetch is to save at least.
    pub prefetch_threshold: u32,
    /// How loads are cut for steps that run behind them; `None` when steps wait for all of them.
    pub layerwise: Option<Layerwise>,
    /// The same for stores that start behind the layers of a step; `None` when they start behind its end.
    pub layerwise_stores: Option<Layerwise>,
    pub max_seqs: usize,
    pub max_batch_tokens: usize,
    /// Fraction of blocks read back, and of (sequence, step, layer) of which one output row is checked.
    pub verify: f64,
    pub seed: u64,
    /// Whether newly taken blocks are filled with NaN.
    pub poison: bool,
    /// What was taken down for the CPU device, in words.
    pub notes: Vec<String>,
}

impl Setup {
    /// The storage tier over a store of so many slots.
    pub fn storage_config(&self, num_slots: u32) -> StorageConfig {
        let config = StorageConfig::new(num_slots);
        StorageConfig {
            eviction: self.storage_eviction,
            prefetch: self.prefetch.unwrap_or(config.prefetch),
            prefetch_threshold: self.prefetch_threshold,
            ..config
        }
    }

    /// Resolves arguments for a device.
    ///
    /// # Errors
    /// An unknown model, a trace that does not parse, a pool too small for the longest request, values out
    /// of range.
    pub fn new(args: &Args, device: &Device) -> Result<Self> {
        let on_cpu = !device.is_cuda();
        let mut notes = Vec::new();
        let (name, default_tp) = match &args.model {
            Some(name) => (name.as_str(), 1),
            None => ("llama-4-scout", 8),
        };
        let mut spec = load_model(name)?.shard(args.tp.unwrap_or(default_tp))?;
        if on_cpu {
            shrink_model(&mut spec, args.layers, &mut notes);
        }
        if let Some(layers) = args.layers {
            if layers == 0 || layers as usize > spec.layers.len() {
                return Err(Error::unsupported(
                    "run",
                    "--layers",
                    layers,
                    format!("1 to {} for {}", spec.layers.len(), spec.name),
                ));
            }
            spec.layers.truncate(layers as usize);
        }
        if !spec.states.is_empty() {
            return Err(Error::unsupported(
                "run",
                "a model with recurrent layers,",
                format!("{} of them", spec.states.len()),
                "attention layers only: there is no kernel here that computes states",
            ));
        }
        let elements = Elements {
            dtype: spec.layers[0].shape.dtype,
            scales: args.kv_dtype.map(|KvDtype::E4m3| args.kv_scales),
        };
        for LayerSpec { shape, .. } in &mut spec.layers {
            if shape.dtype != elements.dtype {
                return Err(Error::invalid("run", "all layers must have one KV type"));
            }
            shape.dtype = elements.kv_dtype();
        }
        let plan = spec.group(args.block_size)?;

        let shrink = if on_cpu { CPU_SHRINK } else { 1 };
        let requests = args.requests.unwrap_or(if on_cpu { 2500 } else { 600 });
        if requests == 0 {
            return Err(Error::invalid("run", "--requests is 0"));
        }
        let workload = match &args.trace {
            Some(path) => {
                let name = path.rsplit('/').next().unwrap_or(path).to_string();
                Workload::Trace { trace: Trace::read(path, requests, shrink)?, name }
            }
            None => {
                let sizes = SIZES.shrunk(shrink);
                let source = Conversations::new(sizes, args.seed);
                Workload::Conversations { source, sizes, requests }
            }
        };
        if on_cpu {
            notes.push(format!("every length is divided by {CPU_SHRINK}"));
        }

        let device_mem = match &args.device_mem {
            Some(text) => parse_bytes(text)?,
            // A pool of a few contexts, whatever the model.
            None if on_cpu => 1024 * plan.block_bytes as u64,
            None => 2 << 30,
        };
        let host = args.host_fraction.map_or(HostSize::Ratio(args.host_ratio), HostSize::Fraction);
        let engine = EngineConfig::sized(plan.block_bytes, device_mem, host)?;
        let max_batch_tokens = args.max_batch_tokens.unwrap_or(if on_cpu { 256 } else { 8192 });
        let max_seqs = args.max_seqs.unwrap_or(if on_cpu { 8 } else { 64 });
        if max_batch_tokens == 0 || max_seqs == 0 {
            return Err(Error::invalid("run", "--max-seqs and --max-batch-tokens must not be 0"));
        }
        let verify = args.verify.unwrap_or(if on_cpu { 0.05 } else { 0.002 });
        if !(0.0..=1.0).contains(&verify) {
            return Err(Error::unsupported("run", "--verify", verify, "0 to 1"));
        }
        let manager = ManagerConfig {
            groups: GroupConfig::of(&plan),
            num_blocks: engine.num_blocks,
            prefix_caching: true,
            retention: Retention::default(),
            eviction: args.eviction,
            max_model_len: u32::try_from(workload.longest()).unwrap_or(u32::MAX),
            in_flight_tokens: u32::try_from(STEPS_IN_FLIGHT * max_batch_tokens).unwrap_or(u32::MAX),
            host: (engine.num_slots > 0).then(|| HostConfig {
                eviction: args.host_eviction,
                ..HostConfig::new(engine.num_slots).with_write(args.write.into())
            }),
            identity: identity(elements, &plan),
        };
        let storage = match &args.storage {
            Some(path) => Some(FileStoreConfig {
                path: path.into(),
                bytes: parse_bytes(&args.storage_bytes)?,
                block_bytes: plan.block_bytes,
                groups: SlotFormat::of(&plan, &HostCodecs::all(Codec::Raw))?.groups().to_vec(),
                identity: manager.identity,
                sync: SyncPolicy::Never,
            }),
            None => None,
        };
        // On the CPU device nothing is too small to come in parts: it is there to be verified.
        let min_bytes = if on_cpu { 0 } else { Layerwise::default().min_bytes };
        let layerwise = Layerwise { min_bytes, ..Layerwise::default() };
        Ok(Self {
            elements,
            spec,
            plan,
            storage,
            storage_eviction: args.storage_eviction,
            prefetch: args.prefetch.map(PrefetchPolicy::from),
            prefetch_threshold: StorageConfig::new(0).prefetch_threshold / shrink as u32,
            layerwise: (args.onboard == Cut::Layers).then_some(layerwise),
            layerwise_stores: (args.offload == Cut::Layers).then_some(layerwise),
            workload,
            engine,
            manager,
            max_seqs,
            max_batch_tokens,
            verify,
            seed: args.seed,
            poison: args.poison || on_cpu,
            notes,
        })
    }
}

/// Takes a model down to what the CPU device serves in a minute: few layers (all kinds of them), few small
/// heads, windows shortened like the contexts.
fn shrink_model(spec: &mut ModelSpec, layers: Option<u32>, notes: &mut Vec<String>) {
    let before = (spec.layers.len(), spec.num_qo_heads, spec.layers[0].shape);
    if layers.is_none() {
        let is_new =
            |l: usize| !spec.layers[..l].iter().any(|other| other.kind == spec.layers[l].kind);
        let kinds_end = (0..spec.layers.len()).rev().find(|&l| is_new(l)).map_or(0, |l| l + 1);
        spec.layers.truncate(kinds_end.clamp(2, CPU_LAYERS));
    }
    let shrink = CPU_SHRINK as u32;
    // Where shapes differ they still do, so that groups have blocks of different sizes.
    let elements = |shape: &KvShape| u64::from(shape.num_kv_heads) * u64::from(shape.head_dim);
    let least = spec.layers.iter().map(|layer| elements(&layer.shape)).min().unwrap_or(0);
    for LayerSpec { kind, sink_tokens, shape } in &mut spec.layers {
        match kind {
            AttentionKind::Full => {}
            AttentionKind::Sliding { window: extent }
            | AttentionKind::Chunked { chunk: extent } => {
                *extent = (*extent / shrink).max(CPU_WINDOW.min(*extent));
            }
        }
        *sink_tokens = sink_tokens.div_ceil(shrink);
        shape.num_kv_heads = if elements(shape) > least { CPU_QO_HEADS } else { 1 };
        shape.head_dim = CPU_HEAD_DIM;
    }
    spec.num_qo_heads = CPU_QO_HEADS;
    spec.sm_scale = 1.0 / (CPU_HEAD_DIM as f32).sqrt();
    notes.push(format!(
        "{} of {} layers, {} query and {} KV head of {} (not {}, {} of {}), windows divided by {shrink}",
        spec.layers.len(),
        before.0,
        spec.num_qo_heads,
        spec.layers[0].shape.num_kv_heads,
        CPU_HEAD_DIM,
        before.1,
        before.2.num_kv_heads,
        before.2.head_dim,
    ));
}

/// What a cached block of this run is of: seeds the hashes.
fn identity(elements: Elements, plan: &GroupPlan) -> [u8; 32] {
    let revision = format!("{} as {}", elements.dtype.name(), elements.describe_kv());
    plan.identity(&Provenance { model: "synthetic", revision: &revision, ..Provenance::default() })
}
