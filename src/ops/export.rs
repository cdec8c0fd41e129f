//! `export`: evidence of what is installed. A CycloneDX bill of materials, and signed with a key of the user's: an in-toto
//! statement with SLSA provenance for each engine, and an OpenSSF Model Signing bundle for each model.
//!
//! Provenance made on the user's own machine is SLSA Build L1, and no more.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde_json::Value as Json;

use crate::base::fs;
use crate::base::name::Name;
use crate::engine::gguf;
use crate::format::cyclonedx::{
    Bom, Component, Data, Hash, License, LicenseName, Metadata, ModelCard, ModelParameters, Needs, Property, Tools,
};
use crate::format::dsse::{Envelope, IN_TOTO, PrivateKey};
use crate::format::in_toto::{
    self, BUILD_TYPE, BUNDLE, BuildDefinition, Builder, Bundle, Dependency, External, Hint, Material, PROVENANCE,
    Provenance, RunDetails, STATEMENT, Statement, Subject,
};
use crate::format::lockfile::{FilesOrigin, ModelPin, Origin};
use crate::format::manifest::PypiSpec;
use crate::format::policy::{self, Output};

use super::demand::{Demand, EngineDemand, ModelDemand, select};
use super::evidence::{self, FOLDER, VARIANT};
use super::project::PolicyFile;
use super::{Failure, Host, Project, lock, sync};

/// Bytes of a licence's file that are looked at.
const LICENSE_HEAD_BYTES: u64 = 2048;

/// A file that was written.
#[derive(Debug, Serialize)]
pub struct Written {
    /// Where.
    pub path: PathBuf,
    /// What it is.
    pub what: String,
    /// Whether it is signed.
    pub signed: bool,
}

/// Writes evidence of what the named policies need, or of the whole manifest, into a folder.
///
/// # Errors
/// When something is not synced, the key cannot be read, or a file cannot be written.
pub fn run(
    host: &Host,
    project: &Project,
    names: &[String],
    folder: &Path,
    key: Option<&Path>,
) -> Result<Vec<Written>, Failure> {
    let key_path = key;
    let key = match key {
        Some(path) => {
            let text = evidence::read_key(path)?;
            Some(PrivateKey::from_pem(&text).map_err(|error| evidence::bad_key(path, &error))?)
        }
        None => None,
    };
    let lockfile = lock::require(project)?;
    let demand = sync::require_synced(host, project, &lockfile, names)?;
    let engines: Vec<&EngineDemand<'_>> = demand.engines.iter().filter(|engine| engine.required.wanted).collect();
    let models: Vec<&ModelDemand<'_>> = demand.models.iter().filter(|model| model.required.wanted).collect();
    let mut written = Vec::new();
    let mut write = |name: String, json: Result<String, serde_json::Error>, what: String, signed: bool| {
        let path = folder.join(name);
        if key_path.is_some_and(|key| fs::is_same(key, &path)) {
            let what = format!("`{}` is the key, and would be overwritten", path.display());
            return Err(Failure::Usage { what, hint: Some("keep the key elsewhere".to_owned()) });
        }
        let text = json.map_err(|error| fs::FsError::new("write", &path, error.into()))?;
        fs::write_atomic(&path, format!("{text}\n").as_bytes())?;
        written.push(Written { path, what, signed });
        Ok::<(), Failure>(())
    };
    fs::create_dir_all(folder)?;
    let bom = bill(host, project, names, &demand)?;
    write("sbom.cdx.json".to_owned(), serde_json::to_string_pretty(&bom), "bill of materials".to_owned(), false)?;
    for engine in engines {
        let (name, variant) = (&engine.required.name, engine.required.variant);
        let statement = provenance(host, engine);
        let what = format!("provenance of engine {name} ({variant})");
        let json = signed_or_plain(&statement, key.as_ref());
        write(format!("{name}-{variant}.intoto.json"), json, what, key.is_some())?;
    }
    for model in models {
        let (folder, files) = evidence::model_files(model);
        let statement = in_toto::of_model(&folder, &files);
        let Some(key) = &key else { continue };
        let json = serde_json::to_vec(&statement).and_then(|payload| {
            let public_key = Hint { hint: key.public().id() };
            let verification_material = Material { public_key, tlog_entries: Vec::new() };
            let dsse_envelope = Envelope::sign(&payload, IN_TOTO, key);
            serde_json::to_string_pretty(&Bundle {
                media_type: BUNDLE.to_owned(),
                verification_material,
                dsse_envelope,
            })
        });
        let name = &model.required.name;
        write(format!("{name}.model.sig"), json, format!("signature of model {name}"), true)?;
    }
    Ok(written)
}

