//! Rules about Rust sources, and the scanner that tells code from comments and strings.

use super::{File, files, hold, lines_found};

const MAX_LINES: usize = 700;

/// Files that may hold unsafe code, and why there is no way around it.
const UNSAFE: &[(&str, &str)] = &[];

/// The source with comments, strings and characters blanked out; every line stays where it is.
pub(super) fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < bytes.len() {
        let skip = skipped(&text[at..], at > 0 && is_word(bytes[at - 1]));
        if skip == 0 {
            let c = text[at..].chars().next().unwrap();
            out.push(c);
            at += c.len_utf8();
        } else {
            out.extend(text[at..at + skip].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            at += skip;
        }
    }
    out
}

fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric()
}

/// How many bytes at the beginning of `rest` are a comment, a string or a character; 0 when none.
fn skipped(rest: &str, after_word: bool) -> usize {
    let to = |end: Option<usize>| end.unwrap_or(rest.len());
    if rest.starts_with("//") {
        return to(rest.find('\n'));
    }
    if rest.starts_with("/*") {
        return block_comment(rest);
    }
    if rest.starts_with('"') {
        return quoted(rest, '"');
    }
    if rest.starts_with('r') && !after_word {
        let hashes = rest[1..].bytes().take_while(|byte| *byte == b'#').count();
        if rest[1 + hashes..].starts_with('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let start = 2 + hashes;
            return to(rest[start..].find(&close).map(|end| start + end + close.len()));
        }
    }
    let mut chars = rest.chars();
    match (chars.next(), chars.next(), chars.next()) {
        (Some('\''), Some('\\'), _) => quoted(rest, '\''),
        (Some('\''), Some(c), Some('\'')) => 2 + c.len_utf8(),
        _ => 0,
    }
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        let pair = &rest.as_bytes()[at..rest.len().min(at + 2)];
        match pair {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// The lines on which `word` stands as a word of its own.
fn lines_with_word<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.lines().enumerate().filter(move |(_, line)| has_word(line, word)).map(|(number, _)| number + 1)
}

pub(super) fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = at.checked_sub(1).map(|before| line.as_bytes()[before]);
        let after = line.as_bytes().get(at + word.len()).copied();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

fn unexplained_code(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        let code = code_only(&file.text);
        for (number, line) in code.lines().enumerate() {
            // What several test programs share cannot know which of its parts each of them uses.
            let shared = file.path.starts_with("tests/support/");
            if !shared && (line.contains("#[allow(") || line.contains("#![allow(")) {
                problems.push(file.problem(number + 1, "`allow` stays for ever: use `#[expect(.., reason = \"..\")]`"));
            }
        }
        if !UNSAFE.iter().any(|(path, _)| *path == file.path) {
            problems.extend(
                lines_with_word(&code, "unsafe")
                    .map(|line| file.problem(line, "unsafe code in a file that ci/src/tidy/rust.rs does not list")),
            );
        }
    }
    problems
}

fn shapeless_files(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        let lines = file.text.lines().count();
        if lines > MAX_LINES {
            problems.push(file.problem(lines, format!("more than {MAX_LINES} lines: give one of its nouns a file")));
        }
        // What a `tests.rs` is for is said by the file it tests.
        if !file.text.starts_with("//!") && !file.path.ends_with("/tests.rs") {
            problems.push(file.problem(1, "no `//!` head that says what the file is for and what is absent"));
        }
        if let Some(at) = file.text.lines().position(|line| line.contains('\t')) {
            problems.push(file.problem(at + 1, "a tab"));
        }
    }
    problems
}

#[test]
fn no_code_is_excused_silently() {
    hold(&unexplained_code(&files()));
    for (path, reason) in UNSAFE {
        assert!(!reason.is_empty() && files().iter().any(|file| file.path == *path), "stale entry `{path}`");
    }
}

#[test]
fn files_have_a_head_and_an_end() {
    hold(&shapeless_files(&files()));
}

#[test]
fn the_scanner_tells_code_from_text() {
    let blanked =
        code_only("a /* unsafe /* b */ c */ d // e\n\"f \\\" g\" h r#\"i \" j\"# k 'l' '\\'' 'm: for\nr\"n\"");
    let words: Vec<&str> = blanked.split_whitespace().collect();
    assert_eq!(words, ["a", "d", "h", "k", "'m:", "for"]);
    assert_eq!(blanked.lines().count(), 3);
}

#[test]
fn excuses_are_found() {
    let sample = "// unsafe\n#[allow(dead_code)]\nfn f() {}\nunsafe { g() }\nlet unsafe_ish = \"unsafe\";\n";
    assert_eq!(lines_found(unexplained_code, "src/x.rs", sample), [2, 4]);
}

#[test]
fn shapelessness_is_found() {
    assert_eq!(lines_found(shapeless_files, "src/x.rs", "fn f() {}\n\tx\n"), [1, 2]);
    assert_eq!(lines_found(shapeless_files, "src/x.rs", &format!("//! x\n{}", "//\n".repeat(MAX_LINES))), [701]);
    assert_eq!(lines_found(shapeless_files, "src/x.rs", "//! x\n"), [0usize; 0]);
}
