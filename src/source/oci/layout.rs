//! The OCI image layout on a disk: a folder, or the same files in a tar archive.
//!
//! Source: image-spec 1.1, `image-layout.md`: `oci-layout`, `index.json` and `blobs/sha256/<digest>`. A folder or archive of
//! another program will do; in an archive, files must not be sparse and must not need pax headers for their sizes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use tar::{Archive, Builder, EntryType, Header};

use crate::base::digest::{CHUNK_BYTES, Digest};
use crate::base::fs::{self, FsError};
use crate::base::name::RelPath;
use crate::format::oci::{self, Blob, LAYOUT, MAX_LAYERS, MAX_MANIFEST_BYTES};
use crate::report::{Progress, Task};
use crate::source::SourceError;

use super::{Checked, Source, Stream, Target, refused, small};

/// Files of an archive at most: blobs, folders, and what other programs put beside them.
const MAX_ENTRIES: usize = 4 * MAX_LAYERS;

/// A bundle on a disk, to read.
#[derive(Debug)]
pub struct Layout {
    path: PathBuf,
    task: Task,
    /// Where the files of an archive are in it, and their sizes; None for a folder.
    files: Option<BTreeMap<String, (u64, u64)>>,
}

impl Layout {
    /// Opens a folder, or reads the names in an archive.
    ///
    /// # Errors
    /// When there is no bundle, or the archive is damaged or has names that lead out of it.
    pub fn open(path: &Path, task: &Task) -> Result<Self, SourceError> {
        let is_dir = fs::metadata(path)?.is_dir();
        let mut layout = Self { path: path.to_owned(), task: task.clone(), files: None };
        if !is_dir {
            layout.files = Some(layout.list()?);
        }
        layout.file(LAYOUT_NAME, MAX_MANIFEST_BYTES)?;
        Ok(layout)
    }

    /// Every regular file of the archive. The bytes in between are skipped.
    fn list(&self) -> Result<BTreeMap<String, (u64, u64)>, SourceError> {
        let what = self.what();
        let damaged = |error: io::Error| refused(&what, format!("it is damaged: {error}"));
        let file = fs::open(&self.path)?;
        let total = file.metadata().map_err(damaged)?.len();
        let (mut archive, mut files) = (Archive::new(file), BTreeMap::new());
        // Raw: the library would hold extension headers of any size in memory. Names of a layout need none.
        for (count, entry) in archive.entries_with_seek().map_err(damaged)?.raw(true).enumerate() {
            self.task.check()?;
            let entry = entry.map_err(damaged)?;
            if count > MAX_ENTRIES {
                return Err(refused(&what, format!("it has more than {MAX_ENTRIES} files")));
            }
            let kind = entry.header().entry_type();
            if kind.is_dir() || kind.is_pax_global_extensions() || kind.is_pax_local_extensions() {
                continue;
            }
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            if !kind.is_file() {
                return Err(refused(&what, format!("`{name}` is not a plain file")));
            }
            let name = name.strip_prefix("./").unwrap_or(&name);
            let name: RelPath = name.parse().map_err(|error| refused(&what, error))?;
            let (at, size_bytes) = (entry.raw_file_position(), entry.size());
            if at.checked_add(size_bytes).is_none_or(|end| end > total) {
                return Err(refused(&what, format!("it is cut off in `{name}`")));
            }
            if files.insert(name.as_str().to_owned(), (at, size_bytes)).is_some() {
                return Err(refused(&what, format!("it has `{name}` twice")));
            }
        }
        Ok(files)
    }

    /// A file of the layout from a position on, and its size in bytes.
    fn seek(&self, name: &str, from: u64) -> Result<(File, u64), SourceError> {
        let missing = || refused(&self.what(), format!("it has no `{name}`"));
        let (path, start, size_bytes) = match &self.files {
            Some(files) => {
                let (at, size_bytes) = files.get(name).copied().ok_or_else(missing)?;
                (self.path.clone(), at, size_bytes)
            }
            None => {
                let path = self.path.join(name);
                let meta =
                    fs::metadata(&path).map_err(|error| if error.is_not_found() { missing() } else { error.into() })?;
                (path, 0, meta.len())
            }
        };
        let mut file = fs::open(&path)?;
        file.seek(SeekFrom::Start(start.saturating_add(from))).map_err(|error| FsError::new("read", &path, error))?;
        Ok((file, size_bytes))
    }

    /// A small file as a whole.
    fn file(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, SourceError> {
        let (file, size_bytes) = self.seek(name, 0)?;
        if size_bytes > limit_bytes {
            return Err(refused(&self.what(), format!("`{name}` is larger than {limit_bytes} bytes")));
        }
        let mut bytes = Vec::new();
        let read = file.take(size_bytes).read_to_end(&mut bytes);
        read.map_err(|error| FsError::new("read", &self.path, error))?;
        Ok(bytes)
    }
}

impl Source for Layout {
    fn what(&self) -> String {
        format!("bundle `{}`", self.path.display())
    }

    fn manifest(&self) -> Result<Vec<u8>, SourceError> {
        let index = self.file("index.json", MAX_MANIFEST_BYTES)?;
        let manifest = oci::parse_index(&index).map_err(|error| refused(&self.what(), error))?;
        small(self, &manifest)
    }

