//! Problems in an input: message, place and hint. Data only: `cli/` draws them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A text that was read: its name as shown to people, and its content.
#[derive(Debug, PartialEq, Eq)]
pub struct SourceText {
    /// The path as the user would write it, for messages.
    pub name: String,
    /// The whole content.
    pub text: String,
}

impl SourceText {
    /// A text with the name that messages use for it.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Arc<Self> {
        Arc::new(Self { name: name.into(), text: text.into() })
    }

    /// Line and column (both from 1, columns in characters) of a byte offset.
    pub fn line_column(&self, offset: usize) -> (usize, usize) {
        let mut end = offset.min(self.text.len());
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        let before = &self.text[..end];
        let line = before.matches('\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |at| at + 1);
        (line, before[start..].chars().count() + 1)
    }
}

/// A range of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The text.
    pub source: Arc<SourceText>,
    /// Byte offsets into the text.
    pub span: Range<usize>,
}

/// How serious a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The input can still be used.
    Warning,
    /// The input cannot be used.
    Error,
}

/// One problem. `message` is a lowercase phrase without a final period, names in backticks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Whether it is an error or a warning.
    pub severity: Severity,
    /// Where it is; None for a problem of the whole input.
    pub place: Option<Place>,
    /// What is wrong.
    pub message: String,
    /// What would be correct, as a noun phrase.
    pub expected: Option<String>,
    /// What was found instead, as a noun phrase.
    pub actual: Option<String>,
    /// What to do next, as a command or an edit.
    pub hint: Option<String>,
}

impl Diagnostic {
    /// An error without a place.
    pub fn error(message: impl Into<String>) -> Self {
        Self::new(Severity::Error, message)
    }

    /// A warning without a place.
    pub fn warning(message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, message)
    }

    fn new(severity: Severity, message: impl Into<String>) -> Self {
        Self { severity, place: None, message: message.into(), expected: None, actual: None, hint: None }
    }

    /// The same problem, placed at a range of bytes of `source`.
    #[must_use]
    pub fn at(mut self, source: &Arc<SourceText>, span: Range<usize>) -> Self {
        self.place = Some(Place { source: Arc::clone(source), span });
        self
    }

    /// The same problem, with what would be correct.
    #[must_use]
    pub fn expected(mut self, text: impl Into<String>) -> Self {
        self.expected = Some(text.into());
        self
    }

    /// The same problem, with what was found.
    #[must_use]
    pub fn actual(mut self, text: impl Into<String>) -> Self {
        self.actual = Some(text.into());
        self
    }

    /// The same problem, with what to do next.
    #[must_use]
    pub fn hint(mut self, text: impl Into<String>) -> Self {
        self.hint = Some(text.into());
        self
    }

    /// Whether it is an error rather than a warning.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            let (line, column) = place.source.line_column(place.span.start);
            write!(f, "{}:{line}:{column}: ", place.source.name)?;
        }
        write!(f, "{}", self.message)
    }
}

/// All problems of an input. Used as an error, it contains at least one error.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl Diagnostics {
    /// The most problems that are kept of one input: a hostile input must not cost more memory.
    pub const MAX: usize = 50;

    /// Past [`Self::MAX`], one last entry says that there are more.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        if self.0.len() < Self::MAX {
            return self.0.push(diagnostic);
        }
        let severity = self.0.get(Self::MAX).map_or(diagnostic.severity, |last| last.severity.max(diagnostic.severity));
        self.0.truncate(Self::MAX);
        self.0.push(Diagnostic::new(severity, "there are more problems: mend these first"));
    }

    /// In the order of the text; what has no place comes last.
    pub fn sort(&mut self) {
        self.0.sort_by_key(|diagnostic| diagnostic.place.as_ref().map_or(usize::MAX, |place| place.span.start));
    }

    /// Whether at least one of the problems is an error.
    pub fn has_errors(&self) -> bool {
        self.0.iter().any(Diagnostic::is_error)
    }

    /// `value` with the warnings, or everything when one is an error.
    ///
    /// # Errors
    /// `self` when it holds an error.
    pub fn or<T>(self, value: T) -> Result<(T, Vec<Diagnostic>), Self> {
        if self.has_errors() { Err(self) } else { Ok((value, self.0)) }
    }
}

impl From<Diagnostic> for Diagnostics {
    fn from(one: Diagnostic) -> Self {
        Self(vec![one])
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, diagnostic) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{diagnostic}")?;
        }
        Ok(())
    }
}

/// The candidate nearest to what was written, for "did you mean".
pub fn nearest<'a>(written: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A long text is not a typing error, and comparing it would take time.
    const MAX_BYTES: usize = 200;
    let one_slip = |candidate: &str| written.len() > 2 && strsim::osa_distance(written, candidate) == 1;
    candidates
        .into_iter()
        .filter(|_| written.len() <= MAX_BYTES)
        .map(|candidate| (strsim::jaro_winkler(written, candidate), candidate))
        .filter(|(score, candidate)| *score > 0.8 || one_slip(candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}
