//! The checking mode: what the kernels read on the device, validated on the host.
//!
//! Launchers check what the host can see. Slots, block ids, lengths and copy descriptors live in device
//! memory, where a wrong one makes a kernel read or write somewhere else without a word.
//! [`Kernels::checked`] turns a loaded set into one whose launchers first wait for the stream, download
//! those tables and validate them: for debugging and tests, since it blocks and cannot be captured. The
//! functions below do the validation, for hosts that have the tables at hand anyway.

use super::plan::{Plan, check_work_list};
use super::{AppendArgs, AttentionArgs, CodecArgs, Kernels, MoveArgs, MoveShape, SEALED_BLOCK};
use crate::abi::{self, hkv_copy, hkv_part, hkv_slot_block, hkv_window};
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};
use crate::layout::{Dtype, KvView};

/// Checks the element types of new `what` (queries, tokens) and of the keys and values they go with.
pub(super) fn dtypes(op: &'static str, what: &str, dtype: Dtype, kv: Dtype) -> Result<()> {
    if !matches!(dtype, Dtype::Bf16 | Dtype::F16) {
        return Err(Error::unsupported(op, "dtype", dtype.name(), "bf16, f16"));
    }
    if ![dtype, Dtype::E4m3].contains(&kv) {
        let supported = format!("with {0} {what} {0}, e4m3", dtype.name());
        return Err(Error::unsupported(op, "KV dtype", kv.name(), supported));
    }
    Ok(())
}

impl Kernels {
    /// The same kernels in checking mode: every launcher waits for its stream, downloads the tables that
    /// the kernel will read on the device and returns an error instead of launching on a wrong one. Launches
    /// block and cannot be captured in a CUDA graph.
    pub fn checked(mut self) -> Self {
        self.checked = true;
        self
    }
}

/// Validates the slots of new tokens, one layer group's: each negative or inside of the view's blocks, and
/// none twice.
///
/// # Errors
/// `InvalidArgument` naming the token, its slot and what would be accepted.
pub fn check_slots(slots: &[i64], kv: &KvView) -> Result<()> {
    const OP: &str = "append";
    let end = slots_of(kv)?;
    let mut written: Vec<(i64, usize)> = Vec::with_capacity(slots.len());
    for (token, &slot) in slots.iter().enumerate() {
        if slot >= end {
            return Err(Error::invalid(
                OP,
                format!(
                    "token {token} has slot {slot}, outside of the pool of {} blocks of {} tokens",
                    kv.num_blocks, kv.block_size
                ),
            ));
        }
        if slot >= 0 {
            written.push((slot, token));
        }
    }
    written.sort_unstable();
    match written.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(Error::invalid(
            OP,
            format!("tokens {} and {} have the same slot {}", pair[0].1, pair[1].1, pair[0].0),
        )),
        None => Ok(()),
    }
}

/// Validates one row of a window table against the layer groups and the view that it will be used with.
///
/// # Errors
/// `InvalidArgument` naming the field and what would be accepted.
pub fn check_window(
    op: &'static str,
    window: &hkv_window,
    num_groups: u32,
    kv: &KvView,
) -> Result<()> {
    let wrong = |what: String| Err(Error::invalid(op, format!("the window table {what}")));
    let kind = window.kind as u32;
    if ![abi::HKV_LAYER_FULL, abi::HKV_LAYER_SLIDING, abi::HKV_LAYER_CHUNKED].contains(&kind) {
        return wrong(format!("has a layer of unknown kind {}", window.kind));
    }
    if kind != abi::HKV_LAYER_FULL && window.extent <= 0 {
        return wrong(format!(
            "has a window or chunk of {} tokens, at least 1 is needed",
            window.extent
        ));
    }
    if window.sink_tokens < 0 {
        return wrong(format!("has {} sink tokens", window.sink_tokens));
    }
    if !(0..i64::from(num_groups)).contains(&i64::from(window.group)) {
        return wrong(format!("names layer group {} of {num_groups}", window.group));
    }
    if !(0..i64::from(kv.num_layer_slots)).contains(&i64::from(window.layer_slot)) {
        return wrong(format!("names layer slot {} of {}", window.layer_slot, kv.num_layer_slots));
    }
    Ok(())
}

