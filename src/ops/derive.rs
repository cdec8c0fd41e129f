//! Makes a model from others, as `[models.<name>.derive]` asks: with the engine's own program, off the network, into staging;
//! the result is checked, hashed, moved into the store and recorded under the fingerprint of all its inputs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::process::Program;
use crate::build::command::{self, Command};
use crate::engine::EngineError;
use crate::engine::derive::{DeriveRequest, Work};
use crate::format::lockfile::FilePin;
use crate::format::manifest::Step;
use crate::format::receipt::{self, InstalledFile, Receipt};
use crate::plan::{self, DeriveRequirement, ModelIndex};
use crate::report::{Unit, Verb};

use super::demand::{Demand, DeriveDemand, EngineDemand, ModelDemand, made};
use super::failure::DeriveError;
use super::{Failure, Host, Outcome, Project};

/// Where the files of a model are, verified, by their digests.
type Held = BTreeMap<Digest, PathBuf>;

/// Derives a model from others that are here, and places it, unless somebody else did meanwhile. Outdated when one of the
/// inputs is damaged or gone.
///
/// # Errors
/// What the engine, its program or the store said; nothing is recorded then.
pub fn derive(host: &Host, project: &Project, demand: &Demand<'_>, at: ModelIndex) -> Result<Outcome, Failure> {
    let model = demand.model_at(at);
    let name = &model.required.name;
    let (Some(derive), Some(required)) = (&model.derive, &model.required.derive) else {
        let error = EngineError::Underivable { why: "the manifest does not derive it".to_owned(), hint: None };
        return Err(Failure::Derive { model: name.clone(), error: error.into() });
    };
    let waiting = || host.task.waiting(format!("another aitools is deriving `{name}`"));
    let _held = host.store.lock(&format!("derive-{}", required.fingerprint.hex()), host.task.cancel(), waiting)?;
    host.store.reload_records();
    let mut files = files_of(host, model);
    let mut held = held(host, project, model, &files)?;
    if files.is_empty() || files.iter().any(|file| !held.contains_key(&file.sha256)) {
        for input in &required.from {
            let input = demand.model_at(*input);
            let files = files_of(host, input);
            held.extend(self::held(host, project, input, &files)?);
            if files.is_empty() || files.iter().any(|file| !held.contains_key(&file.sha256)) {
                return Ok(Outcome::Outdated);
            }
        }
        if files.first().is_none_or(|main| !held.contains_key(&main.sha256)) {
            let job = Job { model, derive, required, held: &held };
            let Some(made) = make(host, project, demand, &job)? else { return Ok(Outcome::Outdated) };
            held.insert(made.sha256, host.store.blob_path(&made.sha256));
            files = files_of(host, model);
        }
    }
    // The receipt cannot be read.
    if files.is_empty() {
        return Ok(Outcome::Outdated);
    }
    let layout =
        plan::layout(name, model.spec, &files).map_err(|error| super::demand::misplaced(project, name, &error))?;
    for (file, place) in files.iter().zip(&layout.places) {
        let Some(path) = held.get(&file.sha256) else { return Ok(Outcome::Outdated) };
        host.store.place(path, &place.under(&project.root), file.sha256)?;
    }
    Ok(Outcome::Done)
}

/// The files of a model: the locked ones; of a derived one those on record, the main one first, none before it was derived.
fn files_of(host: &Host, model: &ModelDemand<'_>) -> Vec<FilePin> {
    let (Some(derive), Some(required)) = (&model.derive, &model.required.derive) else {
        return model.required.files.clone();
    };
    let mut files = host.store.derived(&required.fingerprint).map(|receipt| made(&receipt)).unwrap_or_default();
    if !files.is_empty() {
        files.extend(derive.beside.iter().cloned());
    }
    files
}

