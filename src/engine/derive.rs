//! How an engine makes one model from another: what it takes, and what is asked. Carried out by [`crate::ops::derive`].

use std::path::Path;

use crate::format::gguf::Header;
use crate::format::manifest::Step;

/// What a derivation takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Derivation {
    /// Counted up when the adapter changes something that makes another file of the same inputs.
    pub version: u32,
    /// What else of the model is of use to the engine, and goes along unchanged: folders of it.
    pub beside: &'static [&'static str],
    /// Bytes that come out for 100 bytes that go in, at most.
    pub percent: u64,
}

/// One derivation to carry out.
#[derive(Debug)]
pub struct DeriveRequest<'a> {
    pub step: Step<'a>,
    /// The commit that the engine was built from, when it came from git.
    pub commit: Option<&'a str>,
    /// The installed artifact's folder.
    pub artifact: &'a Path,
    /// The main weights file that goes in.
    pub input: &'a Path,
    pub header: &'a Header,
    /// The file to make.
    pub output: &'a Path,
    /// An empty folder for whatever the program writes beside it.
    pub scratch: &'a Path,
    /// Processor threads to use.
    pub threads: u32,
}
