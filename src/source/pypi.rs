//! Wheels and sdists from the Python package index, by name and exact version, through the machine's own pip (`index.rs`).
//!
//! The lock holds file name, size and SHA-256, never where the file was. What is pinned depends on what the entry is for:
//! a tool gets the wheels of every platform, so that one lockfile serves all; an engine or a model gets the one file that
//! is the same everywhere (the `any` wheel, else the sdist). An index says nothing of a package's members, so the digests
//! of an engine's tree and of a model's files need the package at lock; it stays in scratch for the fetch after it.
//!
//! Absent here: running anything of a package. An sdist is unpacked, never prepared or built.

mod index;
mod wheel;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::base::diagnostic::nearest;
use crate::base::digest::{self, Digest};
use crate::base::fs::{self, FsError};
use crate::base::lock::{self, Lock};
use crate::base::name::RelPath;
use crate::base::tree::{Listing, Mode, Modes};
use crate::format::lockfile::FilePin;
use crate::format::manifest::PypiSpec;
use crate::report::{Unit, Verb};

use super::archive::{Archive, Limits, Select, unpack_files};
use super::download::likely_content;
use super::globs::Globs;
use super::{Fetched, Source, SourceError, TreeSource, World, bytes_of};

pub use index::{PYTHON, interpreters};
pub use wheel::{Cpython, package_for_python, package_here, program, pythons};

/// No package is larger: the limit for one whose size the index does not say.
const MAX_PACKAGE_BYTES: u64 = 64 << 30;
/// Versions that an error lists.
const LISTED: usize = 10;
const NO_PORTABLE: (&str, &str) =
    ("it has neither an `any` wheel nor a source distribution", "is there another version?");
const SDIST_ENDINGS: [&str; 3] = [".tar.gz", ".tgz", ".zip"];

impl Source for PypiSpec {
    type Pin = FilePin;

    fn resolve_files(&self, world: &World) -> Result<(FilePin, Vec<FilePin>), SourceError> {
        let package = self.resolve_portable(world)?;
        let files = self.files(world, &package)?;
        Ok((package, files))
    }

    fn fetch_files(
        &self,
        world: &World,
        package: &FilePin,
        files: &[&FilePin],
        staging: &Path,
    ) -> Result<Fetched, SourceError> {
        self.staged(world, package, |file| {
            let archive = self.open(world, package, file)?;
            unpack_files(&archive, &format!("`{}`", package.path), files, staging)
        })
    }

    fn space(&self, world: &World, package: &FilePin, files: &[&FilePin]) -> Result<(PathBuf, u64), SourceError> {
        let missing = if fs::exists(&home(world, package)) { 0 } else { package.size };
        Ok((world.scratch.clone(), missing.saturating_add(bytes_of(files))))
    }
}

impl TreeSource for PypiSpec {
    fn resolve_tree(&self, world: &World) -> Result<(FilePin, Digest), SourceError> {
        let package = self.resolve_portable(world)?;
        let tree = self.tree(world, &package)?;
        Ok((package, tree))
    }

    fn fetch_tree(&self, world: &World, package: &FilePin, _: &Digest, staging: &Path) -> Result<Fetched, SourceError> {
        self.fetch_package(world, package, staging)
    }
}

