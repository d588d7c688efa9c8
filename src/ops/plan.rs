//! `plan`: deals the decode work of a batch to CTAs, once per step, for all layers.
//!
//! Layers of one *window class* (the same kind, extent and sink tokens) see the same keys. `plan` counts them on
//! the device, from the lengths that lie there, and cuts long sequences into parts, so that none keeps the
//! device waiting at the end. It can be captured in a graph and replayed with other lengths. What it decides
//! is who does what, never what is done: with a stale plan results are right, only unbalanced.

use super::split::{MERGE_TOKENS, MIN_TOKENS, PlanSplit, Variant, WorkList};
use super::{AttentionArgs, Kernel, Kernels, Loader, cpu};
use crate::abi::{self, hkv_part, hkv_plan_class, hkv_plan_params, hkv_window};
use crate::device::cuda::LaunchConfig;
use crate::device::{DeviceInfo, Span, StreamRef};
use crate::error::{Error, Result};

const OP: &str = "plan";
const MAX_CLASSES: usize = abi::HKV_PLAN_MAX_CLASSES as usize;

/// Arguments of [`Kernels::plan`](crate::ops::Kernels::plan).
#[derive(Debug, Clone, Copy)]
pub struct PlanArgs<'a> {
    /// The arguments with which one layer of each window class will be attended, at most 8, of one batch:
    /// `num_seqs`, `qo_indptr`, `kv_len` and `windows` are the same in all. Queries, outputs, block tables and
    /// the memory of keys and values are not looked at.
    pub classes: &'a [AttentionArgs],
    /// Whether the length of a sequence alone decides how it is cut, so that the bits of its output do not
    /// depend on what else is in the batch, as long as `max_q_len` is the same. Room for the parts of
    /// `max_kv_len` tokens is then kept for every sequence, in the work list and in the workspace.
    pub batch_invariant: bool,
    /// Device memory for the plans, [`plan_bytes`](crate::ops::Kernels::plan_bytes) long. Attention uses it
    /// until the next `plan` there.
    pub memory: Span,
}

/// The plan of one window class, for [`AttentionArgs::plan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub(crate) list: WorkList,
    /// The entries of the list, then the counters of arrivals.
    pub(crate) memory: Span,
    pub(crate) reads_early: bool,
}

impl Plan {
    /// The same plan for a layer whose predecessor in the stream, the kernel launched just before it, writes
    /// nothing that attention reads but queries and the keys and values of this step's new tokens: as
    /// `append` does, and attention of the layer before. Attention then begins on older keys while that
    /// kernel ends (sm_90 and up). Where the predecessor writes block tables, lengths, older tokens or the
    /// plan, results would be wrong: where in doubt, leave it [`in_order`](Self::in_order).
    pub const fn early(mut self) -> Self {
        self.reads_early = true;
        self
    }

    /// The same plan for a layer that reads nothing before its predecessor has ended, as plans are at first.
    pub const fn in_order(mut self) -> Self {
        self.reads_early = false;
        self
    }

    /// Checks that the plan is of a batch whose list without a plan is `whole`, and its memory long enough.
    pub(super) fn check(&self, op: &'static str, whole: &WorkList) -> Result<()> {
        let WorkList { num_seqs, num_kv_heads, num_parts, cut_parts } = self.list;
        if (num_seqs, num_kv_heads) != (whole.num_seqs, whole.num_kv_heads) {
            return Err(Error::invalid(
                op,
                format!(
                    "the plan is of {num_seqs} sequences with {num_kv_heads} KV heads, the batch of {} with \
                     {}: plan every batch size and class for itself",
                    whole.num_seqs, whole.num_kv_heads
                ),
            ));
        }
        if num_parts < num_seqs || cut_parts > num_parts {
            let message =
                format!("a plan of {num_parts} parts, {cut_parts} of them of cut sequences");
            return Err(Error::invalid(op, message));
        }
        self.memory.check(op, "the plan", bytes(&self.list), 16)
    }