/// The tables of an attention batch on the host: what [`AttentionArgs`] points to, for one layer.
#[derive(Debug, Clone, Copy)]
pub struct AttentionTables<'a> {
    /// `[num_seqs + 1]` first query token of every sequence, and one past the last.
    pub qo_indptr: &'a [i32],
    /// `[num_seqs]` tokens of every sequence.
    pub kv_len: &'a [i32],
    /// Block ids of all rows. A row ends where the next one starts.
    pub block_ids: &'a [i32],
    /// `[num_groups, num_seqs]` row starts.
    pub block_row: &'a [i64],
    /// `[num_groups, num_seqs]` first live blocks after the sinks; empty: all 0.
    pub first_block: &'a [i32],
    /// The layer's row of the window table.
    pub window: hkv_window,
}

/// Validates the tables of an attention batch: arrays of the right length, a sound row of the window table,
/// query ranges in order, no longer than `max_q_len` and inside of `num_tokens`, sequences no shorter than
/// their queries, block rows that hold every visible token, ids inside of the view's blocks.
///
/// # Errors
/// `InvalidArgument` naming the sequence, what it has and what would be accepted.
pub fn check_attention_tables(tables: &AttentionTables<'_>, args: &AttentionArgs) -> Result<()> {
    let wrong = |what: String| Err(Error::invalid("attention", what));
    let window = &tables.window;
    check_window("attention", window, args.tables.num_groups, &args.kv)?;
    let seqs = args.num_seqs as usize;
    let rows = seqs.saturating_mul(args.tables.num_groups as usize);
    for (name, given, needed) in [
        ("qo_indptr", tables.qo_indptr.len(), seqs + 1),
        ("kv_len", tables.kv_len.len(), seqs),
        ("block_row", tables.block_row.len(), rows),
        ("first_block", tables.first_block.len(), tables.first_block.len().min(1) * rows),
    ] {
        if given != needed {
            return wrong(format!("{name} has {given} entries, {needed} are needed"));
        }
    }
    let block_size = i64::from(args.kv.block_size.max(1));
    let sink_blocks = (i64::from(window.sink_tokens) + block_size - 1) / block_size;
    if tables.qo_indptr.first().is_some_and(|&first| first < 0) {
        return wrong(format!("qo_indptr starts at {}", tables.qo_indptr[0]));
    }
    if let Some(&last) = tables.qo_indptr.last()
        && i64::from(last) > i64::from(args.num_tokens)
    {
        return wrong(format!("qo_indptr ends at {last}, num_tokens is {}", args.num_tokens));
    }
    let mut row_starts = tables.block_row.to_vec();
    row_starts.sort_unstable();
    let first_row = window.group as usize * tables.kv_len.len();
    let rows = tables.block_row.iter().skip(first_row);
    let sequences = tables.qo_indptr.windows(2).zip(tables.kv_len).zip(rows);
    for (seq, ((queries, &kv_len), &row)) in sequences.enumerate() {
        let (q_len, kv_len) = (i64::from(queries[1]) - i64::from(queries[0]), i64::from(kv_len));
        if q_len < 0 {
            return wrong(format!(
                "qo_indptr of sequence {seq} falls from {} to {}",
                queries[0], queries[1]
            ));
        }
        if q_len > i64::from(args.max_q_len) {
            return wrong(format!(
                "sequence {seq} has {q_len} query tokens, max_q_len is {}",
                args.max_q_len
            ));
        }
        if kv_len < q_len {
            return wrong(format!("sequence {seq} has {q_len} query tokens but kv_len {kv_len}"));
        }
        if q_len == 0 {
            continue;
        }
        let first_query = kv_len - q_len;
        let extent = i64::from(window.extent);
        let first_visible = match window.kind as u32 {
            abi::HKV_LAYER_SLIDING => (first_query - extent + 1).max(0),
            abi::HKV_LAYER_CHUNKED => first_query / extent * extent,
            _ => 0,
        };
        let first_block = tables.first_block.get(first_row + seq).map_or(0, |&b| i64::from(b));
        let first_block = first_block.max(sink_blocks);
        let end = match row_starts.get(row_starts.partition_point(|&start| start <= row)) {
            Some(&next) => next.min(tables.block_ids.len() as i64),
            None => tables.block_ids.len() as i64,
        };
        let last = (kv_len - 1) / block_size;
        let windowed = first_visible / block_size..=last;
        if let Some(gone) = windowed.clone().find(|b| (sink_blocks..first_block).contains(b)) {
            return wrong(format!(
                "sequence {seq} sees block {gone}, its row has the {sink_blocks} sink blocks and those from {first_block} on"
            ));
        }
        let sinks = 0..sink_blocks.min(last + 1);
        for block in sinks.chain(windowed.skip_while(|&b| b < sink_blocks)) {
            let index = if block < sink_blocks { block } else { sink_blocks + block - first_block };
            let at = usize::try_from(row.saturating_add(index)).ok();
            match at.filter(|&at| (at as i64) < end).and_then(|at| tables.block_ids.get(at)) {
                None => {
                    return wrong(format!(
                        "the block table of sequence {seq} is ids {row} to {end}; its {kv_len} tokens need {} blocks",
                        index + 1
                    ));
                }
                Some(&id) if id >= SEALED_BLOCK => {
                    check_sealed(args, id & !SEALED_BLOCK).map_err(|what| {
                        Error::invalid(
                            "attention",
                            format!("block {block} of sequence {seq} {what}"),
                        )
                    })?;
                }
                Some(&id) if id < 0 || id as u64 >= args.kv.num_blocks => {
                    return wrong(format!(
                        "block {block} of sequence {seq} has id {id}, outside of the pool of {} blocks",
                        args.kv.num_blocks
                    ));
                }
                Some(_) => {}
            }
        }
    }
    Ok(())
}

