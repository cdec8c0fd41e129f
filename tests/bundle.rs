//! `bundle` from outside: one machine exports, another one without a network imports, and every lie is refused.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "support/http.rs"]
mod http;
#[path = "support/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use aitools::base::digest::Digest;
use aitools::base::fs;
use http::{Reply, Seen, Server};
use serde_json::{Value as Json, json};
use world::{Ran, World};

/// Machines with this key believe each other.
const KEY: &str = "AITOOLS_RECEIPT_KEY";
const BUNDLE: &str = "un bundle.tar";

fn run_with_key(world: &World, key: &str, args: &[&str]) -> Ran {
    Ran::of(world.command(args).env(KEY, key).output().unwrap())
}

/// A machine that has synced, and exported to the archive [`BUNDLE`] and the folder `bundle` of its project.
fn exporter() -> World {
    let world = World::new();
    run_with_key(&world, "one key", &["sync"]).expect(0);
    run_with_key(&world, "one key", &["bundle", "export", "--output", BUNDLE]).expect(0);
    run_with_key(&world, "one key", &["bundle", "export", "-o", "bundle"]).expect(0);
    world
}

/// A machine with the same manifest, lockfile and policies, and none of what they name.
fn importer(from: &World) -> World {
    let world = World::new();
    for folder in ["engine source", "weights"] {
        fs::remove_dir_all(&world.project().join(folder)).unwrap();
    }
    world.write("manifests/default.lock", &from.read("manifests/default.lock"));
    world
}

fn path(world: &World, name: &str) -> String {
    world.project().join(name).display().to_string()
}

/// What the cache of a machine has: nothing of it before an import.
fn admitted(world: &World) -> Vec<PathBuf> {
    let below = |folder: &str| fs::read_dir(&world.cache().join(folder)).unwrap_or_default();
    let folders = ["blobs", "trees", "tools", "artifacts", "derived", "scratch", "staging"];
    folders.into_iter().flat_map(below).collect()
}

