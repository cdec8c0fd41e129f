//! File system calls whose errors name the path, and the ways to put a file in place that survive a kill at any line.
//!
//! Everything else in the crate goes through here (`clippy.toml` bans the raw calls).
#![expect(clippy::disallowed_methods, reason = "this is where the raw calls live")]

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

mod footprint;
#[cfg_attr(unix, path = "fs/unix.rs")]
#[cfg_attr(windows, path = "fs/windows.rs")]
mod platform;
mod stamp;

pub use footprint::{Footprint, footprint};
pub use platform::{is_executable, read_dir_link, symlink, with_private_umask};
pub use stamp::{CLOCK_TICK, Stamp};

/// A failed file system call: the action, the path, and the system's error.
#[derive(Debug, thiserror::Error)]
#[error("could not {verb} `{}`: {source}", path.display())]
pub struct FsError {
    /// The action, as it follows "could not": `read`.
    pub verb: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// The system's error.
    pub source: io::Error,
}

impl FsError {
    /// An error of `verb` at `path`.
    pub fn new(verb: &'static str, path: &Path, source: io::Error) -> Self {
        Self { verb, path: path.to_owned(), source }
    }

    /// Whether there is no such file or folder.
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }

    /// Whether this user has no permission to write there: a read-only file system, or another user's folder.
    pub fn is_read_only(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied)
    }

    /// Whether [`read_bounded`] refused a file that is larger than its limit.
    pub fn is_over_limit(&self) -> bool {
        self.verb == "read" && self.source.kind() == io::ErrorKind::FileTooLarge
    }

    /// Whether the disk, or the user's share of it, is full.
    pub fn is_no_space(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// The prefix of temporary names of files that will be renamed.
const STAGED: &str = ".aitools-";
/// Older temporary files are leftovers of killed runs.
const MAX_STAGED_AGE: Duration = Duration::from_secs(3600);

type Result<T> = std::result::Result<T, FsError>;

fn naming<'a>(verb: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FsError + 'a {
    move |source| FsError::new(verb, path, source)
}

/// Opens a regular file (or a folder, to lock it) for reading. Never waits: a named pipe, a socket or a device is an error, so
/// that a file of a stranger's project cannot hang the program.
pub fn open(path: &Path) -> Result<File> {
    let file = platform::open_without_waiting(path).map_err(naming("open", path))?;
    let kind = file.metadata().map_err(naming("look at", path))?.file_type();
    if kind.is_file() || kind.is_dir() {
        return Ok(file);
    }
    Err(FsError::new("open", path, io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")))
}

/// Creates or truncates.
pub fn create(path: &Path) -> Result<File> {
    File::create(path).map_err(naming("create", path))
}

/// Fails when the file exists.
pub fn create_new(path: &Path) -> Result<File> {
    File::create_new(path).map_err(naming("create", path))
}

/// Opens for reading and writing, made when missing, never truncated.
pub fn open_or_create(path: &Path) -> Result<File> {
    fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(naming("open", path))
}

/// As [`open_or_create`], for a lock file that programs of other users open, too: they may write it where the folder lets
/// them in, and one that only they may write is opened for reading, which is enough to lock it.
pub fn open_or_create_shared(path: &Path) -> Result<File> {
    match create_new(path) {
        Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => {}
        // Only a file that was made here gets other permissions.
        made => return made.inspect(|file| drop(platform::share(file))),
    }
    match platform::open_no_link(path).map_err(naming("open", path)) {
        Err(error) if error.source.kind() == io::ErrorKind::PermissionDenied => open(path),
        result => result,
    }
}

/// Appends one record; made when missing.
pub fn append(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = fs::OpenOptions::new().append(true).create(true).open(path).map_err(naming("open", path))?;
    file.write_all(bytes).map_err(naming("append to", path))
}

/// Replaces bytes of a file from an offset on.
pub fn overwrite(path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    use io::Seek as _;
    let mut file = fs::OpenOptions::new().write(true).open(path).map_err(naming("write", path))?;
    file.seek(io::SeekFrom::Start(offset)).and_then(|_| file.write_all(bytes)).map_err(naming("write", path))
}

/// The whole file, refused when it is larger than `limit_bytes`.
pub fn read_bounded(path: &Path, limit_bytes: u64) -> Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    open(path)?.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(naming("read", path))?;
    if bytes.len() as u64 > limit_bytes {
        let why = io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {limit_bytes} bytes"));
        return Err(FsError::new("read", path, why));
    }
    Ok(bytes)
}

/// The first bytes of a file, `limit_bytes` at most.
pub fn read_head(path: &Path, limit_bytes: u64) -> Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    open(path)?.take(limit_bytes).read_to_end(&mut bytes).map_err(naming("read", path))?;
    Ok(bytes)
}

/// Metadata of a file or folder; follows a symbolic link.
pub fn metadata(path: &Path) -> Result<fs::Metadata> {
    fs::metadata(path).map_err(naming("look at", path))
}

/// Metadata of a file, folder or symbolic link; links are not followed.
pub fn symlink_metadata(path: &Path) -> Result<fs::Metadata> {
    fs::symlink_metadata(path).map_err(naming("look at", path))
}

/// Whether a path leads to something; follows a symbolic link.
pub fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Makes a folder and its parents; an existing one is fine.
pub fn create_dir_all(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(naming("create folder", path))
}

/// Gives a file or folder a new name; a file that has this name is replaced. Where both are hard links to one file, POSIX
/// `rename` does nothing; here the old name goes.
///
/// # Errors
/// When the system refuses; both names are then as they were.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    let moved = platform::make_replaceable(to).and_then(|()| fs::rename(from, to));
    moved.map_err(naming("move a file to", to))?;
    // On every other way `from` is gone now.
    if from != to && exists(from) && is_one_file(from, to) {
        return remove_file(from);
    }
    Ok(())
}

