//! Receiving a pack: libgit2's indexer hashes and stores it, behind a guard that refuses bombs before they are unpacked.
//!
//! The pack format: git's `Documentation/gitformat-pack.adoc`. The indexer takes every object apart and names it by its
//! own hash, so that a server cannot give one object for another; but it believes declared sizes and counts, and takes
//! memory for them. So each declared size is looked at as it comes by, which costs unpacking everything once more.

use std::io::{self, Write};
use std::path::Path;

use flate2::{Decompress, FlushDecompress, Status};

use crate::report::{Progress, Task, Unit};
use crate::source::SourceError;

/// The largest pack that is taken.
pub const MAX_PACK_BYTES: u64 = 8 << 30;
/// The largest object: it is held in memory as a whole, some of them several times.
pub const MAX_OBJECT_BYTES: u64 = 1 << 30;
const MAX_OBJECTS: u32 = 20_000_000;

/// Takes a pack as it comes, into a folder of packs.
pub struct Guard<'w> {
    indexer: git2::Indexer<'static>,
    scanner: Scanner,
    what: String,
    progress: Progress,
    task: &'w Task,
    size_bytes: u64,
}

impl std::fmt::Debug for Guard<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").field("what", &self.what).field("size_bytes", &self.size_bytes).finish_non_exhaustive()
    }
}

impl<'w> Guard<'w> {
    /// # Errors
    /// When nothing can be written to `folder`.
    pub fn new(task: &'w Task, what: &str, folder: &Path) -> Result<Self, SourceError> {
        let indexer = git2::Indexer::new(None, folder, 0o644, false).map_err(|error| SourceError::Network {
            what: what.to_owned(),
            why: format!("`{}` cannot be written: {}", folder.display(), error.message()),
            hint: None,
        })?;
        let progress = task.start("fetching", what, None, Unit::Bytes);
        Ok(Self { indexer, scanner: Scanner::default(), what: what.to_owned(), progress, task, size_bytes: 0 })
    }

    pub fn is_empty(&self) -> bool {
        self.size_bytes == 0
    }

    /// What a failed write means.
    pub fn why(&self, error: &io::Error) -> SourceError {
        match self.task.check() {
            Err(cancelled) => cancelled.into(),
            Ok(()) => hostile(&self.what, &error.to_string()),
        }
    }

    /// Stores what was received.
    ///
    /// # Errors
    /// When the pack is incomplete or damaged.
    pub fn finish(self) -> Result<(), SourceError> {
        if !self.scanner.is_done() {
            let why = format!("the pack ended too early, after {} bytes", self.size_bytes);
            return Err(SourceError::Network { what: self.what, why, hint: Some("try again".to_owned()) });
        }
        let stored = self.indexer.commit();
        stored.map_err(|error| hostile(&self.what, error.message()))?;
        self.progress.finish(format!("{} kB", self.size_bytes.div_ceil(1000)));
        Ok(())
    }
}

fn hostile(what: &str, why: &str) -> SourceError {
    SourceError::Hostile { what: what.to_owned(), why: format!("the pack that the server sent is damaged: {why}") }
}

impl Write for Guard<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.task.check().map_err(io::Error::other)?;
        self.size_bytes += bytes.len() as u64;
        if self.size_bytes > MAX_PACK_BYTES {
            return Err(io::Error::other(format!("it is larger than {MAX_PACK_BYTES} bytes")));
        }
        self.scanner.feed(bytes).map_err(io::Error::other)?;
        self.indexer.write_all(bytes)?;
        self.progress.add(bytes.len() as u64);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Walks over a pack's entries as the bytes pass.
struct Scanner {
    state: State,
    left: u32,
    inflate: Decompress,
    scratch: Vec<u8>,
}

/// Where in the pack the next byte is.
enum State {
    /// `PACK`, the version, the number of objects; bytes so far.
    Header(Vec<u8>),
    /// Type and size of the next object, seven bits a byte; bytes so far.
    Entry(Vec<u8>),
    /// Where a delta's base is: an offset that ends with a byte below 128, or 20 bytes.
    Base { offset: bool, left: u8, size_bytes: u64 },
    /// Compressed content: how much was declared and has come out, and for a delta its first bytes.
    Content { size_bytes: u64, out: u64, delta: Option<Vec<u8>> },
    /// The checksum, which the indexer compares.
    Trailer(u8),
}

impl Default for Scanner {
    fn default() -> Self {
        let (inflate, scratch) = (Decompress::new(true), vec![0; 1 << 16]);
        Self { state: State::Header(Vec::new()), left: 0, inflate, scratch }
    }
}

