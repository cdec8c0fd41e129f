//! The steps of one build: edit the source, configure, look at what CMake decided, build, collect.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitStatus;
use std::time::Instant;

use super::confine::View;
use super::log::Findings;
use super::mounts::{self, BuildMounts};
use super::{
    BuildError, BuildRecipe, BuildRequest, Built, Failure, NMAKE, Network, Phase, SourceEdit, cmake_cache, driver,
    isolation, outputs, settings, toolchain, watch,
};
use crate::base::fs::{self, FsError};
use crate::base::process::Program;
use crate::report::{Progress, Task, Unit, Verb};

/// What is kept of a log on disk.
const MAX_LOG_BYTES: u64 = 256 << 20;
/// Larger sources are not text to edit.
const MAX_EDITED_BYTES: u64 = 16 << 20;
const MAX_COMMANDS_BYTES: u64 = 128 << 20;
/// The note of a build that has a network because the system left it one.
const DISCOURAGED: &str = "discouraged";
/// CMakeCache entries that go into the notes.
const NOTED: &[&str] = &[
    "CMAKE_GENERATOR",
    "CMAKE_C_COMPILER",
    "CMAKE_CXX_COMPILER",
    "CMAKE_CUDA_COMPILER",
    "CMAKE_CUDA_ARCHITECTURES",
    "CMAKE_HIP_COMPILER",
    "CMAKE_LINKER",
    "CMAKE_AR",
];

/// Runs one build to its end.
///
/// # Errors
/// [`BuildError`]; the prefix is then empty again and nothing that was started still runs. [`BuildError::Cancelled`] when the
/// user asked to stop.
pub fn run(ask: &BuildRequest, task: &Task) -> Result<Built, BuildError> {
    check_recipe(&ask.recipe)?;
    let ask = prepare(ask)?;
    // A repository, or (in a submodule's packed sources) a file that points at one elsewhere: no part of the source, but
    // builds look into it for what to call themselves.
    let repository = ask.source.join(".git");
    fs::remove_file(&repository).or_else(|_| fs::remove_dir_all(&repository))?;
    for edit in &ask.recipe.edits {
        apply(edit, &ask)?;
    }
    let mut prefix = Staged { ask: &ask, keep: false };
    let mut job = Job::new(&ask, task)?;
    let seconds = job.phase(Phase::Configure)?;
    job.notes.insert("seconds.configure".to_owned(), seconds);
    job.check_configuration()?;
    let seconds = job.phase(Phase::Build)?;
    job.notes.insert("seconds.build".to_owned(), seconds);
    let binary = ask.binary();
    let mut folders = vec![ask.source.as_path(), &ask.folder];
    folders.extend(job.mounts.iter().flat_map(|mounts| [mounts.source.as_path(), &mounts.folder]));
    let made = outputs::collect(&binary, &ask.prefix, &ask.recipe, &folders, task.cancel());
    let made = made.map_err(|error| job.or_no_space(error))?;
    if let Some(text) = made.unproven.into_iter().next() {
        return Err(BuildError::NoEvidence { text, log: ask.log.clone() });
    }
    job.warnings.extend(
        made.leaks.iter().map(|path| {
            format!("`{path}` contains the path of its build folder: a build in another folder would differ")
        }),
    );
    prefix.keep = true;
    let (notes, warnings) = job.finish();
    Ok(Built { files: made.files, notes, warnings })
}

/// Fresh folders, and the request with the paths that tools will see: compilers resolve links, so maps must name the
/// real folders. (Windows' real paths have a form that CMake does not take.)
fn prepare(ask: &BuildRequest) -> Result<BuildRequest, BuildError> {
    let mut ask = ask.clone();
    fs::remove_dir_all(&ask.folder)?;
    for folder in [&ask.folder, &ask.home(), &ask.temp(), &ask.prefix] {
        fs::create_dir_all(folder)?;
    }
    if cfg!(unix) {
        for path in [&mut ask.source, &mut ask.folder, &mut ask.prefix] {
            *path = fs::canonical(path)?;
        }
    }
    Ok(ask)
}

