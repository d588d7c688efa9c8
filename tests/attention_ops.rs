//! `attention` and `merge_states` through their launchers on every device at hand: every way in which the
//! keys are cut against the reference, and everything that the host can refuse.

mod common;

use half::bf16;
use hybridkv::ErrorKind;
use hybridkv::abi::{HKV_LAYER_CHUNKED, HKV_LAYER_FULL, HKV_LAYER_SLIDING, hkv_window};
use hybridkv::device::{Device, DeviceBuffer, Span};
use hybridkv::layout::{Dtype, KvScales, KvShape, KvStrides, KvView};
use hybridkv::ops::{
    AttentionArgs, BlockTables, HeadStrides, Kernels, MergeArgs, Plan, PlanArgs, WindowTable,
};
use hybridkv::reference::{self, Logits, State, compare};
use hybridkv::spec::AttentionKind;

fn all_kernels() -> Vec<Kernels> {
    let cpus = [Device::cpu(), Device::cpu_deferred(5)];
    cpus.iter().chain(common::cuda()).map(|device| Kernels::load(device).unwrap()).collect()
}

const BLOCK: usize = 16;
const DIM: usize = 64;
const KV_HEADS: usize = 2;
const SCALE: f32 = 0.125;
const CAP: f32 = 30.0;

/// A batch on the host. Blocks are numbered backwards; slots that no query sees hold NaN.
struct Batch {
    /// (query tokens, tokens in all) of every sequence.
    seqs: Vec<(usize, usize)>,
    group: usize,
    kind: AttentionKind,
    sink_tokens: usize,
    sink_logits: bool,
}

impl Batch {
    fn tokens(&self) -> usize {
        self.seqs.iter().map(|s| s.0).sum()
    }

    fn heads(&self) -> usize {
        KV_HEADS * self.group
    }

    fn sees(&self, query: usize, key: usize) -> bool {
        reference::sees(self.kind, self.sink_tokens as u32, query as i64, key as i64)
    }

    /// Whether any query of the sequence sees the key.
    fn is_read(&self, (q_len, kv_len): (usize, usize), key: usize) -> bool {
        (kv_len - q_len..kv_len).any(|query| self.sees(query, key))
    }
}

/// Values around 0 with a standard deviation of about 1, exact in bf16; every index has its own.
fn value(tensor: u64, index: [usize; 4]) -> bf16 {
    let mut hash = tensor.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for i in index {
        hash = (hash ^ i as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash ^= hash >> 29;
    }
    let halves = (0..4).map(|i| (hash >> (16 * i) & 0xffff) as f64 / 65536.0 - 0.5);
    bf16::from_f64(halves.sum::<f64>() * 3f64.sqrt())
}

/// The batch on a device, and what keeps it there.
struct Loaded {
    args: AttentionArgs,
    out: DeviceBuffer,
    lse: DeviceBuffer,
    _inputs: [DeviceBuffer; 8],
    workspace: DeviceBuffer,
    plan: Option<DeviceBuffer>,
}

/// How a batch is planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planned {
    /// Not at all.
    No,
    /// As it is.
    AsItIs,
    /// Every sequence by its own length.
    ByLength,
    /// For other lengths than it has.
    Stale,
}

impl Loaded {
    /// Plans the batch and gives it the workspace for that.
    fn plan(&mut self, kernels: &Kernels, planned: Planned) {
        if planned == Planned::No {
            return;
        }
        let device = kernels.device();
        let mut class = self.args;
        let seqs = class.num_seqs as usize;
        let other: Vec<i32> = (0..seqs).map(|seq| [70_000, 3, 9000, 0][seq % 4]).collect();
        let other = device.upload(&other).unwrap();
        if planned == Planned::Stale {
            class.kv_len = other.span();
        }
        let mut args = PlanArgs {
            classes: &[class],
            batch_invariant: planned == Planned::ByLength,
            memory: Span::default(),
        };
        let bytes = kernels.plan_bytes(&args).unwrap() as usize;
        // A plan writes all that attention reads.
        let memory = device.upload(&vec![u8::MAX; bytes]).unwrap();
        args.memory = memory.span();
        let stream = device.stream().unwrap();
        // SAFETY: the lengths and the memory outlive the synchronisation.
        unsafe { kernels.plan(&args, stream.as_ref()).unwrap() };
        stream.as_ref().synchronize().unwrap();
        self.args.plan = kernels.planned(&args, 0).unwrap();
        self.plan = Some(memory);
        let bytes = kernels.attention_workspace_bytes(&self.args).unwrap() as usize;
        self.workspace = device.upload(&vec![u8::MAX; bytes]).unwrap();
        self.args.workspace = self.workspace.span();
    }
}

