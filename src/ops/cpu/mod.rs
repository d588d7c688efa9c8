//! The operations on the CPU device, from the parameter blocks of the kernels, on host addresses.

mod attention;

pub(crate) use attention::{KvFormat, attention, read_blocks};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::plan::{Lengths, work_list};
use crate::abi;
use crate::e4m3;
use crate::layout::Dtype;
use crate::reference::{self, State};

/// Writes new K and V into their slots.
///
/// # Safety
/// Every address in `p` is valid for what abi/params.h says that the kernel reads or writes there.
pub(crate) unsafe fn append(p: &abi::hkv_append_params) {
    // SAFETY: the caller vouches for every address in `p`; the offsets follow abi/params.h.
    unsafe {
        let window = &*p.windows.offset(p.layer as isize);
        let slots = p.slot_mapping.offset(window.group as isize * p.num_tokens as isize);
        let (new_dtype, kv_dtype) = (dtype_of(p.new_dtype), dtype_of(p.kv_dtype));
        let element = kv_dtype.bytes() as isize;
        let bytes = (p.head_dim as isize * element) as usize;
        let mut row = vec![0.0; p.head_dim as usize];
        for token in 0..p.num_tokens as i64 {
            let slot = *slots.offset(token as isize);
            if slot < 0 {
                continue;
            }
            let (block, offset) = (slot >> p.block_shift, slot & ((1 << p.block_shift) - 1));
            for head in 0..p.num_kv_heads as i64 {
                let from = token * p.new_stride_token + head * p.new_stride_head;
                let to = block * p.kv_stride_block
                    + window.layer_slot as i64 * p.kv_stride_layer
                    + head * p.kv_stride_head
                    + offset * p.kv_stride_token;
                if kv_dtype == Dtype::E4m3 {
                    let scale = block * p.scale_stride_block
                        + window.layer_slot as i64 * p.scale_stride_layer
                        + head * p.scale_stride_head
                        + offset * p.scale_stride_token;
                    for (source, target, scales) in
                        [(p.k_new, p.k, p.k_scale), (p.v_new, p.v, p.v_scale)]
                    {
                        load(source.cast(), new_dtype, from, &mut row);
                        let target = target.cast::<u8>().offset(to as isize);
                        let target = std::slice::from_raw_parts_mut(target, row.len());
                        let scale = &mut *scales.offset(scale as isize);
                        quantise(&row, target, scale, p.scale_stride_token != 0);
                    }
                    continue;
                }
                for (source, target) in [(p.k_new, p.k), (p.v_new, p.v)] {
                    std::ptr::copy_nonoverlapping(
                        source.cast::<u8>().offset(from as isize * element),
                        target.cast::<u8>().offset(to as isize * element),
                        bytes,
                    );
                }
            }
        }
    }
}

/// One row to e4m3. The scale is read, or computed and written.
fn quantise(row: &[f64], target: &mut [u8], scale: &mut f32, compute: bool) {
    let row: Vec<f32> = row.iter().map(|&x| x as f32).collect();
    if compute {
        *scale = e4m3::row_scale(&row);
    }
    e4m3::quantise(&row, *scale, target);
}

/// Makes the work lists of `classes` classes.
///
/// # Safety
/// Every address in `p` is valid for what abi/params.h says that the kernel reads or writes there.
pub(crate) unsafe fn plan(p: &abi::hkv_plan_params, classes: usize) {
    // SAFETY: the caller vouches for every address in `p`; the offsets follow abi/params.h.
    unsafe {
        let batch: Vec<Lengths> = (0..p.num_seqs as isize)
            .map(|seq| Lengths {
                q_len: i64::from(*p.qo_indptr.offset(seq + 1))
                    - i64::from(*p.qo_indptr.offset(seq)),
                kv_len: (*p.kv_len.offset(seq)).into(),
            })
            .collect();
        for class in &p.classes[..classes] {
            let window = &*p.windows.offset(class.layer as isize);
            let list = work_list(class, window, &batch);
            std::ptr::copy_nonoverlapping(list.as_ptr(), class.parts, list.len());
            let cut = list.iter().filter(|part| part.count > 1).count();
            class.arrivals.write_bytes(0, cut * class.num_kv_heads as usize);
        }
    }
}

/// Merges partial states of the same rows.
///
/// # Safety
/// Every address in `p` is valid for what abi/params.h says that the kernel reads or writes there.
pub(crate) unsafe fn merge_states(p: &abi::hkv_merge_params) {
    let (heads, dim) = (p.num_qo_heads as i64, p.head_dim as usize);
    let rows = i64::from(p.num_tokens) * heads;
    let live_rows = if p.live_tokens.is_null() {
        rows
    } else {
        // SAFETY: the caller vouches for the address.
        rows.min(i64::from(unsafe { *p.live_tokens }) * heads)
    };
    let (in_dtype, out_dtype) = (dtype_of(p.in_dtype), dtype_of(p.out_dtype));
    for row in 0..live_rows {
        let (token, head) = (row / heads, row % heads);
        // SAFETY: the caller vouches for every address in `p`; the offsets follow abi/params.h.
        unsafe {
            let states: Vec<State> = (0..p.num_states as i64)
                .map(|state| {
                    let index = state * rows + row;
                    let mut out = vec![0.0; dim];
                    load(p.states.cast(), in_dtype, index * dim as i64, &mut out);
                    State { out, lse: (*p.state_lse.offset(index as isize)).into() }
                })
                .collect();
            let sink = optional(p.sink_logits, head);
            let merged = reference::merge(dim, &states, sink);
            let to = token * p.out_stride_token + head * p.out_stride_head;
            store(p.out.cast(), out_dtype, to, &merged.out);
            if !p.lse.is_null() {
                *p.lse.offset(row as isize) = merged.lse as f32;
            }
        }
    }
}

