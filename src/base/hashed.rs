//! What hashing a file proves, and for how long.
//!
//! A [`Hashed`] says: the bytes of this file were read here, from the first to the last, and this was its [`Stamp`] then.
//! Nobody else can make one, so whoever is given one need not read the file again as long as the stamp still fits; and it
//! proves no more than that, so a digest must still be compared with the wanted one.
//!
//! Absent: any way to make one from a digest that somebody says.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{channel, sync_channel};

use super::digest::{CHUNK_BYTES, Digest, Hasher};
use super::fs::{self, FsError, Placed, Stamp};

/// Larger files are read by a thread of their own while their bytes are hashed, unless all processors have work anyway.
const READ_AHEAD_BYTES: u64 = 8 << 20;
/// Files that are being hashed now, in this process.
static BUSY: AtomicUsize = AtomicUsize::new(0);
/// Buffers that are between the two threads at most, [`CHUNK_BYTES`] each.
const BUFFERS: usize = 3;

/// Proof that a file was hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hashed {
    path: PathBuf,
    stamp: Stamp,
    sha256: Digest,
}

impl Hashed {
    /// Hashes a file. `seen` is told the size of each piece and may stop the work.
    ///
    /// # Errors
    /// When the file cannot be read, changes meanwhile, or `seen` says so.
    pub fn of_file(path: &Path, mut seen: impl FnMut(u64) -> io::Result<()>) -> Result<Self, FsError> {
        let failed = |error| FsError::new("read", path, error);
        let file = fs::open(path)?;
        let stamp = fs::stamp_of(&file, path)?;
        let mut hasher = Hasher::default();
        let mut take = |bytes: &[u8]| {
            hasher.update(bytes);
            seen(bytes.len() as u64)
        };
        let busy = BUSY.fetch_add(1, Ordering::Relaxed) + 1;
        let idle = 2 * busy <= std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let ahead = idle && stamp.size_bytes > READ_AHEAD_BYTES;
        let read = if ahead { read_ahead(&file, take) } else { read(&file, &mut take) };
        BUSY.fetch_sub(1, Ordering::Relaxed);
        read.map_err(failed)?;
        let (sha256, size_bytes) = hasher.finish();
        if size_bytes != stamp.size_bytes {
            return Err(failed(io::Error::other("it changed while it was read")));
        }
        Ok(Self { path: path.to_owned(), stamp, sha256 })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn sha256(&self) -> Digest {
        self.sha256
    }

    pub fn size_bytes(&self) -> u64 {
        self.stamp.size_bytes
    }

    pub fn stamp(&self) -> &Stamp {
        &self.stamp
    }

    /// Whether nobody has touched the file since.
    pub fn is_current(&self) -> bool {
        fs::stamp(&self.path).is_ok_and(|stamp| stamp == self.stamp)
    }

    /// Carries the proof over a change of ours to the file's name or permissions, after which it is at `to`. If it was
    /// touched otherwise, before or meanwhile, the proof stays behind and is worth nothing.
    ///
    /// # Errors
    /// What `change` says.
    pub fn through<E>(mut self, to: &Path, change: impl FnOnce() -> Result<(), E>) -> Result<Self, E> {
        let current = self.is_current();
        change()?;
        if let Some(now) = fs::stamp(to).ok().filter(|_| current)
            && now == (Stamp { changed_ns: now.changed_ns, ..self.stamp })
        {
            (self.path, self.stamp) = (to.to_owned(), now);
        }
        Ok(self)
    }

    /// Puts the file in a second place as [`fs::place`] does, and gives the proof for that place. A copy has none: its
    /// bytes were written again.
    ///
    /// # Errors
    /// When the place cannot be written.
    pub fn placed(self, to: &Path) -> Result<Option<Self>, FsError> {
        let (from, current) = (self.path.clone(), self.is_current());
        match fs::place(&from, to)? {
            Placed::Copy => Ok(None),
            Placed::HardLink | Placed::Symlink => {
                let now = fs::stamp(to)?;
                let same = current && now == (Stamp { changed_ns: now.changed_ns, ..self.stamp });
                Ok(same.then(|| Self { path: to.to_owned(), stamp: now, sha256: self.sha256 }))
            }
            // The file system shares the blocks of the file as it was at one moment: the stamp was right before and after.
            Placed::Reflink => {
                let stamp = fs::stamp(to)?;
                let same = current && self.is_current() && stamp.size_bytes == self.stamp.size_bytes;
                Ok(same.then(|| Self { path: to.to_owned(), stamp, sha256: self.sha256 }))
            }
        }
    }
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

    /// What was hashed is not the file's beginning any more.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn restart(&mut self) -> Result<(), FsError> {
        (self.hasher, self.at) = (Hasher::default(), 0);
        self.file.rewind().map_err(|error| FsError::new("read", &self.path, error))
    }

    /// Hashes on, a piece at most, not beyond the first `end` bytes.
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

    /// The proof, when the whole file was hashed and nobody writes to it any more.
    ///
    /// # Errors
    /// When there is more of it than was hashed.
    pub fn finish(self) -> Result<Hashed, FsError> {
        let failed = |error| FsError::new("read", &self.path, error);
        let stamp = fs::stamp_of(&self.file, &self.path)?;
        if stamp.size_bytes != self.at {
            return Err(failed(io::Error::other(format!("it has {} bytes, not {}", stamp.size_bytes, self.at))));
        }
        Ok(Hashed { sha256: self.hasher.finish().0, path: self.path, stamp })
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
            assert_eq!(follower.finish().unwrap(), hashed);
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
}
