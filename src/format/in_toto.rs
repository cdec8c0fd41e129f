//! in-toto statements (<https://github.com/in-toto/attestation>, v1) with the two predicates that are written here: SLSA provenance
//! (<https://slsa.dev/spec/v1.0/provenance>) of an engine's build, and OpenSSF Model Signing
//! (<https://github.com/ossf/model-signing-spec>) of a model's files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::dsse::Envelope;
use crate::base::digest::Digest;

/// The type of every statement.
pub const STATEMENT: &str = "https://in-toto.io/Statement/v1";
/// The predicate of a build.
pub const PROVENANCE: &str = "https://slsa.dev/provenance/v1";
/// The predicate of a model's files.
pub const MODEL: &str = "https://model_signing/signature/v1.0";
/// The build type of provenance: described in `docs/evidence.md`.
pub const BUILD_TYPE: &str = "urn:aitools:build:v1";
/// The media type of a Sigstore bundle, in which model signatures travel.
pub const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

/// Digests by the name of their algorithm.
pub type DigestSet = BTreeMap<String, String>;

/// A SHA-256 as a digest set.
pub fn sha256(digest: &Digest) -> DigestSet {
    [("sha256".to_owned(), digest.hex())].into()
}

/// A claim about files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statement {
    /// [`STATEMENT`].
    #[serde(rename = "_type")]
    pub kind: String,
    /// What the claim is about.
    pub subject: Vec<Subject>,
    /// What kind of claim it is.
    pub predicate_type: String,
    /// The claim.
    pub predicate: Json,
}

/// A file, or a set of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// Its digests.
    pub digest: DigestSet,
}

/// How an engine was built.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Provenance {
    /// What was built.
    pub build_definition: BuildDefinition,
    /// Who built it.
    pub run_details: RunDetails,
}

/// What was built, and from what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BuildDefinition {
    /// [`BUILD_TYPE`].
    pub build_type: String,
    /// What the manifest asks for.
    pub external_parameters: External,
    /// Every named input of the build; the fingerprint is their digest.
    pub internal_parameters: BTreeMap<String, String>,
    /// The source and the build tools.
    pub resolved_dependencies: Vec<Dependency>,
}

/// What the manifest asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct External {
    /// The engine's name in the manifest.
    pub engine: String,
    /// The accelerator.
    pub variant: String,
    /// The source, as the manifest has it.
    pub source: Json,
}

/// Something that went into a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dependency {
    /// Where it comes from.
    pub uri: String,
    /// Its digests.
    pub digest: DigestSet,
    /// What it is called here.
    pub name: String,
}

/// Who built, and what else is known of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunDetails {
    /// The program that built: on the user's own machine, so SLSA Build L1 and no more.
    pub builder: Builder,
    /// What does not change the result: versions of tools in full, warnings, seconds.
    #[serde(default)]
    pub metadata: BTreeMap<String, Json>,
}

/// The program that built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Builder {
    /// Its name and version.
    pub id: String,
}

/// The files of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelFiles {
    /// How the files were read.
    pub serialization: Serialization,
    /// The files, sorted by name.
    pub resources: Vec<Resource>,
}

/// How the files of a model were read: each as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Serialization {
    /// `files`.
    pub method: String,
    /// `sha256`.
    pub hash_type: String,
    /// Whether links were followed.
    pub allow_symlinks: bool,
    /// Files of the folder that are not part of the model.
    #[serde(default)]
    pub ignore_paths: Vec<String>,
}

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resource {
    /// Its path below the model's folder.
    pub name: String,
    /// `sha256`.
    pub algorithm: String,
    /// The digest, in hexadecimal digits.
    pub digest: String,
}

/// A signed statement as Sigstore's clients pass it on, with a key instead of a certificate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bundle {
    /// [`BUNDLE`].
    pub media_type: String,
    /// Which key.
    pub verification_material: Material,
    /// The signed statement.
    pub dsse_envelope: Envelope,
}

/// Which key a bundle is checked with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Material {
    /// The key.
    pub public_key: Hint,
    /// Entries of a transparency log: none.
    #[serde(default)]
    pub tlog_entries: Vec<Json>,
}

/// A hint at a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hint {
    /// The SHA-256 of the public key's PEM file.
    pub hint: String,
}

/// The statement of a model's files, given by name with their digests: the subject's digest is that of the files' digests, one
/// after the other.
pub fn of_model(folder: &str, files: &BTreeMap<String, Digest>) -> Statement {
    let mut all = Vec::new();
    let resource = |(name, digest): (&String, &Digest)| {
        all.extend(digest.as_bytes());
        Resource { name: name.clone(), algorithm: "sha256".to_owned(), digest: digest.hex() }
    };
    let resources = files.iter().map(resource).collect();
    let serialization = Serialization {
        method: "files".to_owned(),
        hash_type: "sha256".to_owned(),
        allow_symlinks: false,
        ignore_paths: Vec::new(),
    };
    Statement {
        kind: STATEMENT.to_owned(),
        subject: vec![Subject { name: folder.to_owned(), digest: sha256(&Digest::of(&all)) }],
        predicate_type: MODEL.to_owned(),
        predicate: serde_json::to_value(ModelFiles { serialization, resources }).unwrap_or_default(),
    }
}
