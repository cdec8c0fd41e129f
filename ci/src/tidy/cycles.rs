//! No cycles among files. At each level of the module tree the children of one parent form a directed acyclic graph, where a
//! child stands for its whole subtree. A parent and its own descendants may use each other.
//!
//! The edges are those of the paths in the code: `crate::…`, `super::…` and `self::…`, in `use` declarations and in place.
//! A path to a name that a parent re-exports leads to the child that defines it. Test code is not looked at.

use std::collections::{BTreeMap, BTreeSet};

use super::rust::code_only;
use super::{File, files, hold};

/// Re-exports of re-exports are followed this far.
const MAX_HOPS: usize = 4;

/// A module path from the crate's folder: `src`, `ops`, `fetch`.
type Path = Vec<String>;

/// One file of a crate, seen as a module.
struct Module {
    file: String,
    code: String,
    /// Where each inline `mod name { … }` begins and ends, and its name.
    inline: Vec<(usize, usize, String)>,
}

/// `src/ops/fetch.rs` is `src`, `ops`, `fetch`; `ci/src/main.rs` is `ci/src`.
fn module_path(path: &str) -> Option<Path> {
    let (root, rest) =
        ["ci/src", "src"].iter().find_map(|root| Some((*root, path.strip_prefix(root)?.strip_prefix('/')?)))?;
    let mut parts: Path = rest.strip_suffix(".rs")?.split('/').map(str::to_owned).collect();
    if matches!(parts.last().map(String::as_str), Some("mod" | "lib" | "main")) {
        parts.pop();
    }
    parts.insert(0, root.to_owned());
    Some(parts)
}

/// The code without what follows `#[cfg(test)]`: inline tests end a file here.
fn without_tests(code: &str) -> &str {
    let inline = |at: &usize| {
        code[*at..].lines().nth(1).is_some_and(|line| line.trim_start().starts_with("mod ") && line.ends_with('{'))
    };
    let first = code.match_indices("#[cfg(test)]").map(|(at, _)| at).find(inline);
    &code[..first.unwrap_or(code.len())]
}

/// The children that exist only for tests: `#[cfg(test)] mod name;`.
fn test_children(code: &str) -> impl Iterator<Item = &str> {
    let lines = code.lines().zip(code.lines().skip(1));
    lines
        .filter(|(cfg, _)| cfg.trim() == "#[cfg(test)]")
        .filter_map(|(_, line)| line.trim().trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
}

fn inline_modules(code: &str) -> Vec<(usize, usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("mod ") {
        let name = ident(&code[at + 4..]);
        let open = at + 4 + name.len();
        if name.is_empty() || !code[open..].trim_start().starts_with('{') {
            continue;
        }
        let mut depth = 0_usize;
        let end = code[open..].char_indices().find(|(_, c)| {
            depth = match c {
                '{' => depth + 1,
                '}' => depth - 1,
                _ => return false,
            };
            depth == 0
        });
        found.push((open, end.map_or(code.len(), |(end, _)| open + end), name));
    }
    found
}

fn ident(text: &str) -> String {
    text.chars().take_while(|c| *c == '_' || c.is_alphanumeric()).collect()
}

/// Every path that begins at `start`, groups in braces spelled out: `a::{b, c::d}` gives `a::b` and `a::c::d`.
fn paths(code: &str, start: usize) -> Vec<Path> {
    let mut found = Vec::new();
    spell_out(&code[start..], &mut Vec::new(), &mut found);
    found
}

/// Reads one tree of paths and gives how many bytes it takes.
fn spell_out(text: &str, before: &mut Path, found: &mut Vec<Path>) -> usize {
    let depth = before.len();
    let mut at = 0;
    loop {
        at += text[at..].len() - text[at..].trim_start().len();
        if text[at..].starts_with('{') {
            at += 1;
            while !text[at..].is_empty() && !text[at..].trim_start().starts_with('}') {
                at += spell_out(&text[at..], before, found);
                let next = text[at..].find([',', '}']).unwrap_or(text[at..].len());
                at += next + usize::from(text[at + next..].starts_with(','));
            }
            at += text[at..].find('}').map_or(text[at..].len(), |end| end + 1);
            break;
        }
        let word = ident(&text[at..]);
        at += word.len();
        if !word.is_empty() && word != "self" || depth == before.len() && depth == 0 && !word.is_empty() {
            before.push(word);
        }
        match text[at..].strip_prefix("::") {
            Some(_) => at += 2,
            None => {
                found.push(before.clone());
                break;
            }
        }
    }
    before.truncate(depth);
    at
}

/// All modules of the repository's two crates that are not for tests alone.
fn modules(files: &[File]) -> BTreeMap<Path, Module> {
    let mut modules = BTreeMap::new();
    let mut for_tests: BTreeSet<Path> = BTreeSet::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        let Some(path) = module_path(&file.path) else { continue };
        let code = code_only(&file.text);
        for_tests.extend(test_children(&code).map(|name| [path.clone(), vec![name.to_owned()]].concat()));
        let code = without_tests(&code).to_owned();
        modules.insert(path, Module { file: file.path.clone(), inline: inline_modules(&code), code });
    }
    modules.retain(|path, _| !for_tests.iter().any(|test| path.starts_with(test)));
    modules
}

