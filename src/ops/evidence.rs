//! What this machine has, as claims that evidence can be compared with: every file of the installed engines and of the models,
//! by name, with its SHA-256. And the claims of evidence that somebody else gives.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::name::RelPath;
use crate::format::cyclonedx::{Bom, Component};
use crate::format::dsse::{DsseError, Envelope, IN_TOTO, PublicKey};
use crate::format::in_toto::{
    BUILD_TYPE, Bundle, DigestSet, MODEL, ModelFiles, PROVENANCE, Provenance, STATEMENT, Statement, of_model,
};

use super::demand::{Demand, EngineDemand, ModelDemand, demand};
use super::failure::Damaged;
use super::install::Purpose;
use super::{Failure, Host, Project, lock};

/// Bytes of evidence at most.
const MAX_BYTES: u64 = 64 << 20;

/// The property of a bill of materials that names an engine's variant.
pub const VARIANT: &str = "aitools:variant";
/// The property that names a model's folder.
pub const FOLDER: &str = "aitools:folder";

/// Digests of files by their path.
pub type Files = BTreeMap<String, Digest>;

/// An engine or a model, as evidence names it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Subject {
    /// By its name in the manifest, and its variant.
    Engine(String, String),
    /// By its name in the manifest.
    Model(String),
    /// A model by the last name of its folder, which several may have in common.
    Folder(String),
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Engine(name, variant) => write!(f, "engine {name} ({variant})"),
            Self::Model(name) | Self::Folder(name) => write!(f, "model {name}"),
        }
    }
}

/// What is said of the files of an engine or model: all that it has.
type Claims = Vec<(Subject, Files)>;

/// The files of an installed engine.
pub fn engine_files(host: &Host, engine: &EngineDemand<'_>) -> BTreeMap<RelPath, Digest> {
    let receipt = host.store.receipt_of(&engine.required.fingerprint);
    receipt
        .map(|artifact| artifact.receipt.files)
        .unwrap_or_default()
        .into_iter()
        .map(|(path, file)| (path, file.sha256))
        .collect()
}

/// The folder that a model's files have in the project, and the files by their path below it.
pub fn model_files(model: &ModelDemand<'_>) -> (String, Files) {
    let folder = model.required.places.iter().map(|place| fs::parent(Path::new(place.as_str())).to_owned());
    let common = |one: PathBuf, other: PathBuf| {
        let both = one.components().zip(other.components()).take_while(|(one, other)| one == other);
        both.map(|(part, _)| part.as_os_str()).collect()
    };
    let folder = folder.reduce(common).unwrap_or_default();
    let name = |place: &RelPath| {
        let path = Path::new(place.as_str());
        path.strip_prefix(&folder).unwrap_or(path).to_string_lossy().replace('\\', "/")
    };
    let files = model.required.places.iter().zip(&model.required.files).map(|(place, pin)| (name(place), pin.sha256));
    (folder.file_name().unwrap_or_default().to_string_lossy().into_owned(), files.collect())
}

/// What a demand has on this machine, each with the names that evidence may have for it.
fn here(host: &Host, demand: &Demand<'_>) -> Vec<(Vec<Subject>, Files)> {
    let engines = demand.engines.iter().filter(|engine| engine.required.wanted).map(|engine| {
        let (name, variant) = (engine.required.name.to_string(), engine.required.variant.to_string());
        let files = engine_files(host, engine).into_iter().map(|(path, digest)| (path.to_string(), digest));
        (vec![Subject::Engine(name, variant)], files.collect())
    });
    let models = demand.models.iter().filter(|model| model.required.wanted).map(|model| {
        let (folder, files) = model_files(model);
        (vec![Subject::Model(model.required.name.to_string()), Subject::Folder(folder)], files)
    });
    engines.chain(models).collect()
}

/// What differs between what is said and what is here, in both directions: path, said, here.
fn differences(said: &Files, here: &Files) -> Vec<(String, Option<Digest>, Option<Digest>)> {
    let paths: std::collections::BTreeSet<&String> = said.keys().chain(here.keys()).collect();
    let both = paths.into_iter().map(|path| (path.clone(), said.get(path).copied(), here.get(path).copied()));
    both.filter(|(_, said, here)| said != here).collect()
}

