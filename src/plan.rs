//! What is missing, and why: (what is required, what is present) -> [`Plan`].
//!
//! Pure: no disk, no network, no clock. Every rule is a table test below.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};
use crate::base::platform::Variant;

use crate::format::gguf::PartName;
use crate::format::lockfile::FilePin;
use crate::format::manifest::{ModelSpec, PypiSpec};
use crate::store::blobs::Presence;

/// Where the weights of a model go in a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The file that engines are given: the only GGUF, or the first part of a split one. None for what is only there to
    /// derive others from.
    pub main: Option<RelPath>,
    /// All parts of the main file in order, as indices into the pin's files; one when it is not split; none when the file is
    /// yet to be made.
    pub parts: Vec<usize>,
    /// The place of every file, relative to the project, in the order of the pin's files.
    pub places: Vec<RelPath>,
}

/// Why the files of a model cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum LayoutError {
    #[error("none of the files is a GGUF file")]
    NoWeights,
    /// The files with their sizes, in words.
    #[error("a model is one GGUF file or its parts, but {} files match: {}", .0.len(), .0.join(", "))]
    Ambiguous(Vec<String>),
    #[error("two files would be placed at `{0}`")]
    Collision(RelPath),
}

/// The files that are weights: GGUF files, else one safetensors file or the parts of one. Other folders of safetensors are
/// inputs of a conversion.
fn weights_of(files: &[FilePin]) -> Vec<usize> {
    let path = |index: &usize| files[*index].path.as_str();
    let ending = |ending: &str| Vec::from_iter((0..files.len()).filter(|index| path(index).ends_with(ending)));
    let gguf = ending(".gguf");
    if !gguf.is_empty() {
        return gguf;
    }
    let tensors = ending(".safetensors");
    let part = |index: &usize| PartName::of(path(index));
    let first = tensors.first().and_then(part);
    let beside = |index: &usize| first.zip(part(index)).is_some_and(|(first, part)| part.is_beside(&first));
    let is_one = tensors.len() < 2 || tensors.iter().all(beside);
    if is_one { tensors } else { Vec::new() }
}

/// Where each locked file of a model goes.
///
/// # Errors
/// When it cannot be told which file is the main one, or two files would get one name.
pub fn layout(name: &Name, spec: &ModelSpec, files: &[FilePin]) -> Result<Layout, LayoutError> {
    let folder = spec.place(name);
    let weights = weights_of(files);
    let path = |index: usize| files[index].path.as_str();
    let first = match weights.as_slice() {
        [] => None,
        [one] => Some(*one),
        several => Some(
            main_of_several(several, &path)
                .ok_or_else(|| LayoutError::Ambiguous(several.iter().map(|index| sized(&files[*index])).collect()))?,
        ),
    };
    let parts = match first.and_then(|first| PartName::of(path(first))) {
        Some(main) => {
            let in_set = |index: &usize| PartName::of(path(*index)).is_some_and(|part| part.is_beside(&main));
            weights.iter().copied().filter(in_set).collect()
        }
        None => Vec::from_iter(first),
    };
    let mut places: Vec<RelPath> = files.iter().map(|file| folder.join(&file.path)).collect();
    if let (Some(renamed), [only]) = (&spec.weights, parts.as_slice()) {
        places[*only] = folder.join(renamed);
    }
    let mut seen = BTreeSet::new();
    match places.iter().find(|place| !seen.insert(place.as_str().to_lowercase())) {
        Some(twice) => Err(LayoutError::Collision(twice.clone())),
        None => Ok(Layout { main: first.map(|first| places[first].clone()), parts, places }),
    }
}

/// Where a derived model will be, whose record is not there to say more.
pub fn layout_to_be(name: &Name, spec: &ModelSpec) -> Layout {
    let file = spec.weights.clone().unwrap_or_else(|| derived_file(name));
    Layout { main: Some(spec.place(name).join(&file)), parts: Vec::new(), places: Vec::new() }
}

/// What a derived model's file is called where the manifest does not say.
pub fn derived_file(name: &Name) -> RelPath {
    RelPath::of_name(name, ".gguf")
}

/// `a.gguf` (1.2 GB)
fn sized(file: &FilePin) -> String {
    let (divisor, unit) = if file.size >= 1_000_000_000 { (1e9, "GB") } else { (1e6, "MB") };
    format!("`{}` ({:.1} {unit})", file.path, file.size as f64 / divisor)
}

