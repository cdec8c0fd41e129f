//! `aitools cache`.

use std::path::Path;

use serde_json::json;

use crate::cli::args::{self, CacheCommand};
use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::cli::wording::{counted, size, table};
use crate::ops::cache::{self, Ask, Listed, Removed};
use crate::ops::{Failure, project};
use crate::store::usage::Kind;

/// # Errors
/// See [`cache`].
pub fn run(ask: &args::Cache, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let root = project::find_root(&session.cwd);
    let folder = session.cache_dir(&root)?.value;
    if let CacheCommand::Key(build) = &ask.command {
        let project = super::load(session, output)?;
        let key = cache::key(&session.host(&project.root, Some(build))?, &project)?;
        output.text(&format!("{}\n", key.key));
        output.result("cache key", true, &key);
        return Ok(exit::DONE);
    }
    let host = session.host(&root, None)?;
    match &ask.command {
        CacheCommand::Dir => {
            output.text(&format!("{}\n", folder.display()));
            output.result("cache dir", true, &json!({ "path": folder }));
        }
        CacheCommand::Size => {
            let usage = cache::size(&host);
            let row = |(name, count, bytes, shared): (&str, usize, u64, u64)| {
                [name.to_owned(), count.to_string(), size(bytes), size(shared)]
            };
            let mut rows: Vec<_> = usage
                .iter()
                .map(|of| (of.kind.in_words(), of.count, of.footprint.bytes, of.footprint.shared_bytes))
                .collect();
            let sum = |of: fn(&(&str, usize, u64, u64)) -> u64| rows.iter().map(of).sum();
            rows.push(("all", rows.iter().map(|row| row.1).sum(), sum(|row| row.2), sum(|row| row.3)));
            let rows: Vec<_> = rows.into_iter().map(row).collect();
            output.text(&table(["WHAT", "COUNT", "SIZE", "SHARED"], &rows));
            output.say("shared: these files have further names (hard links) elsewhere, which keep them on the disk");
            output.result("cache size", true, &json!({ "path": folder, "kinds": usage }));
        }
        CacheCommand::List => {
            let all = cache::list(&host)?;
            output.text(&list(&all, &folder));
            output.result("cache list", true, &json!({ "path": folder, "items": all }));
        }
        CacheCommand::Prune(ask) => {
            let asked =
                Ask { dry_run: ask.dry_run, older_than: ask.older_than.map(Into::into), max_bytes: ask.max_size };
            let removed = cache::prune(&host, asked)?;
            tell(&removed, &folder, output);
            output.result("cache prune", true, &removed);
        }
        CacheCommand::Clean { dry_run } => {
            let removed = cache::clean(&host, *dry_run)?;
            tell(&removed, &folder, output);
            output.result("cache clean", true, &removed);
        }
        CacheCommand::Key(_) => {}
    }
    Ok(exit::DONE)
}

fn list(all: &[Listed], folder: &Path) -> String {
    let row = |listed: &Listed| {
        let path = listed.item.path.strip_prefix(folder).unwrap_or(&listed.item.path).display().to_string();
        let needed = match (listed.needed_by.first(), listed.needed_by.len(), listed.item.kind) {
            (None, _, Kind::Scratch | Kind::Log) => "no project, kept for a day".to_owned(),
            (None, ..) => "no project".to_owned(),
            (Some(first), 1, _) => first.display().to_string(),
            (Some(first), more, _) => format!("{} and {} more", first.display(), more - 1),
        };
        [listed.name.clone(), size(listed.item.footprint.bytes), path, needed]
    };
    table(["WHAT", "SIZE", "PATH", "NEEDED BY"], &all.iter().map(row).collect::<Vec<_>>())
}

fn tell(removed: &Removed, folder: &Path, output: &Output) {
    let Removed { count, freed_bytes, shared_bytes, left_bytes, gone, items, dry_run } = removed;
    for lockfile in gone {
        output.say(&format!("the project of `{}` is gone", lockfile.display()));
    }
    if *dry_run {
        output.text(&list(items, folder));
    }
    let (verb, frees) = if *dry_run { ("would remove", "would free") } else { ("removed", "freed") };
    output.say(&format!(
        "{verb} {} and {frees} {}; {} left",
        counted(*count, "item"),
        size(*freed_bytes),
        size(*left_bytes)
    ));
    if *shared_bytes > 0 {
        output.say(&format!(
            "{} more stay on the disk: the files have further names (hard links), in projects or in other caches",
            size(*shared_bytes)
        ));
    }
}
