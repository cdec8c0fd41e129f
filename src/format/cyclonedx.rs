//! Bills of materials: CycloneDX 1.6 as JSON (<https://cyclonedx.org/docs/1.6/json/>), as far as one is written here. The crate
//! `serde-cyclonedx` has the whole schema as generated types, which are larger than this for the few fields that are used; an
//! independent validator checks what comes out in `cargo ci e2e evidence`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::base::digest::Digest;

/// A bill of materials.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bom {
    /// `CycloneDX`.
    pub bom_format: String,
    /// `1.6`.
    pub spec_version: String,
    /// 1: every export is a new one.
    pub version: u32,
    /// What it is about, and who wrote it.
    pub metadata: Metadata,
    /// The parts.
    pub components: Vec<Component>,
    /// Which part needs which.
    #[serde(default)]
    pub dependencies: Vec<Needs>,
}

/// What a bill of materials is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// When it was written (RFC 3339).
    pub timestamp: String,
    /// What wrote it.
    pub tools: Tools,
    /// The project.
    pub component: Component,
}

/// What wrote a bill of materials.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tools {
    /// The programs.
    pub components: Vec<Component>,
}

/// A part. Empty fields are left out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Component {
    /// `application`, `machine-learning-model`, `data` or `file`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The name by which other parts refer to it.
    #[serde(rename = "bom-ref", default, skip_serializing_if = "String::is_empty")]
    pub reference: String,
    /// Its name.
    pub name: String,
    /// Its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Its digests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hashes: Vec<Hash>,
    /// Its licences, where they are known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub licenses: Vec<License>,
    /// Its package URL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purl: Option<String>,
    /// Of a model: what it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_card: Option<ModelCard>,
    /// Of data: what it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<Data>,
    /// Named facts that the format has no field for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub properties: Vec<Property>,
    /// Its parts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<Component>,
}

/// A digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hash {
    /// `SHA-256`.
    pub alg: String,
    /// The digest, in hexadecimal digits.
    pub content: String,
}

/// A licence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct License {
    /// Which.
    pub license: LicenseName,
}

/// A licence by its SPDX identifier, or by name where it has none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LicenseName {
    /// An SPDX identifier.
    Id(String),
    /// Any name.
    Name(String),
}

/// What a model is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelCard {
    /// How it is made.
    pub model_parameters: ModelParameters,
}

/// How a model is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelParameters {
    /// What it does.
    pub task: String,
    /// The family that its header names: `llama`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture_family: Option<String>,
}

/// What data is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data {
    /// `configuration`.
    #[serde(rename = "type")]
    pub kind: String,
}

/// A named fact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Property {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// What a part needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Needs {
    /// The part.
    #[serde(rename = "ref")]
    pub reference: String,
    /// The parts that it needs.
    #[serde(default)]
    pub depends_on: Vec<String>,
}

impl Component {
    /// A part of a kind.
    pub fn new(kind: &str, name: &str) -> Self {
        Self { kind: kind.to_owned(), name: name.to_owned(), ..Self::default() }
    }

    /// Files as parts, by path.
    pub fn files<'a>(files: impl IntoIterator<Item = (&'a str, Digest)>) -> Vec<Self> {
        let hashes = |digest: Digest| vec![Hash { alg: "SHA-256".to_owned(), content: digest.hex() }];
        files.into_iter().map(|(path, digest)| Self { hashes: hashes(digest), ..Self::new("file", path) }).collect()
    }

    /// The named facts of a map.
    pub fn properties(facts: &BTreeMap<String, String>) -> Vec<Property> {
        facts.iter().map(|(name, value)| Property { name: name.clone(), value: value.clone() }).collect()
    }
}