/// Whether two names are hard links to one file; links are not followed.
fn is_one_file(a: &Path, b: &Path) -> bool {
    let plain = |path: &Path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file());
    plain(a) && plain(b) && matches!((stamp(a), stamp(b)), (Ok(a), Ok(b)) if (a.device, a.inode) == (b.device, b.inode))
}

/// Copies a file: by reflink where the file system can. The permission to be run goes along.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = reflink_copy::reflink_or_copy(from, to).map_err(naming("copy a file to", to))?;
    if copied.is_none() && is_executable(&metadata(from)?) {
        set_executable(to)?;
    }
    Ok(())
}

/// A second name of a file, or a second file where the file system has no such thing.
pub fn hard_link_or_copy(from: &Path, to: &Path) -> Result<()> {
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(drop)).map_err(naming("create", to))
}

/// Whether two paths lead to one file.
pub fn is_same(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

/// The path without links, `.` and `..`; the file must exist.
pub fn canonical(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(naming("look at", path))
}

/// The target of a symbolic link.
pub fn read_link(path: &Path) -> Result<PathBuf> {
    fs::read_link(path).map_err(naming("read link", path))
}

/// Copies a folder with everything in it: by reflink where the file system can, permissions and links as they are.
pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    create_dir_all(to)?;
    for path in read_dir(from)? {
        let target = to.join(path.file_name().unwrap_or_default());
        let meta = symlink_metadata(&path)?;
        if meta.is_symlink() {
            symlink(&read_link(&path)?, &target).map_err(naming("create link", &target))?;
        } else if meta.is_dir() {
            copy_tree(&path, &target)?;
        } else {
            copy(&path, &target)?;
        }
    }
    Ok(())
}

/// Removes a file or link, also a read-only one. A missing one is fine.
pub fn remove_file(path: &Path) -> Result<()> {
    match platform::make_replaceable(path).and_then(|()| fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FsError::new("remove", path, error)),
        _ => Ok(()),
    }
}

/// Removes a folder and what is in it, following no links, also where files are read-only. A missing one is fine.
pub fn remove_dir_all(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            make_writable(path)?;
            fs::remove_dir_all(path).map_err(naming("remove folder", path))
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FsError::new("remove folder", path, error)),
        _ => Ok(()),
    }
}