/// The first of several GGUFs that are the parts of one.
fn main_of_several<'a>(several: &[usize], path: &dyn Fn(usize) -> &'a str) -> Option<usize> {
    let main = several.iter().find_map(|index| PartName::of(path(*index)).filter(|part| part.number == 1))?;
    let part = |index: usize| PartName::of(path(index)).filter(|part| part.is_beside(&main));
    let first = several.iter().copied().find(|index| part(*index) == Some(main));
    first.filter(|_| several.iter().all(|index| part(*index).is_some()))
}

/// The position of an engine in the list of those that are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EngineIndex(pub usize);

/// The position of a model in the list of those that are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ModelIndex(pub usize);

/// A required package of a tool, or a required Python package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageRequirement {
    /// The name of the tool in the manifest.
    pub name: Name,
    /// What the lockfile has for it.
    pub request: PypiSpec,
    /// The package that suits this machine.
    pub package: FilePin,
}

/// A required engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineRequirement {
    /// Its name in the manifest.
    pub name: Name,
    /// The accelerator that it is built for.
    pub variant: Variant,
    /// Digest of every input of its installation.
    pub fingerprint: Digest,
    /// The source tree it is built from.
    pub tree: Digest,
    /// Build tools from the lockfile.
    pub tools: Vec<PackageRequirement>,
    /// Whether `build/<engine>` should point at it: of several variants of one engine, the first.
    pub linked: bool,
    /// False when it is needed only if a model is derived with it.
    pub wanted: bool,
}

/// A required model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRequirement {
    /// Its name in the manifest.
    pub name: Name,
    /// Its files; those of a derived model are known only once it was derived here.
    pub files: Vec<FilePin>,
    /// Where each of the files goes, relative to the project.
    pub places: Vec<RelPath>,
    /// How it is made, when it is derived.
    pub derive: Option<DeriveRequirement>,
    /// False when it is needed only if another model is derived from it.
    pub wanted: bool,
}

/// What of an engine a derivation needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DerivesWith {
    /// A program of its build.
    Build,
    /// A script of its source tree.
    Source,
}

/// How a model is made from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeriveRequirement {
    /// Digest of everything that decides what comes out.
    pub fingerprint: Digest,
    /// The models that it is made from, which come before it in the list.
    pub from: Vec<ModelIndex>,
    /// In words: `quantize to Q4_0`.
    pub how: String,
    /// The engine whose program or source makes it.
    pub engine: EngineIndex,
    /// What of the engine makes it.
    pub with: DerivesWith,
    /// Python packages that the engine's script needs.
    pub packages: Vec<PackageRequirement>,
}

/// What is present: made by `ops/survey.rs`, or by hand in tests.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// Installed engines, by fingerprint.
    pub artifacts: BTreeSet<Digest>,
    /// Source trees.
    pub trees: BTreeSet<Digest>,
    /// By package digest.
    pub tools: BTreeSet<Digest>,
    /// Files of the store, by digest.
    pub blobs: BTreeMap<Digest, Presence>,
    /// Files at the places of models.
    pub places: BTreeMap<RelPath, Presence>,
    /// Which artifact each engine's `build/<engine>` link points at.
    pub links: BTreeMap<Name, Digest>,
}

/// Why a step is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// It is not on this machine.
    Missing,
    /// It is there, but was not hashed here, or was touched since.
    Unverified,
    /// It is on this machine, but not in this project.
    NotLinked,
}

/// One thing to do. It carries everything that it needs, or the position of the engine or model it is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
#[expect(missing_docs, reason = "a step names what it is about; the variant says what is done")]
pub enum Step {
    /// Bring a package of a tool into the store.
    FetchTool {
        name: Name,
        package: Digest,
        reason: Reason,
        #[serde(skip)]
        required: PackageRequirement,
    },
    /// Bring the source tree of an engine into the store.
    FetchSource {
        engine: Name,
        tree: Digest,
        reason: Reason,
        #[serde(skip)]
        at: EngineIndex,
    },
    /// Install an engine. Its source and tools are in the store.
    Build {
        engine: Name,
        variant: Variant,
        fingerprint: Digest,
        reason: Reason,
        #[serde(skip)]
        at: EngineIndex,
    },
    /// Let `build/<engine>` point at an installed engine.
    LinkBuild {
        engine: Name,
        fingerprint: Digest,
        reason: Reason,
        #[serde(skip)]
        at: EngineIndex,
    },
    /// Hash files that are there.
    Hash {
        model: Name,
        files: Vec<usize>,
        bytes: u64,
        reason: Reason,
        #[serde(skip)]
        at: ModelIndex,
    },
    /// Bring files of a model into the store, and place them.
    FetchWeights {
        model: Name,
        files: Vec<usize>,
        bytes: u64,
        reason: Reason,
        #[serde(skip)]
        at: ModelIndex,
    },
    /// Put files of the store where the project has them.
    Place {
        model: Name,
        files: Vec<usize>,
        reason: Reason,
        #[serde(skip)]
        at: ModelIndex,
    },
    /// Make the file of a model from other models, which are here, and place it.
    Derive {
        model: Name,
        from: Vec<Name>,
        engine: Name,
        how: String,
        fingerprint: Digest,
        reason: Reason,
        #[serde(skip)]
        at: ModelIndex,
    },
}

