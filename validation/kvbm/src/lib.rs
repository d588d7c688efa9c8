//! Only a benchmark: benches/manager.rs.
