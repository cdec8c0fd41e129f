//! Layer 6: words and terminal.
pub mod internal;
