//! A bundle as the OCI (Open Container Initiative) describes artifacts: a manifest that lists blobs by digest and size, and an
//! index that leads to it. Bytes in, a checked [`Bundle`] out.
//!
//! Sources: image-spec 1.1 (`manifest.md`, `image-index.md`, `image-layout.md`, `descriptor.md`), and for references the
//! distribution-spec 1.1. Fields that a bundle does not need are not looked at: `urls` and `data` are never followed.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::base::digest::Digest;

/// The largest manifest or index that is read, in bytes: what registries accept.
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Blobs of a bundle at most.
pub const MAX_LAYERS: usize = 10_000;
/// The file `oci-layout`.
pub const LAYOUT: &str = "{\"imageLayoutVersion\":\"1.0.0\"}";
/// The media type of a manifest.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const BUNDLE_TYPE: &str = "application/vnd.aitools.bundle.v1";
const CONFIG_TYPE: &str = "application/vnd.aitools.bundle.config.v1+json";
const TITLE: &str = "org.opencontainers.image.title";
const ID: &str = "vnd.aitools.id";
/// Larger than any file that a disk holds.
const MAX_BLOB_BYTES: u64 = 1 << 46;
const DERIVED_BY: &str = "vnd.aitools.derived-by";
const MAX_TITLE_CHARS: usize = 1024;
/// The version of the bundle format.
const VERSION: u32 = 1;

/// A blob: its digest and its exact size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Blob {
    /// SHA-256 of its bytes.
    pub digest: Digest,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// What a blob of a bundle holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// The lockfile that the bundle was made from.
    Lockfile,
    /// A file of a model. One that was derived names its receipt.
    Weights {
        /// The fingerprint of the derivation that made it.
        derived_by: Option<Digest>,
    },
    /// A wheel or source distribution, as it was downloaded.
    Package,
    /// The source of an engine, a tar archive, and its tree digest.
    Tree(Digest),
    /// An installed engine without its receipt, a tar archive, and its fingerprint.
    Engine(Digest),
    /// The sealed receipt of the engine with this fingerprint.
    Receipt(Digest),
    /// The sealed receipt of the derivation with this fingerprint.
    Derived(Digest),
}

impl Content {
    fn media_type(&self) -> &'static str {
        match self {
            Self::Lockfile => "application/vnd.aitools.lock.v1+toml",
            Self::Weights { .. } => "application/vnd.cncf.model.weight.v1.raw",
            Self::Package => "application/vnd.aitools.package.v1.raw",
            Self::Tree(_) => "application/vnd.aitools.tree.v1.tar",
            Self::Engine(_) => "application/vnd.aitools.engine.v1.tar",
            Self::Receipt(_) => "application/vnd.aitools.receipt.v1+json",
            Self::Derived(_) => "application/vnd.aitools.derived.v1+json",
        }
    }
}

/// A blob of a bundle, and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its bytes.
    pub blob: Blob,
    /// What they are.
    pub content: Content,
    /// A name for people; of a package, its file name.
    pub title: String,
}

/// Everything that a manifest says of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// What was bundled where.
    pub config: Config,
    /// What it consists of.
    pub layers: Vec<Layer>,
}

/// The configuration of a bundle: a few facts about the machine and the project that it was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    version: u32,
    /// Operating system and processor, such as `linux-x86_64`.
    pub platform: String,
    /// The file name of the lockfile.
    pub lockfile: String,
}

/// Why bytes are not a bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum OciError {
    #[error("{what} cannot be read: {why}")]
    Malformed { what: &'static str, why: String },
    #[error("it is not a bundle of aitools: {0}")]
    Foreign(String),
    #[error("it has {0} blobs, but the limit is {MAX_LAYERS}")]
    TooMany(usize),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: Digest,
    size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u32,
    media_type: String,
    artifact_type: String,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    manifests: Vec<Descriptor>,
}

fn parse<T: serde::de::DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, OciError> {
    serde_json::from_slice(bytes).map_err(|error| OciError::Malformed { what, why: error.to_string() })
}

fn text(value: &impl Serialize) -> Vec<u8> {
    // Maps with texts as keys and plain values: this cannot fail, and an empty text would be refused when read.
    serde_json::to_vec(value).unwrap_or_default()
}

