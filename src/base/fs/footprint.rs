//! What files take of the disk, and what of it they share.

use std::path::Path;

use super::{platform, read_dir, symlink_metadata};

/// What a file, or a folder with everything in it, takes of the disk. What cannot be looked at counts as nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Footprint {
    /// Number of files and links.
    pub files: u64,
    /// Bytes on the disk.
    pub bytes: u64,
    /// Of these, bytes of files that have further names (hard links) elsewhere: a deletion here does not free them.
    pub shared_bytes: u64,
}

impl std::ops::AddAssign for Footprint {
    fn add_assign(&mut self, other: Self) {
        self.files += other.files;
        self.bytes += other.bytes;
        self.shared_bytes += other.shared_bytes;
    }
}

/// The footprint of what is at a path, links not followed.
pub fn footprint(path: &Path) -> Footprint {
    let Ok(meta) = symlink_metadata(path) else { return Footprint::default() };
    let mut sum = Footprint::default();
    if meta.is_dir() {
        for below in read_dir(path).unwrap_or_default() {
            sum += footprint(&below);
        }
    } else {
        let (bytes, names) = platform::held(path, &meta);
        sum += Footprint { files: 1, bytes, shared_bytes: if names > 1 { bytes } else { 0 } };
    }
    sum
}
