//! What the documents promise is so: links lead somewhere, commands exist, tables equal the code.

use clap::Parser as _;

use super::{File, files, find, hold, lines_found};
use crate::job::E2E;
use crate::quickstart;

/// What people ask for by another name, and the crate that is here instead: Cargo.toml says why, above it.
const REPLACED: &[(&str, &str)] =
    &[("serde_yaml", "granit-parser"), ("hf-hub", "ureq"), ("reqwest", "ureq"), ("oci-client", "ureq")];

/// Links of Markdown files to files that are not there.
fn dead_links(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with(".md")) {
        let folder = crate::step::root().join(&file.path).parent().unwrap().to_owned();
        for (number, line) in file.text.lines().enumerate() {
            for link in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                let target = link.split('#').next().unwrap();
                let outside = link.contains("://") || link.starts_with("mailto:") || target.is_empty();
                if !outside && !folder.join(target).exists() {
                    problems.push(file.problem(number + 1, format!("`{target}` is not there")));
                }
            }
        }
    }
    problems
}

/// What follows each `head` up to the end of the command, word by word.
fn commands<'a>(text: &'a str, head: &'a str) -> impl Iterator<Item = (usize, Vec<&'a str>)> + 'a {
    text.lines().enumerate().flat_map(move |(number, line)| {
        line.match_indices(head).filter_map(move |(at, _)| {
            let rest = &line[at + head.len()..];
            let rest = &rest[..rest.find(['`', '#', '&', ';', '|', ')', '<', ',', '"']).unwrap_or(rest.len())];
            let whole = rest.is_empty() || rest.starts_with(' ');
            whole.then(|| (number + 1, rest.split_whitespace().collect()))
        })
    })
}

/// `cargo ci …` in documents and workflows that this program would refuse.
fn unknown_ci_commands(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    let spoken =
        |path: &str| path.ends_with(".md") || path.ends_with(".yml") || path.ends_with(".json") || path == ".ci/run";
    for file in files.iter().filter(|file| spoken(&file.path)) {
        for (line, words) in commands(&file.text, "cargo ci") {
            if let Err(error) = crate::Args::try_parse_from(std::iter::once("cargo ci").chain(words)) {
                let why = error.to_string();
                problems.push(file.problem(line, why.lines().next().unwrap()));
            }
        }
    }
    problems
}

/// Files that workflows hash or run and that are not there.
fn missing_workflow_files(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.path.starts_with(".github/workflows/")) {
        for (number, line) in file.text.lines().enumerate() {
            let hashed = line.split("hashFiles(").skip(1).filter_map(|rest| rest.split(')').next());
            let hashed = hashed.flat_map(|list| list.split(',')).map(|name| name.trim().trim_matches('\''));
            let run = line.trim().strip_prefix("- run: ./").or(line.trim().strip_prefix("run: ./"));
            for name in hashed.chain(run.and_then(|rest| rest.split(' ').next())) {
                if !crate::step::root().join(name).exists() {
                    problems.push(file.problem(number + 1, format!("`{name}` is not there")));
                }
            }
        }
    }
    problems
}

/// Crates that stand in for better known ones and do not say why.
fn unexplained_replacements(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.path == "Cargo.toml") {
        let lines: Vec<&str> = file.text.lines().collect();
        for (asked, instead) in REPLACED {
            let Some(at) = lines.iter().position(|line| line.starts_with(&format!("{instead} ="))) else {
                problems
                    .push(file.problem(1, format!("`{instead}` is not here: mend the list in ci/src/tidy/docs.rs")));
                continue;
            };
            let comment = lines[..at].iter().rev().take_while(|line| line.starts_with('#'));
            if !comment.into_iter().any(|line| line.contains(asked)) {
                problems.push(file.problem(at + 1, format!("say in a comment above why it is not `{asked}`")));
            }
        }
    }
    problems
}

#[test]
fn links_lead_somewhere() {
    hold(&dead_links(&files()));
}

#[test]
fn commands_of_this_program_exist() {
    let files = files();
    hold(&unknown_ci_commands(&files));
    assert_eq!(E2E[0].name, "quickstart");
}

#[test]
fn workflows_name_files_that_exist() {
    hold(&missing_workflow_files(&files()));
}

#[test]
fn replacements_say_why() {
    hold(&unexplained_replacements(&files()));
}

#[test]
fn the_readme_holds_the_two_commands() {
    let files = files();
    let readme = &find(&files, "README.md").text;
    let first = format!(
        "cargo run --release -- -m quickstart run {} --sync --prompt \"{}\"\n",
        quickstart::POLICY,
        quickstart::PROMPT
    );
    assert!(readme.contains(&first), "the README does not hold\n{first}");
    assert!(readme.contains("\ncargo ci\n"), "the README does not hold `cargo ci` on a line of its own");
    assert!(find(&files, ".ci/run").text.contains("exec cargo ci <"), ".ci/run does not run the README's command");
}

#[test]
fn broken_promises_are_found() {
    assert_eq!(lines_found(dead_links, "README.md", "[a](src/lib.rs#x)\n[b](no/such) [c](https://x.y)\n"), [2]);
    assert_eq!(lines_found(unknown_ci_commands, "a.md", "`cargo ci`, `cargo ci e2e quickstart`\ncargo ci nope\n"), [2]);
    let workflow = "key: ${{ hashFiles('Cargo.lock', 'no/such.lock') }}\n- run: ./.ci/run\n- run: ./no/such x\n";
    assert_eq!(lines_found(missing_workflow_files, ".github/workflows/x.yml", workflow), [1, 3]);
    let manifest = "# Not serde_yaml: archived.\ngranit-parser = \"2\"\nureq = \"3\"\n";
    assert_eq!(lines_found(unexplained_replacements, "Cargo.toml", manifest), [3, 3, 3]);
}