    /// Address of the counters.
    pub(super) fn arrivals(&self) -> u64 {
        self.memory.address + list_bytes(&self.list)
    }
}

/// Bytes of the entries of a list; counters follow them.
fn list_bytes(list: &WorkList) -> u64 {
    u64::from(list.num_parts) * size_of::<hkv_part>() as u64
}

/// Bytes of the plan of one class, a multiple of 16; u64::MAX where 64 bits do not count them.
fn bytes(list: &WorkList) -> u64 {
    let counters = list.cut_items().saturating_mul(size_of::<i32>() as u64);
    list_bytes(list).saturating_add(counters).checked_next_multiple_of(16).unwrap_or(u64::MAX)
}

pub(super) struct Loaded {
    plan: Kernel,
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        let kernel = loader.file("plan")?;
        Ok(Self { plan: kernel("hkv_plan", 0)? })
    }
}

impl Kernels {
    /// Bytes of memory that the plans of these classes take (`args.memory` is not looked at); 0 where none is
    /// planned.
    ///
    /// # Errors
    /// As [`plan`](Self::plan), but for the memory.
    pub fn plan_bytes(&self, args: &PlanArgs<'_>) -> Result<u64> {
        args.check_shape()?;
        let bytes = args.layout(self.device.info()).map(|class| class.bytes);
        Ok(bytes.fold(0, u64::saturating_add))
    }

    /// Plans the decode work of a batch for every given window class, in one launch: the plan of class `i` is
    /// [`planned`](Self::planned)`(args, i)`. Classes with too many query rows for the decode kernel are
    /// not planned.
    ///
    /// # Errors
    /// Shapes as for [`attention`](Self::attention); more than 8 classes, more than 4,096 sequences, classes of
    /// different batches, a layer outside of the window table, memory that is too short.
    ///
    /// # Safety
    /// Until the stream has passed the launch, `qo_indptr`, `kv_len` and the window table of the batch are
    /// device memory of their length, `qo_indptr` rises, and nothing else accesses `memory`.
    pub unsafe fn plan(&self, args: &PlanArgs<'_>, stream: StreamRef<'_>) -> Result<()> {
        let needed = self.plan_bytes(args)?;
        let device = self.device.info();
        let (Some(batch), true) = (args.classes.first(), needed > 0) else { return Ok(()) };
        args.memory.check(OP, "the plan's memory", needed, 16)?;
        let seqs = u64::from(batch.num_seqs);
        batch.qo_indptr.check(OP, "qo_indptr", (seqs + 1) * 4, 4)?;
        batch.kv_len.check(OP, "kv_len", seqs * 4, 4)?;

        let mut params = hkv_plan_params {
            qo_indptr: batch.qo_indptr.address as *const _,
            kv_len: batch.kv_len.address as *const _,
            windows: batch.windows.rows.address as *const _,
            classes: [NO_CLASS; MAX_CLASSES],
            num_seqs: batch.num_seqs as i32,
            reserved: 0,
        };
        let mut count = 0;
        for (class, of) in args.layout(device).zip(args.classes) {
            of.windows.check(OP, of.layer)?;
            if let Some(split) = &class.split {
                let memory = args.memory.address + class.offset;
                params.classes[count] = plan_class(split, of.layer, memory);
                count += 1;
            }
        }
        let threads = batch.num_seqs.next_multiple_of(32).clamp(128, abi::HKV_PLAN_THREADS);
        let mut config = LaunchConfig::linear(count as u32, threads);
        if device.compute_capability >= (9, 0) {
            config = config.with_overlap();
        }
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu = move |params: &_| unsafe { cpu::plan(params, count) };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(&self.plan.plan, config, &params, stream, on_cpu) }
    }

    /// The plan of the `class`-th class of `args`, once [`plan`](Self::plan) has been submitted with the same
    /// arguments; `None` for a class that is not planned.
    ///
    /// # Errors
    /// As [`plan`](Self::plan); a class that is not there.
    pub fn planned(&self, args: &PlanArgs<'_>, class: usize) -> Result<Option<Plan>> {
        args.check_shape()?;
        let Some(layout) = args.layout(self.device.info()).nth(class) else {
            let message = format!("class {class} of {}", args.classes.len());
            return Err(Error::invalid(OP, message));
        };
        let Class { split: Some(split), offset, bytes } = layout else { return Ok(None) };
        args.memory.check(OP, "the plan's memory", offset.saturating_add(bytes), 16)?;
        let memory = Span::new(args.memory.address + offset, bytes);
        Ok(Some(Plan { list: split.list, memory, reads_early: false }))
    }
}