/// What a `use` of a module brings into its scope: a name and the path that it stands for.
fn imports(path: &Path, module: &Module, modules: &BTreeMap<Path, Module>) -> Vec<(String, Path)> {
    let mut found = Vec::new();
    for (at, _) in module.code.match_indices("use ") {
        let inside = module.inline.iter().any(|(from, to, _)| (*from..*to).contains(&at));
        if inside || at > 0 && module.code.as_bytes()[at - 1].is_ascii_alphanumeric() {
            continue;
        }
        for words in paths(&module.code, at + 4) {
            let Some(name) = words.last().cloned() else { continue };
            let child = [path.clone(), words[..1].to_vec()].concat();
            if modules.contains_key(&child) {
                found.push((name, [path.clone(), words].concat()));
            } else if let Some(target) = absolute(path, &words) {
                found.push((name, target));
            }
        }
    }
    found
}

/// The path from the crate's folder that `words` mean in the module `from`; None when they lead out of the crate.
fn absolute(from: &Path, words: &[String]) -> Option<Path> {
    let mut base = from.clone();
    let mut rest = words;
    match words.first()?.as_str() {
        "crate" => {
            base.truncate(1);
            rest = &words[1..];
        }
        "self" => rest = &words[1..],
        "super" => {
            while let Some(("super", after)) = rest.split_first().map(|(word, after)| (word.as_str(), after)) {
                base.pop();
                rest = after;
            }
        }
        _ => return None,
    }
    base.extend_from_slice(rest);
    Some(base)
}

/// The file that defines what a path leads to, through re-exports.
fn definer(target: &Path, modules: &BTreeMap<Path, Module>, hops: usize) -> Option<Path> {
    let owner = (1..=target.len()).rev().map(|end| target[..end].to_vec()).find(|path| modules.contains_key(path))?;
    let Some(name) = target.get(owner.len()) else { return Some(owner) };
    if hops > 0 {
        let imported = imports(&owner, &modules[&owner], modules).into_iter().find(|(known, _)| known == name);
        if let Some((_, mut path)) = imported {
            path.extend_from_slice(&target[owner.len() + 1..]);
            return definer(&path, modules, hops - 1);
        }
    }
    Some(owner)
}

/// For each parent, which child uses which other one, and where.
type Uses = BTreeMap<Path, BTreeMap<(String, String), String>>;

fn uses(modules: &BTreeMap<Path, Module>) -> Uses {
    let mut uses = Uses::new();
    for (path, module) in modules {
        for head in ["crate::", "super::", "self::"] {
            for (at, _) in module.code.match_indices(head) {
                let before = module.code[..at].chars().next_back();
                if before.is_some_and(|c| c == ':' || c == '_' || c.is_alphanumeric()) {
                    continue;
                }
                let enclosing = module.inline.iter().filter(|(from, to, _)| (*from..*to).contains(&at));
                let scope = [path.clone(), enclosing.map(|(_, _, name)| name.clone()).collect()].concat();
                for words in paths(&module.code, at) {
                    let target = absolute(&scope, &words).and_then(|path| definer(&path, modules, MAX_HOPS));
                    let Some(target) = target else { continue };
                    let shared = path.iter().zip(&target).take_while(|(a, b)| a == b).count();
                    // One is the other's ancestor: they may use each other.
                    let (Some(user), Some(used)) = (path.get(shared), target.get(shared)) else { continue };
                    let place = format!("{}:{}", module.file, module.code[..at].lines().count().max(1));
                    let level = uses.entry(path[..shared].to_vec()).or_default();
                    level.entry((user.clone(), used.clone())).or_insert(place);
                }
            }
        }
    }
    uses
}

