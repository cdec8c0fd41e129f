//! How an engine makes one model from another: its inputs and its command. Carried out by [`crate::ops::derive`].

use std::path::{Path, PathBuf};

use crate::base::commit::Commit;

/// The properties of a derivation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Derivation {
    /// Incremented when the adapter changes so that the same inputs give another file.
    pub version: u32,
    /// What part of the engine makes the model.
    pub by: Maker,
    /// Other folders of the model that the engine uses; they are copied unchanged.
    pub beside: &'static [&'static str],
    /// Bytes that come out for 100 bytes that go in, at most.
    pub percent: u64,
}

/// The part of an engine that makes a model.
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
    /// What is done.
    pub work: Work<'a>,
    /// The commit that the engine is of, when it came from git.
    pub commit: Option<Commit>,
    /// The file to make.
    pub output: &'a Path,
    /// A folder for whatever the program writes beside it.
    pub scratch: &'a Path,
    /// Processor threads to use.
    pub threads: u32,
}

/// A step and its inputs.
#[derive(Debug)]
pub enum Work<'a> {
    /// Change the type of the weights.
    Quantize {
        /// The type, in the engine's words: `Q4_0`.
        kind: &'a str,
        /// The main weights file.
        input: &'a Path,
        /// The engine's installed artifact.
        artifact: &'a Path,
    },
    /// Make a model file from the files that a model is published in.
    Convert {
        /// Folders with whole models, each file under its own name.
        model: &'a Path,
        /// The folder of the model that predicts active neurons.
        predictor: &'a Path,
        /// The engine's source tree; not to be written to.
        source: &'a Path,
        /// The interpreter, and unpacked packages for it.
        python: &'a Path,
        /// Folders of unpacked Python packages.
        packages: &'a [PathBuf],
    },
}
