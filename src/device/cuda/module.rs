//! Kernel images: fatbins embedded at build time, loaded once per device.

use std::ffi::{CString, c_void};

use cudarc::driver::sys;

use super::CudaDevice;
use super::driver::{Driver, Failure, INVALID_IMAGE, NO_BINARY_FOR_GPU, UNSUPPORTED_PTX_VERSION};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};

const OP: &str = "load kernels";

/// Dynamic shared memory that a kernel gets without asking, in bytes.
const DEFAULT_SHARED: u32 = 48 << 10;

/// What build.rs embeds: `IMAGES` (stem of the .cu, its fatbin), `ARCHS` (`80`, `90a`) and
/// `NVCC_VERSION`, all empty without nvcc.
#[allow(dead_code, missing_docs)]
mod embedded {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// A loaded image. Dropping it waits for the device and unloads its kernels.
pub(crate) struct Library {
    device: Device,
    driver: &'static Driver,
    library: sys::CUlibrary,
}

// SAFETY: library handles may be used from any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// A kernel of a [`Library`] on its device, ready to launch while the library lives.
#[derive(Clone, Copy)]
pub(crate) struct Function {
    pub(super) function: sys::CUfunction,
    /// Most dynamic shared memory that a launch may ask for, in bytes.
    pub(super) max_dynamic_shared: u32,
}

// SAFETY: function handles may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Library {
    /// Loads the image of `kernels/<stem>.cu`.
    ///
    /// # Errors
    /// `NoKernels`, `NoKernelImage`, or the driver's own error.
    pub fn load(device: &Device, cuda: &CudaDevice, stem: &str) -> Result<Self> {
        let (_, image) = embedded::IMAGES
            .iter()
            .find(|(name, _)| *name == stem)
            .ok_or_else(|| Error::new(OP, ErrorKind::NoKernels))?;
        let _current = cuda.make_current()?;
        let mut library = std::ptr::null_mut();
        // SAFETY: the image is a whole fatbin that lives as long as the program; no options are given.
        let loaded = unsafe {
            cuda.driver.library_load_data(
                &mut library,
                image.as_ptr().cast::<c_void>(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                0,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                0,
            )
        };
        loaded.map_err(|failure| image_error(cuda, failure))?;
        Ok(Self { device: device.clone(), driver: cuda.driver, library })
    }

    /// Resolves a kernel for the device and lets it use up to `max_dynamic_shared` bytes of dynamic
    /// shared memory, as far as the GPU has them.
    ///
    /// # Errors
    /// `NoKernelImage`, or the driver's own error.
    pub fn function(&self, name: &str, max_dynamic_shared: u32) -> Result<Function> {
        let cuda = self
            .device
            .backend()
            .as_cuda()
            .ok_or_else(|| Error::invalid(OP, "not a CUDA device"))?;
        let symbol = CString::new(name)
            .map_err(|_| Error::invalid(OP, format!("{name:?} is no name of a kernel")))?;
        let _current = cuda.make_current()?;
        let mut kernel = std::ptr::null_mut();
        let mut function = std::ptr::null_mut();
        // SAFETY: the library is loaded, the name is null-terminated, the pointers are to live handles.
        // Asking for the function loads the code now, not at the first launch.
        unsafe {
            self.driver
                .library_get_kernel(&mut kernel, self.library, symbol.as_ptr())
                .and_then(|()| self.driver.kernel_get_function(&mut function, kernel))
        }
        .map_err(|failure| image_error(cuda, failure))?;
        let max_dynamic_shared = max_dynamic_shared.min(cuda.info.shared_memory_bytes);
        // Static shared memory counts against what is there without asking.
        if max_dynamic_shared > 0 {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just resolved.
            unsafe {
                self.driver.func_set_attribute(
                    function,
                    attribute as u32,
                    max_dynamic_shared as i32,
                )?;
            }
        }
        let max_dynamic_shared = max_dynamic_shared.max(DEFAULT_SHARED);
        Ok(Function { function, max_dynamic_shared })
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        let _ = self.device.synchronize();
        // SAFETY: loaded once; launches borrow the owner of this library. Failures cannot be helped.
        let _ = unsafe { self.driver.library_unload(self.library) };
    }
}

fn image_error(cuda: &CudaDevice, failure: Failure) -> Error {
    match failure.code {
        NO_BINARY_FOR_GPU | UNSUPPORTED_PTX_VERSION | INVALID_IMAGE => {
            let (major, minor) = cuda.info.compute_capability;
            Error::new(
                OP,
                ErrorKind::NoKernelImage {
                    device: cuda.info.name.clone(),
                    capability: format!("{major}.{minor}"),
                    embedded: describe_images(),
                },
            )
        }
        _ => failure.error(OP),
    }
}

/// `sm_80, sm_90a (nvcc 13.0)`.
fn describe_images() -> String {
    let archs: Vec<String> = embedded::ARCHS.iter().map(|arch| format!("sm_{arch}")).collect();
    format!("{} (nvcc {})", archs.join(", "), embedded::NVCC_VERSION)
}
