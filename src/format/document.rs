//! TOML and YAML as one tree in which every value and every key knows its place in the text.
//!
//! Nothing of serde here: a serde front end gives up at the first problem and forgets places. YAML is the 1.2 core schema without tags;
//! a plain scalar keeps its own spelling (see [`Document::verbatim`]), so that `1.10` can be a version. Absent: merge keys, several
//! documents in one file, dates.

mod syntax;

use std::collections::{BTreeMap, HashMap};
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use granit_parser::{Event, Parser, ScalarStyle, Span};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::base::diagnostic::{Diagnostic, Diagnostics, SourceText};

/// Tables and arrays within each other.
const MAX_DEPTH: usize = 32;
/// Values in a YAML document, with those that aliases repeat.
const MAX_YAML_NODES: usize = 50_000;

/// The language of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syntax {
    /// TOML 1.0.
    Toml,
    /// YAML 1.2, core schema.
    Yaml,
}

/// A text and its parsed tree.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// The text.
    pub source: Arc<SourceText>,
    /// The whole document.
    pub root: Node,
    /// The language that it is written in.
    pub syntax: Syntax,
}

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The value.
    pub value: Value,
    /// Byte offsets.
    pub span: Range<usize>,
}

/// A value of a document.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// YAML's null, or a key without a value.
    Null,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Also an integer beyond 64 bits.
    Float(f64),
    /// A string.
    Text(String),
    /// A TOML date or time: no format uses one.
    Date,
    /// A list.
    Array(Vec<Node>),
    /// In the order of the text.
    Table(Vec<Entry>),
}

/// A key of a table with its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Where the key is, as byte offsets.
    pub key_span: Range<usize>,
    /// The value.
    pub node: Node,
}

impl Node {
    /// The entry of a table.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        match &self.value {
            Value::Table(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }

    /// What repeating it costs, in values; 16 bytes of text cost as much as one.
    fn weight(&self) -> usize {
        1 + match &self.value {
            Value::Text(text) => text.len() / 16,
            Value::Array(items) => items.iter().map(Self::weight).sum(),
            Value::Table(entries) => entries.iter().map(|entry| 1 + entry.key.len() / 16 + entry.node.weight()).sum(),
            _ => 0,
        }
    }
}

impl Document {
    /// # Errors
    /// Too long (over `max_bytes`), not UTF-8, or every syntax error found. A merge conflict or a quote that is never closed is
    /// reported alone.
    pub fn parse(syntax: Syntax, name: &str, bytes: &[u8], max_bytes: usize) -> Result<Self, Diagnostics> {
        let source = decode_text(name, bytes, max_bytes)?;
        let root = match syntax {
            Syntax::Toml => parse_toml(&source),
            Syntax::Yaml => YamlReader::new(&source).read(),
        };
        let root = root.map_err(|problems| syntax::first_cause(syntax, &source).map_or(problems, Diagnostics::from))?;
        Ok(Self { source, root, syntax })
    }

    /// The value at a path of keys; items of an array by their number.
    pub fn find(&self, path: &[&str]) -> Option<&Node> {
        path.iter().try_fold(&self.root, |node, step| child(node, step).map(|(node, _)| node))
    }

    /// Where to point for `path`: its value (a table's key, since tables are long), else the nearest thing above that exists.
    pub fn span_of(&self, path: &[&str]) -> Range<usize> {
        let (mut node, mut span) = (&self.root, head(&self.root));
        for step in path {
            let Some((below, key_span)) = child(node, step) else { break };
            (node, span) = (below, key_span.cloned().filter(|_| is_table(below)).unwrap_or_else(|| head(below)));
        }
        span
    }

    /// An error about the value at `path`.
    pub fn error(&self, path: &[&str], message: impl Into<String>) -> Diagnostic {
        Diagnostic::error(message).at(&self.source, self.span_of(path))
    }

