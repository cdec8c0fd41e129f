//! `reproduce`: builds installed engines again, elsewhere and in another environment, and compares every file.
//!
//! The second build differs from the first in all that its result must not depend on: the paths of its folders and whether they
//! are mapped by flags or seen at fixed paths in a mount namespace, the number of jobs, the umask, the time, and variables such
//! as `TZ`, `LANG`, `HOME`, `CFLAGS` and `SOURCE_DATE_EPOCH`. Not covered: another file system, kernel or processor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::demand::{Demand, EngineDemand, demand};
use super::install::{Folders, Purpose};
use super::{Failure, Host, Project, lock, sync};
use crate::base::fs;
use crate::base::name::RelPath;
use crate::base::platform::Variant;
use crate::build::difference;
use crate::format::receipt::InstalledFile;
use crate::plan::{Plan, Step};
use crate::store::artifacts::Artifact;
use crate::store::proofs::Claim;

/// Larger files are compared by their digests alone.
const MAX_COMPARED_BYTES: u64 = 2 << 30;

/// What must lie between two builds, for the times that they keep to differ.
const CLOCK_STEP: Duration = Duration::from_secs(2);

/// An engine that was built twice.
#[derive(Debug, Serialize)]
pub struct Reproduced {
    /// Its name in the manifest.
    pub engine: String,
    /// The accelerator.
    pub variant: Variant,
    /// Whether every file has the same bits.
    pub equal: bool,
    /// Every file of either build.
    pub files: BTreeMap<RelPath, Compared>,
    /// Where the two builds took place.
    pub places: [String; 2],
    /// Of the second build.
    pub seconds: u64,
    /// What diffoscope says of the first file that differs, where it is installed.
    pub diffoscope: Option<PathBuf>,
}

/// A file of two builds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum Compared {
    /// The same bits.
    Equal,
    /// Not the same bits.
    Different {
        /// Which, as far as it can be told.
        why: Vec<String>,
    },
    /// Only the first build has it.
    Gone,
    /// Only the second build has it.
    New,
}

/// Builds the named engines again, or all of the manifest; `tell` gets each result.
///
/// # Errors
/// When an engine is unknown, not installed, or cannot be built.
pub fn run(
    host: &Host,
    project: &Project,
    names: &[String],
    tell: &mut dyn FnMut(&Reproduced),
) -> Result<Vec<Reproduced>, Failure> {
    let lockfile = lock::require_current(host, project)?;
    let demand = demand(host, project, &lockfile, &[], Purpose::Install)?;
    check_names(&demand, names)?;
    let plan = sync::plan_for(host, project, &demand)?;
    let mut all = Vec::new();
    for engine in &demand.engines {
        if !names.is_empty() && !names.iter().any(|name| name == engine.required.name.as_str()) {
            continue;
        }
        let Some(first) = host.store.artifact(&engine.required.fingerprint)? else {
            return Err(Failure::NotSynced { steps: steps_of(&plan, engine) });
        };
        let reproduced = again(host, engine, &first)?;
        host.store.add_proofs([(Claim::Bits, engine.required.fingerprint, reproduced.equal)])?;
        tell(&reproduced);
        all.push(reproduced);
    }
    Ok(all)
}

fn check_names(demand: &Demand<'_>, names: &[String]) -> Result<(), Failure> {
    let known: BTreeSet<&str> = demand.engines.iter().map(|engine| engine.required.name.as_str()).collect();
    let Some(unknown) = names.iter().find(|name| !known.contains(name.as_str())) else { return Ok(()) };
    let near = crate::base::diagnostic::nearest(unknown, known);
    let hint = near.map(|near| format!("did you mean `{near}`?"));
    Err(Failure::Usage { what: format!("the manifest has no engine `{unknown}`"), hint })
}

