//! Brings one file to this machine: in parallel ranges where the server has them, hashed while it comes, going on where
//! it stopped after whatever went wrong, and given its name only when its digest is the expected one.
//!
//! Parts lie in a scratch folder as `<key>.part` with a journal `<key>.json` and a lock file `<key>.lock`; the key is the
//! expected SHA-256, else a digest of the address. Workers write ranges where they belong; one thread hashes what is
//! there from the beginning on, by reading it back from memory that the system keeps anyway. After a kill the file is
//! hashed from its start: a saved state of the hash would vouch for bytes that a power cut may have taken.
//!
//! Absent: trust in sizes and digests that a server tells, more memory than a few buffers, caches.

mod part;
mod server;
mod state;
mod transfer;
mod worker;

use std::io::Read as _;
use std::path::Path;

use crate::base::digest::Digest;
use crate::base::fs::{self, FsError};
use crate::base::hashed::Hashed;
use crate::base::http::{Http, shown};
use crate::format::lockfile::FilePin;
use crate::report::{Task, Unit, Verb};

use super::SourceError;
use part::{MAX_PART_AGE, Part};
use server::Wrong;
use state::Transfer;
use transfer::{Means, Outcome};

/// Connections for one file, when nobody says otherwise.
pub const STREAMS: usize = 4;
/// The most connections for one file.
pub const MAX_STREAMS: usize = 8;
/// Left free on the disk, in bytes, when space is checked before a download.
pub const RESERVE_BYTES: u64 = 64 << 20;

/// One file to bring.
#[derive(Debug, Clone)]
pub struct Download<'a> {
    /// For people.
    pub what: &'a str,
    /// Tried in order until one works.
    pub urls: &'a [String],
    /// May hold secrets: they go to the origin of the first address only.
    pub headers: &'a [(&'a str, &'a str)],
    /// In bytes. Believed, as is the digest; what the server says is compared with it.
    pub size_bytes: Option<u64>,
    /// The digest that the file must have, when it is known.
    pub sha256: Option<Digest>,
    /// The folder for the part; best on the file system of `to`.
    pub parts: &'a Path,
    /// Where the finished file goes. Its folder is made.
    pub to: &'a Path,
    /// Connections at most, 1 to [`MAX_STREAMS`].
    pub streams: usize,
    /// Left free on the disk, in bytes, while a file comes whose size nobody has said: [`RESERVE_BYTES`].
    pub reserve_bytes: u64,
}

impl Download<'_> {
    fn key(&self) -> String {
        let of_url = || Digest::of(self.urls.first().map_or(&[][..], |url| url.as_bytes()));
        self.sha256.map_or_else(|| format!("url-{}", of_url().hex()), |sha256| sha256.hex())
    }
}

/// Brings the file, its bytes durable. With a digest given, what lies at `to` afterwards has it.
///
/// # Errors
/// [`SourceError`]. What came of the file stays for the next try, unless it was wrong.
pub fn download(http: &Http, task: &Task, ask: &Download<'_>) -> Result<Hashed, SourceError> {
    let part = Part::hold(ask.parts, &ask.key(), ask.what, task)?;
    // Whoever held the part before us may have finished it.
    if let Some(there) = already(task, ask.what, ask.to, ask.sha256)? {
        return Ok(there);
    }
    let mut last = None;
    for (index, url) in ask.urls.iter().enumerate() {
        match from_one(http, task, ask, &part, url) {
            Err(error @ (SourceError::Network { .. } | SourceError::Missing { .. } | SourceError::Mismatch { .. })) => {
                if index + 1 < ask.urls.len() {
                    task.warn(format!("{error}; trying {}", shown(&ask.urls[index + 1])));
                }
                last = Some(error);
            }
            result => return result,
        }
    }
    let why = "no address is given".to_owned();
    Err(last.unwrap_or(SourceError::Network { what: ask.what.to_owned(), why, hint: None }))
}

/// What lies at `path`, when it is known what should, and it is that.
///
/// # Errors
/// When it cannot be read, or the user asked to stop.
pub fn already(task: &Task, what: &str, path: &Path, sha256: Option<Digest>) -> Result<Option<Hashed>, SourceError> {
    let Some(expected) = sha256.filter(|_| fs::exists(path)) else { return Ok(None) };
    Ok(Some(hash(task, what, path)?).filter(|there| there.sha256() == expected))
}

/// Hashes a file that is there, telling how far it is.
///
/// # Errors
/// As for [`already`].
pub fn hash(task: &Task, what: &str, path: &Path) -> Result<Hashed, SourceError> {
    let progress = task.start(Verb::Check, what, Some(fs::metadata(path)?.len()), Unit::Bytes);
    let hashed = Hashed::of_file(path, |more| {
        progress.add(more);
        progress.check().map_err(std::io::Error::other)
    });
    progress.check()?;
    let hashed = hashed?;
    progress.finish("");
    Ok(hashed)
}