/// Validates the work list of a plan: every sequence with all of its parts, once and in order; those of cut
/// sequences first, entries without work last.
///
/// # Errors
/// `InvalidArgument` naming the entry and what is wrong with it.
pub fn check_work_list(list: &[hkv_part], num_seqs: u32) -> Result<()> {
    let wrong = |entry: usize, what: &str| {
        let message = format!("entry {entry} of the plan, {:?}, {what}", list[entry]);
        Err(Error::invalid(OP, message))
    };
    let mut seen = vec![false; num_seqs as usize];
    let mut last: Option<hkv_part> = None;
    for (entry, &part) in list.iter().enumerate() {
        let within = last.filter(|last| last.index + 1 < last.count);
        match within {
            Some(last)
                if (part.seq, part.index, part.count) != (last.seq, last.index + 1, last.count) =>
            {
                return wrong(entry, "is not the next part of the sequence before it");
            }
            Some(_) => {}
            None if part.count == 0 => {}
            None if part.index != 0 || part.count < 0 => {
                return wrong(entry, "is not the first part of a sequence");
            }
            None if last.is_some_and(|last| last.count < 2 && part.count > last.count) => {
                return wrong(entry, "comes after a sequence of fewer parts");
            }
            None => match usize::try_from(part.seq).ok().and_then(|seq| seen.get_mut(seq)) {
                None => return wrong(entry, "is of no sequence of the batch"),
                Some(true) => return wrong(entry, "is of a sequence that came before"),
                Some(seen) => *seen = true,
            },
        }
        last = Some(part);
    }
    if last.is_some_and(|last| last.index + 1 < last.count) {
        return wrong(list.len() - 1, "is not the last part of its sequence");
    }
    match seen.iter().position(|&seen| !seen) {
        Some(seq) => Err(Error::invalid(OP, format!("the plan lacks sequence {seq}"))),
        None => Ok(()),
    }
}

/// Where the plan of a class lies in the memory of all.
struct Class {
    /// `None`: not planned.
    split: Option<PlanSplit>,
    offset: u64,
    bytes: u64,
}

impl PlanArgs<'_> {
    /// Checks what sizes the plans.
    fn check_shape(&self) -> Result<()> {
        if self.classes.len() > MAX_CLASSES {
            let most = format!("up to {MAX_CLASSES} in a launch");
            return Err(Error::unsupported(OP, "window classes:", self.classes.len(), most));
        }
        let Some(first) = self.classes.first() else { return Ok(()) };
        if first.num_seqs > abi::HKV_PLAN_MAX_SEQS {
            let most = format!("up to {}", abi::HKV_PLAN_MAX_SEQS);
            return Err(Error::unsupported(OP, "num_seqs", first.num_seqs, most));
        }
        for (index, class) in self.classes.iter().enumerate() {
            class.check_shape()?;
            let batch = |args: &AttentionArgs| {
                let rows = args.windows.rows;
                (args.num_seqs, args.qo_indptr.address, args.kv_len.address, rows.address)
            };
            if batch(class) != batch(first) {
                return Err(Error::invalid(
                    OP,
                    format!(
                        "num_seqs, qo_indptr, kv_len or windows of class {index} are not those of class 0"
                    ),
                ));
            }
        }
        Ok(())
    }

    fn layout(&self, device: &DeviceInfo) -> impl Iterator<Item = Class> {
        let mut offset = 0;
        self.classes.iter().map(move |class| {
            let planned = class.variant(device) != Variant::Prefill && class.num_seqs > 0;
            let split = || PlanSplit::new(class.bounds(device), self.batch_invariant, device);
            let split = planned.then(split);
            let bytes = split.map_or(0, |split| bytes(&split.list));
            let class = Class { split, offset, bytes };
            offset = offset.saturating_add(bytes);
            class
        })
    }
}