/// CMake and make read meaning into some names; adapters and manifests must not get there by accident.
fn check_recipe(recipe: &BuildRecipe) -> Result<(), BuildError> {
    let fail = |what, value: &str, why| Err(BuildError::Recipe { what, value: value.to_owned(), why });
    let word = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.+/".contains(c))
    };
    for (name, value) in &recipe.define {
        if !word(name) {
            return fail("the definition", name, "a name may contain only letters, digits, `_`, `-`, `.`, `+` and `/`");
        }
        if value.contains(char::is_control) {
            return fail("the definition", name, "its value contains a control character");
        }
    }
    for target in recipe.targets.iter().chain([&recipe.build_type]) {
        if !word(target) {
            return fail("the target or build type", target, "it is not a plain word");
        }
    }
    Ok(())
}

fn apply(edit: &SourceEdit, ask: &BuildRequest) -> Result<(), BuildError> {
    let fail = |why: String| BuildError::Edit { path: edit.path.clone(), why };
    let path = edit.path.under(&ask.source);
    let real = fs::canonical(&path).map_err(|error| fail(error.source.to_string()))?;
    if !real.starts_with(fs::canonical(&ask.source)?) {
        return Err(fail("a link leads out of the source".to_owned()));
    }
    let bytes = fs::read_bounded(&real, MAX_EDITED_BYTES)?;
    let text = String::from_utf8(bytes).map_err(|_| fail("it is not text".to_owned()))?;
    let count = text.matches(edit.find.as_str()).count();
    if edit.find.is_empty() || count != 1 {
        return Err(fail(format!(
            "`{}` occurs {count} times instead of once: this edit is for another version of the source",
            edit.find
        )));
    }
    Ok(fs::write_atomic(&real, text.replace(&edit.find, &edit.replace).as_bytes())?)
}

/// Empties the prefix unless all went well.
struct Staged<'a> {
    ask: &'a BuildRequest,
    keep: bool,
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        if !self.keep {
            for entry in fs::read_dir(&self.ask.prefix).unwrap_or_default() {
                let _ = fs::remove_dir_all(&entry).or_else(|_| fs::remove_file(&entry));
            }
        }
    }
}

/// What the two runs of the driver have in common.
struct Job<'a> {
    ask: &'a BuildRequest,
    task: &'a Task,
    /// For CUDA alone: elsewhere flags do, and messages then name real folders.
    mounts: Option<BuildMounts>,
    log: io::BufWriter<File>,
    log_left: u64,
    findings: Findings,
    notes: BTreeMap<String, String>,
    warnings: Vec<String>,
    network: Vec<String>,
}

impl<'a> Job<'a> {
    fn new(ask: &'a BuildRequest, task: &'a Task) -> Result<Self, BuildError> {
        fs::create_dir_all(fs::parent(&ask.log))?;
        let notes = [("cmake", &ask.cmake.identity), ("ninja", &ask.ninja.as_ref().unwrap_or(&ask.cmake).identity)];
        let notes = notes.into_iter().filter(|(name, _)| *name != "ninja" || ask.ninja.is_some());
        Ok(Self {
            ask,
            task,
            mounts: ask.fixed_paths.then(mounts::choose).flatten(),
            log: io::BufWriter::new(fs::create(&ask.log)?),
            log_left: MAX_LOG_BYTES,
            findings: Findings::default(),
            notes: notes.map(|(name, value)| (name.to_owned(), value.clone())).collect(),
            warnings: Vec::new(),
            network: Vec::new(),
        })
    }

