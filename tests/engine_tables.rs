//! Batch tables: the device arrays say of every token what the manager's block tables say, while several
//! builds are on their way to a device that runs late.

use hybridkv::device::{Device, PinnedBuffer, Span, StreamRef};
use hybridkv::engine::{Batch, BatchTables, SeqSlice};
use hybridkv::layout::{Dtype, KvShape};
use hybridkv::manager::{Eviction, ExtraKeys, GroupConfig, Manager, ManagerConfig, Retention};
use hybridkv::ops::synthetic::splitmix64;
use hybridkv::spec::{AttentionKind, LayerGroup};

const SHAPE: KvShape = KvShape { num_kv_heads: 1, head_dim: 64, dtype: Dtype::Bf16 };

fn groups() -> Vec<LayerGroup> {
    [
        (AttentionKind::Full, 0, 16),
        (AttentionKind::Sliding { window: 40 }, 20, 8),
        (AttentionKind::Chunked { chunk: 64 }, 0, 16),
        (AttentionKind::Sliding { window: 1 }, 0, 8),
    ]
    .into_iter()
    .map(|(kind, sink_tokens, block_size)| LayerGroup {
        kind,
        sink_tokens,
        shape: SHAPE,
        block_size,
        layers: vec![0],
        layer_slots: 1,
    })
    .collect()
}

fn manager(groups: &[LayerGroup]) -> Manager {
    let group = |g: &LayerGroup| GroupConfig {
        kind: g.kind.into(),
        sink_tokens: g.sink_tokens,
        block_size: g.block_size,
    };
    Manager::new(ManagerConfig {
        groups: groups.iter().map(group).collect(),
        num_blocks: 4000,
        prefix_caching: true,
        retention: Retention::default(),
        eviction: Eviction::Lru,
        max_model_len: 4000,
        in_flight_tokens: 256,
        host: None,
        identity: [0; 32],
    })
    .unwrap()
}

/// A copy of what is at `span` when the stream gets there.
fn snapshot(span: Span, compute: StreamRef<'_>) -> PinnedBuffer {
    let pinned = compute.device().alloc_pinned(span.bytes as usize).unwrap();
    if span.bytes > 0 {
        // SAFETY: the caller keeps both until the stream is synchronised.
        unsafe { compute.copy(span.address, pinned.address(), span.bytes as usize).unwrap() };
    }
    pinned
}

fn values<T: bytemuck::Pod>(buffer: &PinnedBuffer) -> Vec<T> {
    bytemuck::pod_collect_to_vec(buffer.as_slice())
}

/// Snapshots of a batch's arrays, and what they must say.
struct Built {
    batch: Batch,
    arrays: [PinnedBuffer; 7],
    seqs: Vec<SeqSlice>,
    payload: Vec<u64>,
    /// Per group and sequence: the table, and the first block that is live.
    tables: Vec<Vec<Vec<u32>>>,
}

impl Built {
    fn check(&self, groups: &[LayerGroup]) {
        let [indptr, kv_len, slots, ids, rows, first, payload] = &self.arrays;
        let (indptr, kv_len) = (values::<i32>(indptr), values::<i32>(kv_len));
        let (slots, ids) = (values::<i64>(slots), values::<i32>(ids));
        let (rows, first) = (values::<i64>(rows), values::<i32>(first));
        assert_eq!(values::<u64>(payload), self.payload);
        let (num_seqs, num_tokens) = (self.seqs.len(), self.payload.len());
        assert_eq!(self.batch.num_tokens as usize, num_tokens);
        assert_eq!(self.batch.max_q_len, self.seqs.iter().map(|seq| seq.tokens).max().unwrap_or(0));
        for (s, seq) in self.seqs.iter().enumerate() {
            assert_eq!(indptr[s + 1] - indptr[s], seq.tokens as i32);
            assert_eq!(kv_len[s] as u32, seq.start + seq.tokens);
            for (g, group) in groups.iter().enumerate() {
                let table = &self.tables[g][s];
                for t in 0..seq.tokens {
                    let position = seq.start + t;
                    let (b, offset) = (position / group.block_size, position % group.block_size);
                    let slot = slots[g * num_tokens + (indptr[s] as u32 + t) as usize];
                    let block = table[b as usize];
                    assert_ne!(block, 0, "a new token without a block");
                    assert_eq!(slot, block as i64 * group.block_size as i64 + offset as i64);
                }
                // Every block that a query of the slice can see stands where the kernels look for it:
                // index(b) of kernels/abi/params.h.
                let sinks = group.sink_tokens.div_ceil(group.block_size);
                let (row, first) = (rows[g * num_seqs + s], first[g * num_seqs + s] as u32);
                for key in 0..seq.start + seq.tokens {
                    let sees = |query: u32| {
                        key <= query
                            && (group.kind.sees(query as u64, key as u64)
                                || key < group.sink_tokens)
                    };
                    if (seq.start..seq.start + seq.tokens).any(sees) {
                        let b = key / group.block_size;
                        let index = if b < sinks { b } else { sinks + b - first.max(sinks) };
                        assert_eq!(ids[row as usize + index as usize] as u32, table[b as usize]);
                    }
                }
            }
        }
    }
}

