//! Checks a [`Document`] against the schema of a Rust type and converts it, all problems at once.
//!
//! serde stops at the first problem and forgets places; here the JSON Schema that schemars derives from the same type is walked along the
//! document, so a type says once what its file may hold. Beyond JSON Schema: tables are closed unless they are maps, an empty optional key
//! counts as absent, and strings with a rule ([`Name`], [`RelPath`], [`Digest`]) are judged by their own parser.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::base::address::Address;
use crate::base::commit::Commit;
use crate::base::diagnostic::{Diagnostic, Diagnostics, nearest};
use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};

use super::document::{Document, Entry, Node, Syntax, Value};

/// References within references: our types do not contain themselves.
const MAX_DEPTH: usize = 32;

/// The JSON Schema of a type, for editors.
pub fn of<T: JsonSchema>() -> Json {
    schemars::schema_for!(T).to_value()
}

/// The rules of one type, worked out at first use.
#[derive(Debug)]
pub struct Schema<T> {
    rule: OnceLock<Rule>,
    of: PhantomData<fn() -> T>,
}

impl<T> Default for Schema<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Schema<T> {
    /// Rules that are compiled at their first use.
    pub const fn new() -> Self {
        Self { rule: OnceLock::new(), of: PhantomData }
    }
}

impl<T: DeserializeOwned + JsonSchema> Schema<T> {
    /// # Errors
    /// Everything that is wrong with the document's types, keys and ranges, in the order of the text.
    pub fn decode(&self, document: &Document) -> Result<T, Diagnostics> {
        let mut check = Check { document, problems: Diagnostics::default() };
        let json = check.node(self.rule(), &document.root, &Path::ROOT);
        if check.problems.has_errors() {
            check.problems.sort();
            return Err(check.problems);
        }
        serde_json::from_value(json)
            .map_err(|error| Diagnostic::error(error.to_string()).at(&document.source, document.span_of(&[])).into())
    }

    /// Whether every part of the type is checked here, rather than by serde alone, which tells no places.
    #[cfg(test)]
    pub(super) fn is_understood(&self) -> bool {
        is_understood(self.rule())
    }

    fn rule(&self) -> &Rule {
        self.rule.get_or_init(|| {
            let schema = of::<T>();
            Compiler { definitions: &schema["$defs"] }.rule(&schema, MAX_DEPTH)
        })
    }
}

/// What a value may be.
#[derive(Debug, Clone, PartialEq)]
enum Rule {
    Bool,
    Integer {
        min: i64,
        max: i64,
    },
    Number {
        min: f64,
        max: f64,
    },
    Text {
        min: u64,
        max: u64,
        kind: TextKind,
    },
    Choice(Vec<String>),
    Array {
        item: Box<Rule>,
        max: u64,
    },
    Table(TableRule),
    Either(Vec<Rule>),
    /// A schema that this module does not understand: serde alone judges it.
    Any,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct TableRule {
    keys: BTreeMap<String, Rule>,
    required: Vec<String>,
    /// A map: what other keys and their values may be.
    rest: Option<(TextKind, Box<Rule>)>,
}

/// The parser of a string.
#[derive(Debug, Clone, Copy, PartialEq)]
enum TextKind {
    Free,
    Name,
    RelPath,
    Digest,
    Commit,
    Address,
}

impl TextKind {
    fn check(self, text: &str) -> Result<(), String> {
        match self {
            Self::Free => Ok(()),
            Self::Name => text.parse::<Name>().map(drop).map_err(|error| error.to_string()),
            Self::RelPath => text.parse::<RelPath>().map(drop).map_err(|error| error.to_string()),
            Self::Digest => text.parse::<Digest>().map(drop).map_err(|error| error.to_string()),
            Self::Commit => text.parse::<Commit>().map(drop).map_err(|error| error.to_string()),
            Self::Address => text.parse::<Address>().map(drop).map_err(|error| error.to_string()),
        }
    }
}

struct Compiler<'a> {
    definitions: &'a Json,
}

