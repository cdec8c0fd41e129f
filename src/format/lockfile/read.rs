//! From the text of a lockfile to entries: every key belongs to the entry's kind of source, or the file is refused.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::Deserialize;

use crate::base::commit::Commit;
use crate::base::diagnostic::{Diagnostic, Diagnostics};
use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};
use crate::format::Parsed;
use crate::format::document::{Document, Syntax};
use crate::format::manifest::{Kind, Permission, Request, SourceSpec, check_source};
use crate::format::schema::Schema;

use super::{
    EngineEntry, FilePin, FilesOrigin, GitPin, Lockfile, MAX_BYTES, ModelEntry, ModelPin, OLDEST, Origin, SubmodulePin,
    ToolEntry, VERSION,
};

/// The tables and keys of the file.
#[derive(Debug, Deserialize, JsonSchema)]
struct Raw {
    #[expect(dead_code, reason = "checked before anything else is read")]
    #[schemars(range(min = 1, max = 2))]
    version: u32,
    #[serde(default)]
    tool: Vec<RawEntry>,
    #[serde(default)]
    engine: Vec<RawEntry>,
    #[serde(default)]
    model: Vec<RawEntry>,
}

/// The keys that some kind of entry has.
#[derive(Debug, Deserialize, JsonSchema)]
pub(in crate::format) struct RawEntry {
    name: Name,
    request: Request,
    commit: Option<Commit>,
    tree: Option<Digest>,
    #[serde(default)]
    allow: BTreeSet<Permission>,
    inputs: Option<Digest>,
    #[serde(default)]
    submodules: Vec<SubmodulePin>,
    #[serde(default)]
    downloads: Vec<FilePin>,
    #[serde(default)]
    files: Vec<FilePin>,
}

static SCHEMA: Schema<Raw> = Schema::new();

/// Reads a lockfile that holds no conflict markers.
pub(super) fn read(name: &str, bytes: &[u8]) -> Result<(Parsed<Lockfile>, Vec<Diagnostic>), Diagnostics> {
    let document = Document::parse(Syntax::Toml, name, bytes, MAX_BYTES)?;
    document.check_version("lockfile", OLDEST..=VERSION)?;
    let raw = SCHEMA.decode(&document)?;
    let mut problems = Diagnostics::default();
    let mut value = Lockfile::default();
    for (kind, entries) in [(Kind::Tool, raw.tool), (Kind::Engine, raw.engine), (Kind::Model, raw.model)] {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for (index, entry) in entries.into_iter().enumerate() {
            if problems.0.len() > Diagnostics::MAX {
                break;
            }
            let first = seen.insert(entry.name.to_string(), index);
            let mut reader = Reader { document: &document, kind, index, raw: entry, problems: &mut problems };
            if let Some(first) = first {
                reader.locked_twice(first);
            }
            reader.entry(&mut value);
        }
    }
    value.sort();
    problems.sort();
    problems.or(Parsed { value, document })
}

/// Parses one entry: keys that are left in `raw` at the end are unexpected.
struct Reader<'a> {
    document: &'a Document,
    kind: Kind,
    /// The number of the entry in the list of its kind.
    index: usize,
    raw: RawEntry,
    problems: &'a mut Diagnostics,
}

