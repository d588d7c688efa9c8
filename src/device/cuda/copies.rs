//! Copies by the copy engines that one driver call describes many of: batches of fragments, and rows at a pitch.

use std::ffi::{c_uint, c_void};

use cudarc::driver::sys;

use super::CudaDevice;
use super::driver::{BatchCopy, Failure};
use crate::device::{CopyBatch, PitchedCopy};
use crate::error::{Error, Result};

impl CudaDevice {
    /// # Safety
    /// As for [`Backend::copy_batch`](crate::device::Backend::copy_batch).
    pub(super) unsafe fn copy_many(
        &self,
        batch: &CopyBatch<'_>,
        stream: *mut c_void,
    ) -> Result<()> {
        let _current = self.make_current()?;
        // The driver takes no batches on the legacy default stream.
        let call = self.driver.memcpy_batch.filter(|_| !stream.is_null());
        let Some(call) = call else {
            for (src, dst, bytes) in batch.iter() {
                // SAFETY: the caller's promise.
                unsafe { self.driver.memcpy_async(dst, src, bytes, stream.cast())? };
            }
            return Ok(());
        };
        if batch.is_empty() {
            return Ok(());
        }
        let place = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID,
            id: 0,
        };
        let mut attributes = sys::CUmemcpyAttributes {
            // The order of the stream: what a copy waits for may be what writes its source.
            srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: place,
            dstLocHint: place,
            flags: 0,
        };
        let (dsts, srcs) = (batch.dsts.as_ptr().cast_mut(), batch.srcs.as_ptr().cast_mut());
        let sizes = batch.sizes.as_ptr().cast_mut();
        let (mut first, mut failed) = (0, 0);
        // SAFETY: the arrays have as many entries as the batch, which the driver only reads; the rest is the
        // caller's promise.
        let code: c_uint = unsafe {
            match call {
                BatchCopy::Cuda13(copy) => copy(
                    dsts,
                    srcs,
                    sizes,
                    batch.len(),
                    &mut attributes,
                    &mut first,
                    1,
                    stream.cast(),
                ),
                BatchCopy::Cuda12(copy) => copy(
                    dsts,
                    srcs,
                    sizes,
                    batch.len(),
                    &mut attributes,
                    &mut first,
                    1,
                    &mut failed,
                    stream.cast(),
                ),
            }
        };
        match code {
            0 => Ok(()),
            code => Err(Error::from(Failure { call: "cuMemcpyBatchAsync", code })),
        }
    }

    /// # Safety
    /// As for [`Backend::copy_pitched`](crate::device::Backend::copy_pitched).
    pub(super) unsafe fn copy_rows(&self, copy: &PitchedCopy, stream: *mut c_void) -> Result<()> {
        let _current = self.make_current()?;
        let unified = sys::CUmemorytype::CU_MEMORYTYPE_UNIFIED;
        let call = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: unified,
            srcHost: std::ptr::null(),
            srcDevice: copy.src,
            srcArray: std::ptr::null_mut(),
            srcPitch: copy.src_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: unified,
            dstHost: std::ptr::null_mut(),
            dstDevice: copy.dst,
            dstArray: std::ptr::null_mut(),
            dstPitch: copy.dst_pitch,
            WidthInBytes: copy.row_bytes,
            Height: copy.rows,
        };
        // SAFETY: the structure is live during the call; the rest is the caller's promise.
        Ok(unsafe { self.driver.memcpy_2d_async(&call, stream.cast()) }?)
    }
}
