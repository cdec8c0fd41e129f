//! What is on disk, hashed here and not by the program under test, and what of it may be there after a fault.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use xshell::Shell;

use crate::step::Result;

/// A file by its digest and whether it can be run, whether it is there itself or by a link, which is what is made where the system
/// refuses a second name; or a link that leads to no file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Thing {
    File { sha256: String, executable: bool },
    Link(PathBuf),
}

/// Everything below a folder that has a final name, by its path from there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub things: BTreeMap<PathBuf, Thing>,
    /// Unfinished work that nobody holds.
    pub leftovers: BTreeSet<PathBuf>,
    /// Digests by what records name: device, inode, size and times.
    stamps: BTreeMap<String, String>,
}

/// Where unfinished work is, locks and logs: what is there is never used as it is.
const UNFINISHED: &[&str] = &["cache/staging/", "cache/scratch/", "cache/locks/", "cache/logs/", "project/.aitools/"];
/// In the Hugging Face cache.
const UNFINISHED_PARTS: &[&str] = &["/.locks/", "/.aitools/"];
/// How temporary names begin.
const TEMPORARY: &str = ".aitools-";
/// Sealed notes about times of files, which differ from run to run. That they are right shows in the state that the next run ends in.
const MEMORY: &[&str] = &["cache/paths/", "cache/tools.json"];
const RECORDS: &str = "cache/records.json";

impl Snapshot {
    pub fn take(sh: &Shell, root: &Path) -> Result<Self> {
        let (mut snapshot, mut folders) = (Self::default(), vec![root.to_owned()]);
        while let Some(folder) = folders.pop() {
            for entry in folder.read_dir()? {
                let path = entry?.path();
                let meta = path.symlink_metadata()?;
                let relative = path.strip_prefix(root)?.to_owned();
                let text = relative.to_string_lossy().into_owned();
                if meta.is_dir() {
                    folders.push(path);
                } else if is_unfinished(&text) {
                    if text.starts_with("cache/staging/") || text.contains(TEMPORARY) {
                        snapshot.leftovers.insert(relative);
                    }
                } else if !path.exists() {
                    // A link to nothing is as good as no link.
                } else if meta.is_symlink() && !path.is_file() {
                    snapshot.things.insert(relative, Thing::Link(path.read_link()?));
                } else if text != RECORDS && !MEMORY.iter().any(|memory| text.starts_with(memory)) {
                    let (bytes, meta) = (sh.read_binary_file(&path)?, path.metadata()?);
                    let sha256 = sha256(without_notes(&text, &bytes));
                    snapshot.stamps.insert(stamp(&meta), sha256.clone());
                    snapshot.things.insert(relative, Thing::File { sha256, executable: meta.mode() & 0o111 != 0 });
                }
            }
        }
        snapshot.leave_out_what_nothing_vouches_for();
        Ok(snapshot)
    }

    /// A folder of the cache without its listing or receipt counts as missing.
    fn leave_out_what_nothing_vouches_for(&mut self) {
        let vouched = |path: &Path| {
            let folder: PathBuf = path.components().take(3).collect();
            let voucher = match folder.parent() {
                Some(parent) if parent.ends_with("cache/artifacts") => folder.join("receipt.json"),
                Some(parent) if parent.ends_with("cache/trees") || parent.ends_with("cache/tools") => {
                    folder.with_extension("list")
                }
                _ => return true,
            };
            self.things.contains_key(&voucher)
        };
        let vain: Vec<PathBuf> = self.things.keys().filter(|path| !vouched(path)).cloned().collect();
        vain.iter().for_each(|path| drop(self.things.remove(path)));
    }

    /// What must not be there after a fault between two states: another content under a final name, or something good that
    /// is gone.
    pub fn wrong_between(&self, start: &Self, end: &Self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (path, thing) in &self.things {
            let is_known = [start, end].iter().any(|state| state.things.get(path) == Some(thing));
            let named = matches!(thing, Thing::File { sha256, .. } if path.ends_with(format!("cache/blobs/{sha256}")));
            let is_aside =
                is_aside(path) && [start, end].iter().any(|state| state.things.values().any(|known| known == thing));
            if !is_known && !named && !is_aside {
                wrong.push(format!("`{}` is {thing:?}", path.display()));
            }
        }
        for (path, thing) in &start.things {
            if end.things.get(path) == Some(thing) && !self.things.contains_key(path) && !end.is_replaced(start, path) {
                wrong.push(format!("`{}` is gone", path.display()));
            }
        }
        wrong
    }