fn signed_or_plain(statement: &Statement, key: Option<&PrivateKey>) -> Result<String, serde_json::Error> {
    match key {
        None => serde_json::to_string_pretty(statement),
        Some(key) => serde_json::to_string_pretty(&Envelope::sign(&serde_json::to_vec(statement)?, IN_TOTO, key)),
    }
}

/// How an engine was built.
fn provenance(host: &Host, engine: &EngineDemand<'_>) -> Statement {
    let required = &engine.required;
    let receipt = host.store.receipt_of(&required.fingerprint).map(|artifact| artifact.receipt);
    let (files, notes) = receipt.map(|receipt| (receipt.files, receipt.notes)).unwrap_or_default();
    let subject = |(path, file): (&crate::base::name::RelPath, &crate::format::receipt::InstalledFile)| Subject {
        name: path.to_string(),
        digest: in_toto::sha256(&file.sha256),
    };
    let mut dependencies = vec![source(engine)];
    dependencies.extend(required.tools.iter().map(|tool| Dependency {
        uri: pypi_url(&tool.request),
        digest: in_toto::sha256(&tool.package.sha256),
        name: tool.name.to_string(),
    }));
    let metadata = notes.into_iter().filter(|(name, _)| name != "place").map(|(name, note)| (name, Json::String(note)));
    let predicate = Provenance {
        build_definition: BuildDefinition {
            build_type: BUILD_TYPE.to_owned(),
            external_parameters: External {
                engine: required.name.to_string(),
                variant: required.variant.to_string(),
                source: serde_json::to_value(engine.entry.origin.request()).unwrap_or_default(),
            },
            internal_parameters: engine.inputs.clone(),
            resolved_dependencies: dependencies,
        },
        run_details: RunDetails {
            builder: Builder { id: format!("urn:aitools:builder:{}", env!("CARGO_PKG_VERSION")) },
            metadata: [("aitools:notes".to_owned(), Json::Object(metadata.collect()))].into(),
        },
    };
    Statement {
        kind: STATEMENT.to_owned(),
        subject: files.iter().map(subject).collect(),
        predicate_type: PROVENANCE.to_owned(),
        predicate: serde_json::to_value(predicate).unwrap_or_default(),
    }
}

/// The package URL of a Python package.
fn pypi_url(request: &PypiSpec) -> String {
    format!("pkg:pypi/{}@{}", request.pypi, request.version)
}

/// The source that an engine was built from. `aitoolsTree` is the digest of its listing, as in the lockfile.
fn source(engine: &EngineDemand<'_>) -> Dependency {
    let mut digest: in_toto::DigestSet = [("aitoolsTree".to_owned(), engine.entry.tree.hex())].into();
    let uri = match &engine.entry.origin {
        Origin::Git { request, pin } => {
            digest.insert("gitCommit".to_owned(), pin.commit.to_string());
            format!("git+{}@{}", request.git, pin.commit)
        }
        Origin::Url { request, download } => {
            digest.extend(in_toto::sha256(&download.sha256));
            request.url.clone()
        }
        Origin::Pypi { request, download } => {
            digest.extend(in_toto::sha256(&download.sha256));
            pypi_url(request)
        }
        Origin::Path { .. } => format!("urn:aitools:tree:{}", engine.entry.tree.hex()),
    };
    Dependency { uri, digest, name: "source".to_owned() }
}

/// The bill of materials: engines with their files, models with theirs, and the policies that use them.
fn bill(host: &Host, project: &Project, names: &[String], demand: &Demand<'_>) -> Result<Bom, Failure> {
    let mut components = Vec::new();
    let mut dependencies = Vec::new();
    for engine in demand.engines.iter().filter(|engine| engine.required.wanted) {
        components.push(engine_part(host, engine));
    }
    for model in demand.models.iter().filter(|model| model.required.wanted) {
        components.push(model_part(project, model, names)?);
    }
    for file in select(project, names)? {
        let Some((engine, model)) = uses(project, file) else { continue };
        let reference = format!("policy:{}", file.name);
        components.push(Component {
            reference: reference.clone(),
            hashes: vec![Hash { alg: "SHA-256".to_owned(), content: file.digest.hex() }],
            data: vec![Data { kind: "configuration".to_owned() }],
            ..Component::new("data", &file.name)
        });
        let is_used = |component: &&Component| {
            component.reference.starts_with(&format!("engine:{engine}:"))
                || component.reference == format!("model:{model}")
        };
        let depends_on = components.iter().filter(is_used).map(|component| component.reference.clone()).collect();
        dependencies.push(Needs { reference, depends_on });
    }
    let name = project.root.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let ours =
        Component { version: Some(env!("CARGO_PKG_VERSION").to_owned()), ..Component::new("application", "aitools") };
    Ok(Bom {
        bom_format: "CycloneDX".to_owned(),
        spec_version: "1.6".to_owned(),
        version: 1,
        metadata: Metadata {
            timestamp: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            tools: Tools { components: vec![ours] },
            component: Component { reference: "project".to_owned(), ..Component::new("application", &name) },
        },
        components,
        dependencies,
    })
}