fn verbs(synced: &Ran) -> Vec<String> {
    let steps = synced.json()["result"]["plan"]["steps"].clone();
    steps.as_array().unwrap().iter().map(|step| step["step"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Files of a bundle in a folder, by path, to change and to write elsewhere.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for name in ["oci-layout", "index.json"] {
        found.insert(name.to_owned(), fs::read_bounded(&folder.join(name), 1 << 20).unwrap());
    }
    for path in fs::read_dir(&folder.join("blobs/sha256")).unwrap() {
        let name = format!("blobs/sha256/{}", path.file_name().unwrap().to_str().unwrap());
        found.insert(name, fs::read_bounded(&path, 64 << 20).unwrap());
    }
    found
}

fn write(files: &BTreeMap<String, Vec<u8>>, folder: &Path) {
    for (name, bytes) in files {
        fs::write_atomic(&folder.join(name), bytes).unwrap();
    }
}

fn json(files: &BTreeMap<String, Vec<u8>>, name: &str) -> Json {
    serde_json::from_slice(&files[name]).unwrap()
}

fn blob(digest: &Json) -> String {
    format!("blobs/sha256/{}", digest.as_str().unwrap().strip_prefix("sha256:").unwrap())
}

fn manifest(files: &BTreeMap<String, Vec<u8>>) -> Json {
    json(files, &blob(&json(files, "index.json")["manifests"][0]["digest"]))
}

/// Replaces the manifest, and lets the index lead to the new one.
fn set_manifest(files: &mut BTreeMap<String, Vec<u8>>, manifest: &Json) {
    let bytes = serde_json::to_vec(manifest).unwrap();
    let mut index = json(files, "index.json");
    index["manifests"][0]["digest"] = json!(Digest::of(&bytes).to_string());
    index["manifests"][0]["size"] = json!(bytes.len());
    files.insert(format!("blobs/sha256/{}", Digest::of(&bytes).hex()), bytes);
    files.insert("index.json".to_owned(), serde_json::to_vec(&index).unwrap());
}

/// Puts other bytes in the place of a layer, with the digest and size that they have.
fn forge(files: &mut BTreeMap<String, Vec<u8>>, kind: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let mut manifest = manifest(files);
    let mut layers = manifest["layers"].as_array_mut().unwrap().iter_mut();
    let layer = layers.find(|layer| layer["mediaType"].as_str().unwrap().contains(kind)).unwrap();
    let bytes = change(files[&blob(&layer["digest"])].clone());
    layer["digest"] = json!(Digest::of(&bytes).to_string());
    layer["size"] = json!(bytes.len());
    files.insert(blob(&layer["digest"]), bytes);
    set_manifest(files, &manifest);
}

fn tar_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = Vec::new();
    for (name, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        tar.extend(header.as_bytes());
        tar.extend(*bytes);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

#[test]
fn with_one_key_the_engine_is_used_and_with_another_it_is_built_again() {
    let from = exporter();
    let (bundle, folder) = (path(&from, BUNDLE), path(&from, "bundle"));

    let friend = importer(&from);
    let imported = run_with_key(&friend, "one key", &["bundle", "import", &bundle, "--json"]).expect(0).json();
    assert_eq!(imported["result"]["left_out"], json!([]), "{imported}");
    assert_eq!(imported["result"]["lockfile"], "default.lock");
    let synced = run_with_key(&friend, "one key", &["sync", "--offline", "--locked", "--json"]).expect(0);
    assert_eq!(verbs(&synced), ["link-build", "place"], "nothing is built: {}", synced.stdout);
    run_with_key(&friend, "one key", &["verify"]).expect(0);
    let again = run_with_key(&friend, "one key", &["bundle", "import", &folder, "--json"]).expect(0).json();
    assert_eq!((&again["result"]["admitted"], &again["result"]["present"]), (&json!([]), &json!(3)), "{again}");
    assert_eq!(again["result"]["manifest"], imported["result"]["manifest"], "folder and archive are one bundle");
    // Who has imported can export: the same bytes.
    let twin = run_with_key(&friend, "one key", &["bundle", "export", "-o", "twin", "--json"]).expect(0).json();
    assert_eq!(twin["result"]["manifest"], imported["result"]["manifest"]);

    let stranger = importer(&from);
    let said = stranger.run(&["bundle", "import", &folder]).expect(0).stderr;
    assert!(said.contains("left out engine tiny (cpu): its receipt was sealed by another machine"), "{said}");
    let synced = stranger.run(&["sync", "--offline", "--locked", "--json"]).expect(0);
    assert!(verbs(&synced).contains(&"build".to_owned()), "{}", synced.stdout);

    let trusting = importer(&from);
    trusting.run(&["bundle", "import", "--trust", &bundle]).expect(0);
    let synced = trusting.run(&["sync", "--offline", "--locked", "--json"]).expect(0);
    assert_eq!(verbs(&synced), ["link-build", "place"], "{}", synced.stdout);
    trusting.run(&["verify"]).expect(0);
}

#[test]
fn one_changed_byte_in_any_blob_is_refused_and_nothing_is_admitted() {
    let from = exporter();
    let (world, good) = (importer(&from), files(&from.project().join("bundle")));
    let folder = world.project().join("bundle");
    let mut blobs = 0;
    for name in good.keys().filter(|name| name.starts_with("blobs/")) {
        let kind = manifest(&good)["layers"]
            .as_array()
            .unwrap()
            .iter()
            .any(|layer| blob(&layer["digest"]) == *name && layer["mediaType"].as_str().unwrap().contains("lock"));
        // The lockfile is for information, and is not read.
        if kind {
            continue;
        }
        for at in [0, good[name].len() / 2, good[name].len() - 1] {
            let mut bad = good.clone();
            bad.get_mut(name).unwrap()[at] ^= 1;
            write(&bad, &folder);
            let refused = run_with_key(&world, "one key", &["bundle", "import", "bundle"]).expect(3).stderr;
            assert!(refused.contains("is refused"), "{refused}");
            assert_eq!(admitted(&world), Vec::<PathBuf>::new(), "{name}: {refused}");
        }
        blobs += 1;
    }
    assert_eq!(blobs, 6, "manifest, configuration, weights, source, engine, receipt");
    write(&good, &folder);
    run_with_key(&world, "one key", &["bundle", "import", "bundle"]).expect(0);
}

#[test]
fn forged_bundles_are_refused() {
    let from = exporter();
    let (world, good) = (importer(&from), files(&from.project().join("bundle")));
    let folder = world.project().join("bundle");
    let refused = |files: &BTreeMap<String, Vec<u8>>, word: &str| {
        let _ = fs::remove_dir_all(&folder);
        write(files, &folder);
        let said = run_with_key(&world, "one key", &["bundle", "import", "bundle"]).expect(3).stderr;
        assert!(said.contains(word), "`{word}` is not in {said}");
        assert_eq!(admitted(&world), Vec::<PathBuf>::new(), "{said}");
    };
    let forged = |kind: &str, bytes: Vec<u8>| {
        let mut files = good.clone();
        forge(&mut files, kind, |_| bytes);
        files
    };
    refused(&forged("tree", tar_of(&[("main.c", b"int main;")])), "its files are tree");
    refused(&forged("tree", tar_of(&[("../x", b"out")])), "`../x`");
    refused(&forged("engine", tar_of(&[("../x", b"out")])), "`../x`");
    refused(&forged("engine", tar_of(&[("bin/llama-server", b"evil")])), "not those of its receipt");
    let mut device = tar_of(&[("bin/x", b"")]);
    device[156] = b'3';
    let sum: u32 = device[..512]
        .iter()
        .enumerate()
        .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) })
        .sum();
    device[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    refused(&forged("engine", device), "device");

    for (title, word) in [("../x.whl", "its title"), ("lock", "its title"), ("a/x.whl", "its title")] {
        let (mut files, mut lying) = (good.clone(), manifest(&good));
        let layer = &mut lying["layers"][0];
        layer["mediaType"] = json!("application/vnd.aitools.package.v1.raw");
        layer["annotations"]["org.opencontainers.image.title"] = json!(title);
        set_manifest(&mut files, &lying);
        refused(&files, word);
    }

    // Sizes that lie, in both directions.
    for (by, word) in [(-1_i64, "the manifest says"), (1, "the manifest says"), (1 << 40, "is larger than")] {
        let (mut files, mut lying) = (good.clone(), manifest(&good));
        for index in 0..lying["layers"].as_array().unwrap().len() {
            let size = &mut lying["layers"][index]["size"];
            *size = json!(size.as_i64().unwrap() + by);
        }
        set_manifest(&mut files, &lying);
        refused(&files, word);
    }
    let mut incomplete = good.clone();
    incomplete.remove(&blob(&manifest(&good)["layers"].as_array().unwrap().last().unwrap()["digest"]));
    refused(&incomplete, "it has no `blobs/sha256/");
    let mut nothing = good.clone();
    nothing.insert("index.json".to_owned(), b"{\"schemaVersion\":2,\"manifests\":[]}".to_vec());
    refused(&nothing, "no bundle");

    // Whoever believes the maker believes a receipt that agrees with itself.
    let mut receipt = good.clone();
    forge(&mut receipt, "receipt", |bytes| {
        String::from_utf8(bytes).unwrap().replace("\"inputs\": {", "\"inputs\": { \"more\": \"1\",").into()
    });
    write(&receipt, &folder);
    let said = world.run(&["bundle", "import", "--trust", "bundle"]).expect(3).stderr;
    assert!(said.contains("its fingerprint is not that of its inputs"), "{said}");
}

#[test]
fn damaged_archives_are_refused() {
    let from = exporter();
    let world = importer(&from);
    let good = fs::read_bounded(&from.project().join(BUNDLE), 64 << 20).unwrap();
    let bad = world.project().join("bad.tar");
    for length in [0, 100, 512, 5000, good.len() / 2, good.len() - 5000] {
        fs::write_atomic(&bad, &good[..length]).unwrap();
        let said = world.run(&["bundle", "import", "bad.tar"]).expect(3).stderr;
        assert!(said.contains("is refused"), "{length}: {said}");
    }
    for (entries, word) in [
        (&[("../x", &b"out"[..])][..], "`../x`"),
        (&[("oci-layout", &b"{}"[..]), ("oci-layout", b"{}")], "twice"),
        (&[("oci-layout", &b"{}"[..])], "it has no `index.json`"),
    ] {
        fs::write_atomic(&bad, &tar_of(entries)).unwrap();
        let said = world.run(&["bundle", "import", "bad.tar"]).expect(3).stderr;
        assert!(said.contains(word), "{said}");
    }
    assert_eq!(admitted(&world), Vec::<PathBuf>::new());
    world.run(&["bundle", "import", "nothing.tar"]).expect(8);
}

#[test]
fn export_needs_a_synced_project_and_a_free_place() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    let said = world.run(&["bundle", "export", "-o", BUNDLE]).expect(1).stderr;
    assert!(said.contains("the project is not synced") && said.contains("aitools sync"), "{said}");
    assert!(!fs::exists(&world.project().join(BUNDLE)));
    world.run(&["sync"]).expect(0);
    world.run(&["bundle", "export", "-o", "configs"]).expect(8);
    world.write("mine.tar", "no bundle");
    world.run(&["bundle", "export", "-o", "mine.tar"]).expect(8);
    assert_eq!(world.read("mine.tar"), "no bundle");
    world.run(&["bundle", "export", "-o", BUNDLE]).expect(0);
    world.run(&["bundle", "export", "-o", BUNDLE]).expect(0);
    // A hard link to a file of the cache does not make it unknown.
    world.run(&["bundle", "export", "-o", "bundle"]).expect(0);
    let again = world.run(&["sync", "--json"]).expect(0).json();
    assert_eq!(again["result"]["plan"]["steps"], json!([]), "{again}");
    let left: Vec<_> = fs::read_dir(&world.project()).unwrap();
    assert!(!left.iter().any(|path| path.file_name().unwrap().to_str().unwrap().starts_with(".aitools-")), "{left:?}");
}

