//! A file that is on its way: the bytes that came, and a journal of which. The journal is a hint that saves work after
//! a kill; what decides is the digest over the bytes.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::fs::{self, FsError};
use crate::base::hashed::Hashed;
use crate::base::lock::{self, Lock};
use crate::report::Task;

use super::SourceError;

/// Larger journals are not read: nobody writes them.
const MAX_JOURNAL: u64 = 1 << 20;

/// Which bytes are there: sorted, disjoint, not touching.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    pub fn add(&mut self, from: u64, to: u64) {
        let first = self.0.partition_point(|(_, end)| *end < from);
        let after = self.0.partition_point(|(start, _)| *start <= to);
        let merged = self.0[first..after].iter().fold((from, to), |(a, b), (start, end)| (a.min(*start), b.max(*end)));
        self.0.splice(first..after, [merged]);
    }

    /// How many bytes are there from the beginning on.
    pub fn prefix(&self) -> u64 {
        self.0.first().filter(|(start, _)| *start == 0).map_or(0, |(_, end)| *end)
    }

    pub fn total(&self) -> u64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |(_, end)| *end)
    }

    /// Forgets all but the prefix.
    pub fn keep_prefix(&mut self) {
        let prefix = self.prefix();
        self.0.clear();
        if prefix > 0 {
            self.0.push((0, prefix));
        }
    }

    /// What is missing of a file of `size` bytes.
    pub fn gaps(&self, size: u64) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = 0;
        for (start, end) in &self.0 {
            if at < *start {
                gaps.push(at..(*start).min(size));
            }
            at = *end;
        }
        if at < size {
            gaps.push(at..size);
        }
        gaps
    }

    fn is_sound(&self, size: u64) -> bool {
        self.0.iter().all(|(start, end)| start < end && *end <= size)
            && self.0.windows(2).all(|two| two[0].1 < two[1].0)
    }
}

/// Written beside the part.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    version: u32,
    pub size_bytes: u64,
    /// What the server called this state of the file: needed where no digest says which file is meant.
    pub etag: Option<String>,
    /// What was written. The system has it until the machine stops, whatever happens to the process.
    pub done: Ranges,
    /// What is on the disk: all that counts after the machine was started again.
    durable: Ranges,
    /// When the machine was started, where the system tells.
    boot: Option<String>,
}

impl Journal {
    pub fn new(size_bytes: u64, etag: Option<String>, done: Ranges, durable: Ranges) -> Self {
        Self { version: VERSION, size_bytes, etag, done, durable, boot: boot_id() }
    }
}

const VERSION: u32 = 2;

/// Differs after each start of the machine (random(4)); none where the system does not tell.
fn boot_id() -> Option<String> {
    let bytes = fs::read_bounded(Path::new("/proc/sys/kernel/random/boot_id"), 100).ok()?;
    Some(String::from_utf8(bytes).ok()?.trim().to_owned()).filter(|id| !id.is_empty())
}

/// Held by one process at a time.
#[derive(Debug)]
pub struct Part {
    pub path: PathBuf,
    journal: PathBuf,
    _lock: Lock,
}

fn journal_path(folder: &Path, key: &str) -> PathBuf {
    folder.join(format!("{key}.json"))
}

impl Part {
    /// Waits until no other process works on this part.
    pub fn hold(folder: &Path, key: &str, what: &str, task: &Task) -> Result<Self, SourceError> {
        let waiting = || task.waiting(format!("another process, which is fetching `{what}`"));
        let lock = lock::acquire(&folder.join(format!("{key}.lock")), task.cancel(), waiting)?;
        // Where locks do nothing, every process has a part of its own, and no resume.
        let mut own = [0; 8];
        let _ = getrandom::fill(&mut own);
        let key = if lock.excludes() { key.to_owned() } else { format!("{key}-{:016x}", u64::from_le_bytes(own)) };
        Ok(Self { path: folder.join(format!("{key}.part")), journal: journal_path(folder, &key), _lock: lock })
    }

    /// What a former run left, when it can be believed so far.
    pub fn journal(&self) -> Option<Journal> {
        read_journal(&self.journal, &self.path)
    }

    /// Writes the journal.
    pub fn save(&self, journal: &Journal) {
        write_journal(&self.journal, journal);
    }

    /// Gives the whole part its name.
    pub fn finish(&self, came: Hashed, to: &Path) -> Result<Hashed, FsError> {
        fs::create_dir_all(fs::parent(to))?;
        let came = came.through(to, || fs::move_file(&self.path, to))?;
        fs::remove_file(&self.journal)?;
        Ok(came)
    }

    /// Removes what came so far.
    pub fn forget(&self) -> Result<(), FsError> {
        fs::remove_file(&self.journal)?;
        fs::remove_file(&self.path)
    }

    pub fn open(&self) -> Result<File, FsError> {
        fs::create_dir_all(fs::parent(&self.path))?;
        fs::open_or_create(&self.path)
    }
}

