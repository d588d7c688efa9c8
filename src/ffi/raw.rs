//! What callers of the C ABI hand over, as Rust: handles, arguments, arrays, strings. What can be seen to be wrong
//! is refused; that pointers point to what the header says is the caller's promise.

use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;

use super::header::HKV_ABI_VERSION;
use crate::error::{Error, Result};

/// Makes an object and hands its handle to the caller; on failure the handle is null.
///
/// # Safety
/// `handle` is null or can be written.
pub(super) unsafe fn hand_out<T>(
    handle: *mut *mut T,
    make: impl FnOnce() -> Result<T>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let handle = unsafe { handle.as_mut() };
    let handle =
        handle.ok_or_else(|| Error::invalid("hybridkv", "the place for the handle is null"))?;
    *handle = null_mut();
    *handle = Box::into_raw(Box::new(make()?));
    Ok(())
}

/// Drops what [`hand_out`] made.
///
/// # Safety
/// `handle` is null, or was handed out and not taken back yet.
pub(super) unsafe fn take_back<T>(handle: *mut T) {
    if !handle.is_null() {
        // Nobody can be told of a panic here, and none may leave.
        // SAFETY: the caller's promise.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(unsafe { Box::from_raw(handle) })));
    }
}

/// # Safety
/// `handle` is null, or was handed out and lives as long as the reference is used.
pub(super) unsafe fn handle<'a, T>(
    op: &'static str,
    what: &str,
    handle: *const T,
) -> Result<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { handle.as_ref() }.ok_or_else(|| Error::invalid(op, format!("{what} is null")))
}

/// The arguments of an operation, if they are of the size that this library knows.
///
/// # Safety
/// `args` is null, or points to as many bytes as its first field says.
pub(super) unsafe fn arguments<'a, T: Arguments>(
    op: &'static str,
    args: *const T,
) -> Result<&'a T> {
    if args.is_null() || !args.is_aligned() {
        return Err(Error::invalid(op, "args is null or misaligned"));
    }
    // SAFETY: the first field is there, whatever version of the header the caller was compiled with.
    let bytes = unsafe { args.cast::<u64>().read() };
    if bytes != size_of::<T>() as u64 {
        return Err(Error::invalid(
            op,
            format!(
                "args->struct_bytes is {bytes}, this library's is {}: set it to sizeof(*args), and \
                 compile with the header of the library (ABI version {HKV_ABI_VERSION})",
                size_of::<T>()
            ),
        ));
    }
    // SAFETY: the memory is as large as the struct, and every bit pattern is one.
    Ok(unsafe { &*args })
}

/// Argument structs: plain data whose first field is a `u64` with the size of the struct.
///
/// # Safety
/// That is so.
pub(super) unsafe trait Arguments: Copy {}

/// # Safety
/// `place` is null, or can be written, by nobody else, while the reference is used.
pub(super) unsafe fn out<'a, T>(op: &'static str, what: &str, place: *mut T) -> Result<&'a mut T> {
    // SAFETY: the caller's promise.
    unsafe { place.as_mut() }.ok_or_else(|| Error::invalid(op, format!("{what} is null")))
}

pub(super) fn length<T>(op: &'static str, what: &str, data: *const T, len: u64) -> Result<usize> {
    if len > 0 && (data.is_null() || !data.is_aligned()) {
        return Err(Error::invalid(op, format!("{what} is null or misaligned")));
    }
    usize::try_from(len)
        .ok()
        .filter(|len| len.checked_mul(size_of::<T>()).is_some_and(|n| n <= isize::MAX as usize))
        .ok_or_else(|| Error::invalid(op, format!("{len} {what} are more than memory")))
}

/// # Safety
/// `data` is null, or `len` elements from it on can be read while the slice is used.
pub(super) unsafe fn array<'a, T>(
    op: &'static str,
    what: &str,
    data: *const T,
    len: u64,
) -> Result<&'a [T]> {
    match length(op, what, data, len)? {
        0 => Ok(&[]),
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        len => Ok(unsafe { std::slice::from_raw_parts(data, len) }),
    }
}

/// # Safety
/// `data` is null, or `len` elements from it on can be written while the slice is used.
pub(super) unsafe fn array_mut<'a, T>(
    op: &'static str,
    what: &str,
    data: *mut T,
    len: u64,
) -> Result<&'a mut [T]> {
    match length(op, what, data, len)? {
        0 => Ok(&mut []),
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        len => Ok(unsafe { std::slice::from_raw_parts_mut(data, len) }),
    }
}

/// A string; empty when it is null.
///
/// # Safety
/// `text` is null, or ends with a zero and lives as long as the reference is used.
pub(super) unsafe fn text<'a>(
    op: &'static str,
    what: &str,
    text: *const c_char,
) -> Result<&'a str> {
    if text.is_null() {
        return Ok("");
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }
        .to_str()
        .map_err(|_| Error::invalid(op, format!("{what} is no UTF-8")))
}