impl Reader<'_> {
    fn report(&mut self, key: &str, what: &str) {
        let path = [self.kind.as_str(), &self.index.to_string(), key];
        let message = format!("the {} `{}`: {what}", self.kind.as_str(), self.raw.name);
        self.problems.push(self.document.error(&path, message));
    }

    fn locked_twice(&mut self, first: usize) {
        let first = self.document.span_of(&[self.kind.as_str(), &first.to_string(), "name"]).start;
        let line = self.document.source.line_column(first).0;
        self.report("name", &format!("it is locked twice, first on line {line}"));
    }

    fn entry(mut self, lockfile: &mut Lockfile) {
        self.request();
        match self.kind {
            Kind::Tool => lockfile.tools.extend(self.tool()),
            Kind::Engine => lockfile.engines.extend(self.engine()),
            Kind::Model => lockfile.models.extend(self.model()),
        }
        self.rest();
    }

    /// The manifest's rules for requests hold here, too.
    fn request(&mut self) {
        let Request::Source(request) = &self.raw.request else { return };
        let (kind, index) = (self.kind.as_str(), self.index.to_string());
        let source = check_source(self.document, &[kind, &index, "request"], request, self.kind);
        source.0.into_iter().filter(Diagnostic::is_error).for_each(|problem| self.problems.push(problem));
    }

    fn source(&mut self) -> Option<SourceSpec> {
        if let Request::Source(source) = &self.raw.request {
            return Some(source.clone());
        }
        self.report("request", &format!("{} is not derived", self.kind.with_article()));
        None
    }

    fn tool(&mut self) -> Option<ToolEntry> {
        let packages = self.list("downloads", |raw| &mut raw.downloads)?;
        let SourceSpec::Pypi(request) = self.source()? else {
            self.report("request", "a tool is a `pypi` package");
            return None;
        };
        Some(ToolEntry { name: self.raw.name.clone(), request, packages })
    }

    fn engine(&mut self) -> Option<EngineEntry> {
        let tree = self.raw.tree.take();
        let (origin, tree) = (self.source().and_then(|source| self.origin(source)), self.given("tree", tree));
        let FilesOrigin::Other(origin) = origin? else { return None };
        let allow = std::mem::take(&mut self.raw.allow);
        Some(EngineEntry { name: self.raw.name.clone(), origin, tree: tree?, allow })
    }

    fn model(&mut self) -> Option<ModelEntry> {
        let name = self.raw.name.clone();
        let pin = match self.raw.request.clone() {
            Request::Derive(request) => {
                let inputs = self.raw.inputs.take();
                ModelPin::Derived { request, inputs: self.given("inputs", inputs)? }
            }
            Request::Source(source) => {
                let (origin, files) = (self.origin(source), self.list("files", |raw| &mut raw.files));
                ModelPin::Files { origin: origin?, files: files? }
            }
        };
        Some(ModelEntry { name, pin })
    }

    /// What a request resolved to, from the keys of its kind of source. That an engine comes from the Hub is refused by
    /// the rules for requests.
    fn origin(&mut self, source: SourceSpec) -> Option<FilesOrigin> {
        Some(FilesOrigin::Other(match source {
            SourceSpec::Hf(request) => return Some(FilesOrigin::Hub { request, commit: self.commit()? }),
            SourceSpec::Git(request) => {
                let submodules = std::mem::take(&mut self.raw.submodules);
                self.no_twins("submodules", submodules.iter().map(|submodule| &submodule.path));
                Origin::Git { request, pin: GitPin { commit: self.commit()?, submodules } }
            }
            SourceSpec::Url(request) => Origin::Url { request, download: self.download()? },
            SourceSpec::Path(request) => Origin::Path { request },
            SourceSpec::Pypi(request) => Origin::Pypi { request, download: self.download()? },
        }))
    }

    fn given<T>(&mut self, key: &str, value: Option<T>) -> Option<T> {
        if value.is_none() {
            self.report(key, &format!("`{key}` is missing"));
        }
        value
    }

    fn commit(&mut self) -> Option<Commit> {
        let commit = self.raw.commit.take();
        self.given("commit", commit)
    }

    fn download(&mut self) -> Option<FilePin> {
        let mut downloads = self.list("downloads", |raw| &mut raw.downloads)?;
        if downloads.len() > 1 {
            self.report("downloads", "`downloads` has more than one file");
        }
        downloads.pop()
    }

    fn list(&mut self, key: &str, of: impl FnOnce(&mut RawEntry) -> &mut Vec<FilePin>) -> Option<Vec<FilePin>> {
        let files = std::mem::take(of(&mut self.raw));
        self.no_twins(key, files.iter().map(|file| &file.path));
        self.given(key, Some(files).filter(|files| !files.is_empty()))
    }

    fn no_twins<'p>(&mut self, key: &str, paths: impl Iterator<Item = &'p RelPath>) {
        let mut paths: Vec<&RelPath> = paths.collect();
        paths.sort();
        if let Some(twice) = paths.windows(2).find(|pair| pair[0] == pair[1]) {
            self.report(key, &format!("`{}` is listed twice", twice[0]));
        }
    }

    fn rest(&mut self) {
        let raw = &self.raw;
        let left = [
            ("commit", raw.commit.is_some()),
            ("tree", raw.tree.is_some()),
            ("allow", !raw.allow.is_empty()),
            ("inputs", raw.inputs.is_some()),
            ("submodules", !raw.submodules.is_empty()),
            ("downloads", !raw.downloads.is_empty()),
            ("files", !raw.files.is_empty()),
        ];
        for (key, _) in left.into_iter().filter(|(_, is_left)| *is_left) {
            self.report(key, &format!("unexpected key `{key}`"));
        }
    }
}
