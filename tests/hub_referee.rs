//! The official Python client as referee of our use of the Hugging Face cache, both talking to the same stand-in: each
//! must be content with what the other left behind. Ignored by default, because it installs `huggingface_hub` from the
//! package index: `cargo test --test hub_referee -- --ignored`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/hub.rs"]
mod hub;
#[path = "support/http.rs"]
mod test_server;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use aitools::base::commit::Commit;
use aitools::base::digest::Digest;
use aitools::base::fs;
use aitools::format::lockfile::FilePin;
use aitools::format::manifest::HfSpec;
use aitools::report::Task;
use aitools::source::{Source as _, World};

use hub::Hub;

const REPO: &str = "Org/Tiny-Model_1.0-gguf";

/// A Python of its own with the client in it; made once.
fn client() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("huggingface_hub");
    let python = folder.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" });
    if !fs::exists(&folder.join("ready")) {
        let base = if cfg!(windows) { "python" } else { "python3" };
        done(Command::new(base).args(["-m", "venv"]).arg(&folder));
        done(Command::new(&python).args(["-m", "pip", "install", "--quiet", "huggingface_hub>=1.2,<3"]));
        fs::write_atomic(&folder.join("ready"), b"").unwrap();
    }
    python
}

fn done(command: &mut Command) -> String {
    let ran = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(ran.status.success(), "{command:?}\n{}\n{}", text(&ran.stdout), text(&ran.stderr));
    text(&ran.stdout)
}

struct Bench {
    root: tempfile::TempDir,
    hub: Hub,
    python: PathBuf,
}

