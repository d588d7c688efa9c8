//! Moves from end to end: whatever the path, the layouts and the order in which streams run, the bytes arrive; and
//! planning allocates nothing once warm.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use hybridkv::abi::hkv_copy;
use hybridkv::device::{Device, PinnedBuffer};
use hybridkv::movement::{
    BlockLayout, BlockMove, BlockPart, BlockRows, EngineCost, KernelCost, Layers, LinkModel, Mover,
    PathCosts, PitchedCost, Planner, Route, SizeCosts, Traffic, Way,
};
use hybridkv::ops::{Kernels, MoveShape};

/// Counts the allocations of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is the system allocator's; counting touches a thread-local number alone.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

/// Every device at hand: the CPU in both its orders, and a GPU when there is one.
fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu(), Device::cpu_deferred(1), Device::cpu_deferred(2)];
    match Device::cuda(0) {
        Ok(device) => devices.push(device),
        Err(error) => eprintln!("SKIPPED: no CUDA device ({error})"),
    }
    devices
}

fn kernel(ctas: u32, gbps: f64) -> KernelCost {
    KernelCost { ctas, start_us: 5.0, rows: SizeCosts::at_rate(0.02, gbps) }
}

/// A model under which one of the paths is by far the fastest.
fn model(engine: f64, pitched: f64, kernels: f64) -> LinkModel {
    let paths = PathCosts {
        engine: Some(EngineCost {
            start_us: 0.0,
            submit_us: 0.0,
            copies: SizeCosts::at_rate(0.0, engine),
        }),
        pitched: Some(PitchedCost { call_us: 0.0, row_us: 0.0, gbps: pitched }),
        kernels: vec![kernel(4, kernels)],
    };
    LinkModel {
        to_device: [paths.clone(), paths.clone()],
        to_host: [paths.clone(), paths.clone()],
        inside: paths,
        staging: kernel(8, 1000.0),
    }
}

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let word = |i: u64| (i ^ seed << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    (0..bytes as u64).map(|i| (word(i / 8) >> (i % 8 * 8)) as u8).collect()
}

/// A pool of blocks in one of the layouts: bytes, and the address of each block relative to its start.
fn pool(rows: BlockRows, which: usize, blocks: u64) -> (BlockLayout, usize, Vec<u64>) {
    let block = rows.bytes().unwrap() as u64;
    let of_layer = block / u64::from(rows.layers);
    let at = |stride: u64| (0..blocks).map(|id| id * stride).collect();
    match which {
        0 => (BlockLayout::block_first_hnd(rows).unwrap(), (block * blocks) as usize, at(block)),
        1 => (BlockLayout::heads_outermost(rows).unwrap(), (block * blocks) as usize, at(block)),
        2 => {
            // One tensor [layer][block][K|V][token][head].
            let part = (of_layer / u64::from(rows.parts)) as i64;
            let layers = Layers::Stride((of_layer * blocks) as i64);
            let layout = BlockLayout::block_first_nhd(rows).unwrap().in_layers(layers, part);
            (layout, (block * blocks) as usize, at(of_layer))
        }
        _ => {
            // A tensor per layer, the second layer's first.
            let bases: Vec<u64> =
                (0..u64::from(rows.layers)).map(|layer| (layer ^ 1) * of_layer * blocks).collect();
            let part = (of_layer / u64::from(rows.parts)) as i64;
            let layers = BlockLayout::layers_at(&bases);
            let layout = BlockLayout::block_first_hnd(rows).unwrap().in_layers(layers, part);
            (
                layout,
                (block * blocks) as usize,
                at(of_layer).into_iter().map(|a: u64| a + bases[0]).collect(),
            )
        }
    }
}