    /// Refuses versions of a format that this program does not support, before anything else is reported.
    ///
    /// # Errors
    /// The version is another one than `known`. (One that is missing or no number is left to the schema.)
    pub fn check_version(&self, format: &str, known: RangeInclusive<u32>) -> Result<(), Diagnostics> {
        let (oldest, newest) = (i64::from(*known.start()), i64::from(*known.end()));
        match self.find(&["version"]).map(|node| &node.value) {
            Some(Value::Int(version)) if !(oldest..=newest).contains(version) => {
                let expected = if oldest == newest { newest.to_string() } else { format!("{oldest} to {newest}") };
                let newer = format!("this {format} was written by a newer version of aitools");
                let message = if *version > newest { newer } else { format!("there is no such version of a {format}") };
                let problem = self.error(&["version"], message).expected(expected).actual(version.to_string());
                Err(if *version > newest { problem.hint("upgrade aitools") } else { problem }.into())
            }
            _ => Ok(()),
        }
    }

    /// How a node is written.
    pub fn verbatim(&self, node: &Node) -> &str {
        self.source.text.get(node.span.clone()).unwrap_or_default()
    }
}

fn is_table(node: &Node) -> bool {
    matches!(node.value, Value::Table(_))
}

/// A table or array is long: its first byte stands for it.
fn head(node: &Node) -> Range<usize> {
    match node.value {
        Value::Table(_) | Value::Array(_) => node.span.start..node.span.end.min(node.span.start + 1),
        _ => node.span.clone(),
    }
}

fn child<'a>(node: &'a Node, step: &str) -> Option<(&'a Node, Option<&'a Range<usize>>)> {
    match &node.value {
        Value::Table(_) => node.get(step).map(|entry| (&entry.node, Some(&entry.key_span))),
        Value::Array(items) => Some((items.get(step.parse::<usize>().ok()?)?, None)),
        _ => None,
    }
}

fn decode_text(name: &str, bytes: &[u8], max_bytes: usize) -> Result<Arc<SourceText>, Diagnostics> {
    if bytes.len() > max_bytes {
        return Err(Diagnostic::error(format!("`{name}` is too long"))
            .expected(format!("at most {max_bytes} bytes"))
            .actual(format!("{} bytes", bytes.len()))
            .into());
    }
    let error = match std::str::from_utf8(bytes) {
        Ok(text) => return Ok(SourceText::new(name, text)),
        Err(error) => error.valid_up_to(),
    };
    let actual = match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16".to_owned(),
        _ => format!("the byte 0x{:02x}", bytes.get(error).copied().unwrap_or_default()),
    };
    let source = SourceText::new(name, String::from_utf8_lossy(bytes));
    Err(Diagnostic::error(format!("`{name}` is not UTF-8 text"))
        .at(&source, error..error + 1)
        .actual(actual)
        .hint("save the file as UTF-8")
        .into())
}

// TOML.

fn parse_toml(source: &Arc<SourceText>) -> Result<Node, Diagnostics> {
    let first = match DeTable::parse(&source.text) {
        Ok(table) => {
            let span = table.span();
            let root = from_table(table.into_inner(), span, MAX_DEPTH);
            return root.map_err(|span| Diagnostic::error(TOO_DEEP).at(source, span).into());
        }
        Err(first) => first,
    };
    // Every error costs memory: of a long text the first must do.
    let errors = if source.text.len() <= 1 << 20 { DeTable::parse_recoverable(&source.text).1 } else { vec![first] };
    let mut problems = Diagnostics::default();
    let mut last_line = 0;
    for error in errors.iter().take(Diagnostics::MAX) {
        let span = error.span().unwrap_or(source.text.len()..source.text.len());
        // What follows on the same line mostly comes from the first.
        let line = source.line_column(span.start).0;
        if line != last_line {
            problems.push(toml_problem(source, error.message(), span));
        }
        last_line = line;
    }
    Err(problems)
}

fn toml_problem(source: &Arc<SourceText>, message: &str, span: Range<usize>) -> Diagnostic {
    if message != "duplicate key" {
        return Diagnostic::error(message).at(source, span);
    }
    let key = source.text.get(span.clone()).unwrap_or_default();
    let problem = Diagnostic::error(format!("`{key}` is given twice"));
    let problem = match first_given(&source.text, key, span.start) {
        Some(line) => problem.hint(format!("it was first given on line {line}: keep one")),
        None => problem,
    };
    problem.at(source, span)
}

