//! Layer 1: one file per on-disk format. Bytes in, typed value or [`Diagnostics`](crate::base::diagnostic::Diagnostics) out.
//!
//! Invariant: no disk, no network, no clock, so that every parser can be fed anything.

pub mod gguf;
pub mod lockfile;
pub mod manifest;
pub mod policy;
pub mod receipt;