    /// Runs the driver once; gives the seconds it took.
    fn phase(&mut self, phase: Phase) -> Result<String, BuildError> {
        let ask = self.ask;
        let network = ask.folder.join("network.txt");
        let request = ask.folder.join("request.json");
        let generator = match &ask.ninja {
            Some(_) => "Ninja",
            None if cfg!(windows) => NMAKE,
            None => "Unix Makefiles",
        };
        let text = serde_json::to_vec_pretty(&driver::Request {
            phase,
            parent: std::process::id(),
            source: ask.source.clone(),
            folder: ask.folder.clone(),
            generator: generator.to_owned(),
            mounts: self.mounts.clone(),
            define: settings::definitions(ask, self.mounts.as_ref()),
            build_type: ask.recipe.build_type.clone(),
            targets: ask.recipe.targets.clone(),
            network: network.clone(),
            view: self.view(),
            access: ask.network,
        });
        let text = text.map_err(|why| FsError::new("write", &request, io::Error::other(why)))?;
        fs::write_atomic(&request, &text)?;
        let (verb, unit) = match phase {
            Phase::Configure => (Verb::Configure, Unit::None),
            Phase::Build => (Verb::Build, Unit::Steps),
        };
        let progress = self.task.start(verb, ask.label.clone(), None, unit);
        let began = Instant::now();
        let status = self.drive(&request, &progress);
        let flushed = self.log.flush();
        let status = status.map_err(|error| self.or_no_space(error))?;
        flushed.map_err(|why| self.or_no_space(FsError::new("write", &ask.log, why).into()))?;
        self.hear(&network)?;
        if !status.success() {
            return Err(self.failure(phase, status));
        }
        let seconds = format!("{:.1}", began.elapsed().as_secs_f64());
        progress.finish(format!("{seconds} s"));
        Ok(seconds)
    }

    fn drive(&mut self, request: &Path, progress: &Progress) -> Result<ExitStatus, BuildError> {
        let ask = self.ask;
        let program = Program {
            path: ask.driver.clone(),
            args: vec!["internal".into(), "build".into(), request.into()],
            env: settings::environment(ask),
            cwd: ask.folder.clone(),
        };
        watch::run(&program, self.task, &mut |line| self.take(line, progress))
    }

    fn take(&mut self, line: &[u8], progress: &Progress) -> Result<(), BuildError> {
        let kept = (line.len() as u64).min(self.log_left);
        self.log_left -= kept;
        let write = self.log.write_all(&line[..usize::try_from(kept).unwrap_or(0)]);
        write.map_err(|why| FsError::new("write", &self.ask.log, why))?;
        let text = String::from_utf8_lossy(line);
        if let Some(step) = self.findings.line(text.trim_end_matches(['\r', '\n'])) {
            progress.set(step.done, Some(step.total), None);
        }
        Ok(())
    }

    /// Its own folders, and the tools wherever they are installed.
    fn view(&self) -> View {
        let (ask, compilers) = (self.ask, &self.ask.compilers);
        let tools = [Some(&ask.cmake), ask.ninja.as_ref(), Some(&compilers.cc), Some(&compilers.cxx)];
        let tools = tools.into_iter().chain([compilers.cuda.as_ref(), compilers.hip.as_ref()]).flatten();
        let mut tools: Vec<&Path> = tools.map(|tool| tool.path.as_path()).collect();
        if ask.network == Network::Allowed {
            // Often a link to a folder that is hidden.
            tools.push(Path::new("/etc/resolv.conf"));
        }
        View::new(&ask.env, &[&ask.source, &ask.folder], &tools)
    }

    /// Reads what the driver wrote down: what confines the build, and who tried to use the network.
    fn hear(&mut self, path: &Path) -> Result<(), BuildError> {
        let mut lines = isolation::heard(path).into_iter();
        if let Some(report) = lines.next().and_then(|line| serde_json::from_str::<driver::Report>(&line).ok()) {
            let network = match &report.network {
                None => "isolated",
                Some(_) if self.ask.network == Network::Allowed => "allowed by the manifest",
                Some(_) => DISCOURAGED,
            };
            let place = report.place.map_or_else(|| "its own folders".to_owned(), |place| place.display().to_string());
            let notes = [("network", network.to_owned()), ("confined", report.confined), ("place", place)];
            self.notes.extend(notes.map(|(name, value)| (name.to_owned(), value)));
            if let Some(why) = report.network.filter(|_| self.ask.network == Network::Never) {
                return Err(BuildError::NotIsolated { why });
            }
        }
        let told = self.findings.network.drain(..);
        for line in lines.chain(told) {
            if !self.network.contains(&line) {
                self.network.push(line);
            }
        }
        Ok(())
    }

