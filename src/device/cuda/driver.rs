//! The CUDA driver library: found at run time, every symbol resolved before its first use.
//!
//! cudarc supplies the types and the search for libcuda. Its own wrappers are not used: they panic on a
//! missing symbol, and they return results as a Rust enum, which a newer driver's code would break.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::error::{Error, ErrorKind, Result};

pub(super) const OUT_OF_MEMORY: u32 = 2;
const NOT_INITIALIZED: u32 = 3;
const STUB_LIBRARY: u32 = 34;
pub(super) const NO_DEVICE: u32 = 100;
pub(super) const INVALID_IMAGE: u32 = 200;
pub(super) const NO_BINARY_FOR_GPU: u32 = 209;
pub(super) const UNSUPPORTED_PTX_VERSION: u32 = 222;
pub(super) const NOT_READY: u32 = 600;

/// A driver call that failed: its name and its `CUresult`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failure {
    pub call: &'static str,
    pub code: u32,
}

impl Failure {
    /// The typed error of this failure in the operation `op`.
    pub fn error(self, op: &'static str) -> Error {
        self.error_by(DRIVER.get(), op)
    }

    fn error_by(self, driver: Option<&Driver>, op: &'static str) -> Error {
        let name = driver.and_then(|d| d.text(d.error_name, self.code));
        let message = driver.and_then(|d| d.text(d.error_string, self.code));
        Error::new(
            op,
            ErrorKind::Cuda {
                call: self.call,
                code: self.code,
                name: name.unwrap_or_else(|| "an unknown result".into()),
                message: message.unwrap_or_else(|| "the driver has no description".into()),
            },
        )
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.error("cuda")
    }
}

type ErrorText = unsafe extern "C" fn(c_uint, *mut *const c_char) -> c_uint;

/// `cuMemcpyBatchAsync`, of CUDA 12.8 and up, whose arguments have changed since.
#[derive(Clone, Copy)]
pub(super) enum BatchCopy {
    Cuda12(
        unsafe extern "C" fn(
            *mut u64,
            *mut u64,
            *mut usize,
            usize,
            *mut sys::CUmemcpyAttributes,
            *mut usize,
            usize,
            *mut usize,
            sys::CUstream,
        ) -> c_uint,
    ),
    Cuda13(
        unsafe extern "C" fn(
            *mut u64,
            *mut u64,
            *mut usize,
            usize,
            *mut sys::CUmemcpyAttributes,
            *mut usize,
            usize,
            sys::CUstream,
        ) -> c_uint,
    ),
}

impl BatchCopy {
    /// # Safety
    /// libcuda is present.
    unsafe fn resolve() -> Option<Self> {
        // SAFETY: libcuda is present; the signatures are those of cuda.h for these names.
        unsafe {
            let newer = symbol("cuMemcpyBatchAsync_v2").map(Self::Cuda13);
            newer.or_else(|_| symbol("cuMemcpyBatchAsync").map(Self::Cuda12)).ok()
        }
    }
}

/// Declares the driver functions that the crate uses: a field with the resolved address, and a method
/// that calls it and names it in the failure.
macro_rules! driver_api {
    ($($method:ident = $symbol:ident($($argument:ident: $type:ty),*);)*) => {
        pub(super) struct Driver {
            error_name: ErrorText,
            error_string: ErrorText,
            /// Where the driver has it.
            pub memcpy_batch: Option<BatchCopy>,
            $($method: unsafe extern "C" fn($($type),*) -> c_uint,)*
        }

        impl Driver {
            fn resolve() -> Result<Self, &'static str> {
                // SAFETY: each symbol is given the C signature that cuda.h declares for it.
                unsafe {
                    Ok(Self {
                        error_name: symbol("cuGetErrorName")?,
                        error_string: symbol("cuGetErrorString")?,
                        memcpy_batch: BatchCopy::resolve(),
                        $($method: symbol(stringify!($symbol))?,)*
                    })
                }
            }

            $(
                /// The driver function, see cuda.h.
                ///
                /// # Safety
                /// As cuda.h says: pointers are valid, handles are live.
                #[allow(clippy::too_many_arguments, reason = "the signatures are cuda.h's")]
                pub unsafe fn $method(&self, $($argument: $type),*) -> Result<(), Failure> {
                    // SAFETY: passed on from the caller.
                    let code = unsafe { (self.$method)($($argument),*) };
                    if code == 0 {
                        return Ok(());
                    }
                    Err(Failure { call: stringify!($symbol), code })
                }
            )*
        }
    };
}

