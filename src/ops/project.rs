//! Finds and loads a project: manifest, lockfile, policies.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::base::diagnostic::{Diagnostic, Diagnostics};
use crate::base::digest::Digest;
use crate::base::fs::{self, FsError};
use crate::base::name::Name;
use crate::format::Parsed;
use crate::format::lockfile::{self, Lockfile};
use crate::format::manifest::{self, Manifest};
use crate::format::policy::{self, Policy};

use super::Failure;

/// The largest manifest that is read, in bytes.
pub const MAX_MANIFEST_BYTES: u64 = 1 << 20;
const MAX_POLICIES: usize = 10_000;
const MAX_FOLDERS: usize = 10_000;

/// A folder with manifests, configs and models, seen through one manifest.
#[derive(Debug)]
pub struct Project {
    /// The project folder, absolute.
    pub root: PathBuf,
    /// The manifest's file.
    pub manifest_path: PathBuf,
    /// The lockfile, which may not exist.
    pub lock_path: PathBuf,
    /// The manifest.
    pub manifest: Parsed<Manifest>,
    /// The policies that the manifest includes.
    pub policies: Vec<PolicyFile>,
    /// What is doubtful, but stops nothing.
    pub warnings: Vec<Diagnostic>,
}

/// A policy and where it came from.
#[derive(Debug)]
pub struct PolicyFile {
    /// The file's name without its ending.
    pub name: String,
    /// The policy's file.
    pub path: PathBuf,
    /// Digest of the file's bytes: the "policy hash" of metrics and logs.
    pub digest: Digest,
    /// The policy.
    pub policy: Parsed<Policy>,
}

/// The manifest that `asked` means, searched from `from` upwards when it is a name.
///
/// # Errors
/// [`Failure::NoManifest`].
pub fn find_manifest(asked: Option<&str>, from: &Path) -> Result<PathBuf, Failure> {
    let name = asked.unwrap_or("default");
    let is_path = name.ends_with(".toml") || name.contains(['/', std::path::MAIN_SEPARATOR]);
    let missing = || Failure::NoManifest { name: name.to_owned(), from: from.to_owned() };
    if is_path {
        let path = from.join(name);
        return if fs::exists(&path) { Ok(path) } else { Err(missing()) };
    }
    let candidates = from.ancestors().map(|folder| folder.join("manifests").join(format!("{name}.toml")));
    candidates.into_iter().find(|path| fs::exists(path)).ok_or_else(missing)
}

/// Where [`Project::make_state_dir`] makes the folder of a project.
pub fn state_dir(root: &Path) -> PathBuf {
    root.join(".aitools")
}

/// The project folder of a manifest: the parent of its `manifests` folder, else the folder it is in.
fn root_of(manifest: &Path) -> PathBuf {
    let folder = fs::parent(manifest);
    if folder.file_name().is_some_and(|name| name == "manifests") {
        return fs::parent(folder).to_owned();
    }
    folder.to_owned()
}

impl Project {
    /// Reads manifest and policies.
    ///
    /// # Errors
    /// Every problem of every file at once.
    pub fn load(manifest_path: &Path) -> Result<Self, Failure> {
        let root = root_of(manifest_path);
        let bytes = fs::read_bounded(manifest_path, MAX_MANIFEST_BYTES)?;
        let (manifest, mut warnings) = manifest::parse(&shown(manifest_path, &root), &bytes)?;
        let mut problems = Diagnostics::default();
        let mut policies: Vec<PolicyFile> = Vec::new();
        for path in policy_paths(&root, &manifest, &mut problems)? {
            match load_policy(&path, &root) {
                Ok((file, doubts)) => {
                    warnings.extend(doubts);
                    match policies.iter().find(|other| other.name == file.name) {
                        Some(twin) => problems.push(duplicate(&file, twin, &root)),
                        None => policies.push(file),
                    }
                }
                Err(Failure::Input(more)) => problems.0.extend(more.0),
                // A broken link or an unreadable file does not stop the other policies.
                Err(Failure::Fs(error)) => problems.push(skipped(&path, &root, &error)),
                Err(other) => return Err(other),
            }
        }
        if problems.has_errors() {
            return Err(problems.into());
        }
        warnings.extend(problems.0);
        policies.sort_by(|a, b| a.name.cmp(&b.name));
        let lock_path = manifest_path.with_extension("lock");
        Ok(Self { root, manifest_path: manifest_path.to_owned(), lock_path, manifest, policies, warnings })
    }

