//! GGUF headers (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), versions 2 and 3, and PowerInfer's files, which differ by
//! their magic `PWRI` alone. Read from a file's first bytes with bounds on everything. Absent: the weights themselves, and the contents
//! of lists (a vocabulary has 100,000 texts; its length is enough here) but for special tokens.

mod read;

use std::collections::BTreeMap;
use std::io;

/// Bytes of a header at most: the largest vocabularies take some 20 MB.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;

/// The header of a model file.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Which kind of file it is.
    pub magic: Magic,
    /// The version of the format: 2 or 3.
    pub version: u32,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// The tensors, in the order of the file.
    pub tensors: Vec<Tensor>,
    /// Tokens that no text makes: the numbers of the control and user-defined ones (`tokenizer.ggml.token_type` 3 and 4) by
    /// their text in `tokenizer.ggml.tokens`.
    pub special_tokens: BTreeMap<String, u32>,
    /// Texts that llama.cpp reads as one token wherever they are in a prompt that may hold special tokens: those of the control,
    /// user-defined and unknown tokens, and some that it knows by name whatever their type is.
    pub markers: BTreeMap<String, TokenKind>,
    /// Where tensor data begins, in bytes from the start of the file.
    pub data_offset: u64,
}

/// The first four bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Magic {
    /// Models for llama.cpp and most other engines.
    Gguf,
    /// PowerInfer's sparse models.
    Pwri,
}

/// What `tokenizer.ggml.token_type` says of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Also unused and byte tokens, and numbers that are not known.
    Normal,
    /// The token for unknown text.
    Unknown,
    /// A special token that no text makes.
    Control,
    /// A token that the model's authors added.
    UserDefined,
}

/// The description of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its name: `blk.0.ffn_up.weight`.
    pub name: String,
    /// Elements per dimension, fastest first.
    pub shape: Vec<u64>,
    /// The ggml type number, as llama.cpp counts them today.
    pub kind: u32,
    /// Bytes from `data_offset`.
    pub offset: u64,
    /// 0 when the type is unknown.
    pub size_bytes: u64,
}

/// A metadata value. Arrays keep their length alone.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A truth value.
    Bool(bool),
    /// A signed integer of any size.
    Int(i64),
    /// An unsigned integer of any size.
    Uint(u64),
    /// A floating point number of any size.
    Float(f64),
    /// A string.
    Text(String),
    /// A list.
    Array {
        /// The number of its items.
        length: u64,
    },
}

/// Why a header cannot be read. Names from the file are cut and escaped.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum GgufError {
    #[error("not a GGUF file: it begins with `{begins}`{likely}")]
    NotGguf { begins: String, likely: &'static str },
    #[error("GGUF version 1 is not supported: convert the model again")]
    Version1,
    #[error("GGUF version {0} is not supported: only 2 and 3 are")]
    Version(u32),
    #[error("a big-endian GGUF file: convert the model for a little-endian machine")]
    BigEndian,
    /// The bytes end within the header: of a prefix, more may complete it.
    #[error("the header is cut off: there are only {0} bytes")]
    Ended(u64),
    #[error("{what} is {actual}, but the limit is {max}")]
    Limit { what: String, actual: u64, max: u64 },
    #[error("{what}: {why}")]
    Malformed { what: String, why: String },
    /// The file is shorter than its header says.
    #[error("the file is cut off: {missing} of {expected} bytes are missing, tensor `{tensor}` is not whole")]
    Truncated { tensor: String, expected: u64, missing: u64 },
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl GgufError {}

/// How ggml stores a type: blocks of some elements in some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorType {
    /// The number in files.
    pub kind: u32,
    /// The name in messages: `Q4_K`.
    pub name: &'static str,
    /// Elements of a block.
    pub block_elements: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
}