/// Steps of different lanes do not need each other and may run at the same time, but for [`Lane::Derivations`], which needs the
/// others to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Tools, sources and builds.
    Engines,
    /// Files of models.
    Models,
    /// Derived models.
    Derivations,
}

impl Step {
    /// What the step may run beside.
    pub fn lane(&self) -> Lane {
        match self {
            Self::FetchTool { .. } | Self::FetchSource { .. } | Self::Build { .. } | Self::LinkBuild { .. } => {
                Lane::Engines
            }
            Self::Hash { .. } | Self::FetchWeights { .. } | Self::Place { .. } => Lane::Models,
            Self::Derive { .. } => Lane::Derivations,
        }
    }

    /// Whether the step is one of that model's.
    pub fn is_about(&self, model: &Name) -> bool {
        match self {
            Self::Hash { model: own, .. }
            | Self::FetchWeights { model: own, .. }
            | Self::Place { model: own, .. }
            | Self::Derive { model: own, .. } => own == model,
            Self::FetchTool { .. } | Self::FetchSource { .. } | Self::Build { .. } | Self::LinkBuild { .. } => false,
        }
    }
}

/// In an order that can be carried out one by one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The steps, in an order that works.
    pub steps: Vec<Step>,
}

impl Plan {
    /// Whether nothing is left to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

/// What has to be done for `engines` and `models`. Models come after those that they are derived from.
pub fn plan(engines: &[EngineRequirement], models: &[ModelRequirement], survey: &Survey) -> Plan {
    let mut needed: BTreeSet<usize> = (0..models.len()).filter(|index| models[*index].wanted).collect();
    let mut derived: Vec<(ModelIndex, &DeriveRequirement)> = Vec::new();
    for (index, required) in models.iter().enumerate().rev().filter(|(_, required)| !is_whole(required, survey)) {
        if let Some(derive) = required.derive.as_ref().filter(|_| needed.contains(&index)) {
            needed.extend(derive.from.iter().map(|from| from.0));
            derived.push((ModelIndex(index), derive));
        }
    }
    derived.reverse();
    let mut due = Due { survey, tools: BTreeSet::new(), trees: BTreeSet::new(), steps: Vec::new() };
    for (index, required) in engines.iter().enumerate() {
        let at = EngineIndex(index);
        let makes =
            |(_, derive): &(ModelIndex, &DeriveRequirement)| derive.with == DerivesWith::Build && derive.engine == at;
        if required.wanted || derived.iter().any(makes) {
            due.engine(at, required);
        }
    }
    for (_, derive) in &derived {
        if derive.with == DerivesWith::Source {
            due.source(derive.engine, &engines[derive.engine.0]);
        }
        derive.packages.iter().for_each(|package| due.package(package));
    }
    for (index, required) in models.iter().enumerate() {
        if needed.contains(&index) && !derived.iter().any(|(at, _)| at.0 == index) {
            due.steps.extend(plan_model(ModelIndex(index), required, survey));
        }
    }
    due.steps.extend(derived.iter().map(|(at, derive)| plan_derivation(*at, derive, engines, models)));
    Plan { steps: due.steps }
}

/// Steps so far, each thing once.
struct Due<'a> {
    survey: &'a Survey,
    tools: BTreeSet<Digest>,
    trees: BTreeSet<Digest>,
    steps: Vec<Step>,
}

