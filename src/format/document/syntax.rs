//! The first cause of a syntax error, in our own words. A parser reports where it gave up, in the terms of its grammar; what a
//! person has to change is often above that place: a merge conflict, or a quote that was never closed.

use std::sync::Arc;

use granit_parser::Parser;

use crate::base::diagnostic::{Diagnostic, SourceText};

use super::{MAX_DEPTH, Syntax};

/// How many quotes are tried as the cause of an error. Each try parses the text once.
const MAX_QUOTES: usize = 16;

/// The problem to report instead of a parser's, for a text that the parser refused.
pub(super) fn first_cause(syntax: Syntax, source: &Arc<SourceText>) -> Option<Diagnostic> {
    conflict(source).or_else(|| match syntax {
        Syntax::Toml => None,
        Syntax::Yaml => unclosed_quote(source),
    })
}

/// The first conflict marker of git.
fn conflict(source: &Arc<SourceText>) -> Option<Diagnostic> {
    let mut start = 0;
    for line in source.text.split_inclusive('\n') {
        if line.strip_prefix("<<<<<<<").is_some_and(|rest| rest.trim_end().is_empty() || rest.starts_with(' ')) {
            let problem = Diagnostic::error("the file contains git conflict markers").at(source, start..start + 7);
            let name = &source.name;
            return Some(problem.hint(format!(
                "edit the file, or keep one side: `git checkout --ours {name}` or `git checkout --theirs {name}`"
            )));
        }
        start += line.len();
    }
    None
}

/// The quote that opens a string whose end is missing: closing it on its line makes the error go away, or moves it down.
fn unclosed_quote(source: &Arc<SourceText>) -> Option<Diagnostic> {
    let error = yaml_error(&source.text)?;
    let mut start = 0;
    let mut tries = 0;
    for line in source.text.split_inclusive('\n') {
        let end = start + line.trim_end().len();
        if let Some(quote) = open_quote(line.trim_end()) {
            tries += 1;
            let mark = &line[quote..=quote];
            let helps = |at: usize| {
                let closed = format!("{}{mark}{}", &source.text[..at], &source.text[at..]);
                yaml_error(&closed).is_none_or(|later| later > error + 1)
            };
            // At the end of the line, or before the brackets that end a list there.
            let before_brackets = start + line.trim_end().trim_end_matches([']', '}', ',', ' ']).len();
            if helps(end) || helps(before_brackets) {
                let problem = Diagnostic::error("this quote is never closed").at(source, start + quote..end);
                return Some(problem.hint(format!("add `{mark}` at the end of the string")));
            }
        }
        start += line.len();
        if start > error || tries == MAX_QUOTES {
            break;
        }
    }
    None
}

/// Where a line of YAML opens a quote that it does not close, as a byte offset into the line.
fn open_quote(line: &str) -> Option<usize> {
    let mut open: Option<(usize, char)> = None;
    let mut before = ' ';
    let mut chars = line.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match open {
            Some((_, '"')) if c == '\\' => drop(chars.next()),
            Some((_, quote)) if c == quote => open = None,
            Some(_) => {}
            None if c == '#' && before == ' ' => return None,
            None if matches!(c, '"' | '\'') && matches!(before, ' ' | '[' | '{' | ',' | ':') => open = Some((at, c)),
            None => {}
        }
        before = c;
    }
    open.map(|(at, _)| at)
}

/// Where a YAML parser gives up, as a byte offset; None for valid YAML.
fn yaml_error(text: &str) -> Option<usize> {
    let options = granit_parser::options! {
        emit_comments: false,
        flow_nesting_limit: MAX_DEPTH,
        block_nesting_limit: MAX_DEPTH,
    };
    let mut parser = Parser::new_from_str_with_options(text, options);
    loop {
        match parser.next_event()? {
            Ok(_) => {}
            Err(error) => return Some(error.marker().byte_offset().unwrap_or(text.len())),
        }
    }
}