/// The index that leads to one manifest.
pub fn index(manifest: Blob) -> Vec<u8> {
    let entry = Descriptor {
        media_type: MANIFEST_TYPE.to_owned(),
        digest: manifest.digest,
        size: manifest.size_bytes,
        artifact_type: Some(BUNDLE_TYPE.to_owned()),
        annotations: BTreeMap::new(),
    };
    text(&Index { schema_version: 2, media_type: Some(INDEX_TYPE.to_owned()), manifests: vec![entry] })
}

/// The manifest that an index leads to: the only one of a bundle.
///
/// # Errors
/// [`OciError`].
pub fn parse_index(bytes: &[u8]) -> Result<Blob, OciError> {
    let index: Index = parse("its index", bytes)?;
    // Other programs that copy layouts leave out the artifact's type here; the manifest has it.
    let mut found = index.manifests.iter().filter(|entry| entry.media_type == MANIFEST_TYPE);
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one.blob()),
        (None, _) => Err(OciError::Foreign("its index names no bundle".to_owned())),
        (Some(_), Some(_)) => Err(OciError::Foreign("its index names several bundles".to_owned())),
    }
}

impl Descriptor {
    fn blob(&self) -> Blob {
        Blob { digest: self.digest, size_bytes: self.size }
    }

    fn of(layer: &Layer) -> Self {
        let mut annotations = BTreeMap::from([(TITLE.to_owned(), layer.title.clone())]);
        match &layer.content {
            Content::Tree(id) | Content::Engine(id) | Content::Receipt(id) | Content::Derived(id) => {
                annotations.insert(ID.to_owned(), id.to_string());
            }
            Content::Weights { derived_by: Some(id) } => {
                annotations.insert(DERIVED_BY.to_owned(), id.to_string());
            }
            Content::Lockfile | Content::Package | Content::Weights { derived_by: None } => {}
        }
        Self {
            media_type: layer.content.media_type().to_owned(),
            digest: layer.blob.digest,
            size: layer.blob.size_bytes,
            artifact_type: None,
            annotations,
        }
    }

    fn layer(&self) -> Result<Layer, OciError> {
        let title = self.annotations.get(TITLE).map_or("", String::as_str);
        let title: String = title.chars().filter(|c| !c.is_control()).take(MAX_TITLE_CHARS).collect();
        let digest = |key: &str| match self.annotations.get(key).map(|text| text.parse()) {
            None => Ok(None),
            Some(Ok(digest)) => Ok(Some(digest)),
            Some(Err(_)) => {
                Err(OciError::Foreign(format!("the annotation `{key}` of {} is not a digest", self.digest)))
            }
        };
        let lacking = || OciError::Foreign(format!("{} has no annotation `{ID}`", self.digest));
        let id = digest(ID)?;
        let all = [
            Content::Lockfile,
            Content::Weights { derived_by: digest(DERIVED_BY)? },
            Content::Package,
            Content::Tree(id.unwrap_or(self.digest)),
            Content::Engine(id.unwrap_or(self.digest)),
            Content::Receipt(id.unwrap_or(self.digest)),
            Content::Derived(id.unwrap_or(self.digest)),
        ];
        let content = all.into_iter().find(|content| content.media_type() == self.media_type);
        let content = content.ok_or_else(|| {
            let shown: String = self.media_type.chars().filter(|c| !c.is_control()).take(100).collect();
            OciError::Foreign(format!("{} has the unknown media type `{shown}`", self.digest))
        })?;
        let plain = matches!(content, Content::Lockfile | Content::Weights { .. } | Content::Package);
        if !plain && id.is_none() {
            return Err(lacking());
        }
        if self.size > MAX_BLOB_BYTES {
            return Err(OciError::Foreign(format!("{} has {} bytes, which is too many", self.digest, self.size)));
        }
        Ok(Layer { blob: self.blob(), content, title })
    }
}

impl Config {
    /// Of a bundle that is made now.
    pub fn new(platform: String, lockfile: String) -> Self {
        Self { version: VERSION, platform, lockfile }
    }

    /// The same bytes for the same configuration.
    pub fn to_bytes(&self) -> Vec<u8> {
        text(self)
    }

