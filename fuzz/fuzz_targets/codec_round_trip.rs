#![no_main]

#[allow(dead_code, reason = "a target is one of many")]
#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::codec_round_trip(data));
