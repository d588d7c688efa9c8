//! How the work of attention is cut: which kernel, how many CTAs, how many parts of a sequence.
//!
//! Pure functions of shapes and of upper bounds on lengths, so that `plan` and `attention` come to the same
//! answer and a captured launch replays with other lengths.

use crate::abi;
use crate::device::DeviceInfo;
use crate::layout::{Dtype, KvShape};

/// The kernel for a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Variant {
    /// `attention_decode.cu`, for at most 8 query rows per KV head.
    Decode8,
    /// The same for e4m3 in crowds: CTAs of half the rings, four to a multiprocessor.
    Decode8Narrow,
    /// As [`Decode8`](Self::Decode8), for at most 16 of less than 256 dimensions.
    Decode16,
    /// `attention_decode_sealed.cu`, for at most 8 query rows per KV head.
    Sealed,
    /// `attention_prefill.cu`.
    Prefill,
}

impl Variant {
    /// The kernel for up to `max_q_len` query tokens per sequence of `group` query heads per KV head.
    pub(super) fn of(max_q_len: u32, group: u32, head_dim: u32) -> Self {
        match u64::from(max_q_len.max(1)) * u64::from(group) {
            ..=8 => Self::Decode8,
            9..=16 if head_dim < 256 => Self::Decode16,
            _ => Self::Prefill,
        }
    }

    /// The kernel for so many (sequence, KV head) pairs of such a KV shape.
    pub(super) fn for_items(self, items: u64, shape: &KvShape, device: &DeviceInfo) -> Self {
        let has_narrow = shape.dtype == Dtype::E4m3 && shape.head_dim <= 128;
        match self {
            Self::Decode8 if has_narrow && items > u64::from(device.multiprocessors) => {
                Self::Decode8Narrow
            }
            other => other,
        }
    }

    /// Query rows per KV head that a decode kernel takes at a time.
    pub(super) fn rows(self) -> u32 {
        if self == Self::Decode16 { 16 } else { 8 }
    }

    /// CTAs of a decode kernel that share a multiprocessor, as in kernels/policy/decode_tuning.cuh.
    pub(super) fn ctas_per_sm(self) -> u32 {
        if self == Self::Decode8Narrow { 4 } else { 2 }
    }

    /// Dynamic shared memory of a CTA of a decode kernel.
    pub(super) fn shared_bytes(self) -> u32 {
        match self {
            Self::Decode8Narrow => abi::HKV_DECODE_NARROW_SHARED_BYTES,
            Self::Sealed => abi::HKV_SEALED_SHARED_BYTES,
            _ => abi::HKV_DECODE_SHARED_BYTES,
        }
    }
}

/// What decides how a decode batch is dealt to CTAs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Sequences.
    pub(super) num_seqs: u32,
    /// KV heads.
    pub(super) num_kv_heads: u32,
    /// Upper bound on the visible tokens of a sequence.
    pub(super) max_kv_len: u32,
    /// CTAs of the kernel that share a multiprocessor.
    pub(super) ctas_per_sm: u32,
}

/// The work list of a decode batch: a CTA for every entry and KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WorkList {
    /// Sequences.
    pub(crate) num_seqs: u32,
    /// KV heads.
    pub(crate) num_kv_heads: u32,
    /// Entries.
    pub(crate) num_parts: u32,
    /// Most entries that are parts of cut sequences; 0: none is ever cut.
    pub(crate) cut_parts: u32,
}

impl WorkList {
    /// The list of a batch without a plan: every sequence is one part.
    pub(super) fn whole(bounds: Bounds) -> Self {
        let Bounds { num_seqs, num_kv_heads, .. } = bounds;
        Self { num_seqs, num_kv_heads, num_parts: num_seqs, cut_parts: 0 }
    }

    /// CTAs of the launch.
    pub(super) fn ctas(&self) -> u64 {
        u64::from(self.num_parts) * u64::from(self.num_kv_heads)
    }

    /// (Part of a cut sequence, KV head) pairs: each has room for a partial state, and a counter of arrivals.
    pub(super) fn cut_items(&self) -> u64 {
        u64::from(self.cut_parts) * u64::from(self.num_kv_heads)
    }
}