/// Says what is wrong with a slot that a block table names.
fn check_sealed(args: &AttentionArgs, slot: i32) -> Result<(), String> {
    match &args.sealed {
        None => Err(format!("is sealed (slot {slot}), and no sealed blocks are given")),
        Some(sealed) if slot as u64 >= sealed.num_slots => {
            Err(format!("is slot {slot} of {} sealed blocks", sealed.num_slots))
        }
        Some(_) => Ok(()),
    }
}

/// Validates a copy table: sizes and addresses multiples of 16, destinations overlapping neither each other
/// nor a source, and, unless `memory` is empty, every fragment inside of one of its ranges.
///
/// # Errors
/// `InvalidArgument` naming the row and what is wrong with it.
pub fn check_copies(copies: &[hkv_copy], memory: &[Span]) -> Result<()> {
    const OP: &str = "move_blocks";
    let mut destinations = Vec::with_capacity(copies.len());
    for (row, copy) in copies.iter().enumerate() {
        let (src, dst, bytes) = (copy.src as u64, copy.dst as u64, copy.bytes);
        for (what, value) in [("source", src), ("destination", dst), ("size", bytes)] {
            if !value.is_multiple_of(16) {
                return Err(Error::invalid(
                    OP,
                    format!("copy {row} has {what} {value:#x}, no multiple of 16"),
                ));
            }
        }
        if bytes == 0 {
            continue;
        }
        for (what, address) in [("source", src), ("destination", dst)] {
            let inside = |span: &Span| {
                address >= span.address
                    && (address - span.address)
                        .checked_add(bytes)
                        .is_some_and(|end| end <= span.bytes)
            };
            if address == 0 || !memory.is_empty() && !memory.iter().any(inside) {
                return Err(Error::invalid(
                    OP,
                    format!(
                        "the {what} of copy {row}, {bytes} bytes at {address:#x}, lies outside of the memory given"
                    ),
                ));
            }
        }
        destinations.push((dst, bytes, row));
    }
    destinations.sort_unstable();
    if let Some(pair) = destinations.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
        return Err(Error::invalid(
            OP,
            format!("the destinations of copies {} and {} overlap", pair[0].2, pair[1].2),
        ));
    }
    for (row, copy) in copies.iter().enumerate().filter(|(_, copy)| copy.bytes > 0) {
        let (src, end) = (copy.src as u64, (copy.src as u64).saturating_add(copy.bytes));
        // Destinations are apart and sorted: the last one that begins before the source's end decides.
        let before = destinations.partition_point(|&(dst, _, _)| dst < end);
        if let Some(&(dst, bytes, other)) = before.checked_sub(1).and_then(|i| destinations.get(i))
            && dst + bytes > src
        {
            return Err(Error::invalid(
                OP,
                format!("the source of copy {row} overlaps the destination of copy {other}"),
            ));
        }
    }
    Ok(())
}

