//! A file, or a tar or zip archive, at an address.
//!
//! An address promises nothing, so it is fetched at lock to learn its digest; what was fetched stays in scratch under its
//! SHA-256 and is used, hashed again, by the fetch after it, which leaves nothing there. The pin's `downloads` is what travels; an engine's `tree` and
//! a model's `files` are what is in it. `[mirrors]` apply.
//!
//! Absent: listings of web pages, logins (but what stands in the address), looking for newer files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::hashed::Hashed;
use crate::base::http::shown;
use crate::base::lock::{self, Lock};
use crate::base::name::RelPath;
use crate::format::lockfile::FilePin;
use crate::format::manifest::UrlSpec;

use super::archive::{Archive, Limits, Select, is_archive, unpack_files};
use super::download::{Download, RESERVE_BYTES, already, download, likely_content, missing_bytes, sweep_parts};
use super::globs::Globs;
use super::{Fetched, Source, SourceError, TreeSource, World, bytes_of};

impl Source for UrlSpec {
    type Pin = FilePin;

    fn resolve_files(&self, world: &World) -> Result<(FilePin, Vec<FilePin>), SourceError> {
        let globs = Globs::new(&self.files)?;
        let (package, file, _lock) = self.measure(world)?;
        if self.files.is_empty() {
            return Ok((package.clone(), vec![package]));
        }
        let archive = self.open(world, &package, &file)?;
        let members: Vec<&RelPath> = archive.members().keys().collect();
        let chosen: BTreeSet<&RelPath> = globs.select(&self.what(), &members)?.into_iter().collect();
        let hashed = archive.hash(&|path| chosen.contains(path))?;
        let pins = hashed.into_iter().map(|(path, (sha256, size))| FilePin { path, size, sha256 }).collect();
        Ok((package, pins))
    }

    fn fetch_files(
        &self,
        world: &World,
        package: &FilePin,
        files: &[&FilePin],
        staging: &Path,
    ) -> Result<Fetched, SourceError> {
        let _lock = hold(world, &home(world, &package.sha256))?;
        let file = self.bring_pinned(world, package)?;
        if self.files.is_empty() {
            let to = package.path.under(staging);
            fs::create_dir_all(fs::parent(&to))?;
            let from = file.path().to_owned();
            let moved = file.through(&to, || fs::move_file(&from, &to))?;
            return Ok(Fetched { hashed: vec![moved], ..Fetched::default() });
        }
        let archive = self.open(world, package, file.path())?;
        let modes = unpack_files(&archive, &self.what(), files, staging)?;
        // Its content is staged: a second copy is not needed.
        fs::remove_file(file.path())?;
        Ok(modes.into())
    }

    fn space(&self, world: &World, package: &FilePin, files: &[&FilePin]) -> Result<(PathBuf, u64), SourceError> {
        let parts = folder(world);
        let missing = match fs::metadata(&home(world, &package.sha256)) {
            Ok(there) if there.len() == package.size => 0,
            _ => missing_bytes(&parts, package),
        };
        let members = if self.files.is_empty() { 0 } else { bytes_of(files) };
        Ok((parts, missing.saturating_add(members)))
    }
}

impl TreeSource for UrlSpec {
    fn resolve_tree(&self, world: &World) -> Result<(FilePin, Digest), SourceError> {
        let (package, file, _lock) = self.measure(world)?;
        let tree = self.open(world, &package, &file)?.listing()?.digest();
        Ok((package, tree))
    }

    fn fetch_tree(&self, world: &World, package: &FilePin, _: &Digest, staging: &Path) -> Result<Fetched, SourceError> {
        let _lock = hold(world, &home(world, &package.sha256))?;
        let file = self.bring_pinned(world, package)?;
        let modes = self.open(world, package, file.path())?.unpack(staging, &|_| true)?.modes;
        // Its content is staged: a second copy is not needed.
        fs::remove_file(file.path())?;
        Ok(modes.into())
    }
}

impl UrlSpec {
    fn what(&self) -> String {
        format!("`{}`", shown(&self.url))
    }

    fn bring_pinned(&self, world: &World, package: &FilePin) -> Result<Hashed, SourceError> {
        self.bring(world, &world.mirrored(&self.url), Some(package), &home(world, &package.sha256))
    }