impl Due<'_> {
    fn package(&mut self, required: &PackageRequirement) {
        let package = required.package.sha256;
        if !self.survey.tools.contains(&package) && self.tools.insert(package) {
            let (name, reason, required) = (required.name.clone(), Reason::Missing, required.clone());
            self.steps.push(Step::FetchTool { name, package, reason, required });
        }
    }

    fn source(&mut self, at: EngineIndex, required: &EngineRequirement) {
        if !self.survey.trees.contains(&required.tree) && self.trees.insert(required.tree) {
            let (engine, tree, reason) = (required.name.clone(), required.tree, Reason::Missing);
            self.steps.push(Step::FetchSource { engine, tree, reason, at });
        }
    }

    fn engine(&mut self, at: EngineIndex, required: &EngineRequirement) {
        let (engine, fingerprint) = (required.name.clone(), required.fingerprint);
        if !self.survey.artifacts.contains(&fingerprint) {
            required.tools.iter().for_each(|package| self.package(package));
            self.source(at, required);
            let (engine, variant, reason) = (engine.clone(), required.variant, Reason::Missing);
            self.steps.push(Step::Build { engine, variant, fingerprint, reason, at });
        }
        if required.linked && self.survey.links.get(&engine) != Some(&fingerprint) {
            self.steps.push(Step::LinkBuild { engine, fingerprint, reason: Reason::NotLinked, at });
        }
    }
}

/// Whether every file is there, though perhaps not hashed or placed; those of a derived model are not even known before.
fn is_whole(required: &ModelRequirement, survey: &Survey) -> bool {
    let absent = |(file, place): (&FilePin, &RelPath)| {
        let missing = |presence: Option<&Presence>| *presence.unwrap_or(&Presence::Missing) == Presence::Missing;
        missing(survey.blobs.get(&file.sha256)) && missing(survey.places.get(place))
    };
    !required.files.is_empty() && !required.files.iter().zip(&required.places).any(absent)
}

fn plan_derivation(
    at: ModelIndex,
    derive: &DeriveRequirement,
    engines: &[EngineRequirement],
    models: &[ModelRequirement],
) -> Step {
    Step::Derive {
        model: models[at.0].name.clone(),
        from: derive.from.iter().map(|from| models[from.0].name.clone()).collect(),
        engine: engines[derive.engine.0].name.clone(),
        how: derive.how.clone(),
        fingerprint: derive.fingerprint,
        reason: Reason::Missing,
        at,
    }
}

