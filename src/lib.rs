//! The map.

pub mod base;
pub mod build;
pub mod cli;
pub mod engine;
pub mod format;
pub mod ops;
pub mod plan;
pub mod report;
pub mod source;
pub mod store;