    fn open(&self, blob: &Blob, from: u64) -> Result<Stream<'_>, SourceError> {
        let name = blob_name(&blob.digest);
        let (file, size_bytes) = self.seek(&name, from)?;
        if size_bytes != blob.size_bytes {
            let why = format!("`{name}` has {size_bytes} bytes, the manifest says {}", blob.size_bytes);
            return Err(refused(&self.what(), why));
        }
        Ok(Box::new(file.take(size_bytes.saturating_sub(from))))
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The name of the file that says what a layout is: the first in an archive.
const LAYOUT_NAME: &str = "oci-layout";

/// Where a new bundle goes: a tar archive when the name ends in `.tar`, else a folder. It gets its name when it is complete.
///
/// # Errors
/// When the place is taken by something that is not replaced: a folder with something in it, for an archive any folder, and any file
/// that is no bundle.
pub fn create(path: &Path, task: &Task) -> Result<Box<dyn Target>, SourceError> {
    let is_tar = path.extension().is_some_and(|ending| ending == "tar");
    let taken = match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => is_tar || !fs::read_dir(path)?.is_empty(),
        // An earlier bundle is replaced; its first entry is known.
        Ok(_) => !is_tar || fs::read_head(path, LAYOUT_NAME.len() as u64)? != LAYOUT_NAME.as_bytes(),
        Err(_) => false,
    };
    if taken {
        let why = io::Error::new(io::ErrorKind::AlreadyExists, "something with this name is there already");
        return Err(FsError::new("create", path, why).into());
    }
    // On the same file system, removed when dropped.
    let staging = fs::temporary_dir(fs::parent(path))?;
    let (path, task) = (path.to_owned(), task.clone());
    if is_tar {
        let file = fs::create_new(&staging.path().join("bundle.tar"))?;
        let mut tar = Builder::new(BufWriter::with_capacity(CHUNK_BYTES, file));
        add(&mut tar, &path, LAYOUT_NAME, LAYOUT.len() as u64, LAYOUT.as_bytes())?;
        return Ok(Box::new(TarTarget { path, staging, tar, task }));
    }
    fs::create_dir_all(&staging.path().join("bundle/blobs/sha256"))?;
    Ok(Box::new(FolderTarget { path, staging }))
}

fn add(
    tar: &mut Builder<BufWriter<File>>,
    path: &Path,
    name: &str,
    size_bytes: u64,
    bytes: impl Read,
) -> Result<(), SourceError> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(size_bytes);
    Ok(tar.append_data(&mut header, name, bytes).map_err(|error| FsError::new("write", path, error))?)
}

struct TarTarget {
    path: PathBuf,
    staging: tempfile::TempDir,
    tar: Builder<BufWriter<File>>,
    task: Task,
}

impl Target for TarTarget {
    fn put(&mut self, blob: &Blob, file: &Path, progress: &Progress) -> Result<(), SourceError> {
        let mut bytes = Checked::open(file, blob, &self.task, progress)?;
        add(&mut self.tar, &self.path, &blob_name(&blob.digest), blob.size_bytes, &mut bytes)?;
        bytes.finish()
    }

    fn finish(mut self: Box<Self>, manifest: &[u8]) -> Result<(), SourceError> {
        let blob = Blob { digest: Digest::of(manifest), size_bytes: manifest.len() as u64 };
        add(&mut self.tar, &self.path, &blob_name(&blob.digest), blob.size_bytes, manifest)?;
        let index = oci::index(blob);
        add(&mut self.tar, &self.path, "index.json", index.len() as u64, &index[..])?;
        let wrote = |error| FsError::new("write", &self.path, error);
        let mut buffer = self.tar.into_inner().map_err(wrote)?;
        buffer.flush().and_then(|()| buffer.get_ref().sync_all()).map_err(wrote)?;
        drop(buffer);
        fs::rename(&self.staging.path().join("bundle.tar"), &self.path)?;
        Ok(fs::sync_dir(fs::parent(&self.path))?)
    }
}

struct FolderTarget {
    path: PathBuf,
    staging: tempfile::TempDir,
}

impl FolderTarget {
    fn bundle(&self) -> PathBuf {
        self.staging.path().join("bundle")
    }
}

impl Target for FolderTarget {
    /// A hard link where the file system can. The file was verified by the caller.
    fn put(&mut self, blob: &Blob, file: &Path, progress: &Progress) -> Result<(), SourceError> {
        fs::hard_link_or_copy(&fs::canonical(file)?, &self.bundle().join(blob_name(&blob.digest)))?;
        progress.add(blob.size_bytes);
        Ok(())
    }

    fn finish(self: Box<Self>, manifest: &[u8]) -> Result<(), SourceError> {
        let (bundle, digest) = (self.bundle(), Digest::of(manifest));
        let blob = Blob { digest, size_bytes: manifest.len() as u64 };
        fs::write_atomic(&bundle.join(blob_name(&digest)), manifest)?;
        fs::write_atomic(&bundle.join(LAYOUT_NAME), LAYOUT.as_bytes())?;
        fs::write_atomic(&bundle.join("index.json"), &oci::index(blob))?;
        fs::sync_tree(&bundle)?;
        fs::rename(&bundle, &self.path)?;
        Ok(fs::sync_dir(fs::parent(&self.path))?)
    }
}
