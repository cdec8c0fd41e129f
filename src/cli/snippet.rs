//! Draws diagnostics: the message, where it is, the line itself with the place underlined, what was expected, and what to do.
//!
//! Invariant: nothing from a file reaches the terminal as it is. Control characters become pictures, long lines are cut.

use std::ops::Range;

use annotate_snippets::{AnnotationKind, Element, Group, Level, Origin, Renderer, Snippet};

use crate::base::diagnostic::{Diagnostic, Place, Severity};

/// Characters of the line that are shown before, at and after the place.
const BEFORE: usize = 60;
const AT: usize = 80;
const AFTER: usize = 60;
/// Characters of a message, or of what was expected or found.
const MESSAGE: usize = 2000;

/// All of them, a blank line between.
pub fn render(diagnostics: &[Diagnostic], colour: bool) -> String {
    let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
    let mut text = String::new();
    for diagnostic in diagnostics {
        if !text.is_empty() {
            text.push('\n');
        }
        text += &renderer.render(&[group(diagnostic)]);
        text.push('\n');
    }
    text
}

fn group(diagnostic: &Diagnostic) -> Group<'_> {
    let level = match diagnostic.severity {
        Severity::Error => Level::ERROR,
        Severity::Warning => Level::WARNING,
    };
    let mut group = level.primary_title(message(&diagnostic.message)).elements(std::iter::empty::<Element<'_>>());
    if let Some(place) = &diagnostic.place {
        let (line, column) = place.source.line_column(place.span.start);
        let (excerpt, span) = excerpt(place);
        group = group
            .element(Origin::path(printable(&place.source.name)).line(line).char_column(column))
            .element(Snippet::source(excerpt).line_start(line).annotation(AnnotationKind::Primary.span(span)));
    }
    let footers = [("expected", &diagnostic.expected), ("actual", &diagnostic.actual), ("hint", &diagnostic.hint)];
    for (name, footer) in footers {
        if let Some(footer) = footer {
            group = group.element(Level::HELP.with_name(name).message(message(footer)));
        }
    }
    group
}

fn message(text: &str) -> String {
    let lines: Vec<String> = cut(text, MESSAGE).lines().map(printable).collect();
    lines.join("\n")
}

/// The line of a place, made harmless, and the place in it.
fn excerpt(place: &Place) -> (String, Range<usize>) {
    let text = &place.source.text;
    let start = text.floor_char_boundary(place.span.start);
    let end = text.ceil_char_boundary(place.span.end.max(start));
    let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
    let line_end = text[start..].find('\n').map_or(text.len(), |at| start + at);
    let (before, at) = (&text[line_start..start], &text[start..end.min(line_end)]);
    let after = text[start + at.len()..line_end].trim_end_matches('\r');
    let skipped = before.chars().count().saturating_sub(BEFORE);
    let mut excerpt: String = if skipped > 0 { "…".to_owned() } else { String::new() };
    excerpt.extend(before.chars().skip(skipped).map(visible));
    let from = excerpt.len();
    excerpt += &printable(&cut(at, AT));
    let to = excerpt.len();
    excerpt += &printable(&cut(after, AFTER));
    (excerpt, from..to)
}

/// The first `count` characters, and a sign that there are more.
fn cut(text: &str, count: usize) -> String {
    match text.char_indices().nth(count) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// One line without characters that a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars().map(visible).collect()
}

fn visible(c: char) -> char {
    match c {
        '\t' => ' ',
        '\0'..='\x1f' => char::from_u32(0x2400 + u32::from(c)).unwrap_or('\u{fffd}'),
        '\x7f' => '\u{2421}',
        // C1 controls, and what turns or hides the text around it.
        '\u{80}'..='\u{9f}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}' => '\u{fffd}',
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::diagnostic::SourceText;
    use crate::format::{lockfile, manifest, policy};

    fn policy(text: &str) -> String {
        let problems = policy::parse("configs/models/é x/p.yaml", text.as_bytes()).expect_err("refused");
        render(&problems.0, false)
    }

    #[test]
    fn scratch() {
        eprintln!(
            "{}",
            policy("engine: e\nmodel: m\ngeneration:\n  temprature: 1\n  top_p: 7\n  stop: [a, 3, [x]]\n  é: 1\n")
        );
        let m = |text: &str| {
            eprintln!("{}", render(&manifest::parse("m.toml", text.as_bytes()).expect_err("refused").0, false))
        };
        m("version = 1\n[models.m]\nplace = \"a\"\n");
        m("version = 1\n[models.m\nplace = \"a\n");
        m("");
        let long = format!(
            "version = 1\n[models.m]\nplace = \"a\"\nsource = {{ git = \"{}\", x = 1, y = \"{}\" }}",
            "a".repeat(500),
            "b\t".repeat(500)
        );
        m(&long);
        let s = SourceText::new("a\x1b[31m", "x = \"\x1b[2J\u{202e}evil\"\r\ny");
        let d = Diagnostic::error("bad `\x1b[31m`").at(&s, 4..20).expected("a\nb").actual("\u{7}").hint("do `x`");
        eprintln!("{}", render(std::slice::from_ref(&d), false));
        eprintln!("{}", render(&[d], true));
        eprintln!("{}", render(&[Diagnostic::warning("no place").hint("do `x`"), Diagnostic::error("alone")], false));
        let _ =
            lockfile::parse("a.lock", b"version = 1\n<<<<<<< a\n").map_err(|e| eprintln!("{}", render(&e.0, false)));
    }
}
