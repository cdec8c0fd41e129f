//! Bundles as they travel: a folder or a tar archive in the OCI image layout ([`layout`]), or a repository of an OCI registry
//! ([`registry`]). Whatever they hold is compared with the digests and sizes that lead to it, before anything looks at it.
//!
//! Absent: what is in a bundle, and what of it is believed. See `docs/bundle.md`.

pub mod layout;
pub mod registry;

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use crate::base::digest::{CHUNK_BYTES, Digest, Hasher};
use crate::base::fs::{self, FsError};
use crate::base::hashed::{Follower, Hashed};
use crate::base::http::{self, Backoff};
use crate::format::oci::{Blob, Bundle, Config, Layer, MAX_MANIFEST_BYTES, OciError};
use crate::report::{Progress, Task};

use super::SourceError;

/// The bytes of a blob, as they come.
pub type Stream<'a> = Box<dyn Read + Send + 'a>;

/// A place that a bundle is read from. Nothing that it gives is believed.
pub trait Source: Sync {
    /// The place, for messages.
    fn what(&self) -> String;

    /// The bytes of the manifest, which have the digest that leads to them.
    ///
    /// # Errors
    /// [`SourceError`].
    fn manifest(&self) -> Result<Vec<u8>, SourceError>;

    /// The bytes of a blob from a position on, in bytes.
    ///
    /// # Errors
    /// [`SourceError`].
    fn open(&self, blob: &Blob, from: u64) -> Result<Stream<'_>, SourceError>;

    /// How often, and after which delays, a transfer that breaks is continued; None where it makes no sense.
    fn backoff(&self) -> Option<Backoff> {
        None
    }
}

/// A place that a bundle is written to.
pub trait Target {
    /// Writes a blob, whose bytes are those of a file.
    ///
    /// # Errors
    /// When the file is not what the blob says, or the place cannot be written.
    fn put(&mut self, blob: &Blob, file: &Path, progress: &Progress) -> Result<(), SourceError>;

    /// Writes the manifest, which makes it a bundle.
    ///
    /// # Errors
    /// When the place cannot be written.
    fn finish(self: Box<Self>, manifest: &[u8]) -> Result<(), SourceError>;
}

/// Pieces of a file that wait to be hashed, at most.
const AHEAD: usize = 4;

/// The bytes of a file on their way to a target: hashed by a thread of their own, so that a file that changed meanwhile is noticed.
struct Checked<'a> {
    path: &'a Path,
    blob: Blob,
    file: io::Take<File>,
    /// The piece that is handed over now, and how much of it was.
    piece: Arc<Vec<u8>>,
    at: usize,
    tell: SyncSender<Arc<Vec<u8>>>,
    hashing: JoinHandle<(Digest, u64)>,
    task: &'a Task,
    progress: &'a Progress,
}

impl<'a> Checked<'a> {
    fn open(path: &'a Path, blob: &Blob, task: &'a Task, progress: &'a Progress) -> Result<Self, FsError> {
        let file = fs::open(path)?.take(blob.size_bytes);
        let (tell, told) = sync_channel::<Arc<Vec<u8>>>(AHEAD);
        // It ends when the other end of the channel goes.
        let hashing = std::thread::spawn(move || {
            let mut hasher = Hasher::default();
            told.into_iter().for_each(|piece| hasher.update(&piece));
            hasher.finish()
        });
        Ok(Self { path, blob: *blob, file, piece: Arc::default(), at: 0, tell, hashing, task, progress })
    }

