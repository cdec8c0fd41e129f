//! The exit codes of the program. The help text is made from [`TABLE`], and the README's table is checked against it.

/// The command did what it was asked to do.
pub const DONE: u8 = 0;
/// A checked condition is false: stale lockfile, not synced, drift.
pub const CONDITION: u8 = 1;
/// Wrong arguments, or problems in an input file.
pub const USAGE: u8 = 2;
/// Bytes are not what the lockfile or a receipt says.
pub const INTEGRITY: u8 = 3;
/// The network is needed, or failed.
pub const NETWORK: u8 = 4;
/// A build or a derivation failed.
pub const BUILD: u8 = 5;
/// A second build gave other bits.
pub const NOT_REPRODUCED: u8 = 6;
/// An engine failed to start or to answer.
pub const ENGINE: u8 = 7;
/// Local system error: disk full, no permission, a missing program.
pub const MACHINE: u8 = 8;
/// Ctrl-C or a termination signal.
pub const INTERRUPTED: u8 = 130;

/// Every exit code and its meaning, in order.
pub const TABLE: [(u8, &str); 10] = [
    (DONE, "success"),
    (CONDITION, "a checked condition is false: stale lockfile, drift, not synced"),
    (USAGE, "wrong usage, or an error in a manifest or policy"),
    (INTEGRITY, "checksum mismatch with the lockfile or a receipt"),
    (NETWORK, "the network is needed, or failed"),
    (BUILD, "a build failed"),
    (NOT_REPRODUCED, "a second build gave other bits"),
    (ENGINE, "an engine failed to start or to answer"),
    (MACHINE, "local system error: disk full, no permission, a missing program"),
    (INTERRUPTED, "interrupted"),
];

/// The table as the last lines of `--help`.
pub fn help() -> String {
    let lines = TABLE.iter().map(|(code, meaning)| format!("\n  {code:>3}  {meaning}"));
    std::iter::once("Exit codes:".to_owned()).chain(lines).collect()
}
