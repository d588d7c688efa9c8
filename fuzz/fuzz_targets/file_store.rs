#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hybridkv_fuzz::file_store(data));
