//! Mirror of kernels/abi/*.h: parameter blocks and shared vocabulary of kernels and launchers.
#![allow(missing_docs, non_camel_case_types)]

use std::ffi::c_void;

pub const HKV_DTYPE_BF16: u32 = 0;
pub const HKV_DTYPE_F16: u32 = 1;
pub const HKV_DTYPE_F32: u32 = 2;
pub const HKV_LAYER_FULL: u32 = 0;
pub const HKV_LAYER_SLIDING: u32 = 1;
pub const HKV_LAYER_CHUNKED: u32 = 2;

#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct hkv_window {
    pub kind: i32,
    pub extent: i32,
    pub sink_tokens: i32,
    pub group: i32,
    pub layer_slot: i32,
    pub reserved: [i32; 3],
}

#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct hkv_copy {
    pub src: *const c_void,
    pub dst: *mut c_void,
    pub bytes: u64,
}