/// Downloads and validates what `append` will read.
///
/// # Safety
/// The spans of `args` are device memory of those lengths.
pub(super) unsafe fn append(args: &AppendArgs, stream: StreamRef<'_>) -> Result<()> {
    // SAFETY: the caller's promise; the launcher has checked the lengths of both tables.
    unsafe {
        let window = download_window(args.windows.rows, args.layer, stream)?;
        check_window("append", &window, args.num_groups, &args.kv)?;
        let first = window.group as u64 * u64::from(args.num_tokens);
        let slots: Vec<i64> =
            download(args.slot_mapping, first, u64::from(args.num_tokens), stream)?;
        check_slots(&slots, &args.kv)
    }
}

/// Downloads and validates what `attention` will read.
///
/// # Safety
/// The spans of `args` are device memory of those lengths.
pub(super) unsafe fn attention(args: &AttentionArgs, stream: StreamRef<'_>) -> Result<()> {
    let seqs = u64::from(args.num_seqs);
    let rows = u64::from(args.tables.num_groups) * seqs;
    // SAFETY: the caller's promise; the launcher has checked the lengths of the tables.
    unsafe {
        let window = download_window(args.windows.rows, args.layer, stream)?;
        let ids = args.tables.block_ids;
        let first_block = match args.tables.first_block {
            Some(span) => download(span, 0, rows, stream)?,
            None => Vec::new(),
        };
        check_attention_tables(
            &AttentionTables {
                qo_indptr: &download(args.qo_indptr, 0, seqs + 1, stream)?,
                kv_len: &download(args.kv_len, 0, seqs, stream)?,
                block_ids: &download(ids, 0, ids.bytes / size_of::<i32>() as u64, stream)?,
                block_row: &download(args.tables.block_row, 0, rows, stream)?,
                first_block: &first_block,
                window,
            },
            args,
        )
    }
}

/// Downloads and validates a plan that `attention` will follow.
///
/// # Safety
/// The plan is device memory of its length.
pub(super) unsafe fn plan(plan: &Plan, stream: StreamRef<'_>) -> Result<()> {
    // SAFETY: the caller's promise; the launcher has checked the length of the plan.
    let words: Vec<[i32; 2]> =
        unsafe { download(plan.memory, 0, plan.list.num_parts.into(), stream)? };
    let list: Vec<hkv_part> = words
        .iter()
        .map(|&[seq, part]| hkv_part { seq, index: part as i16, count: (part >> 16) as i16 })
        .collect();
    check_work_list(&list, plan.list.num_seqs)?;
    let cut = list.iter().filter(|part| part.count > 1).count() as u64;
    if cut > u64::from(plan.list.cut_parts) {
        let most = plan.list.cut_parts;
        let message = format!("the plan has {cut} parts of cut sequences, and room for {most}");
        return Err(Error::invalid("attention", message));
    }
    let bytes = cut * u64::from(plan.list.num_kv_heads) * size_of::<i32>() as u64;
    let counters = Span::new(plan.arrivals(), bytes);
    // SAFETY: as above.
    let arrivals: Vec<i32> = unsafe { download(counters, 0, counters.bytes / 4, stream)? };
    match arrivals.iter().position(|&count| count != 0) {
        None => Ok(()),
        Some(at) => {
            let message = format!(
                "counter {at} of the plan is {}, not 0: a launch is using it, or one failed: plan anew",
                arrivals[at]
            );
            Err(Error::invalid("attention", message))
        }
    }
}

/// Downloads and validates the tables of `move_blocks`.
///
/// # Safety
/// The tables are device or pinned memory of their lengths.
pub(super) unsafe fn move_blocks(args: &MoveArgs, stream: StreamRef<'_>) -> Result<()> {
    // SAFETY: the caller's promise; the launcher has checked the lengths of the tables.
    let rows: Vec<[u64; 3]> = unsafe { download(args.copies, 0, args.num_copies, stream)? };
    let shape = &args.shape;
    let mut offsets = [None, None];
    for (table, offsets) in shape.offsets().into_iter().zip(&mut offsets) {
        let count = shape.dims().first().map_or(0, |dim| dim.count);
        if let Some(table) = table {
            // SAFETY: as above.
            *offsets = Some(unsafe { download::<i64>(table, 0, count.into(), stream)? });
        }
    }
    let copies: Vec<hkv_copy> = rows
        .iter()
        .map(|&[src, dst, bytes]| hkv_copy { src: src as *const _, dst: dst as *mut _, bytes })
        .collect();
    let [src_offsets, dst_offsets] = &offsets;
    check_copies(&rows_of(&copies, shape, src_offsets.as_deref(), dst_offsets.as_deref())?, &[])
}