    /// # Errors
    /// [`OciError`], also for a version that this program does not know.
    pub fn parse(bytes: &[u8]) -> Result<Self, OciError> {
        let config: Self = parse("its configuration", bytes)?;
        if config.version != VERSION {
            return Err(OciError::Foreign(format!("it has version {}, this program knows {VERSION}", config.version)));
        }
        let bare = |text: String| text.chars().filter(|c| !c.is_control()).take(200).collect();
        Ok(Self { version: VERSION, platform: bare(config.platform), lockfile: bare(config.lockfile) })
    }
}

impl Bundle {
    /// The blob with these bytes.
    pub fn blob_of(bytes: &[u8]) -> Blob {
        Blob { digest: Digest::of(bytes), size_bytes: bytes.len() as u64 }
    }

    /// The manifest: the same bytes for the same bundle.
    pub fn to_manifest(&self) -> Vec<u8> {
        let bytes = self.config.to_bytes();
        let config = Descriptor {
            media_type: CONFIG_TYPE.to_owned(),
            digest: Digest::of(&bytes),
            size: bytes.len() as u64,
            artifact_type: None,
            annotations: BTreeMap::new(),
        };
        text(&Manifest {
            schema_version: 2,
            media_type: MANIFEST_TYPE.to_owned(),
            artifact_type: BUNDLE_TYPE.to_owned(),
            config,
            layers: self.layers.iter().map(Descriptor::of).collect(),
        })
    }

    /// Reads a manifest: where its configuration is, and its layers.
    ///
    /// # Errors
    /// [`OciError`].
    pub fn parse_manifest(bytes: &[u8]) -> Result<(Blob, Vec<Layer>), OciError> {
        let manifest: Manifest = parse("its manifest", bytes)?;
        if manifest.schema_version != 2 || manifest.artifact_type != BUNDLE_TYPE {
            return Err(OciError::Foreign("its manifest describes something else".to_owned()));
        }
        if manifest.layers.len() > MAX_LAYERS {
            return Err(OciError::TooMany(manifest.layers.len()));
        }
        let layers = manifest.layers.iter().map(Descriptor::layer).collect::<Result<_, _>>()?;
        Ok((manifest.config.blob(), layers))
    }
}

/// Where a bundle is in a registry: `host[:port]/repository:tag`, or `…@sha256:…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The registry, with its port if one was given.
    pub registry: String,
    /// The repository in it.
    pub repository: String,
    /// The tag, or the digest of a manifest.
    pub version: Version,
}

/// Which manifest of a repository is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Version {
    /// The one that has this tag today.
    Tag(String),
    /// This one.
    Digest(Digest),
}

