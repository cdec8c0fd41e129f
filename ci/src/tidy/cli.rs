//! What the documents say of the program's own command line is what the program does.

use std::collections::BTreeSet;

use aitools::cli::args::Args;
use aitools::format::settings::{self, Owner};
use clap::{CommandFactory as _, Parser as _};

use super::{File, files, find, hold, lines_found};

/// Arguments as a shell would make them: words, and double quotes around some of them. Ends with the command.
fn arguments(rest: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None, false);
    for c in rest.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_with(String::new);
            }
            '`' | '#' | ';' | '|' | '&' | '<' | '[' if !quoted => break,
            c if c.is_whitespace() && !quoted => words.extend(word.take()),
            c => word.get_or_insert_with(String::new).push(c),
        }
    }
    words.extend(word);
    words
}

/// Commands in documents, tasks and workflows that the program would refuse.
fn refused_commands(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    let spoken = |path: &str| path.ends_with(".md") || path.ends_with(".yml") || path == ".vscode/tasks.json";
    for file in files.iter().filter(|file| spoken(&file.path)) {
        for (number, line) in file.text.lines().enumerate() {
            let json = line.trim().strip_prefix("\"command\": ").map(|value| value.trim_end_matches(','));
            let unquoted = json.and_then(|value| serde_json::from_str::<String>(value).ok());
            let line = unquoted.as_deref().unwrap_or(line);
            for head in ["cargo run --release -- ", "`aitools "] {
                let Some((_, rest)) = line.split_once(head) else { continue };
                if let Err(error) = Args::try_parse_from(std::iter::once("aitools".to_owned()).chain(arguments(rest))) {
                    let why = error.to_string();
                    problems.push(file.problem(number + 1, why.lines().next().unwrap()));
                }
            }
        }
    }
    problems
}

/// The rows of the table under a heading: the words in backticks (or bare) that each begins with.
fn first_column<'a>(readme: &'a str, heading: &str) -> BTreeSet<&'a str> {
    let section =
        readme.split(&format!("\n## {heading}\n")).nth(1).and_then(|rest| rest.split("\n## ").next()).unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")).skip(1);
    rows.filter_map(|row| row.trim_start_matches('`').split([' ', '`']).next()).collect()
}

#[test]
fn documented_commands_are_accepted() {
    hold(&refused_commands(&files()));
}

#[test]
fn the_readme_lists_the_commands() {
    let files = files();
    let program = Args::command();
    let commands = program.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help");
    let commands: BTreeSet<&str> = commands.map(clap::Command::get_name).collect();
    assert_eq!(first_column(&find(&files, "README.md").text, "Commands"), commands);
}

#[test]
fn the_readme_lists_the_exit_codes() {
    let files = files();
    let rows: String =
        aitools::cli::exit::TABLE.iter().map(|(code, meaning)| format!("| {code} | {meaning} |\n")).collect();
    let table = format!("\n## Exit codes\n\n| code | meaning |\n|---|---|\n{rows}\n");
    assert!(find(&files, "README.md").text.contains(&table), "the README's table of exit codes must be\n{table}");
}

#[test]
fn every_line_of_the_example_settings_is_one() {
    let files = files();
    let example = &find(&files, "configs/settings.toml").text;
    let set = example.lines().filter_map(|line| line.strip_prefix("# ")).filter(|line| line.contains(" = "));
    let set: Vec<&str> = set.collect();
    assert!(set.len() > 5, "{set:?}");
    for line in set {
        settings::parse("settings.toml", line.as_bytes(), Owner::Project).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn refused_commands_are_found() {
    let text = "cargo run --release -- sync # all\n`aitools sync a b`, `aitools nope`\n`aitools nope`\n";
    assert_eq!(lines_found(refused_commands, "a.md", text), [3]);
    let tasks = "\"command\": \"cargo run --release -- run p --prompt \\\"a b\\\"\",\n\"command\": \"cargo run --release -- run p q\"\n";
    assert_eq!(lines_found(refused_commands, ".vscode/tasks.json", tasks), [2]);
}

#[test]
fn words_and_tables_are_read() {
    assert_eq!(arguments("run x --prompt \"a b?\" -n '' # c"), ["run", "x", "--prompt", "a b?", "-n", "''"]);
    let readme = "\n## Commands\n\n| command | does |\n|---|---|\n| `a [B]` | x |\n| 7 | y |\n\n## Next\n\n| z | z |\n";
    assert_eq!(first_column(readme, "Commands"), BTreeSet::from(["a", "7"]));
}
