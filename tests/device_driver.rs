//! Drivers that are too old, without a GPU, or failing, played by a fake libcuda.so: each must come back as
//! its own typed error.
//!
//! The parent test compiles the fake once per scenario and runs itself again with that library first in
//! the search path.

use std::path::{Path, PathBuf};
use std::process::Command;

use hybridkv::ErrorKind;
use hybridkv::device::Device;
use hybridkv::ops::Kernels;

const SCENARIO: &str = "HYBRIDKV_FAKE_DRIVER";

/// One device of compute capability 9.0. Functions without a body here succeed and do nothing.
const FAKE: &str = r#"
#include <stddef.h>
#include <string.h>

#define SUCCEED(name) int name() { return 0; }
SUCCEED(cuDeviceGet) SUCCEED(cuDeviceGetPCIBusId) SUCCEED(cuDevicePrimaryCtxRetain) SUCCEED(cuDevicePrimaryCtxRelease_v2)
SUCCEED(cuCtxGetCurrent) SUCCEED(cuCtxPushCurrent_v2) SUCCEED(cuCtxPopCurrent_v2)
SUCCEED(cuCtxSynchronize) SUCCEED(cuMemFree_v2) SUCCEED(cuMemHostUnregister) SUCCEED(cuMemcpyAsync)
SUCCEED(cuMemcpy2DAsync_v2)
SUCCEED(cuMemsetD8Async) SUCCEED(cuStreamDestroy_v2) SUCCEED(cuStreamSynchronize)
SUCCEED(cuStreamWaitEvent) SUCCEED(cuEventCreate) SUCCEED(cuEventDestroy_v2) SUCCEED(cuEventRecord)
SUCCEED(cuEventSynchronize) SUCCEED(cuEventElapsedTime) SUCCEED(cuLibraryUnload)
SUCCEED(cuLibraryGetKernel) SUCCEED(cuKernelGetFunction) SUCCEED(cuFuncSetAttribute)
SUCCEED(cuLaunchKernelEx) SUCCEED(cuStreamBeginCapture_v2) SUCCEED(cuStreamEndCapture)
SUCCEED(cuGraphInstantiateWithFlags) SUCCEED(cuGraphLaunch) SUCCEED(cuGraphExecDestroy)
SUCCEED(cuGraphDestroy)

int cuEventQuery() { return 600; }
int cuMemAlloc_v2() { return 2; }
int cuStreamCreate() { return 98765; }

int cuMemHostRegister_v2() {
#ifdef CANNOT_PIN
  return 2;
#else
  return 0;
#endif
}

int cuMemHostGetDevicePointer_v2(void** alias, char* host) {
#ifdef ALIASED
  *alias = host + 4096;
#else
  *alias = host;
#endif
  return 0;
}

int cuInit() {
#if defined(NO_GPU)
  return 100;
#elif defined(STUB)
  return 34;
#else
  return 0;
#endif
}

int cuDriverGetVersion(int* version) {
#ifdef OLD
  *version = 11080;
#else
  *version = 13000;
#endif
  return 0;
}

#ifndef OLD
int cuLibraryLoadData() { return 209; }
#endif

int cuDeviceGetCount(int* count) {
#ifdef NO_GPU
  return 3;
#else
  *count = 1;
  return 0;
#endif
}

int cuDeviceGetName(char* name) { strcpy(name, "Fake GPU"); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes) { *bytes = 1 << 30; return 0; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { *free = 1 << 20; *total = 1 << 30; return 0; }

int cuDeviceGetAttribute(int* value, int attribute) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
  return 0;
}

int cuGetErrorName(int code, const char** text) {
  *text = "CUDA_ERROR_FAKE";
  return code == 98765;
}
int cuGetErrorString(int code, const char** text) {
  *text = "a description";
  return code == 98765;
}
"#;

/// Compiles the fake with the given macro into a library that is found as libcuda.so; `None` without a C
/// compiler.
fn compile(scenario: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fake-driver-{scenario}"));
    std::fs::create_dir_all(&folder).unwrap();
    let source = folder.join("cuda.c");
    std::fs::write(&source, FAKE).unwrap();
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let status = Command::new(compiler)
        .args(["-shared", "-fPIC", "-w", "-o"])
        .arg(folder.join("libcuda.so"))
        .arg(format!("-D{scenario}"))
        .arg(&source)
        .status()
        .ok()?;
    assert!(status.success());
    Some(folder)
}

#[test]
#[cfg(target_os = "linux")]
fn every_failure_of_a_driver_is_a_typed_error() {
    for scenario in ["OLD", "NO_GPU", "STUB", "CANNOT_PIN", "ALIASED"] {
        let Some(folder) = compile(scenario) else {
            eprintln!("SKIPPED: no C compiler to build a fake driver with (CC, else cc)");
            return;
        };
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "scenario", "--nocapture"])
            .env("LD_LIBRARY_PATH", folder)
            .env(SCENARIO, scenario)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{scenario}: {said}");
    }
}

/// What a program sees under the fake driver of the environment; nothing without one.
#[test]
fn scenario() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    let opened = Device::cuda(0);
    match scenario.as_str() {
        "OLD" => {
            let error = opened.unwrap_err();
            let ErrorKind::DriverTooOld { found, needed } = error.kind() else { panic!("{error}") };
            assert_eq!(found, "11.8");
            assert!(needed.contains("cuLibraryLoadData"), "{needed}");
        }
        "NO_GPU" => {
            let error = opened.unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::NoDevice { ordinal: 0, count: 0 }),
                "{error}"
            );
            assert_eq!(Device::cuda_count().unwrap(), 0);
        }
        "STUB" => {
            let error = opened.unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::NoDriver), "{error}");
        }
        "CANNOT_PIN" => {
            let device = opened.unwrap();
            let error = device.alloc_pinned(10 << 20).err().unwrap();
            let ErrorKind::OutOfMemory { kind, requested, reason } = error.kind() else {
                panic!("{error}")
            };
            assert_eq!((*kind, *requested), ("pinned host", 10 << 20));
            assert!(reason.contains("CUDA_ERROR_FAKE") && reason.contains("RLIMIT_MEMLOCK"));
            failing_calls(&device);
        }
        "ALIASED" => {
            let device = opened.unwrap();
            let error = device.alloc_pinned(4096).err().unwrap();
            assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }), "{error}");
        }
        other => panic!("no scenario {other}"),
    }
}

fn failing_calls(device: &Device) {
    assert_eq!(device.info().name, "Fake GPU");
    assert_eq!(device.info().compute_capability, (9, 0));

    let error = device.alloc(2 << 20).err().unwrap();
    let ErrorKind::OutOfMemory { kind, reason, .. } = error.kind() else { panic!("{error}") };
    assert_eq!(*kind, "device");
    assert!(reason.contains("1048576 bytes free"), "{reason}");

    // A result that no header knows yet.
    let error = device.stream().err().unwrap();
    let ErrorKind::Cuda { call, code, .. } = error.kind() else { panic!("{error}") };
    assert_eq!((*call, *code), ("cuStreamCreate", 98765));
    assert!(!device.event().unwrap().is_complete().unwrap());

    let error = Kernels::load(device).unwrap_err();
    match error.kind() {
        ErrorKind::NoKernels => {}
        ErrorKind::NoKernelImage { device, capability, embedded } => {
            assert_eq!((device.as_str(), capability.as_str()), ("Fake GPU", "9.0"));
            assert!(embedded.contains("sm_"), "{embedded}");
        }
        other => panic!("unexpected {other:?}"),
    }
}