/// Parts that nobody went on with for this long are removed.
pub const MAX_PART_AGE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Removes the parts of a folder that nobody has touched for `age` and nobody holds.
pub fn sweep(folder: &Path, age: Duration) {
    for path in fs::read_dir(folder).unwrap_or_default() {
        let is_part = path.extension().is_some_and(|ending| ending == "part");
        if !is_part || !fs::is_older_than(&path, age) {
            continue;
        }
        if let Ok(Some(_held)) = lock::try_acquire(&path.with_extension("lock")) {
            let _ = fs::remove_file(&path.with_extension("json"));
            let _ = fs::remove_file(&path);
        }
    }
}

/// Space on the disk that a part has.
pub fn taken_bytes(folder: &Path, key: &str) -> u64 {
    fs::allocated_bytes(&folder.join(format!("{key}.part"))).unwrap_or(0)
}

pub fn read_journal(path: &Path, part: &Path) -> Option<Journal> {
    let bytes = fs::read_bounded(path, MAX_JOURNAL).ok()?;
    let mut journal: Journal = serde_json::from_slice(&bytes).ok()?;
    if journal.boot.is_none() || journal.boot != boot_id() {
        journal.done = journal.durable.clone();
    }
    let length = fs::symlink_metadata(part).ok().filter(std::fs::Metadata::is_file)?.len();
    let sound = journal.version == VERSION && journal.done.is_sound(journal.size_bytes) && journal.done.end() <= length;
    sound.then_some(journal)
}

/// Not synced: when it is lost, bytes come again. A failure to write it is no failure of the download.
fn write_journal(path: &Path, journal: &Journal) {
    let staged = path.with_extension("json.new");
    let write = || -> std::io::Result<()> {
        let file = fs::create(&staged).map_err(|error| error.source)?;
        serde_json::to_writer(&file, journal)?;
        fs::rename(&staged, path).map_err(|error| error.source)
    };
    if write().is_err() {
        let _ = fs::remove_file(&staged);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_and_leave_gaps() {
        let mut ranges = Ranges::default();
        assert_eq!((ranges.prefix(), ranges.total(), ranges.gaps(0)), (0, 0, vec![]));
        for (from, to) in [(5, 7), (10, 12), (7, 8), (0, 2), (1, 3)] {
            ranges.add(from, to);
        }
        assert_eq!(ranges, Ranges(vec![(0, 3), (5, 8), (10, 12)]));
        assert_eq!((ranges.prefix(), ranges.total(), ranges.end()), (3, 8, 12));
        assert_eq!(ranges.gaps(20), [3..5, 8..10, 12..20]);
        ranges.add(2, 11);
        assert_eq!(ranges, Ranges(vec![(0, 12)]));
        assert!(ranges.gaps(12).is_empty());
    }

    #[test]
    fn damaged_journals_are_no_journals() {
        let root = tempfile::tempdir().unwrap();
        let part = Part::hold(root.path(), "ä b", "x", &Task::silent()).unwrap();
        part.open().unwrap().set_len(10).unwrap();
        let all = Ranges(vec![(0, 4), (6, 10)]);
        let good = Journal::new(20, None, all.clone(), all);
        part.save(&good);
        assert_eq!(part.journal(), Some(good));
        for bad in [vec![(0, 11)], vec![(4, 4)], vec![(3, 5), (4, 6)], vec![(3, 5), (0, 2)]] {
            part.save(&Journal::new(20, None, Ranges(bad.clone()), Ranges(bad)));
            assert_eq!(part.journal(), None);
        }
        fs::write_atomic(&part.journal, b"{\"version\":2,").unwrap();
        assert_eq!(part.journal(), None);
    }

    #[test]
    fn l2_parts_that_nobody_goes_on_with_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str| fs::write_atomic(&root.path().join(name), b"12").unwrap();
        for name in ["a.part", "a.json", "b.part", "b.json", "whole"] {
            write(name);
        }
        let held = Part::hold(root.path(), "b", "x", &Task::silent()).unwrap();
        sweep(root.path(), MAX_PART_AGE);
        assert_eq!(fs::size_below(root.path()), 10, "all are young");
        sweep(root.path(), Duration::ZERO);
        let there = |name: &str| fs::exists(&root.path().join(name));
        assert_eq!(["a.part", "a.json", "b.part", "b.json", "whole"].map(there), [false, false, true, true, true]);
        drop(held);
    }

    #[test]
    fn l8_after_a_restart_of_the_machine_only_what_is_on_the_disk_counts() {
        let root = tempfile::tempdir().unwrap();
        let part = Part::hold(root.path(), "k", "x", &Task::silent()).unwrap();
        part.open().unwrap().set_len(10).unwrap();
        let (done, durable) = (Ranges(vec![(0, 9)]), Ranges(vec![(0, 4)]));
        let mut journal = Journal::new(20, None, done.clone(), durable.clone());
        part.save(&journal);
        let told = journal.boot.is_some();
        assert_eq!(part.journal().unwrap().done, if told { done } else { durable.clone() });
        for boot in [None, Some("another start".to_owned())] {
            journal.boot = boot;
            part.save(&journal);
            assert_eq!(part.journal().unwrap().done, durable);
        }
    }
}
