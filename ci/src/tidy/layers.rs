//! The layer table. A top module uses strictly lower layers only; siblings do not import each other.

use super::rust::code_only;
use super::{File, files, find, hold, lines_found};

/// Every top module and its layer. `main.rs` stands above all of them.
const LAYERS: &[(&str, u8)] = &[
    ("base", 0),
    ("format", 1),
    ("report", 1),
    ("build", 2),
    ("source", 2),
    ("store", 2),
    ("engine", 3),
    ("plan", 3),
    ("gateway", 4),
    ("ops", 5),
    ("cli", 6),
];

fn layer(module: &str) -> Option<u8> {
    LAYERS.iter().find(|(name, _)| *name == module).map(|(_, layer)| *layer)
}

/// The parts of a source file's module path: `src/source/git.rs` is `source`, `git`; `src/lib.rs` is empty.
fn module_path(path: &str) -> Option<Vec<&str>> {
    let mut parts: Vec<&str> = path.strip_prefix("src/")?.strip_suffix(".rs")?.split('/').collect();
    if matches!(parts.last(), Some(&("mod" | "lib" | "main"))) {
        parts.pop();
    }
    Some(parts)
}

/// The first names that `crate::` paths of a line of code lead to: `crate::a::b` gives `a`, `crate::{a, b::c}` both.
/// A `super` path that climbs at least to the crate counts as one too.
fn tops(code: &str, depth: usize) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        names(code, at + "crate::".len(), &mut found);
    }
    let climb = "super::".repeat(depth.max(1));
    for (at, _) in code.match_indices(&climb) {
        let end = at + climb.len();
        if depth > 0 && !code[..at].ends_with("super::") && !code[end..].starts_with("super::") {
            names(code, end, &mut found);
        }
    }
    found
}

fn names(code: &str, start: usize, found: &mut Vec<(usize, String)>) {
    let ident = |text: &str| text.chars().take_while(|c| *c == '_' || c.is_alphanumeric()).collect::<String>();
    if !code[start..].starts_with('{') {
        found.push((start, ident(&code[start..])));
        return;
    }
    let (mut depth, mut fresh) = (0, true);
    for (at, c) in code[start..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => fresh = true,
            _ if depth == 1 && fresh && !c.is_whitespace() => {
                found.push((start + at, ident(&code[start + at..])));
                fresh = false;
            }
            _ => {}
        }
        if depth == 0 {
            return;
        }
    }
}

fn broken_layers(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files {
        let Some(path) = module_path(&file.path) else { continue };
        let Some(module) = path.first() else { continue };
        let Some(own) = layer(module) else {
            let how = "give it one in ci/src/tidy/layers.rs and a line in the map of src/lib.rs";
            problems.push(file.problem(1, format!("module `{module}` has no layer: {how}")));
            continue;
        };
        let code = code_only(&file.text);
        for (at, used) in tops(&code, path.len()) {
            let line = code[..at].lines().count();
            match layer(&used) {
                Some(other) if used != **module && other >= own => problems.push(file.problem(
                    line,
                    format!("`{module}` (layer {own}) uses `{used}` (layer {other}): only lower layers may be used"),
                )),
                _ => {}
            }
        }
    }
    problems
}

/// The top modules that src/lib.rs declares.
pub(super) fn declared(lib: &str) -> Vec<&str> {
    code_lines(lib)
        .filter_map(|line| line.strip_prefix("pub mod ").or(line.strip_prefix("mod "))?.strip_suffix(';'))
        .collect()
}

fn code_lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.starts_with("//"))
}

#[test]
fn layers_hold() {
    hold(&broken_layers(&files()));
}

#[test]
fn the_map_names_every_module() {
    let files = files();
    let lib = &find(&files, "src/lib.rs").text;
    let map: String = lib.lines().take_while(|line| line.starts_with("//!")).collect();
    for module in declared(lib) {
        assert!(layer(module).is_some(), "module `{module}` has no layer: give it one in ci/src/tidy/layers.rs");
        assert!(super::rust::has_word(&map, module), "the map at the head of src/lib.rs does not name `{module}`");
    }
}

#[test]
fn broken_layers_are_found() {
    let found = |path, text| lines_found(broken_layers, path, text);
    assert_eq!(found("src/base/fs.rs", "//! x\nuse crate::cli::args;\n"), [2]);
    assert_eq!(found("src/store/mod.rs", "use crate::source::World;\n"), [1], "siblings");
    assert_eq!(found("src/report.rs", "use crate::{\n  base::fs::{self, a},\n  format,\n};\n"), [3], "in a group");
    assert_eq!(found("src/source/git.rs", "fn f() {\n  super::super::store::g();\n}\n"), [2], "by climbing");
    assert_eq!(found("src/plan.rs", "mod tests {\n use super::engine; }\n"), [2]);
    assert_eq!(found("src/fresh.rs", "//! x\n"), [1], "no layer");
}

#[test]
fn lower_layers_are_no_problem() {
    let found = |path, text| lines_found(broken_layers, path, text);
    let none = [0usize; 0];
    assert_eq!(found("src/cli/run.rs", "use crate::ops::run;\nuse crate::{base, cli::args, store};\n"), none);
    assert_eq!(found("src/base/fs.rs", "// crate::cli\nlet x = \"crate::cli\";\n"), none);
    assert_eq!(found("src/source/git.rs", "use super::{Source, store_of};\nuse super::super::base;\n"), none);
    assert_eq!(found("src/main.rs", "use crate::cli;\n"), none);
    assert_eq!(found("tests/run.rs", "use crate::cli;\n"), none);
}