/// The line that gave a key, or a table's header, before the line at `offset` did.
fn first_given(text: &str, key: &str, offset: usize) -> Option<usize> {
    let start = text[..offset].rfind('\n').map_or(0, |at| at + 1);
    let line = text[start..].lines().next()?.trim();
    let mut above = text[..start].lines().enumerate();
    let (found, _) = if line.starts_with('[') {
        above.find(|(_, earlier)| earlier.trim() == line)?
    } else {
        let same_table = above
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .take_while(|(_, earlier)| !earlier.trim_start().starts_with('['));
        let gives = |earlier: &str| {
            earlier.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with(['=', '.']))
        };
        same_table.into_iter().find(|(_, earlier)| gives(earlier))?
    };
    Some(found + 1)
}

const TOO_DEEP: &str = "tables and arrays are nested too deep";

fn from_table(table: DeTable<'_>, span: Range<usize>, depth: usize) -> Result<Node, Range<usize>> {
    if depth == 0 {
        return Err(span);
    }
    let mut entries = Vec::with_capacity(table.len());
    for (key, value) in table {
        let key_span = key.span();
        entries.push(Entry { key: key.into_inner().into_owned(), key_span, node: from_value(value, depth - 1)? });
    }
    entries.sort_by_key(|entry| entry.key_span.start);
    Ok(Node { value: Value::Table(entries), span })
}

fn from_value(value: Spanned<DeValue<'_>>, depth: usize) -> Result<Node, Range<usize>> {
    let span = value.span();
    let value = match value.into_inner() {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Int(number),
            Err(_) => Value::Float(f64::INFINITY),
        },
        DeValue::Float(number) => Value::Float(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(flag) => Value::Bool(flag),
        DeValue::Datetime(_) => Value::Date,
        DeValue::Array(items) => {
            let depth = depth.checked_sub(1).ok_or_else(|| span.clone())?;
            Value::Array(items.into_iter().map(|item| from_value(item, depth)).collect::<Result<_, _>>()?)
        }
        DeValue::Table(table) => return from_table(table, span, depth),
    };
    Ok(Node { value, span })
}

// YAML.

struct YamlReader<'a> {
    source: &'a Arc<SourceText>,
    parser: Parser<'a, granit_parser::StrInput<'a>>,
    /// The nodes that anchors name.
    anchors: HashMap<usize, Node>,
    nodes_left: usize,
    /// Problems that do not stop the reading: keys given twice.
    problems: Diagnostics,
}

type Next<'a> = (Event<'a>, Range<usize>);

impl<'a> YamlReader<'a> {
    fn new(source: &'a Arc<SourceText>) -> Self {
        let options = granit_parser::options! {
            emit_comments: false,
            flow_nesting_limit: MAX_DEPTH,
            block_nesting_limit: MAX_DEPTH,
        };
        let parser = Parser::new_from_str_with_options(&source.text, options);
        Self { source, parser, anchors: HashMap::new(), nodes_left: MAX_YAML_NODES, problems: Diagnostics::default() }
    }

    fn fail(&self, span: Range<usize>, message: impl Into<String>) -> Diagnostic {
        Diagnostic::error(message).at(self.source, span)
    }