/// How evidence compares with this machine.
#[derive(Debug, serde::Serialize)]
pub struct Compared {
    /// Number of claims that hold here.
    pub equal: usize,
    /// Number of files of engines and models here that the evidence is not about.
    pub unnamed: usize,
    /// Whether a signature over the evidence was valid; None when it has none.
    pub signed: Option<bool>,
    /// What is otherwise here.
    #[serde(skip)]
    pub damages: Vec<Damaged>,
}

/// Compares evidence with what the named policies need; call it after [`super::verify::run`] has hashed that. An engine or
/// model that they do not need was not hashed, and counts as missing.
///
/// # Errors
/// When the evidence cannot be read, its signature is not valid for the key, or it says nothing that can be compared.
pub fn compare(
    host: &Host,
    project: &Project,
    names: &[String],
    path: &Path,
    key: Option<&Path>,
) -> Result<Compared, Failure> {
    let lockfile = lock::require(project)?;
    let demand = demand(host, project, &lockfile, names, Purpose::Install)?;
    let shown = path.display().to_string();
    let unusable = |why: String| {
        let what = format!("`{shown}` is no evidence that can be compared: {why}");
        Failure::Usage { what, hint: None }
    };
    let key = key.map(read_public).transpose()?;
    let (claims, signed) = claims_in(&fs::read_bounded(path, MAX_BYTES)?, key.as_ref()).map_err(unusable)?;
    if claims.iter().all(|(_, files)| files.is_empty()) {
        return Err(unusable("it names no file of an engine or model".to_owned()));
    }
    if signed.is_none() && key.is_some() {
        return Err(unusable("it is not signed, and a public key was given".to_owned()));
    }
    let mut here = here(host, &demand);
    let mut compared = Compared { equal: 0, unnamed: 0, signed, damages: Vec::new() };
    for (subject, said) in claims {
        // Of several models whose folders have one name, the one that is most alike.
        let alike = here.iter().enumerate().filter(|(_, (names, _))| names.contains(&subject));
        let nearest = alike.min_by_key(|(_, (_, files))| differences(&said, files).len()).map(|(index, _)| index);
        let files = nearest.map(|index| here.remove(index).1).unwrap_or_default();
        let differing = differences(&said, &files);
        compared.equal += said.len() - differing.iter().filter(|(_, said, _)| said.is_some()).count();
        for (path, expected, computed) in differing {
            compared.damages.push(Damaged {
                path: PathBuf::from(path),
                what: subject.to_string(),
                expected: expected.map_or_else(|| "no such file".to_owned(), |digest| digest.to_string()),
                computed: computed.map(|digest| digest.to_string()),
                size_bytes: None,
                recorded_in: shown.clone(),
            });
        }
    }
    compared.unnamed = here.iter().map(|(_, files)| files.len()).sum();
    Ok(compared)
}

/// A public key's file.
fn read_public(path: &Path) -> Result<PublicKey, Failure> {
    PublicKey::from_pem(&read_key(path)?).map_err(|error| bad_key(path, &error))
}

/// The text of a key's file.
///
/// # Errors
/// When it cannot be read.
pub fn read_key(path: &Path) -> Result<String, Failure> {
    Ok(String::from_utf8_lossy(&fs::read_bounded(path, 1 << 16)?).into_owned())
}

/// A key's file that is of no use.
pub fn bad_key(path: &Path, error: &DsseError) -> Failure {
    Failure::Usage { what: format!("`{}`: {error}", path.display()), hint: None }
}