/// Those of `files` that are present and verified: in the store, or in the model's place.
fn held(host: &Host, project: &Project, model: &ModelDemand<'_>, files: &[FilePin]) -> Result<Held, Failure> {
    let mut held = Held::new();
    for file in files {
        let blob = host.store.blob_path(&file.sha256);
        let place =
            model.required.files.iter().position(|known| known == file).map(|index| &model.required.places[index]);
        for path in [Some(blob), place.map(|place| place.under(&project.root))].into_iter().flatten() {
            if host.store.confirm(&path, file, &mut host.stopping())? {
                held.insert(file.sha256, path);
                break;
            }
        }
    }
    Ok(held)
}

/// One derivation whose inputs are here.
struct Job<'a> {
    model: &'a ModelDemand<'a>,
    derive: &'a DeriveDemand<'a>,
    required: &'a DeriveRequirement,
    held: &'a Held,
}

impl Job<'_> {
    fn failed(&self, error: impl Into<DeriveError>) -> Failure {
        Failure::Derive { model: self.model.required.name.clone(), error: error.into() }
    }

    fn nothing(&self) -> Failure {
        self.failed(EngineError::Underivable { why: "there is nothing to derive from".to_owned(), hint: None })
    }

    /// A folder with links to the files of a model under their own names.
    fn lay_out(&self, host: &Host, model: &ModelDemand<'_>, folder: &Path) -> Result<PathBuf, Failure> {
        for file in files_of(host, model) {
            let (from, to) = (self.held.get(&file.sha256).ok_or_else(|| self.nothing())?, file.path.under(folder));
            fs::create_dir_all(fs::parent(&to))?;
            // A symbolic link leaves the times of what it leads to alone.
            if fs::symlink(&fs::canonical(from)?, &to).is_err() {
                host.store.place(from, &to, file.sha256)?;
            }
        }
        Ok(folder.to_owned())
    }

    /// The main weights file of the model it is made from.
    fn input(&self, host: &Host, project: &Project, demand: &Demand<'_>) -> Result<PathBuf, Failure> {
        let from = demand.model_at(*self.required.from.first().ok_or_else(|| self.nothing())?);
        let files = files_of(host, from);
        let layout = plan::layout(&from.required.name, from.spec, &files);
        let layout = layout.map_err(|error| super::demand::misplaced(project, &from.required.name, &error))?;
        match layout.parts.as_slice() {
            [one] => self.held.get(&files[*one].sha256).cloned().ok_or_else(|| self.nothing()),
            [] => Err(self.nothing()),
            parts => {
                let why =
                    format!("`{}` has {} parts, and is derived from one file alone", from.required.name, parts.len());
                Err(self.failed(EngineError::Underivable { why, hint: None }))
            }
        }
    }
}

/// Makes the model from inputs that are here; none when something of the store turned out to be damaged, which counts as
/// missing from then on.
fn make(host: &Host, project: &Project, demand: &Demand<'_>, job: &Job<'_>) -> Result<Option<FilePin>, Failure> {
    let engine = demand.engine_at(job.derive.engine);
    let scratch = host.store.stage()?;
    match job.derive.step {
        Step::Quantize(kind) => {
            let input = job.input(host, project, demand)?;
            let Some(artifact) = host.store.artifact(&engine.required.fingerprint)? else { return Ok(None) };
            let work = Work::Quantize { kind, input: &input, artifact: &artifact.path };
            finish(host, engine, job, work, scratch.path()).map(Some)
        }
        Step::Convert(_) => {
            let python = match &job.derive.python {
                Some(Ok(python)) => python,
                Some(Err(error)) => return Err(job.failed(error.clone())),
                // It was on record when the demand was made.
                None => return Ok(None),
            };
            let Some(source) = host.store.confirm_tree(&engine.required.tree, host.task.cancel())? else {
                host.store.remove_tree(&engine.required.tree)?;
                return Ok(None);
            };
            let mut packages = Vec::new();
            for required in &python.packages {
                match host.store.tool(&required.package.sha256, true, host.task.cancel())? {
                    Some(folder) => packages.push(folder),
                    None => return Ok(None),
                }
            }
            let folders = job.required.from.iter().zip(["model", "predictor"]);
            let folders =
                folders.map(|(at, folder)| job.lay_out(host, demand.model_at(*at), &scratch.path().join(folder)));
            let [model, predictor] = &folders.collect::<Result<Vec<_>, _>>()?[..] else { return Err(job.nothing()) };
            let (source, python) = (&source, &python.program);
            let work = Work::Convert { model, predictor, source, python, packages: &packages };
            finish(host, engine, job, work, scratch.path()).map(Some)
        }
    }
}