fn steps_of(plan: &Plan, engine: &EngineDemand<'_>) -> Vec<Step> {
    let of = |step: &&Step| matches!(step, Step::Build { engine: name, .. } if *name == engine.required.name);
    plan.steps.iter().filter(of).cloned().collect()
}

fn again(host: &Host, engine: &EngineDemand<'_>, first: &Artifact) -> Result<Reproduced, Failure> {
    let (required, task) = (&engine.required, &host.task);
    let Some(tree) = host.store.confirm_tree(&required.tree, task.cancel())? else {
        return Err(Failure::NotSynced { steps: Vec::new() });
    };
    let (work, prefix, logs) = (host.store.stage()?, host.store.stage()?, host.store.logs());
    fs::create_dir_all(&logs)?;
    let log = logs.join(format!("{}-{}-again.log", required.name, required.variant));
    let folders = Folders { source: &tree, work: work.path(), prefix: prefix.path(), log: &log, again: true };
    // A build that keeps the time it was made at keeps whole seconds.
    for _ in 0..40 {
        if fs::is_older_than(&first.path, CLOCK_STEP) {
            break;
        }
        task.check()?;
        std::thread::sleep(CLOCK_STEP / 40);
    }
    let began = Instant::now();
    let label = format!("{} ({}), again", required.name, required.variant);
    let Some(second) = engine.installation.install(host, &label, &folders)? else {
        return Err(Failure::NotSynced { steps: Vec::new() });
    };
    let seconds = began.elapsed().as_secs();
    let place = |notes: &BTreeMap<String, String>| notes.get("place").cloned().unwrap_or_default();
    let places = [place(&first.receipt.notes), place(&second.notes)];
    let at = work.path().display().to_string();
    // The receipt names the place of the source; the build's folder is beside it.
    let beside = |place: &String| fs::parent(Path::new(place)).display().to_string();
    let fixed: Vec<String> = places.iter().filter(|place| place.starts_with('/')).map(beside).collect();
    let known: Vec<&str> = fixed.iter().map(String::as_str).chain([at.as_str()]).collect();
    let files = compare((&first.path, &first.receipt.files), (prefix.path(), &second.files), &known)?;
    let equal = files.values().all(|compared| *compared == Compared::Equal);
    let different = files.iter().find(|(_, compared)| matches!(compared, Compared::Different { .. }));
    let mut report = None;
    if let Some((name, _)) = different {
        let at = log.with_extension("diffoscope.txt");
        let both = (name.under(&first.path), name.under(prefix.path()));
        report = super::diffoscope::compare(host, &both.0, &both.1, &at)?.then_some(at);
    }
    let engine = required.name.to_string();
    Ok(Reproduced { engine, variant: required.variant, equal, files, places, seconds, diffoscope: report })
}

type Installed<'a> = (&'a Path, &'a BTreeMap<RelPath, InstalledFile>);

fn compare(
    first: Installed<'_>,
    second: Installed<'_>,
    folders: &[&str],
) -> Result<BTreeMap<RelPath, Compared>, Failure> {
    let names: BTreeSet<&RelPath> = first.1.keys().chain(second.1.keys()).collect();
    let mut all = BTreeMap::new();
    for name in names {
        let compared = match (first.1.get(name), second.1.get(name)) {
            (Some(one), Some(other)) if one == other => Compared::Equal,
            (Some(one), Some(other)) => {
                let mut why = Vec::new();
                if one.executable != other.executable {
                    why.push("only one of them may be executed".to_owned());
                }
                if one.sha256 != other.sha256 && one.size.max(other.size) <= MAX_COMPARED_BYTES {
                    let read = |folder: &Path| fs::read_bounded(&name.under(folder), MAX_COMPARED_BYTES);
                    why.extend(difference::in_words(&read(first.0)?, &read(second.0)?, folders));
                }
                Compared::Different { why }
            }
            (Some(_), None) => Compared::Gone,
            (None, _) => Compared::New,
        };
        all.insert(name.clone(), compared);
    }
    Ok(all)
}
