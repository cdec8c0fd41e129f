//! Phrases that several commands and reporters share. No output, no decisions.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::Value as Json;

use crate::build::fingerprint::Difference;
use crate::ops::failure::{Staleness, Why};
use crate::ops::proven::Proven;
use crate::plan::{Reason, Step};
use crate::store::proofs::Proof;

/// A size in decimal units, as the Hub shows it: `98.36 MB`.
pub fn size(bytes: u64) -> String {
    indicatif::DecimalBytes(bytes).to_string()
}

/// A count with its noun: `1 step`, `2 steps`.
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Columns as wide as their widest cell, under a line of headings.
pub fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let head = head.map(str::to_owned);
    let all: Vec<&[String; N]> = std::iter::once(&head).chain(rows).collect();
    let widths: [usize; N] =
        std::array::from_fn(|column| all.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let line = |row: &&[String; N]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    all.iter().map(line).collect()
}

/// What differs, a line each.
pub fn differences(differences: &[Difference]) -> String {
    let word = |value: &Option<String>| value.as_ref().map_or("nothing".to_owned(), |value| format!("`{value}`"));
    let line = |difference: &Difference| {
        format!("    {}: {} -> {}\n", difference.name, word(&difference.old), word(&difference.new))
    };
    differences.iter().map(line).collect()
}

/// What was proven, and when; nothing when nothing was.
pub fn proven(proven: &Proven) -> String {
    let all = [
        ("source", proven.source, "matches the lockfile", "does NOT match the lockfile"),
        ("engine", proven.engine, "matches its receipt", "does NOT match its receipt"),
        ("bits", proven.bits, "reproduced", "NOT reproduced"),
        ("weights", proven.weights, "match the lockfile", "do NOT match the lockfile"),
        ("smoke", proven.smoke, "passed", "FAILED"),
    ];
    let line = |(what, proof, holds, fails): (&str, Option<Proof>, &str, &str)| {
        let Proof { at, holds: held } = proof?;
        let when = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(at));
        Some(format!("            {what:7} {} ({when})\n", if held { holds } else { fails }))
    };
    all.into_iter().filter_map(line).collect()
}

/// A step as a phrase: `build llama-cpp (cpu)`.
pub fn step_line(step: &Step) -> String {
    let files = |count: usize| counted(count, "file");
    match step {
        Step::FetchTool { name, .. } => format!("fetch tool {name}"),
        Step::FetchSource { engine, .. } => format!("fetch the source of {engine}"),
        Step::Build { engine, variant, .. } => format!("build {engine} ({variant})"),
        Step::LinkBuild { engine, .. } => format!("link build/{engine}"),
        Step::Hash { model, files: which, bytes, .. } => {
            format!("hash {} of {model} ({})", files(which.len()), size(*bytes))
        }
        Step::FetchWeights { model, files: which, bytes, .. } => {
            format!("fetch {} of {model} ({})", files(which.len()), size(*bytes))
        }
        Step::Place { model, files: which, reason, .. } => {
            let why = if *reason == Reason::NotLinked { " in this project" } else { "" };
            format!("place {} of {model}{why}", files(which.len()))
        }
        Step::Derive { model, from, engine, how, .. } => {
            let from: Vec<&str> = from.iter().map(|name| name.as_str()).collect();
            format!("derive {model} from {} ({how}, with {engine})", from.join(" and "))
        }
    }
}

/// A lockfile entry that does not match the manifest, as a phrase.
pub fn stale_line(entry: &Staleness) -> String {
    let (kind, name) = (entry.kind.as_str(), &entry.name);
    match &entry.why {
        Why::Added => format!("{kind} `{name}` is in the manifest but not in the lockfile"),
        Why::Removed => format!("{kind} `{name}` is in the lockfile but not in the manifest"),
        Why::Changed { manifest, lock } => {
            format!("{kind} `{name}` was changed in the manifest: {}", changes(lock, manifest).join(", "))
        }
        Why::Edited => format!("{kind} `{name}`: the files at its `path` have changed since they were locked"),
        Why::Differs => format!("{kind} `{name}`: the files at its `path` are not those that were locked"),
        Why::Inputs => format!("{kind} `{name}`: its inputs have changed since it was locked"),
        Why::Conflict => format!("{kind} `{name}` has a merge conflict"),
    }
}

/// What differs between two requests, which are JSON objects: `files: ["a.gguf"] -> ["b.gguf"]`.
fn changes(lock: &str, manifest: &str) -> Vec<String> {
    let fields = |text: &str| match serde_json::from_str(text) {
        Ok(Json::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    let (lock, manifest) = (fields(lock), fields(manifest));
    let word = |value: Option<&Json>| value.map_or_else(|| "(not set)".to_owned(), Json::to_string);
    let keys = lock.keys().chain(manifest.keys().filter(|key| !lock.contains_key(*key)));
    let differing = keys.filter(|key| lock.get(*key) != manifest.get(*key));
    differing.map(|key| format!("{key}: {} -> {}", word(lock.get(key)), word(manifest.get(key)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_fields_that_differ_are_shown() {
        let lock = r#"{"hf":"org/repo","rev":"main","files":["a/*.gguf"]}"#;
        let manifest = r#"{"hf":"org/repo","files":["a/*.ggml"]}"#;
        assert_eq!(changes(lock, manifest), ["rev: \"main\" -> (not set)", "files: [\"a/*.gguf\"] -> [\"a/*.ggml\"]"]);
    }
}
