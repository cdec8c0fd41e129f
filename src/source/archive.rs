//! Archives from outside: tar, tar.gz and zip (wheels and sdists are such), told apart by their first bytes.
//!
//! An archive is read twice: once to check every name, type and size without writing anything, and once to take from it
//! what was asked for; sizes and checksums are compared then. Refused are: names that leave the folder or that some
//! platform cannot hold, duplicates, files below files or links, links that lead out, devices, encryption, sparse files,
//! overlapping zip entries, sizes that are not the declared ones, and more bytes or files than the limits allow.
//!
//! Absent: owners, times, permissions but "may be run" (set-uid bits go), empty folders (a tree's digest has none).
//! Formats: POSIX.1-2017 `pax` (ustar interchange format), the GNU tar manual ("Basic Tar Format"), RFC 1952 (gzip),
//! PKWARE's APPNOTE.TXT 6.3.10 (zip).

mod pack;
mod tape;
mod zipped;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader, Read, Write as _};
use std::path::Path;

use flate2::read::MultiGzDecoder;

use crate::base::diagnostic::nearest;
use crate::base::digest::{CHUNK_BYTES, Digest, Hasher};
use crate::base::fs::{self, FsError};
use crate::base::name::RelPath;
use crate::base::tree::{Entry, Listing, MAX_FILES, Mode, Modes};
use crate::format::lockfile::FilePin;
use crate::report::{Task, Unit, Verb};

use super::SourceError;

pub use pack::pack;

/// How much an archive may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of all files together, unpacked.
    pub total_bytes: u64,
    /// Of files.
    pub files: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { total_bytes: 16 << 30, files: MAX_FILES }
    }
}

/// Unpacked to packed size beyond which an archive counts as a bomb, once it is past [`RATIO_FROM`].
const MAX_RATIO: u64 = 1000;
const RATIO_FROM: u64 = 100 << 20;
/// Longest name in a tar extension header, and longest link target.
const MAX_NAME: u64 = 64 << 10;

/// Which part of an archive is meant.
#[derive(Debug, Clone, Default)]
pub struct Select {
    /// When everything lies in one top folder, that folder is taken off the names.
    pub drop_top: bool,
    /// Only what is below this folder (after the top folder was dropped), which is taken off the names.
    pub subdir: Option<RelPath>,
}

/// What a member of an archive is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A plain file.
    File {
        /// Whether it may be executed.
        executable: bool,
    },
    /// The target, relative to the link's folder; it stays inside.
    Symlink(String),
    /// The same bytes as another member.
    HardLink(RelPath),
}

/// A file or link of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Unpacked, in bytes; of a link, of its target's text.
    pub size_bytes: u64,
    /// What it is.
    pub content: Content,
}

/// An archive that was read once and found harmless.
#[derive(Debug)]
pub struct Archive<'a> {
    file: &'a Path,
    what: &'a str,
    task: &'a Task,
    limits: Limits,
    format: Format,
    /// By selected path.
    members: BTreeMap<RelPath, Member>,
    /// Name in the archive to selected path.
    names: BTreeMap<RelPath, RelPath>,
}

/// What unpacking wrote.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Of all files, in bytes.
    pub size_bytes: u64,
    /// Files written.
    pub files: usize,
    /// What is not a plain file, for file systems that cannot tell.
    pub modes: Modes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Tar,
    TarGz,
    Zip,
}

/// One entry as it is met while reading.
struct Met {
    name: RelPath,
    size_bytes: u64,
    content: Content,
}