fn make_writable(root: &Path) -> Result<()> {
    let meta = symlink_metadata(root)?;
    if meta.is_symlink() {
        return Ok(());
    }
    set_read_only(root, false)?;
    if meta.is_dir() {
        for entry in read_dir(root)? {
            make_writable(&entry)?;
        }
    }
    Ok(())
}

/// The entries of a folder, as full paths, sorted by name.
pub fn read_dir(path: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> io::Result<Vec<PathBuf>> { fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect() };
    let mut entries = read().map_err(naming("list folder", path))?;
    entries.sort();
    Ok(entries)
}

/// The entries of a folder, sorted, with what each is (links are not followed). One call to the system for many entries.
pub fn read_dir_kinds(path: &Path) -> Result<Vec<(PathBuf, fs::FileType)>> {
    let read = || -> io::Result<Vec<_>> {
        let kind = |entry: fs::DirEntry| Ok((entry.path(), entry.file_type()?));
        fs::read_dir(path)?.map(|entry| kind(entry?)).collect()
    };
    let mut entries = read().map_err(naming("list folder", path))?;
    entries.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(entries)
}

/// Clears or sets the permission to write (on unix: for everybody / for the owner).
pub fn set_read_only(path: &Path, read_only: bool) -> Result<()> {
    platform::set_read_only(path, read_only).map_err(naming("change permissions of", path))
}

/// Gives a file the permission to be run, where the platform has one.
pub fn set_executable(path: &Path) -> Result<()> {
    platform::set_executable(path).map_err(naming("change permissions of", path))
}

/// Makes the names in a folder durable, where the platform has a way.
pub fn sync_dir(path: &Path) -> Result<()> {
    platform::sync_dir(path).map_err(naming("sync folder", path))
}

/// Makes a file's content durable.
pub fn sync_file(path: &Path) -> Result<()> {
    platform::sync_file(path).map_err(naming("sync", path))
}

/// Makes everything below a folder durable. Where the platform can flush a whole file system, that is one call.
pub fn sync_tree(root: &Path) -> Result<()> {
    #[cfg(target_os = "linux")]
    {
        rustix::fs::syncfs(open(root)?).map_err(|error| FsError::new("sync folder", root, error.into()))
    }
    #[cfg(not(target_os = "linux"))]
    {
        for path in read_dir(root)? {
            let meta = symlink_metadata(&path)?;
            if meta.is_dir() {
                sync_tree(&path)?;
            } else if meta.is_file() {
                sync_file(&path)?;
            }
        }
        sync_dir(root)
    }
}

/// The folder a path is in (`.` for a bare name).
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A new folder in `parent` (which is made when missing), removed when dropped.
pub fn temporary_dir(parent: &Path) -> Result<tempfile::TempDir> {
    create_dir_all(parent)?;
    tempfile::Builder::new().prefix(STAGED).tempdir_in(parent).map_err(naming("create a folder in", parent))
}

/// Replaces a file as a whole: readers see the old bytes or the new ones, also after a power cut.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = parent(path);
    create_dir_all(folder)?;
    let mut builder = tempfile::Builder::new();
    platform::with_usual_mode(builder.prefix(STAGED));
    let mut staged = builder.tempfile_in(folder).map_err(naming("create a file in", folder))?;
    staged.write_all(bytes).map_err(naming("write", path))?;
    platform::take_mode_of(path, staged.as_file()).map_err(naming("write", path))?;
    staged.as_file().sync_all().map_err(naming("write", path))?;
    persist(staged, path)?;
    sync_dir(folder)
}

/// Makes a file that only its owner can read. When another process made it first, that one stays.
pub fn create_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = parent(path);
    create_dir_all(folder)?;
    let mut staged =
        tempfile::Builder::new().prefix(STAGED).tempfile_in(folder).map_err(naming("create a file in", folder))?;
    staged.write_all(bytes).map_err(naming("write", path))?;
    staged.as_file().sync_all().map_err(naming("write", path))?;
    match staged.persist_noclobber(path) {
        Err(error) if error.error.kind() != io::ErrorKind::AlreadyExists => {
            Err(FsError::new("create", path, error.error))
        }
        _ => Ok(()),
    }
}

