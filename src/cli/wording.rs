//! Phrases that several commands and reporters share. No output, no decisions.

use crate::plan::{Reason, Step};

/// A size in decimal units, as the Hub shows it: `98.36 MB`.
pub fn size(bytes: u64) -> String {
    indicatif::DecimalBytes(bytes).to_string()
}

/// A count with its noun: `1 step`, `2 steps`.
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
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