/// Runs the engine's program, looks at what it made, and takes that in.
fn finish(
    host: &Host,
    engine: &EngineDemand<'_>,
    job: &Job<'_>,
    work: Work<'_>,
    scratch: &Path,
) -> Result<FilePin, Failure> {
    let name = &job.model.required.name;
    let file = plan::derived_file(name);
    let staging = host.store.stage()?;
    let began = Instant::now();
    let output = file.under(staging.path());
    let commit = engine.entry.origin.commit();
    let ask = DeriveRequest { work, commit, output: &output, scratch, threads: host.jobs.max(1) };
    let log = host.store.logs().join(format!("{name}-{}.log", job.required.fingerprint.short()));
    run(host, engine, job, &ask, &log)?;
    look_at(engine, job, &ask, &log)?;
    let progress = host.task.start(Verb::Hash, name.as_str(), None, Unit::None);
    let pin = |size, sha256| FilePin { path: file.clone(), size, sha256 };
    let pin = host.store.admit_derived(&output, pin, &mut host.stopping())?;
    progress.finish("");
    let receipt = Receipt {
        version: receipt::VERSION,
        engine: engine.required.name.clone(),
        variant: engine.required.variant,
        fingerprint: job.required.fingerprint,
        inputs: job.derive.inputs.clone(),
        files: [(file, InstalledFile { size: pin.size, sha256: pin.sha256, executable: false })].into(),
        notes: [("model", name.to_string()), ("seconds", began.elapsed().as_secs().to_string())]
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
    };
    host.store.record_derived(&receipt)?;
    host.store.save_records()?;
    Ok(pin)
}

fn run(
    host: &Host,
    engine: &EngineDemand<'_>,
    job: &Job<'_>,
    ask: &DeriveRequest<'_>,
    log: &Path,
) -> Result<(), Failure> {
    let launch = engine.adapter.derive(ask).map_err(|error| job.failed(error))?;
    let program = Program { path: launch.program, args: launch.args, env: launch.env, cwd: launch.cwd };
    let progress = host.task.start(Verb::Derive, job.model.required.name.as_str(), None, Unit::Steps);
    let began = Instant::now();
    let writable = vec![fs::parent(ask.output).to_owned(), ask.scratch.to_owned()];
    let command = Command { driver: &host.driver, program, writable, offline: host.offline, log: log.to_owned() };
    command::run(&command, &host.task, &progress).map_err(|error| job.failed(error))?;
    progress.finish(format!("{}, {:.1} s", job.derive.step, began.elapsed().as_secs_f64()));
    Ok(())
}

/// Programs of engines may exit with 0 after writing a broken file: the result must be a model that the engine can run.
fn look_at(engine: &EngineDemand<'_>, job: &Job<'_>, ask: &DeriveRequest<'_>, log: &Path) -> Result<(), Failure> {
    let useless = |why: Vec<String>| job.failed(DeriveError::Useless { why, log: log.to_owned() });
    let wrong = engine.adapter.check_derived(ask).into_iter().filter(|finding| finding.error);
    let wrong: Vec<String> = wrong.map(|finding| finding.message).collect();
    if wrong.is_empty() { Ok(()) } else { Err(useless(wrong)) }
}