/// [`write_atomic`], unless the file has these bytes already. Says whether it wrote.
pub fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<bool> {
    match fs::read(path) {
        Ok(old) if old == bytes => Ok(false),
        _ => write_atomic(path, bytes).map(|()| true),
    }
}

/// The stamp of a file; follows a symbolic link.
pub fn stamp(path: &Path) -> Result<Stamp> {
    platform::stamp(path).map_err(naming("look at", path))
}

/// The stamp of an open file.
pub fn stamp_of(file: &File, path: &Path) -> Result<Stamp> {
    platform::stamp_of(file).map_err(naming("look at", path))
}

/// Gives a staged file (or link) its name, in place of what has it.
fn persist<T>(staged: tempfile::NamedTempFile<T>, to: &Path) -> Result<T> {
    platform::make_replaceable(to).map_err(naming("replace", to))?;
    staged.persist(to).map_err(|error| FsError::new("replace", to, error.error))
}

/// How many names a file has, links not followed.
pub fn names(path: &Path) -> Result<u64> {
    platform::names(path).map_err(naming("look at", path))
}

/// What tells the file system apart that holds `path` (or its nearest existing parent).
pub fn volume(path: &Path) -> Result<u64> {
    let existing = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("."));
    platform::volume(existing).map_err(naming("look at", existing))
}

/// Space on the disk that a file has; nothing when there is none.
pub fn allocated_bytes(path: &Path) -> Result<u64> {
    match open(path) {
        Ok(file) => fs4::FileExt::allocated_size(&file).map_err(naming("look at", path)),
        Err(error) if error.is_not_found() => Ok(0),
        Err(error) => Err(error),
    }
}

/// Bytes free for this user on the file system that holds `path` (or its nearest existing parent).
pub fn available_bytes(path: &Path) -> Result<u64> {
    let existing = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("."));
    fs4::available_space(existing).map_err(naming("ask for free space at", existing))
}

/// Makes a file `size_bytes` long and, where the file system can, takes the space for it now rather than while writing.
pub fn allocate(file: &File, path: &Path, size_bytes: u64) -> Result<()> {
    match fs4::FileExt::allocate(file, size_bytes) {
        Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            Err(FsError::new("take space for", path, error))
        }
        _ => file.set_len(size_bytes).map_err(naming("take space for", path)),
    }
}

/// Moves a file, also to another file system: it appears under the new name as a whole.
pub fn move_file(from: &Path, to: &Path) -> Result<()> {
    match rename(from, to) {
        Err(error) if error.source.kind() == io::ErrorKind::CrossesDevices => {
            let folder = parent(to);
            let staged = tempfile::NamedTempFile::with_prefix_in(STAGED, folder);
            let staged = staged.map_err(naming("create a file in", folder))?;
            fs::copy(from, staged.path()).map_err(naming("copy a file to", to))?;
            persist(staged, to)?;
            remove_file(from)
        }
        result => result,
    }
}

/// Removes what killed runs left in a folder while they put files there. What is younger than an hour may be in use.
pub fn remove_leftovers(folder: &Path) {
    let now_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    remove_older_leftovers(folder, now_ns.saturating_sub(MAX_STAGED_AGE.as_nanos()));
}

/// Whether a file was last touched longer ago than `age`; not for one that is not there.
pub fn is_older_than(path: &Path, age: Duration) -> bool {
    let now_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    platform::touched_ns(path).is_ok_and(|ns| u128::from(ns) < now_ns.saturating_sub(age.as_nanos()))
}

/// When anything about a file last changed, in nanoseconds since 1970; links are not followed.
pub fn touched_ns(path: &Path) -> Result<u64> {
    platform::touched_ns(path).map_err(naming("look at", path))
}

/// Bytes of all files below a folder, links not followed; nothing when there is none.
pub fn size_below(folder: &Path) -> u64 {
    let size = |path: &PathBuf| match symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => size_below(path),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    read_dir(folder).unwrap_or_default().iter().map(size).sum()
}