impl Bench {
    fn home(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn python(&self, home: &str, offline: bool, code: &str) -> String {
        let mut command = Command::new(&self.python);
        command.args(["-c", code]).env("HF_HOME", self.home(home)).env("HF_ENDPOINT", self.hub.endpoint());
        command.env("HF_HUB_DISABLE_XET", "1").env("HF_HUB_OFFLINE", if offline { "1" } else { "0" });
        done(command.env_remove("HF_TOKEN").env_remove("HF_HUB_CACHE"))
    }

    fn world(&self, home: &str, offline: bool) -> World {
        let mut env = BTreeMap::from([("HF_ENDPOINT".to_owned(), self.hub.endpoint())]);
        env.insert("HF_HOME".to_owned(), self.home(home).to_str().unwrap().to_owned());
        let (project, scratch) = (self.root.path().to_owned(), self.root.path().join("scratch"));
        World { task: Task::silent(), project, scratch, offline, mirrors: Vec::new(), env }
    }

    fn fetch(&self, home: &str, offline: bool, (commit, files): &(Commit, Vec<FilePin>)) {
        let staging = tempfile::tempdir_in(self.root.path()).unwrap();
        let files: Vec<&FilePin> = files.iter().collect();
        spec().fetch_files(&self.world(home, offline), commit, &files, staging.path()).unwrap();
    }

    /// Path to target or digest, for everything that the clients read.
    fn cached(&self, home: &str) -> BTreeMap<String, String> {
        let repo = self.home(home).join("hub/models--Org--Tiny-Model_1.0-gguf");
        let mut found = BTreeMap::new();
        let mut folders: Vec<PathBuf> = ["snapshots", "refs", "blobs"].iter().map(|name| repo.join(name)).collect();
        while let Some(folder) = folders.pop() {
            for path in fs::read_dir(&folder).unwrap() {
                let meta = fs::symlink_metadata(&path).unwrap();
                if meta.is_dir() {
                    folders.push(path);
                    continue;
                }
                let name = path.strip_prefix(&repo).unwrap().to_str().unwrap().to_owned();
                let bytes = Digest::of(&fs::read_bounded(&path, 1 << 30).unwrap());
                let target = fs::read_link(&path).map(|target| format!("{} ", target.display())).unwrap_or_default();
                found.insert(name, format!("{target}{bytes}"));
            }
        }
        found
    }
}

fn spec() -> HfSpec {
    HfSpec { hf: REPO.to_owned(), rev: None, files: Vec::new() }
}

#[test]
#[ignore = "installs huggingface_hub from the package index"]
fn each_client_is_content_with_the_others_cache() {
    let root = tempfile::Builder::new().prefix("aitools referee é ").tempdir().unwrap();
    let bench = Bench { root, hub: Hub::good(), python: client() };
    let big: Vec<u8> = (0..3_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let files: [(&str, &[u8]); 4] =
        [("a.gguf", &big), ("act/x y/é.bin", b"neurons"), ("config.json", b"{}"), ("README.md", b"# r")];
    let commit = bench.hub.push(REPO, "main", &files);
    let pin = spec().resolve_files(&bench.world("ours", false)).unwrap();
    bench.fetch("ours", false, &pin);

    let download = format!("import huggingface_hub as h; print(h.snapshot_download('{REPO}'))");
    bench.python("theirs", false, &download);
    assert_eq!(bench.cached("ours"), bench.cached("theirs"), "both left the same");

    let snapshot = bench.python("ours", true, &download);
    assert!(snapshot.trim().ends_with(&commit), "their client finds our snapshot offline: {snapshot}");
    let verify = format!(
        "import sys; from huggingface_hub.cli.hf import main; sys.argv = ['hf', 'cache', 'verify', '{REPO}']; main()"
    );
    let said = bench.python("ours", false, &verify);
    assert!(!said.to_lowercase().contains("mismatch"), "{said}");
    let scan =
        "import huggingface_hub as h; i = h.scan_cache_dir(); print(len(i.warnings), sum(r.nb_files for r in i.repos))";
    assert_eq!(bench.python("ours", true, scan).trim(), "0 4");

    bench.fetch("theirs", true, &pin);
}

/// Why `hf-hub` gives names and folders only. Fails when a newer version of it has been mended: then our own asking and
/// downloading should be looked at again.
#[test]
#[ignore = "fetches hf-hub's source from the package index"]
fn the_newest_hf_hub_still_loses_digests_and_checks_none() {
    let root = tempfile::tempdir().unwrap();
    let manifest = root.path().join("Cargo.toml");
    let text = "[package]\nname = \"probe\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[dependencies]\nhf-hub = \">=1\"\n[workspace]\n";
    fs::write_atomic(&manifest, text.as_bytes()).unwrap();
    fs::write_atomic(&root.path().join("src/lib.rs"), b"").unwrap();
    let cargo = |words: &[&str]| done(Command::new("cargo").args(words).arg("--manifest-path").arg(&manifest));
    let metadata: serde_json::Value =
        serde_json::from_str(&cargo(&["metadata", "--format-version", "1", "--quiet"])).unwrap();
    let package = metadata["packages"].as_array().unwrap().iter().find(|package| package["name"] == "hf-hub").unwrap();
    let version = &package["version"];
    let source = Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap().join("src/repository");
    let read = |file: &str| {
        let bytes = fs::read_bounded(&source.join(file), 4 << 20);
        String::from_utf8(bytes.unwrap_or_else(|error| panic!("hf-hub {version} looks different: {error}"))).unwrap()
    };
    let files = read("files.rs");
    let (before, after) = files.split_once("pub struct BlobLfsInfo {").unwrap();
    let (attributes, fields) = (&before[before.rfind("\n\n").unwrap()..], &after[..after.find('}').unwrap()]);
    let mended = format!("hf-hub {version} may have been mended: compare it with `src/source/hf/hub.rs`");
    // The Hub's tree says `oid` and `pointerSize`; without other names for its fields the crate reads neither.
    assert!(fields.contains("pub sha256: Option<String>"), "{mended}: {fields}");
    assert!(!attributes.contains("serde(") && !fields.contains("serde("), "{mended}: {attributes}{fields}");
    let download = read("download.rs");
    assert!(
        !download.contains("Sha256") && download.contains("File::create(dest)"),
        "{mended}: it checks what it fetched"
    );
}