    /// The folder of what aitools keeps in a project: logs and records. It is made, and ignored by git.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_state_dir(&self) -> Result<PathBuf, FsError> {
        let folder = state_dir(&self.root);
        fs::create_dir_all(&folder)?;
        fs::write_if_changed(&folder.join(".gitignore"), b"*\n")?;
        Ok(folder)
    }

    /// The lockfile, or None when there is none.
    ///
    /// # Errors
    /// When it cannot be read or is not a lockfile.
    pub fn lockfile(&self) -> Result<Option<Lockfile>, Failure> {
        match fs::read_bounded(&self.lock_path, lockfile::MAX_BYTES as u64) {
            Ok(bytes) => Ok(Some(lockfile::parse(&shown(&self.lock_path, &self.root), &bytes)?.0.value)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The policy of that name, or of that file (`configs/models/…/x.yaml`).
    ///
    /// # Errors
    /// When there is none, with the nearest name.
    pub fn policy(&self, asked: &str) -> Result<&PolicyFile, Failure> {
        let found = self.policies.iter().find(|file| file.name == asked || file.path == self.root.join(asked));
        found.ok_or_else(|| {
            let names = self.policies.iter().map(|file| file.name.as_str());
            let hint = match crate::base::diagnostic::nearest(asked, names.clone()) {
                Some(near) => format!("did you mean `{near}`?"),
                None if self.policies.is_empty() => format!("`{}` includes no policies", self.manifest_path.display()),
                None => format!("there are: {}", names.collect::<Vec<_>>().join(", ")),
            };
            Failure::Usage { what: format!("there is no policy `{asked}`"), hint: Some(hint) }
        })
    }

    /// The name of the policy that is meant; a file that the manifest does not include joins the project for this run.
    ///
    /// # Errors
    /// When it is a file that cannot be read or is no policy.
    pub fn include(&mut self, asked: &str, from: &Path) -> Result<String, Failure> {
        if !asked.ends_with(".yaml") && !asked.ends_with(".yml") {
            return Ok(asked.to_owned());
        }
        let here = from.join(asked);
        let path = if fs::exists(&here) { here } else { self.root.join(asked) };
        if let Some(known) = self.policies.iter().find(|file| fs::is_same(&file.path, &path)) {
            return Ok(known.name.clone());
        }
        if !fs::exists(&path) {
            return Err(Failure::Usage { what: format!("there is no policy file `{asked}`"), hint: None });
        }
        let (file, _) = load_policy(&path, &self.root)?;
        let name = file.name.clone();
        self.policies.retain(|other| other.name != name);
        self.policies.push(file);
        Ok(name)
    }

    /// The folder (a link where the platform has them) with the installation of an engine that is in use.
    pub fn build_link(&self, engine: &Name) -> PathBuf {
        self.root.join("build").join(engine.as_str())
    }

    /// The fingerprint that this link names: the last part of the path it points at.
    pub fn linked_build(&self, engine: &Name) -> Option<Digest> {
        let target = fs::read_dir_link(&self.build_link(engine))?;
        Digest::from_hex(target.file_name()?.to_str()?).ok()
    }

    /// `file:line` of an entry in the lockfile, for messages about wrong bytes.
    pub fn lock_line(&self, name: &Name) -> Option<String> {
        let bytes = fs::read_bounded(&self.lock_path, lockfile::MAX_BYTES as u64).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let line = text.lines().position(|line| line == format!("name = \"{name}\""))?;
        Some(format!("{}:{}", shown(&self.lock_path, &self.root), line + 1))
    }
}

/// A path as the user would write it: relative to the project where it is inside.
pub fn shown(path: &Path, root: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}

fn skipped(path: &Path, root: &Path, error: &fs::FsError) -> Diagnostic {
    let (shown, hint) = (shown(path, root), "repair or remove the file, or narrow `policies.include` in the manifest");
    Diagnostic::warning(format!("policy file `{shown}` is skipped: {}", error.source)).hint(hint)
}

fn duplicate(file: &PolicyFile, twin: &PolicyFile, root: &Path) -> Diagnostic {
    Diagnostic::error(format!("two policies are named `{}`", file.name))
        .expected("one file name for each policy")
        .actual(format!("{} and {}", shown(&twin.path, root), shown(&file.path, root)))
        .hint("rename one of the files")
}

/// Reads one policy file, whether or not the manifest includes it.
///
/// # Errors
/// Every problem of the file at once.
pub fn load_policy(path: &Path, root: &Path) -> Result<(PolicyFile, Vec<Diagnostic>), Failure> {
    let bytes = fs::read_bounded(path, MAX_MANIFEST_BYTES)?;
    let (policy, warnings) = policy::parse(&shown(path, root), &bytes)?;
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((PolicyFile { name, path: path.to_owned(), digest: Digest::of(&bytes), policy }, warnings))
}

/// The files that the manifest's globs match, sorted.
fn policy_paths(root: &Path, manifest: &Parsed<Manifest>, problems: &mut Diagnostics) -> Result<Vec<PathBuf>, Failure> {
    let mut paths = Vec::new();
    for (index, glob) in manifest.value.policies.include.iter().enumerate() {
        let Ok(matcher) = globset::GlobBuilder::new(glob).literal_separator(true).build() else { continue };
        let matcher = matcher.compile_matcher();
        let before = paths.len();
        let mut folders = vec![literal_folder(root, glob)];
        let mut seen = 0;
        while let Some(folder) = folders.pop() {
            seen += 1;
            if seen > MAX_FOLDERS || paths.len() > MAX_POLICIES {
                let what =
                    format!("`policies.include` `{glob}` looks through more than {MAX_FOLDERS} folders or files");
                return Err(Failure::Usage { what, hint: Some("name a narrower folder".to_owned()) });
            }
            for path in entries(&folder, root, problems)? {
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path);
                } else if matcher.is_match(path.strip_prefix(root).unwrap_or(&path)) && !paths.contains(&path) {
                    paths.push(path);
                }
            }
        }
        if paths.len() == before {
            let source = &manifest.document.source;
            let span = manifest.document.span_of(&["policies", "include", &index.to_string()]);
            problems.push(Diagnostic::warning(format!("no file matches `{glob}`")).at(source, span));
        }
    }
    paths.sort();
    Ok(paths)
}

