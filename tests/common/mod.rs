//! The GPU of the integration tests.

use std::sync::OnceLock;

use hybridkv::device::Device;
use hybridkv::ops::Kernels;

/// A GPU with kernels, opened once; says loudly when there is none.
pub fn cuda() -> Option<&'static Device> {
    static CUDA: OnceLock<Option<Device>> = OnceLock::new();
    let open = || {
        let opened = Device::cuda(0).and_then(|device| Kernels::load(&device).map(|_| device));
        match opened {
            Ok(device) => Some(device),
            Err(error) => {
                eprintln!("SKIPPED on the GPU: no CUDA device, or no kernels for it ({error})");
                None
            }
        }
    };
    CUDA.get_or_init(open).as_ref()
}