fn plan_model(at: ModelIndex, required: &ModelRequirement, survey: &Survey) -> Vec<Step> {
    let presence = |index: &usize| {
        let place = survey.places.get(&required.places[*index]).copied().unwrap_or(Presence::Missing);
        let blob = survey.blobs.get(&required.files[*index].sha256).copied().unwrap_or(Presence::Missing);
        (place, blob)
    };
    let pick = |wanted: &dyn Fn((Presence, Presence)) -> bool| -> Vec<usize> {
        (0..required.files.len()).filter(|index| wanted(presence(index))).collect()
    };
    let bytes = |files: &[usize]| files.iter().map(|index| required.files[*index].size).sum();
    use Presence::{Missing, Unverified, Verified};
    let hash = pick(&|at| matches!(at, (Unverified, Missing | Unverified) | (Missing, Unverified)));
    let fetch = pick(&|at| matches!(at, (Missing, Missing)));
    let place = pick(&|(place, blob)| blob == Verified && place != Verified);
    let model = || required.name.clone();
    let mut steps = Vec::new();
    if !hash.is_empty() {
        steps.push(Step::Hash { model: model(), bytes: bytes(&hash), files: hash, reason: Reason::Unverified, at });
    }
    if !fetch.is_empty() {
        steps.push(Step::FetchWeights {
            model: model(),
            bytes: bytes(&fetch),
            files: fetch,
            reason: Reason::Missing,
            at,
        });
    }
    if !place.is_empty() {
        steps.push(Step::Place { model: model(), files: place, reason: Reason::NotLinked, at });
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::manifest::{PathSpec, SourceSpec};

    fn file(path: &str) -> FilePin {
        FilePin { path: path.parse().unwrap(), size: 10, sha256: Digest::of(path.as_bytes()) }
    }

    fn spec(weights: Option<&str>) -> ModelSpec {
        let source = SourceSpec::Path(PathSpec { path: "x".into(), files: vec![] });
        ModelSpec {
            source: Some(source),
            derive: None,
            place: Some("models/e/m".parse().unwrap()),
            weights: weights.map(|w| w.parse().unwrap()),
        }
    }

    fn main_of(paths: &[&str], weights: Option<&str>) -> Result<(String, usize), LayoutError> {
        let files: Vec<FilePin> = paths.iter().map(|path| file(path)).collect();
        layout(&"m".parse().unwrap(), &spec(weights), &files)
            .map(|l| (l.main.map_or_else(String::new, |main| main.to_string()), l.parts.len()))
    }

    #[test]
    fn the_main_file_and_its_name() {
        let ok = |main: &str, parts| Ok((main.to_owned(), parts));
        assert_eq!(main_of(&["d/a.gguf"], None), ok("models/e/m/d/a.gguf", 1));
        assert_eq!(main_of(&["d/a.gguf", "activation/x"], Some("w.gguf")), ok("models/e/m/w.gguf", 1));
        let split = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"];
        assert_eq!(main_of(&split, Some("w.gguf")), ok("models/e/m/a-00001-of-00002.gguf", 2));
        assert_eq!(main_of(&["x.txt"], None), ok("", 0));
        assert!(matches!(main_of(&["a.gguf", "b.gguf"], None), Err(LayoutError::Ambiguous(_))));
        assert!(matches!(main_of(&["a.gguf", "W.gguf/x"], Some("w.gguf/X")), Err(LayoutError::Collision(_))));
    }

    fn package(name: &str) -> PackageRequirement {
        let request =
            PypiSpec { pypi: name.to_owned(), version: "1".to_owned(), sdist: false, subdir: None, files: Vec::new() };
        PackageRequirement { name: name.parse().unwrap(), request, package: file(&format!("{name}.whl")) }
    }

    fn words(plan: &Plan) -> Vec<String> {
        let word = |step: &Step| match step {
            Step::FetchTool { name, .. } => format!("tool {name}"),
            Step::FetchSource { engine, .. } => format!("source {engine}"),
            Step::Build { engine, .. } => format!("build {engine}"),
            Step::LinkBuild { engine, .. } => format!("link {engine}"),
            Step::Hash { files, .. } => format!("hash {files:?}"),
            Step::FetchWeights { files, bytes, .. } => format!("fetch {files:?} {bytes}"),
            Step::Place { files, .. } => format!("place {files:?}"),
            Step::Derive { model, .. } => format!("derive {model}"),
        };
        plan.steps.iter().map(word).collect()
    }

    #[test]
    fn an_engine_is_fetched_built_and_linked_only_as_far_as_needed() {
        let required = |name: &str| EngineRequirement {
            name: name.parse().unwrap(),
            variant: Variant::Cpu,
            fingerprint: Digest::of(name.as_bytes()),
            tree: Digest::of(b"tree"),
            tools: vec![package("ninja")],
            linked: true,
            wanted: true,
        };
        let mut survey = Survey::default();
        let both = [required("a"), required("b")];
        let all = ["tool ninja", "source a", "build a", "link a", "build b", "link b"];
        assert_eq!(words(&plan(&both, &[], &survey)), all);
        survey.trees.insert(Digest::of(b"tree"));
        survey.tools.insert(file("ninja.whl").sha256);
        assert_eq!(words(&plan(&both[..1], &[], &survey)), ["build a", "link a"]);
        survey.trees.clear();
        survey.tools.clear();
        survey.artifacts.insert(both[0].fingerprint);
        assert_eq!(words(&plan(&both[..1], &[], &survey)), ["link a"]);
        survey.links.insert("a".parse().unwrap(), both[0].fingerprint);
        assert!(plan(&both[..1], &[], &survey).is_empty());
        survey.links.insert("a".parse().unwrap(), Digest::of(b"older"));
        assert_eq!(words(&plan(&both[..1], &[], &survey)), ["link a"]);
    }

    #[test]
    fn weights_are_hashed_fetched_and_placed_only_as_far_as_needed() {
        use Presence::{Missing, Unverified, Verified};
        let table: [((Presence, Presence), &[&str]); 9] = [
            ((Verified, Verified), &[]),
            ((Verified, Unverified), &[]),
            ((Verified, Missing), &[]),
            ((Unverified, Verified), &["place [0]"]),
            ((Unverified, Unverified), &["hash [0]"]),
            ((Unverified, Missing), &["hash [0]"]),
            ((Missing, Verified), &["place [0]"]),
            ((Missing, Unverified), &["hash [0]"]),
            ((Missing, Missing), &["fetch [0] 10"]),
        ];
        for ((place, blob), expected) in table {
            let (path, required): (RelPath, _) = ("models/m/w".parse().unwrap(), model("m", "w", None));
            let survey = Survey {
                blobs: BTreeMap::from([(file("w").sha256, blob)]),
                places: BTreeMap::from([(path, place)]),
                ..Survey::default()
            };
            assert_eq!(words(&plan(&[], &[required], &survey)), expected, "{place:?} {blob:?}");
        }
    }

    fn model(name: &str, path: &str, from: Option<usize>) -> ModelRequirement {
        let derive = from.map(|from| DeriveRequirement {
            fingerprint: Digest::of(name.as_bytes()),
            from: vec![ModelIndex(from)],
            how: "quantize to Q4_0".to_owned(),
            engine: EngineIndex(0),
            with: DerivesWith::Build,
            packages: Vec::new(),
        });
        let place = format!("models/{name}/{path}").parse().unwrap();
        ModelRequirement {
            name: name.parse().unwrap(),
            files: vec![file(path)],
            places: vec![place],
            derive,
            wanted: true,
        }
    }

    #[test]
    fn a_model_is_derived_with_what_that_takes_and_nothing_more() {
        use Presence::{Missing, Unverified, Verified};
        let engine = EngineRequirement {
            name: "e".parse().unwrap(),
            variant: Variant::Cpu,
            fingerprint: Digest::of(b"build"),
            tree: Digest::of(b"tree"),
            tools: Vec::new(),
            linked: false,
            wanted: false,
        };
        let input = |required: ModelRequirement| ModelRequirement { wanted: false, ..required };
        let of = |from: ModelRequirement, middle: Option<Presence>, last: Option<Presence>| {
            // a, from which b is derived, from which c is; a standing of None: there is not even a record.
            let mut requirements = [from, input(model("b", "b.gguf", Some(0))), model("c", "c.gguf", Some(1))];
            let mut survey = Survey::default();
            for (required, standing) in requirements[1..].iter_mut().zip([middle, last]) {
                match standing {
                    Some(standing) => drop(survey.places.insert(required.places[0].clone(), standing)),
                    None => (required.files, required.places) = (Vec::new(), Vec::new()),
                }
            }
            words(&plan(std::slice::from_ref(&engine), &requirements, &survey)).join(", ")
        };
        let a = || input(model("a", "a.gguf", None));
        let all = "source e, build e, fetch [0] 10, derive b, derive c";
        assert_eq!(of(a(), None, None), all);
        assert_eq!(of(a(), Some(Missing), Some(Missing)), all);
        assert_eq!(of(a(), Some(Verified), Some(Missing)), "source e, build e, derive c");
        assert_eq!(of(a(), Some(Unverified), None), "source e, build e, hash [0], derive c");
        assert_eq!(of(a(), None, Some(Verified)), "", "what it was made from is not needed any more");
        assert_eq!(of(a(), None, Some(Unverified)), "hash [0]");
        assert_eq!(of(ModelRequirement { wanted: true, ..a() }, None, Some(Verified)), "fetch [0] 10");
    }

    #[test]
    fn a_conversion_needs_the_source_and_the_packages_but_no_build() {
        let engine = EngineRequirement {
            name: "e".parse().unwrap(),
            variant: Variant::Cpu,
            fingerprint: Digest::of(b"build"),
            tree: Digest::of(b"tree"),
            tools: vec![package("ninja")],
            linked: true,
            wanted: false,
        };
        let mut made = ModelRequirement { files: Vec::new(), places: Vec::new(), ..model("b", "b.gguf", Some(0)) };
        if let Some(derive) = &mut made.derive {
            (derive.with, derive.packages) = (DerivesWith::Source, vec![package("numpy"), package("torch")]);
        }
        let requirements = [ModelRequirement { wanted: false, ..model("a", "a.bin", None) }, made];
        let mut survey = Survey { tools: BTreeSet::from([file("torch.whl").sha256]), ..Survey::default() };
        let engines = [engine];
        assert_eq!(
            words(&plan(&engines, &requirements, &survey)),
            ["source e", "tool numpy", "fetch [0] 10", "derive b"]
        );
        survey.trees.insert(Digest::of(b"tree"));
        survey.tools.insert(file("numpy.whl").sha256);
        assert_eq!(words(&plan(&engines, &requirements, &survey)), ["fetch [0] 10", "derive b"]);
    }
}
