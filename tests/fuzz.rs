//! A short run of everything in `support/fuzz_targets.rs`: each file of the corpus, and changes of it. The numbers are the same
//! each time, so that a finding can be found again; `cargo ci e2e fuzz` searches longer, guided by coverage.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/fuzz_targets.rs"]
mod targets;

use std::path::{Path, PathBuf};

use targets::TARGETS;

/// Changed inputs for each file of a corpus.
const CHANGES: u64 = 300;
/// Where each one costs a connection.
const FEW: u64 = 20;

fn corpus(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    aitools::base::fs::read_dir(&folder).unwrap()
}

/// xorshift64*: numbers without a pattern that are the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % limit.max(1)
    }
}

fn changed(seed: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=numbers.below(3) {
        let at = numbers.below(bytes.len());
        match numbers.below(6) {
            0 => bytes.truncate(at),
            1 if !bytes.is_empty() => bytes[at] = numbers.below(256) as u8,
            2 if !bytes.is_empty() => bytes[at] ^= 1 << numbers.below(8),
            3 => bytes.insert(at, [0, 0xff, b'\n', b'"', b'{', b'/'][numbers.below(6)]),
            4 => {
                let end = (at + numbers.below(40)).min(bytes.len());
                let copy = bytes[at.min(end)..end].to_vec();
                bytes.splice(at.min(end)..at.min(end), copy);
            }
            _ => drop(bytes.drain(at.min(bytes.len())..(at + numbers.below(16)).min(bytes.len()))),
        }
    }
    bytes
}

#[test]
fn no_bytes_break_a_parser() {
    for (name, target) in TARGETS {
        let files = corpus(name);
        assert!(!files.is_empty(), "`{name}` has no corpus");
        for (index, file) in files.iter().enumerate() {
            let seed = aitools::base::fs::read_bounded(file, 1 << 20).unwrap();
            target(&seed);
            let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15 + index as u64);
            for _ in 0..if *name == "download" { FEW } else { CHANGES } {
                target(&changed(&seed, &mut numbers));
            }
        }
    }
}
