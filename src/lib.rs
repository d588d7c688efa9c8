//! Hand-tuned CUDA kernels, and a small manager that drives them, for KV caches that are hybrid (every
//! layer keeps only the tokens its attention can see) and hierarchical (GPU memory, pinned host memory).
//!
//! Layers, each using only those below it:
//! - [`manager`]: pure state machine: what lives where, what must move;
//! - [`engine`]: executes the manager's transfers on a real device;
//! - [`movement`]: which path blocks take between memories, and the calls for it;
//! - [`ops`]: one launcher per kernel;
//! - [`device`]: memory, streams, events, launches, on a GPU or on the CPU.

#![deny(missing_docs)]

pub mod abi;
pub mod codec;
pub mod device;
pub mod e4m3;
pub mod engine;
pub mod error;
mod ffi;
pub mod layout;
pub mod manager;
pub mod movement;
pub mod ops;
pub mod plan;
pub mod reference;
pub mod spec;

pub use error::{Error, ErrorKind, Result};
