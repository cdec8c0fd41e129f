//! Renders diagnostics: the message, its place, the source line with the place underlined, what was expected, and a hint.
//!
//! Invariant: nothing from a file reaches the terminal as it is. Control characters become pictures, long lines are cut.

use std::ops::Range;

use annotate_snippets::{AnnotationKind, Element, Group, Level, Origin, Renderer, Snippet};

use crate::base::diagnostic::{Diagnostic, Place, Severity};

/// Characters of the line that are handed to the renderer before, at and after the place; it cuts once more to the screen's width.
const BEFORE: usize = 200;
const AT: usize = 80;
const AFTER: usize = 80;
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
        let name = printable(&place.source.name);
        let mut snippet = Snippet::source(excerpt).line_start(line).annotation(AnnotationKind::Primary.span(span));
        // The renderer counts columns in the excerpt: right unless its beginning was cut.
        if column <= BEFORE {
            snippet = snippet.path(name);
        } else {
            group = group.element(Origin::path(name).line(line).char_column(column));
        }
        group = group.element(snippet);
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
    let boundary = |offset: usize| (offset..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    let start = boundary(place.span.start);
    let end = boundary(place.span.end).max(start);
    let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
    let line_end = text[start..].find(['\r', '\n']).map_or(text.len(), |at| start + at);
    let (before, at) = (&text[line_start..start], &text[start..end.min(line_end)]);
    let after = &text[start + at.len()..line_end];
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

/// One line without control characters.
pub fn printable(text: &str) -> String {
    text.chars().map(visible).collect()
}

fn visible(c: char) -> char {
    match c {
        '\t' => ' ',
        '\0'..='\x1f' => char::from_u32(0x2400 + u32::from(c)).unwrap_or('\u{fffd}'),
        '\x7f' => '\u{2421}',
        // C1 controls, and characters that reorder or hide the text around them.
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

    fn manifest(text: &str) -> String {
        let problems = manifest::parse("manifests/x.toml", text.as_bytes()).expect_err("refused");
        render(&problems.0, false)
    }

    #[test]
    fn what_is_wrong_is_underlined() {
        let text = "engine: e\nmodel: m\ngeneration:\n  temprature: 1\n  top_p: 7\n  stop: [a, [x]]\nruntime: {variant: vulkan, é: 1}\n";
        insta::assert_snapshot!(policy(text), @r#"
        error: unknown key `temprature` in `generation`
         --> configs/models/é x/p.yaml:4:3
          |
        4 |   temprature: 1
          |   ^^^^^^^^^^
          |
          = hint: did you mean `temperature`?

        error: `generation.top_p` is out of range
         --> configs/models/é x/p.yaml:5:10
          |
        5 |   top_p: 7
          |          ^
          |
          = expected: a number from 0 to 1
          = actual: the number `7`

        error: `generation.stop[1]` has the wrong type
         --> configs/models/é x/p.yaml:6:13
          |
        6 |   stop: [a, [x]]
          |             ^
          |
          = expected: a string
          = actual: a list

        error: `runtime.variant` cannot be `vulkan`
         --> configs/models/é x/p.yaml:7:20
          |
        7 | runtime: {variant: vulkan, é: 1}
          |                    ^^^^^^
          |
          = expected: one of `cpu`, `cuda`, `rocm`, `metal`

        error: unknown key `é` in `runtime`
         --> configs/models/é x/p.yaml:7:28
          |
        7 | runtime: {variant: vulkan, é: 1}
          |                            ^
          |
          = expected: one of `batch_size`, `context_size`, `gpu_layers`, `output`, `parallel`, `threads`, `timeout`, `variant`, `vram_budget_gb`
        "#);
    }

    #[test]
    fn syntax_and_what_is_missing() {
        insta::assert_snapshot!(policy("engine: e\nmodel: m\nmodel: n\n"), @r#"
        error: `model` is given twice
         --> configs/models/é x/p.yaml:3:1
          |
        3 | model: n
          | ^^^^^
          |
          = hint: it was first given on line 2: keep one
        "#);
        insta::assert_snapshot!(manifest("version = 1\n[engines.m]\nnative = true\n"), @r#"
        error: `engines.m` has no key `source`
         --> manifests/x.toml:2:10
          |
        2 | [engines.m]
          |          ^
          |
          = expected: a table
        "#);
        insta::assert_snapshot!(manifest("version = 1\n[models.m\nplace = \"a\n"), @r#"
        error: unclosed table, expected `]`
         --> manifests/x.toml:2:10
          |
        2 | [models.m
          |          ^
        "#);
        insta::assert_snapshot!(manifest("version = 7\n"), @r#"
        error: this manifest was written by a newer version of aitools
         --> manifests/x.toml:1:11
          |
        1 | version = 7
          |           ^
          |
          = expected: 1
          = actual: 7
          = hint: upgrade aitools
        "#);
        insta::assert_snapshot!(manifest(""), @r#"
        error: the file has no key `version`
         --> manifests/x.toml:1:1
          |
        1 |
          | ^
          |
          = expected: `1`
        "#);
    }

    #[test]
    fn a_conflict_names_the_way_out() {
        let problems = lockfile::parse("x.lock", b"version = 1\n<<<<<<< HEAD\n").expect_err("refused");
        insta::assert_snapshot!(render(&problems.0, false), @r#"
        error: the lockfile contains git conflict markers
         --> x.lock:2:1
          |
        2 | <<<<<<< HEAD
          | ^^^^^^^
          |
          = hint: run `aitools lock --resolve-conflicts`: it resolves only the entries in conflict
        "#);
    }

    #[test]
    fn without_a_place() {
        let problems = [Diagnostic::warning("the `x` is\nloose").hint("do `y`"), Diagnostic::error("alone")];
        insta::assert_snapshot!(render(&problems, false), @r#"
        warning: the `x` is
                 loose
         |
         = hint: do `y`

        error: alone
        "#);
    }

    #[test]
    fn long_lines_are_cut() {
        let source = format!(
            "version = 1\n[models.m]\nsource = {{ git = \"{}\", x = \"{}\" }}\n",
            "a".repeat(150),
            "b\t".repeat(5000)
        );
        let drawn = manifest(&source);
        assert!(drawn.contains("manifests/x.toml:3:172"), "{drawn}");
        let source = source.replace("aaa", &"a".repeat(3000));
        let drawn = manifest(&source);
        assert!(drawn.contains("manifests/x.toml:3:150022"), "{drawn}");
        assert!(drawn.lines().all(|line| line.chars().count() < 250), "{drawn}");
    }

    #[test]
    fn hostile_text_does_not_reach_the_terminal() {
        let source = SourceText::new("a\x1b[31m", "x = \"\x1b[2J\u{202e}evil\u{9b}\"\r\ny");
        let problem =
            Diagnostic::error("bad \x1b[31m").at(&source, 4..20).expected("\u{7}").actual("\x08").hint("\x7f");
        let drawn = render(std::slice::from_ref(&problem), false);
        let hostile = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!drawn.contains(hostile), "{drawn:?}");
        insta::assert_snapshot!(drawn, @r#"
        error: bad ␛[31m
         --> a␛[31m:1:5
          |
        1 | x = "␛[2J�evil�"
          |     ^^^^^^^^^^^^
          |
          = expected: ␇
          = actual: ␈
          = hint: ␡
        "#);
        let coloured = render(&[problem], true);
        assert!(
            coloured.contains("\x1b[1m") && !coloured.contains("\x1b[2J") && !coloured.contains("\x1b[31m"),
            "{coloured:?}"
        );
    }

    #[test]
    fn places_beyond_the_text_are_drawn() {
        let source = SourceText::new("x", "é\n");
        for span in [0..1, 1..1, 1..2, 3..3, 3..9, 90..99] {
            assert!(render(&[Diagnostic::error("e").at(&source, span)], false).starts_with("error: e"));
        }
    }
}