driver_api! {
    init = cuInit(flags: c_uint);
    driver_get_version = cuDriverGetVersion(version: *mut c_int);
    device_get_count = cuDeviceGetCount(count: *mut c_int);
    device_get = cuDeviceGet(device: *mut c_int, ordinal: c_int);
    device_get_name = cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int);
    device_get_attribute = cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int);
    device_get_pci_bus_id = cuDeviceGetPCIBusId(text: *mut c_char, length: c_int, device: c_int);
    device_total_mem = cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int);
    primary_ctx_retain = cuDevicePrimaryCtxRetain(context: *mut sys::CUcontext, device: c_int);
    primary_ctx_release = cuDevicePrimaryCtxRelease_v2(device: c_int);
    ctx_get_current = cuCtxGetCurrent(context: *mut sys::CUcontext);
    ctx_push_current = cuCtxPushCurrent_v2(context: sys::CUcontext);
    ctx_pop_current = cuCtxPopCurrent_v2(context: *mut sys::CUcontext);
    ctx_synchronize = cuCtxSynchronize();
    mem_get_info = cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    mem_alloc = cuMemAlloc_v2(address: *mut u64, bytes: usize);
    mem_free = cuMemFree_v2(address: u64);
    mem_host_register = cuMemHostRegister_v2(pointer: *mut c_void, bytes: usize, flags: c_uint);
    mem_host_unregister = cuMemHostUnregister(pointer: *mut c_void);
    mem_host_get_device_pointer =
        cuMemHostGetDevicePointer_v2(address: *mut u64, pointer: *mut c_void, flags: c_uint);
    memcpy_async = cuMemcpyAsync(dst: u64, src: u64, bytes: usize, stream: sys::CUstream);
    memcpy_2d_async = cuMemcpy2DAsync_v2(copy: *const sys::CUDA_MEMCPY2D, stream: sys::CUstream);
    memset_d8_async = cuMemsetD8Async(dst: u64, byte: u8, bytes: usize, stream: sys::CUstream);
    stream_create = cuStreamCreate(stream: *mut sys::CUstream, flags: c_uint);
    stream_destroy = cuStreamDestroy_v2(stream: sys::CUstream);
    stream_synchronize = cuStreamSynchronize(stream: sys::CUstream);
    stream_wait_event = cuStreamWaitEvent(stream: sys::CUstream, event: sys::CUevent, flags: c_uint);
    event_create = cuEventCreate(event: *mut sys::CUevent, flags: c_uint);
    event_destroy = cuEventDestroy_v2(event: sys::CUevent);
    event_record = cuEventRecord(event: sys::CUevent, stream: sys::CUstream);
    event_query = cuEventQuery(event: sys::CUevent);
    event_synchronize = cuEventSynchronize(event: sys::CUevent);
    event_elapsed_time = cuEventElapsedTime(ms: *mut f32, start: sys::CUevent, end: sys::CUevent);
    library_load_data = cuLibraryLoadData(
        library: *mut sys::CUlibrary,
        code: *const c_void,
        jit_options: *mut c_uint,
        jit_option_values: *mut *mut c_void,
        num_jit_options: c_uint,
        library_options: *mut c_uint,
        library_option_values: *mut *mut c_void,
        num_library_options: c_uint
    );
    library_unload = cuLibraryUnload(library: sys::CUlibrary);
    library_get_kernel = cuLibraryGetKernel(
        kernel: *mut sys::CUkernel,
        library: sys::CUlibrary,
        name: *const c_char
    );
    kernel_get_function = cuKernelGetFunction(function: *mut sys::CUfunction, kernel: sys::CUkernel);
    func_set_attribute = cuFuncSetAttribute(function: sys::CUfunction, attribute: c_uint, value: c_int);
    launch_kernel_ex = cuLaunchKernelEx(
        config: *const sys::CUlaunchConfig,
        function: sys::CUfunction,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void
    );
    stream_begin_capture = cuStreamBeginCapture_v2(stream: sys::CUstream, mode: c_uint);
    stream_end_capture = cuStreamEndCapture(stream: sys::CUstream, graph: *mut sys::CUgraph);
    graph_instantiate = cuGraphInstantiateWithFlags(
        exec: *mut sys::CUgraphExec,
        graph: sys::CUgraph,
        flags: c_ulonglong
    );
    graph_launch = cuGraphLaunch(exec: sys::CUgraphExec, stream: sys::CUstream);
    graph_exec_destroy = cuGraphExecDestroy(exec: sys::CUgraphExec);
    graph_destroy = cuGraphDestroy(graph: sys::CUgraph);
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