fn load(batch: &Batch, kernels: &Kernels, bounds: Option<(u32, u32)>) -> Loaded {
    let device = kernels.device();
    let shape = KvShape { num_kv_heads: KV_HEADS as u32, head_dim: DIM as u32, dtype: Dtype::Bf16 };
    let num_blocks: usize = batch.seqs.iter().map(|s| s.1.div_ceil(BLOCK)).sum();
    let block = shape.token_bytes() / 2 * BLOCK;
    let mut pool = vec![bf16::NAN; num_blocks * block];
    let (mut ids, mut rows, mut indptr) = (Vec::new(), Vec::new(), vec![0i32]);
    let mut q = Vec::new();
    for (s, &(q_len, kv_len)) in batch.seqs.iter().enumerate() {
        rows.push(ids.len() as i64);
        for key in 0..kv_len {
            if key % BLOCK == 0 {
                ids.push((num_blocks - 1 - ids.len()) as i32);
            }
            if !batch.is_read((q_len, kv_len), key) {
                continue;
            }
            for (half, head, dim) in indices([2, KV_HEADS, DIM]) {
                let id = ids[ids.len() - 1] as usize;
                let at = ((half * KV_HEADS + head) * BLOCK + key % BLOCK) * DIM + dim;
                pool[id * block + at] = value(half as u64, [s, key, head, dim]);
            }
        }
        for (token, head, dim) in indices([q_len, batch.heads(), DIM]) {
            q.push(value(2, [s, token, head, dim]));
        }
        indptr.push(indptr[s] + q_len as i32);
    }
    let (kind, extent) = match batch.kind {
        AttentionKind::Full => (HKV_LAYER_FULL, 0),
        AttentionKind::Sliding { window } => (HKV_LAYER_SLIDING, window),
        AttentionKind::Chunked { chunk } => (HKV_LAYER_CHUNKED, chunk),
    };
    let window = hkv_window {
        kind: kind as i32,
        extent: extent as i32,
        sink_tokens: batch.sink_tokens as i32,
        group: 0,
        layer_slot: 0,
        reserved: [0; 3],
    };
    let bits = |values: &[bf16]| values.iter().map(|v| v.to_bits()).collect::<Vec<u16>>();
    let kv_len: Vec<i32> = batch.seqs.iter().map(|s| s.1 as i32).collect();
    let sinks: Vec<f32> = (0..batch.heads()).map(|h| h as f32 * 0.5 - 1.0).collect();
    let inputs = [
        device.upload(&bits(&pool)).unwrap(),
        device.upload(&bits(&q)).unwrap(),
        device.upload(&indptr).unwrap(),
        device.upload(&kv_len).unwrap(),
        device.upload(&ids).unwrap(),
        device.upload(&rows).unwrap(),
        device.upload(&[window]).unwrap(),
        device.upload(&sinks).unwrap(),
    ];
    let poison = vec![u16::MAX; q.len()];
    let out = device.upload(&poison).unwrap();
    let lse = device.upload(&vec![f32::NAN; batch.tokens() * batch.heads()]).unwrap();
    let span = |index: usize| inputs[index].span();
    let pool_stride = (block * 2) as u64;
    let strides = HeadStrides::contiguous(batch.heads() as u32, DIM as u32);
    let mut args = AttentionArgs {
        q: span(1),
        q_strides: strides,
        out: out.span(),
        out_strides: strides,
        dtype: shape.dtype,
        lse: Some(lse.span()),
        kv: KvView::block_first(span(0), shape, BLOCK as u32, 1, num_blocks as u64, pool_stride)
            .unwrap(),
        qo_indptr: span(2),
        kv_len: span(3),
        tables: BlockTables {
            block_ids: span(4),
            block_row: span(5),
            first_block: None,
            num_groups: 1,
        },
        windows: WindowTable { rows: span(6), num_layers: 1 },
        layer: 0,
        sink_logits: batch.sink_logits.then_some(span(7)),
        tree_mask: None,
        plan: None,
        num_qo_heads: batch.heads() as u32,
        num_seqs: batch.seqs.len() as u32,
        num_tokens: batch.tokens() as u32,
        max_q_len: batch.seqs.iter().map(|s| s.0).max().unwrap() as u32,
        max_kv_len: batch.seqs.iter().map(|s| s.1).max().unwrap() as u32,
        sm_scale: SCALE,
        logits_soft_cap: CAP,
        workspace: Span::default(),
    };
    if let Some((max_q_len, max_kv_len)) = bounds {
        (args.max_q_len, args.max_kv_len) = (max_q_len, max_kv_len);
    }
    let bytes = kernels.attention_workspace_bytes(&args).unwrap() as usize;
    let workspace = device.upload(&vec![u8::MAX; bytes]).unwrap();
    args.workspace = workspace.span();
    Loaded { args, out, lse, _inputs: inputs, workspace, plan: None }
}