/// Why reading stopped, before the archive's name is put to it.
enum Stop {
    Refused(String),
    Io(io::Error),
    Error(SourceError),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl<E: Into<SourceError>> From<E> for Stop
where
    SourceError: From<E>,
{
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

type Take<'t> = &'t mut dyn FnMut(&RelPath, &Member, &mut dyn Read) -> Result<(), Stop>;
type Visit<'v> = &'v mut dyn FnMut(Met, &mut dyn Read) -> Result<(), Stop>;

impl<'a> Archive<'a> {
    /// Reads the whole archive and checks it. `what` names it in messages.
    ///
    /// # Errors
    /// [`SourceError::Hostile`] when it is refused or damaged, [`SourceError::Missing`] when `select.subdir` is not in it.
    pub fn open(
        file: &'a Path,
        what: &'a str,
        select: &Select,
        limits: Limits,
        task: &'a Task,
    ) -> Result<Self, SourceError> {
        let hostile = |why: String| SourceError::Hostile { what: what.to_owned(), why };
        let format = sniff(file)?.map_err(hostile)?;
        let (members, names) = (BTreeMap::new(), BTreeMap::new());
        let mut archive = Self { file, what, task, limits, format, members, names };
        let mut all = BTreeMap::new();
        let mut total = 0_u64;
        archive.visit(&mut |met, _| {
            total = total.saturating_add(met.size_bytes);
            if total > limits.total_bytes {
                return Err(Stop::Refused(too_large(limits)));
            }
            let member = Member { size_bytes: met.size_bytes, content: met.content };
            if all.insert(met.name.clone(), member).is_some() {
                return Err(Stop::Refused(format!("it has `{}` twice", met.name)));
            }
            if all.len() > limits.files {
                return Err(Stop::Refused(format!("it has more than {} files", limits.files)));
            }
            Ok(())
        })?;
        archive.names = selected(&all, select, what)?;
        archive.members = chosen(all, &archive.names).map_err(hostile)?;
        // Once more, with the copies that hard links become.
        let total = archive.members.values().fold(0_u64, |sum, member| sum.saturating_add(member.size_bytes));
        if total > limits.total_bytes {
            return Err(hostile(too_large(limits)));
        }
        check_shape(&archive.members, cfg!(any(windows, target_os = "macos"))).map_err(hostile)?;
        Ok(archive)
    }

    /// Everything selected, by path.
    pub fn members(&self) -> &BTreeMap<RelPath, Member> {
        &self.members
    }

    /// Writes the selected members that `keep` wants into the empty folder `into`.
    ///
    /// # Errors
    /// When the archive has changed since it was opened, or cannot be written.
    pub fn unpack(&self, into: &Path, keep: &dyn Fn(&RelPath) -> bool) -> Result<Unpacked, SourceError> {
        fs::create_dir_all(into)?;
        let kept = |path: &RelPath| keep(path).then(|| self.members.get(path)).flatten();
        let total = self.members.iter().filter(|(path, _)| keep(path)).map(|(_, member)| member.size_bytes).sum();
        let progress = self.task.start(Verb::Unpack, self.what, Some(total), Unit::Bytes);
        let mut done = Unpacked::default();
        self.read(&mut |path, member, bytes| {
            if kept(path).is_none() {
                return Ok(());
            }
            let to = path.under(into);
            fs::create_dir_all(fs::parent(&to))?;
            let mut file = fs::create_new(&to)?;
            copy(bytes, member.size_bytes, self.task, &mut |chunk| {
                file.write_all(chunk).map_err(|error| FsError::new("write", &to, error))?;
                progress.add(chunk.len() as u64);
                Ok(())
            })?;
            if member.content == (Content::File { executable: true }) {
                fs::set_executable(&to)?;
                done.modes.insert(path.clone(), Mode::Executable);
            }
            Ok(())
        })?;
        // Links come last: nothing is ever written through one.
        for (path, member) in self.members.iter().filter(|(path, _)| keep(path)) {
            done.files += 1;
            done.size_bytes += member.size_bytes;
            self.link(path, member, into, &mut done.modes)?;
        }
        progress.finish(format!("{} files", done.files));
        Ok(done)
    }

    fn link(&self, path: &RelPath, member: &Member, into: &Path, modes: &mut Modes) -> Result<(), SourceError> {
        let to = path.under(into);
        fs::create_dir_all(fs::parent(&to))?;
        match &member.content {
            Content::File { .. } => Ok(()),
            Content::Symlink(target) => {
                modes.insert(path.clone(), Mode::Symlink);
                Ok(fs::write_link(target, &to)?)
            }
            Content::HardLink(other) => {
                let from = other.under(into);
                if !fs::exists(&from) {
                    let why = format!("`{path}` is a link to `{other}`, which is left out");
                    return Err(SourceError::Hostile { what: self.what.to_owned(), why });
                }
                if modes.get(other) == Some(&Mode::Executable) {
                    modes.insert(path.clone(), Mode::Executable);
                }
                Ok(fs::copy(&from, &to)?)
            }
        }
    }

    /// Size and digest of the files that `keep` wants, without writing anything. Symbolic links do not count.
    ///
    /// # Errors
    /// When the archive has changed since it was opened.
    pub fn hash(&self, keep: &dyn Fn(&RelPath) -> bool) -> Result<BTreeMap<RelPath, (Digest, u64)>, SourceError> {
        let source = |path: &RelPath| match &self.members.get(path)?.content {
            Content::File { .. } => Some(path.clone()),
            Content::HardLink(other) => Some(other.clone()),
            Content::Symlink(_) => None,
        };
        let wanted: BTreeMap<RelPath, RelPath> = self
            .members
            .keys()
            .filter(|path| keep(path))
            .filter_map(|path| Some((path.clone(), source(path)?)))
            .collect();
        let sources: BTreeSet<&RelPath> = wanted.values().collect();
        let mut found = BTreeMap::new();
        self.read(&mut |path, member, bytes| {
            if sources.contains(path) {
                let mut hasher = Hasher::default();
                copy(bytes, member.size_bytes, self.task, &mut |chunk| {
                    hasher.update(chunk);
                    Ok(())
                })?;
                found.insert(path.clone(), hasher.finish());
            }
            Ok(())
        })?;
        Ok(wanted.into_iter().filter_map(|(path, source)| Some((path, *found.get(&source)?))).collect())
    }

    /// What unpacking would give, as the listing whose digest pins a tree, without writing anything.
    ///
    /// # Errors
    /// When the archive has changed since it was opened.
    pub fn listing(&self) -> Result<Listing, SourceError> {
        let hashed = self.hash(&|_| true)?;
        let entry = |path: &RelPath, content: &Content| {
            let executable = match content {
                Content::Symlink(target) => {
                    let (digest, size_bytes) = (Digest::of(target.as_bytes()), target.len() as u64);
                    return Some(Entry { mode: Mode::Symlink, size_bytes, digest });
                }
                Content::File { executable } => *executable,
                Content::HardLink(other) => {
                    self.members.get(other).is_some_and(|file| file.content == Content::File { executable: true })
                }
            };
            let (digest, size_bytes) = *hashed.get(path)?;
            Some(Entry { mode: if executable { Mode::Executable } else { Mode::File }, size_bytes, digest })
        };
        let entries =
            self.members.iter().filter_map(|(path, member)| Some((path.clone(), entry(path, &member.content)?)));
        Ok(Listing(entries.collect()))
    }

    /// Gives each selected plain file and its bytes, in the archive's order.
    fn read(&self, each: Take<'_>) -> Result<(), SourceError> {
        let mut left: BTreeSet<&RelPath> = self
            .members
            .iter()
            .filter(|(_, m)| matches!(m.content, Content::File { .. }))
            .map(|(path, _)| path)
            .collect();
        self.visit(&mut |met, bytes| {
            let known = self.names.get(&met.name).and_then(|path| self.members.get_key_value(path));
            match known {
                Some((path, member)) if matches!(met.content, Content::File { .. }) => {
                    let same = left.remove(path) && met.size_bytes == member.size_bytes;
                    if same { each(path, member, bytes) } else { Err(Stop::Refused("it changed meanwhile".to_owned())) }
                }
                _ => Ok(()),
            }
        })?;
        if left.is_empty() { Ok(()) } else { Err(self.stopped(Stop::Refused("it changed meanwhile".to_owned()))) }
    }

    fn visit(&self, each: Visit<'_>) -> Result<(), SourceError> {
        let file = fs::open(self.file)?;
        let packed = file.metadata().map_err(|error| FsError::new("look at", self.file, error))?.len();
        // Headers and padding: at most two blocks and a name for each file.
        let most = self.limits.total_bytes.saturating_add(self.limits.files as u64 * 4096);
        let result = match self.format {
            Format::Tar => tape::visit(BufReader::new(file), self.task, self.limits.files, each),
            Format::TarGz => {
                let unpacked = MultiGzDecoder::new(BufReader::with_capacity(1 << 16, file));
                let bounded = Bounded { inner: unpacked, seen: 0, packed, most };
                tape::visit(bounded, self.task, self.limits.files, each)
            }
            Format::Zip => zipped::visit(file, packed, self.task, self.limits, each),
        };
        result.map_err(|stop| self.stopped(stop))
    }

    fn stopped(&self, stop: Stop) -> SourceError {
        let why = match stop {
            Stop::Error(error) => return error,
            Stop::Refused(why) => why,
            Stop::Io(error) => format!("it is damaged: {error}"),
        };
        SourceError::Hostile { what: self.what.to_owned(), why }
    }
}

/// "It is not there; there is this, did you mean that?"
pub fn missing<'p>(what: &str, wanted: &str, there: impl Iterator<Item = &'p RelPath> + Clone) -> SourceError {
    const SHOWN: usize = 8;
    let count = there.clone().count();
    let shown: Vec<&str> = there.clone().take(SHOWN).map(RelPath::as_str).collect();
    let more = if count > SHOWN { format!(" and {} more", count - SHOWN) } else { String::new() };
    let why = format!("`{wanted}` matches nothing in it; it has: {}{more}", shown.join(", "));
    let hint = nearest(wanted, there.map(RelPath::as_str)).map(|near| format!("did you mean `{near}`?"));
    SourceError::Missing { what: what.to_owned(), why, hint }
}

fn too_large(limits: Limits) -> String {
    format!("it unpacks to more than {} bytes", limits.total_bytes)
}

/// Whether a file is an archive of a known format.
///
/// # Errors
/// When it cannot be read.
pub fn is_archive(file: &Path) -> Result<bool, FsError> {
    Ok(sniff(file)?.is_ok())
}

/// The format by its first bytes, or what it is instead.
fn sniff(path: &Path) -> Result<Result<Format, String>, FsError> {
    let mut head = Vec::new();
    let read = fs::open(path)?.take(512).read_to_end(&mut head);
    read.map_err(|error| FsError::new("read", path, error))?;
    let starts = |magic: &[u8]| head.starts_with(magic);
    if starts(b"\x1f\x8b") {
        return Ok(Ok(Format::TarGz));
    }
    if starts(b"PK\x03\x04") || starts(b"PK\x05\x06") {
        return Ok(Ok(Format::Zip));
    }
    if head.get(257..262) == Some(b"ustar") || is_old_tar(&head) {
        return Ok(Ok(Format::Tar));
    }
    let named = match &head[..] {
        _ if starts(b"\xfd7zXZ\0") => "it is an xz archive",
        _ if starts(b"BZh") => "it is a bzip2 archive",
        _ if starts(b"\x28\xb5\x2f\xfd") => "it is a zstd archive",
        _ if starts(b"7z\xbc\xaf\x27\x1c") => "it is a 7z archive",
        head => super::download::likely_content(head).unwrap_or("not an archive"),
    };
    Ok(Err(format!("{named}; supported formats are tar, tar.gz and zip")))
}

/// A header from before ustar has no magic, but a valid checksum.
fn is_old_tar(head: &[u8]) -> bool {
    let Ok(bytes) = <[u8; 512]>::try_from(head) else { return false };
    let sum: u32 =
        bytes.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) }).sum();
    let mut header = tar::Header::new_old();
    header.as_mut_bytes().copy_from_slice(&bytes);
    bytes[0] != 0 && header.cksum().is_ok_and(|declared| declared == sum)
}

