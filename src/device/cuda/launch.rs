//! Kernel launches: one POD parameter block by value, attributes on the stack, no heap.

use std::ffi::{c_char, c_void};

use cudarc::driver::sys;

use super::{CudaDevice, Function};
use crate::error::{Error, Result};

/// Shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchConfig {
    /// CTAs in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a CTA in x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub dynamic_shared: u32,
    /// CTAs of a cluster in x, y, z (sm_90 and up); all 1 for none.
    pub cluster: [u32; 3],
    /// Programmatic dependent launch: the kernel may start before its predecessor in the stream has
    /// ended, and itself waits where it needs the predecessor's results (sm_90 and up).
    pub overlap_predecessor: bool,
}

impl LaunchConfig {
    /// A one-dimensional grid of `grid` CTAs with `block` threads each.
    pub const fn linear(grid: u32, block: u32) -> Self {
        Self::new([grid, 1, 1], [block, 1, 1])
    }

    /// A grid of CTAs, without shared memory, clusters or overlap.
    pub const fn new(grid: [u32; 3], block: [u32; 3]) -> Self {
        Self { grid, block, dynamic_shared: 0, cluster: [1; 3], overlap_predecessor: false }
    }

    /// The same launch with `bytes` of dynamic shared memory.
    pub const fn with_shared(mut self, bytes: u32) -> Self {
        self.dynamic_shared = bytes;
        self
    }

    /// The same launch in clusters.
    pub const fn with_cluster(mut self, cluster: [u32; 3]) -> Self {
        self.cluster = cluster;
        self
    }

    /// The same launch, allowed to start before its predecessor has ended.
    pub const fn with_overlap(mut self) -> Self {
        self.overlap_predecessor = true;
        self
    }
}

/// Launches `function` with `params` as its only argument, passed by value.
///
/// # Safety
/// The library of the function is loaded and of this device; `P` is the parameter block of the kernel;
/// `stream` is live; what the parameters point to is valid until the stream has passed the kernel.
pub(crate) unsafe fn launch<P: Copy>(
    cuda: &CudaDevice,
    function: &Function,
    config: &LaunchConfig,
    params: &P,
    stream: *mut c_void,
) -> Result<()> {
    if config.dynamic_shared > function.max_dynamic_shared {
        return Err(Error::unsupported(
            "launch",
            "dynamic shared memory of",
            format!("{} bytes", config.dynamic_shared),
            format!("at most {} bytes on {}", function.max_dynamic_shared, cuda.info.name),
        ));
    }
    let mut attributes = [IGNORED; 2];
    let mut count = 0;
    if config.cluster != [1; 3] {
        let [x, y, z] = config.cluster;
        attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attributes[count].value.clusterDim =
            sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
        count += 1;
    }
    if config.overlap_predecessor {
        attributes[count].id =
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes[count].value.programmaticStreamSerializationAllowed = 1;
        count += 1;
    }
    let launch = sys::CUlaunchConfig {
        gridDimX: config.grid[0],
        gridDimY: config.grid[1],
        gridDimZ: config.grid[2],
        blockDimX: config.block[0],
        blockDimY: config.block[1],
        blockDimZ: config.block[2],
        sharedMemBytes: config.dynamic_shared,
        hStream: stream.cast(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: count as u32,
    };
    let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
    let _current = cuda.make_current()?;
    // SAFETY: the arrays live on the stack for the duration of the call, the driver copies the
    // parameters; the rest is the caller's promise.
    unsafe {
        cuda.driver.launch_kernel_ex(
            &launch,
            function.function,
            arguments.as_mut_ptr(),
            std::ptr::null_mut(),
        )?;
    }
    Ok(())
}

const IGNORED: sys::CUlaunchAttribute = sys::CUlaunchAttribute {
    id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
    pad: [0; 4],
    value: sys::CUlaunchAttributeValue { pad: [0 as c_char; 64] },
};
