//! Checks of a manifest that its types cannot express: exclusive keys, exact versions, addresses, globs, colliding paths.

use std::collections::BTreeMap;

use globset::{Glob, GlobBuilder};

use crate::base::diagnostic::{Diagnostic, Diagnostics, nearest};
use crate::base::name::Name;
use crate::format::document::Document;
use crate::format::schema::quoted_list;

use super::derive;
use super::{EngineSpec, GitSpec, HfSpec, Kind, Manifest, ModelSpec, PathSpec, PypiSpec, SourceSpec, TOOLS, UrlSpec};

const MAX_GLOB_BYTES: usize = 512;
const MAX_GLOBS: usize = 256;

/// A glob as every format means it: `*` stays within a folder, `**` does not; always `/`, never absolute.
///
/// # Errors
/// Why the glob is invalid.
pub fn glob(pattern: &str) -> Result<Glob, String> {
    if pattern.is_empty() || pattern.len() > MAX_GLOB_BYTES {
        return Err(format!("a glob has 1 to {MAX_GLOB_BYTES} bytes"));
    }
    if pattern.starts_with('/') || pattern.contains('\\') || pattern.split('/').any(|part| part == "..") {
        return Err("a glob is relative, has `/` between its parts and no part `..`".to_owned());
    }
    GlobBuilder::new(pattern).literal_separator(true).build().map_err(|error| error.kind().to_string())
}

pub(super) fn check(manifest: &Manifest, document: &Document) -> Diagnostics {
    let mut check = Check { document, problems: Diagnostics::default() };
    check.names("tools", manifest.tools.keys());
    check.names("engines", manifest.engines.keys());
    check.names("models", manifest.models.keys());
    for (name, spec) in &manifest.tools {
        check.tool(name, spec, manifest.derives_with(name));
    }
    for (name, spec) in &manifest.engines {
        check.engine(name, spec);
    }
    for (name, spec) in &manifest.models {
        check.model(name, spec);
    }
    check.places(manifest);
    check.problems.0.extend(derive::check(manifest, document));
    check.submodules(manifest);
    check.globs(&["policies", "include"], &manifest.policies.include);
    for (from, to) in &manifest.mirrors {
        if !from.contains("://") || !to.contains("://") {
            check.say(
                &["mirrors", from],
                |problem| problem.expected("addresses such as `https://…` on both sides"),
                "a mirror maps one URL prefix to another",
            );
        }
    }
    check.problems
}

/// What is wrong with one request, at `path` in `document`: also used for the requests that a lockfile repeats.
pub fn check_source(document: &Document, path: &[&str], spec: &SourceSpec, kind: Kind) -> Diagnostics {
    let mut check = Check { document, problems: Diagnostics::default() };
    check.source(path, spec, kind);
    check.problems
}

struct Check<'a> {
    document: &'a Document,
    problems: Diagnostics,
}