impl Driver {
    /// The driver of this machine.
    ///
    /// # Errors
    /// `NoDriver`, or `DriverTooOld` naming the function that is missing.
    pub fn get() -> Result<&'static Self> {
        const OP: &str = "open device";
        if let Some(driver) = DRIVER.get() {
            return Ok(driver);
        }
        // SAFETY: loads libcuda when there is one; its initialisers are the driver's own.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::new(OP, ErrorKind::NoDriver));
        }
        let driver = Driver::resolve().map_err(|missing| {
            Error::new(
                OP,
                ErrorKind::DriverTooOld {
                    found: library_version().map_or("of unknown version".into(), version_text),
                    needed: format!("12.0 or newer (it has no {missing})"),
                },
            )
        })?;
        // SAFETY: plain call without pointers.
        match unsafe { driver.init(0) } {
            Ok(()) => {}
            // A driver without a GPU: opening a device says so.
            Err(Failure { code: NO_DEVICE, .. }) => {}
            Err(Failure { code: STUB_LIBRARY, .. }) => {
                return Err(Error::new(OP, ErrorKind::NoDriver));
            }
            Err(failure) => return Err(failure.error_by(Some(&driver), OP)),
        }
        Ok(DRIVER.get_or_init(|| driver))
    }

    /// CUDA version that the driver supports, as `1000 * major + 10 * minor`.
    pub fn version(&self) -> Result<u32, Failure> {
        let mut version = 0;
        // SAFETY: the pointer is to a live integer.
        unsafe { self.driver_get_version(&mut version)? };
        Ok(version as u32)
    }

    /// How many devices there are. Without any, the driver does not initialise.
    pub fn count(&self) -> Result<usize, Failure> {
        let mut count = 0;
        // SAFETY: the pointer is to a live integer.
        match unsafe { self.device_get_count(&mut count) } {
            Ok(()) => Ok(count as usize),
            Err(Failure { code: NO_DEVICE | NOT_INITIALIZED, .. }) => Ok(0),
            Err(failure) => Err(failure),
        }
    }

    fn text(&self, function: ErrorText, code: u32) -> Option<String> {
        let mut text = std::ptr::null();
        // SAFETY: the pointer is to a live pointer; any code may be asked about.
        let result = unsafe { function(code, &mut text) };
        if result != 0 || text.is_null() {
            return None;
        }
        // SAFETY: on success the driver returns a static, null-terminated string.
        Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }
}

/// `12.4` of `12040`.
fn version_text(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn library_version() -> Option<u32> {
    let mut version: c_int = 0;
    // SAFETY: libcuda is present (the caller resolved symbols of it); the signature is cuda.h's.
    unsafe {
        let function: unsafe extern "C" fn(*mut c_int) -> c_uint =
            symbol("cuDriverGetVersion").ok()?;
        (function(&mut version) == 0).then_some(version as u32)
    }
}

/// The address of a function of libcuda, or its name when the library has none.
///
/// # Safety
/// libcuda is present, and `F` is a function pointer type of the symbol's own signature.
unsafe fn symbol<F: Copy>(name: &'static str) -> Result<F, &'static str> {
    // SAFETY: the library is present, so `culib` does not panic; it is never unloaded.
    let library = unsafe { sys::culib() };
    // SAFETY: the caller vouches for the type.
    unsafe { library.get::<F>(name.as_bytes()) }.map(|symbol| *symbol).map_err(|_| name)
}