/// Every index of a three-dimensional array, the last dimension fastest.
fn indices([a, b, c]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a * b * c).map(move |i| (i / (b * c), i / c % b, i % c))
}

/// Outputs and LSE of every (token, head) by the reference.
fn expected(batch: &Batch) -> Vec<State> {
    let mut states = Vec::new();
    for (s, &(q_len, kv_len)) in batch.seqs.iter().enumerate() {
        for (token, head) in (0..q_len).flat_map(|t| (0..batch.heads()).map(move |h| (t, h))) {
            let kv_head = head / batch.group;
            let row = |tensor: u64, at: usize, head: usize| -> Vec<f64> {
                (0..DIM).map(|dim| value(tensor, [s, at, head, dim]).to_f64()).collect()
            };
            let query = kv_len - q_len + token;
            let visible: Vec<usize> = (0..kv_len).filter(|&key| batch.sees(query, key)).collect();
            let all = |tensor| (0..kv_len).flat_map(|key| row(tensor, key, kv_head)).collect();
            let (keys, values): (Vec<f64>, Vec<f64>) = (all(0), all(1));
            let logits = Logits {
                sm_scale: SCALE.into(),
                soft_cap: CAP.into(),
                sink: batch.sink_logits.then_some(head as f64 * 0.5 - 1.0),
            };
            states.push(reference::attend(&row(2, token, head), &keys, &values, &visible, logits));
        }
    }
    states
}

/// What is told of the longest query and sequence (`None`: the truth), and how the batch is planned.
type Way = (Option<(u32, u32)>, Planned);

/// Runs the batch in every given way.
fn check(batch: &Batch, kernels: &Kernels, ways: &[Way]) {
    let expected = expected(batch);
    let wanted: Vec<f64> = expected.iter().flat_map(|state| state.out.clone()).collect();
    for &(bounds, planned) in ways {
        let mut loaded = load(batch, kernels, bounds);
        loaded.plan(kernels, planned);
        let stream = kernels.device().stream().unwrap();
        // SAFETY: all buffers outlive the synchronisation; the tables name blocks of the pool.
        unsafe { kernels.attention(&loaded.args, stream.as_ref()).unwrap() };
        stream.as_ref().synchronize().unwrap();
        let bits = loaded.out.download::<u16>().unwrap();
        let ours: Vec<f64> = bits.iter().map(|&b| bf16::from_bits(b).to_f64()).collect();
        let comparison = compare(&ours, &wanted, DIM, 0.0);
        let way = format_args!("{bounds:?} {planned:?}");
        assert!(comparison.misplaced == 0 && comparison.relative <= 4e-3, "{way}: {comparison:?}");
        let lses = loaded.lse.download::<f32>().unwrap();
        for (row, (ours, state)) in lses.iter().zip(&expected).enumerate() {
            let ours = f64::from(*ours);
            let close = ours == state.lse || (ours - state.lse).abs() <= 1e-3;
            assert!(close, "{way}: LSE of row {row}: {ours} instead of {}", state.lse);
        }
    }
}

