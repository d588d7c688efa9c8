//! The reference: f64, the dumbest correct code.