/// From one address: first in ranges, and after a checksum or size mismatch once more as one request.
fn from_one(http: &Http, task: &Task, ask: &Download<'_>, part: &Part, url: &str) -> Result<Hashed, SourceError> {
    let transfer = Transfer::new(http, task, ask, part, url);
    let (mut means, mut former): (Means, Option<Wrong>) = (Means::Ranges, None);
    loop {
        let wrong = match transfer.run(means)? {
            Outcome::Came(came) => match verdict(ask, part, &came)? {
                None => return Ok(part.finish(came, ask.to)?),
                Some(wrong) => wrong,
            },
            Outcome::Wrong(wrong) => wrong,
        };
        // With a digest to compare with, an answer of something else says nothing against what came before it.
        let next = if wrong.spoilt || ask.sha256.is_none() { Means::Afresh } else { Means::OnePiece };
        if next == Means::Afresh {
            part.forget()?;
        }
        if next <= means {
            return Err(mismatch(ask, former.as_ref().unwrap_or(&wrong), &wrong));
        }
        task.warn(format!("checksum or size mismatch for `{}` ({}): retrying as one request", ask.what, wrong.actual));
        (means, former) = (next, Some(wrong));
    }
}

/// Why a complete file is not the expected one.
fn verdict(ask: &Download<'_>, part: &Part, came: &Hashed) -> Result<Option<Wrong>, FsError> {
    let Some(expected) = ask.sha256 else { return Ok(None) };
    if expected == came.sha256() && ask.size_bytes.is_none_or(|size| size == came.size_bytes()) {
        return Ok(None);
    }
    let mut head = Vec::new();
    let read = fs::open(&part.path)?.take(512).read_to_end(&mut head);
    read.map_err(|error| FsError::new("read", &part.path, error))?;
    let actual = format!("{} ({} bytes)", came.sha256(), came.size_bytes());
    let (likely, digest) = (likely_content(&head).map(str::to_owned), Some(came.sha256()));
    Ok(Some(Wrong { actual, likely, digest, spoilt: true }))
}

fn mismatch(ask: &Download<'_>, first: &Wrong, second: &Wrong) -> SourceError {
    let by_digests = match (first.digest, second.digest) {
        (Some(one), Some(other)) if one == other => {
            "two transfers had the same wrong digest: the server's file has changed, or the expected digest is wrong"
        }
        (Some(_), Some(_)) => "two transfers had different digests: the data is damaged on its way",
        _ if first.actual == second.actual => "the server's file has changed, or the expected size is wrong",
        _ => "the file is changed on its way",
    };
    let likely = second.likely.clone().unwrap_or_else(|| by_digests.to_owned());
    let digest = ask.sha256.map(|digest| digest.to_string());
    let size = ask.size_bytes.map(|size| format!("{size} bytes"));
    let expected = match (digest, size) {
        (Some(digest), Some(size)) => format!("{digest} ({size})"),
        (one, other) => one.or(other).unwrap_or_else(|| "a file".to_owned()),
    };
    SourceError::Mismatch { what: ask.what.to_owned(), expected, actual: second.actual.clone(), likely: Some(likely) }
}

/// Removes what abandoned downloads left in a folder of parts a month ago or earlier.
pub fn sweep_parts(folder: &Path) {
    part::sweep(folder, MAX_PART_AGE);
}

/// Space that a file has yet to take on the disk of `parts`: a part from an earlier time has some.
pub fn missing_bytes(parts: &Path, pin: &FilePin) -> u64 {
    pin.size.saturating_sub(part::taken_bytes(parts, &pin.sha256.hex()))
}

/// Fails when `folder`'s file system has not the space for `needed_bytes` more: call it with the sum of
/// [`missing_bytes`] before the first byte is fetched.
///
/// # Errors
/// An [`FsError`] that names both numbers.
pub fn require_space(folder: &Path, needed_bytes: u64) -> Result<(), FsError> {
    let free = fs::available_bytes(folder)?;
    if needed_bytes > 0 && free < needed_bytes.saturating_add(RESERVE_BYTES) {
        return Err(no_space(folder, needed_bytes));
    }
    Ok(())
}

fn no_space(path: &Path, needed_bytes: u64) -> FsError {
    let why = match fs::available_bytes(path) {
        // A quota, or a file system that keeps room for others.
        Ok(free) if free >= needed_bytes.saturating_add(RESERVE_BYTES) => {
            format!(
                "the system gives no room for {needed_bytes} bytes, although {free} are free; the received part is kept"
            )
        }
        free => {
            let free = free.map_or_else(|_| "too few".to_owned(), |free| free.to_string());
            format!(
                "{needed_bytes} bytes and a reserve of {RESERVE_BYTES} are needed, {free} are free; the received part is kept"
            )
        }
    };
    FsError::new("store", path, std::io::Error::new(std::io::ErrorKind::StorageFull, why))
}

/// For a file that came without a size and would fill the disk.
fn no_room(path: &Path, reserve_bytes: u64) -> FsError {
    let why =
        format!("the server does not say how large the file is, and less than {reserve_bytes} bytes are free now");
    FsError::new("store", path, std::io::Error::new(std::io::ErrorKind::StorageFull, why))
}

/// What a file is instead of a download, as its first bytes show: an error page, for example.
pub fn likely_content(head: &[u8]) -> Option<&'static str> {
    let text = String::from_utf8_lossy(&head[..head.len().min(512)]).trim_start().to_ascii_lowercase();
    match text.as_str() {
        "" if head.is_empty() => Some("it is empty"),
        text if text.starts_with("<!doctype html") || text.starts_with("<html") => {
            Some("it is an HTML page: a login or error page?")
        }
        text if text.starts_with("<?xml") && text.contains("<error") => Some("it is a storage service's error message"),
        text if text.starts_with("version https://git-lfs.github.com/spec/") => {
            Some("it is a Git LFS pointer, not the file it points to")
        }
        text if text.starts_with("{\"error\"") => Some("it is an error message in JSON"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
