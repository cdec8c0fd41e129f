//! Reference pages equal the code: every key of a policy is documented, and every barrier that docs/security.md describes has
//! a test of the name it gives.

use std::collections::BTreeSet;

use serde_json::Value as Json;

use super::{files, find};

/// The paths of all values that a schema allows: `generation.top_k`. Maps with free keys are values.
fn keys(schema: &Json, root: &Json, prefix: &str, found: &mut BTreeSet<String>) {
    let reference =
        schema["$ref"].as_str().or(schema["allOf"][0]["$ref"].as_str()).or(schema["anyOf"][0]["$ref"].as_str());
    let target = reference.and_then(|path| root.pointer(path.trim_start_matches('#'))).unwrap_or(schema);
    match target["properties"].as_object() {
        Some(properties) => {
            for (name, inner) in properties {
                let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                keys(inner, root, &path, found);
            }
        }
        None => drop(found.insert(prefix.to_owned())),
    }
}

/// The keys that the first columns of a page's tables name.
fn documented(page: &str) -> BTreeSet<String> {
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    rows.flat_map(|cell| cell.split(',')).map(|key| key.trim().trim_matches('`').to_owned()).collect()
}

#[test]
fn every_policy_key_is_documented() {
    let schema = aitools::format::schema::of::<aitools::format::policy::Policy>();
    let mut known = BTreeSet::new();
    keys(&schema, &schema, "", &mut known);
    assert!(known.contains("generation.top_k") && known.contains("metadata.performance"), "{known:?}");
    assert_eq!(documented(&find(&files(), "docs/policy.md").text), known);
}

/// Names in backticks that look like tests, and are none.
fn missing_tests(page: &str, code: &str) -> Vec<String> {
    let quoted = page.split('`').skip(1).step_by(2).filter(|word| word.matches('_').count() >= 3);
    quoted.filter(|name| !code.contains(&format!("fn {name}("))).map(str::to_owned).collect()
}

#[test]
fn every_barrier_has_its_test() {
    let files = files();
    let code: String = files.iter().filter(|file| file.is_rust()).map(|file| file.text.as_str()).collect();
    let page = &find(&files, "docs/security.md").text;
    assert_eq!(missing_tests(page, &code), Vec::<String>::new(), "docs/security.md names tests that do not exist");
}

#[test]
fn what_is_missing_is_found() {
    assert_eq!(documented("| key | x |\n|---|---|\n| `a.b`, `c` | d |\n"), BTreeSet::from(["a.b".into(), "c".into()]));
    assert_eq!(missing_tests("`a_b_c_d` and `no_such_test_here`, `git`", "fn a_b_c_d() {}"), ["no_such_test_here"]);
}