/// A registry of one bundle, which answers as `lie` says.
fn registry(files: BTreeMap<String, Vec<u8>>, lie: impl Fn(&Seen, Reply) -> Reply + Send + Sync + 'static) -> Server {
    Server::start(move |seen, _| {
        let digest = seen.path.rsplit('/').next().unwrap().replace("sha256:", "");
        let name = match seen.path.contains("/manifests/") {
            true => blob(&json(&files, "index.json")["manifests"][0]["digest"]),
            false => format!("blobs/sha256/{digest}"),
        };
        match files.get(&name) {
            Some(bytes) => lie(seen, Reply::bytes(bytes.as_slice().into()).ranged(seen)),
            None => Reply::text("no").status(404),
        }
    })
}

fn reference(server: &Server) -> String {
    format!("{}/team/bundle:v1", server.url("").strip_prefix("http://").unwrap())
}

#[test]
fn what_a_registry_serves_is_verified() {
    let from = exporter();
    let good = files(&from.project().join("bundle"));
    let layers = manifest(&good)["layers"].as_array().unwrap().clone();
    let weights = layers.iter().find(|layer| layer["mediaType"].as_str().unwrap().contains("weight")).unwrap();
    let weights = weights["digest"].as_str().unwrap().to_owned();
    let is_weights = move |seen: &Seen| seen.path.ends_with(&weights);
    let world = importer(&from);
    let pull = |server: &Server| run_with_key(&world, "one key", &["bundle", "pull", &reference(server)]);

    let of_weights = is_weights.clone();
    let other = registry(good.clone(), move |seen, reply| if of_weights(seen) { reply.flip(40) } else { reply });
    let said = pull(&other).expect(3).stderr;
    assert!(said.contains("its bytes are sha256:"), "{said}");
    let of_weights = is_weights.clone();
    let longer = registry(good.clone(), move |seen, reply| match of_weights(seen) {
        true => Reply::bytes(vec![0; 100_000].into()),
        false => reply,
    });
    let said = pull(&longer).expect(3).stderr;
    assert!(said.contains("it has more than"), "{said}");
    let manifest = registry(good.clone(), |seen, reply| match seen.path.contains("/manifests/") {
        true => reply.with("Docker-Content-Digest", &Digest::of(b"another").to_string()),
        false => reply,
    });
    let said = pull(&manifest).expect(3).stderr;
    assert!(said.contains("as its manifest"), "{said}");
    let pinned = reference(&manifest).replace(":v1", &format!("@{}", Digest::of(b"pinned")));
    run_with_key(&world, "one key", &["bundle", "pull", &pinned]).expect(3);
    let empty = registry(BTreeMap::from([("index.json".to_owned(), good["index.json"].clone())]), |_, reply| reply);
    pull(&empty).expect(2);
    world.run(&["--offline", "bundle", "pull", &reference(&manifest)]).expect(4);
    assert_eq!(admitted(&world), Vec::<PathBuf>::new());

    // A connection that breaks is continued where it broke.
    let breaks = registry(good, move |seen, reply| match is_weights(seen) && seen.header("range").is_none() {
        true => reply.drop_after(100),
        false => reply,
    });
    pull(&breaks).expect(0);
    let ranges: Vec<_> = breaks.seen().iter().filter_map(|seen| seen.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges, ["bytes=100-"]);
    let synced = run_with_key(&world, "one key", &["sync", "--offline", "--locked", "--json"]).expect(0);
    assert_eq!(verbs(&synced), ["link-build", "place"], "{}", synced.stdout);
}

