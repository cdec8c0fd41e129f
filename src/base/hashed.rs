//! Proof that the whole of a file was hashed, and how long it holds.
//!
//! A [`Hashed`] says: every byte of this file was read here, and the file had this [`Stamp`] before and after. Only hashing
//! makes one. Whoever receives one need not read the file again while the stamp still matches. It proves nothing more: the
//! digest must still be compared with the expected one.
//!
//! A write shortly after another one may leave a file's times as they are, because the system's clock for file times moves
//! in ticks. A stamp whose modification time is that recent proves nothing about later writes ("racily clean" in git's
//! words). Such a proof is not *settled*: it counts in this process, and no record of it is kept.
//!
//! Absent: any way to make a proof from a digest alone.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{channel, sync_channel};

use serde::{Deserialize, Serialize};

use super::digest::{CHUNK_BYTES, Digest, Hasher};
use super::fs::{self, FsError, Placed, Stamp};

/// Larger files are read by a thread of their own while their bytes are hashed, unless all processors have work anyway.
const READ_AHEAD_BYTES: u64 = 8 << 20;
/// Files up to this size are hashed a second time when their proof is not settled; before larger ones are hashed, the
/// clock's tick is waited for.
pub const SMALL_BYTES: u64 = 1 << 20;
/// How often a file is hashed anew when its status (not its content) changes meanwhile, such as its number of links.
const MAX_TRIES: usize = 2;
/// Files that are being hashed now, in this process.
static BUSY: AtomicUsize = AtomicUsize::new(0);
/// Buffers that are between the two threads at most, [`CHUNK_BYTES`] each.
const BUFFERS: usize = 3;

/// Proof that a file was hashed as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hashed {
    path: PathBuf,
    stamp: Stamp,
    sha256: Digest,
    settled: bool,
}

/// What a settled [`Hashed`] leaves behind for later processes: the digest, bound to the file's stamp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    stamp: Stamp,
    #[serde(rename = "digest")]
    sha256: Digest,
}

impl Record {
    /// The proof again, if the file's stamp `now` is the one that it was hashed with.
    pub fn prove(&self, path: &Path, now: &Stamp) -> Option<Hashed> {
        let hashed = Hashed { path: path.to_owned(), stamp: self.stamp, sha256: self.sha256, settled: true };
        (self.stamp == *now).then_some(hashed)
    }

    /// Status change time of the file when it was hashed, in nanoseconds since 1970: tells the newer of two records.
    pub fn changed_ns(&self) -> u64 {
        self.stamp.changed_ns
    }
}

impl Hashed {
    /// Hashes a regular file. `seen` gets the size in bytes of each piece and may stop the work.
    ///
    /// # Errors
    /// When the file cannot be read, is not a regular file, or is written to meanwhile, or when `seen` stops the work.
    pub fn of_file(path: &Path, mut seen: impl FnMut(u64) -> io::Result<()>) -> Result<Self, FsError> {
        let mut file = fs::open(path)?;
        let mut stamp = fs::stamp_of(&file, path)?;
        if stamp.size_bytes > SMALL_BYTES && stamp.is_recent() {
            std::thread::sleep(fs::CLOCK_TICK);
        }
        let settled = !stamp.is_recent();
        let mut repeat = false;
        for _ in 0..MAX_TRIES {
            let sha256 = hash(&file, path, &stamp, |bytes| seen(if repeat { 0 } else { bytes }))?;
            let now = fs::stamp_of(&file, path)?;
            let hashed = Self { path: path.to_owned(), stamp, sha256, settled };
            if now == stamp {
                return Ok(hashed);
            }
            if !now.differs_in_change_time_alone(&stamp) {
                return Err(changed(path));
            }
            if repeat {
                // The digest is right for what was read; the stamp no longer matches, so nothing is recorded.
                return Ok(hashed);
            }
            (repeat, stamp) = (true, now);
            file.rewind().map_err(|error| FsError::new("read", path, error))?;
        }
        Err(changed(path))
    }