#[test]
fn every_way_to_cut_the_keys_agrees_with_the_reference() {
    let kinds = [
        AttentionKind::Full,
        AttentionKind::Sliding { window: 37 },
        AttentionKind::Chunked { chunk: 48 },
    ];
    for kernels in all_kernels() {
        for (index, kind) in kinds.into_iter().enumerate() {
            let sink_tokens = [0, 5, 21][index];
            let batch = |seqs: &[(usize, usize)], group, sink_logits| Batch {
                seqs: seqs.to_vec(),
                group,
                kind,
                sink_tokens,
                sink_logits,
            };
            let decode = batch(&[(1, 1), (1, 300), (1, 96), (1, 97)], 5, true);
            let speculative = batch(&[(3, 3), (0, 40), (2, 130)], 2, false);
            let planned = [Planned::No, Planned::AsItIs, Planned::ByLength, Planned::Stale];
            let ways = |bounds: &[Option<(u32, u32)>]| -> Vec<Way> {
                bounds.iter().flat_map(|&bounds| planned.map(|planned| (bounds, planned))).collect()
            };
            // The truth; many parts, most of them empty; 15 rows; bounds that are too low cost time only.
            let bounds = [None, Some((1, 1 << 20)), Some((3, 300)), Some((1, 1))];
            check(&decode, &kernels, &ways(&bounds));
            check(&speculative, &kernels, &ways(&[None, Some((1, 130))])); // more rows than the kernel has
            let prefill = batch(&[(40, 40), (70, 260), (1, 50)], 3, index == 0);
            let bounds = [None, Some((70, 1 << 16)), Some((1, 1))];
            check(&prefill, &kernels, &bounds.map(|bounds| (bounds, Planned::AsItIs)));
        }
    }
}

/// The bits of a sequence's output with a plan by length: the same alone and among others.
#[test]
fn plans_by_length_keep_the_bits_of_a_sequence() {
    for kernels in all_kernels() {
        let run = |seqs: &[(usize, usize)]| -> Vec<u16> {
            let batch = Batch { seqs: seqs.to_vec(), sink_logits: false, ..example() };
            let mut loaded = load(&batch, &kernels, Some((1, 1 << 17)));
            loaded.plan(&kernels, Planned::ByLength);
            let stream = kernels.device().stream().unwrap();
            // SAFETY: all buffers outlive the synchronisation; the tables name blocks of the pool.
            unsafe { kernels.attention(&loaded.args, stream.as_ref()).unwrap() };
            stream.as_ref().synchronize().unwrap();
            let row = batch.heads() * DIM;
            loaded.out.download::<u16>().unwrap()[..row].to_vec()
        };
        let alone = run(&[(1, 9000)]);
        for others in [vec![(1, 40)], vec![(1, 20_000), (1, 5)], vec![(1, 300); 40]] {
            let mut batch = vec![(1, 9000)];
            batch.extend(others);
            assert_eq!(run(&batch), alone, "{batch:?}");
        }
    }
}

#[test]
fn reads_touch_every_visible_key_once_and_no_other() {
    let kinds = [
        AttentionKind::Full,
        AttentionKind::Sliding { window: 37 },
        AttentionKind::Chunked { chunk: 48 },
    ];
    for kernels in all_kernels() {
        for (kind, sink_tokens) in kinds.into_iter().zip([0, 5, 21]) {
            let seqs = vec![(1, 1), (4, 300), (1, 97), (0, 40), (3, 260)];
            let batch = Batch { seqs, group: 2, kind, sink_tokens, sink_logits: false };
            let mut expected = 7u32;
            for (s, &seq) in batch.seqs.iter().enumerate() {
                for key in (0..seq.1).filter(|&key| batch.is_read(seq, key)) {
                    for (half, head, pair) in indices([2, KV_HEADS, DIM / 2]) {
                        let bits =
                            |dim| u32::from(value(half as u64, [s, key, head, dim]).to_bits());
                        let word = bits(2 * pair) | bits(2 * pair + 1) << 16;
                        expected = expected.wrapping_add(word);
                    }
                }
            }
            for planned in [Planned::No, Planned::AsItIs, Planned::ByLength, Planned::Stale] {
                let mut loaded = load(&batch, &kernels, Some((4, 1 << 20)));
                loaded.plan(&kernels, planned);
                let checksum = kernels.device().upload(&[7u32]).unwrap();
                let stream = kernels.device().stream().unwrap();
                // SAFETY: all buffers outlive the synchronisation; the tables name blocks of the pool.
                unsafe {
                    kernels.read_blocks(&loaded.args, checksum.span(), stream.as_ref()).unwrap()
                };
                stream.as_ref().synchronize().unwrap();
                let sum = checksum.download::<u32>().unwrap();
                assert_eq!(sum, [expected], "{kind:?} {planned:?}");
            }
        }
    }
}

