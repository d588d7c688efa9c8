//! The CPU as a device: host memory, and streams that are queues of closures.
//!
//! Every submission (copy, fill, kernel, event record, event wait) is a task at the tail of its stream's
//! queue. Two rules decide when tasks run:
//! - *eager* (the default): at submission, on the submitting thread;
//! - *deferred*: when the host synchronises or queries an event, in an order across streams drawn from a
//!   seed. The order respects what a GPU would respect, stream order and event waits, and nothing else:
//!   a stream may run far ahead of the others or starve until somebody waits for it. Work that lacks a
//!   wait therefore corrupts bytes under some seed, which makes this mode the race detector of tests.
//!
//! Fresh device memory is filled with 0xFF (NaN in every float type, -1 in every integer type), so that
//! a read before the first write shows.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::{Backend, CopyBatch, CopyRegion, DeviceInfo, DeviceKind, PitchedCopy, Task};
use crate::error::{Error, ErrorKind, Result};

const DEVICE_ALIGN: usize = 256;
const PINNED_ALIGN: usize = 4096;
const POISON: u8 = 0xFF;

/// The CPU as a device.
pub struct CpuDevice {
    info: DeviceInfo,
    deferred: bool,
    state: Mutex<State>,
}

impl CpuDevice {
    /// A CPU device that runs every task at submission.
    pub fn eager() -> Self {
        Self::with_mode(None)
    }

    /// A CPU device that runs tasks late, in an order across streams drawn from `seed`.
    pub fn deferred(seed: u64) -> Self {
        Self::with_mode(Some(seed))
    }