const NO_CLASS: hkv_plan_class = hkv_plan_class {
    parts: std::ptr::null_mut(),
    arrivals: std::ptr::null_mut(),
    layer: 0,
    num_parts: 0,
    spare_parts: 1,
    min_tokens: 1,
    fixed_tokens: 0,
    max_parts: 1,
    num_kv_heads: 0,
    merge_tokens: MERGE_TOKENS,
};

fn plan_class(split: &PlanSplit, layer: u32, memory: u64) -> hkv_plan_class {
    hkv_plan_class {
        parts: memory as *mut _,
        arrivals: (memory + list_bytes(&split.list)) as *mut _,
        layer: layer as i32,
        num_parts: split.list.num_parts as i32,
        spare_parts: split.spare_parts as i32,
        min_tokens: MIN_TOKENS as i32,
        fixed_tokens: split.fixed_tokens as i32,
        max_parts: split.max_parts as i32,
        num_kv_heads: split.list.num_kv_heads as i32,
        merge_tokens: MERGE_TOKENS,
    }
}

/// The lengths of a sequence of the batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lengths {
    pub(super) q_len: i64,
    pub(super) kv_len: i64,
}

/// The work list of one class, as `kernels/plan.cu` makes it.
pub(super) fn work_list(
    class: &hkv_plan_class,
    window: &hkv_window,
    batch: &[Lengths],
) -> Vec<hkv_part> {
    let tokens: Vec<i64> = batch.iter().map(|&lengths| visible_tokens(window, lengths)).collect();
    let (spare, min_tokens) = (i64::from(class.spare_parts), i64::from(class.min_tokens));
    let share = (tokens.iter().sum::<i64>() / spare).max(min_tokens);
    let parts_of = |tokens: i64| match i64::from(class.fixed_tokens) {
        0 => {
            let most = (tokens as f32 / class.merge_tokens).sqrt() as i64;
            (tokens / share).min(most).max(1)
        }
        fixed => ((tokens + fixed - 1) / fixed).clamp(1, class.max_parts.into()),
    };
    let parts = |seq: usize| {
        let count = parts_of(tokens[seq]) as i16;
        (0..count).map(move |index| hkv_part { seq: seq as i32, index, count })
    };
    let is_cut = |&seq: &usize| parts_of(tokens[seq]) > 1;
    let (cut, whole): (Vec<usize>, Vec<usize>) = (0..batch.len()).partition(is_cut);
    let mut list: Vec<hkv_part> = cut.into_iter().chain(whole).flat_map(parts).collect();
    list.resize(class.num_parts as usize, hkv_part { seq: 0, index: 0, count: 0 });
    list
}

/// Tokens that the queries of a sequence see together.
fn visible_tokens(window: &hkv_window, lengths: Lengths) -> i64 {
    if lengths.q_len <= 0 {
        return 0;
    }
    let end = lengths.kv_len.max(0);
    let first = (lengths.kv_len - lengths.q_len).max(0);
    let (extent, sinks) = (i64::from(window.extent).max(1), i64::from(window.sink_tokens));
    let (first_key, sinks) = match window.kind as u32 {
        abi::HKV_LAYER_SLIDING => ((first - extent + 1).max(0), sinks),
        abi::HKV_LAYER_CHUNKED => (first - first % extent, sinks),
        _ => (0, 0),
    };
    sinks.min(end) + (end - first_key.max(sinks)).max(0)
}

#[cfg(test)]
mod tests {
    use super::super::checks;
    use super::super::split::{Bounds, tests::gpu};
    use super::*;
    use crate::device::Device;
    use proptest::prelude::*;

