//! One file per verb: asks `ops/`, words what came of it.

pub mod check;
pub mod completions;
pub mod doctor;
pub mod init;
pub mod lock;
pub mod run;
pub mod schema;
pub mod status;
pub mod sync;
pub mod verify;

/// `1.2 GB`, for people.
pub fn size(bytes: u64) -> String {
    indicatif::DecimalBytes(bytes).to_string()
}
