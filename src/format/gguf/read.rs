//! From bytes to a [`Header`]. Every count, length and product is checked before it is used; memory grows only with bytes that were read.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read};

use super::{GgufError, Header, MAX_HEADER_BYTES, Magic, TENSOR_TYPES, Tensor, TokenKind, Value};

const MAX_ENTRIES: u64 = 65_536;
const MAX_TENSORS: u64 = 262_144;
/// The format's own limit.
const MAX_KEY_BYTES: u64 = 65_535;
const MAX_NAME_BYTES: u64 = 255;
/// One text, such as a chat template.
const MAX_TEXT_BYTES: u64 = 4 << 20;
/// All keys and texts that are kept.
const MAX_KEPT_BYTES: u64 = 64 << 20;
const MAX_DIMENSIONS: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Lists within lists.
const MAX_NESTING: u32 = 4;
/// A vocabulary whose special tokens are looked for, in tokens.
const MAX_TOKENS: u64 = 1 << 20;
const MAX_TOKEN_BYTES: u64 = 256;
/// Tokens that llama.cpp takes for special ones by their text, whatever their type is (`src/llama-vocab.cpp`, "auto-detect special
/// tokens by text").
const KNOWN_MARKERS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[PAD]",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<end_of_utterance>",
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|channel|>",
    "<|message|>",
    "<|start|>",
    "<|constrain|>",
    "</s>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<\u{ff5c}fim\u{2581}begin\u{ff5c}>",
    "<PRE>",
    "\u{2581}<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<\u{ff5c}fim\u{2581}hole\u{ff5c}>",
    "<SUF>",
    "\u{2581}<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<\u{ff5c}fim\u{2581}end\u{ff5c}>",
    "<MID>",
    "\u{2581}<MID>",
    "<|code_middle|>",
    "<|middle|>",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];
/// Texts and lists in lists, which are skipped one by one: a vocabulary has some 300,000, its merges as many.
const MAX_ITEMS: u64 = 8 << 20;

impl Header {
    /// Reads the beginning of a model file. `file_size`, when known, in bytes.
    ///
    /// # Errors
    /// [`GgufError::Ended`] when more bytes are needed; otherwise what is wrong with the file.
    pub fn parse(prefix: &[u8], file_size: Option<u64>) -> Result<Self, GgufError> {
        Self::read(prefix, file_size)
    }

    /// As [`Header::parse`], from a file; reads no further than the header needs (but for a buffer).
    ///
    /// # Errors
    /// As [`Header::parse`], and what reading returned.
    pub fn read(reader: impl Read, file_size: Option<u64>) -> Result<Self, GgufError> {
        Input::new(reader, file_size).header()
    }
}

struct Input<R> {
    reader: BufReader<R>,
    /// Bytes read so far.
    at: u64,
    /// Where the file ends, if that is known.
    end: u64,
    /// Bytes of text that may still be kept.
    keep_left: u64,
    /// Texts and lists in lists that may still be skipped.
    items_left: u64,
    /// The vocabulary's texts (empty for ones too long for a special token) and types, as far as they were read.
    tokens: Vec<String>,
    token_types: Vec<u32>,
}

/// A name from the file, fit for a message.
pub(super) fn shown(name: &str) -> String {
    name.chars().take(80).flat_map(char::escape_debug).collect()
}

fn malformed<T>(what: impl Into<String>, why: impl Into<String>) -> Result<T, GgufError> {
    Err(GgufError::Malformed { what: what.into(), why: why.into() })
}

fn limit(what: impl Into<String>, actual: u64, max: u64) -> Result<(), GgufError> {
    if actual > max { Err(GgufError::Limit { what: what.into(), actual, max }) } else { Ok(()) }
}

impl<R: Read> Input<R> {
    fn new(reader: R, file_size: Option<u64>) -> Self {
        let reader = BufReader::with_capacity(64 << 10, reader);
        Self {
            reader,
            at: 0,
            end: file_size.unwrap_or(u64::MAX),
            keep_left: MAX_KEPT_BYTES,
            items_left: MAX_ITEMS,
            tokens: Vec::new(),
            token_types: Vec::new(),
        }
    }

