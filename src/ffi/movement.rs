//! Moves of blocks between layouts, planned from what the paths cost, in the C ABI.

use std::ffi::c_void;
use std::sync::Arc;

use super::header::*;
use super::raw::{Arguments, arguments, array, array_mut, hand_out, handle, out, take_back};
use super::{guard, hkv_kernels};
use crate::abi::hkv_copy;
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::movement::{
    BlockLayout, BlockMove, BlockPart, BlockRows, Layers, LinkModel, Mover, Traffic, Way,
};
use crate::ops::MoveShape;

/// A move between two layouts, and its table on the device.
pub(super) struct hkv_block_move {
    between: BlockMove,
    shape: MoveShape,
    _offsets: Option<DeviceBuffer>,
}

/// What the paths cost.
struct hkv_link_model {
    model: Arc<LinkModel>,
}

/// A mover, and where it moves.
struct hkv_mover {
    mover: Mover,
    device: Device,
}

// SAFETY: `struct_bytes` is the first field.
unsafe impl Arguments for hkv_block_move_args {}
// SAFETY: as above.
unsafe impl Arguments for hkv_submit_args {}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_block_layout_fill(
    order: u32,
    layout: *mut hkv_block_layout,
) -> hkv_status {
    const OP: &str = "hkv_block_layout_fill";
    // SAFETY: the caller's promise: `layout` is null or can be written.
    guard(|| unsafe {
        let layout = out(OP, "layout", layout)?;
        let rows = layout.rows();
        let filled = match order {
            HKV_BLOCK_FIRST_HND => BlockLayout::block_first_hnd(rows)?,
            HKV_BLOCK_FIRST_NHD => BlockLayout::block_first_nhd(rows)?,
            HKV_HEADS_OUTERMOST => BlockLayout::heads_outermost(rows)?,
            _ => {
                let supported = "the values of enum hkv_block_order";
                return Err(Error::unsupported(OP, "order", order, supported));
            }
        };
        let Layers::Stride(layer) = filled.layers else {
            return Err(Error::invalid(OP, "contiguous blocks have a stride between layers"));
        };
        *layout = hkv_block_layout {
            stride_layer: layer,
            stride_part: filled.part,
            stride_head: filled.head,
            stride_token: filled.token,
            layer_offsets: std::ptr::null(),
            ..*layout
        };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_block_move_create(
    kernels: *const hkv_kernels,
    args: *const hkv_block_move_args,
    block_move: *mut *mut hkv_block_move,
) -> hkv_status {
    const OP: &str = "hkv_block_move_create";
    // SAFETY: the caller's promise: live handles, arrays of their lengths.
    guard(|| unsafe {
        hand_out(block_move, || {
            let kernels = &handle(OP, "kernels", kernels)?.kernels;
            let args = arguments(OP, args)?;
            let range = |first: u32, count: u32| match first.checked_add(count) {
                Some(end) => Ok(first..end),
                None => Err(Error::invalid(OP, format!("{count} from {first} on overflow"))),
            };
            let part = BlockPart {
                layers: range(args.first_layer, args.num_layers)?,
                tokens: range(args.first_token, args.num_tokens)?,
            };
            let (src, dst) = (args.src.to_ops(OP)?, args.dst.to_ops(OP)?);
            let between = BlockMove::between(&src, &dst, &part)?;
            let (shape, _offsets) = between.on(kernels.device())?;
            Ok(hkv_block_move { between, shape, _offsets })
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_block_move_destroy(block_move: *mut hkv_block_move) {
    // SAFETY: the caller's promise.
    unsafe { take_back(block_move) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_block_move_copies(
    block_move: *const hkv_block_move,
    src: *const u64,
    dst: *const u64,
    count: u64,
    copies: *mut hkv_copy,
) -> hkv_status {
    const OP: &str = "hkv_block_move_copies";
    // SAFETY: the caller's promise: a live handle, arrays of their lengths.
    guard(|| unsafe {
        let between = &handle(OP, "move", block_move)?.between;
        let (src, dst) = (array(OP, "src", src, count)?, array(OP, "dst", dst, count)?);
        let copies = array_mut(OP, "copies", copies, count)?;
        for ((copy, &src), &dst) in copies.iter_mut().zip(src).zip(dst) {
            *copy = between.block(src, dst);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_link_model_calibrate(
    kernels: *const hkv_kernels,
    model: *mut *mut hkv_link_model,
) -> hkv_status {
    // SAFETY: the caller's promise: a live handle.
    guard(|| unsafe {
        hand_out(model, || {
            let kernels = &handle("hkv_link_model_calibrate", "kernels", kernels)?.kernels;
            Ok(hkv_link_model { model: Arc::new(LinkModel::calibrate(kernels)?) })
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_link_model_destroy(model: *mut hkv_link_model) {
    // SAFETY: the caller's promise.
    unsafe { take_back(model) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_link_model_quota(
    model: *const hkv_link_model,
    way: u32,
    both_ways: u32,
    rows: u64,
    bytes: u64,
    ctas: *mut u32,
) -> hkv_status {
    const OP: &str = "hkv_link_model_quota";
    // SAFETY: the caller's promise: a live handle, `ctas` is null or can be written.
    guard(|| unsafe {
        let model = &handle(OP, "model", model)?.model;
        *out(OP, "ctas", ctas)? = model.quota(traffic(OP, way, both_ways)?, rows, bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_mover_create(
    kernels: *const hkv_kernels,
    model: *const hkv_link_model,
    num_copies: u64,
    staging: u32,
    mover: *mut *mut hkv_mover,
) -> hkv_status {
    const OP: &str = "hkv_mover_create";
    // SAFETY: the caller's promise: live handles.
    guard(|| unsafe {
        hand_out(mover, || {
            let kernels = &handle(OP, "kernels", kernels)?.kernels;
            let model = &handle(OP, "model", model)?.model;
            if num_copies > MAX_COPIES {
                let supported = format!("at most {MAX_COPIES}");
                return Err(Error::unsupported(OP, "num_copies", num_copies, supported));
            }
            let mover = Mover::new(kernels, model, num_copies as usize);
            let mover = if staging == 0 { mover } else { mover.with_staging()? };
            Ok(hkv_mover { mover, device: kernels.device().clone() })
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_mover_destroy(mover: *mut hkv_mover) {
    // SAFETY: the caller's promise.
    unsafe { take_back(mover) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_mover_submit(
    mover: *mut hkv_mover,
    args: *const hkv_submit_args,
    stream: *mut c_void,
) -> hkv_status {
    const OP: &str = "hkv_mover_submit";
    // SAFETY: the caller's promise: live handles that nobody else uses, memory that is valid, and the table its own,
    // until the stream has passed.
    guard(|| unsafe {
        let hkv_mover { mover, device } = out(OP, "mover", mover)?;
        let args = arguments(OP, args)?;
        let shape = shape(args.blocks);
        let traffic = traffic(OP, args.way, args.both_ways)?;
        let count = usize::try_from(args.num_copies)
            .map_err(|_| Error::invalid(OP, "the descriptor table is larger than memory"))?;
        mover.submit(args.copies.to_ops(), count, &shape, traffic, device.foreign_stream(stream))
    })
}

/// Most descriptors of a move, as of one launch.
const MAX_COPIES: u64 = 1 << 30;

/// What descriptors stand for.
///
/// # Safety
/// `blocks` is null or a live handle.
pub(super) unsafe fn shape(blocks: *const hkv_block_move) -> MoveShape {
    // SAFETY: the caller's promise.
    unsafe { blocks.as_ref() }.map_or(MoveShape::FRAGMENTS, |blocks| blocks.shape)
}

fn traffic(op: &'static str, way: u32, both_ways: u32) -> Result<Traffic> {
    let way = match way {
        HKV_HOST_TO_DEVICE => Way::HostToDevice,
        HKV_DEVICE_TO_HOST => Way::DeviceToHost,
        HKV_INSIDE_DEVICE => Way::Inside,
        _ => return Err(Error::unsupported(op, "way", way, "the values of enum hkv_way")),
    };
    Ok(Traffic { way, both_ways: both_ways != 0 })
}

impl hkv_block_layout {
    fn rows(&self) -> BlockRows {
        BlockRows {
            layers: self.num_layers,
            parts: self.num_parts,
            heads: self.num_kv_heads,
            tokens: self.block_size,
            row_bytes: self.row_bytes,
        }
    }

    /// # Safety
    /// `layer_offsets` is null, or an array of as many as there are layers.
    unsafe fn to_ops(self, op: &'static str) -> Result<BlockLayout> {
        let layers = if self.layer_offsets.is_null() {
            Layers::Stride(self.stride_layer)
        } else {
            let count = self.num_layers.into();
            // SAFETY: the caller's promise.
            let offsets = unsafe { array(op, "layer_offsets", self.layer_offsets, count)? };
            Layers::Offsets(offsets.to_vec())
        };
        Ok(BlockLayout {
            rows: self.rows(),
            layers,
            part: self.stride_part,
            head: self.stride_head,
            token: self.stride_token,
        })
    }
}
