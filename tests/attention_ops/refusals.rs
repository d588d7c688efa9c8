//! What launchers refuse: everything that the host can see, and in checking mode what device tables hold.

use hybridkv::ErrorKind;
use hybridkv::abi::{HKV_LAYER_SLIDING, hkv_window};
use hybridkv::codec::{Codec, Geometry};
use hybridkv::device::{Device, Span};
use hybridkv::layout::{Dtype, KvScales, KvStrides};
use hybridkv::ops::{
    AttentionArgs, HeadStrides, Kernels, MergeArgs, Plan, PlanArgs, SEALED_BLOCK, SealedView,
};

use super::bed::{Planned, all_kernels, example, load};

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
fn attention_refuses_sealed_blocks_that_no_kernel_reads() {
    let kernels = Kernels::load(&Device::cpu()).unwrap();
    let stream = kernels.device().stream().unwrap();
    let loaded = load(&example(), &kernels, None);
    let geometry = |heads, dim, block| Geometry::new(1, heads, dim, block, Dtype::Bf16).unwrap();
    let right = geometry(2, 64, 16);
    let stride = Codec::Int8.slot_bytes(&right).unwrap() as u64;
    let slots = kernels.device().upload(&vec![0xffu8; 3 * stride as usize]).unwrap();
    let view = SealedView {
        slots: slots.span(),
        num_slots: 3,
        slot_stride: stride,
        codec: Codec::Int8,
        geometry: right,
        layer: 0,
    };
    let sealed = AttentionArgs { sealed: Some(view), ..loaded.args };
    // SAFETY: the buffers live until the stream is synchronised; no table names a sealed block.
    unsafe { kernels.attention(&sealed, stream.as_ref()).unwrap() };
    stream.as_ref().synchronize().unwrap();
    type Change = fn(&mut AttentionArgs, &mut SealedView);
    let faults: [(&str, Change); 11] = [
        ("codec of attended blocks int6", |_, view| view.codec = Codec::Int6),
        ("layer 1 of a slot", |_, view| view.layer = 1),
        ("blocks of other shapes", |_, view| {
            view.geometry = Geometry::new(1, 1, 64, 16, Dtype::Bf16).unwrap();
        }),
        ("blocks of other shapes", |_, view| {
            view.geometry = Geometry::new(1, 2, 64, 16, Dtype::F16).unwrap();
        }),
        ("num_slots", |_, view| view.num_slots = 1 << 31),
        ("the sealed blocks has", |_, view| view.num_slots = 4),
        ("the sealed blocks is null", |_, view| view.slots = Span::default()),
        ("a multiple of 16", |_, view| view.slot_stride += 8),
        ("or more, is needed", |_, view| view.slot_stride -= 16),
        (
            "query rows per KV head (new tokens times query heads) with sealed blocks 10",
            |args, _| {
                args.max_q_len = 5;
            },
        ),
        ("head_dim of sealed blocks 256", |args, _| args.kv.shape.head_dim = 256),
    ];
    for (words, change) in faults {
        let (mut args, mut view) = (loaded.args, view);
        change(&mut args, &mut view);
        args.sealed = Some(view);
        // SAFETY: nothing is launched with wrong arguments.
        let error = unsafe { kernels.attention(&args, stream.as_ref()) }.expect_err(words);
        assert!(error.to_string().contains(words), "{words:?} is not in {error}");
    }
    // What ids name is found in checking mode.
    let kernels = kernels.checked();
    for (words, id, sealed) in
        [("is slot 3 of 3 sealed blocks", 3, Some(view)), ("no sealed blocks are given", 0, None)]
    {
        let ids = kernels.device().upload(&[id | SEALED_BLOCK; 22]).unwrap();
        let mut args = AttentionArgs { sealed, ..loaded.args };
        args.tables.block_ids = ids.span();
        // SAFETY: in checking mode wrong tables are not launched.
        let error = unsafe { kernels.attention(&args, stream.as_ref()) }.expect_err(words);
        assert!(error.to_string().contains(words), "{words:?} is not in {error}");
    }
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
