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
use crate::base::name::RelPath;
use crate::format::lockfile::{FilePin, Kind, Pin};
use crate::format::manifest::UrlSpec;

use super::archive::{Archive, Limits, Select, is_archive};
use super::download::{Download, already, download, likely_content, missing_bytes};
use super::globs::Globs;
use super::{Fetch, Fetched, Source, SourceError, World, wanted_bytes};

impl Source for UrlSpec {
    fn resolve(&self, world: &World, kind: Kind) -> Result<Pin, SourceError> {
        let globs = Globs::new(&self.files)?;
        let (package, file) = self.measure(world)?;
        let mut pin = Pin { downloads: vec![package.clone()], ..Pin::default() };
        match kind {
            Kind::Model if self.files.is_empty() => pin.files = vec![package],
            Kind::Model => {
                let archive = self.open(world, &package, &file)?;
                let members: Vec<&RelPath> = archive.members().keys().collect();
                let chosen: BTreeSet<&RelPath> = globs.select(&self.what(), &members)?.into_iter().collect();
                let hashed = archive.hash(&|path| chosen.contains(path))?;
                let pins = hashed.into_iter().map(|(path, (sha256, size))| FilePin { path, size, sha256 });
                pin.files = pins.collect();
            }
            Kind::Engine | Kind::Tool => pin.tree = Some(self.open(world, &package, &file)?.listing()?.digest()),
        }
        Ok(pin)
    }

    fn fetch(&self, world: &World, ask: &Fetch<'_>) -> Result<Fetched, SourceError> {
        let [package] = ask.pin.downloads.as_slice() else {
            return Err(self.bad_pin("it should have one entry in `downloads`"));
        };
        let wanted: BTreeSet<&RelPath> =
            ask.wanted.iter().filter_map(|index| ask.pin.files.get(*index)).map(|file| &file.path).collect();
        let file = self.bring(world, &world.mirrored(&self.url), Some(package), &home(world, &package.sha256))?;
        if ask.kind == Kind::Model && self.files.is_empty() {
            let to = package.path.under(ask.staging);
            fs::create_dir_all(fs::parent(&to))?;
            let from = file.path().to_owned();
            let moved = file.through(&to, || fs::move_file(&from, &to))?;
            return Ok(Fetched { hashed: vec![moved], ..Fetched::default() });
        }
        let archive = self.open(world, package, file.path())?;
        if let Some(path) = wanted.iter().find(|path| !archive.members().contains_key(**path)) {
            return Err(self.bad_pin(&format!("the archive has no `{path}`")));
        }
        let unpacked = archive.unpack(ask.staging, &|path| ask.kind != Kind::Model || wanted.contains(path))?;
        // Its content is staged: a second copy would be of no use.
        fs::remove_file(file.path())?;
        Ok(unpacked.modes.into())
    }

    fn space(&self, world: &World, pin: &Pin, wanted: &[usize]) -> Result<(PathBuf, u64), SourceError> {
        let parts = folder(world);
        let missing = |package: &FilePin| match fs::metadata(&home(world, &package.sha256)) {
            Ok(there) if there.len() == package.size => 0,
            _ => missing_bytes(&parts, package),
        };
        let packages: u64 = pin.downloads.iter().map(missing).sum();
        let members = if self.files.is_empty() { 0 } else { wanted_bytes(pin, wanted) };
        Ok((parts.clone(), packages.saturating_add(members)))
    }
}

impl UrlSpec {
    fn what(&self) -> String {
        format!("`{}`", shown(&self.url))
    }

    fn bad_pin(&self, detail: &str) -> SourceError {
        SourceError::Disagreement {
            what: format!("the lockfile's entry for {} is not as this program writes it", self.what()),
            details: vec![detail.to_owned()],
            hint: Some("run `aitools lock`".to_owned()),
        }
    }

    /// The file itself in scratch, and what is known of it now.
    fn measure(&self, world: &World) -> Result<(FilePin, PathBuf), SourceError> {
        let path = file_name(&self.url).ok_or_else(|| SourceError::Disagreement {
            what: format!("{} does not end with the name of a file", self.what()),
            details: Vec::new(),
            hint: Some("use the address that a browser saves the file from".to_owned()),
        })?;
        let url = world.mirrored(&self.url);
        let unmeasured = folder(world).join(format!("new-{}", Digest::of(url.as_bytes()).hex()));
        let to = self.sha256.map_or(unmeasured, |sha256| home(world, &sha256));
        let came = self.bring(world, &url, None, &to)?;
        let pin = FilePin { path, size: came.size_bytes(), sha256: came.sha256() };
        self.refuse_pages(&to)?;
        let file = home(world, &pin.sha256);
        if file != to {
            fs::move_file(&to, &file)?;
        }
        Ok((pin, file))
    }

    /// With no digest to compare with, a page that came instead of the file must be told by its looks.
    fn refuse_pages(&self, file: &Path) -> Result<(), SourceError> {
        let head = fs::read_head(file, 512)?;
        match likely_content(&head) {
            Some(likely) if self.sha256.is_none() => Err(SourceError::Network {
                what: self.what(),
                why: format!("what came is not a file to use: {likely}"),
                hint: Some("open the address in a browser, or give the file's `sha256`".to_owned()),
            }),
            _ => Ok(()),
        }
    }

    /// The file at `to`: from an earlier time, when its digest is right, or fetched.
    fn bring(&self, world: &World, url: &str, pin: Option<&FilePin>, to: &Path) -> Result<Hashed, SourceError> {
        let what = self.what();
        let (size_bytes, sha256) = (pin.map(|pin| pin.size), pin.map(|pin| pin.sha256).or(self.sha256));
        // Without a client: the file may be there, and all of this offline.
        if let Some(there) = already(&world.task, &what, to, sha256)? {
            return Ok(there);
        }
        let (urls, parts) = ([url.to_owned()], folder(world));
        let ask = Download {
            what: &what,
            urls: &urls,
            headers: &[],
            size_bytes,
            sha256,
            parts: &parts,
            to,
            streams: world.connections(),
        };
        download(&world.http()?, &world.task, &ask)
    }

    fn open<'a>(&self, world: &'a World, pin: &'a FilePin, file: &'a Path) -> Result<Archive<'a>, SourceError> {
        if self.files.is_empty() || is_archive(file)? {
            let select = Select { drop_top: true, subdir: self.subdir.clone() };
            return Archive::open(file, pin.path.file_name(), &select, Limits::default(), &world.task);
        }
        Err(SourceError::Disagreement {
            what: format!("{} is no archive", self.what()),
            details: vec!["`files` chooses among the files of an archive".to_owned()],
            hint: Some("leave `files` out to use the file itself".to_owned()),
        })
    }
}

fn folder(world: &World) -> PathBuf {
    world.scratch.join("url")
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