    fn failure(&mut self, phase: Phase, status: ExitStatus) -> BuildError {
        let log = self.ask.log.clone();
        if let Some(said) = self.findings.no_space.take() {
            return self.no_space(said);
        }
        if let Some(language) = self.findings.no_compiler.take() {
            let hint = match language.as_str() {
                "CUDA" => toolchain::CUDA_HINT,
                "HIP" => toolchain::ROCM_HINT,
                _ => toolchain::COMPILER_HINT,
            };
            return BuildError::NoCompiler { language, hint, log };
        }
        BuildError::Failed(Box::new(Failure {
            phase,
            status: status.to_string(),
            log,
            first_error: self.findings.first_error(),
            tail: self.findings.tail(),
            network: std::mem::take(&mut self.network),
        }))
    }

    fn no_space(&self, said: String) -> BuildError {
        let available_bytes = fs::available_bytes(&self.ask.folder).unwrap_or(0);
        BuildError::NoSpace { said, available_bytes, log: self.ask.log.clone() }
    }

    fn or_no_space(&self, error: BuildError) -> BuildError {
        match error {
            BuildError::Fs(error) if error.is_no_space() => self.no_space(error.to_string()),
            other => other,
        }
    }

    /// Between configure and build: does CMake mean what was asked?
    fn check_configuration(&mut self) -> Result<(), BuildError> {
        let ask = self.ask;
        let bytes = fs::read_bounded(&ask.binary().join("CMakeCache.txt"), cmake_cache::MAX_BYTES)?;
        let cache = cmake_cache::parse(&String::from_utf8_lossy(&bytes));
        let unused = &self.findings.unused;
        for definition in &ask.recipe.require {
            let value = cache.get(definition).filter(|_| !unused.contains(definition));
            if !value.is_some_and(|value| cmake_cache::is_true(value)) {
                return Err(BuildError::NotBuilt {
                    definition: definition.clone(),
                    value: value.cloned(),
                    said: std::mem::take(&mut self.findings.said),
                    log: ask.log.clone(),
                });
            }
        }
        let ours = unused.iter().filter(|name| ask.recipe.define.contains_key(*name));
        let unknown = ours.map(|name| format!("the project does not use the definition `{name}`"));
        self.warnings.extend(unknown.chain(self.findings.warnings.drain(..)));
        for name in NOTED {
            if let Some(value) = cache.get(*name).filter(|value| !value.is_empty()) {
                self.notes.insert((*name).to_owned(), value.clone());
            }
        }
        let commands = fs::read_bounded(&ask.binary().join("compile_commands.json"), MAX_COMMANDS_BYTES);
        let commands = String::from_utf8_lossy(&commands.unwrap_or_default()).into_owned();
        let native = ["-march=native", "-mcpu=native", "-arch=native"].into_iter().find(|flag| commands.contains(flag));
        if let Some(flag) = native.filter(|_| !ask.recipe.native) {
            self.warnings.push(format!(
                "files are compiled with `{flag}`, so they run on this machine only, although `native` is off"
            ));
        }
        Ok(())
    }

    fn finish(mut self) -> (BTreeMap<String, String>, Vec<String>) {
        if self.notes.get("network").is_some_and(|network| network == DISCOURAGED) {
            self.warnings.push("this system cannot run builds without network access: see `aitools doctor`".to_owned());
        }
        self.warnings.extend(self.network.iter().map(|line| format!("the build tried to use the network: {line}")));
        (self.notes, self.warnings)
    }
}
