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
use super::{Failure, Host, Project, lock, sync};

/// Bytes of evidence at most.
const MAX_BYTES: u64 = 64 << 20;

/// The property of a bill of materials that names an engine's variant.
pub const VARIANT: &str = "aitools:variant";
/// The property that names a model's folder.
pub const FOLDER: &str = "aitools:folder";

/// Digests of files by what they are: `engine llama-cpp (cpu): bin/llama-server`.
pub type Claims = BTreeMap<String, Digest>;

/// How a claim about an engine's file is named.
fn engine_file(engine: &str, variant: &str, path: &str) -> String {
    format!("engine {engine} ({variant}): {path}")
}

/// How a claim about a model's file is named.
fn model_file(folder: &str, path: &str) -> String {
    format!("model {folder}: {path}")
}

/// The engine or model that a claim is about.
fn subject(claim: &str) -> &str {
    claim.split_once(": ").map_or(claim, |(subject, _)| subject)
}

/// What everything that the named policies need is, when all of it is here and verified.
///
/// # Errors
/// [`Failure::NotSynced`] when something is missing.
pub fn complete<'a>(
    host: &Host,
    project: &'a Project,
    lockfile: &'a crate::format::lockfile::Lockfile,
    names: &[String],
) -> Result<Demand<'a>, Failure> {
    let demand = demand(host, project, lockfile, names, Purpose::Install)?;
    let plan = sync::plan_for(host, project, &demand)?;
    if !plan.is_empty() {
        return Err(Failure::NotSynced { steps: plan.steps });
    }
    Ok(demand)
}

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
pub fn model_files(model: &ModelDemand<'_>) -> (String, BTreeMap<String, Digest>) {
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

/// Every claim about this machine.
fn claims_here(host: &Host, demand: &Demand<'_>) -> Claims {
    let mut claims = Claims::new();
    for engine in demand.engines.iter().filter(|engine| engine.required.wanted) {
        let (name, variant) = (engine.required.name.as_str(), engine.required.variant.as_str());
        let files = engine_files(host, engine).into_iter();
        claims.extend(files.map(|(path, digest)| (engine_file(name, variant, path.as_str()), digest)));
    }
    for model in demand.models.iter().filter(|model| model.required.wanted) {
        let (folder, files) = model_files(model);
        claims.extend(files.into_iter().map(|(path, digest)| (model_file(&folder, &path), digest)));
    }
    claims
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

/// Compares evidence with what is installed; call it after [`super::verify::run`] has hashed everything.
///
/// # Errors
/// When the evidence cannot be read, its signature is not valid for the key, or it says nothing that can be compared.
pub fn compare(host: &Host, project: &Project, path: &Path, key: Option<&Path>) -> Result<Compared, Failure> {
    let lockfile = lock::require(project)?;
    let demand = demand(host, project, &lockfile, &[], Purpose::Install)?;
    let (here, shown) = (claims_here(host, &demand), path.display().to_string());
    let unusable = |why: String| Failure::Usage {
        what: format!("`{shown}` is no evidence that can be compared: {why}"),
        hint: None,
    };
    let key = key.map(read_public).transpose()?;
    let (claims, signed) = claims_in(&fs::read_bounded(path, MAX_BYTES)?, key.as_ref()).map_err(unusable)?;
    if claims.is_empty() {
        return Err(unusable("it names no file of an engine or model".to_owned()));
    }
    if signed.is_none() && key.is_some() {
        return Err(unusable("it is not signed, and a public key was given".to_owned()));
    }
    let mut compared = Compared { equal: 0, unnamed: 0, signed, damages: Vec::new() };
    // What an engine or a model has beyond its evidence is as wrong as what differs.
    for (what, computed) in here.iter().filter(|(what, _)| !claims.contains_key(*what)) {
        if !claims.keys().any(|claim| subject(claim) == subject(what)) {
            compared.unnamed += 1;
            continue;
        }
        compared.damages.push(Damaged {
            path: PathBuf::from(what),
            what: what.clone(),
            expected: "no such file".to_owned(),
            computed: Some(computed.to_string()),
            size_bytes: None,
            recorded_in: shown.clone(),
        });
    }
    for (what, expected) in claims {
        let computed = here.get(&what).copied();
        if computed == Some(expected) {
            compared.equal += 1;
            continue;
        }
        let (expected, computed) = (expected.to_string(), computed.map(|digest| digest.to_string()));
        let (path, recorded_in) = (PathBuf::from(&what), shown.clone());
        compared.damages.push(Damaged { path, what, expected, computed, size_bytes: None, recorded_in });
    }
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
            let claim = |subject: crate::format::in_toto::Subject| {
                Ok((engine_file(&asked.engine, &asked.variant, &subject.name), digest(&subject.digest)?))
            };
            statement.subject.into_iter().map(claim).collect()
        }
        MODEL => {
            let files: ModelFiles =
                serde_json::from_value(statement.predicate.clone()).map_err(|error| error.to_string())?;
            let [folder] = &statement.subject[..] else { return Err("not one model".to_owned()) };
            let named = |file: crate::format::in_toto::Resource| Ok((file.name, hex(&file.digest)?));
            let files: BTreeMap<String, Digest> =
                files.resources.into_iter().map(named).collect::<Result<_, String>>()?;
            if of_model(&folder.name, &files).subject != statement.subject {
                return Err("the digest of the model is not that of its files".to_owned());
            }
            Ok(files.into_iter().map(|(path, digest)| (model_file(&folder.name, &path), digest)).collect())
        }
        other => Err(format!("a predicate of type `{other}`")),
    }
}

fn of_bom(bom: &Bom) -> Result<Claims, String> {
    let mut claims = Claims::new();
    for component in &bom.components {
        let property =
            |name: &str| component.properties.iter().find(|one| one.name == name).map(|one| one.value.as_str());
        let (variant, folder) = (property(VARIANT), property(FOLDER));
        for file in &component.components {
            let what = match (variant, folder) {
                (Some(variant), _) => engine_file(&component.name, variant, &file.name),
                (_, Some(folder)) => model_file(folder, &file.name),
                _ => continue,
            };
            claims.insert(what, of_file(file)?);
        }
    }
    Ok(claims)
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
