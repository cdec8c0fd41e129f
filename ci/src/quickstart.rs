//! The README's first command: what it names, and the program that it builds.

use std::path::PathBuf;

/// As it stands in the README, after `cargo run --release -- `.
pub const POLICY: &str = "smollm2-135m-instruct";
pub const PROMPT: &str = "What is the capital of France?";

/// The program as `cargo build --release` makes it.
pub fn program() -> PathBuf {
    crate::step::root().join("target/release").join(format!("aitools{}", std::env::consts::EXE_SUFFIX))
}
