//! `files = [..]` of a manifest: which files of a repository, archive or package are meant.
//!
//! `*` and `?` stop at `/`, `**` does not, `{a,b}` and `[x-z]` are as in a shell; case counts. A pattern that matches
//! nothing is an error that lists what is there: file names in the wild are often misquoted.

use globset::{GlobBuilder, GlobMatcher};

use crate::base::name::RelPath;

use super::{SourceError, archive};

/// Compiled patterns. None at all means every file.
#[derive(Debug)]
pub struct Globs(Vec<GlobMatcher>);

impl Globs {
    /// # Errors
    /// [`SourceError::Disagreement`] for a pattern that cannot be read.
    pub fn new(patterns: &[String]) -> Result<Self, SourceError> {
        let compile = |pattern: &String| {
            let glob = GlobBuilder::new(pattern).literal_separator(true).backslash_escape(true).build();
            glob.map(|glob| glob.compile_matcher()).map_err(|error| SourceError::Disagreement {
                what: format!("`{pattern}` is not a pattern for files"),
                details: vec![error.kind().to_string()],
                hint: None,
            })
        };
        patterns.iter().map(compile).collect::<Result<_, _>>().map(Self)
    }

    /// Whether one of the patterns matches, or there are none.
    pub fn matches(&self, path: &RelPath) -> bool {
        self.0.is_empty() || self.0.iter().any(|glob| glob.is_match(path.as_str()))
    }

    /// The paths that are meant. `what` is where they are, for the error.
    ///
    /// # Errors
    /// [`SourceError::Missing`] when a pattern matches none of `paths`, or there are none at all.
    pub fn select<'a>(&self, what: &str, paths: &[&'a RelPath]) -> Result<Vec<&'a RelPath>, SourceError> {
        if paths.is_empty() {
            return Err(SourceError::Missing { what: what.to_owned(), why: "it has no files".to_owned(), hint: None });
        }
        let idle = self.0.iter().find(|glob| !paths.iter().any(|path| glob.is_match(path.as_str())));
        if let Some(glob) = idle {
            // Weights first: a repository's many other files would hide them.
            let mut there = paths.to_vec();
            there.sort_by_key(|path| !path.as_str().ends_with(".gguf"));
            return Err(archive::missing(what, glob.glob().glob(), there.into_iter()));
        }
        Ok(paths.iter().filter(|path| self.matches(path)).copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select(patterns: &[&str], paths: &[&str]) -> Result<Vec<String>, SourceError> {
        let patterns: Vec<String> = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        let paths: Vec<RelPath> = paths.iter().map(|path| path.parse().unwrap()).collect();
        let selected = Globs::new(&patterns)?.select("`o/n`", &paths.iter().collect::<Vec<_>>())?;
        Ok(selected.into_iter().map(RelPath::to_string).collect())
    }

    #[test]
    fn stars_stop_at_slashes_and_double_stars_do_not() {
        let all = ["a.Q4_0.gguf", "a.gguf", "act/1.pt", "act/deep/2.pt", "é [1].gguf"];
        assert_eq!(select(&[], &all).unwrap(), all);
        assert_eq!(select(&["*.Q4_0.gguf", "act/**"], &all).unwrap(), ["a.Q4_0.gguf", "act/1.pt", "act/deep/2.pt"]);
        assert_eq!(select(&["act/*"], &all).unwrap(), ["act/1.pt"]);
        assert_eq!(select(&["é \\[1\\].gguf"], &all).unwrap(), ["é [1].gguf"]);
    }

    #[test]
    fn a_wrong_name_lists_what_there_is() {
        let all = ["README.md", "bamboo-7b-v0.1.Q4_0.powerinfer.gguf"];
        let error = select(&["bamboo-7b-v0.1.Q4_0.gguf"], &all).unwrap_err();
        let SourceError::Missing { why, hint, .. } = error else { panic!("{error}") };
        assert_eq!(
            why,
            "`bamboo-7b-v0.1.Q4_0.gguf` matches nothing in it; it has: bamboo-7b-v0.1.Q4_0.powerinfer.gguf, README.md"
        );
        assert_eq!(hint.as_deref(), Some("did you mean `bamboo-7b-v0.1.Q4_0.powerinfer.gguf`?"));
        assert!(matches!(select(&["a", "x"], &["a"]), Err(SourceError::Missing { .. })));
        assert!(matches!(select(&[], &[]), Err(SourceError::Missing { .. })));
        assert!(matches!(select(&["[a"], &["a"]), Err(SourceError::Disagreement { .. })));
    }
}