/// A text is not a reference. Holds what is wrong, as a phrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected `registry/repository:tag`, such as `registry.example:5000/team/bundle:v1`: {0}")]
pub struct ReferenceError(&'static str);

impl Reference {
    /// The longest reference, in bytes.
    pub const MAX_BYTES: usize = 512;

    /// Whether the registry is on this machine, so that plain http is no risk.
    pub fn is_loopback(&self) -> bool {
        let end = self.registry.rfind(':').filter(|at| !self.registry[*at..].contains(']'));
        is_loopback(&self.registry[..end.unwrap_or(self.registry.len())])
    }
}

/// Whether a host, without a port, is this machine.
pub fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(whole: &str) -> Result<Self, ReferenceError> {
        let refuse = |why| Err(ReferenceError(why));
        if whole.len() > Self::MAX_BYTES {
            return refuse("it is too long");
        }
        let Some((registry, rest)) = whole.split_once('/') else { return refuse("it names no repository") };
        let plain = |text: &str, more: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c));
        let is_host = registry.contains(['.', ':']) || registry == "localhost";
        if !is_host || !plain(registry, ".:-[]") || registry.starts_with(['-', ':', '.']) {
            return refuse("it begins with no registry");
        }
        let (repository, version) = match (rest.split_once('@'), rest.split_once(':')) {
            (Some((repository, digest)), _) => match digest.parse() {
                Ok(digest) => (repository, Version::Digest(digest)),
                Err(_) => return refuse("what follows `@` is not a digest"),
            },
            (None, Some((repository, tag))) => (repository, Version::Tag(tag.to_owned())),
            (None, None) => return refuse("it has no tag"),
        };
        let is_part = |part: &str| {
            let ends = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
            part.starts_with(ends) && part.ends_with(ends) && part.chars().all(|c| ends(c) || "._-".contains(c))
        };
        if !repository.split('/').all(is_part) {
            return refuse("a repository has lowercase letters, digits, `.`, `_`, `-` and `/`");
        }
        if let Version::Tag(tag) = &version
            && !((1..=128).contains(&tag.len()) && plain(tag, "._-") && !tag.starts_with(['.', '-']))
        {
            return refuse("a tag has letters, digits, `.`, `_` and `-`");
        }
        Ok(Self { registry: registry.to_owned(), repository: repository.to_owned(), version })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if matches!(self.version, Version::Tag(_)) { ':' } else { '@' };
        write!(f, "{}/{}{sign}{}", self.registry, self.repository, self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Bundle {
        let layer = |content, title: &str| Layer {
            blob: Blob { digest: Digest::of(title.as_bytes()), size_bytes: 3 },
            content,
            title: title.to_owned(),
        };
        let id = Digest::of(b"id");
        let layers = vec![
            layer(Content::Lockfile, "default.lock"),
            layer(Content::Weights { derived_by: None }, "modèle.gguf"),
            layer(Content::Weights { derived_by: Some(id) }, "q4.gguf"),
            layer(Content::Package, "ninja.whl"),
            layer(Content::Tree(id), "tree"),
            layer(Content::Engine(id), "engine"),
            layer(Content::Receipt(id), "receipt"),
            layer(Content::Derived(id), "derived"),
        ];
        Bundle { config: Config::new("linux-x86_64".to_owned(), "default.lock".to_owned()), layers }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let manifest = sample().to_manifest();
        let (config, layers) = Bundle::parse_manifest(&manifest).unwrap();
        assert_eq!(layers, sample().layers);
        assert_eq!(config.digest, Digest::of(&sample().config.to_bytes()));
        assert_eq!(Config::parse(&sample().config.to_bytes()).unwrap(), sample().config);
        let blob = Blob { digest: Digest::of(&manifest), size_bytes: manifest.len() as u64 };
        assert_eq!(parse_index(&index(blob)).unwrap(), blob);
    }

    #[test]
    fn what_is_no_bundle() {
        let text = String::from_utf8(sample().to_manifest()).unwrap();
        let said = |text: &str| Bundle::parse_manifest(text.as_bytes()).unwrap_err().to_string();
        assert!(said(&text.replace("aitools.bundle.v1\"", "other\"")).contains("something else"));
        assert!(said(&text.replace("vnd.aitools.id", "id")).contains("has no annotation `vnd.aitools.id`"));
        assert!(said(&text.replace("engine.v1.tar", "engine.v9.tar")).contains("unknown media type"));
        assert!(said(&text.replace("\"size\":3", "\"size\":-3")).contains("cannot be read"));
        assert!(parse_index(b"{\"schemaVersion\":2,\"manifests\":[]}").unwrap_err().to_string().contains("no bundle"));
        for length in 0..text.len() {
            assert!(Bundle::parse_manifest(&text.as_bytes()[..length]).is_err());
        }
        let newer = String::from_utf8(sample().config.to_bytes()).unwrap().replace("\"version\":1", "\"version\":2");
        assert!(Config::parse(newer.as_bytes()).unwrap_err().to_string().contains("version 2"));
    }

    #[test]
    fn references() {
        let digest = Digest::of(b"x");
        for good in ["127.0.0.1:5000/a:v1", "registry.example/team/a_b.c:1", &format!("localhost/x@{digest}")] {
            assert_eq!(good.parse::<Reference>().unwrap().to_string(), good);
        }
        for bad in [
            "a:v1",
            "team/a:v1",
            "r.example/a",
            "r.example/A:v1",
            "r.example/../a:v1",
            "r.example/a:",
            "-r.x/a:b",
            "r.example/a@sha256:1",
            "u@r.example/a:b",
            "r.example/a:b?c",
            "r.example//a:b",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
        let is_loopback = |text: &str| text.parse::<Reference>().unwrap().is_loopback();
        assert!(is_loopback("[::1]:5000/a:b") && is_loopback("localhost:5000/a:b") && is_loopback("127.8.0.1/a:b"));
        assert!(!is_loopback("127.0.0.1.example/a:b") && !is_loopback("registry.example/a:b"));
    }
}
