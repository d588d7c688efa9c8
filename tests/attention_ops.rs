//! `attention`, `read_blocks` and `merge_states` through their launchers on every device at hand: every way in
//! which the keys are cut against the reference, and everything that the host can refuse.

#[path = "attention_ops/bed.rs"]
mod bed;
mod common;
#[path = "attention_ops/refusals.rs"]
mod refusals;

use half::bf16;
use hybridkv::device::Span;
use hybridkv::layout::Dtype;
use hybridkv::ops::{HeadStrides, Kernels, MergeArgs};
use hybridkv::reference::{self, State, compare};
use hybridkv::spec::AttentionKind;

use bed::{Batch, DIM, KV_HEADS, Planned, all_kernels, example, expected, indices, load, value};

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