impl Compiler<'_> {
    fn rule(&self, schema: &Json, depth: usize) -> Rule {
        let Some(depth) = depth.checked_sub(1) else { return Rule::Any };
        if let Some(name) = schema["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/")) {
            return match name {
                "Name" => text_rule(schema, TextKind::Name),
                "RelPath" => text_rule(schema, TextKind::RelPath),
                "Digest" => text_rule(schema, TextKind::Digest),
                "Commit" => text_rule(schema, TextKind::Commit),
                "Address" => text_rule(schema, TextKind::Address),
                _ => self.rule(&self.definitions[name], depth),
            };
        }
        if let Some(branches) = schema["anyOf"].as_array().or_else(|| schema["oneOf"].as_array()) {
            return self.either(branches, depth);
        }
        if let Some(choices) = schema["enum"].as_array() {
            return Rule::Choice(choices.iter().filter_map(Json::as_str).map(str::to_owned).collect());
        }
        if let Some(choice) = schema["const"].as_str() {
            return Rule::Choice(vec![choice.to_owned()]);
        }
        let types: Vec<&str> = match &schema["type"] {
            Json::String(one) => vec![one],
            Json::Array(several) => several.iter().filter_map(Json::as_str).filter(|name| *name != "null").collect(),
            _ => return Rule::Any,
        };
        match types[..] {
            ["boolean"] => Rule::Bool,
            ["integer"] => integer_rule(schema),
            ["number"] => Rule::Number {
                min: schema["minimum"].as_f64().unwrap_or(f64::MIN),
                max: schema["maximum"].as_f64().unwrap_or(f64::MAX),
            },
            ["string"] => text_rule(schema, TextKind::Free),
            ["array"] => Rule::Array {
                item: Box::new(self.rule(&schema["items"], depth)),
                max: schema["maxItems"].as_u64().unwrap_or(u64::MAX),
            },
            ["object"] => Rule::Table(self.table(schema, depth)),
            _ => Rule::Any,
        }
    }

    /// Null is left out: a key without a value counts as absent.
    fn either(&self, branches: &[Json], depth: usize) -> Rule {
        let mut rules: Vec<Rule> =
            branches.iter().filter(|branch| branch["type"] != "null").map(|branch| self.rule(branch, depth)).collect();
        let flat = |rule| if let Rule::Either(inner) = rule { inner } else { vec![rule] };
        rules = rules.into_iter().flat_map(flat).collect();
        if rules.iter().all(|rule| matches!(rule, Rule::Choice(_))) {
            let choices =
                rules.into_iter().filter_map(|rule| if let Rule::Choice(list) = rule { Some(list) } else { None });
            return Rule::Choice(choices.flatten().collect());
        }
        match rules.pop() {
            Some(only) if rules.is_empty() => only,
            Some(last) => {
                rules.push(last);
                Rule::Either(rules)
            }
            None => Rule::Any,
        }
    }

    fn table(&self, schema: &Json, depth: usize) -> TableRule {
        let keys = schema["properties"].as_object().into_iter().flatten();
        let pattern = schema["patternProperties"].as_object().and_then(|patterns| patterns.iter().next());
        let rest = match (pattern, &schema["additionalProperties"]) {
            (Some((pattern, value)), _) => {
                let kind = if pattern == Name::PATTERN { TextKind::Name } else { TextKind::Free };
                Some((kind, Box::new(self.rule(value, depth))))
            }
            (None, value @ Json::Object(_)) => Some((TextKind::Free, Box::new(self.rule(value, depth)))),
            _ => None,
        };
        TableRule {
            keys: keys.map(|(key, value)| (key.clone(), self.rule(value, depth))).collect(),
            required: schema["required"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Json::as_str)
                .map(str::to_owned)
                .collect(),
            rest,
        }
    }
}

fn text_rule(schema: &Json, kind: TextKind) -> Rule {
    Rule::Text {
        min: schema["minLength"].as_u64().unwrap_or(0),
        max: schema["maxLength"].as_u64().unwrap_or(u64::MAX),
        kind,
    }
}

fn integer_rule(schema: &Json) -> Rule {
    let (min, max) = match schema["format"].as_str() {
        Some("uint8") => (0, i64::from(u8::MAX)),
        Some("uint16") => (0, i64::from(u16::MAX)),
        Some("uint32") => (0, i64::from(u32::MAX)),
        Some("uint64" | "uint") => (0, i64::MAX),
        Some("int32") => (i64::from(i32::MIN), i64::from(i32::MAX)),
        _ => (i64::MIN, i64::MAX),
    };
    Rule::Integer { min: schema["minimum"].as_i64().unwrap_or(min), max: schema["maximum"].as_i64().unwrap_or(max) }
}

