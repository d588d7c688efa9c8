//! CUDA graphs: what is captured once replays with the lengths and slots of the moment. One test, so that
//! nothing else waits for the device during a capture.

mod common;

use bytemuck::Zeroable;
use hybridkv::ErrorKind;
use hybridkv::abi::hkv_window;
use hybridkv::device::Device;
use hybridkv::device::cuda::Graph;
use hybridkv::layout::{Dtype, KvShape, KvView};
use hybridkv::ops::{AppendArgs, CtaQuota, HeadStrides, Kernels, MoveArgs, MoveShape, WindowTable};

const TOKENS: usize = 6;
const BLOCKS: usize = 4;
const BLOCK_SIZE: usize = 16;
const HEAD_DIM: usize = 64;
/// Elements of K (and of V) in a block of one layer with one head.
const HALF: usize = BLOCK_SIZE * HEAD_DIM;

#[test]
fn a_captured_append_and_move_replay_with_other_slots() {
    let cpu = Device::cpu();
    let refused = Graph::capture(cpu.stream().unwrap().as_ref(), |_| Ok(())).err().unwrap();
    assert!(matches!(refused.kind(), ErrorKind::Unsupported { .. }));

    let Some(device) = common::cuda() else { return };
    let kernels = Kernels::load(device).unwrap();
    let stream = device.stream().unwrap();
    let element = |salt: usize| move |i: usize| (i * 7919 + salt) as u16;
    let new: [Vec<u16>; 2] = [1, 2].map(|salt| (0..TOKENS * HEAD_DIM).map(element(salt)).collect());
    let mut expected: Vec<u16> = (0..BLOCKS * 2 * HALF).map(element(3)).collect();

    let pool = device.upload(&expected).unwrap();
    let (k_new, v_new) = (device.upload(&new[0]).unwrap(), device.upload(&new[1]).unwrap());
    let slots = device.upload(&[-1i64; TOKENS]).unwrap();
    let windows = device.upload(&[hkv_window::zeroed()]).unwrap();
    let host = device.alloc_pinned(pool.len()).unwrap();
    let table = device.upload(&[[pool.address(), host.address(), pool.len() as u64]]).unwrap();
    let shape = KvShape { num_kv_heads: 1, head_dim: HEAD_DIM as u32, dtype: Dtype::F16 };
    let block_bytes = 2 * HALF as u64 * 2;
    let append = AppendArgs {
        k_new: k_new.span(),
        v_new: v_new.span(),
        dtype: shape.dtype,
        new_strides: HeadStrides::contiguous(1, HEAD_DIM as u32),
        kv: KvView::block_first(
            pool.span(),
            shape,
            BLOCK_SIZE as u32,
            1,
            BLOCKS as u64,
            block_bytes,
        )
        .unwrap(),
        slot_mapping: slots.span(),
        num_groups: 1,
        windows: WindowTable { rows: windows.span(), num_layers: 1 },
        layer: 0,
        num_tokens: TOKENS as u32,
    };
    let moves = MoveArgs {
        copies: table.span(),
        num_copies: 1,
        shape: MoveShape::FRAGMENTS,
        quota: CtaQuota::HOST_LINK,
    };

    let graph = Graph::capture(stream.as_ref(), |stream| {
        // SAFETY: everything outlives the replays below.
        unsafe {
            kernels.append(&append, stream)?;
            kernels.move_blocks(&moves, stream)
        }
    })
    .unwrap();
    stream.as_ref().synchronize().unwrap();
    assert!(host.as_slice().iter().all(|&byte| byte == 0), "capturing runs nothing");

    for replay in [[0, 17, 63, 31, 48, 2], [5, -1, -1, 60, -3, 17]] {
        for (token, &slot) in replay.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            let (block, offset) = (slot as usize / BLOCK_SIZE, slot as usize % BLOCK_SIZE);
            for (half, new) in new.iter().enumerate() {
                let to = (block * 2 + half) * HALF + offset * HEAD_DIM;
                expected[to..to + HEAD_DIM].copy_from_slice(&new[token * HEAD_DIM..][..HEAD_DIM]);
            }
        }
        let update = device.upload(&replay.map(i64::from)).unwrap();
        // SAFETY: everything outlives the synchronisation; slots are distinct and inside of the pool.
        unsafe {
            stream.as_ref().copy(update.address(), slots.address(), update.len()).unwrap();
            graph.launch(stream.as_ref()).unwrap();
        }
        stream.as_ref().synchronize().unwrap();
        assert!(host.as_slice() == bytemuck::cast_slice::<u16, u8>(&expected));
    }

    let failed = Graph::capture(stream.as_ref(), |stream| stream.synchronize());
    assert!(failed.is_err(), "synchronising cannot be captured");
    stream.as_ref().synchronize().expect("a failed capture leaves the stream usable");
}