impl Scanner {
    fn is_done(&self) -> bool {
        matches!(self.state, State::Trailer(0))
    }

    fn feed(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while let Some((&byte, tail)) = bytes.split_first() {
            match &mut self.state {
                State::Header(seen) => {
                    seen.push(byte);
                    bytes = tail;
                    if seen.len() == 12 {
                        self.left = objects(seen)?;
                        self.state = self.next_entry();
                    }
                }
                State::Entry(seen) => {
                    seen.push(byte);
                    bytes = tail;
                    if byte < 128 {
                        self.state = begin(seen)?;
                    } else if seen.len() > 9 {
                        return Err("an object's size is too long".to_owned());
                    }
                }
                State::Base { offset, left, size_bytes } => {
                    bytes = tail;
                    *left = left.saturating_sub(1);
                    if *offset && byte >= 128 && *left == 0 {
                        return Err("an offset is too long".to_owned());
                    }
                    if *left == 0 || (*offset && byte < 128) {
                        self.state = State::Content { size_bytes: *size_bytes, out: 0, delta: Some(Vec::new()) };
                    }
                }
                State::Content { .. } => bytes = self.inflate(bytes)?,
                State::Trailer(0) => return Err("there is more after its end".to_owned()),
                State::Trailer(left) => {
                    *left -= 1;
                    bytes = tail;
                }
            }
        }
        Ok(())
    }

    fn next_entry(&mut self) -> State {
        self.inflate.reset(true);
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                State::Entry(Vec::new())
            }
            None => State::Trailer(20),
        }
    }

    /// Unpacks a part of one object's content, and throws it away.
    fn inflate<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], String> {
        let State::Content { size_bytes, out, delta } = &mut self.state else { return Ok(bytes) };
        let (before_in, before_out) = (self.inflate.total_in(), self.inflate.total_out());
        let status = self.inflate.decompress(bytes, &mut self.scratch, FlushDecompress::None);
        let status = status.map_err(|error| error.to_string())?;
        let used = usize::try_from(self.inflate.total_in() - before_in).unwrap_or(bytes.len());
        let made = usize::try_from(self.inflate.total_out() - before_out).unwrap_or(0);
        *out += made as u64;
        if *out > *size_bytes {
            return Err("an object is larger than it says".to_owned());
        }
        if let Some(head) = delta
            && head.len() < 20
        {
            head.extend(self.scratch[..made].iter().take(20 - head.len()));
        }
        match status {
            Status::StreamEnd => {
                if let Some(head) = delta {
                    check_delta(head)?;
                }
                self.state = self.next_entry();
            }
            _ if used == 0 && made == 0 => return Err("an object's content makes no progress".to_owned()),
            _ => {}
        }
        Ok(&bytes[used..])
    }
}

fn objects(header: &[u8]) -> Result<u32, String> {
    let number = |at: usize| header[at..at + 4].iter().fold(0_u32, |number, byte| number << 8 | u32::from(*byte));
    if &header[..4] != b"PACK" || !matches!(number(4), 2 | 3) {
        return Err("it is not a pack".to_owned());
    }
    let count = number(8);
    if count > MAX_OBJECTS { Err(format!("it announces {count} objects")) } else { Ok(count) }
}

/// The entry's first bytes: three bits of type, then the size, lowest bits first.
fn begin(seen: &[u8]) -> Result<State, String> {
    let low = seen.first().copied().unwrap_or_default();
    let size = seen[1..].iter().rev().fold(0_u128, |size, byte| size << 7 | u128::from(byte & 127));
    let size_bytes = u64::try_from(size << 4 | u128::from(low & 15)).unwrap_or(u64::MAX);
    if size_bytes > MAX_OBJECT_BYTES {
        return Err(format!("it has an object of {size_bytes} bytes, more than {MAX_OBJECT_BYTES}"));
    }
    match (low >> 4) & 7 {
        1..=4 => Ok(State::Content { size_bytes, out: 0, delta: None }),
        6 => Ok(State::Base { offset: true, left: 10, size_bytes }),
        7 => Ok(State::Base { offset: false, left: 20, size_bytes }),
        kind => Err(format!("it has an object of the unknown type {kind}")),
    }
}