/// The address of a row, relative to its pool.
fn row(layout: &BlockLayout, block: u64, layer: u32, part: u32, head: u32, token: u32) -> usize {
    let layer = match &layout.layers {
        Layers::Stride(stride) => i64::from(layer) * stride,
        Layers::Offsets(offsets) => offsets[layer as usize],
    };
    let inside = layer
        + i64::from(part) * layout.part
        + i64::from(head) * layout.head
        + i64::from(token) * layout.token;
    (block as i64 + inside) as usize
}

fn table(device: &Device, copies: &[hkv_copy]) -> PinnedBuffer {
    let mut table = device.alloc_pinned(size_of_val(copies).max(16)).unwrap();
    let words = copies.iter().flat_map(|c| [c.src as u64, c.dst as u64, c.bytes]);
    for (to, word) in table.as_mut_slice().chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    table
}

/// Blocks go down to the host and come up again in other places, by every path, between every pair of layouts.
#[test]
fn blocks_arrive_by_every_path_between_all_layouts() {
    const BLOCKS: u64 = 40;
    let rows = BlockRows { layers: 4, parts: 2, heads: 2, tokens: 8, row_bytes: 64 };
    let part = BlockPart { layers: 1..4, tokens: 0..8 };
    let models = [
        ("kernel", model(0.001, 0.001, 1000.0)),
        ("engine", model(1000.0, 0.001, 0.001)),
        ("pitched", model(0.001, 1000.0, 0.001)),
    ];
    for device in devices() {
        let kernels = Arc::new(Kernels::load(&device).unwrap());
        for (name, model) in &models {
            let model = Arc::new(model.clone());
            for (on_device, on_host) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
                let (near, bytes, near_blocks) = pool(rows, on_device, BLOCKS);
                let (far, _, far_blocks) = pool(rows, on_host, BLOCKS);
                let source = noise(bytes, 7);
                let memory = device.upload(&source).unwrap();
                let mut host = device.alloc_pinned(bytes).unwrap();
                host.as_mut_slice().fill(0xEE);
                let back = device.upload(&vec![0xDDu8; bytes]).unwrap();
                let stream = device.stream().unwrap();
                let mut mover = Mover::new(&kernels, &model, 64).with_staging().unwrap();
                // Every second block, in an order with runs upwards and downwards.
                let ids: Vec<u64> = (0..10).chain((20..30).rev()).collect();
                let to = |id: u64| (id * 3 + 1) % BLOCKS;
                let down = BlockMove::between(&near, &far, &part).unwrap();
                let (down_shape, _down_tables) = down.on(&device).unwrap();
                let up = BlockMove::between(&far, &near, &part).unwrap();
                let (up_shape, _up_tables) = up.on(&device).unwrap();
                let stores: Vec<hkv_copy> = ids
                    .iter()
                    .map(|&id| {
                        down.block(
                            memory.address() + near_blocks[id as usize],
                            host.address() + far_blocks[to(id) as usize],
                        )
                    })
                    .collect();
                let loads: Vec<hkv_copy> = ids
                    .iter()
                    .map(|&id| {
                        up.block(
                            host.address() + far_blocks[to(id) as usize],
                            back.address() + near_blocks[id as usize],
                        )
                    })
                    .collect();
                let (stores, loads) = (table(&device, &stores), table(&device, &loads));
                let traffic = |way| Traffic { way, both_ways: false };
                // SAFETY: all memory lives until the stream is synchronised; blocks are distinct.
                unsafe {
                    let stream = stream.as_ref();
                    let (down, up) = (Way::DeviceToHost, Way::HostToDevice);
                    mover
                        .submit(stores.span(), ids.len(), &down_shape, traffic(down), stream)
                        .unwrap();
                    mover.submit(loads.span(), ids.len(), &up_shape, traffic(up), stream).unwrap();
                    stream.synchronize().unwrap();
                }
                let after = back.download::<u8>().unwrap();
                let case = format!("{device:?} {name} {on_device} -> {on_host}");
                let (mut expected_host, mut expected) = (vec![0xEEu8; bytes], vec![0xDDu8; bytes]);
                for &id in &ids {
                    for layer in part.layers.clone() {
                        for (p, head, token) in (0..2)
                            .flat_map(|p| (0..2).flat_map(move |h| (0..8).map(move |t| (p, h, t))))
                        {
                            let at = row(&near, near_blocks[id as usize], layer, p, head, token);
                            let far_block = far_blocks[to(id) as usize];
                            let there = row(&far, far_block, layer, p, head, token);
                            let bytes = &source[at..at + 64];
                            expected_host[there..there + 64].copy_from_slice(bytes);
                            expected[at..at + 64].copy_from_slice(bytes);
                        }
                    }
                }
                assert!(host.as_slice() == expected_host, "{case}: on the host");
                assert!(after == expected, "{case}: back on the device");
            }
        }
    }
}

