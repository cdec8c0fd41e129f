//! The target `evidence` of `tests/support/fuzz_targets.rs`, for cargo-fuzz.
#![no_main]

#[path = "../../tests/support/fuzz_targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::evidence(data));
