//! The key of this machine, and what is sealed with it: HMAC-SHA-256 (RFC 2104).
//!
//! The key lies outside the cache, so whoever can only write the cache (a restored CI cache, a shared disk, an unpacked
//! archive) cannot make a record that is believed. Machines that are meant to believe each other's caches are given one
//! key (`AITOOLS_RECEIPT_KEY`).

use std::path::Path;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::base::digest::{Digest, hex};
use crate::base::fs::{self, FsError};

/// The key that seals receipts and records.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

impl Key {
    /// A key from a secret that the user gave.
    pub fn from_secret(secret: &str) -> Self {
        Self(*Digest::of(secret.as_bytes()).as_bytes())
    }

    /// The key in `path`, made with fresh randomness when there is none. Two processes that make it at once agree.
    ///
    /// # Errors
    /// When it can be neither read nor made.
    pub fn load_or_create(path: &Path) -> Result<Self, FsError> {
        for _ in 0..10 {
            match fs::read_bounded(path, 1024) {
                Ok(bytes) if bytes.len() == 64 => return Ok(Self::from_secret(&String::from_utf8_lossy(&bytes))),
                // Empty or cut off: a former run died while writing it. Nothing sealed with it can exist.
                Ok(_) => fs::remove_file(path)?,
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
            create(path)?;
        }
        Err(FsError::new("read", path, std::io::Error::other("it is damaged, and replacing it did not help")))
    }

    fn mac(&self, purpose: &str, bytes: &[u8]) -> Hmac<Sha256> {
        // HMAC takes keys of any length, so this cannot fail; an unkeyed MAC would fail every comparison, safely.
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(&self.0)
            .unwrap_or_else(|_| <Hmac<Sha256> as KeyInit>::new(&hmac::digest::Key::<Hmac<Sha256>>::default()));
        mac.update(&(purpose.len() as u64).to_le_bytes());
        mac.update(purpose.as_bytes());
        mac.update(bytes);
        mac
    }

    /// `bytes`, then a line with the seal. `purpose` keeps a seal for one thing from passing for another.
    pub fn seal(&self, purpose: &str, bytes: &[u8]) -> Vec<u8> {
        let seal = hex(&self.mac(purpose, bytes).finalize().into_bytes());
        [bytes, b"\n#seal ", seal.as_bytes(), b"\n"].concat()
    }

    /// The bytes inside, when the seal is ours and unbroken.
    pub fn open<'a>(&self, purpose: &str, sealed: &'a [u8]) -> Option<&'a [u8]> {
        const TAIL: usize = "\n#seal ".len() + 64 + 1;
        let (bytes, tail) = sealed.split_at_checked(sealed.len().checked_sub(TAIL)?)?;
        let digits = tail.strip_prefix(b"\n#seal ")?.strip_suffix(b"\n")?;
        let seal = Digest::from_hex(std::str::from_utf8(digits).ok()?).ok()?;
        self.mac(purpose, bytes).verify_slice(seal.as_bytes()).ok()?;
        Some(bytes)
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
        let first = Key::load_or_create(&path).unwrap();
        assert_eq!(first.0, Key::load_or_create(&path).unwrap().0);
        fs::write_atomic(&path, b"short").unwrap();
        assert_ne!(first.0, Key::load_or_create(&path).unwrap().0);
    }
}