impl fmt::Display for Rule {
    /// What is expected, as a noun.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool => f.write_str("`true` or `false`"),
            Self::Integer { min, max } if min == max => write!(f, "`{min}`"),
            Self::Integer { min: i64::MIN, max: i64::MAX } => f.write_str("a whole number"),
            Self::Integer { min, max: i64::MAX } => write!(f, "a whole number from {min}"),
            Self::Integer { min, max } => write!(f, "a whole number from {min} to {max}"),
            Self::Number { min, max } if *min == f64::MIN && *max == f64::MAX => f.write_str("a number"),
            Self::Number { min, max } => write!(f, "a number from {min} to {max}"),
            Self::Text { kind: TextKind::RelPath, .. } => f.write_str("a path inside its folder"),
            Self::Text { kind: TextKind::Digest, .. } => f.write_str("`sha256:` and 64 hexadecimal digits"),
            Self::Text { kind: TextKind::Commit, .. } => f.write_str("40 lowercase hexadecimal digits"),
            Self::Text { .. } => f.write_str("a string"),
            Self::Choice(choices) => write!(f, "one of {}", quoted_list(choices.iter().map(String::as_str))),
            Self::Array { .. } => f.write_str("a list"),
            Self::Table(_) => f.write_str("a table"),
            Self::Either(rules) => {
                let mut words: Vec<String> = rules.iter().map(Self::to_string).collect();
                words.dedup();
                f.write_str(&words.join(" or "))
            }
            Self::Any => f.write_str("a value"),
        }
    }
}

/// `a`, `b`, `c`: at most 40 of them.
pub fn quoted_list<'a>(items: impl Iterator<Item = &'a str>) -> String {
    let items: Vec<String> = items.take(40).map(|item| format!("`{item}`")).collect();
    items.join(", ")
}

/// The keys that lead to a value, innermost last.
struct Path<'a> {
    above: Option<&'a Path<'a>>,
    step: Step<'a>,
}

enum Step<'a> {
    Root,
    Key(&'a Entry),
    Item(usize),
}