impl PypiSpec {
    /// The packages of a tool: for every platform that `aitools` knows, so that one lockfile serves all. Downloads nothing
    /// where the index tells sizes and digests.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn resolve_packages(&self, world: &World) -> Result<Vec<FilePin>, SourceError> {
        if self.sdist {
            return self.choose(world, Self::portable, NO_PORTABLE);
        }
        let lacking = ("it has no wheel for a platform that `aitools` supports", "is there a newer version?");
        self.choose(world, |_, files| wheel::for_every_platform(files), lacking)
    }

    /// The one package that is the same on every platform.
    fn resolve_portable(&self, world: &World) -> Result<FilePin, SourceError> {
        let mut packages = self.choose(world, Self::portable, NO_PORTABLE)?;
        Ok(packages.swap_remove(0))
    }

    /// At least one package; `lacking` says what there is none of, and what helps.
    fn choose(
        &self,
        world: &World,
        among: impl for<'f> Fn(&Self, &[&'f index::File]) -> Vec<&'f index::File>,
        lacking: (&str, &str),
    ) -> Result<Vec<FilePin>, SourceError> {
        self.check_request()?;
        let listing = index::list(world, &self.pypi, &self.version)?;
        let files = self.standing(world, &listing)?;
        let chosen = among(self, &files);
        if chosen.is_empty() {
            return Err(self.nothing_fits(lacking, &files));
        }
        chosen.into_iter().map(|file| self.pin(world, file)).collect()
    }

    /// Brings one locked package, unpacked, to the empty folder `staging`.
    ///
    /// # Errors
    /// [`SourceError`]; the staging folder must then be discarded.
    pub fn fetch_package(&self, world: &World, package: &FilePin, staging: &Path) -> Result<Fetched, SourceError> {
        self.staged(world, package, |file| self.unpack(world, package, file, staging))
    }

    /// The package itself, verified: from scratch, where it stays, or from the index.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn package(&self, world: &World, package: &FilePin) -> Result<Held, SourceError> {
        self.check_request()?;
        self.obtain(world, package)
    }

    fn staged(
        &self,
        world: &World,
        package: &FilePin,
        unpack: impl FnOnce(&Path) -> Result<Modes, SourceError>,
    ) -> Result<Fetched, SourceError> {
        self.check_request()?;
        let file = self.obtain(world, package)?;
        let modes = unpack(&file.path)?;
        // Its content is staged: a second copy is not needed.
        fs::remove_file(&file.path)?;
        Ok(modes.into())
    }

    fn what(&self) -> String {
        format!("`{}` {}", self.pypi, self.version)
    }

    /// Both end up in an address and on a command line.
    fn check_request(&self) -> Result<(), SourceError> {
        let ends = |text: &str| text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.len() <= 200;
        let plain = |text: &str, more: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c));
        if ends(&self.pypi) && plain(&self.pypi, "._-") && ends(&self.version) && plain(&self.version, ".+!_-") {
            return Ok(());
        }
        Err(SourceError::Disagreement {
            what: format!("{} does not name a package", self.what()),
            details: vec!["`pypi` is a project's name, `version` one exact version, such as `1.13.2`".to_owned()],
            hint: None,
        })
    }

    /// The files of the version that were not withdrawn; all of them, with a warning, when all were.
    fn standing<'a>(&self, world: &World, listing: &'a index::Listing) -> Result<Vec<&'a index::File>, SourceError> {
        if listing.files.is_empty() {
            return Err(self.no_version(listing));
        }
        let standing: Vec<_> = listing.files.iter().filter(|file| !file.is_yanked()).collect();
        if !standing.is_empty() {
            return Ok(standing);
        }
        let why = listing.files.iter().find_map(index::File::yanked_because).unwrap_or("no reason is given");
        let why: String = why.chars().filter(|c| !c.is_control()).take(200).collect();
        world.task.warn(format!("{} was yanked: {why}", self.what()));
        Ok(listing.files.iter().collect())
    }

    fn no_version(&self, listing: &index::Listing) -> SourceError {
        let newest: Vec<&str> = listing.versions.iter().rev().take(LISTED).map(String::as_str).collect();
        let near = nearest(&self.version, listing.versions.iter().map(String::as_str));
        SourceError::Missing {
            what: self.what(),
            why: format!("the package index has no such version; the newest are {}", newest.join(", ")),
            hint: near.map(|near| format!("did you mean `{near}`?")),
        }
    }

    /// The one file that is the same on every platform.
    fn portable<'f>(&self, files: &[&'f index::File]) -> Vec<&'f index::File> {
        let any = files.iter().filter(|_| !self.sdist).rfind(|file| file.name.ends_with("-any.whl"));
        let sdist = || SDIST_ENDINGS.iter().find_map(|end| files.iter().find(|file| file.name.ends_with(end)));
        any.or_else(sdist).copied().into_iter().collect()
    }

    fn nothing_fits(&self, lacking: (&str, &str), files: &[&index::File]) -> SourceError {
        let no_sdist = ("it has no source distribution", "leave `sdist` out of the manifest");
        let (why, hint) = if self.sdist { no_sdist } else { lacking };
        let there: Vec<&str> = files.iter().take(LISTED).map(|file| file.name.as_str()).collect();
        SourceError::Missing {
            what: self.what(),
            why: format!("{why}; there are `{}`", there.join("`, `")),
            hint: Some(hint.to_owned()),
        }
    }

    fn pin(&self, world: &World, file: &index::File) -> Result<FilePin, SourceError> {
        let path: RelPath = file.name.parse().map_err(|error| self.hostile(&file.name, &error))?;
        let digest = file.sha256.as_deref().map(Digest::from_hex).transpose();
        let digest = digest.map_err(|error| self.hostile(&file.name, &error))?;
        match (file.size, digest) {
            (Some(size), Some(sha256)) => Ok(FilePin { path, size, sha256 }),
            _ => self.measure(world, path, digest),
        }
    }

    fn hostile(&self, name: &str, why: &dyn std::fmt::Display) -> SourceError {
        SourceError::Hostile { what: format!("`{name}` of {}", self.what()), why: why.to_string() }
    }

    fn wanted<'a>(&'a self, file: &'a RelPath, sha256: Option<Digest>, limit_bytes: u64) -> index::Wanted<'a> {
        index::Wanted { project: &self.pypi, version: &self.version, file: file.as_str(), sha256, limit_bytes }
    }

    /// For an index that says no digest or size: the file is fetched to be measured.
    fn measure(&self, world: &World, path: RelPath, promised: Option<Digest>) -> Result<FilePin, SourceError> {
        let folder = world.scratch.join("pypi/unmeasured");
        let _lock = hold(world, &folder)?;
        let part = folder.join(path.file_name());
        fs::remove_file(&part)?;
        let progress = world.task.start(Verb::Fetch, path.as_str(), None, Unit::Bytes);
        let wanted = self.wanted(&path, promised, MAX_PACKAGE_BYTES);
        index::fetch(world, &wanted, &part, &mut |done| progress.set(done, None, None))?;
        let (sha256, size) = digest::of_file(&part)?;
        let pin = FilePin { path, size, sha256 };
        if let Some(promised) = promised.filter(|promised| *promised != sha256) {
            return Err(mismatch(&FilePin { sha256: promised, ..pin }, &part, (sha256, size)));
        }
        let home = home(world, &pin);
        fs::create_dir_all(fs::parent(&home))?;
        fs::rename(&part, &home)?;
        progress.finish("");
        Ok(pin)
    }

    /// The package itself, verified, in scratch: from an earlier time or from the index. Nobody else uses or removes it while
    /// it is held.
    fn obtain(&self, world: &World, pin: &FilePin) -> Result<Held, SourceError> {
        let home = home(world, pin);
        let folder = fs::parent(&home);
        let lock = hold(world, folder)?;
        if fs::exists(&home) && digest::of_file(&home)? == (pin.sha256, pin.size) {
            return Ok(Held { path: home, _lock: lock });
        }
        if world.offline {
            return Err(SourceError::Offline { what: format!("`{}`", pin.path) });
        }
        let part = folder.join("part");
        let continued = fs::metadata(&part).is_ok_and(|meta| meta.len() > 0);
        let mut computed = self.transfer(world, pin, &part)?;
        if computed != (pin.sha256, pin.size) && continued {
            // The part was from something else, or was damaged since.
            fs::remove_file(&part)?;
            computed = self.transfer(world, pin, &part)?;
        }
        if computed != (pin.sha256, pin.size) {
            let error = mismatch(pin, &part, computed);
            fs::remove_file(&part)?;
            return Err(error);
        }
        fs::rename(&part, &home)?;
        Ok(Held { path: home, _lock: lock })
    }

    fn transfer(&self, world: &World, pin: &FilePin, part: &Path) -> Result<(Digest, u64), SourceError> {
        let progress = world.task.start(Verb::Fetch, pin.path.as_str(), Some(pin.size), Unit::Bytes);
        let wanted = self.wanted(&pin.path, Some(pin.sha256), pin.size);
        index::fetch(world, &wanted, part, &mut |done| progress.set(done, None, None))?;
        let computed = digest::of_file(part)?;
        progress.finish("");
        Ok(computed)
    }

    fn open<'a>(&self, world: &'a World, package: &'a FilePin, file: &'a Path) -> Result<Archive<'a>, SourceError> {
        let is_wheel = package.path.as_str().ends_with(".whl");
        let select = Select { drop_top: !is_wheel, subdir: self.subdir.clone() };
        Archive::open(file, package.path.file_name(), &select, Limits::default(), &world.task)
    }

    /// Gives the files that may be run. A wheel's scripts may be, whatever its zip entries say (PEP 427).
    fn unpack(&self, world: &World, package: &FilePin, file: &Path, into: &Path) -> Result<Modes, SourceError> {
        let archive = self.open(world, package, file)?;
        let mut modes = archive.unpack(into, &|_| true)?.modes;
        for script in archive.members().keys().filter(|path| path.as_str().contains(".data/scripts/")) {
            fs::set_executable(&script.under(into))?;
            modes.insert(script.clone(), Mode::Executable);
        }
        Ok(modes)
    }

    fn tree(&self, world: &World, package: &FilePin) -> Result<Digest, SourceError> {
        let file = self.obtain(world, package)?;
        let folder = tempfile::tempdir_in(&world.scratch)
            .map_err(|error| FsError::new("create a folder in", &world.scratch, error))?;
        let modes = self.unpack(world, package, &file.path, folder.path())?;
        let listing = Listing::scan(folder.path(), &modes, world.task.cancel())?;
        Ok(listing.digest())
    }

    fn files(&self, world: &World, package: &FilePin) -> Result<Vec<FilePin>, SourceError> {
        let globs = Globs::new(&self.files)?;
        let file = self.obtain(world, package)?;
        let archive = self.open(world, package, &file.path)?;
        let members: Vec<&RelPath> = archive.members().keys().collect();
        let selected: BTreeSet<&RelPath> = globs.select(&self.what(), &members)?.into_iter().collect();
        let hashed = archive.hash(&|path| selected.contains(path))?;
        Ok(hashed.into_iter().map(|(path, (sha256, size))| FilePin { path, size, sha256 }).collect())
    }
}