/// How a plan cuts the sequences of a batch, as abi/params.h says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PlanSplit {
    pub(super) list: WorkList,
    pub(super) spare_parts: u32,
    pub(super) fixed_tokens: u32,
    pub(super) max_parts: u32,
}

/// CTAs of the prefill kernel that share a multiprocessor.
const CTAS_PER_SM: u64 = 2;
/// Tokens below which a part of a decode costs more than it saves: two slices per warp.
pub(super) const MIN_TOKENS: u32 = 128;
/// What merging a part costs, in tokens: one head over 8K tokens is fastest in 32 parts, over 1K in 8 (H100).
pub(super) const MERGE_TOKENS: f32 = 8.0;
/// Tokens of a part in plans that do not depend on the batch.
const FIXED_TOKENS: u32 = 4096;

impl PlanSplit {
    /// The split of a batch; by each sequence's own length alone where it is to be `batch_invariant`.
    pub(super) fn new(bounds: Bounds, batch_invariant: bool, device: &DeviceInfo) -> Self {
        let whole = WorkList::whole(bounds);
        if batch_invariant {
            let max_parts = bounds.max_kv_len.div_ceil(FIXED_TOKENS);
            let max_parts = max_parts.clamp(1, abi::HKV_PLAN_MAX_PARTS);
            let num_parts = bounds.num_seqs.saturating_mul(max_parts);
            let cut_parts = if max_parts > 1 { num_parts } else { 0 };
            return Self {
                list: WorkList { num_parts, cut_parts, ..whole },
                spare_parts: 1,
                fixed_tokens: FIXED_TOKENS,
                max_parts,
            };
        }
        let spare_parts = spare_parts(bounds, device.multiprocessors.max(1));
        let cut_parts = match spare_parts {
            1 => 0,
            // As many as shares that are rounded down make of all tokens.
            spare => spare + spare / MIN_TOKENS + 1,
        };
        Self {
            list: WorkList { num_parts: whole.num_parts + cut_parts, cut_parts, ..whole },
            spare_parts,
            fixed_tokens: 0,
            max_parts: 1,
        }
    }
}

/// Parts of equal length into which a batch is cut.
fn spare_parts(bounds: Bounds, sms: u32) -> u32 {
    let Bounds { num_seqs, num_kv_heads, max_kv_len, ctas_per_sm } = bounds;
    if max_kv_len < 2 * MIN_TOKENS {
        return 1;
    }
    // Half of the CTAs that run at a time keep the memory busy.
    let unit = u64::from(sms) * u64::from(ctas_per_sm) / 2;
    let items = (u64::from(num_seqs) * u64::from(num_kv_heads)).max(1);
    let spare = match even_parts(items, max_kv_len, unit.max(1)) {
        // Enough for what is longer than the others.
        1 => (4 * sms / num_kv_heads.max(1)).min(num_seqs),
        parts => num_seqs.saturating_mul(parts),
    };
    spare.clamp(1, MAX_SPARE_PARTS)
}

/// Most parts of all sequences: their number is counted in 16 bits.
const MAX_SPARE_PARTS: u32 = 32_000;

/// Into how many parts each of `items` (sequence, KV head) pairs of equal length is best cut, where `unit` CTAs
/// keep the memory busy: they stay whole where that comes within 1/64 of the best, else the fewest parts that
/// come within 1/256 of it. The figures are an H100's.
fn even_parts(items: u64, max_kv_len: u32, unit: u64) -> u32 {
    let (items, unit) = (items as f32, unit as f32);
    // Time of so many CTAs of one length each, alone on the device. What is left over after whole rounds runs
    // on too few of them.
    let busy = |ctas: f32| {
        let rounds = (ctas / unit).floor();
        match ctas - rounds * unit {
            _ if rounds == 0.0 => unit,
            0.0 => ctas,
            left => rounds * unit + left.max(0.9 * unit),
        }
    };
    let merged = (max_kv_len as f32 / MERGE_TOKENS).sqrt().floor().max(1.0);
    let cost = |parts: u32| {
        let parts = parts as f32;
        let merge = if parts == 1.0 { 1.0 } else { 1.012 + 0.25 * (parts / merged).powi(2) };
        busy(items * parts) / (items * parts) * merge
    };
    let most = if items < unit { (unit / items).max(16.0) } else { 4.0 };
    let most = most.min(merged).min((max_kv_len / MIN_TOKENS) as f32);
    let all = 1..=(most as u32).max(1);
    let least = all.clone().map(cost).fold(f32::INFINITY, f32::min);
    if cost(1) <= least * (1.0 + 1.0 / 64.0) {
        return 1;
    }
    all.into_iter().find(|&parts| cost(parts) <= least * (1.0 + 1.0 / 256.0)).unwrap_or(1)
}

