//! Models that are GGUF files: opened for every engine that loads such files.

use std::path::{Path, PathBuf};

use super::finding::{Finding, error};
use super::{ModelError, ModelFiles};
use crate::base::fs;
use crate::base::name::RelPath;
use crate::format::gguf::Header;
use crate::format::policy::Policy;

/// The headers of a model, and where its files are.
#[derive(Debug, Clone)]
pub struct Gguf {
    /// The main weights file.
    pub weights: PathBuf,
    /// The main file's header first, and every part's when it is split.
    pub headers: Vec<Header>,
    /// The size of each part in bytes.
    pub sizes: Vec<u64>,
    /// The model's files that are no weights, as its source names them.
    pub beside: Vec<RelPath>,
}

impl Gguf {
    /// Reads the header of every part.
    ///
    /// # Errors
    /// When there is no weights file, or one cannot be read or is no GGUF file.
    pub fn open(files: &ModelFiles<'_>) -> Result<Self, ModelError> {
        let weights = files
            .weights
            .first()
            .cloned()
            .ok_or_else(|| ModelError { path: PathBuf::new(), why: "the model has none".to_owned() })?;
        let (mut headers, mut sizes) = (Vec::new(), Vec::new());
        for path in files.weights {
            let (header, size) = read(path)?;
            headers.push(header);
            sizes.push(size);
        }
        Ok(Self { weights, headers, sizes, beside: files.beside.to_vec() })
    }

    /// The main file's header, which describes the whole model. [`Gguf::open`] gives at least one.
    pub fn header(&self) -> &Header {
        &self.headers[0]
    }

    /// Bytes of all parts.
    pub fn size_bytes(&self) -> u64 {
        self.sizes.iter().fold(0, |sum, size| sum.saturating_add(*size))
    }
}

/// The header of a file, and the file's size in bytes.
///
/// # Errors
/// When the file cannot be read or is no GGUF file.
pub fn read(path: &Path) -> Result<(Header, u64), ModelError> {
    let unusable = |why: String| ModelError { path: path.to_owned(), why };
    let size = fs::metadata(path).map_err(|error| unusable(error.to_string()))?.len();
    let file = fs::open(path).map_err(|error| unusable(error.to_string()))?;
    let header = Header::read(file, Some(size)).map_err(|error| unusable(error.to_string()))?;
    Ok((header, size))
}

/// The Jinja chat template that a policy gives or a model has. None when prompts are sent as they are.
pub fn chat_template<'a>(policy: &'a Policy, header: &'a Header) -> Option<&'a str> {
    match policy.generation.chat_template.as_deref() {
        Some("none") => None,
        Some(template) => Some(template),
        None => header.chat_template(),
    }
}

/// Tokens of context for one request: the policy's, else what the model was trained on, but at most `default`.
pub fn context_size(policy: &Policy, header: &Header, default: u32) -> u32 {
    let trained = header.context_length().and_then(|tokens| u32::try_from(tokens).ok());
    policy.runtime.context_size.unwrap_or_else(|| trained.unwrap_or(default).min(default))
}

/// Bytes of key and value cache that one token takes, in 16 bits; 0 when the header does not say.
pub fn cache_bytes_per_token(header: &Header) -> u64 {
    let of = |key| header.architecture_uint(key);
    let Some(layers) = of("block_count") else { return 0 };
    let Some(heads) = of("attention.head_count_kv").or_else(|| of("attention.head_count")) else { return 0 };
    let width = || Some(of("embedding_length")? / of("attention.head_count")?.max(1));
    let key = of("attention.key_length").or_else(width).unwrap_or(0);
    let value = of("attention.value_length").or_else(width).unwrap_or(0);
    [heads, key.saturating_add(value), 2].into_iter().fold(layers, u64::saturating_mul)
}

/// A file that is shorter than its header says.
pub fn of_extents(header: &Header, size_bytes: u64, which: &str) -> Option<Finding> {
    let cut = header.check_extents(size_bytes).err()?;
    let hint = "`aitools verify --repair` fetches it again";
    Some(error("", format!("{which}{cut}"), Some(hint)))
}