/// The fragments that blocks consist of, block by block.
///
/// # Errors
/// `InvalidArgument` for a block of 2^31 vectors and more.
fn rows_of(
    blocks: &[hkv_copy],
    shape: &MoveShape,
    src_offsets: Option<&[i64]>,
    dst_offsets: Option<&[i64]>,
) -> Result<Vec<hkv_copy>> {
    let num_rows = shape.rows();
    let mut rows = Vec::new();
    for (index, block) in blocks.iter().enumerate() {
        if shape.dims().is_empty() {
            rows.push(*block);
            continue;
        }
        if (block.bytes / 16).saturating_mul(num_rows) > i32::MAX as u64 {
            return Err(Error::invalid(
                "move_blocks",
                format!(
                    "block {index} has {num_rows} rows of {} bytes, 32 GiB or more",
                    block.bytes
                ),
            ));
        }
        for row in 0..num_rows {
            let (mut src, mut dst, mut above) = (block.src as u64, block.dst as u64, row);
            for (d, dim) in shape.dims().iter().enumerate().rev() {
                let step = above % u64::from(dim.count);
                above /= u64::from(dim.count);
                let offset = |table: Option<&[i64]>, stride: i64| match table {
                    Some(table) if d == 0 => table[step as usize],
                    _ => stride.wrapping_mul(step as i64),
                };
                src = src.wrapping_add_signed(offset(src_offsets, dim.src_stride));
                dst = dst.wrapping_add_signed(offset(dst_offsets, dim.dst_stride));
            }
            rows.push(hkv_copy { src: src as *const _, dst: dst as *mut _, bytes: block.bytes });
        }
    }
    Ok(rows)
}

/// Validates what `encode` or `decode` is to do: blocks inside of the view, slots at multiples of 16 bytes and
/// apart. Blocks that are decoded into are named once.
///
/// # Errors
/// `InvalidArgument` naming the row and what is wrong with it.
pub fn check_slot_blocks(
    rows: &[hkv_slot_block],
    num_blocks: u64,
    slot_bytes: u64,
    decodes: bool,
) -> Result<()> {
    const OP: &str = "codec";
    for (row, &hkv_slot_block { block, slot }) in rows.iter().enumerate() {
        if u64::try_from(block).map_or(true, |block| block >= num_blocks) {
            return Err(Error::invalid(
                OP,
                format!("row {row} names block {block}, the view has {num_blocks}"),
            ));
        }
        if slot.is_null() || !(slot as u64).is_multiple_of(16) {
            return Err(Error::invalid(
                OP,
                format!("row {row} has a slot at {slot:p}, null or no multiple of 16"),
            ));
        }
    }
    let mut written: Vec<(u64, usize)> = rows
        .iter()
        .enumerate()
        .map(|(row, r)| (if decodes { r.block as u64 } else { r.slot as u64 }, row))
        .collect();
    written.sort_unstable();
    let apart = if decodes { 1 } else { slot_bytes };
    match written.windows(2).find(|pair| pair[1].0 - pair[0].0 < apart) {
        Some(pair) => Err(Error::invalid(
            OP,
            format!("rows {} and {} write to the same memory", pair[0].1, pair[1].1),
        )),
        None => Ok(()),
    }
}

/// Downloads and validates the rows of `encode` or `decode`.
///
/// # Safety
/// The rows are device or pinned memory of their length.
pub(super) unsafe fn codec(
    args: &CodecArgs,
    slot_bytes: u64,
    decodes: bool,
    stream: StreamRef<'_>,
) -> Result<()> {
    // SAFETY: the caller's promise; the launcher has checked the length of the rows.
    let rows: Vec<[u64; 2]> = unsafe { download(args.blocks, 0, args.num_blocks, stream)? };
    let rows: Vec<hkv_slot_block> = rows
        .iter()
        .map(|&[block, slot]| hkv_slot_block { block: block as i64, slot: slot as *mut _ })
        .collect();
    check_slot_blocks(&rows, args.kv.num_blocks, slot_bytes, decodes)
}

