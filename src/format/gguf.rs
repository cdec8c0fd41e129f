//! GGUF headers (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), versions 2 and 3, and PowerInfer's files, which differ by
//! their magic `PWRI` alone. Read from a file's first bytes with bounds on everything.

use std::collections::BTreeMap;

/// What a model file says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    pub magic: Magic,
    pub version: u32,
    pub metadata: BTreeMap<String, Value>,
    pub tensors: Vec<Tensor>,
    /// Where tensor data begins, in bytes from the start of the file.
    pub data_offset: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Magic {
    Gguf,
    /// PowerInfer's sparse models.
    Pwri,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    /// Elements per dimension, fastest first.
    pub shape: Vec<u64>,
    /// The ggml type number.
    pub kind: u32,
    /// Bytes from `data_offset`.
    pub offset: u64,
    pub size_bytes: u64,
}

/// A metadata value. Arrays keep their length; strings of an array (a vocabulary) are kept only where asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    Text(String),
    Array { length: u64 },
}
