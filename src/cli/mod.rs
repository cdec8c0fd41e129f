//! Layer 6: words and terminal.
