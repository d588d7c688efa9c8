//! One launcher per kernel: validate the arguments, fill the parameter block, launch.
//!
//! [`Kernels::load`] picks what runs on a device once; launchers on it cannot be reached on a GPU
//! without a matching image. Launchers allocate nothing, never synchronise and can be captured in a
//! CUDA graph; arrays that the kernels read on the device may change between replays. On the CPU device
//! the same parameter block goes to the reference code.

mod append;
mod attention;
mod merge;
mod movement;

pub use append::AppendArgs;
pub use attention::{AttentionArgs, BlockTables, HeadStrides, WindowTable};
pub use merge::MergeArgs;
pub use movement::MoveArgs;