#[test]
fn arrays_say_what_the_block_tables_say() {
    let groups = groups();
    for seed in 0..4u64 {
        let device = Device::cpu_deferred(seed);
        let compute = device.stream().unwrap();
        let compute = compute.as_ref();
        let mut manager = manager(&groups);
        let mut tables = BatchTables::new(&device, &groups, 6, 1200).unwrap();
        let mut random = seed;
        let mut below = |bound: u64| {
            random = splitmix64(random);
            (random % bound) as usize
        };
        // Lengths of the live sequences.
        let mut live: Vec<(u64, usize)> = Vec::new();
        let (mut next, mut on_the_way) = (0, Vec::new());
        for step in 0..120 {
            if live.len() == 6 || (!live.is_empty() && below(12) == 0) {
                let (seq, _) = live.swap_remove(below(live.len() as u64));
                manager.free(seq).unwrap();
            }
            live.push((next, 0));
            next += 1;
            let mut seqs = Vec::new();
            for (seq, len) in &mut live {
                let tokens = if *len == 0 { 1 + below(190) } else { 1 + below(3) * below(40) };
                let new: Vec<u32> = (0..tokens).map(|_| below(1 << 20) as u32).collect();
                if *len == 0 {
                    manager.allocate(*seq, &new, ExtraKeys::default(), 0).unwrap();
                } else {
                    manager.append(*seq, &new).unwrap();
                }
                seqs.push(SeqSlice { seq: *seq, start: *len as u32, tokens: tokens as u32 });
                *len += tokens;
            }
            let num_tokens: u32 = seqs.iter().map(|seq| seq.tokens).sum();
            let payload: Vec<u64> = (0..num_tokens as u64).map(|t| splitmix64(t ^ step)).collect();
            let batch = tables.build(&manager, &seqs, &payload, compute).unwrap();
            let arrays = [
                batch.qo_indptr,
                batch.kv_len,
                batch.slot_mapping,
                batch.tables.block_ids,
                batch.tables.block_row,
                batch.tables.first_block.unwrap(),
                batch.payload,
            ]
            .map(|span| snapshot(span, compute));
            let table = |g: usize, seq: &SeqSlice| manager.table(seq.seq, g).unwrap().to_vec();
            let expected =
                (0..groups.len()).map(|g| seqs.iter().map(|seq| table(g, seq)).collect()).collect();
            on_the_way.push(Built { batch, arrays, seqs, payload, tables: expected });
            for (seq, len) in &live {
                manager.advance(*seq, *len, *len).unwrap();
            }
            if below(4) == 0 {
                compute.synchronize().unwrap();
                on_the_way.drain(..).for_each(|built| built.check(&groups));
            }
        }
        compute.synchronize().unwrap();
        on_the_way.drain(..).for_each(|built| built.check(&groups));
    }
}

#[test]
fn tables_grow_beyond_their_first_size() {
    let groups = &groups()[..1];
    let device = Device::cpu_deferred(1);
    let compute = device.stream().unwrap();
    let mut manager = manager(groups);
    let mut tables = BatchTables::new(&device, groups, 700, 700).unwrap();
    // 700 sequences that share one prefix of 250 blocks: 175,000 ids.
    let tokens: Vec<u32> = (0..4000).collect();
    let seqs: Vec<SeqSlice> =
        (0..700).map(|seq| SeqSlice { seq, start: 3999, tokens: 1 }).collect();
    for seq in 0..700 {
        manager.allocate(seq, &tokens, ExtraKeys::default(), 0).unwrap();
    }
    let batch = tables.build(&manager, &seqs, &[7; 700], compute.as_ref()).unwrap();
    let ids = snapshot(batch.tables.block_ids, compute.as_ref());
    let payload = snapshot(batch.payload, compute.as_ref());
    compute.as_ref().synchronize().unwrap();
    let want: Vec<u32> = (0..700).flat_map(|seq| manager.table(seq, 0).unwrap().to_vec()).collect();
    assert_eq!(values::<u32>(&ids), want);
    assert_eq!(values::<u64>(&payload), [7; 700]);
}

#[test]
fn batches_above_the_limits_are_refused() {
    let groups = groups();
    let device = Device::cpu();
    let compute = device.stream().unwrap();
    let mut manager = manager(&groups);
    manager.allocate(1, &[5; 30], ExtraKeys::default(), 0).unwrap();
    let mut tables = BatchTables::new(&device, &groups, 2, 64).unwrap();
    let slice = |seq, start, tokens| SeqSlice { seq, start, tokens };
    let mut build = |seqs: &[SeqSlice], payload: usize| {
        tables
            .build(&manager, seqs, &vec![0; payload], compute.as_ref())
            .map(|batch| batch.num_tokens)
    };
    assert_eq!(build(&[slice(1, 0, 30)], 30).unwrap(), 30);
    assert_eq!(build(&[], 0).unwrap(), 0);
    assert!(build(&[slice(1, 0, 30)], 29).is_err());
    assert!(build(&[slice(1, 0, 30), slice(1, 0, 30), slice(1, 0, 1)], 61).is_err());
    assert!(build(&[slice(1, 0, 65)], 65).is_err());
    assert!(build(&[slice(1, u32::MAX, 1)], 1).is_err());
    assert!(build(&[slice(2, 0, 1)], 1).is_err());
}