/// Bytes that the partial states of a prefill may take.
const MAX_PREFILL_PARTIAL_BYTES: u64 = 64 << 20;

/// Splits of a prefill of `items` (tile, KV head) pairs, whose partial states take `state_bytes` for each split:
/// what makes the waves of CTAs end soonest.
pub(super) fn prefill_splits(
    items: u64,
    max_kv_len: u32,
    device: &DeviceInfo,
    state_bytes: u64,
) -> u32 {
    /// Keys of a tile.
    const TILE_KEYS: u64 = 64;
    /// What a CTA costs besides its tiles (start, partial state, merge), in tiles.
    const OVERHEAD_TILES: u64 = 4;
    /// Tiles below which a split is not worth it.
    const MIN_TILES: u64 = 4;
    let slots = u64::from(device.multiprocessors.max(1)) * CTAS_PER_SM;
    let tiles = u64::from(max_kv_len).div_ceil(TILE_KEYS);
    let max_splits = MAX_PREFILL_PARTIAL_BYTES / state_bytes.max(1);
    let most = (tiles / MIN_TILES).min(max_splits).clamp(1, 32);
    let cost =
        |splits: u64| (items * splits).div_ceil(slots) * (tiles.div_ceil(splits) + OVERHEAD_TILES);
    let best = (1..=most).map(cost).min().unwrap_or(0);
    // The fewest that come within 1/32 of the best: partial states are not free.
    (1..=most).find(|&splits| cost(splits) <= best + best / 32).unwrap_or(1) as u32
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::device::DeviceKind;

    /// A GPU of so many multiprocessors.
    pub(crate) fn gpu(multiprocessors: u32) -> DeviceInfo {
        DeviceInfo {
            kind: DeviceKind::Cuda,
            name: String::new(),
            compute_capability: (9, 0),
            multiprocessors,
            memory_bytes: 0,
            l2_bytes: 0,
            shared_memory_bytes: 0,
            driver_version: 0,
        }
    }

    fn bounds(num_seqs: u32, num_kv_heads: u32, max_kv_len: u32) -> Bounds {
        Bounds { num_seqs, num_kv_heads, max_kv_len, ctas_per_sm: 2 }
    }

    #[test]
    fn even_batches_are_cut_until_the_device_is_busy() {
        // (items, tokens, CTAs of a multiprocessor) -> parts on 132 multiprocessors
        for (items, tokens, ctas_per_sm, parts) in [
            (512, 8192, 2, 1),
            (256, 8192, 2, 1),
            (128, 8192, 2, 2),
            (64, 8192, 2, 4),
            (32, 8192, 2, 8),
            (160, 8192, 2, 4),
            (272, 8192, 2, 4),
            (16, 32_768, 2, 16),
            (8, 131_072, 2, 16),
            (8, 1024, 2, 8),
            (1, 8192, 2, 32),
            (1, 10_000_000, 2, 132),
            (128, 8192, 4, 4),
            (64, 8192, 4, 8),
            (8, 131_072, 4, 33),
            (1, 10_000_000, 4, 263),
            (512, 8192, 4, 1),
        ] {
            let found = even_parts(items, tokens, 132 * ctas_per_sm / 2);
            assert_eq!(found, parts, "{items} items of {tokens} tokens, {ctas_per_sm} CTAs");
        }
    }

    #[test]
    fn planned_batches_fill_the_device_without_crumbs() {
        let h100 = gpu(132);
        for (seqs, heads, kv_len, spare) in [
            (1, 8, 131_072, 16),
            (64, 1, 8192, 256),
            (256, 8, 1 << 20, 66), // whole, but for what is longer than the others
            (4, 8, 1 << 20, 32),
            (1, 8, 1024, 8),       // no crumbs
            (64, 8, 255, 1),       // too short to be cut: no room for parts
            (1, 1024, 1 << 20, 1), // heads enough
            (4096, 1, 8192, 528),
        ] {
            let bounds = bounds(seqs, heads, kv_len);
            let found = PlanSplit::new(bounds, false, &h100);
            let list = found.list;
            assert_eq!(found.spare_parts, spare, "{bounds:?}");
            assert_eq!(list.cut_parts, if spare > 1 { spare + spare / 128 + 1 } else { 0 });
            assert_eq!(list.num_parts, seqs + list.cut_parts);
            let whole = WorkList::whole(bounds);
            assert_eq!((whole.num_parts, whole.cut_items()), (seqs, 0));
        }
    }

    #[test]
    fn batch_invariant_plans_look_at_the_length_alone() {
        let h100 = gpu(132);
        for (seqs, kv_len, max_parts) in
            [(1, 0, 1), (3, 4096, 1), (3, 4097, 2), (500, 65_536, 16), (2, u32::MAX, 64)]
        {
            let found = PlanSplit::new(bounds(seqs, 2, kv_len), true, &h100);
            assert_eq!((found.max_parts, found.spare_parts), (max_parts, 1));
            assert_eq!(found.list.num_parts, seqs * max_parts);
            assert_eq!(found.list.cut_parts, if max_parts > 1 { seqs * max_parts } else { 0 });
        }
    }

    #[test]
    fn decode_serves_up_to_16_rows() {
        for (max_q_len, group, head_dim, variant) in [
            (0, 8, 128, Variant::Decode8),
            (1, 8, 256, Variant::Decode8),
            (4, 4, 128, Variant::Decode16),
            (3, 3, 256, Variant::Prefill),
            (17, 1, 64, Variant::Prefill),
            (u32::MAX, 16, 64, Variant::Prefill),
        ] {
            assert_eq!(Variant::of(max_q_len, group, head_dim), variant);
        }
    }

    #[test]
    fn crowds_of_e4m3_sequences_are_read_by_narrow_ctas() {
        let shape = |dtype, head_dim| KvShape { num_kv_heads: 8, head_dim, dtype };
        for (items, dtype, head_dim, variant) in [
            (132, Dtype::E4m3, 128, Variant::Decode8),
            (133, Dtype::E4m3, 128, Variant::Decode8Narrow),
            (2048, Dtype::E4m3, 64, Variant::Decode8Narrow),
            (2048, Dtype::E4m3, 256, Variant::Decode8),
            (2048, Dtype::Bf16, 128, Variant::Decode8),
        ] {
            let shape = shape(dtype, head_dim);
            assert_eq!(Variant::Decode8.for_items(items, &shape, &gpu(132)), variant);
            assert_eq!(Variant::Prefill.for_items(items, &shape, &gpu(132)), Variant::Prefill);
        }
    }

    #[test]
    fn prefill_splits_even_out_the_waves() {
        let h100 = gpu(132);
        // (items, keys, splits that memory allows) -> splits on 264 CTAs at a time
        for (items, keys, most, splits) in [
            (2048, 8192, 64, 1),   // many waves: nothing to gain
            (64, 131_072, 64, 4),  // a short chunk over a long context fills the device
            (320, 131_072, 64, 4), // 1.2 waves take as long as 2, 4.8 as 5
            (320, 131_072, 3, 3),
            (8, 64, 64, 1),
        ] {
            let found = prefill_splits(items, keys, &h100, MAX_PREFILL_PARTIAL_BYTES / most);
            assert_eq!(found, splits, "{items} items of {keys} keys, at most {most}");
        }
    }
}
