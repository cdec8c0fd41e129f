//! What Windows has: a read-only flag instead of modes (which also keeps a file from being removed, replaced or flushed),
//! links only for the privileged, a volume and an index in place of device and inode, and no time of change that safe code
//! can read.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::windows::fs::{symlink_dir, symlink_file};
use std::path::{Path, PathBuf};

use super::stamp::{Stamp, modified_ns};

/// Named pipes live in a name space of their own there.
pub fn open_without_waiting(path: &Path) -> io::Result<File> {
    File::open(path)
}

/// Opens an existing file for reading and writing; a symbolic link is an error.
pub fn open_no_link(path: &Path) -> io::Result<File> {
    if fs::symlink_metadata(path)?.is_symlink() {
        return Err(io::Error::other("it is a symbolic link"));
    }
    fs::OpenOptions::new().read(true).write(true).open(path)
}

pub fn set_read_only(path: &Path, read_only: bool) -> io::Result<()> {
    let mut permissions = fs::metadata(path)?.permissions();
    permissions.set_readonly(read_only);
    fs::set_permissions(path, permissions)
}

pub fn set_executable(path: &Path) -> io::Result<()> {
    fs::metadata(path).map(drop)
}

pub fn is_executable(_: &Metadata) -> bool {
    false
}

/// Access is inherited from the folder.
pub fn with_usual_mode(_: &mut tempfile::Builder<'_, '_>) {}

/// Bytes that a file has on the disk (about), and how many names it has.
pub fn held(path: &Path, meta: &Metadata) -> (u64, u64) {
    (meta.len(), names(path).unwrap_or(1))
}

/// When a file was last written to, in nanoseconds since 1970; links are not followed.
pub fn touched_ns(path: &Path) -> io::Result<u64> {
    fs::symlink_metadata(path).map(|meta| modified_ns(&meta))
}

/// Access is inherited from the folder.
#[expect(clippy::unnecessary_wraps, reason = "its twin can fail")]
pub fn take_mode_of(_: &Path, _: &File) -> io::Result<()> {
    Ok(())
}

/// Access is inherited from the folder.
#[expect(clippy::unnecessary_wraps, reason = "its twin can fail")]
pub fn share(_: &File) -> io::Result<()> {
    Ok(())
}

/// Clears the read-only flag of the file that has this name, if there is one. Its other names lose it, too.
pub fn make_replaceable(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() && meta.permissions().readonly() => set_read_only(path, false),
        _ => Ok(()),
    }
}

/// Flushing needs a handle that may write.
pub fn sync_file(path: &Path) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.sync_all()
}

/// The journal of the file system is all there is.
#[expect(clippy::unnecessary_wraps, reason = "its twin can fail")]
pub fn sync_dir(_: &Path) -> io::Result<()> {
    Ok(())
}

pub fn stamp(path: &Path) -> io::Result<Stamp> {
    stamp_of(&File::open(path)?)
}

pub fn stamp_of(file: &File) -> io::Result<Stamp> {
    let (meta, information) = (file.metadata()?, winapi_util::file::information(file)?);
    Ok(Stamp {
        device: information.volume_serial_number(),
        inode: information.file_index(),
        size_bytes: meta.len(),
        modified_ns: modified_ns(&meta),
        changed_ns: 0,
    })
}

pub fn names(path: &Path) -> io::Result<u64> {
    winapi_util::file::information(File::open(path)?).map(|information| information.number_of_links())
}

pub fn volume(path: &Path) -> io::Result<u64> {
    let folder = winapi_util::Handle::from_path_any(path)?;
    winapi_util::file::information(folder).map(|information| information.volume_serial_number())
}

pub fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    symlink_file(target, link)
}

pub fn write_link(target: &str, link: &Path) -> io::Result<()> {
    fs::write(link, target)
}

pub fn replace_dir_link(target: &Path, staged: &Path, link: &Path) -> io::Result<()> {
    match fs::remove_dir(link).or_else(|_| fs::remove_file(link)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Without the privilege for links, a text file with the path is written instead.
    if symlink_dir(target, link).is_ok() {
        return Ok(());
    }
    fs::write(staged, target.to_string_lossy().as_bytes())?;
    fs::rename(staged, link)
}

pub fn read_dir_link(link: &Path) -> Option<PathBuf> {
    let text = || PathBuf::from(String::from_utf8(super::read_bounded(link, 32 << 10).ok()?).ok()?).into();
    fs::read_link(link).ok().or_else(text)
}

/// Does something. There is no umask here.
pub fn with_private_umask<T>(act: impl FnOnce() -> T) -> T {
    act()
}