/// A name as an archive has it: `./` in front and `/` at the end are no matter.
fn checked_name(bytes: &[u8]) -> Result<Option<RelPath>, Stop> {
    let text = std::str::from_utf8(bytes)
        .map_err(|_| Stop::Refused(format!("the name `{}` is not UTF-8", String::from_utf8_lossy(bytes))))?;
    let bare = text.strip_suffix('/').unwrap_or(text);
    let bare = bare.strip_prefix("./").unwrap_or(bare);
    if bare.is_empty() || bare == "." {
        return if text.starts_with('/') { Err(Stop::Refused("it has the name `/`".to_owned())) } else { Ok(None) };
    }
    bare.parse().map(Some).map_err(|error: crate::base::name::RelPathError| Stop::Refused(error.to_string()))
}

/// Counts what comes out of a decompressor, and stops when that is too much.
struct Bounded<R> {
    inner: R,
    seen: u64,
    packed: u64,
    most: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.seen += count as u64;
        if self.seen > self.most {
            return Err(io::Error::other(format!("it unpacks to more than {} bytes", self.most)));
        }
        if is_bomb(self.seen, self.packed) {
            return Err(io::Error::other(format!("it unpacks to more than {MAX_RATIO} times its size: a bomb")));
        }
        Ok(count)
    }
}

