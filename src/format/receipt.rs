//! The receipt of a built artifact: which inputs made it, and what came out. JSON, beside the artifact, written last.
//!
//! A receipt carries a message authentication code under a key that is not in the cache (see [`crate::store`]):
//! one that arrives with a restored cache from elsewhere is not believed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};
use crate::base::platform::Variant;

/// The version of the format that this program reads and writes.
pub const VERSION: u32 = 1;
/// Bytes of a receipt at most.
pub const MAX_BYTES: usize = 16 << 20;
const MAX_FILES: usize = 100_000;
const MAX_INPUTS: usize = 10_000;

/// What was installed or derived, and from which inputs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// The version of this format.
    pub version: u32,
    /// The engine's name in the manifest.
    pub engine: Name,
    /// The accelerator.
    pub variant: Variant,
    /// Digest of `inputs`: the artifact's name in the store.
    pub fingerprint: Digest,
    /// Every named input of the build.
    pub inputs: BTreeMap<String, String>,
    /// What was installed, by path below the artifact.
    pub files: BTreeMap<RelPath, InstalledFile>,
    /// Things about the build that do not change its result: tool versions in full, warnings, seconds.
    pub notes: BTreeMap<String, String>,
}

/// One installed file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct InstalledFile {
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 of its bytes.
    pub sha256: Digest,
    /// Whether it may be executed.
    pub executable: bool,
}

/// Why bytes are no receipt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum ReceiptError {
    #[error("a receipt of version {0}, this program knows {VERSION}")]
    Version(u64),
    #[error("{what}: {count}, but the limit is {max}")]
    TooMany { what: &'static str, count: usize, max: usize },
    #[error("not a receipt: {0}")]
    Malformed(String),
}

impl Receipt {
    /// # Errors
    /// [`ReceiptError`]: another version, too much of something, or no receipt at all.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReceiptError> {
        let most =
            |what, count, max| if count > max { Err(ReceiptError::TooMany { what, count, max }) } else { Ok(()) };
        most("bytes", bytes.len(), MAX_BYTES)?;
        let malformed = |error: serde_json::Error| ReceiptError::Malformed(error.to_string());
        // The version number is read before anything that a newer version may have added.
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(malformed)?;
        if let Some(version) = value["version"].as_u64().filter(|version| *version != u64::from(VERSION)) {
            return Err(ReceiptError::Version(version));
        }
        let receipt: Self = serde_json::from_value(value).map_err(malformed)?;
        most("files", receipt.files.len(), MAX_FILES)?;
        most("inputs", receipt.inputs.len(), MAX_INPUTS)?;
        most("notes", receipt.notes.len(), MAX_INPUTS)?;
        Ok(receipt)
    }

    /// The same bytes for the same receipt.
    pub fn to_text(&self) -> String {
        // Maps with texts as keys and plain values: this cannot fail, and an empty text would be refused when read.
        serde_json::to_string_pretty(self).map_or_else(|_| String::new(), |text| text + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Receipt {
        let file = |executable| InstalledFile { size: 3, sha256: Digest::of(b"abc"), executable };
        Receipt {
            version: VERSION,
            engine: "llama-cpp".parse().expect("name"),
            variant: Variant::Cpu,
            fingerprint: Digest::of(b"inputs"),
            inputs: BTreeMap::from([("cmake".to_owned(), "4.4.4 é".to_owned())]),
            files: ["bin/a b", "lib/é.so"]
                .map(|path| (path.parse().expect("path"), file(path.starts_with("bin"))))
                .into(),
            notes: BTreeMap::new(),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let text = sample().to_text();
        assert_eq!(Receipt::parse(text.as_bytes()), Ok(sample()));
        assert_eq!(sample().to_text(), text);
    }

    #[test]
    fn what_is_no_receipt() {
        let text = sample().to_text();
        let said = |text: &str| Receipt::parse(text.as_bytes()).expect_err(text).to_string();
        assert_eq!(said("{\"version\": 2, \"new\": 1}"), "a receipt of version 2, this program knows 1");
        assert!(said(&text.replace("bin/a b", "../a")).contains("is not a path inside its folder"));
        assert!(said(&text.replace("\"notes\"", "\"note\"")).contains("unknown field"));
        assert!(said(&"[".repeat(1000)).contains("recursion limit"));
        assert!(said(&" ".repeat(MAX_BYTES + 1)).contains("bytes"));
        for length in 0..text.trim_end().len() {
            assert!(Receipt::parse(&text.as_bytes()[..length]).is_err());
        }
    }
}
