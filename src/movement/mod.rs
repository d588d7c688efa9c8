//! How blocks get from one memory to another: what their rows look like on both sides, over which path, and the
//! calls that it takes.
//!
//! - [`BlockLayout`] says where the rows of a block lie; [`BlockMove`] is the move between two layouts, as a
//!   [`MoveShape`](crate::ops::MoveShape) with as few and as long rows as the two allow.
//! - [`LinkModel`] is what the paths of this host and this device cost, measured at start-up.
//! - [`Planner`] merges fragments and chooses the path of each, from the model. It knows no device: plain data in,
//!   plain data out.
//! - [`Mover`] plans and submits.

mod calibrate;
mod layout;
mod model;
mod mover;
mod plan;

pub use layout::{BlockLayout, BlockMove, BlockPart, BlockRows, Layers, live_blocks};
pub use model::{EngineCost, KernelCost, LinkModel, PathCosts, PitchedCost, SizeCosts};
pub use mover::Mover;
pub use plan::{Planner, Route, Traffic, Way};