    fn window(kind: u32, extent: i32, sink_tokens: i32) -> hkv_window {
        let kind = kind as i32;
        hkv_window { kind, extent, sink_tokens, group: 0, layer_slot: 0, reserved: [0; 3] }
    }

    fn class_of(bounds: Bounds, batch_invariant: bool) -> (PlanSplit, hkv_plan_class) {
        let split = PlanSplit::new(bounds, batch_invariant, &gpu(132));
        (split, plan_class(&split, 0, 0))
    }

    /// Parts of every sequence, in the order of the list; what comes before what is asserted.
    fn counts(list: &[hkv_part], seqs: usize) -> Vec<i16> {
        let used = list.iter().take_while(|part| part.count > 0).count();
        assert!(list[used..].iter().all(|part| part.count == 0), "empty entries come last");
        let cut = list.iter().take_while(|part| part.count > 1).count();
        assert!(list[cut..].iter().all(|part| part.count < 2), "cut sequences come first");
        let mut counts = vec![0; seqs];
        for part in &list[..used] {
            let next = &mut counts[part.seq as usize];
            assert_eq!(part.index, *next, "the parts of a sequence in order, none twice: {part:?}");
            *next += 1;
        }
        for pair in list[..used].windows(2) {
            assert!(pair[0].index + 1 == pair[0].count || pair[1].seq == pair[0].seq, "{pair:?}");
        }
        for part in &list[..used] {
            assert_eq!(part.count, counts[part.seq as usize], "{part:?}");
        }
        counts
    }

    fn lengths() -> impl Strategy<Value = Vec<Lengths>> {
        let kv_len =
            prop_oneof![0i64..70, 0i64..5000, Just(0), 90_000i64..200_000, Just(i32::MAX as i64)];
        let one = (0i64..6, kv_len).prop_map(|(q_len, kv_len)| Lengths { q_len, kv_len });
        prop::collection::vec(one, 1..40)
    }

    proptest! {
        /// Whatever the lengths, and whatever the bounds said of them.
        #[test]
        fn every_sequence_has_all_its_parts_once(
            batch in lengths(), kind in 0u32..3, extent in 1i32..3000, sinks in 0i32..90,
            heads in 1u32..40, max_kv_len in prop_oneof![0u32..300, 0u32..1 << 20],
            batch_invariant in any::<bool>(),
        ) {
            let num_seqs = batch.len() as u32;
            let bounds = Bounds { num_seqs, num_kv_heads: heads, max_kv_len, ctas_per_sm: 2 };
            let (split, class) = class_of(bounds, batch_invariant);
            let window = window(kind, extent, sinks);
            let list = work_list(&class, &window, &batch);
            prop_assert_eq!(list.len(), split.list.num_parts as usize, "the list has room for all");
            check_work_list(&list, num_seqs).unwrap();
            let counts = counts(&list, batch.len());
            let cut: i64 = counts.iter().filter(|&&n| n > 1).map(|&n| i64::from(n)).sum();
            prop_assert!(cut <= i64::from(split.list.cut_parts));

            let tokens: Vec<i64> = batch.iter().map(|&l| visible_tokens(&window, l)).collect();
            let total: i64 = tokens.iter().sum();
            let share = (total / i64::from(split.spare_parts)).max(128) as f64;
            for (&n, &count) in tokens.iter().zip(&counts) {
                prop_assert!(count >= 1);
                if batch_invariant {
                    let alone = ((n + 4095) / 4096).clamp(1, split.max_parts.into());
                    prop_assert_eq!(i64::from(count), alone);
                } else {
                    let part = n as f64 / f64::from(count);
                    // What is not cut to the measure would cost more to merge.
                    let merged = 2.0 * (8.0 * n as f64).sqrt();
                    prop_assert!(part < (2.0 * share + 2.0).max(merged), "{part}, share {share}");
                    prop_assert!(count == 1 || part >= share, "{part} tokens, share {share}");
                }
            }
        }

        /// Windows, chunks and sinks count what some query sees.
        #[test]
        fn visible_tokens_are_those_that_a_query_sees(
            q_len in 0i64..9, kv_len in 0i64..300, kind in 0u32..3, extent in 1i32..100,
            sinks in 0i32..90,
        ) {
            let window = window(kind, extent, sinks);
            let extent = i64::from(extent);
            let sees = |i: i64, j: i64| j <= i && (j < i64::from(sinks) || match kind {
                abi::HKV_LAYER_SLIDING => i - j < extent,
                abi::HKV_LAYER_CHUNKED => i / extent == j / extent,
                _ => true,
            });
            let queries = (kv_len - q_len).max(0)..if q_len > 0 { kv_len } else { 0 };
            let seen = (0..kv_len).filter(|&j| queries.clone().any(|i| sees(i, j))).count();
            let found = visible_tokens(&window, Lengths { q_len, kv_len });
            prop_assert_eq!(found, seen as i64);
        }
    }

