//! `diff`: tells two lockfiles apart, entry by entry and fact by fact.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value as Json;

use crate::base::name::Name;
use crate::build::fingerprint::{self, Difference};
use crate::format::lockfile::{Entry, FilePin, FilesOrigin, Lockfile, ModelPin, Origin};
use crate::format::manifest::{Kind, Permission};

/// An entry that two lockfiles do not have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Changed {
    /// What the entry is for.
    pub kind: Kind,
    /// Its name in the manifest.
    pub name: Name,
    /// What became of it.
    pub how: How,
    /// What differs; all facts of an entry that is new or gone.
    pub differences: Vec<Difference>,
}

/// What became of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// Only the new lockfile has it.
    Added,
    /// Only the old lockfile has it.
    Removed,
    /// Both have it, with other facts.
    Changed,
}

/// What differs, by kind and name.
pub fn diff(old: &Lockfile, new: &Lockfile) -> Vec<Changed> {
    let names: BTreeSet<(Kind, &Name)> =
        old.entries().chain(new.entries()).map(|entry| (entry.kind(), entry.name())).collect();
    let changed = |(kind, name): (Kind, &Name)| {
        let of = |lock: &Lockfile| lock.get(kind, name).map(facts);
        let (before, after) = (of(old), of(new));
        let how = match (&before, &after) {
            (None, _) => How::Added,
            (_, None) => How::Removed,
            _ => How::Changed,
        };
        let differences = fingerprint::differences(&before.unwrap_or_default(), &after.unwrap_or_default());
        (!differences.is_empty()).then(|| Changed { kind, name: name.clone(), how, differences })
    };
    names.into_iter().filter_map(changed).collect()
}

/// Everything that an entry says, by name.
fn facts(entry: Entry<'_>) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    if let Ok(Json::Object(request)) = serde_json::to_value(entry.request()) {
        for (key, value) in request.into_iter().filter(|(_, value)| !value.is_null()) {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            facts.insert(key, text);
        }
    }
    match entry {
        Entry::Tool(tool) => add_files(&mut facts, "package", &tool.packages),
        Entry::Engine(engine) => {
            facts.insert("source tree".to_owned(), engine.tree.to_string());
            add_origin(&mut facts, &engine.origin);
            for permission in &engine.allow {
                let what = match permission {
                    Permission::Network => "may use the network",
                };
                facts.insert(what.to_owned(), "yes".to_owned());
            }
        }
        Entry::Model(model) => match &model.pin {
            ModelPin::Derived { inputs, .. } => {
                facts.insert("inputs".to_owned(), inputs.to_string());
            }
            ModelPin::Files { origin, files } => {
                match origin {
                    FilesOrigin::Hub { commit, .. } => {
                        facts.insert("commit".to_owned(), commit.to_string());
                    }
                    FilesOrigin::Other(origin) => add_origin(&mut facts, origin),
                }
                add_files(&mut facts, "file", files);
            }
        },
    }
    facts
}

fn add_origin(facts: &mut BTreeMap<String, String>, origin: &Origin) {
    if let Origin::Git { pin, .. } = origin {
        facts.insert("commit".to_owned(), pin.commit.to_string());
        for module in &pin.submodules {
            facts.insert(format!("submodule {}", module.path), format!("{} at {}", module.git, module.commit));
        }
    }
    add_files(facts, "download", origin.download().map_or(&[], std::slice::from_ref));
}

fn add_files(facts: &mut BTreeMap<String, String>, what: &str, files: &[FilePin]) {
    for file in files {
        facts.insert(format!("{what} {}", file.path), format!("{} bytes, {}", file.size, file.sha256));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::digest::Digest;
    use crate::format::lockfile::ModelEntry;
    use crate::format::manifest::PathSpec;

    fn lockfile(files: &[(&str, u64, &[u8])]) -> Lockfile {
        let file = |(path, size, bytes): &(&str, u64, &[u8])| FilePin {
            path: path.parse().unwrap(),
            size: *size,
            sha256: Digest::of(bytes),
        };
        let request = PathSpec { path: "weights".to_owned(), files: Vec::new() };
        let origin = FilesOrigin::Other(Origin::Path { request });
        let pin = ModelPin::Files { origin, files: files.iter().map(file).collect() };
        Lockfile { models: vec![ModelEntry { name: "m".parse().unwrap(), pin }], ..Lockfile::default() }
    }

    #[test]
    fn only_what_differs_is_named() {
        let old = lockfile(&[("a.gguf", 5, b"1"), ("b.gguf", 6, b"2")]);
        let new = lockfile(&[("a.gguf", 5, b"1"), ("b.gguf", 7, b"3"), ("c.gguf", 1, b"4")]);
        assert_eq!(diff(&old, &old), []);
        let [changed] = &diff(&old, &new)[..] else { panic!("one entry") };
        assert_eq!(changed.how, How::Changed);
        let names: Vec<&str> = changed.differences.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, ["file b.gguf", "file c.gguf"]);
        assert_eq!(diff(&Lockfile::default(), &new)[0].how, How::Added);
        assert_eq!(diff(&new, &Lockfile::default())[0].how, How::Removed);
    }
}
