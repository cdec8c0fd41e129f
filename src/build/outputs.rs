//! From the build folder to the staged prefix: which files, under which names, and whether they may be moved.
//!
//! Links are resolved: a chain `libx.so` -> `libx.so.1` becomes two names of one file. A file that holds the path of the
//! folder it was built in is told on, because it is then neither the same elsewhere nor sure to run elsewhere.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};

use super::{BuildError, BuildRecipe, OutputRule, search_paths};
use crate::base::cancel::Cancel;
use crate::base::digest;
use crate::base::fs::{self, FsError};
use crate::base::name::RelPath;
use crate::base::tree::{MAX_DEPTH, MAX_FILES};
use crate::format::receipt::InstalledFile;

/// More than any engine installs.
const MAX_OUTPUTS: usize = 10_000;
/// Larger ones are no program: libraries with code for many GPUs have a few gigabytes.
const MAX_PROGRAM_BYTES: u64 = 8 << 30;
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// What was installed.
#[derive(Debug, Default)]
pub struct Outputs {
    /// The installed files, by their path below the prefix.
    pub files: BTreeMap<RelPath, InstalledFile>,
    /// Files that hold one of the folders' paths.
    pub leaks: Vec<RelPath>,
    /// The texts that no file holds though one should.
    pub unproven: Vec<String>,
}

/// Copies what the recipe's rules name from `binary` to `prefix`. `folders` are the paths that nothing may hold.
///
/// # Errors
/// When a required rule matches nothing, two files claim one name, a name cannot be carried to other platforms, or the disk
/// fails. What was copied by then is left for the caller to remove.
pub fn collect(
    binary: &Path,
    prefix: &Path,
    recipe: &BuildRecipe,
    folders: &[&Path],
    cancel: &Cancel,
) -> Result<Outputs, BuildError> {
    let files = walk(binary, cancel)?;
    let mut plan: BTreeMap<RelPath, PathBuf> = BTreeMap::new();
    for rule in &recipe.outputs {
        let glob = matcher(&rule.glob)?;
        let matching: Vec<_> = files.iter().filter(|(name, _)| glob.is_match(name)).collect();
        if matching.is_empty() && rule.required {
            return Err(no_output(rule, &files));
        }
        for (name, path) in matching {
            let file: RelPath = name.rsplit('/').next().unwrap_or(name).parse().map_err(BuildError::Name)?;
            let to = rule.to.join(&file);
            let former = plan.insert(to.clone(), path.clone());
            if former.is_some_and(|former| former != *path) || plan.len() > MAX_OUTPUTS {
                return Err(BuildError::Output { path: to, why: "two files of the build folder claim this name" });
            }
        }
    }
    let mut outputs = Outputs { unproven: recipe.evidence.clone(), ..Outputs::default() };
    install(plan, prefix, folders, cancel, &mut outputs)?;
    Ok(outputs)
}

fn install(
    plan: BTreeMap<RelPath, PathBuf>,
    prefix: &Path,
    folders: &[&Path],
    cancel: &Cancel,
    outputs: &mut Outputs,
) -> Result<(), BuildError> {
    let needles: Vec<Vec<u8>> = folders.iter().filter_map(|it| it.to_str()).map(|it| it.as_bytes().to_vec()).collect();
    let mut copied: BTreeMap<PathBuf, RelPath> = BTreeMap::new();
    for (name, from) in plan {
        cancel.check()?;
        let to = name.under(prefix);
        fs::create_dir_all(fs::parent(&to))?;
        if let Some(twin) = copied.get(&from) {
            fs::hard_link_or_copy(&twin.under(prefix), &to)?;
            let file = outputs.files[twin].clone();
            outputs.files.insert(name, file);
            continue;
        }
        fs::copy(&from, &to)?;
        check_search_paths(&to, &name)?;
        let texts: Vec<Vec<u8>> = outputs.unproven.iter().map(|text| text.clone().into_bytes()).collect();
        let mut searches = vec![Search::new(&needles)];
        searches.extend(texts.iter().map(|text| Search::new(std::slice::from_ref(text))));
        let mut tee = Tee { file: fs::open(&to)?, searches: &mut searches };
        let (sha256, size) = digest::of_reader(&mut tee, |_| Ok(())).map_err(|why| FsError::new("read", &to, why))?;
        let mut found = searches.iter().map(|search| search.found);
        if found.next() == Some(true) {
            outputs.leaks.push(name.clone());
        }
        outputs.unproven.retain(|_| found.next() == Some(false));
        let is_exe = to.extension().is_some_and(|extension| extension == "exe");
        let executable = is_exe || fs::is_executable(&fs::metadata(&to)?);
        outputs.files.insert(name.clone(), InstalledFile { size, sha256, executable });
        copied.insert(from, name);
    }
    Ok(())
}