/// A package in scratch, and the lock under which it may be read and removed.
#[derive(Debug)]
pub struct Held {
    /// The file.
    pub path: PathBuf,
    _lock: Lock,
}

fn home(world: &World, pin: &FilePin) -> PathBuf {
    package_place(&world.scratch, &pin.sha256, pin.path.file_name())
}

/// Where the package with this digest and file name is looked for before it is fetched. It is hashed each time.
pub fn package_place(scratch: &Path, sha256: &Digest, file_name: &str) -> PathBuf {
    scratch.join("pypi").join(sha256.hex()).join(file_name)
}

fn hold(world: &World, folder: &Path) -> Result<Lock, SourceError> {
    let waiting = || world.task.waiting("another `aitools` that fetches the same package");
    Ok(lock::acquire(&folder.join("lock"), world.task.cancel(), waiting)?)
}

fn mismatch(pin: &FilePin, path: &Path, (digest, size): (Digest, u64)) -> SourceError {
    let said = |digest: &Digest, size| format!("{digest} ({size} bytes)");
    SourceError::Mismatch {
        what: format!("package `{}`", pin.path),
        expected: said(&pin.sha256, pin.size),
        actual: said(&digest, size),
        likely: fs::read_head(path, 512).ok().and_then(|head| likely_content(&head)).map(str::to_owned),
    }
}

#[cfg(test)]
mod tests;
