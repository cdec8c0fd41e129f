//! Layer 0: what every other layer may use. Knows nothing of engines, formats or commands.
//!
//! Invariant: nothing here prints, reads the environment or decides an exit code.

pub mod address;
pub mod cancel;
pub mod commit;
pub mod diagnostic;
pub mod digest;
pub mod fs;
pub mod hashed;
pub mod http;
pub mod lifeline;
pub mod lock;
pub mod name;
pub mod parallel;
pub mod platform;
pub mod process;
pub mod random;
pub mod tree;

#[cfg(test)]
#[path = "../../tests/support/http.rs"]
#[expect(missing_docs, reason = "only tests use it")]
pub mod test_server;

#[cfg(test)]
#[path = "../../tests/support/hub.rs"]
#[expect(missing_docs, reason = "only tests use it")]
pub mod test_hub;
