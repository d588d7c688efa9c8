//! CUDA devices through the driver API, loaded at run time.

use crate::error::Result;

/// A CUDA device on its primary context.
pub struct CudaDevice {}

impl CudaDevice {
    /// Opens the device of this ordinal.
    pub fn open(_ordinal: usize) -> Result<Self> {
        todo!()
    }
}
