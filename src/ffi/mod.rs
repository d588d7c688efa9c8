//! The C ABI declared by include/hybridkv.h: handles, argument structs, status codes.
//!
//! Every function turns its arguments into those of [`ops`](crate::ops) and passes them on; checking is
//! done there. No panic and no borrowed memory crosses this border.

#![allow(non_camel_case_types, reason = "the names are those of the header")]

mod codecs;
mod config;
mod header;
mod manager;
mod movement;
mod raw;
mod sequences;
mod watch;

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::abi::{HKV_DTYPE_BF16, HKV_DTYPE_E4M3, HKV_DTYPE_F16, HKV_DTYPE_F32};
use crate::device::{Device, Span};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{Dtype, KvScales, KvShape, KvStrides, KvView};
use crate::ops::{
    AppendArgs, AttentionArgs, BlockTables, CtaQuota, HeadStrides, Kernels, MergeArgs, MoveArgs,
    MoveShape, Plan, PlanArgs, WindowTable, WorkList,
};
use header::*;
use raw::{Arguments, arguments, hand_out, handle, take_back};

/// An open device.
struct hkv_device {
    device: Device,
    name: CString,
}

/// The loaded kernels of a device.
struct hkv_kernels {
    kernels: Arc<Kernels>,
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function of the ABI: a failure becomes a status and the thread's last error.
fn guard(body: impl FnOnce() -> Result<()>) -> hkv_status {
    let (status, message) = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return HKV_OK,
        Ok(Err(error)) => (status(error.kind()), error.to_string()),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
            (HKV_INTERNAL_ERROR, format!("a bug of hybridkv, please report it: {text}"))
        }
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // A thread that is going down has no last error any more.
    let _ = LAST_ERROR.try_with(|last| last.replace(message));
    status
}

fn status(kind: &ErrorKind) -> hkv_status {
    match kind {
        ErrorKind::Unsupported { .. } => HKV_UNSUPPORTED,
        ErrorKind::NoDriver | ErrorKind::DriverTooOld { .. } => HKV_NO_DRIVER,
        ErrorKind::NoDevice { .. } => HKV_NO_DEVICE,
        ErrorKind::NoKernels | ErrorKind::NoKernelImage { .. } => HKV_NO_KERNELS,
        ErrorKind::OutOfMemory { .. } => HKV_OUT_OF_MEMORY,
        ErrorKind::Cuda { .. } => HKV_CUDA_ERROR,
        ErrorKind::NoFreeBlocks { .. } | ErrorKind::NoHostSlots { .. } => HKV_NO_BLOCKS,
        ErrorKind::NotReady { .. } => HKV_NOT_READY,
        ErrorKind::Corrupt(_) => HKV_CORRUPT,
        _ => HKV_INVALID_ARGUMENT,
    }
}

#[unsafe(no_mangle)]
extern "C" fn hkv_abi_version() -> u32 {
    HKV_ABI_VERSION
}

#[unsafe(no_mangle)]
extern "C" fn hkv_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