fn is_bomb(unpacked: u64, packed: u64) -> bool {
    unpacked > RATIO_FROM && unpacked / MAX_RATIO > packed
}

/// Hands over exactly `size_bytes` bytes in chunks.
fn copy(
    bytes: &mut dyn Read,
    size_bytes: u64,
    task: &Task,
    each: &mut dyn FnMut(&[u8]) -> Result<(), Stop>,
) -> Result<(), Stop> {
    let mut chunk = vec![0; CHUNK_BYTES.min(usize::try_from(size_bytes.max(1)).unwrap_or(CHUNK_BYTES))];
    let mut left = size_bytes;
    loop {
        task.check()?;
        match bytes.read(&mut chunk) {
            Ok(0) if left == 0 => return Ok(()),
            Ok(0) => return Err(Stop::Refused(format!("a file ends {left} bytes before its declared size"))),
            Ok(count) => {
                left = left
                    .checked_sub(count as u64)
                    .ok_or_else(|| Stop::Refused(format!("a file is larger than its declared {size_bytes} bytes")))?;
                each(&chunk[..count])?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A link's target, when it stays inside.
fn checked_target(link: &RelPath, bytes: &[u8]) -> Result<String, Stop> {
    let text = String::from_utf8_lossy(bytes);
    match leads_out(link, bytes) {
        None => Ok(text.into_owned()),
        Some(why) => Err(Stop::Refused(format!("the link `{link}` leads to `{text}`: {why}"))),
    }
}

/// Why a link's target is not one inside the root. Parent steps may stand in front only, so that no link on the way can
/// turn them into a way out.
pub fn leads_out(link: &RelPath, target: &[u8]) -> Option<&'static str> {
    let Ok(text) = std::str::from_utf8(target) else { return Some("its target is not UTF-8") };
    if text.is_empty() || target.len() as u64 > MAX_NAME {
        return Some("its target is empty or too long");
    }
    let mut rest = text.strip_suffix('/').unwrap_or(text);
    let mut steps = 0;
    while let Some(tail) = rest.strip_prefix("..").filter(|tail| tail.is_empty() || tail.starts_with('/')) {
        steps += 1;
        rest = tail.trim_start_matches('/');
    }
    let rest = rest.strip_prefix("./").unwrap_or(rest);
    if steps > link.as_str().matches('/').count() {
        return Some("that is outside");
    }
    let inside = rest.is_empty() || rest == "." || rest.parse::<RelPath>().is_ok();
    (!inside).then_some("that is not a path inside")
}

/// Which entries are meant, and under which path.
fn selected(
    all: &BTreeMap<RelPath, Member>,
    select: &Select,
    what: &str,
) -> Result<BTreeMap<RelPath, RelPath>, SourceError> {
    let top = |path: &RelPath| path.as_str().split_once('/').map(|(top, _)| top.to_owned());
    let first = all.keys().next().and_then(top);
    let common = first.filter(|first| select.drop_top && all.keys().all(|path| top(path).as_ref() == Some(first)));
    let top: Option<RelPath> = common.and_then(|top| top.parse().ok());
    let below = |path: &RelPath, folder: &Option<RelPath>| match folder {
        Some(folder) => path.strip_prefix(folder),
        None => Some(path.clone()),
    };
    let topless: BTreeMap<RelPath, RelPath> =
        all.keys().filter_map(|path| Some((path.clone(), below(path, &top)?))).collect();
    let names: BTreeMap<RelPath, RelPath> =
        topless.iter().filter_map(|(name, path)| Some((name.clone(), below(path, &select.subdir)?))).collect();
    match &select.subdir {
        Some(subdir) if names.is_empty() => {
            let folders: BTreeSet<RelPath> = topless
                .values()
                .filter_map(|path| path.as_str().rsplit_once('/').and_then(|(folder, _)| folder.parse().ok()))
                .collect();
            Err(missing(what, subdir.as_str(), folders.iter()))
        }
        _ => Ok(names),
    }
}

/// The members under their selected names; hard links get the size of what they link to.
fn chosen(
    all: BTreeMap<RelPath, Member>,
    names: &BTreeMap<RelPath, RelPath>,
) -> Result<BTreeMap<RelPath, Member>, String> {
    let mut members = BTreeMap::new();
    for (name, path) in names {
        let Some(member) = all.get(name) else { continue };
        let mut member = member.clone();
        match &member.content {
            Content::HardLink(other) => {
                let size = match all.get(other) {
                    Some(Member { size_bytes, content: Content::File { .. } }) => *size_bytes,
                    _ => return Err(format!("`{path}` is a link to `{other}`, which is not in the archive")),
                };
                let other = names.get(other).ok_or_else(|| format!("`{path}` links out of the chosen folder"))?;
                member = Member { size_bytes: size, content: Content::HardLink(other.clone()) };
            }
            // Once more, now that the folder that counts is known.
            Content::Symlink(target) => {
                if let Some(why) = leads_out(path, target.as_bytes()) {
                    return Err(format!("the link `{path}` leads to `{target}`: {why}"));
                }
            }
            Content::File { .. } => {}
        }
        members.insert(path.clone(), member);
    }
    Ok(members)
}

/// No file or link may be where another one needs a folder; where the system does not tell `a` from `A`, no two names
/// may differ in that alone.
fn check_shape(members: &BTreeMap<RelPath, Member>, folds_case: bool) -> Result<(), String> {
    let mut seen: BTreeMap<String, &RelPath> = BTreeMap::new();
    let fold = |text: &str| if folds_case { text.to_lowercase() } else { text.to_owned() };
    for path in members.keys() {
        if let Some(other) = seen.insert(fold(path.as_str()), path) {
            return Err(format!("`{other}` and `{path}` are the same name on this system"));
        }
    }
    for path in members.keys() {
        for (at, _) in path.as_str().match_indices('/') {
            if let Some(other) = seen.get(&fold(&path.as_str()[..at])) {
                return Err(format!("`{path}` lies below `{other}`, which is not a folder"));
            }
        }
    }
    Ok(())
}

/// Unpacks the locked files of a model from the archive `what`.
///
/// # Errors
/// [`SourceError::Mismatch`] when the archive lacks one of them: the lockfile was edited, or made for another archive.
pub fn unpack_files(
    archive: &Archive<'_>,
    what: &str,
    files: &[&FilePin],
    staging: &Path,
) -> Result<Modes, SourceError> {
    let wanted: BTreeSet<&RelPath> = files.iter().map(|file| &file.path).collect();
    if let Some(missing) = files.iter().find(|file| !archive.members().contains_key(&file.path)) {
        return Err(SourceError::Mismatch {
            what: format!("`{}` in {what}", missing.path),
            expected: missing.sha256.to_string(),
            actual: "no such file".to_owned(),
            likely: None,
        });
    }
    Ok(archive.unpack(staging, &|path| wanted.contains(path))?.modes)
}

#[cfg(test)]
mod tests;