/// Blocks of more than one slot of the ring, again and again, under streams that run in any order.
#[test]
fn staged_blocks_wait_for_their_slots() {
    let rows = BlockRows { layers: 8, parts: 2, heads: 1, tokens: 16, row_bytes: 256 };
    let block = rows.bytes().unwrap() as u64;
    let blocks = (5 * (8 << 20) / block) + 3;
    let (near, bytes, near_blocks) = pool(rows, 2, blocks);
    let (far, _, far_blocks) = pool(rows, 0, blocks);
    let source = noise(bytes, 3);
    for device in devices() {
        let kernels = Arc::new(Kernels::load(&device).unwrap());
        let model = Arc::new(model(1000.0, 0.001, 0.001));
        let mut mover = Mover::new(&kernels, &model, 64).with_staging().unwrap();
        let memory = device.upload(&source).unwrap();
        let host = device.alloc_pinned(bytes).unwrap();
        let back = device.upload(&vec![0u8; bytes]).unwrap();
        let down = BlockMove::between(&near, &far, &BlockPart::whole(rows)).unwrap();
        let up = BlockMove::between(&far, &near, &BlockPart::whole(rows)).unwrap();
        // No two neighbours, so that nothing is merged.
        let order: Vec<usize> = (0..blocks as usize).map(|i| i * 7 % blocks as usize).collect();
        let rows_of =
            |m: &BlockMove, from: u64, from_blocks: &[u64], to: u64, to_blocks: &[u64]| {
                let copies: Vec<hkv_copy> = order
                    .iter()
                    .map(|&id| m.block(from + from_blocks[id], to + to_blocks[id]))
                    .collect();
                table(&device, &copies)
            };
        let stores = rows_of(&down, memory.address(), &near_blocks, host.address(), &far_blocks);
        let loads = rows_of(&up, host.address(), &far_blocks, back.address(), &near_blocks);
        let stream = device.stream().unwrap();
        // SAFETY: all memory lives until the stream is synchronised; blocks are distinct.
        unsafe {
            let (stream, count) = (stream.as_ref(), order.len());
            let traffic = |way| Traffic { way, both_ways: true };
            mover
                .submit(stores.span(), count, &down.shape, traffic(Way::DeviceToHost), stream)
                .unwrap();
            mover
                .submit(loads.span(), count, &up.shape, traffic(Way::HostToDevice), stream)
                .unwrap();
            stream.synchronize().unwrap();
        }
        assert!(back.download::<u8>().unwrap() == source, "{device:?}");
    }
}