fn remove_older_leftovers(folder: &Path, than_ns: u128) {
    for path in read_dir(folder).unwrap_or_default() {
        let is_staged = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(STAGED));
        if is_staged && platform::touched_ns(&path).is_ok_and(|ns| u128::from(ns) < than_ns) {
            let _ = remove_file(&path);
        }
    }
}

/// A free name for a file that has to make way: `<name>.bak`, else `<name>.bak2` and so on.
///
/// # Errors
/// When all of them are taken.
pub fn backup_name(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let ending = |number: u32| if number == 1 { String::new() } else { number.to_string() };
    let mut names = (1..100).map(|number| path.with_file_name(format!("{name}.bak{}", ending(number))));
    let taken = || FsError::new("find a name for a backup of", path, io::ErrorKind::AlreadyExists.into());
    names.find(|path| !exists(path)).ok_or_else(taken)
}

/// How a file was put in a second place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placed {
    /// The files share their blocks until one is written.
    Reflink,
    /// Two names of one file.
    HardLink,
    /// A link to the first place.
    Symlink,
    /// A second file with the same bytes.
    Copy,
}

/// Puts a file in a second place without a second copy where the file system can: reflink, else hard link, else symbolic
/// link, else a copy. Replaces what is there in one step.
pub fn place(from: &Path, to: &Path) -> Result<Placed> {
    let folder = parent(to);
    create_dir_all(folder)?;
    // POSIX leaves both names when one hard link is renamed over another to the same file, so that case ends here.
    if is_one_file(from, to) {
        return Ok(Placed::HardLink);
    }
    let staged = tempfile::Builder::new()
        .prefix(STAGED)
        .make_in(folder, |path| place_at(from, path))
        .map_err(naming("link into", folder))?;
    persist(staged, to)
}

fn place_at(from: &Path, to: &Path) -> io::Result<Placed> {
    if reflink_copy::reflink(from, to).is_ok() {
        // With the time of its twin, the file's time tells a later write apart (see `base::hashed`).
        let modified = fs::metadata(from).and_then(|meta| meta.modified());
        let _ = modified.and_then(|modified| File::open(to)?.set_modified(modified));
        return Ok(Placed::Reflink);
    }
    if fs::hard_link(from, to).is_ok() {
        return Ok(Placed::HardLink);
    }
    if symlink(from, to).is_ok() {
        return Ok(Placed::Symlink);
    }
    fs::copy(from, to).map(|_| Placed::Copy)
}

/// Writes a symbolic link of a source tree. Where links need a privilege it becomes a file that holds the target, as git
/// does there; a tree's modes say which files those are.
pub fn write_link(target: &str, link: &Path) -> Result<()> {
    platform::write_link(target, link).map_err(naming("create link", link))
}

/// Makes a symbolic link to a file, replacing what has its name in one step.
pub fn replace_by_symlink(target: &Path, link: &Path) -> Result<()> {
    let folder = parent(link);
    create_dir_all(folder)?;
    let staged = tempfile::Builder::new().prefix(STAGED).make_in(folder, |path| symlink(target, path));
    let staged = staged.map_err(naming("create a link in", folder))?;
    persist(staged, link).map(drop)
}