    fn next(&mut self) -> Result<Next<'a>, Diagnostics> {
        match self.parser.next_event() {
            Some(Ok((event, span))) => Ok((event, self.range(span))),
            Some(Err(error)) => {
                let at = error.marker().byte_offset().unwrap_or_default();
                Err(self.fail(at..at + 1, syntax::yaml_words(&error.info())).into())
            }
            None => Ok((Event::StreamEnd, self.source.text.len()..self.source.text.len())),
        }
    }

    fn range(&self, span: Span) -> Range<usize> {
        span.byte_range().unwrap_or_else(|| self.source.text.len()..self.source.text.len())
    }

    fn read(mut self) -> Result<Node, Diagnostics> {
        let mut root = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => break,
                Event::DocumentStart(..) if root.is_some() => {
                    return Err(self.fail(span, "there is more than one document in the file").into());
                }
                Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
                event => root = Some(self.node(event, span, MAX_DEPTH)?),
            }
        }
        let root = root.unwrap_or(Node { value: Value::Null, span: 0..0 });
        self.problems.or(root).map(|(root, _)| root)
    }

    fn spend(&mut self, nodes: usize, span: &Range<usize>) -> Result<(), Diagnostics> {
        let left = self.nodes_left.checked_sub(nodes);
        self.nodes_left = left.ok_or_else(|| {
            self.fail(span.clone(), "the document has too many values").expected(format!("at most {MAX_YAML_NODES}"))
        })?;
        Ok(())
    }

    fn node(&mut self, event: Event<'a>, span: Range<usize>, depth: usize) -> Result<Node, Diagnostics> {
        self.spend(1, &span)?;
        let Some(below) = depth.checked_sub(1) else { return Err(self.fail(span, TOO_DEEP).into()) };
        if event.tag().is_some() {
            let problem = self.fail(span, "a YAML tag is not supported here");
            return Err(problem.hint("quote a text instead of tagging it").into());
        }
        let anchor = event.anchor_id();
        let node = match event {
            Event::Scalar(text, style, ..) => Node { value: scalar(&text, style), span },
            Event::SequenceStart(..) => self.sequence(span, below)?,
            Event::MappingStart(..) => self.mapping(span, below)?,
            Event::Alias(id) => {
                let Some(node) = self.anchors.get(&id).cloned() else {
                    return Err(self.fail(span, "an alias stands within what it repeats").into());
                };
                self.spend(node.weight(), &span)?;
                node
            }
            _ => return Err(self.fail(span, "a value was expected here").into()),
        };
        if let Some(id) = anchor.filter(|id| *id != 0) {
            self.spend(node.weight(), &node.span)?;
            self.anchors.insert(id, node.clone());
        }
        Ok(node)
    }

    fn sequence(&mut self, start: Range<usize>, depth: usize) -> Result<Node, Diagnostics> {
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                return Ok(Node { value: Value::Array(items), span: start.start..span.end.max(start.end) });
            }
            items.push(self.node(event, span, depth)?);
        }
    }

    fn mapping(&mut self, start: Range<usize>, depth: usize) -> Result<Node, Diagnostics> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        loop {
            let (event, key_span) = self.next()?;
            let key = match event {
                Event::MappingEnd => {
                    return Ok(Node { value: Value::Table(entries), span: start.start..key_span.end.max(start.end) });
                }
                Event::Scalar(text, ..) => text.into_owned(),
                _ => return Err(self.fail(key_span, "a key must be a plain text").into()),
            };
            if let Some(first) = seen.insert(key.clone(), key_span.start) {
                let line = self.source.line_column(first).0;
                let problem = self.fail(key_span.clone(), format!("`{key}` is given twice"));
                self.problems.push(problem.hint(format!("it was first given on line {line}: keep one")));
                if self.problems.0.len() > Diagnostics::MAX {
                    return Err(std::mem::take(&mut self.problems));
                }
            }
            let (event, span) = self.next()?;
            entries.push(Entry { key, key_span, node: self.node(event, span, depth)? });
        }
    }
}