impl Path<'_> {
    const ROOT: Path<'static> = Path { above: None, step: Step::Root };

    /// The nearest key, where a problem of a table is shown.
    fn span(&self, node: &Node) -> Range<usize> {
        match self.step {
            Step::Key(entry) => entry.key_span.clone(),
            Step::Root | Step::Item(_) => node.span.start..node.span.end.min(node.span.start + 1),
        }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(above) = self.above {
            above.fmt(f)?;
            let dot = if matches!(above.step, Step::Root) { "" } else { "." };
            match self.step {
                Step::Root => {}
                Step::Key(entry) => write!(f, "{dot}{}", shown(&entry.key))?,
                Step::Item(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// What other programs call a key or value: llama.cpp, ollama, vLLM, transformers.
const ALIASES: [(&str, &[&str]); 12] = [
    ("context_size", &["ctx_size", "n_ctx", "num_ctx", "ctx", "max_model_len", "context_length"]),
    ("gpu_layers", &["ngl", "n_gpu_layers", "num_gpu"]),
    ("max_tokens", &["n_predict", "num_predict", "max_new_tokens", "max_completion_tokens"]),
    ("threads", &["n_threads", "num_thread", "num_threads"]),
    ("batch_size", &["n_batch", "num_batch"]),
    ("parallel", &["n_parallel", "np", "max_num_seqs"]),
    ("temperature", &["temp"]),
    ("repeat_penalty", &["repetition_penalty"]),
    ("stop", &["stop_sequences", "stop_strings"]),
    ("cuda", &["gpu", "nvidia", "cublas"]),
    ("rocm", &["hip", "amd", "hipblas"]),
    ("metal", &["mps"]),
];

/// The one of `known` that other programs call `text`.
fn alias<'k>(text: &str, mut known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    let text = text.to_ascii_lowercase().replace('-', "_");
    let (ours, _) = ALIASES.iter().find(|(_, theirs)| theirs.contains(&text.as_str()))?;
    known.find(|known| known == ours)
}

/// Text from a file for a message, cut to a limit.
fn shown(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

struct Check<'a> {
    document: &'a Document,
    problems: Diagnostics,
}

impl Check<'_> {
    fn report(&mut self, span: Range<usize>, problem: Diagnostic) -> Json {
        self.problems.push(problem.at(&self.document.source, span));
        Json::Null
    }

    fn wrong(&mut self, rule: &Rule, node: &Node, path: &Path<'_>, what: &str) -> Json {
        let span = match node.value {
            Value::Table(_) | Value::Array(_) | Value::Null => path.span(node),
            _ => node.span.clone(),
        };
        let subject = if path.above.is_some() { format!("`{path}`") } else { "the document".to_owned() };
        let problem = Diagnostic::error(format!("{subject} {what}")).expected(rule.to_string());
        self.report(span, problem.actual(self.describe(node)))
    }

    fn describe(&self, node: &Node) -> String {
        match &node.value {
            Value::Null => "nothing".to_owned(),
            Value::Bool(flag) => format!("`{flag}`"),
            Value::Int(_) | Value::Float(_) => format!("the number `{}`", shown(self.document.verbatim(node))),
            Value::Text(text) => format!("the string `{}`", shown(text)),
            Value::Date => "a date".to_owned(),
            Value::Array(_) => "a list".to_owned(),
            Value::Table(_) => "a table".to_owned(),
        }
    }

    /// Checks and converts one value; null where it is wrong.
    fn node(&mut self, rule: &Rule, node: &Node, path: &Path<'_>) -> Json {
        match (rule, &node.value) {
            (Rule::Bool, Value::Bool(flag)) => (*flag).into(),
            (Rule::Integer { min, max }, Value::Int(number)) if (min..=max).contains(&number) => (*number).into(),
            (Rule::Number { min, max }, Value::Float(number)) if (min..=max).contains(&number) => (*number).into(),
            (Rule::Number { min, max }, Value::Int(number)) if (*min..=*max).contains(&(*number as f64)) => {
                (*number).into()
            }
            (Rule::Integer { .. }, Value::Int(_)) | (Rule::Number { .. }, Value::Int(_) | Value::Float(_)) => {
                self.wrong(rule, node, path, "is out of range")
            }
            // Digits beyond 64 bits.
            (Rule::Integer { .. }, Value::Float(number)) if number.abs() >= i64::MAX as f64 => {
                self.wrong(rule, node, path, "is out of range")
            }
            (Rule::Text { .. }, Value::Text(text)) => self.text(rule, text, node, path),
            // An unquoted YAML scalar is a string where a string is expected.
            (Rule::Text { .. }, Value::Int(_) | Value::Float(_) | Value::Bool(_))
                if self.document.syntax == Syntax::Yaml =>
            {
                self.text(rule, self.document.verbatim(node), node, path)
            }
            (Rule::Choice(choices), Value::Text(text)) if choices.contains(text) => text.as_str().into(),
            (Rule::Choice(choices), Value::Text(text)) => self.choice(rule, choices, text, node, path),
            (Rule::Array { item, max }, Value::Array(items)) => {
                if items.len() as u64 > *max {
                    let problem =
                        Diagnostic::error(format!("`{path}` is too long")).expected(format!("at most {max} values"));
                    self.report(path.span(node), problem.actual(items.len().to_string()));
                }
                let step = |index| Path { above: Some(path), step: Step::Item(index) };
                items.iter().enumerate().map(|(index, below)| self.node(item, below, &step(index))).collect()
            }
            (Rule::Table(rule), Value::Table(entries)) => self.table(rule, entries, node, path),
            (Rule::Either(rules), _) => self.either(rule, rules, node, path),
            (Rule::Any, _) => any(node),
            _ => self.wrong(rule, node, path, "has the wrong type"),
        }
    }

    fn text(&mut self, rule: &Rule, text: &str, node: &Node, path: &Path<'_>) -> Json {
        let &Rule::Text { min, max, kind } = rule else { return Json::Null };
        if let Err(message) = kind.check(text) {
            return self.report(node.span.clone(), Diagnostic::error(format!("`{path}`: {message}")));
        }
        let length = text.chars().count() as u64;
        if length < min || length > max {
            let problem = Diagnostic::error(format!("`{path}` has the wrong length"));
            return self.report(
                node.span.clone(),
                problem.expected(format!("{min} to {max} characters")).actual(length.to_string()),
            );
        }
        text.into()
    }

    fn choice(&mut self, rule: &Rule, choices: &[String], text: &str, node: &Node, path: &Path<'_>) -> Json {
        let mut problem = Diagnostic::error(format!("`{path}` cannot be `{}`", shown(text))).expected(rule.to_string());
        let known = || choices.iter().map(String::as_str);
        if let Some(near) = alias(text, known()).or_else(|| nearest(text, known())) {
            problem = problem.hint(format!("did you mean `{near}`?"));
        }
        self.report(node.span.clone(), problem)
    }

    fn table(&mut self, rule: &TableRule, entries: &[Entry], node: &Node, path: &Path<'_>) -> Json {
        let mut converted = serde_json::Map::with_capacity(entries.len());
        for entry in entries {
            let below = Path { above: Some(path), step: Step::Key(entry) };
            let value_rule = match (rule.keys.get(&entry.key), &rule.rest) {
                (Some(value_rule), _) => value_rule,
                (None, Some((kind, value_rule))) => {
                    if let Err(message) = kind.check(&entry.key) {
                        self.report(entry.key_span.clone(), Diagnostic::error(message));
                    }
                    &**value_rule
                }
                (None, None) => {
                    self.unknown_key(rule, entry, path);
                    continue;
                }
            };
            let optional = rule.rest.is_none() && !rule.required.contains(&entry.key);
            if !(optional && entry.node.value == Value::Null) {
                converted.insert(entry.key.clone(), self.node(value_rule, &entry.node, &below));
            }
        }
        for key in rule.required.iter().filter(|key| node.get(key).is_none()) {
            let place = if path.above.is_some() { format!("`{path}` has no") } else { "the file has no".to_owned() };
            let expected = rule.keys.get(key).map(Rule::to_string).unwrap_or_default();
            self.report(path.span(node), Diagnostic::error(format!("{place} key `{key}`")).expected(expected));
        }
        Json::Object(converted)
    }

    fn unknown_key(&mut self, rule: &TableRule, entry: &Entry, path: &Path<'_>) {
        let place = if path.above.is_some() { format!(" in `{path}`") } else { String::new() };
        let problem = Diagnostic::error(format!("unknown key `{}`{place}", shown(&entry.key)));
        let known = || rule.keys.keys().map(String::as_str);
        let problem = match alias(&entry.key, known()).or_else(|| nearest(&entry.key, known())) {
            Some(near) => problem.hint(format!("did you mean `{near}`?")),
            None => problem.expected(format!("one of {}", quoted_list(known()))),
        };
        self.report(entry.key_span.clone(), problem);
    }

    /// Tables are told apart by the first key that they require, other values by their type.
    fn either(&mut self, rule: &Rule, rules: &[Rule], node: &Node, path: &Path<'_>) -> Json {
        let Value::Table(_) = node.value else {
            let fits = |rule: &&Rule| {
                matches!(
                    (rule, &node.value),
                    (Rule::Bool, Value::Bool(_))
                        | (Rule::Integer { .. }, Value::Int(_))
                        | (Rule::Text { .. }, Value::Text(_))
                )
            };
            return match rules.iter().find(fits) {
                Some(fitting) => self.node(fitting, node, path),
                None => self.wrong(rule, node, path, "has the wrong type"),
            };
        };
        let sign = |rule: &Rule| match rule {
            Rule::Table(table) => table.required.first().cloned(),
            _ => None,
        };
        let given: Vec<(&Rule, String)> = rules
            .iter()
            .filter_map(|rule| Some((rule, sign(rule)?)))
            .filter(|(_, key)| node.get(key).is_some())
            .collect();
        if let [(chosen, _)] = given[..] {
            return self.node(chosen, node, path);
        }
        let signs: Vec<String> = rules.iter().filter_map(sign).collect();
        let listed = quoted_list(signs.iter().map(String::as_str));
        let problem = Diagnostic::error(match given.is_empty() {
            true => format!("`{path}` must have one of: {listed}"),
            false => format!("`{path}` must have only one of: {listed}"),
        });
        let keys = if let Value::Table(entries) = &node.value { &entries[..] } else { &[] };
        let near = keys.iter().find_map(|entry| nearest(&entry.key, signs.iter().map(String::as_str)));
        let problem = match near.filter(|_| given.is_empty()) {
            Some(near) => problem.hint(format!("did you mean `{near}`?")),
            None => problem,
        };
        let actual = quoted_list(given.iter().map(|(_, key)| key.as_str()));
        self.report(path.span(node), if given.is_empty() { problem } else { problem.actual(actual) })
    }
}

fn any(node: &Node) -> Json {
    match &node.value {
        Value::Null | Value::Date => Json::Null,
        Value::Bool(flag) => (*flag).into(),
        Value::Int(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Text(text) => text.as_str().into(),
        Value::Array(items) => items.iter().map(any).collect(),
        Value::Table(entries) => entries.iter().map(|entry| (entry.key.clone(), any(&entry.node))).collect(),
    }
}

/// Whether serde is left alone with no part of a rule.
#[cfg(test)]
fn is_understood(rule: &Rule) -> bool {
    match rule {
        Rule::Any => false,
        Rule::Array { item, .. } => is_understood(item),
        Rule::Either(rules) => rules.iter().all(is_understood),
        Rule::Table(table) => {
            table.keys.values().all(is_understood) && table.rest.as_ref().is_none_or(|(_, rule)| is_understood(rule))
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn a_rule_that_is_not_understood_is_noticed() {
        let strange = serde_json::json!({ "type": "object", "properties": { "x": { "not": {} } } });
        assert!(!is_understood(&Compiler { definitions: &Json::Null }.rule(&strange, MAX_DEPTH)));
    }
}