/// # Safety
/// The table is device memory and has a row for the layer.
unsafe fn download_window(rows: Span, layer: u32, stream: StreamRef<'_>) -> Result<hkv_window> {
    // SAFETY: the caller's promise.
    let row: Vec<hkv_window> = unsafe { download(rows, u64::from(layer), 1, stream)? };
    Ok(row[0])
}

/// Copies `count` values from index `first` on to the host and waits for them.
///
/// # Safety
/// The span is memory of the stream's device that holds them.
unsafe fn download<T: bytemuck::Pod>(
    span: Span,
    first: u64,
    count: u64,
    stream: StreamRef<'_>,
) -> Result<Vec<T>> {
    let size = size_of::<T>() as u64;
    let mut values = vec![T::zeroed(); count as usize];
    // SAFETY: the caller's promise; `values` outlives the synchronisation.
    let copied = unsafe {
        let bytes = (count * size) as usize;
        stream.copy(span.address + first * size, values.as_mut_ptr() as u64, bytes)
    };
    copied.and(stream.synchronize())?;
    Ok(values)
}

/// Slots of a view, as the end of the range of valid ones.
fn slots_of(kv: &KvView) -> Result<i64> {
    kv.num_blocks
        .checked_mul(u64::from(kv.block_size))
        .and_then(|slots| i64::try_from(slots).ok())
        .ok_or_else(|| Error::invalid("append", "the pool has more slots than 64 bits number"))
}

#[cfg(test)]
pub(super) mod tests {
    use bytemuck::Zeroable;

    use super::*;
    use crate::layout::{Dtype, KvShape, KvStrides};
    use crate::ops::{BlockTables, HeadStrides, WindowTable};

    /// A batch of two sequences, of no memory.
    pub(crate) fn args() -> AttentionArgs {
        let none = Span::default();
        let strides = HeadStrides::contiguous(1, 64);
        AttentionArgs {
            q: none,
            q_strides: strides,
            out: none,
            out_strides: strides,
            dtype: Dtype::F16,
            lse: None,
            kv: KvView {
                k: none,
                v: none,
                strides: KvStrides { block: 0, layer: 0, head: 0, token: 0 },
                shape: KvShape { num_kv_heads: 1, head_dim: 64, dtype: Dtype::F16 },
                block_size: 16,
                num_blocks: 10,
                num_layer_slots: 1,
                scales: None,
            },
            sealed: None,
            qo_indptr: none,
            kv_len: none,
            tables: BlockTables {
                block_ids: none,
                block_row: none,
                first_block: None,
                num_groups: 2,
            },
            windows: WindowTable { rows: none, num_layers: 1 },
            layer: 0,
            sink_logits: None,
            tree_mask: None,
            plan: None,
            num_qo_heads: 1,
            num_seqs: 2,
            num_tokens: 9,
            max_q_len: 8,
            max_kv_len: 100,
            sm_scale: 1.0,
            logits_soft_cap: 0.0,
            workspace: none,
        }
    }

    fn window(kind: u32, extent: i32, sink_tokens: i32) -> hkv_window {
        hkv_window { kind: kind as i32, extent, sink_tokens, group: 1, ..Zeroable::zeroed() }
    }