/// A delta begins with the sizes of its base and of its result.
fn check_delta(head: &[u8]) -> Result<(), String> {
    let mut bytes = head.iter();
    for _ in 0..2 {
        let mut size = 0_u128;
        for place in 0..10 {
            let byte = bytes.next().ok_or("a delta is too short")?;
            size |= u128::from(byte & 127) << (7 * place);
            if *byte < 128 {
                break;
            }
        }
        if size > u128::from(MAX_OBJECT_BYTES) {
            return Err(format!("a delta makes an object of {size} bytes, more than {MAX_OBJECT_BYTES}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pack of some objects, one of which is a delta, as libgit2 writes it.
    fn good() -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let repo = git2::Repository::init_bare(folder.path()).unwrap();
        let noise: Vec<u8> = (0..40_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
        let mut builder = repo.packbuilder().unwrap();
        for tail in [&b"one"[..], b"two", b""] {
            builder.insert_object(repo.blob(&[&noise, tail].concat()).unwrap(), Some("name")).unwrap();
        }
        builder.insert_object(repo.blob(b"").unwrap(), None).unwrap();
        let mut bytes = git2::Buf::new();
        builder.write_buf(&mut bytes).unwrap();
        bytes.to_vec()
    }

    fn scan(bytes: &[u8], step: usize) -> Result<bool, String> {
        let mut scanner = Scanner::default();
        bytes.chunks(step).try_for_each(|part| scanner.feed(part))?;
        Ok(scanner.is_done())
    }

    #[test]
    fn a_good_pack_in_any_pieces() {
        let pack = good();
        assert!(pack.len() < 300_000, "there is no delta in it");
        for step in [1, 7, 4096, pack.len()] {
            assert_eq!(scan(&pack, step), Ok(true), "{step}");
        }
        assert_eq!(scan(&pack[..pack.len() - 1], 999), Ok(false));
        assert!(scan(&[&pack[..], b"x"].concat(), 999).unwrap_err().contains("after its end"));
    }

    fn pack(count: u32, rest: &[u8]) -> Vec<u8> {
        [b"PACK\0\0\0\x02", &count.to_be_bytes()[..], rest].concat()
    }

    fn zipped(bytes: &[u8]) -> Vec<u8> {
        let mut zipped = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        zipped.write_all(bytes).unwrap();
        zipped.finish().unwrap()
    }

    #[test]
    fn bombs_are_refused_before_they_are_unpacked() {
        let bomb = zipped(&vec![0; 1 << 20]);
        // A delta whose result is said to have 2^35 bytes.
        let delta = zipped(&[5, 0x80, 0x80, 0x80, 0x80, 0x80, 1, 0]);
        let offset_delta = [&[0x68, 1][..], &delta].concat();
        let named_delta = [&[0x78][..], &[7; 20], &delta].concat();
        for (bytes, word) in [
            (b"<html>nothing</html>".to_vec(), "not a pack"),
            (pack(u32::MAX, b""), "announces"),
            (pack(1, &[0xbf, 0xff, 0xff, 0xff, 0xff, 0x7f]), "more than"),
            (pack(1, &[0xff; 20]), "too long"),
            (pack(1, &[&[0x35][..], &bomb].concat()), "larger than it says"),
            (pack(1, &offset_delta), "a delta makes"),
            (pack(1, &named_delta), "a delta makes"),
            (pack(1, &[&[0x68][..], &[0xff; 20]].concat()), "offset is too long"),
            (pack(1, &[&[0x60, 1][..], &zipped(b"")].concat()), "too short"),
            (pack(1, &[0x55, 1, 2, 3]), "unknown type"),
            (pack(1, &[0x35, 1, 2, 3]), ""),
        ] {
            let why = scan(&bytes, 5).unwrap_err();
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn a_damaged_pack_is_not_stored() {
        let folder = tempfile::tempdir().unwrap();
        let task = Task::silent();
        let store = |bytes: &[u8]| -> Result<(), SourceError> {
            let mut guard = Guard::new(&task, "x", folder.path())?;
            guard.write_all(bytes).map_err(|error| guard.why(&error))?;
            guard.finish()
        };
        let mut bytes = good();
        assert!(store(&bytes[..200]).unwrap_err().to_string().contains("could not fetch"));
        *bytes.last_mut().unwrap() ^= 1;
        assert!(matches!(store(&bytes), Err(SourceError::Hostile { .. })));
        let packs = |folder: &Path| {
            let files = crate::base::fs::read_dir(folder).unwrap();
            files.iter().filter(|path| path.extension().is_some()).count()
        };
        assert_eq!(packs(folder.path()), 0);
        store(&good()).unwrap();
        assert_eq!(packs(folder.path()), 2);
    }
}