    /// Lengths of so many sequences: short ones, now and then a long one, some without new tokens.
    fn random_batch(seqs: usize, state: &mut u64) -> Vec<Lengths> {
        let mut draw = |below: u64| {
            *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((*state >> 33) % below) as i64
        };
        let one = |_| {
            let most = match draw(16) {
                0 => i32::MAX as u64,
                1 => 400_000,
                2..6 => 200,
                _ => 5000,
            };
            Lengths { kv_len: draw(most), q_len: draw(4) }
        };
        (0..seqs).map(one).collect()
    }

    /// On every device at hand: on a GPU, the kernel against the code above.
    #[test]
    fn launches_make_the_same_lists() {
        let gpu = Device::cuda(0).and_then(|device| Kernels::load(&device));
        if let Err(error) = &gpu {
            eprintln!("SKIPPED on a GPU: {error}");
        }
        let windows = [
            window(abi::HKV_LAYER_FULL, 0, 70),
            window(abi::HKV_LAYER_SLIDING, 1000, 4),
            window(abi::HKV_LAYER_CHUNKED, 8192, 0),
        ];
        let mut state = 1;
        for kernels in [Kernels::load(&Device::cpu()), gpu].into_iter().flatten() {
            let device = kernels.device();
            let stream = device.stream().unwrap();
            let rows = device.upload(&windows).unwrap();
            let sizes = [1, 2, 31, 32, 33, 256, 1000, 1024, 1025, 2049, 4095, 4096];
            for (seqs, batch_invariant) in sizes.map(|n| [(n, false), (n, true)]).concat() {
                let batch = random_batch(seqs, &mut state);
                let mut indptr = vec![0];
                indptr.extend(batch.iter().scan(0, |end, lengths| {
                    *end += lengths.q_len as i32;
                    Some(*end)
                }));
                let kv_len: Vec<i32> = batch.iter().map(|lengths| lengths.kv_len as i32).collect();
                let (indptr, kv_len) = (device.upload(&indptr), device.upload(&kv_len));
                let (indptr, kv_len) = (indptr.unwrap(), kv_len.unwrap());
                let mut class = checks::tests::args();
                class.num_seqs = seqs as u32;
                (class.qo_indptr, class.kv_len) = (indptr.span(), kv_len.span());
                class.windows.rows = rows.span();
                class.windows.num_layers = 3;
                class.kv.shape.num_kv_heads = 1 + seqs as u32 % 3;
                class.num_qo_heads = class.kv.shape.num_kv_heads;
                let classes = [0, 1, 2].map(|layer| AttentionArgs {
                    layer,
                    max_kv_len: [1 << 20, 1004, 300_000][layer as usize],
                    ..class
                });
                let mut args =
                    PlanArgs { classes: &classes, batch_invariant, memory: Span::default() };
                let bytes = kernels.plan_bytes(&args).unwrap() as usize;
                let memory = device.upload(&vec![u8::MAX; bytes]).unwrap();
                args.memory = memory.span();
                // SAFETY: the lengths and the memory outlive the synchronisation.
                unsafe { kernels.plan(&args, stream.as_ref()).unwrap() };
                stream.as_ref().synchronize().unwrap();
                let words: Vec<i32> = memory.download().unwrap();
                for (index, of) in classes.iter().enumerate() {
                    let plan = kernels.planned(&args, index).unwrap().unwrap();
                    let split =
                        PlanSplit::new(of.bounds(device.info()), batch_invariant, device.info());
                    let class = plan_class(&split, of.layer, plan.memory.address);
                    let list = work_list(&class, &windows[index], &batch);
                    let start = (plan.memory.address - memory.address()) as usize / 4;
                    let (found, counters) = words[start..].split_at(2 * list.len());
                    for (entry, (part, found)) in list.iter().zip(found.chunks(2)).enumerate() {
                        let word = i32::from(part.count) << 16 | i32::from(part.index);
                        assert_eq!(
                            found,
                            [part.seq, word],
                            "{seqs} sequences, class {index}, entry {entry} of {}: {part:?}",
                            list.len()
                        );
                    }
                    let cut = list.iter().filter(|part| part.count > 1).count();
                    let used = cut * of.kv.shape.num_kv_heads as usize;
                    assert!(counters[..used].iter().all(|&count| count == 0), "{seqs}, {index}");
                }
            }
        }
    }

