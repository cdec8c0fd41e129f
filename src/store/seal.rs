//! The key of this machine, and what is sealed with it: HMAC-SHA-256 (RFC 2104).
//!
//! The key lies outside the cache, so whoever can only write the cache (a restored CI cache, a shared disk, an unpacked
//! archive) cannot make a record that is believed. Machines that are meant to believe each other's caches are given one
//! key (`AITOOLS_RECEIPT_KEY`).

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::base::digest::{Digest, hex};
use crate::base::fs::{self, FsError};

/// The key that seals receipts and records.
/// The secret of this machine, or of a group of machines.
#[derive(Clone)]
pub struct Key {
    bytes: Arc<OnceLock<[u8; 32]>>,
    /// Where it is to be kept, when it is not made yet.
    path: Option<PathBuf>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

impl Key {
    /// A key from a secret that the user gave.
    pub fn from_secret(secret: &str) -> Self {
        Self { bytes: Arc::new(secret_bytes(secret).into()), path: None }
    }

    /// The key in `path`. When there is none, [`Key::make`] makes it; until then nothing can have been sealed with it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(path: &Path) -> Result<Self, FsError> {
        let bytes = read(path)?.map(OnceLock::from).unwrap_or_default();
        Ok(Self { bytes: Arc::new(bytes), path: Some(path.to_owned()) })
    }

    /// Makes the key with fresh randomness unless there is one. Two processes that make it at once agree.
    ///
    /// # Errors
    /// When it can be neither read nor made.
    pub fn make(&self) -> Result<(), FsError> {
        let (None, Some(path)) = (self.bytes.get(), &self.path) else { return Ok(()) };
        for _ in 0..10 {
            if let Some(bytes) = read(path)? {
                let _ = self.bytes.set(bytes);
                return Ok(());
            }
            // Empty or cut off: a former run died while writing it. Nothing sealed with it can exist.
            fs::remove_file(path)?;
            create(path)?;
        }
        Err(FsError::new("read", path, std::io::Error::other("it is damaged and comes back damaged")))
    }

    fn mac(key: &[u8; 32], purpose: &str, bytes: &[u8]) -> Hmac<Sha256> {
        // HMAC takes keys of any length, so this cannot fail; an unkeyed MAC would fail every comparison, safely.
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key)
            .unwrap_or_else(|_| <Hmac<Sha256> as KeyInit>::new(&hmac::digest::Key::<Hmac<Sha256>>::default()));
        mac.update(&(purpose.len() as u64).to_le_bytes());
        mac.update(purpose.as_bytes());
        mac.update(bytes);
        mac
    }

    /// `bytes`, then a line with the seal. `purpose` keeps a seal for one thing from passing for another.
    pub fn seal(&self, purpose: &str, bytes: &[u8]) -> Vec<u8> {
        // Writers make the key first. Without one, the seal is nobody's.
        let key = self.bytes.get_or_init(|| {
            let mut random = [0; 32];
            let _ = getrandom::fill(&mut random);
            random
        });
        let seal = hex(&Self::mac(key, purpose, bytes).finalize().into_bytes());
        [bytes, b"\n#seal ", seal.as_bytes(), b"\n"].concat()
    }

    /// The bytes inside, when the seal is ours and unbroken.
    pub fn open<'a>(&self, purpose: &str, sealed: &'a [u8]) -> Option<&'a [u8]> {
        let (bytes, tail) = parts(sealed)?;
        let digits = tail.strip_prefix(b"\n#seal ")?.strip_suffix(b"\n")?;
        let seal = Digest::from_hex(std::str::from_utf8(digits).ok()?).ok()?;
        Self::mac(self.bytes.get()?, purpose, bytes).verify_slice(seal.as_bytes()).ok()?;
        Some(bytes)
    }
}

/// What is sealed, and the seal.
fn parts(sealed: &[u8]) -> Option<(&[u8], &[u8])> {
    const TAIL: usize = "\n#seal ".len() + 64 + 1;
    sealed.split_at_checked(sealed.len().checked_sub(TAIL)?)
}

/// The bytes inside, whoever sealed them: for somebody who believes the sender.
pub fn inside(sealed: &[u8]) -> Option<&[u8]> {
    Some(parts(sealed)?.0)
}

fn secret_bytes(secret: &str) -> [u8; 32] {
    *Digest::of(secret.as_bytes()).as_bytes()
}

/// The key in a file; none when there is no file, or no whole one.
fn read(path: &Path) -> Result<Option<[u8; 32]>, FsError> {
    match fs::read_bounded(path, 1024) {
        Ok(bytes) => Ok((bytes.len() == 64).then(|| secret_bytes(&String::from_utf8_lossy(&bytes)))),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

fn create(path: &Path) -> Result<(), FsError> {
    let mut random = [0; 32];
    getrandom::fill(&mut random)
        .map_err(|error| FsError::new("get randomness for", path, std::io::Error::other(error.to_string())))?;
    fs::create_private(path, hex(&random).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_key_and_purpose_open_a_seal() {
        let key = Key::from_secret("a");
        let sealed = key.seal("receipt", b"{}");
        assert_eq!(key.open("receipt", &sealed), Some(&b"{}"[..]));
        assert_eq!(key.open("record", &sealed), None);
        assert_eq!(Key::from_secret("b").open("receipt", &sealed), None);
        for index in 0..sealed.len() {
            let mut broken = sealed.clone();
            broken[index] ^= 1;
            assert_eq!(key.open("receipt", &broken), None, "byte {index}");
        }
        assert_eq!(key.open("receipt", b""), None);
    }

    #[test]
    fn a_key_is_made_once_and_mended_when_cut_off() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("état/key");
        let made = || {
            let key = Key::load(&path).unwrap();
            key.make().unwrap();
            *key.bytes.get().unwrap()
        };
        assert!(Key::load(&path).unwrap().bytes.get().is_none() && !fs::exists(&path), "reading makes nothing");
        let first = made();
        assert_eq!(first, made());
        assert_eq!(Key::load(&path).unwrap().bytes.get(), Some(&first));
        fs::write_atomic(&path, b"short").unwrap();
        assert_ne!(first, made());
    }
}