/// A move that fails when some of its blocks are on their way through the ring leaves nothing but what its caller's stream
/// has: once that has been waited for the memory is the caller's again.
#[test]
fn a_failed_move_leaves_nothing_beside_its_stream() {
    let rows = BlockRows { layers: 8, parts: 2, heads: 1, tokens: 16, row_bytes: 256 };
    let block = rows.bytes().unwrap() as u64;
    let blocks = (2 * (8 << 20) / block) + 1;
    let (near, bytes, near_blocks) = pool(rows, 2, blocks);
    let (far, _, far_blocks) = pool(rows, 0, blocks);
    let down = BlockMove::between(&near, &far, &BlockPart::whole(rows)).unwrap();
    for seed in 0..8 {
        let device = Device::cpu_deferred(seed);
        let kernels = Arc::new(Kernels::load(&device).unwrap().checked());
        let model = Arc::new(model(1000.0, 0.001, 0.001));
        let mut mover = Mover::new(&kernels, &model, 64).with_staging().unwrap();
        let memory = device.upload(&noise(bytes, 5)).unwrap();
        let mut host = device.alloc_pinned(bytes).unwrap();
        let stores = |to: &PinnedBuffer| -> Vec<hkv_copy> {
            let ids = (0..blocks as usize).map(|i| i * 7 % blocks as usize);
            ids.map(|id| {
                down.block(memory.address() + near_blocks[id], to.address() + far_blocks[id])
            })
            .collect()
        };
        let mut failing = stores(&host);
        // The only block of the last slot is not where a block may be.
        let last = failing.last_mut().unwrap();
        last.src = (last.src as u64 + 8) as *const _;
        let other = device.alloc_pinned(bytes).unwrap();
        let tables = [table(&device, &failing), table(&device, &stores(&other))];
        let stream = device.stream().unwrap();
        let stream = stream.as_ref();
        let traffic = Traffic { way: Way::DeviceToHost, both_ways: true };
        // SAFETY: all memory lives until the stream is synchronised; blocks are distinct.
        let mut submit = |table: &PinnedBuffer| unsafe {
            mover.submit(table.span(), blocks as usize, &down.shape, traffic, stream)
        };
        let error = submit(&tables[0]).unwrap_err();
        assert!(error.to_string().contains("multiple"), "{error}");
        stream.synchronize().unwrap();
        host.as_mut_slice().fill(0x77);
        // The next move comes behind whatever the first one left on other streams.
        submit(&tables[1]).unwrap();
        stream.synchronize().unwrap();
        assert!(host.as_slice().iter().all(|&byte| byte == 0x77), "seed {seed}");
    }
}

/// Plans of 10,000 blocks, scattered or in runs, with and without rows.
#[test]
fn a_warm_planner_allocates_nothing() {
    let model = model(50.0, 50.0, 50.0);
    let fragments = MoveShape::FRAGMENTS;
    let rows = BlockRows { layers: 12, parts: 2, heads: 1, tokens: 16, row_bytes: 256 };
    let near = BlockLayout::block_first_nhd(rows).unwrap().in_layers(Layers::Stride(1 << 30), 4096);
    let far = BlockLayout::block_first_hnd(rows).unwrap();
    let blocks = BlockMove::between(&near, &far, &BlockPart::whole(rows)).unwrap().shape;
    let scattered = |i: u64| hkv_copy {
        src: (i * 7 % 10_000 * 98_304) as *const _,
        dst: (i * 3 % 10_000 * 98_304) as *mut _,
        bytes: 98_304,
    };
    let strided =
        |i: u64| hkv_copy { src: (i * 16_384) as *const _, dst: (i * 4096) as *mut _, bytes: 4096 };
    let mut planner = Planner::with_capacity(10_000).with_staging(u64::MAX);
    let mut copies: Vec<hkv_copy> = Vec::with_capacity(10_000);
    for round in 0..3 {
        for (shape, copy) in [
            (&fragments, &scattered as &dyn Fn(u64) -> hkv_copy),
            (&fragments, &strided),
            (&blocks, &strided),
        ] {
            copies.clear();
            copies.extend((0..10_000).map(copy));
            let before = allocations();
            let traffic = Traffic { way: Way::HostToDevice, both_ways: round == 1 };
            let route = planner.plan(&mut copies, shape, traffic, &model, &[]);
            assert_eq!(allocations(), before, "round {round}: {route:?}");
            let done = planner.engine().len() + planner.pitched().len();
            let (Route::Direct { copies, .. } | Route::Staged { copies, .. }) = route;
            assert!(copies + done > 0);
        }
    }
}