/// Copies the fragments or blocks of a descriptor table.
///
/// # Safety
/// `p` names readable tables, and every row that its descriptors stand for is valid, non-overlapping memory.
pub(crate) unsafe fn move_blocks(p: &abi::hkv_move_params) {
    let dims = p.num_dims as usize;
    let rows: i64 = p.counts[..dims].iter().map(|&count| i64::from(count)).product();
    // SAFETY: the caller vouches for the tables and for the rows.
    unsafe {
        for index in 0..p.num_copies {
            let copy = &*p.copies.offset(index as isize);
            for row in 0..rows {
                let (mut src, mut dst, mut above) = (0, 0, row);
                for d in (0..dims).rev() {
                    let step = above % i64::from(p.counts[d]);
                    above /= i64::from(p.counts[d]);
                    let offset = |table: *const i64, strides: &[i64]| match d {
                        0 if !table.is_null() => *table.offset(step as isize),
                        _ => step * strides[d],
                    };
                    src += offset(p.src_offsets, &p.src_strides);
                    dst += offset(p.dst_offsets, &p.dst_strides);
                }
                std::ptr::copy_nonoverlapping(
                    copy.src.cast::<u8>().offset(src as isize),
                    copy.dst.cast::<u8>().offset(dst as isize),
                    copy.bytes as usize,
                );
            }
        }
    }
}

/// Adds the words of a range to a checksum.
///
/// # Safety
/// Both addresses in `p` are valid for what abi/params.h says.
pub(crate) unsafe fn read_memory(p: &abi::hkv_read_params) {
    // SAFETY: the caller vouches for the range and the checksum.
    unsafe {
        let words = std::slice::from_raw_parts(p.data.cast::<u32>(), p.bytes as usize / 4);
        add_words(p.checksum, words);
    }
}

/// # Safety
/// The checksum is writable.
unsafe fn add_words(checksum: *mut u32, words: &[u32]) {
    let sum = words.iter().fold(0u32, |sum, &word| sum.wrapping_add(word));
    // SAFETY: the caller's promise.
    unsafe { *checksum = (*checksum).wrapping_add(sum) };
}

/// Element `index` of an array that may not be there.
///
/// # Safety
/// `array` is null or has the element.
unsafe fn optional(array: *const f32, index: i64) -> Option<f64> {
    // SAFETY: passed on from the caller.
    (!array.is_null()).then(|| unsafe { *array.offset(index as isize) }.into())
}

fn dtype_of(code: i32) -> Dtype {
    match code as u32 {
        abi::HKV_DTYPE_BF16 => Dtype::Bf16,
        abi::HKV_DTYPE_F16 => Dtype::F16,
        abi::HKV_DTYPE_E4M3 => Dtype::E4m3,
        _ => Dtype::F32,
    }
}

/// Reads `out.len()` elements from `base + offset` on.
///
/// # Safety
/// They are readable and aligned.
unsafe fn load(base: *const u8, dtype: Dtype, offset: i64, out: &mut [f64]) {
    // SAFETY: passed on from the caller.
    unsafe {
        let address = base.offset(offset as isize * dtype.bytes() as isize);
        match dtype {
            Dtype::Bf16 => std::slice::from_raw_parts(address.cast::<bf16>(), out.len())
                .convert_to_f64_slice(out),
            Dtype::F16 => std::slice::from_raw_parts(address.cast::<f16>(), out.len())
                .convert_to_f64_slice(out),
            Dtype::F32 => {
                let source = std::slice::from_raw_parts(address.cast::<f32>(), out.len());
                for (o, s) in out.iter_mut().zip(source) {
                    *o = (*s).into();
                }
            }
            Dtype::E4m3 => {
                let source = std::slice::from_raw_parts(address, out.len());
                for (o, s) in out.iter_mut().zip(source) {
                    *o = e4m3::to_f32(*s).into();
                }
            }
        }
    }
}

/// Writes `values`, rounded to nearest even, from `base + offset` on.
///
/// # Safety
/// The memory is writable, aligned and nobody else's at this moment.
unsafe fn store(base: *mut u8, dtype: Dtype, offset: i64, values: &[f64]) {
    // SAFETY: passed on from the caller.
    unsafe {
        let address = base.offset(offset as isize * dtype.bytes() as isize);
        match dtype {
            Dtype::Bf16 => std::slice::from_raw_parts_mut(address.cast::<bf16>(), values.len())
                .convert_from_f64_slice(values),
            Dtype::F16 => std::slice::from_raw_parts_mut(address.cast::<f16>(), values.len())
                .convert_from_f64_slice(values),
            Dtype::F32 => {
                let target = std::slice::from_raw_parts_mut(address.cast::<f32>(), values.len());
                for (t, v) in target.iter_mut().zip(values) {
                    *t = *v as f32;
                }
            }
            Dtype::E4m3 => {
                let target = std::slice::from_raw_parts_mut(address, values.len());
                for (t, v) in target.iter_mut().zip(values) {
                    *t = e4m3::from_f32(*v as f32);
                }
            }
        }
    }
}
