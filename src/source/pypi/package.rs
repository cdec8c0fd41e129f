//! Takes a wheel or sdist apart.

use std::collections::BTreeSet;
use std::io::{Read, Seek as _};
use std::path::Path;

use crate::base::cancel::Cancel;
use crate::base::fs::{self, FsError};
use crate::base::name::RelPath;
use crate::source::SourceError;

/// What of a package is wanted.
pub struct Pick<'a> {
    /// The folder to use, after an sdist's single top folder is dropped.
    pub subdir: Option<&'a RelPath>,
    pub keep: &'a dyn Fn(&RelPath) -> bool,
}

/// Unpacks what is wanted into `dest`; gives the files that may be run.
///
/// # Errors
/// [`SourceError::Hostile`] for a damaged package or a name that leaves it.
pub fn unpack(package: &Path, pick: &Pick<'_>, dest: &Path, cancel: &Cancel) -> Result<BTreeSet<RelPath>, SourceError> {
    let name = package.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let hostile = |why: String| SourceError::Hostile { what: format!("`{name}`"), why };
    let mut file = fs::open(package)?;
    let mut magic = [0; 2];
    let damaged = |error: std::io::Error| hostile(format!("it is damaged: {error}"));
    file.read_exact(&mut magic).and_then(|()| file.rewind()).map_err(damaged)?;
    let mut executables = BTreeSet::new();
    let mut put = |path: &str, mode: u32, from: &mut dyn Read| -> Result<(), SourceError> {
        cancel.check()?;
        let path: RelPath = path.parse().map_err(|error: crate::base::name::RelPathError| hostile(error.to_string()))?;
        let path = if name.ends_with(".whl") { Some(path) } else { below_top(&path) };
        let path = path.and_then(|path| match pick.subdir {
            Some(subdir) => path.strip_prefix(subdir),
            None => Some(path),
        });
        let Some(path) = path.filter(|path| (pick.keep)(path)) else { return Ok(()) };
        let target = path.under(dest);
        fs::create_dir_all(fs::parent(&target))?;
        let mut out = fs::create_new(&target)?;
        std::io::copy(from, &mut out).map_err(|error| FsError::new("unpack", &target, error))?;
        if mode & 0o111 != 0 || path.as_str().contains(".data/scripts/") {
            fs::set_executable(&target)?;
            executables.insert(path);
        }
        Ok(())
    };
    if &magic == b"PK" {
        let mut archive = zip::ZipArchive::new(file).map_err(|error| hostile(error.to_string()))?;
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).map_err(|error| hostile(error.to_string()))?;
            if entry.is_file() {
                let path = entry.name().map_err(|error| hostile(error.to_string()))?.into_owned();
                put(&path, entry.unix_mode().unwrap_or(0), &mut entry)?;
            }
        }
    } else {
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
        for entry in archive.entries().map_err(damaged)? {
            let mut entry = entry.map_err(damaged)?;
            if entry.header().entry_type().is_file() {
                let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                put(&path, entry.header().mode().unwrap_or(0), &mut entry)?;
            }
        }
    }
    Ok(executables)
}

fn below_top(path: &RelPath) -> Option<RelPath> {
    path.as_str().split_once('/')?.1.parse().ok()
}