impl Check<'_> {
    fn say(&mut self, path: &[&str], more: impl FnOnce(Diagnostic) -> Diagnostic, message: impl Into<String>) {
        self.problems.push(more(self.document.error(path, message)));
    }

    fn require(&mut self, good: bool, path: &[&str], message: &str, expected: &str) {
        if !good {
            self.say(path, |problem| problem.expected(expected), message);
        }
    }

    /// Names that differ in case alone are one folder on some systems.
    fn names<'n>(&mut self, table: &str, names: impl Iterator<Item = &'n Name>) {
        let mut seen: BTreeMap<String, &Name> = BTreeMap::new();
        for name in names {
            if let Some(first) = seen.insert(name.as_str().to_lowercase(), name) {
                self.say(
                    &[table, name.as_str()],
                    |problem| problem,
                    format!("`{name}` and `{first}` differ in case alone"),
                );
            }
        }
    }

    fn tool(&mut self, name: &Name, spec: &PypiSpec, used: bool) {
        let path = ["tools", name.as_str()];
        if !used && !TOOLS.contains(&name.as_str()) {
            let hint = nearest(name.as_str(), TOOLS).map(|near| format!("did you mean `{near}`?"));
            let more = |mut problem: Diagnostic| {
                problem.hint = hint;
                problem.expected(format!("one of {}", quoted_list(TOOLS.into_iter())))
            };
            self.say(&path, more, format!("no build and no conversion uses the tool `{name}`"));
        }
        self.pypi(&path, spec);
        self.no_files(&path, &spec.files, Kind::Tool);
    }

    fn engine(&mut self, name: &Name, spec: &EngineSpec) {
        let path = ["engines", name.as_str()];
        self.source(&[path[0], path[1], "source"], &spec.source, Kind::Engine);
        for (index, target) in spec.targets.iter().enumerate() {
            let good = !target.is_empty()
                && !target.starts_with('-')
                && !target.contains(|c: char| c.is_whitespace() || c.is_control());
            self.require(
                good,
                &[path[0], path[1], "targets", &index.to_string()],
                "not a CMake target",
                "a word that does not begin with `-`",
            );
        }
        self.define(&path, &spec.define, &spec.require);
        for (variant, more) in &spec.variant {
            self.define(&[path[0], path[1], "variant", variant.as_str()], &more.define, &more.require);
        }
    }

    fn define(&mut self, path: &[&str], define: &BTreeMap<String, super::DefineValue>, require: &[String]) {
        let variable = |name: &str| {
            name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
        };
        const EXPECTED: &str = "letters, digits, `_`, `-` and `.`, beginning with a letter or `_`";
        for (name, value) in define {
            let path = [path, &["define", name]].concat();
            self.require(variable(name), &path, "not the name of a CMake definition", EXPECTED);
            self.require(
                !value.to_cmake().contains(char::is_control),
                &path,
                "a definition contains a control character",
                "one line of text",
            );
        }
        for (index, name) in require.iter().enumerate() {
            let index = index.to_string();
            let path = [path, &["require", &index]].concat();
            self.require(variable(name), &path, "not the name of a CMake definition", EXPECTED);
        }
    }

    /// Files of a model go below `models/` alone: anywhere else in a project they could be something that git, an editor or a
    /// build runs or obeys.
    fn place(&mut self, name: &Name, spec: &ModelSpec) {
        let good = spec.place.as_ref().is_none_or(|place| place.as_str().starts_with("models/"));
        self.require(
            good,
            &["models", name.as_str(), "place"],
            "a model's `place` must be below `models/`",
            "`models/…`",
        );
    }

    fn model(&mut self, name: &Name, spec: &ModelSpec) {
        self.place(name, spec);
        let Some(source) = &spec.source else { return };
        self.source(&["models", name.as_str(), "source"], source, Kind::Model);
        if let SourceSpec::Path(source) = source {
            let from = source.path.trim_start_matches("./").trim_end_matches('/');
            let place = spec.place(name);
            let below = |inner: &str, outer: &str| {
                inner == outer || inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('/'))
            };
            if below(from, place.as_str()) || below(place.as_str(), from) || from == "." {
                self.say(
                    &["models", name.as_str(), "source", "path"],
                    |problem| problem.actual(format!("from `{from}` to `{place}`")).hint("choose another `place`"),
                    "a model's source and its place lie within each other",
                );
            }
        }
    }

    fn places(&mut self, manifest: &Manifest) {
        let mut seen: BTreeMap<(String, Option<String>), &Name> = BTreeMap::new();
        for (name, spec) in &manifest.models {
            let place = spec.place(name).as_str().to_lowercase();
            let weights = spec.weights.as_ref().map(|weights| weights.as_str().to_lowercase());
            if let Some(first) = seen.insert((place, weights), name) {
                self.say(
                    &["models", name.as_str()],
                    |problem| problem.hint("give one of them another `place` or `weights`"),
                    format!("the models `{first}` and `{name}` go to the same place"),
                );
            }
        }
    }

    fn submodules(&mut self, manifest: &Manifest) {
        let mut seen: BTreeMap<&str, &Name> = BTreeMap::new();
        for (name, spec) in &manifest.engines {
            let SourceSpec::Git(GitSpec { submodule: Some(submodule), .. }) = &spec.source else { continue };
            // An empty folder there gets the source of the engine.
            let top = submodule.as_str().split('/').next().unwrap_or_default().to_lowercase();
            let good = !submodule.as_str().split('/').any(|part| part.starts_with('.') || part.contains('~'))
                && !["build", "configs", "manifests", "models"].contains(&top.as_str());
            let path = ["engines", name.as_str(), "source", "submodule"];
            let expected = "a folder such as `external/…`, without parts that begin with `.`";
            self.require(good, &path, "a submodule cannot be at this path", expected);
            if let Some(first) = seen.insert(submodule.as_str(), name) {
                let message = format!("the engines `{first}` and `{name}` name the same submodule");
                self.say(&["engines", name.as_str(), "source", "submodule"], |problem| problem, message);
            }
        }
    }

    fn source(&mut self, path: &[&str], spec: &SourceSpec, kind: Kind) {
        match spec {
            SourceSpec::Git(spec) => self.git(path, spec),
            SourceSpec::Hf(spec) => {
                self.hf(path, spec);
                self.require(
                    kind == Kind::Model,
                    path,
                    "a Hugging Face repository holds weights, not sources to build",
                    "a `git`, `url`, `path` or `pypi` source",
                );
            }
            SourceSpec::Url(spec) => {
                self.url(path, spec);
                self.no_files(path, &spec.files, kind);
            }
            SourceSpec::Path(spec) => {
                self.path(path, spec);
                self.no_files(path, &spec.files, kind);
            }
            SourceSpec::Pypi(spec) => {
                self.pypi(path, spec);
                self.no_files(path, &spec.files, kind);
            }
        }
    }

    fn no_files(&mut self, path: &[&str], files: &[String], kind: Kind) {
        let path = [path, &["files"]].concat();
        if kind == Kind::Model {
            self.globs(&path, files);
        } else if !files.is_empty() {
            self.say(
                &path,
                |problem| problem,
                format!("`files` is for models only, and this is {}", kind.with_article()),
            );
        }
    }

    fn globs(&mut self, path: &[&str], globs: &[String]) {
        if globs.len() > MAX_GLOBS {
            self.say(
                path,
                |problem| problem.expected(format!("at most {MAX_GLOBS}")).actual(globs.len().to_string()),
                "there are too many globs",
            );
        }
        for (index, pattern) in globs.iter().take(MAX_GLOBS).enumerate() {
            if let Err(why) = glob(pattern) {
                self.say(&[path, &[&index.to_string()]].concat(), |problem| problem, format!("invalid glob: {why}"));
            }
        }
    }

    fn git(&mut self, path: &[&str], spec: &GitSpec) {
        let at = |key| [path, &[key]].concat();
        let is_web = ["https://", "http://"].iter().any(|scheme| spec.git.as_str().starts_with(scheme));
        self.require(!(is_web && spec.git.user_info().is_some()), &at("git"), SECRET.0, SECRET.1);
        let given = [("rev", spec.rev.is_some()), ("tag", spec.tag.is_some()), ("branch", spec.branch.is_some())];
        let given: Vec<&str> = given.into_iter().filter_map(|(key, is_given)| is_given.then_some(key)).collect();
        if let [_, second, ..] = given[..] {
            let actual = quoted_list(given.iter().copied());
            self.say(
                &at(second),
                |problem| problem.expected("at most one of `rev`, `tag` and `branch`").actual(actual),
                "a git source names exactly one revision",
            );
        }
        for (key, value) in [("tag", &spec.tag), ("branch", &spec.branch)] {
            let good = value.as_ref().is_none_or(|value| is_ref_name(value));
            self.require(good, &at(key), "not a valid git name", REF_NAME);
        }
    }

    fn hf(&mut self, path: &[&str], spec: &HfSpec) {
        let at = |key| [path, &[key]].concat();
        let part = |part: &str| {
            (1..=96).contains(&part.len())
                && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && !part.contains("..")
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        let good = spec.hf.split_once('/').is_some_and(|(owner, repository)| part(owner) && part(repository));
        if !good {
            let from_address = ["hf://", "https://huggingface.co/", "https://hf.co/"]
                .iter()
                .find_map(|start| spec.hf.strip_prefix(start));
            let hint =
                from_address.map(|rest| format!("write `{}`", rest.split('/').take(2).collect::<Vec<_>>().join("/")));
            let more = |mut problem: Diagnostic| {
                problem.hint = hint;
                problem.expected("`org/repo`")
            };
            self.say(&at("hf"), more, "not the name of a Hugging Face repository");
        }
        let rev = spec.rev.as_ref().is_none_or(|rev| is_ref_name(rev));
        self.require(rev, &at("rev"), "not a valid git name", REF_NAME);
        self.globs(&at("files"), &spec.files);
    }

    fn url(&mut self, path: &[&str], spec: &UrlSpec) {
        let path = [path, &["url"]].concat();
        if spec.url.starts_with("file:") {
            return self.say(
                &path,
                |problem| problem.hint("write `path = \"…\"` instead"),
                "a local file is a `path` source",
            );
        }
        let rest = spec.url.strip_prefix("https://").or_else(|| spec.url.strip_prefix("http://"));
        let good = rest.is_some_and(|rest| !authority(rest).is_empty())
            && !spec.url.contains(|c: char| c.is_whitespace() || c.is_control());
        self.require(good, &path, "not the URL of a file", "`https://…` or `http://…`");
        self.require(!rest.is_some_and(has_user), &path, SECRET.0, SECRET.1);
    }

    fn path(&mut self, path: &[&str], spec: &PathSpec) {
        let path = [path, &["path"]].concat();
        let good = !spec.path.trim().is_empty() && !spec.path.contains(char::is_control);
        self.require(good, &path, "not a path", "a folder or file, relative to the project");
        let drive = spec.path.as_bytes().get(1) == Some(&b':');
        if spec.path.starts_with(['/', '\\']) || drive {
            let warning = Diagnostic::warning("an absolute path works on this machine only");
            self.problems.push(warning.at(&self.document.source, self.document.span_of(&path)));
        }
    }

    fn pypi(&mut self, path: &[&str], spec: &PypiSpec) {
        let at = |key| [path, &[key]].concat();
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        let good = spec.pypi.len() <= 128
            && edge(spec.pypi.chars().next())
            && edge(spec.pypi.chars().next_back())
            && spec.pypi.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        self.require(good, &at("pypi"), "not the name of a Python package", "letters, digits, `.`, `_` and `-`");
        let exact = spec.version.len() <= 64
            && spec.version.starts_with(|c: char| c.is_ascii_digit())
            && spec.version.chars().all(|c| c.is_ascii_alphanumeric() || ".!+-_".contains(c));
        self.require(exact, &at("version"), "not an exact version", "such as `4.4.4`, without `==`, `>=` or `*`");
    }
}

const REF_NAME: &str = "a branch, tag or commit: no spaces, no `..`, none of `~^:?*[\\`, no `-` at the beginning";

/// What `git check-ref-format` refuses is refused, roughly.
fn is_ref_name(text: &str) -> bool {
    (1..=200).contains(&text.len())
        && !text.starts_with(['-', '/', '.'])
        && !text.ends_with(['/', '.'])
        && !text.contains("..")
        && !text.contains("//")
        && !text.contains("@{")
        && !text.contains(|c: char| c.is_whitespace() || c.is_control() || "~^:?*[\\".contains(c))
}

const SECRET: (&str, &str) = (
    "an address must not carry a user or password: it would be written to the lockfile",
    "an address without `user:password@`",
);

/// Host and port of an address without its scheme.
fn authority(rest: &str) -> &str {
    rest.split(['/', '?', '#']).next().unwrap_or(rest)
}

fn has_user(rest: &str) -> bool {
    authority(rest).contains('@')
}