#[test]
fn reads_are_of_what_decode_takes() {
    for kernels in all_kernels() {
        let batch = Batch { seqs: vec![(40, 40)], ..example() };
        let loaded = load(&batch, &kernels, None);
        let stream = kernels.device().stream().unwrap();
        let checksum = kernels.device().upload(&[0u32]).unwrap();
        // SAFETY: nothing is launched.
        let read = |checksum: Span| unsafe {
            kernels.read_blocks(&loaded.args, checksum, stream.as_ref()).unwrap_err().to_string()
        };
        assert!(read(checksum.span()).contains("what the decode kernel takes"));
        assert!(read(Span::new(checksum.address(), 3)).contains("the checksum has 3 bytes"));
    }
}

#[test]
fn merging_is_the_softmax_over_states() {
    const HEADS: usize = 3;
    for kernels in all_kernels() {
        for (num_states, tokens) in [(0, 2), (1, 2), (4, 3), (7, 2), (70, 1)] {
            let rows = tokens * HEADS;
            let at = |state: usize, row: usize| State {
                out: (0..DIM).map(|dim| value(3, [state, row, dim, 0]).to_f64()).collect(),
                // Every third state is empty; what it holds must not matter.
                lse: match (state + row) % 3 {
                    0 => f64::NEG_INFINITY,
                    _ => value(4, [state, row, 0, 0]).to_f64() * 3.0,
                },
            };
            let states: Vec<Vec<State>> =
                (0..num_states).map(|s| (0..rows).map(|row| at(s, row)).collect()).collect();
            let poisoned = |state: &State| -> Vec<f32> {
                let empty = state.lse == f64::NEG_INFINITY;
                state.out.iter().map(|&x| if empty { f32::NAN } else { x as f32 }).collect()
            };
            let outs: Vec<f32> = states.iter().flatten().flat_map(poisoned).collect();
            let lses: Vec<f32> = states.iter().flatten().map(|state| state.lse as f32).collect();
            let device = kernels.device();
            let (outs, lses) = (device.upload(&outs).unwrap(), device.upload(&lses).unwrap());
            // The last token is not live: its rows stay as they are.
            let live = device.upload(&[tokens as i32 - 1]).unwrap();
            let merged = device.upload(&vec![7.0f32; rows * DIM]).unwrap();
            let merged_lse = device.upload(&vec![7.0f32; rows]).unwrap();
            let args = MergeArgs {
                states: outs.span(),
                state_lse: lses.span(),
                in_dtype: Dtype::F32,
                out: merged.span(),
                out_strides: HeadStrides::contiguous(HEADS as u32, DIM as u32),
                out_dtype: Dtype::F32,
                lse: Some(merged_lse.span()),
                sink_logits: None,
                live_tokens: Some(live.span()),
                num_states: num_states as u32,
                num_tokens: tokens as u32,
                num_qo_heads: HEADS as u32,
                head_dim: DIM as u32,
            };
            let stream = device.stream().unwrap();
            // SAFETY: all buffers outlive the synchronisation.
            unsafe { kernels.merge_states(&args, stream.as_ref()).unwrap() };
            stream.as_ref().synchronize().unwrap();
            let ours = merged.download::<f32>().unwrap();
            let ours_lse = merged_lse.download::<f32>().unwrap();
            for row in 0..rows {
                let out: Vec<f64> =
                    ours[row * DIM..(row + 1) * DIM].iter().map(|&x| x.into()).collect();
                let wanted = if row / HEADS == tokens - 1 {
                    State { out: vec![7.0; DIM], lse: 7.0 }
                } else if num_states == 0 {
                    State::empty(DIM)
                } else {
                    let row: Vec<State> = states.iter().map(|state| state[row].clone()).collect();
                    reference::merge(DIM, &row, None)
                };
                let comparison = compare(&out, &wanted.out, DIM, 0.0);
                assert!(comparison.misplaced == 0 && comparison.relative < 1e-5, "{comparison:?}");
                let lse = f64::from(ours_lse[row]);
                assert!(lse == wanted.lse || (lse - wanted.lse).abs() < 1e-5, "row {row}: {lse}");
            }
        }
    }
}

fn example() -> Batch {
    Batch {
        seqs: vec![(1, 300), (1, 40)],
        group: 2,
        kind: AttentionKind::Full,
        sink_tokens: 0,
        sink_logits: true,
    }
}