    /// Announces that `count` bytes follow.
    fn need(&mut self, count: u64) -> Result<(), GgufError> {
        let after = self.at.saturating_add(count);
        if after > self.end {
            return Err(GgufError::Ended(self.end));
        }
        limit("the length of the header in bytes", after, MAX_HEADER_BYTES)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), GgufError> {
        self.need(bytes.len() as u64)?;
        match self.reader.read_exact(bytes) {
            Ok(()) => self.at += bytes.len() as u64,
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Err(GgufError::Ended(self.at)),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn skip(&mut self, mut count: u64) -> Result<(), GgufError> {
        self.need(count)?;
        while count > 0 {
            let there = self.reader.fill_buf()?.len();
            if there == 0 {
                return Err(GgufError::Ended(self.at));
            }
            let step = usize::try_from(count).unwrap_or(usize::MAX).min(there);
            self.reader.consume(step);
            self.at += step as u64;
            count -= step as u64;
        }
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// A text that is kept.
    fn text(&mut self, what: &str, max: u64) -> Result<String, GgufError> {
        let length = self.u64()?;
        limit(format!("the length of {what} in bytes"), length, max)?;
        self.need(length)?;
        let Some(left) = self.keep_left.checked_sub(length) else {
            return malformed("the metadata", format!("more than {MAX_KEPT_BYTES} bytes of text"));
        };
        self.keep_left = left;
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).or_else(|_| malformed(what, "it is not UTF-8"))
    }

    fn header(mut self) -> Result<Header, GgufError> {
        let magic = self.magic()?;
        let version = self.u32()?;
        match version {
            2 | 3 => {}
            1 => return Err(GgufError::Version1),
            other if matches!(other.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian),
            other => return Err(GgufError::Version(other)),
        }
        let (tensors, entries) = (self.u64()?, self.u64()?);
        limit("the number of tensors", tensors, MAX_TENSORS)?;
        limit("the number of metadata entries", entries, MAX_ENTRIES)?;
        let metadata = self.metadata(entries)?;
        let alignment = alignment(&metadata)?;
        let tensors = self.tensors(tensors, magic, alignment)?;
        let data_offset = self.at.next_multiple_of(alignment);
        let (special_tokens, markers) = self.special_tokens();
        Ok(Header { magic, version, metadata, tensors, special_tokens, markers, data_offset })
    }

    fn magic(&mut self) -> Result<Magic, GgufError> {
        let magic: [u8; 4] = self.bytes()?;
        let likely = match &magic {
            b"GGUF" => return Ok(Magic::Gguf),
            b"PWRI" => return Ok(Magic::Pwri),
            b"FUGG" | b"IRWP" => return Err(GgufError::BigEndian),
            b"vers" => " (a Git LFS pointer: the weights themselves were not fetched)",
            b"<!DO" | b"<!do" | b"<htm" | b"<HTM" => " (a web page: the download answered with an error or a login)",
            b"lmgg" | b"tjgg" | b"fmgg" => " (an older ggml file: convert the model again)",
            [b'P', b'K', ..] => " (a zip archive or a PyTorch file)",
            _ => "",
        };
        Err(GgufError::NotGguf { begins: magic.escape_ascii().to_string(), likely })
    }

    fn metadata(&mut self, count: u64) -> Result<BTreeMap<String, Value>, GgufError> {
        let mut metadata = BTreeMap::new();
        for _ in 0..count {
            let key = self.text("a metadata key", MAX_KEY_BYTES)?;
            let kind = self.u32()?;
            let value = self.value(kind, &key)?;
            let what = shown(&key);
            if metadata.insert(key, value).is_some() {
                return malformed(format!("metadata key `{what}`"), "it is given twice");
            }
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value, GgufError> {
        Ok(match kind {
            0 => Value::Uint(u64::from(self.bytes::<1>()?[0])),
            1 => Value::Int(i64::from(i8::from_le_bytes(self.bytes()?))),
            2 => Value::Uint(u64::from(u16::from_le_bytes(self.bytes()?))),
            3 => Value::Int(i64::from(i16::from_le_bytes(self.bytes()?))),
            4 => Value::Uint(u64::from(self.u32()?)),
            5 => Value::Int(i64::from(i32::from_le_bytes(self.bytes()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.bytes()?))),
            7 => match self.bytes()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => {
                    return malformed(
                        format!("metadata key `{}`", shown(key)),
                        format!("{other} is neither true nor false"),
                    );
                }
            },
            8 => Value::Text(self.text(&format!("metadata key `{}`", shown(key)), MAX_TEXT_BYTES)?),
            9 => Value::Array { length: self.array(key, MAX_NESTING)? },
            10 => Value::Uint(self.u64()?),
            11 => Value::Int(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            other => {
                return malformed(format!("metadata key `{}`", shown(key)), format!("{other} is not a value type"));
            }
        })
    }

    /// Control (3) and user-defined (4) tokens: `llama_token_type` in `llama.h`.
    /// [`Header::special_tokens`] and [`Header::markers`].
    fn special_tokens(&mut self) -> (BTreeMap<String, u32>, BTreeMap<String, TokenKind>) {
        let (mut special, mut markers) = (BTreeMap::new(), BTreeMap::new());
        for (at, text) in std::mem::take(&mut self.tokens).into_iter().enumerate().filter(|(_, text)| !text.is_empty())
        {
            let kind = match self.token_types.get(at) {
                Some(2) => TokenKind::Unknown,
                Some(3) => TokenKind::Control,
                Some(4) => TokenKind::UserDefined,
                _ => TokenKind::Normal,
            };
            if let (TokenKind::Control | TokenKind::UserDefined, Ok(id)) = (kind, u32::try_from(at)) {
                special.insert(text.clone(), id);
            }
            if kind != TokenKind::Normal || KNOWN_MARKERS.contains(&text.as_str()) {
                markers.insert(text, kind);
            }
        }
        (special, markers)
    }

    fn keep_tokens(&mut self, count: u64) -> Result<u64, GgufError> {
        for _ in 0..count {
            let length = self.u64()?;
            let mut bytes = vec![0; if length > MAX_TOKEN_BYTES { 0 } else { length as usize }];
            self.skip(length - bytes.len() as u64)?;
            self.fill(&mut bytes)?;
            self.tokens.push(String::from_utf8(bytes).unwrap_or_default());
        }
        Ok(count)
    }

    fn keep_token_types(&mut self, count: u64) -> Result<u64, GgufError> {
        for _ in 0..count {
            let kind = self.u32()?;
            self.token_types.push(kind);
        }
        Ok(count)
    }

    /// Skips an array, but for what tells special tokens; its length.
    fn array(&mut self, key: &str, nesting: u32) -> Result<u64, GgufError> {
        let what = || format!("metadata key `{}`", shown(key));
        let Some(below) = nesting.checked_sub(1) else { return malformed(what(), "its lists are nested too deep") };
        let (kind, length) = (self.u32()?, self.u64()?);
        match (key, kind) {
            _ if length > MAX_TOKENS || nesting < MAX_NESTING => {}
            ("tokenizer.ggml.tokens", 8) => return self.keep_tokens(length),
            ("tokenizer.ggml.token_type", 4 | 5) => return self.keep_token_types(length),
            _ => {}
        }
        let element_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 | 9 => {
                limit(format!("the number of items in {}", what()), length, self.items_left)?;
                self.items_left -= length;
                for _ in 0..length {
                    if kind == 9 {
                        self.array(key, below)?;
                    } else {
                        let bytes = self.u64()?;
                        self.skip(bytes)?;
                    }
                }
                return Ok(length);
            }
            other => return malformed(what(), format!("{other} is not a value type")),
        };
        self.skip(length.saturating_mul(element_bytes))?;
        Ok(length)
    }

    fn tensors(&mut self, count: u64, magic: Magic, alignment: u64) -> Result<Vec<Tensor>, GgufError> {
        let mut tensors = Vec::new();
        let mut names = BTreeSet::new();
        for _ in 0..count {
            let tensor = self.tensor(magic, alignment)?;
            if !names.insert(tensor.name.clone()) {
                return malformed(format!("tensor `{}`", shown(&tensor.name)), "it is given twice");
            }
            tensors.push(tensor);
        }
        Ok(tensors)
    }

    fn tensor(&mut self, magic: Magic, alignment: u64) -> Result<Tensor, GgufError> {
        let name = self.text("a tensor's name", MAX_NAME_BYTES)?;
        let what = || format!("tensor `{}`", shown(&name));
        let dimensions = self.u32()?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return malformed(what(), format!("it has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}"));
        }
        let mut shape = Vec::with_capacity(dimensions as usize);
        for _ in 0..dimensions {
            shape.push(self.u64()?);
        }
        let kind = current_kind(magic, self.u32()?);
        let offset = self.u64()?;
        let elements = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
        let Some(elements) = elements.filter(|elements| *elements > 0) else {
            return malformed(what(), format!("a shape of {shape:?} is impossible"));
        };
        let size_bytes = match TENSOR_TYPES.iter().find(|known| known.kind == kind) {
            None => Some(0),
            Some(known) if !shape[0].is_multiple_of(known.block_elements) => {
                let (row, block) = (shape[0], known.block_elements);
                return malformed(
                    what(),
                    format!("rows of {row} elements cannot be stored as {} in blocks of {block}", known.name),
                );
            }
            Some(known) => (elements / known.block_elements).checked_mul(known.block_bytes),
        };
        let end =
            size_bytes.and_then(|size| size.checked_add(offset)).and_then(|end| end.checked_add(2 * MAX_HEADER_BYTES));
        let (Some(size_bytes), Some(_)) = (size_bytes, end) else {
            return malformed(what(), "it ends beyond the largest possible file size");
        };
        if !offset.is_multiple_of(alignment) {
            return malformed(what(), format!("its offset {offset} is not a multiple of the alignment {alignment}"));
        }
        Ok(Tensor { name, shape, kind, offset, size_bytes })
    }
}

/// PowerInfer's ggml is from 2023, when the integers had the numbers that other types have today.
fn current_kind(magic: Magic, kind: u32) -> u32 {
    match (magic, kind) {
        (Magic::Pwri, 16..=18) => kind + 8,
        _ => kind,
    }
}

/// Where each tensor's bytes may begin: 32 when the file does not say.
fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(Value::Uint(number)) if number.is_power_of_two() && *number <= MAX_ALIGNMENT => Ok(*number),
        Some(other) => malformed(
            "metadata key `general.alignment`",
            format!("{other:?} is not a power of two up to {MAX_ALIGNMENT}"),
        ),
    }
}
