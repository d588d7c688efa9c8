//! Streams and events: order that is promised holds under every schedule of the CPU device, and order
//! that is not promised is broken by some schedule.

mod common;

use std::sync::{Arc, Mutex};

use hybridkv::device::{Device, Stream};
use proptest::prelude::*;

/// Enough schedules for a coin-flip race to show with certainty.
const SEEDS: std::ops::Range<u64> = 0..64;

/// A copy through two streams: `first` fills a buffer with 7, `second` copies it out. Returns the copy.
fn relay(device: &Device, wait: bool) -> Vec<u8> {
    const BYTES: usize = 4096;
    let (first, second) = (device.stream().unwrap(), device.stream().unwrap());
    let buffer = device.alloc(BYTES).unwrap();
    let out = device.alloc_pinned(BYTES).unwrap();
    let filled = device.event().unwrap();
    // SAFETY: the buffers outlive the synchronisation; the race is the point.
    unsafe {
        first.as_ref().fill(buffer.address(), 7, BYTES).unwrap();
        first.as_ref().record(&filled).unwrap();
        if wait {
            second.as_ref().wait(&filled).unwrap();
        }
        second.as_ref().copy(buffer.address(), out.address(), BYTES).unwrap();
    }
    second.as_ref().synchronize().unwrap();
    out.as_slice().to_vec()
}

#[test]
fn an_event_wait_orders_two_streams_under_every_schedule() {
    for seed in SEEDS {
        assert!(relay(&Device::cpu_deferred(seed), true).iter().all(|&b| b == 7), "seed {seed}");
    }
    for device in std::iter::once(&Device::cpu()).chain(common::cuda()) {
        for _ in 0..10 {
            assert!(relay(device, true).iter().all(|&b| b == 7), "{device:?}");
        }
    }
}

#[test]
fn a_missing_wait_corrupts_bytes_under_some_schedule() {
    let caught = SEEDS
        .filter(|&seed| relay(&Device::cpu_deferred(seed), false).iter().any(|&b| b != 7))
        .count();
    assert!(caught > 8, "only {caught} schedules show the race");
}

#[test]
fn reusing_a_source_before_its_copy_is_done_corrupts_bytes_under_some_schedule() {
    let run = |seed, wait: bool| {
        let device = Device::cpu_deferred(seed);
        let stream = device.stream().unwrap();
        let mut staging = device.alloc_pinned(64).unwrap();
        let out = device.alloc_pinned(64).unwrap();
        staging.as_mut_slice().fill(1);
        // SAFETY: the buffers outlive the synchronisation; the race is the point.
        unsafe { stream.as_ref().copy(staging.address(), out.address(), 64).unwrap() };
        if wait {
            stream.as_ref().synchronize().unwrap();
        }
        staging.as_mut_slice().fill(2);
        stream.as_ref().synchronize().unwrap();
        out.as_slice().iter().all(|&b| b == 1)
    };
    assert!(SEEDS.into_iter().all(|seed| run(seed, true)));
    assert!(SEEDS.into_iter().any(|seed| !run(seed, false)));
}

#[test]
fn fresh_device_memory_is_poison_and_pinned_memory_is_zero() {
    let device = Device::cpu();
    let buffer = device.alloc(64).unwrap();
    assert!(buffer.address().is_multiple_of(256));
    assert!(buffer.download::<f32>().unwrap().iter().all(|x| x.is_nan()));
    let pinned = device.alloc_pinned(100).unwrap();
    assert!(pinned.address().is_multiple_of(4096));
    assert_eq!(pinned.as_slice(), [0; 100]);
}

#[test]
fn uploads_and_downloads_give_back_what_went_in() {
    for device in [Device::cpu(), Device::cpu_deferred(5)].iter().chain(common::cuda()) {
        let values: Vec<u32> = (0..1000).collect();
        let buffer = device.upload(&values).unwrap();
        assert_eq!(buffer.len(), 4000);
        assert_eq!(buffer.download::<u32>().unwrap(), values);
        assert!(buffer.download::<[u8; 3]>().is_err(), "4000 bytes are no multiple of 3");
        assert!(device.upload::<u32>(&[]).unwrap().download::<u32>().unwrap().is_empty());
    }
}

#[test]
fn polling_an_event_ends() {
    for seed in SEEDS {
        let device = Device::cpu_deferred(seed);
        let stream = device.stream().unwrap();
        let event = device.event().unwrap();
        assert!(event.is_complete().unwrap(), "never recorded");
        let buffer = device.alloc(64).unwrap();
        for _ in 0..50 {
            // SAFETY: the buffer outlives the stream's work: dropping it waits for the device.
            unsafe { stream.as_ref().fill(buffer.address(), 1, 64).unwrap() };
        }
        stream.as_ref().record(&event).unwrap();
        let polls = (0..1000).find(|_| event.is_complete().unwrap());
        assert!(polls.is_some(), "seed {seed}: an event never completes");
    }
}

