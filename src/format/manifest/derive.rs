//! Models that are made on this machine from other models: `[models.<name>.derive]`.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::diagnostic::{Diagnostic, Diagnostics, nearest};
use crate::base::name::Name;
use crate::format::document::Document;

use super::{Manifest, SourceSpec};

/// A model that an engine makes from another one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeriveSpec {
    /// The model of this manifest that it is made from.
    pub from: Name,
    /// The engine of this manifest whose own program makes it.
    pub engine: Name,
    /// The type that its weights are quantized to, in the engine's words: `Q4_0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize: Option<String>,
    /// With the engine's own converter, from the files that models are trained and published in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub convert: Option<ConvertSpec>,
}

/// What a converter needs beside the model.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConvertSpec {
    /// The model of this manifest that says which neurons will be busy.
    pub predictor: Name,
    /// The Python packages that the converter is given, and no others: entries of `[tools]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub python: Vec<Name>,
}

/// What is done to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step<'a> {
    /// To this type, in the engine's words.
    Quantize(&'a str),
    /// From the published files.
    Convert(&'a ConvertSpec),
}

impl DeriveSpec {
    /// The parser has seen to it that there is one.
    pub fn step(&self) -> Option<Step<'_>> {
        let convert = self.convert.as_ref().map(Step::Convert);
        convert.or_else(|| self.quantize.as_deref().map(Step::Quantize))
    }

    /// The models that it is made from: `from`, and the predictor.
    pub fn inputs(&self) -> Vec<&Name> {
        [&self.from].into_iter().chain(self.convert.as_ref().map(|convert| &convert.predictor)).collect()
    }

    /// The Python packages that it takes.
    pub fn packages(&self) -> &[Name] {
        self.convert.as_ref().map_or(&[], |convert| &convert.python)
    }
}

impl std::fmt::Display for Step<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Quantize(kind) => write!(f, "quantize to {kind}"),
            Self::Convert(_) => f.write_str("convert"),
        }
    }
}

/// What a lockfile's entry answers: the manifest's source or derivation, word for word.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Request {
    /// It is fetched.
    Source(SourceSpec),
    /// It is made on this machine.
    Derive(DeriveSpec),
}

impl Request {
    /// The source; None when the model is derived.
    pub fn source(&self) -> Option<&SourceSpec> {
        if let Self::Source(source) = self { Some(source) } else { None }
    }
}

impl From<SourceSpec> for Request {
    fn from(source: SourceSpec) -> Self {
        Self::Source(source)
    }
}

impl Manifest {
    /// Whether a model is derived with that Python package.
    pub(super) fn derives_with(&self, tool: &Name) -> bool {
        self.models.values().filter_map(|spec| spec.derive.as_ref()).any(|derive| derive.packages().contains(tool))
    }

    /// Every model after those that it is derived from.
    pub fn models_in_order(&self) -> Vec<&Name> {
        let mut order = Vec::with_capacity(self.models.len());
        self.models.keys().for_each(|name| self.add_in_order(name, &mut order));
        order
    }

    /// Ends because the parser refuses circles.
    fn add_in_order<'a>(&'a self, name: &'a Name, order: &mut Vec<&'a Name>) {
        let Some(spec) = self.models.get(name).filter(|_| !order.contains(&name)) else { return };
        let inputs = spec.derive.iter().flat_map(DeriveSpec::inputs);
        inputs.for_each(|input| self.add_in_order(input, order));
        order.push(name);
    }
}

/// What the types cannot say of derived models: one of two keys, names that exist, no circles.
pub(super) fn check(manifest: &Manifest, document: &Document) -> Vec<Diagnostic> {
    let mut check = Check { manifest, document, problems: Diagnostics::default() };
    for (name, spec) in &manifest.models {
        let path = ["models", name.as_str(), "derive"];
        match (&spec.source, &spec.derive) {
            (Some(_), None) => {}
            (None, Some(derive)) => check.derive(name, derive),
            (Some(_), Some(_)) => {
                check.say(&path, format!("model `{name}` has both `source` and `derive`"), "remove one of them");
            }
            (None, None) => {
                let hint = "say where it comes from with `source`, or what it is made from with `derive`";
                check.say(&path[..2], format!("model `{name}` has neither `source` nor `derive`"), hint);
            }
        }
    }
    check.problems.0
}

struct Check<'a> {
    manifest: &'a Manifest,
    document: &'a Document,
    problems: Diagnostics,
}

impl Check<'_> {
    fn say(&mut self, path: &[&str], message: String, hint: &str) {
        self.problems.push(self.document.error(path, message).hint(hint));
    }

    fn derive(&mut self, name: &Name, spec: &DeriveSpec) {
        let at = |key| ["models", name.as_str(), "derive", key];
        self.known(&at("from"), "model", &spec.from, self.manifest.models.keys());
        self.known(&at("engine"), "engine", &spec.engine, self.manifest.engines.keys());
        match (&spec.quantize, &spec.convert) {
            (None, None) => {
                let message = format!("model `{name}`: `derive` has neither `quantize` nor `convert`");
                self.say(&at("from")[..3], message, "add `quantize = \"…\"` or `convert = { … }`");
            }
            (Some(_), Some(_)) => {
                let message = format!("model `{name}`: `derive` has both `quantize` and `convert`");
                self.say(&at("convert"), message, "use two models, one derived from the other");
            }
            _ => {}
        }
        if let Some(convert) = &spec.convert {
            let at = |key| ["models", name.as_str(), "derive", "convert", key];
            self.known(&at("predictor"), "model", &convert.predictor, self.manifest.models.keys());
            convert.python.iter().for_each(|tool| self.known(&at("python"), "tool", tool, self.manifest.tools.keys()));
        }
        if let Some(circle) = self.circle(name) {
            self.say(&at("from"), format!("model `{name}` is derived from itself: {circle}"), "name another model");
        }
    }

    fn known<'n>(&mut self, path: &[&str], what: &str, name: &Name, known: impl Iterator<Item = &'n Name>) {
        let known: Vec<&str> = known.map(Name::as_str).collect();
        if known.contains(&name.as_str()) {
            return;
        }
        let mut problem = self.document.error(path, format!("the manifest has no {what} `{name}`"));
        problem.hint = nearest(name.as_str(), known).map(|near| format!("did you mean `{near}`?"));
        self.problems.push(problem);
    }

    /// The way from a model back to itself, if there is one.
    fn circle(&self, name: &Name) -> Option<String> {
        let inputs =
            |of: &Name| self.manifest.models.get(of).and_then(|spec| spec.derive.as_ref()).map(DeriveSpec::inputs);
        let mut seen = BTreeSet::new();
        let mut ways = vec![vec![name]];
        while let Some(way) = ways.pop() {
            for input in way.last().and_then(|last| inputs(last)).unwrap_or_default() {
                let further = [way.as_slice(), &[input]].concat();
                if input == name {
                    return Some(further.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" from "));
                }
                if seen.insert(input) {
                    ways.push(further);
                }
            }
        }
        None
    }
}