#[test]
fn a_token_is_asked_for_and_credentials_go_to_the_token_server_alone() {
    let from = exporter();
    let good = files(&from.project().join("bundle"));
    let tokens = Server::start(|seen, _| match seen.header("authorization") {
        // `me:secret`
        Some("Basic bWU6c2VjcmV0") => Reply::text("{\"token\":\"t0ken\"}"),
        _ => Reply::text("no").status(401),
    });
    let realm = tokens.url("/token");
    let server = registry(good, move |seen, reply| match seen.header("authorization") {
        Some("Bearer t0ken") => reply,
        _ => Reply::text("who?")
            .status(401)
            .with("WWW-Authenticate", &format!("Bearer realm=\"{realm}\",service=\"the registry\"")),
    });
    let world = importer(&from);
    let refused = world.run(&["bundle", "pull", &reference(&server)]).expect(4).stderr;
    assert!(refused.contains("docker login"), "{refused}");
    let pulled = world
        .command(&["bundle", "pull", &reference(&server)])
        .env("AITOOLS_REGISTRY_USER", "me")
        .env("AITOOLS_REGISTRY_PASSWORD", "secret")
        .output();
    Ran::of(pulled.unwrap()).expect(0);
    let seen = tokens.seen();
    assert!(seen[1].path.contains("scope=repository%3Ateam%2Fbundle%3Apull"), "{}", seen[1].path);
    assert!(server.seen().iter().all(|seen| seen.header("authorization").is_none_or(|value| value == "Bearer t0ken")));
}