    fn finish(self) -> Result<(), SourceError> {
        drop(self.tell);
        let (digest, size_bytes) = self.hashing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        if (digest, size_bytes) == (self.blob.digest, self.blob.size_bytes) {
            return Ok(());
        }
        let why = format!("it changed meanwhile: it is {digest} now, not {}", self.blob.digest);
        Err(FsError::new("read", self.path, io::Error::other(why)).into())
    }
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            self.task.check().map_err(io::Error::other)?;
            let mut piece = vec![0; CHUNK_BYTES];
            let count = self.file.read(&mut piece)?;
            piece.truncate(count);
            (self.piece, self.at) = (Arc::new(piece), 0);
            let _ = self.tell.send(Arc::clone(&self.piece));
            self.progress.add(count as u64);
        }
        let count = buffer.len().min(self.piece.len() - self.at);
        buffer[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

fn refused(what: &str, why: impl ToString) -> SourceError {
    SourceError::Hostile { what: what.to_owned(), why: why.to_string() }
}

/// The bundle in a place, as its manifest and configuration describe it, and the digest of the manifest.
///
/// # Errors
/// [`SourceError::Hostile`] when it is damaged or something else.
pub fn read(source: &dyn Source) -> Result<(Bundle, Digest), SourceError> {
    let what = source.what();
    let foreign = |error: OciError| refused(&what, error);
    let manifest = source.manifest()?;
    let (config, layers) = Bundle::parse_manifest(&manifest).map_err(foreign)?;
    let config = Config::parse(&small(source, &config)?).map_err(foreign)?;
    Ok((Bundle { config, layers }, Digest::of(&manifest)))
}

/// A small blob as a whole, verified.
fn small(source: &dyn Source, blob: &Blob) -> Result<Vec<u8>, SourceError> {
    let what = || format!("blob {} of {}", blob.digest, source.what());
    if blob.size_bytes > MAX_MANIFEST_BYTES {
        return Err(refused(&what(), format!("it has {} bytes, the limit is {MAX_MANIFEST_BYTES}", blob.size_bytes)));
    }
    let mut bytes = Vec::new();
    let read = source.open(blob, 0)?.take(blob.size_bytes + 1).read_to_end(&mut bytes);
    read.map_err(|error| refused(&what(), error))?;
    verified(&what(), blob, Digest::of(&bytes), bytes.len() as u64)?;
    Ok(bytes)
}

fn verified(what: &str, blob: &Blob, digest: Digest, size_bytes: u64) -> Result<(), SourceError> {
    if size_bytes != blob.size_bytes {
        return Err(refused(what, format!("it has {size_bytes} bytes, the manifest says {}", blob.size_bytes)));
    }
    if digest != blob.digest {
        return Err(refused(what, format!("its bytes are {digest}")));
    }
    Ok(())
}

/// Brings a layer to a new file, and gives the proof that it is what the manifest says. It is hashed while it is written. A
/// file that is something else is removed.
///
/// # Errors
/// [`SourceError::Hostile`] when the bytes are others, or fewer or more than the manifest says.
pub fn receive(
    source: &dyn Source,
    layer: &Layer,
    to: &Path,
    task: &Task,
    progress: &Progress,
) -> Result<Hashed, SourceError> {
    let received = transfer(source, layer, to, task, progress).and_then(|hashed| {
        verified(&name(source, layer), &layer.blob, hashed.sha256(), hashed.size_bytes())?;
        Ok(hashed)
    });
    received.inspect_err(|_| drop(fs::remove_file(to)))
}

/// A layer, for messages.
fn name(source: &dyn Source, layer: &Layer) -> String {
    format!("`{}` ({}) of {}", layer.title, layer.blob.digest, source.what())
}

fn transfer(
    source: &dyn Source,
    layer: &Layer,
    to: &Path,
    task: &Task,
    progress: &Progress,
) -> Result<Hashed, SourceError> {
    let mut file = fs::create_new(to)?;
    std::thread::scope(|scope| {
        let (tell, told) = channel::<u64>();
        let hashing = scope.spawn(move || {
            let mut follower = Follower::new(to)?;
            for end in told {
                while follower.at() < end {
                    follower.advance(end)?;
                }
            }
            follower.finish()
        });
        let written = write(source, layer, task, &mut |at, bytes| {
            file.write_all(bytes).map_err(|error| FsError::new("write", to, error))?;
            progress.add(bytes.len() as u64);
            let _ = tell.send(at);
            Ok(())
        });
        drop(tell);
        let hashed = hashing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written?;
        Ok(hashed?)
    })
}

/// Called with each piece, and the number of bytes up to its end.
type Each<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), SourceError>;

/// Hands over the bytes of a layer, continued where a transfer breaks: never more than the manifest says.
fn write(source: &dyn Source, layer: &Layer, task: &Task, each: Each<'_>) -> Result<(), SourceError> {
    let size_bytes = layer.blob.size_bytes;
    let (mut at, mut chunk) = (0, vec![0; CHUNK_BYTES]);
    let mut backoff = source.backoff();
    loop {
        let before = at;
        let mut stream = source.open(&layer.blob, at)?.take(size_bytes.saturating_add(1) - at);
        let broken = loop {
            task.check()?;
            match stream.read(&mut chunk) {
                Ok(0) => break (at < size_bytes).then(|| io::Error::from(io::ErrorKind::UnexpectedEof)),
                Ok(count) => {
                    at += count as u64;
                    if at > size_bytes {
                        return Err(refused(&name(source, layer), format!("it has more than {size_bytes} bytes")));
                    }
                    each(at, &chunk[..count])?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Some(error),
            }
        };
        let Some(error) = broken else { return Ok(()) };
        let short = || match error.kind() {
            io::ErrorKind::UnexpectedEof => format!("it ends after {at} of {size_bytes} bytes"),
            _ => error.to_string(),
        };
        let Some(backoff) = &mut backoff else { return Err(refused(&name(source, layer), short())) };
        if at > before {
            backoff.progressed();
        }
        let Some(delay) = backoff.after_failure(None) else {
            return Err(SourceError::Network { what: name(source, layer), why: short(), hint: None });
        };
        http::pause(task.cancel(), delay)?;
    }
}