/// The groups of children that use each other in a circle.
fn circles(level: &BTreeMap<(String, String), String>) -> Vec<BTreeSet<&str>> {
    let next = |from: &str| {
        level.keys().filter(move |(user, _)| user == from).map(|(_, used)| used.as_str()).collect::<Vec<_>>()
    };
    let reached = |from| {
        let (mut seen, mut todo) = (BTreeSet::new(), next(from));
        while let Some(name) = todo.pop() {
            if seen.insert(name) {
                todo.extend(next(name));
            }
        }
        seen
    };
    let reach: BTreeMap<&str, BTreeSet<&str>> = level.keys().map(|(user, _)| (user.as_str(), reached(user))).collect();
    let mutual = |a: &str, b: &str| {
        reach.get(a).is_some_and(|set| set.contains(b)) && reach.get(b).is_some_and(|set| set.contains(a))
    };
    let circles: BTreeSet<BTreeSet<&str>> = reach
        .keys()
        .map(|a| reach.keys().copied().filter(|b| mutual(a, b)).collect())
        .filter(|set: &BTreeSet<_>| set.len() > 1)
        .collect();
    circles.into_iter().collect()
}

/// One problem for each circle.
fn cycles(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for (parent, level) in &uses(&modules(files)) {
        for circle in circles(level) {
            let edges = level.iter().filter(|((a, b), _)| circle.contains(a.as_str()) && circle.contains(b.as_str()));
            let edges: Vec<String> = edges.map(|((a, b), place)| format!("{a} uses {b} ({place})")).collect();
            problems.push(format!("{}: a cycle among files: {}", parent.join("/"), edges.join(", ")));
        }
    }
    problems
}

#[test]
fn files_form_no_cycle() {
    hold(&cycles(&files()));
}

#[test]
fn a_planted_cycle_is_refused() {
    let plant = |a: &str, b: &str| {
        [
            File::sample("src/ops/mod.rs", "pub mod a;\npub mod b;\npub use a::Made;\n"),
            File::sample("src/ops/a.rs", a),
            File::sample("src/ops/b.rs", b),
        ]
    };
    let ends_at_a = "use super::a::f;\n";
    for back in [
        "use super::b;\n",
        "fn f() { crate::ops::b::g() }\n",
        "use crate::{base, ops::{b::g, Host}};\n",
        "mod inner { use super::super::b; }\n",
    ] {
        let problems = cycles(&plant(back, ends_at_a));
        assert_eq!(problems.len(), 1, "{back}");
        assert!(problems[0].starts_with("src/ops: a cycle among files: a uses b (src/ops/a.rs:1)"), "{problems:?}");
    }
    assert_eq!(cycles(&plant("use super::b;\n", "use super::Made;\n")).len(), 1, "through a re-export");
}

#[test]
fn a_cycle_through_children_is_refused() {
    let files = [
        File::sample("ci/src/main.rs", "mod a;\nmod b;\n"),
        File::sample("ci/src/a/mod.rs", "pub mod x;\n"),
        File::sample("ci/src/a/x.rs", "use crate::b;\n"),
        File::sample("ci/src/b.rs", "use crate::a::x::f;\n"),
    ];
    let problems = cycles(&files);
    assert_eq!(problems, ["ci/src: a cycle among files: a uses b (ci/src/a/x.rs:1), b uses a (ci/src/b.rs:1)"]);
}

#[test]
fn what_is_no_cycle() {
    let found = |parent: &str, child: &str, more: &str| {
        let files = [
            File::sample("src/ops/mod.rs", parent),
            File::sample("src/ops/a.rs", child),
            File::sample("src/ops/b.rs", more),
        ];
        cycles(&files)
    };
    let none = [""; 0];
    assert_eq!(found("mod a;\nuse a::f;\n", "use super::Host;\n", ""), none, "a parent and its child");
    assert_eq!(
        found(
            "mod a;\nmod b;\n",
            "use super::b;\n",
            "// super::a\n#[cfg(test)]\nmod tests {\n use super::super::a;\n}\n"
        ),
        none
    );
    assert_eq!(found("mod a;\n#[cfg(test)]\nmod b;\n", "use super::b;\n", "use super::a;\n"), none, "a file for tests");
    assert_eq!(
        found("mod a;\nmod b;\n", "use super::b;\n", "mod inner { use super::a; }\nmod a {}\n"),
        none,
        "an inline module's own scope"
    );
}
