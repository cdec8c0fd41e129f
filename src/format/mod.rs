//! Layer 1: one file per on-disk format. Bytes in, typed value or [`Diagnostics`](crate::base::diagnostic::Diagnostics) out.
//!
//! Invariant: no disk, no network, no clock, so that every parser can be fed anything.

use crate::base::diagnostic::Diagnostic;

pub mod cyclonedx;
pub mod document;
pub mod dsse;
pub mod gguf;
pub mod in_toto;
pub mod lockfile;
pub mod manifest;
pub mod oci;
pub mod policy;
pub mod receipt;
pub mod schema;
pub mod settings;

/// A value with the document it was read from, so that a later check can still say where.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed<T> {
    /// The value.
    pub value: T,
    /// The document.
    pub document: document::Document,
}

impl<T> Parsed<T> {
    /// An error about the value at a path of keys, items of lists by their number: `["models", "x", "source"]`.
    pub fn error(&self, path: &[&str], message: impl Into<String>) -> Diagnostic {
        self.document.error(path, message)
    }

    /// Byte offsets of the value at `path`, or of the nearest thing above it.
    pub fn span_of(&self, path: &[&str]) -> std::ops::Range<usize> {
        self.document.span_of(path)
    }
}

#[cfg(test)]
mod tests {
    use super::lockfile::RawEntry;
    use super::manifest::Manifest;
    use super::policy::Policy;
    use super::schema::{self, Schema};
    use super::settings::Settings;

    #[test]
    fn every_rule_of_our_types_is_understood() {
        assert!(Schema::<Manifest>::new().is_understood());
        assert!(Schema::<Policy>::new().is_understood());
        assert!(Schema::<Settings>::new().is_understood());
        assert!(Schema::<RawEntry>::new().is_understood());
    }

    #[test]
    fn schemas_for_editors() {
        let (manifest, policy) = (schema::of::<Manifest>(), schema::of::<Policy>());
        for (schema, title) in [(&manifest, "Manifest"), (&policy, "Policy"), (&schema::of::<Settings>(), "Settings")] {
            assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
            assert_eq!((schema["title"].as_str(), &schema["additionalProperties"]), (Some(title), &false.into()));
        }
        assert_eq!(policy["$defs"]["Generation"]["properties"]["top_p"]["maximum"], 1.0);
        assert_eq!(manifest["properties"]["version"]["maximum"], 1);
    }
}
