//! Streams, events, and the copies that streams carry.

use std::ffi::c_void;

use super::Device;
use crate::error::{Error, Result};

/// Direction-free copy between any two addresses of a device's address space (device or pinned host).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyRegion {
    /// Source address.
    pub src: u64,
    /// Destination address.
    pub dst: u64,
    /// Bytes to copy.
    pub bytes: usize,
}

/// Fragments that are copied in any order: `sizes[i]` bytes from `srcs[i]` to `dsts[i]`. The slices are equally long,
/// and no fragment crosses one of [`Device::pinned_edges`].
#[derive(Debug, Clone, Copy)]
pub struct CopyBatch<'a> {
    /// Source addresses.
    pub srcs: &'a [u64],
    /// Destination addresses.
    pub dsts: &'a [u64],
    /// Bytes.
    pub sizes: &'a [usize],
}

impl CopyBatch<'_> {
    /// How many fragments there are.
    pub fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sizes.is_empty()
    }

    /// Source, destination and size of every fragment.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, usize)> + '_ {
        let places = self.srcs.iter().zip(self.dsts);
        places.zip(self.sizes).map(|((&src, &dst), &bytes)| (src, dst, bytes))
    }
}

/// Rows at a fixed distance on each side; neither side crosses one of [`Device::pinned_edges`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PitchedCopy {
    /// Address of the first row at the source.
    pub src: u64,
    /// Address of the first row at the destination.
    pub dst: u64,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// How many rows.
    pub rows: usize,
    /// Bytes from one row to the next at the source: `row_bytes` or more, below 2^31.
    pub src_pitch: usize,
    /// The same at the destination.
    pub dst_pitch: usize,
}

// SAFETY: the raw handles inside are usable from any thread (the CUDA driver API is thread safe).
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}
// SAFETY: as above.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

/// An owned stream.
pub struct Stream {
    pub(super) raw: *mut c_void,
    pub(super) device: Device,
}

impl Stream {
    /// A borrow of the stream to submit work to.
    pub fn as_ref(&self) -> StreamRef<'_> {
        StreamRef { raw: self.raw, device: &self.device }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the handle came from `stream_create` and is dropped once.
        unsafe { self.device.backend.stream_destroy(self.raw) }
    }
}

/// A stream to submit work to, owned by somebody else.
#[derive(Clone, Copy)]
pub struct StreamRef<'a> {
    pub(super) raw: *mut c_void,
    pub(super) device: &'a Device,
}

impl<'a> StreamRef<'a> {
    /// The raw handle (`CUstream` on CUDA).
    pub fn raw(&self) -> *mut c_void {
        self.raw
    }

    /// The device of the stream.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// Blocks until all work of the stream is done.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is live while it is borrowed.
        unsafe { self.device.backend.stream_synchronize(self.raw) }
    }

    /// Makes later work of this stream wait for the event; for nothing when it was never recorded.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.check_same("wait", &event.device)?;
        // SAFETY: both are live while they are borrowed.
        unsafe { self.device.backend.stream_wait_event(self.raw, event.raw) }
    }

    /// Records the event behind the work submitted so far.
    pub fn record(&self, event: &Event) -> Result<()> {
        self.check_same("record", &event.device)?;
        // SAFETY: both are live while they are borrowed.
        unsafe { self.device.backend.event_record(event.raw, self.raw) }
    }

    /// Refuses objects of another device, which would be handles without a meaning here.
    pub(crate) fn check_same(&self, op: &'static str, device: &Device) -> Result<()> {
        if self.device.is_same(device) {
            return Ok(());
        }
        Err(Error::invalid(
            op,
            format!(
                "the stream belongs to {}, the object to another device, {}",
                self.device.info().name,
                device.info().name
            ),
        ))
    }

    /// Copies `bytes` from `src` to `dst` in stream order; device or pinned host on either side.
    ///
    /// # Safety
    /// The ranges do not overlap. Until the stream has passed the copy both are valid, nothing writes
    /// the source, and nothing reads or writes the destination.
    pub unsafe fn copy(&self, src: u64, dst: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: passed on from the caller.
        unsafe { self.device.backend.copy(CopyRegion { src, dst, bytes }, self.raw) }
    }

    /// Copies many fragments in stream order.
    ///
    /// # Errors
    /// `InvalidArgument` for slices of unequal lengths; the driver's own.
    ///
    /// # Safety
    /// As for [`Self::copy`], for every fragment; the destinations overlap nothing else of the batch.
    pub unsafe fn copy_batch(&self, batch: &CopyBatch<'_>) -> Result<()> {
        let lengths = [batch.srcs.len(), batch.dsts.len(), batch.sizes.len()];
        if lengths != [batch.len(); 3] {
            return Err(Error::invalid(
                "copy_batch",
                format!("{lengths:?} sources, destinations and sizes: as many of each are needed"),
            ));
        }
        // SAFETY: passed on from the caller.
        unsafe { self.device.backend.copy_batch(batch, self.raw) }
    }

    /// Copies rows at a fixed distance, in stream order.
    ///
    /// # Safety
    /// As for [`Self::copy`], for every row.
    pub unsafe fn copy_pitched(&self, copy: &PitchedCopy) -> Result<()> {
        // SAFETY: passed on from the caller.
        unsafe { self.device.backend.copy_pitched(copy, self.raw) }
    }

    /// Fills `bytes` bytes from `address` on with `byte`, in stream order.
    ///
    /// # Safety
    /// Until the stream has passed the fill the range is valid and nothing reads or writes it.
    pub unsafe fn fill(&self, address: u64, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: passed on from the caller.
        unsafe { self.device.backend.fill(address, byte, bytes, self.raw) }
    }
}

/// An owned event.
pub struct Event {
    pub(super) raw: *mut c_void,
    pub(super) device: Device,
}

impl Event {
    /// Whether the work before the last record is done; true when it was never recorded.
    pub fn is_complete(&self) -> Result<bool> {
        // SAFETY: the event is live.
        unsafe { self.device.backend.event_is_complete(self.raw) }
    }

    /// Blocks the calling thread until the event is complete.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the event is live.
        unsafe { self.device.backend.event_synchronize(self.raw) }
    }

    /// Milliseconds from `start` to this event. Both were made by [`Device::timed_event`], recorded
    /// and are complete.
    pub fn elapsed_ms_since(&self, start: &Event) -> Result<f32> {
        if !self.device.is_same(&start.device) {
            return Err(Error::invalid("event", "elapsed time between events of two devices"));
        }
        // SAFETY: both events are live; the driver refuses untimed or unrecorded ones.
        unsafe { self.device.backend.event_elapsed_ms(start.raw, self.raw) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle came from `event_create` and is dropped once.
        unsafe { self.device.backend.event_destroy(self.raw) }
    }
}