    /// The file itself in scratch, what is known of it now, and the lock under which it may be read.
    fn measure(&self, world: &World) -> Result<(FilePin, PathBuf, Lock), SourceError> {
        let path = file_name(&self.url).ok_or_else(|| SourceError::Disagreement {
            what: format!("{} does not end with the name of a file", self.what()),
            details: Vec::new(),
            hint: Some("use the address that a browser saves the file from".to_owned()),
        })?;
        let url = world.mirrored(&self.url);
        let unmeasured = folder(world).join(format!("new-{}", Digest::of(url.as_bytes()).hex()));
        let to = self.sha256.map_or(unmeasured, |sha256| home(world, &sha256));
        let lock = hold(world, &to)?;
        let came = self.bring(world, &url, None, &to)?;
        let pin = FilePin { path, size: came.size_bytes(), sha256: came.sha256() };
        self.refuse_pages(&to)?;
        let file = home(world, &pin.sha256);
        if file == to {
            return Ok((pin, file, lock));
        }
        let lock = hold(world, &file)?;
        fs::move_file(&to, &file)?;
        Ok((pin, file, lock))
    }

    /// With no digest to compare with, a page that came instead of the file must be told by its looks.
    fn refuse_pages(&self, file: &Path) -> Result<(), SourceError> {
        let head = fs::read_head(file, 512)?;
        match likely_content(&head) {
            Some(likely) if self.sha256.is_none() => Err(SourceError::Network {
                what: self.what(),
                why: format!("the response is not the file: {likely}"),
                hint: Some("open the address in a browser, or give the file's `sha256`".to_owned()),
            }),
            _ => Ok(()),
        }
    }

    /// The file at `to`: kept if its digest matches, else fetched.
    fn bring(&self, world: &World, url: &str, pin: Option<&FilePin>, to: &Path) -> Result<Hashed, SourceError> {
        let what = self.what();
        let (size_bytes, sha256) = (pin.map(|pin| pin.size), pin.map(|pin| pin.sha256).or(self.sha256));
        // Without a client: the file may be there, and all of this offline.
        if let Some(there) = already(&world.task, &what, to, sha256)? {
            return Ok(there);
        }
        let (urls, parts) = ([url.to_owned()], folder(world));
        sweep_parts(&parts);
        let ask = Download {
            what: &what,
            urls: &urls,
            headers: &[],
            size_bytes,
            sha256,
            parts: &parts,
            to,
            streams: world.connections(),
            reserve_bytes: RESERVE_BYTES,
        };
        download(&world.http()?, &world.task, &ask)
    }

    fn open<'a>(&self, world: &'a World, pin: &'a FilePin, file: &'a Path) -> Result<Archive<'a>, SourceError> {
        if self.files.is_empty() || is_archive(file)? {
            let select = Select { drop_top: true, subdir: self.subdir.clone() };
            return Archive::open(file, pin.path.file_name(), &select, Limits::default(), &world.task);
        }
        Err(SourceError::Disagreement {
            what: format!("{} is not an archive", self.what()),
            details: vec!["`files` chooses among the files of an archive".to_owned()],
            hint: Some("leave `files` out to use the file itself".to_owned()),
        })
    }
}

fn folder(world: &World) -> PathBuf {
    world.scratch.join("url")
}

/// The lock of a file in scratch: its holder alone reads, replaces and removes it.
fn hold(world: &World, file: &Path) -> Result<Lock, SourceError> {
    let waiting = || world.task.waiting("another `aitools` that fetches the same file");
    Ok(lock::acquire(&file.with_extension("held.lock"), world.task.cancel(), waiting)?)
}

fn home(world: &World, sha256: &Digest) -> PathBuf {
    folder(world).join(sha256.hex())
}

/// The last part of an address, percent-decoded, when that is a name for a file.
fn file_name(url: &str) -> Option<RelPath> {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let path = path.split_once("://").map_or(path, |(_, rest)| rest);
    let last = path.rsplit_once('/').map_or("", |(_, last)| last);
    let bytes = last.as_bytes();
    let (mut decoded, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let code = (bytes[at] == b'%').then(|| last.get(at + 1..at + 3)).flatten();
        let byte = code.and_then(|code| u8::from_str_radix(code, 16).ok());
        decoded.push(byte.unwrap_or(bytes[at]));
        at += if byte.is_some() { 3 } else { 1 };
    }
    String::from_utf8(decoded).ok().filter(|name| !name.contains('/'))?.parse().ok()
}

#[cfg(test)]
mod tests;
