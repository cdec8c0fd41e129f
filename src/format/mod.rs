//! Layer 1: one file per on-disk format. Bytes in, typed value or [`Diagnostics`](crate::base::diagnostic::Diagnostics) out.
//!
//! Invariant: no disk, no network, no clock, so that every parser can be fed anything.

use crate::base::diagnostic::Diagnostic;

pub mod document;
pub mod gguf;
pub mod lockfile;
pub mod manifest;
pub mod policy;
pub mod receipt;
pub mod schema;
pub mod settings;

/// A value with the document it was read from, so that a later check can still say where.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed<T> {
    pub value: T,
    pub document: document::Document,
}

impl<T> Parsed<T> {
    /// An error about the value at a path of keys, items of lists by their number: `["models", "x", "source"]`.
    pub fn error(&self, path: &[&str], message: impl Into<String>) -> Diagnostic {
        self.document.error(path, message)
    }

    /// Byte offsets of the value at `path`, or of the nearest thing above it.
    pub fn span_of(&self, path: &[&str]) -> std::ops::Range<usize> {
        self.document.span_of(path)
    }
}