/// What is in a folder that globs look through: nothing when it is not there. One that may not be read is skipped.
fn entries(folder: &Path, root: &Path, problems: &mut Diagnostics) -> Result<Vec<PathBuf>, Failure> {
    match fs::read_dir(folder) {
        Err(error) if matches!(error.source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) if error.source.kind() == ErrorKind::PermissionDenied => {
            let what = format!("folder `{}` is skipped: {}", shown(folder, root), error.source);
            problems.push(Diagnostic::warning(what).hint("narrow `policies.include` in the manifest"));
            Ok(Vec::new())
        }
        entries => Ok(entries?),
    }
}

/// The folder before the first wildcard of a glob.
fn literal_folder(root: &Path, glob: &str) -> PathBuf {
    let fixed = glob.split('/').take_while(|part| !part.contains(['*', '?', '[', '{']));
    let path: PathBuf = fixed.fold(root.to_owned(), |path, part| path.join(part));
    if path.is_dir() { path } else { fs::parent(&path).to_owned() }
}

/// The nearest folder upwards that looks like a project; `from` itself when none does.
pub fn find_root(from: &Path) -> PathBuf {
    let looks = |folder: &&Path| folder.join("manifests").is_dir() || folder.join("configs").is_dir();
    from.ancestors().find(looks).unwrap_or(from).to_owned()
}