#[test]
fn timed_events_measure_and_refuse_what_is_not_complete() {
    for device in [Device::cpu(), Device::cpu_deferred(0)].iter().chain(common::cuda()) {
        let stream = device.stream().unwrap();
        let (start, end) = (device.timed_event().unwrap(), device.timed_event().unwrap());
        assert!(end.elapsed_ms_since(&start).is_err(), "never recorded");
        stream.as_ref().record(&start).unwrap();
        stream.as_ref().record(&end).unwrap();
        end.synchronize().unwrap();
        assert!(end.is_complete().unwrap());
        assert!(end.elapsed_ms_since(&start).unwrap() >= 0.0);
    }
}

#[test]
fn work_of_a_dropped_stream_still_happens() {
    for seed in SEEDS {
        let device = Device::cpu_deferred(seed);
        let out = device.alloc_pinned(64).unwrap();
        let stream = device.stream().unwrap();
        // SAFETY: the buffer outlives the synchronisation.
        unsafe { stream.as_ref().fill(out.address(), 3, 64).unwrap() };
        drop(stream);
        device.synchronize().unwrap();
        assert_eq!(out.as_slice(), [3; 64]);
    }
}

#[test]
fn a_foreign_stream_is_used_as_it_is() {
    for device in [Device::cpu(), Device::cpu_deferred(0)].iter().chain(common::cuda()) {
        let owner = device.stream().unwrap();
        let out = device.alloc_pinned(64).unwrap();
        for raw in [owner.as_ref().raw(), std::ptr::null_mut()] {
            // SAFETY: the owner outlives the reference, the null stream is always there, and the buffer
            // outlives the synchronisation.
            unsafe {
                let foreign = device.foreign_stream(raw);
                foreign.fill(out.address(), 9, 64).unwrap();
                foreign.synchronize().unwrap();
                assert_eq!(out.as_slice(), [9; 64]);
                foreign.fill(out.address(), 0, 64).unwrap();
                foreign.synchronize().unwrap();
            }
        }
    }
}

/// One step of a random program over a few streams and events.
#[derive(Debug, Clone, Copy)]
enum Step {
    Run { stream: usize },
    Record { stream: usize, event: usize },
    Wait { stream: usize, event: usize },
    Synchronize { stream: usize },
    SynchronizeEvent { event: usize },
}

const STREAMS: usize = 4;
const EVENTS: usize = 3;

fn step() -> impl Strategy<Value = Step> {
    let (stream, event) = (0..STREAMS, 0..EVENTS);
    prop_oneof![
        4 => stream.clone().prop_map(|stream| Step::Run { stream }),
        2 => (stream.clone(), event.clone()).prop_map(|(stream, event)| Step::Record { stream, event }),
        2 => (stream.clone(), event.clone()).prop_map(|(stream, event)| Step::Wait { stream, event }),
        1 => stream.prop_map(|stream| Step::Synchronize { stream }),
        1 => event.prop_map(|event| Step::SynchronizeEvent { event }),
    ]
}

proptest! {
    /// Tasks run once each, after everything that stream order and waits put before them; and what the
    /// host waited for has run when it goes on.
    #[test]
    fn schedules_respect_stream_order_and_waits(
        program in prop::collection::vec(step(), 0..60),
        seed in any::<u64>(),
    ) {
        let device = Device::cpu_deferred(seed);
        let streams: Vec<Stream> = (0..STREAMS).map(|_| device.stream().unwrap()).collect();
        let events: Vec<_> = (0..EVENTS).map(|_| device.event().unwrap()).collect();
        let ran = Arc::new(Mutex::new(Vec::new()));
        // Which tasks precede the next task of a stream, and the latest record of an event.
        let mut before: Vec<Vec<usize>> = vec![Vec::new(); STREAMS];
        let mut recorded: Vec<Vec<usize>> = vec![Vec::new(); EVENTS];
        let mut needs: Vec<Vec<usize>> = Vec::new();
        for step in program {
            match step {
                Step::Run { stream } => {
                    let task = needs.len();
                    needs.push(before[stream].clone());
                    before[stream].push(task);
                    let ran = ran.clone();
                    let work = Box::new(move || ran.lock().unwrap().push(task));
                    // SAFETY: the stream is live; the task owns what it touches.
                    unsafe { device.backend().submit(work, streams[stream].as_ref().raw()).unwrap() };
                }
                Step::Record { stream, event } => {
                    streams[stream].as_ref().record(&events[event]).unwrap();
                    recorded[event] = before[stream].clone();
                }
                Step::Wait { stream, event } => {
                    streams[stream].as_ref().wait(&events[event]).unwrap();
                    let more = recorded[event].clone();
                    before[stream].extend(more);
                }
                Step::Synchronize { stream } => {
                    streams[stream].as_ref().synchronize().unwrap();
                    let ran = ran.lock().unwrap();
                    prop_assert!(before[stream].iter().all(|task| ran.contains(task)));
                }
                Step::SynchronizeEvent { event } => {
                    events[event].synchronize().unwrap();
                    prop_assert!(events[event].is_complete().unwrap());
                    let ran = ran.lock().unwrap();
                    prop_assert!(recorded[event].iter().all(|task| ran.contains(task)));
                }
            }
        }
        device.synchronize().unwrap();
        let ran = ran.lock().unwrap();
        let mut sorted = ran.clone();
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (0..needs.len()).collect::<Vec<_>>());
        for (at, task) in ran.iter().enumerate() {
            prop_assert!(needs[*task].iter().all(|need| ran[..at].contains(need)));
        }
    }
}