    fn with_mode(seed: Option<u64>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        Self {
            info: DeviceInfo {
                kind: DeviceKind::Cpu,
                name: super::host::processor_name(),
                compute_capability: (0, 0),
                multiprocessors: cores,
                memory_bytes: super::host::total_bytes().unwrap_or(0),
                l2_bytes: 0,
                shared_memory_bytes: 0,
                driver_version: 0,
            },
            deferred: seed.is_some(),
            state: Mutex::new(State::new(seed.unwrap_or(0))),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a task; runs it at once in eager mode, and perhaps some of what is due in deferred mode.
    fn push(&self, state: &mut State, stream: *mut c_void, item: Item) -> Result<()> {
        state.queue(stream)?.push_back(item);
        if self.deferred {
            state.run_ahead()
        } else {
            state.run_all()
        }
        Ok(())
    }
}

/// What an event was recorded as: set once the work before the record is done.
type Completion = Arc<OnceLock<Instant>>;

enum Item {
    Run(Task),
    Record(Completion),
    Wait(Completion),
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    /// Destroyed by its owner; goes away once it is empty.
    closed: bool,
}

struct State {
    next_handle: usize,
    /// Streams by handle. Handle 0, the null stream, always exists.
    streams: BTreeMap<usize, Queue>,
    /// Events by handle: their latest record, if any.
    events: BTreeMap<usize, Option<Completion>>,
    random: SplitMix64,
    temper: Temper,
}

/// How a deferred device treats the streams nobody waits for. Fixed by the seed.
#[derive(Clone, Copy)]
enum Temper {
    /// They starve: only what is waited for runs.
    Lazy,
    /// They run first, ahead of what is waited for.
    Hasty,
    /// One of the above, or a fair draw, decided anew at every wait.
    Mixed,
}

impl State {
    fn new(seed: u64) -> Self {
        let temper = match seed % 4 {
            0 => Temper::Lazy,
            1 => Temper::Hasty,
            _ => Temper::Mixed,
        };
        Self {
            next_handle: 1,
            streams: BTreeMap::from([(0, Queue::default())]),
            events: BTreeMap::new(),
            random: SplitMix64(seed),
            temper,
        }
    }

    fn handle(&mut self) -> usize {
        let handle = self.next_handle;
        self.next_handle += 1;
        handle
    }

    fn queue(&mut self, stream: *mut c_void) -> Result<&mut VecDeque<Item>> {
        match self.streams.get_mut(&stream.addr()) {
            Some(queue) if !queue.closed => Ok(&mut queue.items),
            _ => Err(Error::invalid("stream", "the handle is no stream of this CPU device")),
        }
    }

    fn event(&mut self, event: *mut c_void) -> Result<&mut Option<Completion>> {
        self.events
            .get_mut(&event.addr())
            .ok_or_else(|| Error::invalid("event", "the handle is no event of this CPU device"))
    }

    fn is_idle(&self, stream: usize) -> bool {
        self.streams.get(&stream).is_none_or(|queue| queue.items.is_empty())
    }

    /// Streams whose next task may run now: not behind the record of an event they wait for.
    fn runnable(&self) -> Vec<usize> {
        let ready = |queue: &Queue| match queue.items.front() {
            None => false,
            Some(Item::Wait(completion)) => completion.get().is_some(),
            Some(_) => true,
        };
        self.streams.iter().filter(|(_, queue)| ready(queue)).map(|(&id, _)| id).collect()
    }

    /// The stream whose next task brings `stream` forward: itself, or what it waits for, transitively.
    fn needed_by(&self, mut stream: usize) -> usize {
        while let Some(Item::Wait(completion)) =
            self.streams.get(&stream).and_then(|queue| queue.items.front())
        {
            match self.recorder(completion) {
                Some(other) if completion.get().is_none() => stream = other,
                _ => break,
            }
        }
        stream
    }

    /// The stream that still has to record `completion`.
    fn recorder(&self, completion: &Completion) -> Option<usize> {
        let records =
            |item: &Item| matches!(item, Item::Record(other) if Arc::ptr_eq(other, completion));
        self.streams.iter().find(|(_, queue)| queue.items.iter().any(records)).map(|(&id, _)| id)
    }

    /// Runs the next task of a stream.
    fn step(&mut self, stream: usize) {
        let Some(queue) = self.streams.get_mut(&stream) else { return };
        match queue.items.pop_front() {
            Some(Item::Run(task)) => task(),
            Some(Item::Record(completion)) => {
                let _ = completion.set(Instant::now());
            }
            Some(Item::Wait(_)) | None => {}
        }
        if self.streams.get(&stream).is_some_and(|q| q.closed && q.items.is_empty()) {
            self.streams.remove(&stream);
        }
    }

    /// Runs one task of a stream drawn from those that can.
    fn step_any(&mut self) -> bool {
        let runnable = self.runnable();
        if runnable.is_empty() {
            return false;
        }
        let stream = runnable[self.random.below(runnable.len())];
        self.step(stream);
        true
    }

    fn run_all(&mut self) {
        while self.step_any() {}
    }

    /// Runs a few tasks, or none: a GPU starts work while the host is still submitting.
    fn run_ahead(&mut self) {
        let steps = match self.temper {
            Temper::Lazy => 0,
            Temper::Hasty => usize::MAX,
            Temper::Mixed => self.random.below(6).saturating_sub(3),
        };
        for _ in 0..steps {
            if !self.step_any() {
                break;
            }
        }
    }

    /// Runs tasks until `stream` has none left that `done` still asks for.
    fn run_until(&mut self, stream: usize, done: impl Fn(&Self) -> bool) {
        let temper = match (self.temper, self.random.below(3)) {
            (Temper::Mixed, 0) => Temper::Lazy,
            (Temper::Mixed, 1) => Temper::Hasty,
            (temper, _) => temper,
        };
        while !done(self) {
            let needed = self.needed_by(stream);
            let runnable = self.runnable();
            let others: Vec<usize> = runnable.iter().copied().filter(|&id| id != needed).collect();
            let chosen = match temper {
                Temper::Lazy => needed,
                Temper::Hasty if !others.is_empty() => others[self.random.below(others.len())],
                Temper::Hasty => needed,
                Temper::Mixed if !runnable.is_empty() => {
                    runnable[self.random.below(runnable.len())]
                }
                Temper::Mixed => needed,
            };
            self.step(chosen);
        }
    }
}

/// Steele, Lea and Flood's SplitMix64.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

fn layout(bytes: usize, align: usize, kind: &'static str) -> Result<Layout> {
    Layout::from_size_align(bytes, align).map_err(|_| out_of_memory(kind, bytes))
}

fn out_of_memory(kind: &'static str, bytes: usize) -> Error {
    Error::new(
        "alloc",
        ErrorKind::OutOfMemory {
            kind,
            requested: bytes as u64,
            reason: "the host allocator refused".into(),
        },
    )
}

fn free(address: u64, bytes: usize, align: usize) {
    if let Ok(layout) = Layout::from_size_align(bytes, align) {
        // SAFETY: the caller's promise: the address and size of one live allocation of this alignment.
        unsafe { dealloc(address as *mut u8, layout) }
    }
}

// SAFETY: handles are keys of the maps in `State`, never dereferenced; memory comes from the global
// allocator and is released with the layout it was made with; tasks run in the order the trait promises.
unsafe impl Backend for CpuDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        let layout = layout(bytes, DEVICE_ALIGN, "device")?;
        // SAFETY: callers never ask for zero bytes (`Device::alloc` answers those itself).
        let pointer = unsafe { alloc(layout) };
        if pointer.is_null() {
            return Err(out_of_memory("device", bytes));
        }
        // SAFETY: the allocation is `bytes` long.
        unsafe { pointer.write_bytes(POISON, bytes) };
        Ok(pointer as u64)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        self.state().run_all();
        free(address, bytes, DEVICE_ALIGN);
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<u64> {
        let layout = layout(bytes, PINNED_ALIGN, "pinned host")?;
        // SAFETY: callers never ask for zero bytes (`Device::alloc_pinned` answers those itself).
        let pointer = unsafe { alloc_zeroed(layout) };
        if pointer.is_null() {
            return Err(out_of_memory("pinned host", bytes));
        }
        Ok(pointer as u64)
    }

    unsafe fn free_pinned(&self, address: u64, bytes: usize) {
        self.state().run_all();
        free(address, bytes, PINNED_ALIGN);
    }

    fn synchronize(&self) -> Result<()> {
        self.state().run_all();
        Ok(())
    }

    fn stream_create(&self) -> Result<*mut c_void> {
        let mut state = self.state();
        let handle = state.handle();
        state.streams.insert(handle, Queue::default());
        Ok(std::ptr::without_provenance_mut(handle))
    }

    unsafe fn stream_destroy(&self, stream: *mut c_void) {
        let mut state = self.state();
        let handle = stream.addr();
        if state.is_idle(handle) {
            state.streams.remove(&handle);
        } else if let Some(queue) = state.streams.get_mut(&handle) {
            queue.closed = true;
        }
    }

    unsafe fn stream_synchronize(&self, stream: *mut c_void) -> Result<()> {
        let mut state = self.state();
        state.queue(stream)?;
        let handle = stream.addr();
        state.run_until(handle, |state| state.is_idle(handle));
        Ok(())
    }

    fn event_create(&self, _timed: bool) -> Result<*mut c_void> {
        let mut state = self.state();
        let handle = state.handle();
        state.events.insert(handle, None);
        Ok(std::ptr::without_provenance_mut(handle))
    }

    unsafe fn event_destroy(&self, event: *mut c_void) {
        self.state().events.remove(&event.addr());
    }

    unsafe fn event_record(&self, event: *mut c_void, stream: *mut c_void) -> Result<()> {
        let completion = Completion::default();
        let mut state = self.state();
        state.queue(stream)?;
        *state.event(event)? = Some(completion.clone());
        self.push(&mut state, stream, Item::Record(completion))
    }

    unsafe fn event_is_complete(&self, event: *mut c_void) -> Result<bool> {
        let mut state = self.state();
        let Some(completion) = state.event(event)?.clone() else { return Ok(true) };
        // Polling must end: every query lets the device do something.
        for _ in 0..=state.random.below(3) {
            state.step_any();
        }
        Ok(completion.get().is_some())
    }

    unsafe fn event_synchronize(&self, event: *mut c_void) -> Result<()> {
        let mut state = self.state();
        let Some(completion) = state.event(event)?.clone() else { return Ok(()) };
        if let Some(stream) = state.recorder(&completion) {
            state.run_until(stream, |_| completion.get().is_some());
        }
        Ok(())
    }

    unsafe fn event_elapsed_ms(&self, start: *mut c_void, end: *mut c_void) -> Result<f32> {
        let mut state = self.state();
        let mut time = |event| -> Result<Instant> {
            let completion = state.event(event)?.clone();
            completion.and_then(|c| c.get().copied()).ok_or_else(|| {
                Error::invalid("event", "elapsed time of an event that is not complete")
            })
        };
        let (start, end) = (time(start)?, time(end)?);
        Ok(end.saturating_duration_since(start).as_secs_f32() * 1e3)
    }

    unsafe fn stream_wait_event(&self, stream: *mut c_void, event: *mut c_void) -> Result<()> {
        let mut state = self.state();
        match state.event(event)?.clone() {
            Some(completion) => self.push(&mut state, stream, Item::Wait(completion)),
            None => Ok(()),
        }
    }

    unsafe fn copy(&self, region: CopyRegion, stream: *mut c_void) -> Result<()> {
        let CopyRegion { src, dst, bytes } = region;
        let task = move || {
            // SAFETY: the caller's promise: both ranges are valid now and do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst as *mut u8, bytes) }
        };
        self.push(&mut self.state(), stream, Item::Run(Box::new(task)))
    }

    unsafe fn copy_batch(&self, batch: &CopyBatch<'_>, stream: *mut c_void) -> Result<()> {
        batch.iter().try_for_each(|(src, dst, bytes)| {
            // SAFETY: the caller's promise.
            unsafe { self.copy(CopyRegion { src, dst, bytes }, stream) }
        })
    }

    unsafe fn copy_pitched(&self, copy: &PitchedCopy, stream: *mut c_void) -> Result<()> {
        (0..copy.rows).try_for_each(|row| {
            let src = copy.src + (row * copy.src_pitch) as u64;
            let dst = copy.dst + (row * copy.dst_pitch) as u64;
            // SAFETY: the caller's promise.
            unsafe { self.copy(CopyRegion { src, dst, bytes: copy.row_bytes }, stream) }
        })
    }

    unsafe fn fill(&self, address: u64, byte: u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        // SAFETY: the caller's promise: the range is valid now.
        let task = move || unsafe { (address as *mut u8).write_bytes(byte, bytes) };
        self.push(&mut self.state(), stream, Item::Run(Box::new(task)))
    }

    unsafe fn submit(&self, task: Task, stream: *mut c_void) -> Result<()> {
        self.push(&mut self.state(), stream, Item::Run(task))
    }
}