/// The engine and the model that a policy uses.
fn uses(project: &Project, file: &PolicyFile) -> Option<(Name, Name)> {
    let resolved = policy::resolve(&file.policy, &project.manifest.value).ok()?;
    Some((resolved.engine.0.clone(), resolved.model.0.clone()))
}

fn engine_part(host: &Host, engine: &EngineDemand<'_>) -> Component {
    let required = &engine.required;
    let (name, variant) = (required.name.as_str(), required.variant.as_str());
    let origin = &engine.entry.origin;
    let (version, purl) = match origin {
        Origin::Pypi { request, .. } => (request.version.clone(), Some(pypi_url(request))),
        Origin::Git { pin, .. } => (pin.commit.to_string(), None),
        Origin::Url { .. } | Origin::Path { .. } => (engine.entry.tree.short(), None),
    };
    let files = evidence::engine_files(host, engine);
    let facts: BTreeMap<String, String> = [
        (VARIANT.to_owned(), variant.to_owned()),
        ("aitools:fingerprint".to_owned(), required.fingerprint.to_string()),
        ("aitools:source".to_owned(), origin.in_words()),
        ("aitools:tree".to_owned(), engine.entry.tree.to_string()),
    ]
    .into();
    Component {
        reference: format!("engine:{name}:{variant}"),
        version: Some(version),
        purl,
        licenses: engine_license(&host.store.tree_path(&engine.entry.tree)).into_iter().collect(),
        properties: Component::properties(&facts),
        components: Component::files(files.iter().map(|(path, digest)| (path.as_str(), *digest))),
        ..Component::new("application", name)
    }
}

/// The licence in an engine's source, when it is one of the usual ones.
fn engine_license(tree: &Path) -> Option<License> {
    let texts = [("MIT License", "MIT"), ("Apache License", "Apache-2.0"), ("BSD 3-Clause", "BSD-3-Clause")];
    let head = ["LICENSE", "LICENSE.txt", "LICENSE.md", "COPYING"]
        .iter()
        .find_map(|name| fs::read_head(&tree.join(name), LICENSE_HEAD_BYTES).ok())?;
    let head = String::from_utf8_lossy(&head).into_owned();
    let (_, id) = texts.into_iter().find(|(text, _)| head.contains(text))?;
    Some(License { license: LicenseName::Id(id.to_owned()) })
}

fn model_part(project: &Project, model: &ModelDemand<'_>, names: &[String]) -> Result<Component, Failure> {
    let name = model.required.name.as_str();
    let (folder, files) = evidence::model_files(model);
    let (version, purl) = match &model.entry.pin {
        ModelPin::Files { origin: FilesOrigin::Hub { request, commit }, .. } => {
            (commit.to_string(), Some(format!("pkg:huggingface/{}@{commit}", request.hf)))
        }
        ModelPin::Files { origin: FilesOrigin::Other(Origin::Pypi { request, .. }), .. } => {
            (request.version.clone(), Some(pypi_url(request)))
        }
        ModelPin::Files { files, .. } => (files.first().map_or_else(String::new, |file| file.sha256.short()), None),
        ModelPin::Derived { inputs, .. } => (inputs.short(), None),
    };
    // The header says what a model is; a folder of safetensors has none.
    let main = model.layout.main.as_ref().map(|main| main.under(&project.root));
    let header = main.and_then(|main| gguf::read(&main).ok()).map(|(header, _)| header);
    let text = |key: &str| header.as_ref().and_then(|header| header.text(key)).map(str::to_owned);
    let license = text("general.license").map(|name| License { license: LicenseName::Name(name) });
    let used_for = |file: &&PolicyFile| uses(project, file).is_some_and(|(_, model)| model.as_str() == name);
    let output = select(project, names)?.into_iter().find(used_for).and_then(|file| file.policy.value.runtime.output);
    let task = match output {
        None | Some(Output::Text) => "text-generation",
        Some(Output::Embeddings) => "feature-extraction",
        Some(Output::Ranking) => "text-ranking",
    };
    let architecture_family = header.as_ref().and_then(|header| header.architecture()).map(str::to_owned);
    Ok(Component {
        reference: format!("model:{name}"),
        version: Some(version),
        purl,
        licenses: license.into_iter().collect(),
        model_card: Some(ModelCard {
            model_parameters: ModelParameters { task: task.to_owned(), architecture_family },
        }),
        properties: vec![Property { name: FOLDER.to_owned(), value: folder }],
        components: Component::files(files.iter().map(|(path, digest)| (path.as_str(), *digest))),
        ..Component::new("machine-learning-model", name)
    })
}