#[unsafe(no_mangle)]
extern "C" fn hkv_status_name(status: hkv_status) -> *const c_char {
    let name = match status {
        HKV_OK => c"HKV_OK",
        HKV_INVALID_ARGUMENT => c"HKV_INVALID_ARGUMENT",
        HKV_UNSUPPORTED => c"HKV_UNSUPPORTED",
        HKV_NO_DRIVER => c"HKV_NO_DRIVER",
        HKV_NO_DEVICE => c"HKV_NO_DEVICE",
        HKV_NO_KERNELS => c"HKV_NO_KERNELS",
        HKV_OUT_OF_MEMORY => c"HKV_OUT_OF_MEMORY",
        HKV_CUDA_ERROR => c"HKV_CUDA_ERROR",
        HKV_INTERNAL_ERROR => c"HKV_INTERNAL_ERROR",
        HKV_NO_BLOCKS => c"HKV_NO_BLOCKS",
        HKV_NOT_READY => c"HKV_NOT_READY",
        HKV_CORRUPT => c"HKV_CORRUPT",
        _ => c"unknown status",
    };
    name.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn hkv_last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_device_cpu(device: *mut *mut hkv_device) -> hkv_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { hand_out(device, || Ok(hkv_device::new(Device::cpu()))) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_device_cuda(ordinal: u32, device: *mut *mut hkv_device) -> hkv_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { hand_out(device, || Device::cuda(ordinal as usize).map(hkv_device::new)) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_device_destroy(device: *mut hkv_device) {
    // SAFETY: the caller's promise.
    unsafe { take_back(device) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_device_name(device: *const hkv_device) -> *const c_char {
    // SAFETY: the caller's promise: a live handle or null.
    unsafe { device.as_ref() }.map_or(c"".as_ptr(), |device| device.name.as_ptr())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_kernels_load(
    device: *const hkv_device,
    kernels: *mut *mut hkv_kernels,
) -> hkv_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let device = handle("hkv_kernels_load", "device", device)?;
        hand_out(kernels, || Ok(hkv_kernels::new(Kernels::load(&device.device)?)))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_kernels_load_checked(
    device: *const hkv_device,
    kernels: *mut *mut hkv_kernels,
) -> hkv_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let device = handle("hkv_kernels_load_checked", "device", device)?;
        hand_out(kernels, || Ok(hkv_kernels::new(Kernels::load(&device.device)?.checked())))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_kernels_destroy(kernels: *mut hkv_kernels) {
    // SAFETY: the caller's promise.
    unsafe { take_back(kernels) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_append(
    kernels: *const hkv_kernels,
    args: *const hkv_append_args,
    stream: *mut c_void,
) -> hkv_status {
    const OP: &str = "hkv_append";
    // SAFETY: the caller's promise: handles are live, memory is valid until the stream has passed.
    guard(|| unsafe {
        let kernels = &handle(OP, "kernels", kernels)?.kernels;
        let args = arguments(OP, args)?.to_ops()?;
        kernels.append(&args, kernels.device().foreign_stream(stream))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_attention_workspace(
    kernels: *const hkv_kernels,
    args: *const hkv_attention_args,
    bytes: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_attention_workspace";
    // SAFETY: the caller's promise: handles are live, `bytes` is null or can be written.
    guard(|| unsafe {
        let kernels = &handle(OP, "kernels", kernels)?.kernels;
        let args = arguments(OP, args)?.to_ops()?;
        let bytes = bytes.as_mut().ok_or_else(|| Error::invalid(OP, "bytes is null"))?;
        *bytes = kernels.attention_workspace_bytes(&args)?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_plan_memory(
    kernels: *const hkv_kernels,
    args: *const hkv_plan_args,
    bytes: *mut u64,
) -> hkv_status {
    const OP: &str = "hkv_plan_memory";
    // SAFETY: the caller's promise: handles are live, the classes are there, `bytes` is null or can be written.
    guard(|| unsafe {
        let kernels = &handle(OP, "kernels", kernels)?.kernels;
        let args = arguments(OP, args)?;
        let bytes = bytes.as_mut().ok_or_else(|| Error::invalid(OP, "bytes is null"))?;
        *bytes = kernels.plan_bytes(&args.to_ops(&args.classes(OP)?))?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_plan(
    kernels: *const hkv_kernels,
    args: *const hkv_plan_args,
    stream: *mut c_void,
) -> hkv_status {
    const OP: &str = "hkv_plan";
    // SAFETY: as for `hkv_append` and `hkv_plan_memory`.
    guard(|| unsafe {
        let kernels = &handle(OP, "kernels", kernels)?.kernels;
        let args = arguments(OP, args)?;
        let classes = args.classes(OP)?;
        kernels.plan(&args.to_ops(&classes), kernels.device().foreign_stream(stream))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_planned(
    kernels: *const hkv_kernels,
    args: *const hkv_plan_args,
    index: u32,
    plan: *mut hkv_class_plan,
) -> hkv_status {
    const OP: &str = "hkv_planned";
    // SAFETY: as for `hkv_plan_memory`; `plan` is null or can be written.
    guard(|| unsafe {
        let kernels = &handle(OP, "kernels", kernels)?.kernels;
        let args = arguments(OP, args)?;
        let plan = plan.as_mut().ok_or_else(|| Error::invalid(OP, "plan is null"))?;
        let planned = kernels.planned(&args.to_ops(&args.classes(OP)?), index as usize)?;
        *plan = hkv_class_plan::of(planned);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_attention(
    kernels: *const hkv_kernels,
    args: *const hkv_attention_args,
    stream: *mut c_void,
) -> hkv_status {
    const OP: &str = "hkv_attention";
    // SAFETY: as for `hkv_append`.
    guard(|| unsafe {
        let kernels = &handle(OP, "kernels", kernels)?.kernels;
        let args = arguments(OP, args)?.to_ops()?;
        kernels.attention(&args, kernels.device().foreign_stream(stream))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_merge_states(
    kernels: *const hkv_kernels,
    args: *const hkv_merge_args,
    stream: *mut c_void,
) -> hkv_status {
    const OP: &str = "hkv_merge_states";
    // SAFETY: as for `hkv_append`.
    guard(|| unsafe {
        let kernels = &handle(OP, "kernels", kernels)?.kernels;
        let args = arguments(OP, args)?.to_ops()?;
        kernels.merge_states(&args, kernels.device().foreign_stream(stream))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hkv_move_blocks(
    kernels: *const hkv_kernels,
    args: *const hkv_move_args,
    stream: *mut c_void,
) -> hkv_status {
    const OP: &str = "hkv_move_blocks";
    // SAFETY: as for `hkv_append`.
    guard(|| unsafe {
        let kernels = &handle(OP, "kernels", kernels)?.kernels;
        let args = arguments(OP, args)?;
        let args = args.to_ops(movement::shape(args.blocks));
        kernels.move_blocks(&args, kernels.device().foreign_stream(stream))
    })
}

impl hkv_device {
    fn new(device: Device) -> Self {
        let name = CString::new(device.info().name.replace('\0', " ")).unwrap_or_default();
        Self { device, name }
    }
}

impl hkv_kernels {
    fn new(kernels: Kernels) -> Self {
        Self { kernels: Arc::new(kernels) }
    }
}

// SAFETY: `struct_bytes` is the first field.
unsafe impl Arguments for hkv_append_args {}
// SAFETY: as above.
unsafe impl Arguments for hkv_attention_args {}
// SAFETY: as above.
unsafe impl Arguments for hkv_plan_args {}
// SAFETY: as above.
unsafe impl Arguments for hkv_merge_args {}
// SAFETY: as above.
unsafe impl Arguments for hkv_move_args {}

impl hkv_span {
    fn to_ops(self) -> Span {
        Span::new(self.data as u64, self.bytes)
    }

    /// `None` for a null pointer: not given.
    fn given(self) -> Option<Span> {
        (!self.data.is_null()).then(|| self.to_ops())
    }
}

impl hkv_head_strides {
    fn to_ops(self) -> HeadStrides {
        HeadStrides { token: self.token, head: self.head }
    }
}

fn dtype(code: u32, what: &'static str) -> Result<Dtype> {
    match code {
        HKV_DTYPE_BF16 => Ok(Dtype::Bf16),
        HKV_DTYPE_F16 => Ok(Dtype::F16),
        HKV_DTYPE_F32 => Ok(Dtype::F32),
        HKV_DTYPE_E4M3 => Ok(Dtype::E4m3),
        _ => Err(Error::unsupported("hybridkv", what, code, "the values of enum hkv_dtype")),
    }
}

fn quota(max_ctas: u32) -> CtaQuota {
    match max_ctas {
        0 => CtaQuota::WHOLE_DEVICE,
        ctas => CtaQuota::at_most(ctas),
    }
}

impl hkv_kv {
    fn to_ops(self) -> Result<KvView> {
        Ok(KvView {
            k: self.k.to_ops(),
            v: self.v.to_ops(),
            strides: KvStrides {
                block: self.stride_block,
                layer: self.stride_layer,
                head: self.stride_head,
                token: self.stride_token,
            },
            shape: KvShape {
                num_kv_heads: self.num_kv_heads,
                head_dim: self.head_dim,
                dtype: dtype(self.dtype, "kv.dtype")?,
            },
            block_size: self.block_size,
            num_blocks: self.num_blocks,
            num_layer_slots: self.num_layer_slots,
            scales: self.scales()?,
        })
    }
}

impl hkv_kv {
    /// Scales, if both are given; one alone is none at all.
    fn scales(&self) -> Result<Option<KvScales>> {
        let strides = KvStrides {
            block: self.scale_stride_block,
            layer: self.scale_stride_layer,
            head: self.scale_stride_head,
            token: self.scale_stride_token,
        };
        match (self.k_scale.given(), self.v_scale.given()) {
            (Some(k), Some(v)) => Ok(Some(KvScales { k, v, strides })),
            (None, None) => Ok(None),
            _ => Err(Error::invalid("hybridkv", "one of kv.k_scale and kv.v_scale is null")),
        }
    }
}

impl hkv_append_args {
    fn to_ops(self) -> Result<AppendArgs> {
        Ok(AppendArgs {
            k_new: self.k_new.to_ops(),
            v_new: self.v_new.to_ops(),
            dtype: dtype(self.dtype, "dtype")?,
            new_strides: self.new_strides.to_ops(),
            kv: self.kv.to_ops()?,
            slot_mapping: self.slot_mapping.to_ops(),
            num_groups: self.num_groups,
            windows: WindowTable { rows: self.windows.to_ops(), num_layers: self.num_layers },
            layer: self.layer,
            num_tokens: self.num_tokens,
        })
    }
}

impl hkv_attention_args {
    fn to_ops(self) -> Result<AttentionArgs> {
        Ok(AttentionArgs {
            q: self.q.to_ops(),
            q_strides: self.q_strides.to_ops(),
            out: self.out.to_ops(),
            out_strides: self.out_strides.to_ops(),
            dtype: dtype(self.dtype, "dtype")?,
            lse: self.lse.given(),
            kv: self.kv.to_ops()?,
            sealed: None,
            qo_indptr: self.qo_indptr.to_ops(),
            kv_len: self.kv_len.to_ops(),
            tables: BlockTables {
                block_ids: self.block_ids.to_ops(),
                block_row: self.block_row.to_ops(),
                first_block: self.first_block.given(),
                num_groups: self.num_groups,
            },
            windows: WindowTable { rows: self.windows.to_ops(), num_layers: self.num_layers },
            layer: self.layer,
            sink_logits: self.sink_logits.given(),
            tree_mask: self.tree_mask.given(),
            plan: self.plan.to_ops(),
            num_qo_heads: self.num_qo_heads,
            num_seqs: self.num_seqs,
            num_tokens: self.num_tokens,
            max_q_len: self.max_q_len,
            max_kv_len: self.max_kv_len,
            sm_scale: self.sm_scale,
            logits_soft_cap: self.logits_soft_cap,
            workspace: self.workspace.to_ops(),
        })
    }
}

impl hkv_class_plan {
    fn of(plan: Option<Plan>) -> Self {
        let list = plan.map(|plan| plan.list);
        let memory = plan.map_or(Span::default(), |plan| plan.memory);
        Self {
            memory: hkv_span { data: memory.address as *mut c_void, bytes: memory.bytes },
            num_seqs: list.map_or(0, |list| list.num_seqs),
            num_kv_heads: list.map_or(0, |list| list.num_kv_heads),
            num_parts: list.map_or(0, |list| list.num_parts),
            cut_parts: list.map_or(0, |list| list.cut_parts),
            reads_early: plan.is_some_and(|plan| plan.reads_early).into(),
            reserved: 0,
        }
    }

    fn to_ops(self) -> Option<Plan> {
        self.memory.given().map(|memory| Plan {
            list: WorkList {
                num_seqs: self.num_seqs,
                num_kv_heads: self.num_kv_heads,
                num_parts: self.num_parts,
                cut_parts: self.cut_parts,
            },
            memory,
            reads_early: self.reads_early != 0,
        })
    }
}

impl hkv_plan_args {
    /// The arguments of every class.
    ///
    /// # Safety
    /// `classes` is null, or an array of as many as `num_classes` says, each as large as its first field says.
    unsafe fn classes(&self, op: &'static str) -> Result<Vec<AttentionArgs>> {
        (0..self.num_classes as usize)
            .map(|index| {
                // SAFETY: the caller's promise; the first one shows whether there is an array.
                unsafe { arguments(op, self.classes.wrapping_add(index))? }.to_ops()
            })
            .collect()
    }

    fn to_ops<'a>(self, classes: &'a [AttentionArgs]) -> PlanArgs<'a> {
        let batch_invariant = self.batch_invariant != 0;
        PlanArgs { classes, batch_invariant, memory: self.memory.to_ops() }
    }
}

impl hkv_merge_args {
    fn to_ops(self) -> Result<MergeArgs> {
        Ok(MergeArgs {
            states: self.states.to_ops(),
            state_lse: self.state_lse.to_ops(),
            in_dtype: dtype(self.in_dtype, "in_dtype")?,
            out: self.out.to_ops(),
            out_strides: self.out_strides.to_ops(),
            out_dtype: dtype(self.out_dtype, "out_dtype")?,
            lse: self.lse.given(),
            sink_logits: self.sink_logits.given(),
            live_tokens: self.live_tokens.given(),
            num_states: self.num_states,
            num_tokens: self.num_tokens,
            num_qo_heads: self.num_qo_heads,
            head_dim: self.head_dim,
        })
    }
}

impl hkv_move_args {
    fn to_ops(self, shape: MoveShape) -> MoveArgs {
        MoveArgs {
            copies: self.copies.to_ops(),
            num_copies: self.num_copies,
            shape,
            quota: quota(self.max_ctas),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn last_error() -> String {
        // SAFETY: the pointer is to the thread's last error, which does not change meanwhile.
        unsafe { CStr::from_ptr(hkv_last_error()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn a_panic_stays_inside() {
        assert_eq!(guard(|| panic!("on {}", "purpose")), HKV_INTERNAL_ERROR);
        assert!(last_error().ends_with("on purpose"), "{}", last_error());
        assert_eq!(guard(|| Ok(())), HKV_OK);
        assert!(last_error().ends_with("on purpose"), "a success leaves the last error alone");
    }

    #[test]
    fn errors_are_per_thread_and_may_hold_zero_bytes() {
        let failed = guard(|| Err(Error::invalid("test", "a\0b")));
        assert_eq!((failed, last_error().as_str()), (HKV_INVALID_ARGUMENT, "test: a b"));
        let other = std::thread::spawn(last_error).join().unwrap();
        assert_eq!(other, "");
    }

    #[test]
    fn every_status_has_its_name() {
        for status in HKV_OK..=HKV_CORRUPT {
            // SAFETY: a static string.
            let name = unsafe { CStr::from_ptr(hkv_status_name(status)) }.to_string_lossy();
            let declared = include_str!("../../include/hybridkv.h")
                .lines()
                .any(|line| line.trim_start().starts_with(&format!("{name} = {status},")));
            assert!(declared, "{name} = {status}");
        }
    }
}