/// The claims of evidence in any of the forms that are known, and whether they were signed with the key.
fn claims_in(bytes: &[u8], key: Option<&PublicKey>) -> Result<(Claims, Option<bool>), String> {
    let json: Json = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let of = |error: serde_json::Error| error.to_string();
    if json.get("bomFormat").is_some() {
        let bom: Bom = serde_json::from_value(json).map_err(of)?;
        return Ok((of_bom(&bom)?, None));
    }
    let envelope = match (json.get("dsseEnvelope"), json.get("payload")) {
        (Some(_), _) => serde_json::from_value::<Bundle>(json.clone()).map_err(of)?.dsse_envelope,
        (_, Some(_)) => serde_json::from_value::<Envelope>(json.clone()).map_err(of)?,
        _ => return Ok((of_statement(serde_json::from_value(json).map_err(of)?)?, None)),
    };
    if envelope.payload_type != IN_TOTO {
        return Err(format!("its payload is `{}`, not `{IN_TOTO}`", envelope.payload_type));
    }
    let key = key.ok_or("it is signed: give the signer's key with `--public-key FILE`")?;
    let payload = envelope.open(key).map_err(|error| error.to_string())?;
    Ok((of_statement(serde_json::from_slice(&payload).map_err(of)?)?, Some(true)))
}

fn of_statement(statement: Statement) -> Result<Claims, String> {
    if statement.kind != STATEMENT {
        return Err(format!("a statement of type `{}`", statement.kind));
    }
    match statement.predicate_type.as_str() {
        PROVENANCE => {
            let provenance: Provenance =
                serde_json::from_value(statement.predicate).map_err(|error| error.to_string())?;
            let definition = provenance.build_definition;
            if definition.build_type != BUILD_TYPE {
                return Err(format!("a build of type `{}`", definition.build_type));
            }
            let asked = definition.external_parameters;
            let named = statement.subject.into_iter().map(|subject| Ok((subject.name, digest(&subject.digest)?)));
            Ok(vec![(Subject::Engine(asked.engine, asked.variant), each_once(named)?)])
        }
        MODEL => {
            let files: ModelFiles =
                serde_json::from_value(statement.predicate.clone()).map_err(|error| error.to_string())?;
            let [folder] = &statement.subject[..] else { return Err("not one model".to_owned()) };
            let named = files.resources.into_iter().map(|file| Ok((file.name, hex(&file.digest)?)));
            let files = each_once(named)?;
            if of_model(&folder.name, &files).subject != statement.subject {
                return Err("the digest of the model is not that of its files".to_owned());
            }
            Ok(vec![(Subject::Folder(folder.name.clone()), files)])
        }
        other => Err(format!("a predicate of type `{other}`")),
    }
}

fn of_bom(bom: &Bom) -> Result<Claims, String> {
    let mut claims = Claims::new();
    for component in &bom.components {
        let name = component.name.clone();
        let variant = component.properties.iter().find(|property| property.name == VARIANT);
        let subject = match (variant, component.kind.as_str()) {
            (Some(variant), _) => Subject::Engine(name, variant.value.clone()),
            (None, "machine-learning-model") => Subject::Model(name),
            _ => continue,
        };
        if claims.iter().any(|(other, _)| *other == subject) {
            return Err(format!("it has {subject} twice"));
        }
        let named = component.components.iter().map(|file| Ok((file.name.clone(), of_file(file)?)));
        claims.push((subject, each_once(named)?));
    }
    Ok(claims)
}

/// Files by their names; one that has two digests has none.
fn each_once(named: impl Iterator<Item = Result<(String, Digest), String>>) -> Result<Files, String> {
    let mut files = Files::new();
    for file in named {
        let (name, digest) = file?;
        if files.insert(name.clone(), digest).is_some() {
            return Err(format!("it names `{name}` twice"));
        }
    }
    Ok(files)
}

fn of_file(file: &Component) -> Result<Digest, String> {
    let hash = file.hashes.iter().find(|hash| hash.alg == "SHA-256");
    hex(&hash.ok_or_else(|| format!("`{}` has no SHA-256", file.name))?.content)
}

fn digest(digests: &DigestSet) -> Result<Digest, String> {
    hex(digests.get("sha256").ok_or("a subject without SHA-256")?)
}

fn hex(text: &str) -> Result<Digest, String> {
    Digest::from_hex(text).map_err(|error| error.to_string())
}
