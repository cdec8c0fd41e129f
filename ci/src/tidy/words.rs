//! Rules about the text of any file: words that must not be there, ends of lines and of files.

use super::rust::has_word;
use super::{File, files, hold, lines_found};

/// Fragments that no file may hold, and why. Written in halves, so that this file does not hold them either.
const FORBIDDEN: &[(&str, &str, &str)] = &[
    ("/wo", "rk/", "a path of one machine"),
    ("/ro", "ot/", "a path of one machine"),
    ("/ho", "me/", "a path of one machine"),
    ("/tmp", "/dl", "a path of one machine"),
    ("unimple", "mented!", "a stub"),
    ("to", "do!(", "a stub"),
];

/// Words that no file may hold.
const FORBIDDEN_WORDS: &[(&str, &str, &str)] = &[
    ("TO", "DO", "something left undone"),
    ("FIX", "ME", "something left undone"),
    ("XX", "X", "something left undone"),
];

/// Registry hosts: which one is used is the business of the machine's own pip, uv or cargo.
const HOSTS: &[(&str, &str)] = &[("py", "pi.org"), ("files.python", "hosted.org"), ("crates", ".io")];

fn forbidden_words(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files {
        for (number, line) in file.text.lines().enumerate() {
            let mut found = |fragment: String, why: &str| {
                problems.push(file.problem(number + 1, format!("`{fragment}` is {why}")));
            };
            for (head, tail, why) in FORBIDDEN {
                let fragment = format!("{head}{tail}");
                if line.contains(&fragment) {
                    found(fragment, why);
                }
            }
            for (head, tail, why) in FORBIDDEN_WORDS {
                let word = format!("{head}{tail}");
                if has_word(line, &word) {
                    found(word, why);
                }
            }
            for (head, tail) in HOSTS {
                let host = format!("{head}{tail}");
                if file.path != "Cargo.lock" && names_host(line, &host) {
                    found(host, "a registry's host");
                }
            }
        }
    }
    problems
}

/// Whether `host` stands there by itself; `docs.<host>` is another one.
fn names_host(line: &str, host: &str) -> bool {
    line.match_indices(host).any(|(at, _)| {
        !line[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.')
            || line[..at].ends_with("index.")
            || line[..at].ends_with("static.")
    })
}

fn bad_ends(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files {
        if let Some(at) = file.text.split('\n').position(|line| line.ends_with('\r') || line.ends_with(' ')) {
            problems.push(file.problem(at + 1, "a carriage return or a space at the end of a line"));
        }
        if !file.text.is_empty() && (!file.text.ends_with('\n') || file.text.ends_with("\n\n")) {
            problems.push(file.problem(file.text.lines().count(), "a text ends with exactly one line feed"));
        }
    }
    problems
}

#[test]
fn no_forbidden_words() {
    hold(&forbidden_words(&files()));
}

#[test]
fn lines_end_alike() {
    let is_data = |file: &File| file.path.contains("/fixtures/") || file.path.starts_with("fuzz/corpus/");
    let files: Vec<File> = files().into_iter().filter(|file| !is_data(file)).collect();
    hold(&bad_ends(&files));
}

#[test]
fn forbidden_words_are_found() {
    let found = |text: &str| lines_found(forbidden_words, "src/x.rs", text);
    for (head, tail, _) in FORBIDDEN.iter().chain(FORBIDDEN_WORDS) {
        assert_eq!(found(&format!("a\nb {head}{tail} c\n")), [2], "{head}{tail}");
    }
    for (head, tail) in HOSTS {
        assert_eq!(found(&format!("https://{head}{tail}/x\n")), [1]);
        assert_eq!(found(&format!("https://docs.{head}{tail}/x\n")), [0usize; 0]);
    }
    assert_eq!(found("TODOS XXXL\n"), [0usize; 0]);
}

#[test]
fn bad_ends_are_found() {
    let found = |text| lines_found(bad_ends, "x.md", text);
    assert_eq!(found("a\r\nb\n"), [1]);
    assert_eq!(found("a\nb"), [2]);
    assert_eq!(found("a\nb\n\n"), [3]);
    assert_eq!(found("a \n"), [1]);
    assert_eq!(found("a\n"), [0usize; 0]);
}
