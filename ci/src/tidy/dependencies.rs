//! What may be compiled in: the licences, sources and crates that `deny.toml` allows, read from the same file that
//! `cargo deny` reads. Advisories are not checked here: their database needs a network.

use serde::Deserialize;
use spdx::expression::Expression;
use spdx::{Licensee, ParseMode};
use xshell::{Shell, cmd};

use super::hold;

#[derive(Debug, Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Debug, Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Debug, Deserialize)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
}

/// The public registry, as Cargo.lock names it.
const REGISTRY: &str = "registry+https://github.com/rust-lang/";

/// The part of `cargo metadata` that is looked at.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// None for our own.
    source: Option<String>,
}

fn problems(deny: &Deny, packages: &[Package]) -> Vec<String> {
    let allowed: Vec<Licensee> =
        deny.licenses.allow.iter().map(|licence| Licensee::parse(licence).expect("a licence of SPDX's list")).collect();
    let mut problems = Vec::new();
    for package in packages {
        let name = format!("{} {}", package.name, package.version);
        let expression = package.license.as_deref().map(|text| Expression::parse_mode(text, ParseMode::LAX));
        match expression {
            Some(Ok(expression)) => {
                if !expression.evaluate(|wanted| allowed.iter().any(|licensee| licensee.satisfies(wanted))) {
                    problems.push(format!("{name}: licence `{expression}` is not allowed by deny.toml"));
                }
            }
            Some(Err(error)) => problems.push(format!("{name}: unreadable licence: {error}")),
            None => problems.push(format!("{name}: no licence")),
        }
        if let Some(source) = package.source.as_deref().filter(|source| !source.starts_with(REGISTRY)) {
            problems.push(format!("{name}: source `{source}` is not the public registry"));
        }
        if deny.bans.deny.iter().any(|ban| ban.name == package.name) {
            problems.push(format!("{name}: banned by deny.toml"));
        }
    }
    problems
}

fn deny() -> Deny {
    let sh = Shell::new().unwrap();
    toml::from_str(&sh.read_file(crate::step::root().join("deny.toml")).unwrap()).unwrap()
}

#[test]
fn every_dependency_is_allowed() {
    let sh = Shell::new().unwrap();
    sh.change_dir(crate::step::root());
    let listed = cmd!(sh, "cargo metadata --format-version 1 --locked --all-features").quiet().ignore_stderr().read();
    let metadata: Metadata = serde_json::from_str(&listed.unwrap()).unwrap();
    assert!(metadata.packages.len() > 100, "the listing of dependencies is not what it should be");
    hold(&problems(&deny(), &metadata.packages));
}

#[test]
fn a_dependency_that_is_not_allowed_is_found() {
    let package = |name: &str, license: Option<&str>, source: &str| Package {
        name: name.to_owned(),
        version: "1.0.0".to_owned(),
        license: license.map(str::to_owned),
        source: Some(source.to_owned()),
    };
    let registry = REGISTRY;
    let fine = [package("a", Some("MIT/Apache-2.0"), registry), package("b", Some("MIT OR GPL-3.0-only"), registry)];
    hold(&problems(&deny(), &fine));
    for wrong in [
        package("c", Some("GPL-3.0-only"), registry),
        package("d", Some("MIT AND GPL-3.0-only"), registry),
        package("e", None, registry),
        package("f", Some("MIT"), "git+https://example.org/f#abc"),
        package("openssl-sys", Some("MIT"), registry),
    ] {
        assert_eq!(problems(&deny(), std::slice::from_ref(&wrong)).len(), 1, "{wrong:?}");
    }
}
