//! Criterion benchmarks of the kernels, on the workloads of `hybridkv bench`: for comparing two versions of
//! a kernel on one machine. Times are those of CUDA events around graph replays. Without a GPU tiny cases
//! run on the CPU device, which measures nothing.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hybridkv::device::Device;
use hybridkv::device::cuda::Graph;
use hybridkv::error::Result;
use hybridkv::ops::{CtaQuota, Kernels};

#[allow(dead_code, reason = "only a part is used here")]
#[path = "../src/bin/hybridkv/bench/attention.rs"]
mod attention;
#[allow(dead_code, reason = "only a part is used here")]
#[path = "../src/bin/hybridkv/random.rs"]
mod random;
#[allow(dead_code, reason = "only a part is used here")]
#[path = "../src/bin/hybridkv/bench/suites.rs"]
mod suites;
#[allow(dead_code, reason = "only a part is used here")]
#[path = "../src/bin/hybridkv/bench/timing.rs"]
mod timing;
#[allow(dead_code, reason = "only a part is used here")]
#[path = "../src/bin/hybridkv/bench/workload.rs"]
mod workload;

use attention::{Attention, Batch, layers_beyond_l2};
use random::Rng;
use timing::Workload;
use workload::{Arenas, Direction, Move};

/// Time of `iterations` submissions of `work`.
fn time(device: &Device, work: &dyn Workload, iterations: u64) -> Result<Duration> {
    let stream = device.stream()?;
    let stream = stream.as_ref();
    if !device.is_cuda() {
        let start = Instant::now();
        for i in 0..iterations {
            work.submit(black_box(i as usize % work.rounds()), stream)?;
        }
        stream.synchronize()?;
        return Ok(start.elapsed());
    }
    let graph = Graph::capture(stream, |stream| {
        (0..work.rounds()).try_for_each(|round| work.submit(round, stream))
    })?;
    let replays = iterations.div_ceil(work.rounds() as u64);
    let (start, end) = (device.timed_event()?, device.timed_event()?);
    stream.record(&start)?;
    for _ in 0..replays {
        // SAFETY: the workload keeps its memory, and the stream is synchronised below.
        unsafe { graph.launch(stream)? };
    }
    stream.record(&end)?;
    stream.synchronize()?;
    let seconds = f64::from(end.elapsed_ms_since(&start)?) / 1e3;
    Ok(Duration::from_secs_f64(
        seconds * iterations as f64 / (replays * work.rounds() as u64) as f64,
    ))
}

fn bench(criterion: &mut Criterion, device: &Device, name: &str, bytes: u64, work: &dyn Workload) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(bytes)).sample_size(10);
    group.warm_up_time(Duration::from_millis(if device.is_cuda() { 300 } else { 20 }));
    group.measurement_time(Duration::from_millis(if device.is_cuda() { 1500 } else { 100 }));
    group.bench_function("kernel", |bencher| {
        bencher.iter_custom(|iterations| time(device, work, iterations).expect("the kernel runs"));
    });
    group.finish();
}

fn kernels(criterion: &mut Criterion) {
    let device = Device::cuda(0).unwrap_or_else(|error| {
        eprintln!(
            "SKIPPED: no CUDA device ({error}): tiny cases on the CPU device, no measurement"
        );
        Device::cpu()
    });
    let kernels = Kernels::load(&device).expect("this build has kernels for the device");
    let mut rng = Rng::new(1);
    for case in suites::DECODE.iter().chain(suites::PREFILL) {
        let (name, shape) = (case.name(), case.on(&device));
        let lengths = shape.lengths();
        let bytes = Batch::of(&shape.model(1), &lengths, &shape).bytes();
        let layers = match device.is_cuda() {
            true => layers_beyond_l2(bytes, device.info().l2_bytes),
            false => 2,
        };
        let model = shape.model(layers);
        match Attention::new(&kernels, &Batch::of(&model, &lengths, &shape), &mut rng) {
            Ok(Some(work)) => {
                bench(criterion, &device, &name, bytes as u64, &work);
                work.check().expect("every output was written");
            }
            Ok(None) => eprintln!("SKIPPED: {name}: too little device memory"),
            Err(error) => eprintln!("SKIPPED: {name}: {error}"),
        }
    }
    let side = if device.is_cuda() { 512 << 20 } else { 2 << 20 };
    let arenas = Arenas::new(&device, 2 * side, &mut rng).expect("the arenas fit");
    for direction in [Direction::H2d, Direction::D2h, Direction::D2d] {
        for fragment in suites::FRAGMENTS {
            let bytes = side.min(fragment.bytes << 14);
            let quota = match direction {
                Direction::D2d => CtaQuota::WHOLE_DEVICE,
                _ => CtaQuota::HOST_LINK,
            };
            let work =
                Move::new(&kernels, &arenas, direction, fragment.bytes, bytes, quota, &mut rng)
                    .expect("the tables fit");
            bench(criterion, &device, &fragment.case(direction), work.bytes(), &work);
        }
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