#[test]
fn a_registry_that_takes_nothing_is_an_error() {
    let from = exporter();
    let push = |server: &Server| run_with_key(&from, "one key", &["bundle", "push", &reference(server)]);
    let closed = Server::start(|seen, _| match seen.method.as_str() {
        "HEAD" => Reply::text("").status(404),
        _ => Reply::text("no").status(403),
    });
    let said = push(&closed).expect(4).stderr;
    assert!(said.contains("HTTP status 403") && said.contains("docker login"), "{said}");
    let nowhere = Server::start(|seen, _| match seen.method.as_str() {
        "HEAD" => Reply::text("").status(404),
        _ => Reply::text("").status(202),
    });
    let said = push(&nowhere).expect(3).stderr;
    assert!(said.contains("does not say where to"), "{said}");
    let other = Server::start(|seen, _| match seen.method.as_str() {
        "HEAD" => Reply::text("").status(404),
        "POST" => Reply::text("").status(202).with("Location", "/elsewhere?state=1"),
        _ => Reply::text("").status(400),
    });
    let said = push(&other).expect(4).stderr;
    assert!(said.contains("HTTP status 400"), "{said}");
    let put = other.seen().into_iter().find(|seen| seen.method == "PUT").unwrap();
    assert_eq!(put.path, format!("/elsewhere?state=1&digest=sha256%3A{}", Digest::of(&put.body).hex()));
    from.run(&["bundle", "push", "team/bundle:v1"]).expect(2);
}
