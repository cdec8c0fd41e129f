//! Layer 5: one file per verb. Orchestration; no parsing, no printing.

pub mod run;