/// A change to the arguments that must be refused, and words of the message.
type Fault = (&'static str, fn(&mut AttentionArgs));

#[test]
fn attention_refuses_what_the_host_can_see() {
    const FAULTS: &[Fault] = &[
        ("head_dim 96 is not supported; supported: 64, 128, 256", |a| a.kv.shape.head_dim = 96),
        ("dtype f32 is not supported; supported: bf16, f16", |a| a.dtype = Dtype::F32),
        ("KV dtype f32 is not supported", |a| a.kv.shape.dtype = Dtype::F32),
        ("KV dtype f16 is not supported; supported: with bf16 queries bf16, e4m3", |a| {
            a.kv.shape.dtype = Dtype::F16;
        }),
        ("e4m3 keys and values without scales", |a| a.kv.shape.dtype = Dtype::E4m3),
        ("scales are for e4m3", |a| {
            let one = Span::new(64, 4);
            a.kv.scales = Some(KvScales { k: one, v: one, strides: KvStrides::NONE });
        }),
        ("max_q_len with a tree mask 33", |a| {
            a.tree_mask = Some(a.qo_indptr);
            a.max_q_len = 33;
        }),
        ("tree_mask has", |a| a.tree_mask = Some(Span::new(64, 7))),
        ("block_size 24 is not supported; supported: 8, 16", |a| a.kv.block_size = 24),
        ("block_size 4", |a| a.kv.block_size = 4),
        ("num_qo_heads 5 with 2 KV heads", |a| a.num_qo_heads = 5),
        ("num_qo_heads 0", |a| a.num_qo_heads = 0),
        ("with 0 KV heads", |a| a.kv.shape.num_kv_heads = 0),
        ("num_tokens", |a| a.num_tokens = u32::MAX),
        ("num_seqs", |a| a.num_seqs = u32::MAX),
        ("max_kv_len", |a| a.max_kv_len = u32::MAX),
        ("the K buffer", |a| a.kv.num_blocks += 1),
        ("the K buffer", |a| a.kv.strides.block *= 2),
        ("aligned to 16", |a| a.kv.v.address += 8),
        ("aligned to 16", |a| a.q.address += 2),
        ("q has", |a| a.q.bytes -= 1),
        ("q has", |a| a.q_strides.token += 8),
        ("multiple of 16 bytes", |a| a.q_strides.head = 60),
        ("negative", |a| a.q_strides.head = -64),
        ("overflow", |a| a.q_strides.token = i64::MAX - 7),
        ("rows of out overlap", |a| a.out_strides.head = 32),
        ("rows of out overlap", |a| a.out_strides.token = 64),
        ("out is null", |a| a.out.address = 0),
        ("layer 1 is outside", |a| a.layer = 1),
        ("sm_scale 0", |a| a.sm_scale = 0.0),
        ("sm_scale NaN", |a| a.sm_scale = f32::NAN),
        ("logits_soft_cap -1", |a| a.logits_soft_cap = -1.0),
        ("num_groups is 0", |a| a.tables.num_groups = 0),
        ("qo_indptr has 11 bytes, 12 are needed", |a| a.qo_indptr.bytes -= 1),
        ("kv_len", |a| a.kv_len.bytes = 4),
        ("block_row", |a| a.tables.num_groups = 2),
        ("first_block", |a| a.tables.first_block = Some(Span::new(64, 4))),
        ("block_ids", |a| a.tables.block_ids.address += 1),
        ("lse", |a| a.lse = Some(Span::new(64, 31))),
        ("sink_logits", |a| a.sink_logits = Some(Span::new(64, 15))),
        ("the workspace", |a| a.workspace.bytes -= 1),
        ("the plan is of 2 sequences with 2 KV heads, the batch of 1 with 2", |a| a.num_seqs = 1),
        ("the plan is of", |a| a.kv.shape.num_kv_heads = 1),
    ];
    let kernels = Kernels::load(&Device::cpu()).unwrap();
    let stream = kernels.device().stream().unwrap();
    // As if the context were long, so that there is a workspace to be too small.
    let mut loaded = load(&example(), &kernels, Some((1, 1 << 20)));
    loaded.plan(&kernels, Planned::ByLength);
    assert!(loaded.args.workspace.bytes > 0);
    for (words, fault) in FAULTS {
        let mut args = loaded.args;
        fault(&mut args);
        // SAFETY: nothing is launched with wrong arguments.
        let error = unsafe { kernels.attention(&args, stream.as_ref()) }.expect_err(words);
        assert_eq!(error.op(), "attention");
        assert!(error.to_string().contains(words), "{words:?} is not in {error}");
        assert!(matches!(
            error.kind(),
            ErrorKind::InvalidArgument(_) | ErrorKind::Unsupported { .. }
        ));
    }
    for empty in [
        AttentionArgs { num_tokens: 0, q: Span::default(), ..loaded.args },
        AttentionArgs { num_seqs: 0, q: Span::default(), ..loaded.args },
    ] {
        assert_eq!(kernels.attention_workspace_bytes(&empty).unwrap(), 0);
        // SAFETY: nothing to do, nothing is accessed.
        unsafe { kernels.attention(&empty, stream.as_ref()).unwrap() };
    }
    let untouched = loaded.out.download::<u16>().unwrap();
    assert!(untouched.iter().all(|&x| x == u16::MAX), "refused launches write nothing");
}

#[test]
fn plan_refuses_what_the_host_can_see() {
    let kernels = Kernels::load(&Device::cpu()).unwrap();
    let loaded = load(&example(), &kernels, Some((1, 1 << 20)));
    let class = loaded.args;
    let memory = kernels.device().alloc(1 << 16).unwrap();
    let eight = [class; 8];
    let args =
        |count| PlanArgs { classes: &eight[..count], batch_invariant: true, memory: memory.span() };
    let stream = kernels.device().stream().unwrap();
    // SAFETY: what is not refused has its memory.
    let plan = |args: &PlanArgs<'_>| unsafe { kernels.plan(args, stream.as_ref()) };
    plan(&args(8)).unwrap();
    plan(&args(0)).unwrap();
    assert!(kernels.planned(&args(1), 1).is_err(), "there is one class");
    let needed = kernels.plan_bytes(&args(1)).unwrap();
    let short = Span::new(memory.address(), needed - 1);
    let bad = |change: fn(&mut AttentionArgs)| {
        let mut bad = class;
        change(&mut bad);
        bad
    };
    for (words, classes, memory) in [
        ("window classes: 9 is not supported; supported: up to 8", vec![class; 9], memory.span()),
        ("the plan's memory", vec![class], short),
        ("num_seqs 4097", vec![bad(|a| a.num_seqs = 4097)], memory.span()),
        ("class 1 are not those of class 0", vec![class, bad(|a| a.num_seqs = 1)], memory.span()),
        ("class 1 are", vec![class, bad(|a| a.kv_len.address += 4)], memory.span()),
        ("layer 1 is outside", vec![bad(|a| a.layer = 1)], memory.span()),
        ("kv_len has 4 bytes", vec![bad(|a| a.kv_len.bytes = 4)], memory.span()),
        ("qo_indptr has", vec![bad(|a| a.qo_indptr.bytes = 4)], memory.span()),
        ("head_dim 96", vec![bad(|a| a.kv.shape.head_dim = 96)], memory.span()),
    ] {
        let args = PlanArgs { classes: &classes, batch_invariant: true, memory };
        let error = plan(&args).expect_err(words);
        assert!(error.to_string().contains(words), "{words:?} is not in {error}");
    }
    // What the prefill kernel serves is not planned and needs no memory.
    let prefill = [bad(|a| a.max_q_len = 9)];
    let args = PlanArgs { classes: &prefill, batch_invariant: false, memory: Span::default() };
    assert_eq!(kernels.plan_bytes(&args).unwrap(), 0);
    plan(&args).unwrap();
    assert_eq!(kernels.planned(&args, 0).unwrap(), None::<Plan>);
}

#[test]
fn checking_mode_finds_wrong_plans() {
    for kernels in all_kernels() {
        let kernels = kernels.checked();
        let stream = kernels.device().stream().unwrap();
        let mut loaded = load(&example(), &kernels, Some((1, 1 << 14)));
        loaded.plan(&kernels, Planned::Stale);
        // SAFETY: the buffers outlive the synchronisation; the tables name blocks of the pool.
        let run = || unsafe { kernels.attention(&loaded.args, stream.as_ref()) };
        run().unwrap();
        stream.as_ref().synchronize().unwrap();
        let memory = loaded.plan.as_ref().unwrap();
        let right: Vec<i32> = memory.download().unwrap();
        // The first entry names a sequence that is not there; a sequence has no entry.
        for word in [99, right[2]] {
            let mut wrong = right.clone();
            wrong[0] = word;
            let damaged = kernels.device().upload(&wrong).unwrap();
            // SAFETY: both live until the stream is synchronised.
            unsafe {
                stream.as_ref().copy(damaged.address(), memory.address(), memory.len()).unwrap();
            }
            stream.as_ref().synchronize().unwrap();
            let error = run().expect_err("a wrong plan");
            assert!(error.to_string().contains("plan"), "{error}");
        }
    }
}

#[test]
fn checking_mode_finds_wrong_block_tables() {
    for kernels in all_kernels() {
        let kernels = kernels.checked();
        let stream = kernels.device().stream().unwrap();
        let loaded = load(&example(), &kernels, None);
        // SAFETY: the buffers outlive the synchronisation; the tables name blocks of the pool.
        unsafe { kernels.attention(&loaded.args, stream.as_ref()).unwrap() };
        stream.as_ref().synchronize().unwrap();
        let ids = kernels.device().upload(&[99i32; 22]).unwrap();
        let zero_window = kernels
            .device()
            .upload(&[hkv_window {
                kind: HKV_LAYER_SLIDING as i32,
                extent: 0,
                sink_tokens: 0,
                group: 0,
                layer_slot: 0,
                reserved: [0; 3],
            }])
            .unwrap();
        let mut wrong_ids = loaded.args;
        wrong_ids.tables.block_ids = ids.span();
        let mut short = loaded.args;
        short.tables.block_ids.bytes = 4 * 4;
        let mut window = loaded.args;
        window.windows.rows = zero_window.span();
        for (words, args) in
            [("id 99", wrong_ids), ("the block table", short), ("window or chunk of 0", window)]
        {
            // SAFETY: in checking mode wrong tables are not launched.
            let error = unsafe { kernels.attention(&args, stream.as_ref()) }.expect_err(words);
            assert!(error.to_string().contains(words), "{words:?} is not in {error}");
        }
    }
}

#[test]
fn merge_refuses_what_the_host_can_see() {
    type Fault = (&'static str, fn(&mut MergeArgs));
    const FAULTS: &[Fault] = &[
        ("head_dim 60 is not supported", |a| a.head_dim = 60),
        ("states has", |a| a.num_states = 3),
        ("state_lse has", |a| a.state_lse.bytes -= 1),
        ("aligned to 16", |a| a.states.address += 8),
        ("out has", |a| a.out.bytes -= 1),
        ("rows of out overlap", |a| a.out_strides.head = 0),
        ("lse", |a| a.lse = Some(Span::new(64, 4))),
        ("sink_logits", |a| a.sink_logits = Some(Span::new(64, 4))),
        ("live_tokens", |a| a.live_tokens = Some(Span::new(64, 2))),
        ("up to 2^31 - 1 rows", |a| a.num_tokens = u32::MAX),
    ];
    let kernels = Kernels::load(&Device::cpu()).unwrap();
    let stream = kernels.device().stream().unwrap();
    let states = kernels.device().alloc(2 * 6 * 64 * 4).unwrap();
    let lse = kernels.device().alloc(2 * 6 * 4).unwrap();
    let out = kernels.device().alloc(6 * 64 * 2).unwrap();
    let args = MergeArgs {
        states: states.span(),
        state_lse: lse.span(),
        in_dtype: Dtype::F32,
        out: out.span(),
        out_strides: HeadStrides::contiguous(2, 64),
        out_dtype: Dtype::Bf16,
        lse: None,
        sink_logits: None,
        live_tokens: None,
        num_states: 2,
        num_tokens: 3,
        num_qo_heads: 2,
        head_dim: 64,
    };
    for (words, fault) in FAULTS {
        let mut args = args;
        fault(&mut args);
        // SAFETY: nothing is launched with wrong arguments.
        let error = unsafe { kernels.merge_states(&args, stream.as_ref()) }.expect_err(words);
        assert_eq!(error.op(), "merge_states");
        assert!(error.to_string().contains(words), "{words:?} is not in {error}");
    }
    let empty = MergeArgs { num_tokens: 0, out: Span::default(), ..args };
    // SAFETY: no rows, nothing is accessed.
    unsafe { kernels.merge_states(&empty, stream.as_ref()).unwrap() };
}