    /// Sequence 0: 100 tokens, 1 of them new; sequence 1: 20 tokens, 8 of them new. Group 1's rows are ids
    /// 3 .. 10 and 10 .. 12.
    fn tables(window: hkv_window) -> AttentionTables<'static> {
        AttentionTables {
            qo_indptr: &[0, 1, 9],
            kv_len: &[100, 20],
            block_ids: &[-1, -1, -1, 0, 1, 2, 3, 4, 5, 6, 8, 9],
            block_row: &[0, 1, 3, 10],
            first_block: &[],
            window,
        }
    }

    fn complaint(tables: &AttentionTables<'_>) -> String {
        check_attention_tables(tables, &args()).expect_err("the tables are wrong").to_string()
    }

    #[test]
    fn right_tables_pass() {
        let full = tables(window(abi::HKV_LAYER_FULL, 0, 0));
        check_attention_tables(&full, &args()).unwrap();
        // Sliding over 20 tokens: sequence 0 sees 80 .. 100, blocks 5 and 6, and a sink block.
        let sliding = AttentionTables {
            block_ids: &[7, 1, 2, 0, 5, 6],
            block_row: &[0, 0, 0, 3],
            first_block: &[0, 0, 5, 0],
            ..tables(window(abi::HKV_LAYER_SLIDING, 20, 4))
        };
        let chunked = AttentionTables {
            block_ids: &[7, 8, 0, 5],
            block_row: &[0, 0, 0, 2],
            first_block: &[0, 0, 6, 0],
            ..tables(window(abi::HKV_LAYER_CHUNKED, 96, 0))
        };
        check_attention_tables(&sliding, &args()).unwrap();
        check_attention_tables(&chunked, &args()).unwrap();
    }

    #[test]
    fn a_row_shorter_than_its_sequence_is_found() {
        let full = tables(window(abi::HKV_LAYER_FULL, 0, 0));
        let next_row_too_early = AttentionTables { block_row: &[0, 1, 3, 9], ..full };
        assert!(complaint(&next_row_too_early).contains("sequence 0 is ids 3 to 9"));
        let array_too_short = AttentionTables { block_ids: &full.block_ids[..11], ..full };
        assert!(complaint(&array_too_short).contains("sequence 1 is ids 10 to 11"));
        let rows_missing = AttentionTables { block_row: &[0, 1, 3], ..full };
        assert!(complaint(&rows_missing).contains("block_row has 3 entries, 4 are needed"));
        let negative = AttentionTables { block_row: &[0, 1, 3, -5], ..full };
        assert!(complaint(&negative).contains("sequence 1"));
    }

    #[test]
    fn a_block_freed_too_early_is_found() {
        let sliding = window(abi::HKV_LAYER_SLIDING, 36, 0);
        let gone = AttentionTables { first_block: &[0, 0, 5, 0], ..tables(sliding) };
        assert!(complaint(&gone).contains("sequence 0 sees block 4"));
        // The first query of sequence 1 is at 12: a chunk of 12 starts there, in block 0.
        let chunked = window(abi::HKV_LAYER_CHUNKED, 12, 0);
        let gone = AttentionTables { first_block: &[0, 0, 6, 1], ..tables(chunked) };
        assert!(complaint(&gone).contains("sequence 1 sees block 0"));
    }

    #[test]
    fn ids_and_lengths_out_of_range_are_found() {
        let full = tables(window(abi::HKV_LAYER_FULL, 0, 0));
        let mut ids = full.block_ids.to_vec();
        ids[11] = 10;
        let outside = AttentionTables { block_ids: &ids, ..full };
        assert!(complaint(&outside).contains("block 1 of sequence 1 has id 10"));
        for (qo_indptr, kv_len, word) in [
            ([0, 1, 10], [100, 20], "num_tokens is 9"),
            ([-1, 1, 9], [100, 20], "starts at -1"),
            ([0, 5, 3], [100, 20], "falls from 5 to 3"),
            ([0, 0, 9], [100, 20], "max_q_len is 8"),
            ([0, 1, 9], [100, 7], "kv_len 7"),
        ] {
            let wrong = AttentionTables { qo_indptr: &qo_indptr, kv_len: &kv_len, ..full };
            let message = complaint(&wrong);
            assert!(message.contains(word), "{word:?} is not in {message}");
        }
    }

    #[test]
    fn wrong_window_rows_are_found() {
        let kv = args().kv;
        let check = |row: hkv_window| check_window("attention", &row, 2, &kv);
        check(window(abi::HKV_LAYER_SLIDING, 1, 0)).unwrap();
        for wrong in [
            window(3, 1, 0),
            window(abi::HKV_LAYER_SLIDING, 0, 0),
            window(abi::HKV_LAYER_CHUNKED, -8192, 0),
            window(abi::HKV_LAYER_FULL, 0, -1),
            hkv_window { group: 2, ..window(abi::HKV_LAYER_FULL, 0, 0) },
            hkv_window { layer_slot: 1, ..window(abi::HKV_LAYER_FULL, 0, 0) },
        ] {
            assert!(check(wrong).is_err(), "{wrong:?}");
        }
    }
}
