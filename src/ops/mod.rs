//! One launcher per kernel: validate the arguments, fill the parameter block, launch.
//!
//! [`Kernels::load`] picks what runs on a device once; launchers on it cannot be reached on a GPU
//! without a matching image. Launchers allocate nothing, never synchronise and can be captured in a
//! CUDA graph; arrays that the kernels read on the device may change between replays. On the CPU device
//! the same parameter block goes to the reference code.

mod append;
mod attention;
mod checks;
mod codec;
mod cpu;
mod merge;
mod movement;
mod plan;
mod read;
mod split;
mod strides;
pub mod synthetic;

use std::fmt;

pub use append::AppendArgs;
pub use attention::{AttentionArgs, BlockTables, SEALED_BLOCK, SealedView, WindowTable};
pub use checks::{
    AttentionTables, check_attention_tables, check_copies, check_slot_blocks, check_slots,
    check_window,
};
pub use codec::CodecArgs;
pub(crate) use codec::check_codec_tables;
pub use merge::MergeArgs;
pub(crate) use movement::MAX_MOVE_DIMS;
pub use movement::{CtaQuota, MoveArgs, MoveDim, MoveShape};
pub use plan::{Plan, PlanArgs, check_work_list};
pub(crate) use split::WorkList;
pub use strides::HeadStrides;

use crate::device::cuda::{self, LaunchConfig};
use crate::device::{Device, StreamRef};
use crate::error::Result;

/// The kernels of one device, loaded and ready to launch.
///
/// Every launcher is `unsafe`: it takes addresses, and its `# Safety` section says what they must be.
pub struct Kernels {
    device: Device,
    /// Launchers validate device tables first.
    checked: bool,
    append: append::Loaded,
    attention: attention::Loaded,
    codec: codec::Loaded,
    merge: merge::Loaded,
    movement: movement::Loaded,
    plan: plan::Loaded,
    synthetic: synthetic::Loaded,
    read: read::Loaded,
    /// Images of the kernels above (none on the CPU device).
    _libraries: Vec<cuda::Library>,
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Kernels {
    /// Loads every kernel for a device; on the CPU device, the reference code.
    ///
    /// # Errors
    /// `NoKernels` when the crate was built without nvcc, `NoKernelImage` when no embedded image runs on
    /// the GPU, or the driver's own error.
    pub fn load(device: &Device) -> Result<Self> {
        let mut loader = Loader { device, libraries: Vec::new() };
        Ok(Self {
            append: append::Loaded::load(&mut loader)?,
            attention: attention::Loaded::load(&mut loader)?,
            codec: codec::Loaded::load(&mut loader)?,
            merge: merge::Loaded::load(&mut loader)?,
            movement: movement::Loaded::load(&mut loader)?,
            plan: plan::Loaded::load(&mut loader)?,
            synthetic: synthetic::Loaded::load(&mut loader)?,
            read: read::Loaded::load(&mut loader)?,
            _libraries: loader.libraries,
            device: device.clone(),
            checked: false,
        })
    }

    /// The device of the kernels.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Runs a kernel in stream order: `kernel` with `params` as its only argument on a GPU, `on_cpu` with
    /// the same parameters on the CPU device.
    ///
    /// # Errors
    /// The stream is of another device, or the launch fails.
    ///
    /// # Safety
    /// `P` is the parameter block of `kernel`; what it points to is valid until the stream has passed the
    /// kernel. `on_cpu` relies on nothing else.
    unsafe fn launch<P: Copy + 'static>(
        &self,
        kernel: &Kernel,
        config: LaunchConfig,
        params: &P,
        stream: StreamRef<'_>,
        on_cpu: impl FnOnce(&P) + Send + 'static,
    ) -> Result<()> {
        stream.check_same("launch", &self.device)?;
        let backend = self.device.backend();
        match (backend.as_cuda(), &kernel.function) {
            // SAFETY: the function is of this device, its library is loaded while `self` lives; the rest
            // is the caller's promise.
            (Some(cuda), Some(function)) => unsafe {
                cuda::launch(cuda, function, &config, params, stream.raw())
            },
            _ => {
                let params = Shipped(*params);
                // SAFETY: the caller's promise.
                unsafe { backend.submit(Box::new(move || on_cpu(params.get())), stream.raw()) }
            }
        }
    }
}

/// A parameter block on its way to the CPU device.
struct Shipped<P>(P);

// SAFETY: a parameter block is plain data; its pointers are used under the promises of the launch, which
// hold on whatever thread runs it.
unsafe impl<P> Send for Shipped<P> {}

impl<P> Shipped<P> {
    fn get(&self) -> &P {
        &self.0
    }
}

/// One kernel, ready to launch. On the CPU device it stands for the reference code.
#[derive(Clone, Copy)]
struct Kernel {
    function: Option<cuda::Function>,
}

/// Resolves the kernels of a device by file and name.
struct Loader<'a> {
    device: &'a Device,
    libraries: Vec<cuda::Library>,
}

impl Loader<'_> {
    /// Loads the image of `kernels/<stem>.cu` and hands out its kernels by name. A kernel may use up to
    /// the given number of bytes of dynamic shared memory, as far as the GPU has them.
    fn file(&mut self, stem: &str) -> Result<impl Fn(&str, u32) -> Result<Kernel>> {
        let library = match self.device.backend().as_cuda() {
            Some(cuda) => {
                self.libraries.push(cuda::Library::load(self.device, cuda, stem)?);
                self.libraries.last()
            }
            None => None,
        };
        Ok(move |name: &str, max_dynamic_shared: u32| {
            let function =
                library.map(|library| library.function(name, max_dynamic_shared)).transpose()?;
            Ok(Kernel { function })
        })
    }
}
