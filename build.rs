//! Compiles every kernels/*.cu into a fatbin.
fn main() {}