/// `GGML_QUANT_SIZES` of llama.cpp's `gguf-py/gguf/constants.py`, as of its `ggml.h` with 43 types.
pub const TENSOR_TYPES: &[TensorType] = &[
    tensor_type(0, "F32", 1, 4),
    tensor_type(1, "F16", 1, 2),
    tensor_type(2, "Q4_0", 32, 18),
    tensor_type(3, "Q4_1", 32, 20),
    tensor_type(6, "Q5_0", 32, 22),
    tensor_type(7, "Q5_1", 32, 24),
    tensor_type(8, "Q8_0", 32, 34),
    tensor_type(9, "Q8_1", 32, 36),
    tensor_type(10, "Q2_K", 256, 84),
    tensor_type(11, "Q3_K", 256, 110),
    tensor_type(12, "Q4_K", 256, 144),
    tensor_type(13, "Q5_K", 256, 176),
    tensor_type(14, "Q6_K", 256, 210),
    tensor_type(15, "Q8_K", 256, 292),
    tensor_type(16, "IQ2_XXS", 256, 66),
    tensor_type(17, "IQ2_XS", 256, 74),
    tensor_type(18, "IQ3_XXS", 256, 98),
    tensor_type(19, "IQ1_S", 256, 50),
    tensor_type(20, "IQ4_NL", 32, 18),
    tensor_type(21, "IQ3_S", 256, 110),
    tensor_type(22, "IQ2_S", 256, 82),
    tensor_type(23, "IQ4_XS", 256, 136),
    tensor_type(24, "I8", 1, 1),
    tensor_type(25, "I16", 1, 2),
    tensor_type(26, "I32", 1, 4),
    tensor_type(27, "I64", 1, 8),
    tensor_type(28, "F64", 1, 8),
    tensor_type(29, "IQ1_M", 256, 56),
    tensor_type(30, "BF16", 1, 2),
    tensor_type(34, "TQ1_0", 256, 54),
    tensor_type(35, "TQ2_0", 256, 66),
    tensor_type(39, "MXFP4", 32, 17),
    tensor_type(40, "NVFP4", 64, 36),
    tensor_type(41, "Q1_0", 128, 18),
    tensor_type(42, "Q2_0", 64, 18),
];

const fn tensor_type(kind: u32, name: &'static str, block_elements: u64, block_bytes: u64) -> TensorType {
    TensorType { kind, name, block_elements, block_bytes }
}

impl Tensor {
    /// None for a type that this program does not know.
    pub fn tensor_type(&self) -> Option<&'static TensorType> {
        TENSOR_TYPES.iter().find(|known| known.kind == self.kind)
    }

    /// The number of elements, over all dimensions.
    pub fn elements(&self) -> u64 {
        self.shape.iter().fold(1, |product: u64, size| product.saturating_mul(*size))
    }
}

/// One part of a model in several files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Which part this is, from 0.
    pub number: u64,
    /// How many parts there are.
    pub count: u64,
    /// Tensors of all parts together.
    pub tensors: Option<u64>,
}

/// The name of a part of a model in several files, as `gguf-split` of llama.cpp writes it: `<stem>-00001-of-00003.gguf`; those of
/// safetensors on the Hub have the same form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PartName<'a> {
    /// What all parts have in common: a path without the numbers.
    pub stem: &'a str,
    /// Which part this is, from 1.
    pub number: u32,
    /// How many parts there are.
    pub count: u32,
    /// `.gguf` or `.safetensors`.
    pub ending: &'static str,
}

impl<'a> PartName<'a> {
    /// Reads a path; none when it is not the name of a part.
    pub fn of(path: &'a str) -> Option<Self> {
        let endings = [".gguf", ".safetensors"];
        let (path, ending) = endings.iter().find_map(|ending| Some((path.strip_suffix(ending)?, *ending)))?;
        let (rest, count) = path.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let five_digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        let parse = |text: &str| five_digits(text).then(|| text.parse().ok())?;
        Some(Self { stem, number: parse(number)?, count: parse(count)?, ending })
    }

    /// Whether both are parts of one model.
    pub fn is_beside(&self, other: &Self) -> bool {
        (self.stem, self.count, self.ending) == (other.stem, other.count, other.ending)
    }
}

impl std::fmt::Display for PartName<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{:05}-of-{:05}{}", self.stem, self.number, self.count, self.ending)
    }
}

/// How much of a model has one type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeShare {
    /// `Q4_K`, or `type 99` when it is unknown.
    pub name: String,
    /// How many tensors have it.
    pub tensors: u64,
    /// Bytes of these tensors.
    pub size_bytes: u64,
}