    /// The hashed file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of the file's bytes.
    pub fn sha256(&self) -> Digest {
        self.sha256
    }

    /// Size of the file in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.stamp.size_bytes
    }

    /// What identified the file's content when it was hashed.
    pub fn stamp(&self) -> &Stamp {
        &self.stamp
    }

    /// Whether the stamp tells later writes apart from none: see the head of this file.
    pub fn is_settled(&self) -> bool {
        self.settled
    }

    /// The record for later processes; none unless the proof is settled and current.
    pub fn record(&self) -> Option<Record> {
        (self.settled && self.is_current()).then_some(Record { stamp: self.stamp, sha256: self.sha256 })
    }

    /// Whether the file still has the stamp that it was hashed with.
    pub fn is_current(&self) -> bool {
        fs::stamp(&self.path).is_ok_and(|stamp| stamp == self.stamp)
    }

    /// Keeps the proof valid across a change of ours to the file's name, links or permissions, after which it is at `to`.
    /// If somebody else touched the file, the proof stays as it was and is not current.
    ///
    /// # Errors
    /// The error of `change`.
    pub fn through<E>(mut self, to: &Path, change: impl FnOnce() -> Result<(), E>) -> Result<Self, E> {
        let current = self.is_current();
        change()?;
        if let Some(now) = fs::stamp(to).ok().filter(|_| current)
            && now.differs_in_change_time_alone(&self.stamp)
        {
            (self.path, self.stamp) = (to.to_owned(), now);
        }
        Ok(self)
    }

    /// Puts the file in a second place as [`fs::place`] does, and gives the proof for that place. None for a copy, whose
    /// bytes were written again, and for a file that somebody else touched.
    ///
    /// # Errors
    /// When the place cannot be written.
    pub fn placed(self, to: &Path) -> Result<Option<Self>, FsError> {
        let (from, current) = (self.path.clone(), self.is_current());
        let how = fs::place(&from, to)?;
        let stamp = fs::stamp(to)?;
        let same = match how {
            Placed::Copy => false,
            Placed::HardLink | Placed::Symlink => stamp.differs_in_change_time_alone(&self.stamp),
            // The file system shares the blocks of the file as it was at one moment: the stamp matched before and after.
            Placed::Reflink => {
                self.is_current()
                    && (stamp.size_bytes, stamp.modified_ns) == (self.stamp.size_bytes, self.stamp.modified_ns)
            }
        };
        Ok((current && same).then(|| Self { path: to.to_owned(), stamp, ..self }))
    }
}

fn changed(path: &Path) -> FsError {
    FsError::new("read", path, io::Error::other("it changed while it was read"))
}

/// The digest of the open file from where it stands, which must be as long as its stamp says.
fn hash(
    file: &File,
    path: &Path,
    stamp: &Stamp,
    mut seen: impl FnMut(u64) -> io::Result<()>,
) -> Result<Digest, FsError> {
    let mut hasher = Hasher::default();
    let mut take = |bytes: &[u8]| {
        hasher.update(bytes);
        seen(bytes.len() as u64)
    };
    let busy = BUSY.fetch_add(1, Ordering::Relaxed) + 1;
    let idle = 2 * busy <= std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let ahead = idle && stamp.size_bytes > READ_AHEAD_BYTES;
    let read = if ahead { read_ahead(file, take) } else { read(file, &mut take) };
    BUSY.fetch_sub(1, Ordering::Relaxed);
    read.map_err(|error| FsError::new("read", path, error))?;
    let (sha256, size_bytes) = hasher.finish();
    if size_bytes == stamp.size_bytes { Ok(sha256) } else { Err(changed(path)) }
}