    /// Whether a path is in a folder that is replaced as a whole.
    fn is_replaced(&self, other: &Self, path: &Path) -> bool {
        let folder: PathBuf = path.components().take(3).collect();
        let inside = |state: &Self| -> Vec<(PathBuf, Thing)> {
            let below = state.things.iter().filter(|(path, _)| path.starts_with(&folder) && **path != folder);
            below.map(|(path, thing)| (path.clone(), thing.clone())).collect()
        };
        ["cache/trees", "cache/tools", "cache/artifacts"].iter().any(|kind| folder.starts_with(kind))
            && inside(self) != inside(other)
    }

    /// How two states differ.
    pub fn differences(&self, expected: &Self) -> Vec<String> {
        let paths: BTreeSet<&PathBuf> =
            self.things.keys().chain(expected.things.keys()).filter(|path| !is_aside(path)).collect();
        let differing = paths.into_iter().filter(|path| self.things.get(*path) != expected.things.get(*path));
        // Files that are in place need no second name in the store.
        let is_placed = |path: &Path| {
            let thing = expected.things.get(path).filter(|_| path.starts_with("cache/blobs"));
            !self.things.contains_key(path)
                && thing.is_some_and(|thing| self.things.values().any(|other| other == thing))
        };
        let differing = differing.filter(|path| !is_placed(path));
        let worded = |path: &PathBuf| {
            format!("`{}`: {:?}, not {:?}", path.display(), self.things.get(path), expected.things.get(path))
        };
        differing.map(worded).collect()
    }

    /// Records that name a file as it is, with another digest than it has.
    pub fn wrong_records(&self, sh: &Shell, root: &Path) -> Result<Vec<String>> {
        let path = root.join(RECORDS);
        if !path.exists() {
            return Ok(Vec::new());
        }
        let bytes = sh.read_binary_file(path)?;
        let start = bytes.iter().position(|byte| *byte == b'{').ok_or("the records hold no JSON")?;
        let mut values = serde_json::Deserializer::from_slice(&bytes[start..]).into_iter::<serde_json::Value>();
        let records = values.next().ok_or("the records are empty")??;
        let mut wrong = Vec::new();
        for (name, record) in records.as_object().ok_or("the records are no object")? {
            let (stamp, digest) = (&record["stamp"], record["digest"].as_str().unwrap_or_default());
            let key = ["device", "inode", "size_bytes", "modified_ns", "changed_ns"]
                .map(|field| stamp[field].to_string())
                .join(" ");
            if let Some(found) = self.stamps.get(&key).filter(|found| !digest.ends_with(*found)) {
                wrong.push(format!("the record of {name} says {digest}, and the file has {found}"));
            }
        }
        Ok(wrong)
    }
}

/// A file that was moved out of the way: whether there was one depends on when the fault came.
fn is_aside(path: &Path) -> bool {
    path.extension()
        .is_some_and(|ending| ["bak", "bad"].iter().any(|aside| ending.to_string_lossy().starts_with(aside)))
}

/// A receipt without its notes, which say how long something took, and without its seal.
fn without_notes<'a>(path: &str, bytes: &'a [u8]) -> &'a [u8] {
    const NOTES: &[u8] = b"\"notes\"";
    if !path.starts_with("cache/derived/") && !path.ends_with("/receipt.json") {
        return bytes;
    }
    let notes = bytes.windows(NOTES.len()).position(|window| window == NOTES);
    notes.map_or(bytes, |at| &bytes[..at])
}

fn is_unfinished(path: &str) -> bool {
    UNFINISHED.iter().any(|start| path.starts_with(start))
        || UNFINISHED_PARTS.iter().any(|part| path.starts_with("hub/") && path.contains(part))
        || path.rsplit('/').next().is_some_and(|name| name.starts_with(TEMPORARY))
        || path.contains(&format!("/{TEMPORARY}"))
}

fn stamp(meta: &std::fs::Metadata) -> String {
    let ns = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
    let modified = ns(meta.mtime(), meta.mtime_nsec());
    let changed = ns(meta.ctime(), meta.ctime_nsec());
    format!("{} {} {} {modified} {changed}", meta.dev(), meta.ino(), meta.size())
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
