//! Layer 4: the gateway.
pub mod scheduler;