    #[test]
    fn wrong_work_lists_are_found() {
        let list = |parts: &[(i32, i16, i16)]| -> Vec<hkv_part> {
            parts.iter().map(|&(seq, index, count)| hkv_part { seq, index, count }).collect()
        };
        let right = [
            (1, 0, 2),
            (1, 1, 2),
            (3, 0, 3),
            (3, 1, 3),
            (3, 2, 3),
            (0, 0, 1),
            (2, 0, 1),
            (0, 0, 0),
        ];
        check_work_list(&list(&right), 4).unwrap();
        for (words, change) in [
            ("is not the next part", (1, (1, 0, 2))),
            ("is not the next part", (3, (3, 1, 2))),
            ("is not the next part", (1, (2, 1, 2))),
            ("is not the first part", (5, (0, 1, 1))),
            ("is not the first part", (5, (0, 0, -1))),
            ("of no sequence", (5, (4, 0, 1))),
            ("of no sequence", (5, (-1, 0, 1))),
            ("came before", (6, (3, 0, 1))),
            ("lacks sequence 2", (6, (0, 0, 0))),
            ("after a sequence of fewer parts", (7, (2, 0, 2))),
        ] {
            let mut parts = right;
            parts[change.0] = change.1;
            let error = check_work_list(&list(&parts), 4).expect_err(words).to_string();
            assert!(error.contains(words), "{words:?} is not in {error}");
        }
        assert!(check_work_list(&[], 1).is_err());
        let cut_short = check_work_list(&list(&right[..4]), 4).expect_err("the end is missing");
        assert!(cut_short.to_string().contains("is not the last part"), "{cut_short}");
    }

    #[test]
    fn a_long_sequence_among_short_ones_is_cut_to_their_measure() {
        let bounds = Bounds { num_seqs: 256, num_kv_heads: 8, max_kv_len: 1 << 20, ctas_per_sm: 2 };
        let (_, class) = class_of(bounds, false);
        let mut batch = vec![Lengths { q_len: 1, kv_len: 2048 }; 256];
        batch[7].kv_len = 1 << 20;
        let full = window(abi::HKV_LAYER_FULL, 0, 0);
        let found = counts(&work_list(&class, &full, &batch), 256);
        // 66 shares of 23 800 tokens.
        assert_eq!(found[7], 44);
        assert!(found.iter().enumerate().all(|(seq, &n)| n == 1 || seq == 7));
        let windowed = window(abi::HKV_LAYER_SLIDING, 1024, 0);
        assert!(counts(&work_list(&class, &windowed, &batch), 256).iter().all(|&n| n == 1));
    }
}