/// Refuses a program or library that would look for libraries in the current folder. What CMake filled up is taken away.
fn check_search_paths(path: &Path, name: &RelPath) -> Result<(), BuildError> {
    if !fs::read_head(path, ELF_MAGIC.len() as u64)?.starts_with(ELF_MAGIC) {
        return Ok(());
    }
    let bytes = fs::read_bounded(path, MAX_PROGRAM_BYTES)?;
    if let Some(entry) = search_paths::relative_entry(&bytes) {
        return Err(BuildError::SearchPath { path: name.clone(), entry });
    }
    let padding = search_paths::padding(&bytes);
    padding.into_iter().try_for_each(|(at, length)| Ok(fs::overwrite(path, at, &vec![0; length])?))
}

/// Every file below, by its path with `/`, and where it really is. Links to files of the build folder count, others and
/// links to folders do not.
fn walk(root: &Path, cancel: &Cancel) -> Result<BTreeMap<String, PathBuf>, BuildError> {
    let root = fs::canonical(root)?;
    let mut files = BTreeMap::new();
    let mut folders = vec![(root.clone(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = folders.pop() {
        cancel.check()?;
        if depth > MAX_DEPTH || files.len() > MAX_FILES {
            return Err(BuildError::TooManyFiles);
        }
        for path in fs::read_dir(&folder)? {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let full = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
            let meta = fs::symlink_metadata(&path)?;
            if meta.is_dir() {
                folders.push((path, full, depth + 1));
            } else if meta.is_file() {
                files.insert(full, path);
            } else if meta.is_symlink()
                && let Ok(real) = fs::canonical(&path)
                && real.starts_with(&root)
                && real.is_file()
            {
                files.insert(full, real);
            }
        }
    }
    Ok(files)
}

fn matcher(glob: &str) -> Result<GlobMatcher, BuildError> {
    let built = GlobBuilder::new(glob).literal_separator(true).build();
    built
        .map(|glob| glob.compile_matcher())
        .map_err(|why| BuildError::Glob { glob: glob.to_owned(), why: why.to_string() })
}

/// Names what the folder of the rule holds instead: the usual cause is another file name.
fn no_output(rule: &OutputRule, files: &BTreeMap<String, PathBuf>) -> BuildError {
    let folder = rule.glob.rsplit_once('/').map_or("", |(folder, _)| folder);
    let beside = files.keys().filter(|name| name.rsplit_once('/').map_or("", |(folder, _)| folder) == folder);
    BuildError::NoOutput { glob: rule.glob.clone(), beside: beside.take(10).cloned().collect() }
}

/// Looks for byte strings in a stream, also across two reads.
struct Search<'a> {
    needles: &'a [Vec<u8>],
    window: Vec<u8>,
    found: bool,
}

impl<'a> Search<'a> {
    fn new(needles: &'a [Vec<u8>]) -> Self {
        Self { needles, window: Vec::new(), found: false }
    }

    fn feed(&mut self, bytes: &[u8]) {
        if self.found {
            return;
        }
        self.window.extend_from_slice(bytes);
        let holds = |needle: &Vec<u8>| {
            !needle.is_empty() && self.window.windows(needle.len()).any(|at| at[0] == needle[0] && at == needle)
        };
        self.found = self.needles.iter().any(holds);
        let longest = self.needles.iter().map(Vec::len).max().unwrap_or(0);
        let keep = self.window.len().min(longest.saturating_sub(1));
        self.window.drain(..self.window.len() - keep);
    }
}

struct Tee<'a, 'b> {
    file: std::fs::File,
    searches: &'a mut [Search<'b>],
}

impl io::Read for Tee<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.searches.iter_mut().for_each(|search| search.feed(&buffer[..count]));
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(glob: &str, to: &str, required: bool) -> OutputRule {
        OutputRule { glob: glob.to_owned(), to: to.parse().unwrap(), required }
    }

    fn recipe(rules: &[OutputRule], evidence: &[&str]) -> BuildRecipe {
        BuildRecipe {
            version: 1,
            define: BTreeMap::new(),
            targets: Vec::new(),
            require: Vec::new(),
            build_type: String::new(),
            edits: Vec::new(),
            outputs: rules.to_vec(),
            evidence: evidence.iter().map(|text| (*text).to_owned()).collect(),
            native: false,
        }
    }

    fn run(files: &[(&str, &str)], rules: &[OutputRule]) -> Result<(tempfile::TempDir, Outputs), BuildError> {
        let root = tempfile::Builder::new().prefix("é x").tempdir().unwrap();
        let binary = root.path().join("build");
        for (name, text) in files {
            fs::write_atomic(&binary.join(name), text.as_bytes()).unwrap();
        }
        #[cfg(unix)]
        {
            fs::symlink(Path::new("libx.so.1"), &binary.join("bin/libx.so")).unwrap();
            fs::symlink(Path::new("/etc/hostname"), &binary.join("bin/outside")).unwrap();
            fs::symlink(Path::new("nowhere"), &binary.join("bin/dangling")).unwrap();
        }
        let secret = Path::new("/the/secret é");
        let recipe = recipe(rules, &["other", "#!", "in none"]);
        let outputs = collect(&binary, &root.path().join("out"), &recipe, &[secret], &Cancel::default())?;
        Ok((root, outputs))
    }

    const FILES: &[(&str, &str)] =
        &[("bin/main", "#!"), ("bin/libx.so.1", "at /the/secret é/x.c"), ("lib/main", "other")];

    #[test]
    fn what_the_rules_name_is_copied_and_links_become_names() {
        let (root, outputs) = run(FILES, &[rule("bin/*", "bin", true), rule("lib/none*", "lib", false)]).unwrap();
        let names: Vec<_> = outputs.files.keys().map(RelPath::as_str).collect();
        let expected: &[&str] =
            if cfg!(unix) { &["bin/libx.so", "bin/libx.so.1", "bin/main"] } else { &["bin/libx.so.1", "bin/main"] };
        assert_eq!(names, expected);
        assert_eq!(outputs.leaks.len(), 1);
        assert_eq!(outputs.unproven, ["other", "in none"], "`other` is in a file that is not installed");
        assert!(root.path().join("out/bin/main").is_file());
        for (name, file) in &outputs.files {
            assert_eq!(digest::of_file(&name.under(&root.path().join("out"))).unwrap(), (file.sha256, file.size));
        }
    }

    #[test]
    fn what_cannot_be_is_an_error_that_names_it() {
        let missing = run(FILES, &[rule("bin/server*", "bin", true)]).unwrap_err();
        assert!(matches!(&missing, BuildError::NoOutput { beside, .. } if beside.contains(&"bin/main".to_owned())));
        let twice = run(FILES, &[rule("*/main", "bin", true)]).unwrap_err();
        assert!(matches!(&twice, BuildError::Output { path, .. } if path.as_str() == "bin/main"));
        assert!(matches!(run(FILES, &[rule("bin/[", "bin", true)]).unwrap_err(), BuildError::Glob { .. }));
    }

    #[test]
    fn a_path_is_found_across_two_reads() {
        let needles = vec![b"/a/b".to_vec(), b"longer than it".to_vec()];
        let mut search = Search::new(&needles);
        search.feed(b"xx/a");
        assert!(!search.found);
        search.feed(b"/b");
        assert!(search.found);
    }
}