/// Points `link` at the folder `target`, replacing a former link in one step where the platform can.
/// On Windows, where links to folders may need a privilege, a text file with the path is the fall-back.
pub fn link_dir(target: &Path, link: &Path) -> Result<()> {
    let folder = parent(link);
    create_dir_all(folder)?;
    if read_dir_link(link).is_some_and(|old| old == target) {
        return Ok(());
    }
    if let Ok(meta) = fs::symlink_metadata(link)
        && (meta.is_dir() || (cfg!(unix) && meta.is_file()))
    {
        let what = if meta.is_dir() { "a folder" } else { "a file" };
        let why = format!("{what} with this name is in the way: move it elsewhere");
        return Err(FsError::new("create link", link, io::Error::new(io::ErrorKind::AlreadyExists, why)));
    }
    let staged = folder.join(format!("{STAGED}link-{}", std::process::id()));
    remove_file(&staged)?;
    platform::replace_dir_link(target, &staged, link).map_err(naming("create link", link))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placing_replaces_in_one_step() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let root = tempfile::tempdir()?;
        let (from, to) = (root.path().join("a b"), root.path().join("d/é"));
        write_atomic(&from, b"new")?;
        write_atomic(&to, b"old")?;
        assert!(matches!(place(&from, &to)?, Placed::Reflink | Placed::HardLink));
        place(&from, &to)?;
        assert_eq!(fs::read(&to)?, b"new");
        assert_eq!(read_dir(&root.path().join("d"))?.len(), 1);
        Ok(())
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_place_on_another_file_system_gets_a_link() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let (root, memory) = (tempfile::tempdir()?, tempfile::tempdir_in("/dev/shm")?);
        let (from, to) = (root.path().join("a b"), memory.path().join("d/é"));
        write_atomic(&from, b"new")?;
        if stamp(root.path())?.device != stamp(memory.path())?.device {
            assert_eq!(place(&from, &to)?, Placed::Symlink);
            assert_eq!(fs::read(&to)?, b"new");
        }
        Ok(())
    }

    #[test]
    fn m5_a_folder_or_file_where_a_link_belongs_is_left_alone() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let root = tempfile::tempdir()?;
        let (target, link) = (root.path().join("artifact"), root.path().join("build/e"));
        create_dir_all(&target)?;
        write_atomic(&link.join("mine"), b"1")?;
        let refused = link_dir(&target, &link).unwrap_err().to_string();
        assert!(refused.contains("a folder with this name is in the way"), "{refused}");
        assert!(link.join("mine").exists());
        remove_dir_all(&link)?;
        link_dir(&target, &link)?;
        link_dir(root.path(), &link)?;
        assert_eq!(read_dir_link(&link).as_deref(), Some(root.path()));
        Ok(())
    }

    #[test]
    fn backups_never_replace_backups() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let root = tempfile::tempdir()?;
        let path = root.path().join("é w.gguf");
        for name in ["é w.gguf.bak", "é w.gguf.bak2", "é w.gguf.bak3"] {
            assert_eq!(backup_name(&path)?, root.path().join(name));
            write_atomic(&root.path().join(name), b"1")?;
        }
        Ok(())
    }

    #[test]
    fn leftovers_of_killed_runs_go_after_an_hour() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let root = tempfile::tempdir()?;
        let (left, mine) = (root.path().join(".aitools-x"), root.path().join("old"));
        for path in [&left, &mine] {
            write_atomic(path, b"1")?;
            let past = SystemTime::now() - 2 * MAX_STAGED_AGE;
            open(path)?.set_modified(past)?;
        }
        remove_leftovers(root.path());
        // Its status changed just now: a link to an old file may be in use.
        assert_eq!(left.exists(), cfg!(unix));
        assert!(mine.exists());
        // An hour and more later.
        remove_older_leftovers(root.path(), u128::MAX);
        assert!(!left.exists() && mine.exists());
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn new_files_honour_the_umask_and_old_ones_keep_their_mode() -> std::result::Result<(), Box<dyn std::error::Error>>
    {
        use std::os::unix::fs::PermissionsExt as _;
        let root = tempfile::tempdir()?;
        let (plain, ours) = (root.path().join("plain"), root.path().join("ours"));
        fs::write(&plain, b"1")?;
        write_atomic(&ours, b"1")?;
        let mode = |path: &Path| fs::metadata(path).map(|meta| meta.permissions().mode() & 0o7777);
        assert_eq!(mode(&ours)?, mode(&plain)?, "what the umask makes of a new file");
        fs::set_permissions(&ours, fs::Permissions::from_mode(0o600))?;
        write_atomic(&ours, b"2")?;
        assert_eq!(mode(&ours)?, 0o600);
        Ok(())
    }

    #[test]
    fn unchanged_bytes_are_not_written() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let root = tempfile::tempdir()?;
        let path = root.path().join("x/y");
        assert!(write_if_changed(&path, b"1")?);
        assert!(!write_if_changed(&path, b"1")?);
        assert!(write_if_changed(&path, b"2")?);
        Ok(())
    }
}
