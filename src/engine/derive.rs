//! How an engine makes one model from another: what it takes, and what is asked. Carried out by [`crate::ops::derive`].

use std::path::{Path, PathBuf};

/// What a derivation takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Derivation {
    /// Counted up when the adapter changes something that makes another file of the same inputs.
    pub version: u32,
    /// Which of the engine's things makes it.
    pub by: Maker,
    /// What else of the model is of use to the engine, and goes along unchanged: folders of it.
    pub beside: &'static [&'static str],
    /// Bytes that come out for 100 bytes that go in, at most.
    pub percent: u64,
}

/// What of an engine makes a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maker {
    /// A program of its build.
    Build,
    /// A script of its source.
    Source,
}

/// One derivation to carry out.
#[derive(Debug)]
pub struct DeriveRequest<'a> {
    pub work: Work<'a>,
    /// The commit that the engine is of, when it came from git.
    pub commit: Option<&'a str>,
    /// The file to make.
    pub output: &'a Path,
    /// A folder for whatever the program writes beside it.
    pub scratch: &'a Path,
    /// Processor threads to use.
    pub threads: u32,
}

/// What is done with what.
#[derive(Debug)]
pub enum Work<'a> {
    Quantize {
        kind: &'a str,
        /// The main weights file.
        input: &'a Path,
        /// The engine's installed artifact.
        artifact: &'a Path,
    },
    Convert {
        /// Folders with whole models, each file under its own name.
        model: &'a Path,
        predictor: &'a Path,
        /// The engine's source tree; not to be written to.
        source: &'a Path,
        /// The interpreter, and unpacked packages for it.
        python: &'a Path,
        packages: &'a [PathBuf],
    },
}