impl Header {
    /// The metadata value of `key`, if it is a string.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A number that is not negative.
    pub fn uint(&self, key: &str) -> Option<u64> {
        match *self.metadata.get(key)? {
            Value::Uint(number) => Some(number),
            Value::Int(number) => number.try_into().ok(),
            _ => None,
        }
    }

    /// The length of the list at `key`, if it is one.
    pub fn array_length(&self, key: &str) -> Option<u64> {
        match *self.metadata.get(key)? {
            Value::Array { length } => Some(length),
            _ => None,
        }
    }

    /// `llama`, `bamboo`, …
    pub fn architecture(&self) -> Option<&str> {
        self.text("general.architecture")
    }

    /// The name that the model's authors gave it.
    pub fn name(&self) -> Option<&str> {
        self.text("general.name")
    }

    /// The number under the architecture's own prefix: `block_count` is `llama.block_count`.
    pub fn architecture_uint(&self, key: &str) -> Option<u64> {
        self.uint(&format!("{}.{key}", self.architecture()?))
    }

    /// Tokens of context that the model was trained for.
    pub fn context_length(&self) -> Option<u64> {
        self.architecture_uint("context_length")
    }

    /// The number of layers.
    pub fn block_count(&self) -> Option<u64> {
        self.architecture_uint("block_count")
    }

    /// The width of an embedding.
    pub fn embedding_length(&self) -> Option<u64> {
        self.architecture_uint("embedding_length")
    }

    /// The neurons of a feed-forward block; None when the header does not state one number.
    pub fn feed_forward_length(&self) -> Option<u64> {
        self.architecture_uint("feed_forward_length")
    }

    /// The model's own chat template, in Jinja.
    pub fn chat_template(&self) -> Option<&str> {
        self.text("tokenizer.chat_template")
    }

    /// Tokens in the vocabulary.
    pub fn vocabulary_size(&self) -> Option<u64> {
        self.array_length("tokenizer.ggml.tokens")
    }

    /// Which part of a model in several files this is; None when it is not split.
    pub fn split(&self) -> Option<Split> {
        let count = self.uint("split.count").filter(|count| *count > 1)?;
        Some(Split { number: self.uint("split.no")?, count, tensors: self.uint("split.tensors.count") })
    }

    /// The types of the tensors, the one with the most bytes first: the model's quantisation.
    pub fn types(&self) -> Vec<TypeShare> {
        let mut shares: BTreeMap<u32, TypeShare> = BTreeMap::new();
        for tensor in &self.tensors {
            let share = shares.entry(tensor.kind).or_insert_with(|| {
                let name =
                    tensor.tensor_type().map_or_else(|| format!("type {}", tensor.kind), |known| known.name.to_owned());
                TypeShare { name, tensors: 0, size_bytes: 0 }
            });
            share.tensors += 1;
            share.size_bytes = share.size_bytes.saturating_add(tensor.size_bytes);
        }
        let mut shares: Vec<TypeShare> = shares.into_values().collect();
        shares.sort_by_key(|share| std::cmp::Reverse(share.size_bytes));
        shares
    }

    /// Where a tensor ends, in bytes from the start of the file.
    fn end(&self, tensor: &Tensor) -> u64 {
        self.data_offset.saturating_add(tensor.offset).saturating_add(tensor.size_bytes)
    }

    /// The size in bytes that the file must have at least.
    pub fn whole_size(&self) -> u64 {
        self.tensors.iter().map(|tensor| self.end(tensor)).max().unwrap_or(0)
    }

    /// # Errors
    /// [`GgufError::Truncated`] when a file of this size ends before its tensors do: it names the first that is not whole.
    pub fn check_extents(&self, file_size: u64) -> Result<(), GgufError> {
        let cut = self.tensors.iter().filter(|tensor| self.end(tensor) > file_size).min_by_key(|tensor| tensor.offset);
        let Some(tensor) = cut else { return Ok(()) };
        let expected = self.whole_size();
        Err(GgufError::Truncated { tensor: read::shown(&tensor.name), expected, missing: expected - file_size })
    }
}

#[cfg(test)]
mod tests;