/// A YAML parser's message in plain words.
pub(super) fn yaml_words(message: &str) -> &str {
    match message {
        "mapping values are not allowed in this context" | "illegal placement of ':' indicator" => {
            "a `:` is not allowed here: put the string in quotes, or check the line above"
        }
        "did not find expected <document start>" | "invalid indentation" => {
            "this line does not belong to the lines above it: check its indentation"
        }
        "while parsing a block mapping, did not find expected key" => "expected a key: check the indentation",
        "while parsing a block collection, did not find expected '-' indicator" => {
            "expected `-`: check the indentation of this list"
        }
        "while parsing a flow mapping, did not find expected ',' or '}'" => "expected `,` or `}`",
        "while parsing a flow sequence, expected ',' or ']'" => "expected `,` or `]`",
        "unclosed bracket '['" => "this `[` is never closed",
        "unclosed bracket '{'" => "this `{` is never closed",
        "unclosed quote" => "this quote is never closed",
        "simple key expected ':'" | "simple key is no longer valid" => "expected `:` after this key",
        "tab cannot be used as indentation"
        | "tabs disallowed in this context"
        | "tabs disallowed within this context (block indentation)" => "indent with spaces, not with tabs",
        "while parsing node, found unknown anchor" => "no anchor with this name is defined above",
        "invalid trailing content after double-quoted scalar"
        | "invalid trailing content after single-quoted scalar" => "unexpected text after a quoted string",
        "while parsing a quoted scalar, found unknown escape character" => {
            "unknown escape sequence: use single quotes for a string with backslashes"
        }
        "while parsing a node, did not find expected node content" => "expected a value",
        "comments must be separated from other tokens by whitespace" => "a comment needs a space before `#`",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use crate::format::document::{Document, Syntax};

    fn problems(syntax: Syntax, text: &str) -> Vec<String> {
        let refused = Document::parse(syntax, "a.x", text.as_bytes(), 1 << 20).expect_err("refused");
        let line = |problem: &crate::base::diagnostic::Diagnostic| {
            let place = problem.place.as_ref().expect("a place");
            let (line, column) = place.source.line_column(place.span.start);
            format!("{line}:{column}: {}", problem.message)
        };
        refused.0.iter().map(line).collect()
    }

    #[test]
    fn u24_a_merge_conflict_is_one_problem() {
        let toml = "a = 1\n<<<<<<< HEAD\nb = 1\n=======\nb = 2\n>>>>>>> other\n";
        assert_eq!(problems(Syntax::Toml, toml), ["2:1: the file contains git conflict markers"]);
        let yaml = "a: 1\n<<<<<<< HEAD\nb: 1\n=======\nb: 2\n>>>>>>> other\n";
        assert_eq!(problems(Syntax::Yaml, yaml), ["2:1: the file contains git conflict markers"]);
        let text = "a: |\n  <<<<<<< HEAD\n";
        assert!(Document::parse(Syntax::Yaml, "a.yaml", text.as_bytes(), 99).is_ok(), "only text");
    }

    #[test]
    fn u24_an_unclosed_quote_is_reported_where_it_opens() {
        let table = [
            ("a: \"text\nb: 1\nc:\n  d: \"more\"\ne: 2\n", "1:4"),
            ("a: 'text\nb: 1\n", "1:4"),
            ("a: 1\nb: [x, \"y]\nc: \"z\"\n", "2:8"),
            ("# it's a comment\na: \"one\n  two\"\nb: \"x\nc: 1\n", "4:4"),
        ];
        for (text, place) in table {
            assert_eq!(problems(Syntax::Yaml, text), [format!("{place}: this quote is never closed")], "{text}");
        }
        for text in ["a: \"one\n  two\"\n", "a: \"x \\\" y\"\nb: 'it''s'\nc: it's\n"] {
            assert!(Document::parse(Syntax::Yaml, "a.yaml", text.as_bytes(), 99).is_ok(), "{text}");
        }
    }

    #[test]
    fn u24_other_errors_of_yaml_are_in_plain_words() {
        assert_eq!(
            problems(Syntax::Yaml, "a: b: c\n"),
            ["1:5: a `:` is not allowed here: put the string in quotes, or check the line above"]
        );
        assert_eq!(problems(Syntax::Yaml, "a:\n\tb: 1\n").len(), 1);
        assert_eq!(problems(Syntax::Yaml, "a: [1, 2\nb: 3\n").len(), 1);
    }
}