/// The core schema of YAML 1.2 (<https://yaml.org/spec/1.2.2/#103-core-schema>).
fn scalar(text: &str, style: ScalarStyle) -> Value {
    if style != ScalarStyle::Plain {
        return Value::Text(text.to_owned());
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        ".nan" | ".NaN" | ".NAN" => return Value::Float(f64::NAN),
        _ => {}
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
        return Value::Float(if text.starts_with('-') { f64::NEG_INFINITY } else { f64::INFINITY });
    }
    let radix = |prefix, radix| {
        let digits = text.strip_prefix(prefix).filter(|digits: &&str| !digits.starts_with(['-', '+']))?;
        i64::from_str_radix(digits, radix).ok()
    };
    if let Some(number) = radix("0x", 16).or_else(|| radix("0o", 8)) {
        return Value::Int(number);
    }
    let numeric = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && unsigned.chars().all(|c| c.is_ascii_digit() || ".eE+-".contains(c));
    if !numeric {
        return Value::Text(text.to_owned());
    }
    if let Ok(number) = text.parse() {
        return Value::Int(number);
    }
    text.parse().map_or_else(|_| Value::Text(text.to_owned()), Value::Float)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toml(text: &str) -> Result<Document, Diagnostics> {
        Document::parse(Syntax::Toml, "a.toml", text.as_bytes(), 1 << 20)
    }

    fn yaml(text: &str) -> Result<Document, Diagnostics> {
        Document::parse(Syntax::Yaml, "a.yaml", text.as_bytes(), 1 << 20)
    }

    fn problems(result: Result<Document, Diagnostics>) -> Vec<(String, Option<String>)> {
        let problems = result.expect_err("must be refused");
        problems.0.into_iter().map(|problem| (problem.to_string(), problem.hint)).collect()
    }

    fn at(document: &Document, path: &[&str]) -> String {
        document.source.text[document.span_of(path)].to_owned()
    }

    #[test]
    fn every_value_and_key_of_toml_has_its_place() {
        let text = "version = 1\n[engines.\"a é\"]\nsource = { git = \"é\", rev = [1, 2.5] }\n[[m]]\nn.x = true\n[[m]]\nd = 2026-01-18\n";
        let document = toml(text).expect("good");
        assert_eq!(at(&document, &["version"]), "1");
        assert_eq!(at(&document, &["engines", "a é"]), "\"a é\"");
        assert_eq!(at(&document, &["engines", "a é", "source", "git"]), "\"é\"");
        assert_eq!(at(&document, &["engines", "a é", "source", "rev", "1"]), "2.5");
        assert_eq!(at(&document, &["engines", "a é", "absent", "more"]), "\"a é\"");
        assert_eq!(document.find(&["m", "0", "n", "x"]).map(|node| &node.value), Some(&Value::Bool(true)));
        assert_eq!(document.find(&["m", "1", "d"]).map(|node| &node.value), Some(&Value::Date));
        assert_eq!(document.find(&["m", "2"]), None);
    }

    #[test]
    fn yaml_scalars_follow_the_core_schema() {
        let cases = [
            ("~", Value::Null),
            ("", Value::Null),
            ("true", Value::Bool(true)),
            ("yes", Value::Text("yes".to_owned())),
            ("007", Value::Int(7)),
            ("+3", Value::Int(3)),
            ("0x1F", Value::Int(31)),
            ("0o17", Value::Int(15)),
            ("1.10", Value::Float(1.1)),
            (".5e1", Value::Float(5.0)),
            ("-.inf", Value::Float(f64::NEG_INFINITY)),
            ("2026-01-18", Value::Text("2026-01-18".to_owned())),
            ("15-20", Value::Text("15-20".to_owned())),
            ("90%", Value::Text("90%".to_owned())),
            ("1_000", Value::Text("1_000".to_owned())),
            ("-", Value::Text("-".to_owned())),
            ("\"1\"", Value::Text("1".to_owned())),
            ("'~'", Value::Text("~".to_owned())),
        ];
        for (text, expected) in cases {
            let text = if text == "-" { "\"-\"" } else { text };
            let document = yaml(&format!("é: {text}\n")).expect(text);
            assert_eq!(document.find(&["é"]).expect("é").value, expected, "{text}");
        }
        let document = yaml("é: {d: 1.10}\nl: [~, \"é y\"]\n").expect("good");
        assert_eq!(document.verbatim(document.find(&["é", "d"]).expect("d")), "1.10");
        assert_eq!(at(&document, &["l", "1"]), "\"é y\"");
        assert_eq!(at(&document, &["é"]), "é");
    }

    #[test]
    fn aliases_repeat_within_bounds() {
        let document = yaml("a: &x [1, 2]\nb: *x\n").expect("good");
        assert_eq!(document.find(&["b", "1"]).map(|node| &node.value), Some(&Value::Int(2)));
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let below = vec![format!("*a{}", level - 1); 9].join(", ");
            bomb.push_str(&format!("a{level}: &a{level} [{below}]\n"));
        }
        assert!(problems(yaml(&bomb))[0].0.contains("too many values"));
        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(100_000), vec!["*a"; 100].join(", "));
        assert!(problems(yaml(&long))[0].0.contains("too many values"));
        assert!(yaml("a: &a [*a]\n").is_err());
        assert!(yaml("a: *missing\n").is_err());
    }

    #[test]
    fn keys_given_twice_name_both_places() {
        let twice = |text: &str| problems(yaml(text));
        assert_eq!(
            twice("a: 1\nb: {c: 1, c: 2}\na: 3\n"),
            [
                (
                    "a.yaml:2:11: `c` is given twice".to_owned(),
                    Some("it was first given on line 2: keep one".to_owned())
                ),
                (
                    "a.yaml:3:1: `a` is given twice".to_owned(),
                    Some("it was first given on line 1: keep one".to_owned())
                ),
            ]
        );
        assert_eq!(
            problems(toml("[a]\nx = 1\n[b]\nx = 1\ny = 2\nx = 3\n[a]\n")),
            [
                (
                    "a.toml:6:1: `x` is given twice".to_owned(),
                    Some("it was first given on line 4: keep one".to_owned())
                ),
                (
                    "a.toml:7:2: `a` is given twice".to_owned(),
                    Some("it was first given on line 1: keep one".to_owned())
                ),
            ]
        );
    }

    #[test]
    fn floods_of_errors_take_no_time() {
        let start = std::time::Instant::now();
        assert_eq!(problems(yaml(&"a:\n".repeat(200_000))).len(), Diagnostics::MAX + 1);
        assert!(!problems(toml(&"=\n".repeat(100_000))).is_empty());
        assert!(start.elapsed().as_secs() < 20);
    }

    #[test]
    fn syntax_errors_have_a_place() {
        for (text, place) in [
            ("a: [1\nb: 2", "a.yaml:2:2"),
            ("a:\n\t- b\n", "a.yaml:2:2"),
            ("a: b: c\n", "a.yaml:1:5"),
            ("\"abc", "a.yaml:1:1"),
        ] {
            assert!(problems(yaml(text))[0].0.starts_with(place), "{text:?}");
        }
        assert!(problems(yaml("a: 1\n---\nb: 1\n"))[0].0.contains("more than one document"));
        assert!(problems(yaml("a: !!str 1\n"))[0].0.contains("tag"));
        assert!(problems(yaml("? [a]\n: 1\n"))[0].0.contains("key"));
        let several = problems(toml("a = [1\nb = \"x\n= 3\n"));
        assert!(several.len() > 1 && several[0].0.starts_with("a.toml:2:"), "{several:?}");
    }

    #[test]
    fn bytes_that_are_no_text() {
        let bad = |bytes: &[u8]| Document::parse(Syntax::Toml, "a.toml", bytes, 100).expect_err("refused").0.remove(0);
        assert_eq!(bad(b"a = 1\nb = \"\xff\"\n").to_string(), "a.toml:2:6: `a.toml` is not UTF-8 text");
        assert_eq!(bad(b"\xff\xfea\0").actual.as_deref(), Some("UTF-16"));
        assert_eq!(bad(&[b'#'; 101]).expected.as_deref(), Some("at most 100 bytes"));
    }

    #[test]
    fn nesting_is_bounded() {
        let deep =
            |open: &str, close: &str, count: usize| format!("a = {}1{}", open.repeat(count), close.repeat(count));
        assert!(toml(&deep("[", "]", 20)).is_ok());
        for count in [40, 90, 100_000] {
            assert!(toml(&deep("[", "]", count)).is_err());
            assert!(toml(&deep("{ a = ", "}", count)).is_err());
            assert!(yaml(&"[".repeat(count)).is_err());
            assert!(yaml(&"- ".repeat(count)).is_err());
        }
        let dotted = format!("{} = {{ ", vec!["a"; 79].join(".")).repeat(79) + &"}".repeat(79);
        assert!(toml(&dotted).is_err());
    }
}