fn read(mut file: &File, take: &mut impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(count) => take(&chunk[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// As [`read`], the next pieces being read while one is taken: neither disk nor processor waits for the other.
fn read_ahead(file: &File, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let (full, filled) = sync_channel::<io::Result<(Vec<u8>, usize)>>(BUFFERS);
    let (empty, emptied) = channel();
    for _ in 0..BUFFERS {
        let _ = empty.send(vec![0; CHUNK_BYTES]);
    }
    // Both ends go with this closure, however it ends: the other thread waits for neither.
    std::thread::scope(move |scope| {
        scope.spawn(move || {
            let mut file = file;
            while let Ok(mut chunk) = emptied.recv() {
                let count = loop {
                    match file.read(&mut chunk) {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        count => break count,
                    }
                };
                let over = !matches!(count, Ok(1..));
                // Nobody takes it any more, or there is no more.
                if full.send(count.map(|count| (chunk, count))).is_err() || over {
                    return;
                }
            }
        });
        for chunk in filled {
            let (chunk, count) = chunk?;
            take(&chunk[..count])?;
            let _ = empty.send(chunk);
        }
        Ok(())
    })
}

/// Hashes a file that still grows, by reading back what was written.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    file: File,
    hasher: Hasher,
    at: u64,
    chunk: Vec<u8>,
}

impl Follower {
    /// Starts at the beginning of the file.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn new(path: &Path) -> Result<Self, FsError> {
        let (path, file) = (path.to_owned(), fs::open(path)?);
        Ok(Self { path, file, hasher: Hasher::default(), at: 0, chunk: vec![0; CHUNK_BYTES] })
    }

    /// Bytes hashed so far.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Starts again at the beginning: the bytes hashed so far have been overwritten.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn restart(&mut self) -> Result<(), FsError> {
        (self.hasher, self.at) = (Hasher::default(), 0);
        self.file.rewind().map_err(|error| FsError::new("read", &self.path, error))
    }

    /// Hashes the next piece, at most [`CHUNK_BYTES`] and not beyond the first `end` bytes.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn advance(&mut self, end: u64) -> Result<(), FsError> {
        let ready = usize::try_from(end.saturating_sub(self.at)).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let piece = &mut self.chunk[..ready];
        self.file.read_exact(piece).map_err(|error| FsError::new("read", &self.path, error))?;
        self.hasher.update(piece);
        self.at += ready as u64;
        Ok(())
    }

    /// The proof, when the whole file was hashed and its only writer, this process, is done.
    ///
    /// # Errors
    /// When the file has more bytes than were hashed.
    pub fn finish(self) -> Result<Hashed, FsError> {
        let failed = |error| FsError::new("read", &self.path, error);
        let stamp = fs::stamp_of(&self.file, &self.path)?;
        if stamp.size_bytes > SMALL_BYTES && stamp.is_recent() {
            std::thread::sleep(fs::CLOCK_TICK);
        }
        if stamp.size_bytes != self.at {
            return Err(failed(io::Error::other(format!("it has {} bytes, not {}", stamp.size_bytes, self.at))));
        }
        Ok(Hashed { sha256: self.hasher.finish().0, settled: !stamp.is_recent(), path: self.path, stamp })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("un fichier é");
        fs::write_atomic(&path, bytes).unwrap();
        (root, path)
    }

    #[test]
    fn small_and_large_files_are_hashed_alike() {
        for size in [0, 1, 70_000, 9 << 20] {
            let bytes: Vec<u8> = (0..size).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            let (_root, path) = fixture(&bytes);
            let mut seen = 0;
            let count = |more| {
                seen += more;
                Ok(())
            };
            let hashed = Hashed::of_file(&path, count).unwrap();
            assert_eq!((hashed.sha256(), hashed.size_bytes(), seen), (Digest::of(&bytes), size.into(), size.into()));
            assert!(hashed.is_current());
            let mut follower = Follower::new(&path).unwrap();
            follower.advance(u64::from(size) / 2).unwrap();
            follower.restart().unwrap();
            while follower.at() < size.into() {
                follower.advance(size.into()).unwrap();
            }
            let finished = follower.finish().unwrap();
            assert_eq!((finished.sha256(), finished.stamp()), (hashed.sha256(), hashed.stamp()));
            if size > 0 {
                let stop = |_| Err(io::Error::other("stop"));
                assert!(Hashed::of_file(&path, stop).is_err(), "{size}");
                assert!(Follower::new(&path).unwrap().finish().is_err(), "a part is no proof");
            }
        }
    }

    #[test]
    fn a_proof_survives_our_changes_and_no_others() {
        let (root, path) = fixture(b"right");
        let other = root.path().join("other");
        let rename = || fs::rename(&path, &other);
        let hashed = Hashed::of_file(&path, |_| Ok(())).unwrap().through(&other, rename).unwrap();
        let hashed = hashed.through(&other, || fs::set_read_only(&other, true)).unwrap();
        assert!(hashed.is_current() && hashed.path() == other);
        let link = root.path().join("link");
        let placed = hashed.clone().placed(&link).unwrap().unwrap();
        assert!(placed.is_current() && placed.sha256() == Digest::of(b"right"));

        let swap = || fs::write_atomic(&other, b"wrong");
        assert!(!hashed.through(&other, swap).unwrap().is_current(), "another file under the name");
        fs::set_read_only(&link, false).unwrap();
        // Windows has no time of change to tell.
        if cfg!(unix) {
            assert!(!placed.is_current(), "touched");
            assert_eq!(placed.clone().placed(&root.path().join("third")).unwrap(), None);
        }
        let write = || fs::append(&link, b"!");
        let hashed = Hashed::of_file(&link, |_| Ok(())).unwrap();
        assert!(!hashed.through(&link, write).unwrap().is_current(), "written to meanwhile");
    }

    #[test]
    fn h3_what_is_written_while_it_is_hashed_is_no_proof() {
        let (root, path) = fixture(&[b'a'; 3 << 20]);
        let twin = root.path().join("twin");
        let mut pieces = 0;
        // Same size, and the bytes were read already: only the stamps tell.
        let overwrite = |_| {
            pieces += 1;
            if pieces == 2 {
                let mut file = std::fs::OpenOptions::new().write(true).open(&path)?;
                io::Write::write_all(&mut file, b"b")?;
            }
            Ok(())
        };
        let refused = Hashed::of_file(&path, overwrite).unwrap_err();
        assert!(refused.to_string().contains("it changed while it was read"), "{refused}");

        // A second link changes the status alone: the file is hashed once more, and the proof holds.
        let mut pieces = 0;
        let link = |_| {
            pieces += 1;
            if pieces == 2 { std::fs::hard_link(&path, &twin) } else { Ok(()) }
        };
        let hashed = Hashed::of_file(&path, link).unwrap();
        assert!(hashed.is_current() && hashed.record().is_some());
    }

    #[test]
    fn h3_a_stamp_of_the_same_tick_leaves_no_record() {
        let (_root, path) = fixture(b"just written");
        let set = |ago: std::time::Duration, ahead: std::time::Duration| {
            let when = std::time::SystemTime::now() - ago + ahead;
            fs::open(&path).unwrap().set_modified(when).unwrap();
            Hashed::of_file(&path, |_| Ok(())).unwrap()
        };
        let (nothing, second) = (std::time::Duration::ZERO, std::time::Duration::from_secs(1));
        let fresh = set(nothing, second);
        assert!(fresh.is_current() && !fresh.is_settled() && fresh.record().is_none());
        let old = set(10 * second, nothing);
        let record = old.record().unwrap();
        assert_eq!(record.prove(&path, &fs::stamp(&path).unwrap()), Some(old));
        fs::append(&path, b"!").unwrap();
        assert_eq!(record.prove(&path, &fs::stamp(&path).unwrap()), None);
    }

    #[cfg(unix)]
    #[test]
    fn l1_a_fifo_is_refused_and_not_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        let refused = Hashed::of_file(&path, |_| Ok(())).unwrap_err();
        assert!(refused.to_string().contains("not a regular file"), "{refused}");
        assert!(super::super::digest::of_file(&path).is_err());
    }
}
