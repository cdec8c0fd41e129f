//! File system calls of Linux, macOS and other Unix systems: modes, links without privileges, device and inode, status change time.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink as make_symlink};
use std::path::{Path, PathBuf};

use super::stamp::{Stamp, modified_ns};

/// Opening a named pipe would wait for its writer.
pub fn open_without_waiting(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    fs::OpenOptions::new().read(true).custom_flags(flags.cast_signed()).open(path)
}

/// Opens an existing file for reading and writing; a symbolic link is an error.
pub fn open_no_link(path: &Path) -> io::Result<File> {
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
    fs::OpenOptions::new().read(true).write(true).custom_flags(flags.cast_signed()).open(path)
}

pub fn set_read_only(path: &Path, read_only: bool) -> io::Result<()> {
    let mut permissions = fs::metadata(path)?.permissions();
    let mode = permissions.mode();
    permissions.set_mode(if read_only { mode & !0o222 } else { mode | 0o200 });
    fs::set_permissions(path, permissions)
}

pub fn set_executable(path: &Path) -> io::Result<()> {
    let mut permissions = fs::metadata(path)?.permissions();
    permissions.set_mode(permissions.mode() | 0o111);
    fs::set_permissions(path, permissions)
}

/// Whether somebody may execute the file.
pub fn is_executable(meta: &Metadata) -> bool {
    meta.permissions().mode() & 0o111 != 0
}

/// A new file gets the mode that the user's umask leaves of 0666, as with every other program.
pub fn with_usual_mode(builder: &mut tempfile::Builder<'_, '_>) {
    builder.permissions(fs::Permissions::from_mode(0o666));
}

/// A new file that replaces `old` gets its mode.
pub fn take_mode_of(old: &Path, new: &File) -> io::Result<()> {
    match fs::metadata(old) {
        Ok(meta) => new.set_permissions(fs::Permissions::from_mode(meta.permissions().mode() & 0o7777)),
        Err(_) => Ok(()),
    }
}

/// Bytes that a file has on the disk, and how many names it has.
pub fn held(_: &Path, meta: &Metadata) -> (u64, u64) {
    // In units of 512 bytes on every system, says stat(2).
    (meta.blocks() * 512, meta.nlink())
}

/// When a file's status last changed, in nanoseconds since 1970; links are not followed.
pub fn touched_ns(path: &Path) -> io::Result<u64> {
    fs::symlink_metadata(path).map(|meta| of(&meta).changed_ns)
}

/// The owner's group may write it, as the Hub's own client has it for its lock files.
pub fn share(file: &File) -> io::Result<()> {
    file.set_permissions(fs::Permissions::from_mode(0o664))
}

/// A file's own permissions do not keep its name from being used for another.
#[expect(clippy::unnecessary_wraps, reason = "its twin can fail")]
pub fn make_replaceable(_: &Path) -> io::Result<()> {
    Ok(())
}

pub fn sync_file(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

pub fn stamp(path: &Path) -> io::Result<Stamp> {
    fs::metadata(path).map(|meta| of(&meta))
}

pub fn stamp_of(file: &File) -> io::Result<Stamp> {
    file.metadata().map(|meta| of(&meta))
}

fn of(meta: &Metadata) -> Stamp {
    let changed = i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec());
    Stamp {
        device: meta.dev(),
        inode: meta.ino(),
        size_bytes: meta.len(),
        modified_ns: modified_ns(meta),
        changed_ns: u64::try_from(changed).unwrap_or(0),
    }
}

pub fn names(path: &Path) -> io::Result<u64> {
    fs::symlink_metadata(path).map(|meta| meta.nlink())
}

pub fn volume(path: &Path) -> io::Result<u64> {
    fs::metadata(path).map(|meta| meta.dev())
}

/// Makes a symbolic link; fails when the name is taken.
pub fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    make_symlink(target, link)
}

pub fn write_link(target: &str, link: &Path) -> io::Result<()> {
    make_symlink(target, link)
}

pub fn replace_dir_link(target: &Path, staged: &Path, link: &Path) -> io::Result<()> {
    make_symlink(target, staged)?;
    fs::rename(staged, link)
}

/// The target of a link to a folder; None when it is not one.
pub fn read_dir_link(link: &Path) -> Option<PathBuf> {
    fs::read_link(link).ok()
}

/// Does something while new files of this process and of those that it starts are the owner's alone.
pub fn with_private_umask<T>(act: impl FnOnce() -> T) -> T {
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let done = act();
    rustix::process::umask(before);
    done
}
