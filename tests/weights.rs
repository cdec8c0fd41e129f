//! Weights of the Hugging Face Hub through the command line, against a stand-in on loopback: as a user meets them.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::PathBuf;

use aitools::base::digest::Digest;
use aitools::base::fs;

#[path = "support/hub.rs"]
mod hub;
#[path = "support/http.rs"]
mod test_server;
#[path = "support/world.rs"]
mod world;

use hub::{Hub, Site};
use test_server::{Reply, Seen};
use world::{Ran, World};

const MANIFEST: &str = r#"version = 1

[models.sparse]
source = { hf = "Org/Sparse", files = ["*.powerinfer.gguf", "activation/**"] }
place = "models/powerinfer/sparse"
weights = "model.powerinfer.gguf"

[models.split]
source = { hf = "Org/Split", files = ["*-00001-of-*.gguf"] }
"#;

struct Bench {
    world: World,
    hub: Hub,
}

impl Bench {
    fn new(change: impl Fn(Site, &Seen, Reply) -> Reply + Send + Sync + 'static) -> Self {
        let bench = Self { world: World::new(), hub: Hub::start(change) };
        bench.world.write("manifests/default.toml", MANIFEST);
        let gguf = world::tiny_gguf();
        let activation = [("activation/activation_0.pt", &b"zero"[..]), ("activation/d/\u{e9} 1.bin", b"one")];
        let mut sparse = vec![("m.Q4_0.powerinfer.gguf", &gguf[..]), ("README.md", b"not wanted")];
        sparse.extend(activation);
        bench.hub.push("Org/Sparse", "main", &sparse);
        let parts: Vec<Vec<u8>> = (1..=3_u8).map(|part| [&gguf[..], &[part]].concat()).collect();
        let names: Vec<String> = (1..=3).map(|part| format!("s-{part:05}-of-00003.gguf")).collect();
        let split: Vec<(&str, &[u8])> = names.iter().zip(&parts).map(|(name, part)| (&**name, &**part)).collect();
        bench.hub.push("Org/Split", "main", &split);
        bench
    }

    fn good() -> Self {
        Self::new(|_, _, reply| reply)
    }

    fn run(&self, args: &[&str]) -> Ran {
        let mut command = self.world.command(args);
        command.env("HF_ENDPOINT", self.hub.endpoint()).env("HF_HOME", self.home());
        Ran::of(command.output().unwrap())
    }

    fn home(&self) -> PathBuf {
        self.world.cache().join("../hf home")
    }

    fn asked(&self, site: Site) -> Vec<String> {
        self.hub.seen(site).iter().map(|seen| format!("{} {}", seen.method, seen.path)).collect()
    }

    fn place(&self, file: &str) -> PathBuf {
        self.world.project().join("models/powerinfer/sparse").join(file)
    }
}

#[test]
fn as_few_requests_as_can_be() {
    let bench = Bench::good();
    bench.run(&["lock"]).expect(0);
    let api = bench.asked(Site::Hub);
    assert!(api.len() <= 2 * 2 + 1, "two for each repository, and one for the small file: {api:?}");
    assert!(bench.asked(Site::Store).is_empty(), "no weights at lock");

    bench.run(&["sync", "--locked"]).expect(0);
    let asked = bench.asked(Site::Hub).split_off(api.len());
    // Not counted: where the Hub redirects to for small files.
    let of = |start: &str| asked.iter().filter(|line| line.starts_with(start)).count();
    assert_eq!((of("HEAD /Org/"), of("GET /Org/"), of("GET /api/models/")), (5, 5, 0), "{asked:?}");
    let place = |file: &str| bench.place(file);
    assert_eq!(fs::read_bounded(&place("model.powerinfer.gguf"), 1 << 20).unwrap(), world::tiny_gguf());
    assert_eq!(fs::read_bounded(&place("activation/d/\u{e9} 1.bin"), 99).unwrap(), b"one");
    assert!(!fs::exists(&place("README.md")));
    assert!(fs::exists(&bench.world.project().join("models/split/s-00003-of-00003.gguf")));

    let before = (bench.asked(Site::Hub).len(), bench.asked(Site::Store).len());
    let again = bench.run(&["sync", "--json"]).expect(0);
    assert_eq!(again.json()["result"]["plan"]["steps"], serde_json::json!([]));
    for args in [&["status"][..], &["verify"], &["lock"], &["lock", "--check"]] {
        bench.run(args).expect(0);
    }
    // Without its own store, from the Hugging Face cache alone.
    fs::remove_dir_all(&bench.world.cache()).unwrap();
    bench.run(&["sync", "--offline"]).expect(0);
    assert_eq!((bench.asked(Site::Hub).len(), bench.asked(Site::Store).len()), before, "no output");
}

#[test]
fn what_is_fetched_is_told_by_file_and_in_all() {
    let bench = Bench::good();
    bench.run(&["lock"]).expect(0);
    let ran = bench.run(&["sync", "--json"]).expect(0);
    let events: Vec<serde_json::Value> =
        ran.stderr.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect();
    let started = |subject: &str| {
        let found = events.iter().find(|event| event["event"] == "started" && event["subject"] == subject);
        found.unwrap_or_else(|| panic!("{subject}: {}", ran.stderr)).clone()
    };
    let ended = |id: &serde_json::Value| events.iter().any(|event| event["event"] == "finished" && event["id"] == *id);
    let whole = started("6 files of weights");
    let one = started("m.Q4_0.powerinfer.gguf");
    assert!(whole["total"].as_u64() > one["total"].as_u64() && whole["unit"] == "bytes", "{whole} {one}");
    assert!(ended(&whole["id"]) && ended(&one["id"]), "{}", ran.stderr);
}

#[test]
fn verify_names_what_is_wrong_and_repair_fetches_only_that() {
    let bench = Bench::good();
    bench.run(&["sync"]).expect(0);
    let result = bench.run(&["verify", "--json"]).expect(0).json();
    assert_eq!(result["result"]["files"], 6, "activation data and every part: {result}");

    let damaged = bench.place("activation/activation_0.pt");
    fs::set_read_only(&damaged, false).unwrap();
    let times = fs::metadata(&damaged).unwrap().modified().unwrap();
    // In place, so that every name of these bytes has it, and as if nobody had been there.
    let mut file = fs::open_or_create(&damaged).unwrap();
    std::io::Write::write_all(&mut file, b"Zero").unwrap();
    file.set_modified(times).unwrap();
    drop(file);
    let before = (bench.asked(Site::Hub).len(), bench.asked(Site::Store).len());
    let ran = bench.run(&["verify", "--offline"]).expect(3);
    let said = |text: &str| assert!(ran.stderr.contains(text), "{text}: {}", ran.stderr);
    for text in ["activation_0.pt", "default.lock:", "verify --repair"] {
        said(text);
    }
    said(&format!("expected {}", Digest::of(b"zero")));
    said(&format!("computed {}", Digest::of(b"Zero")));
    assert_eq!((bench.asked(Site::Hub).len(), bench.asked(Site::Store).len()), before, "no network");

    bench.run(&["verify", "--repair"]).expect(0);
    assert_eq!(fs::read_bounded(&damaged, 99).unwrap(), b"zero");
    let asked = bench.asked(Site::Hub).split_off(before.0);
    assert!(asked.iter().all(|line| line.contains("activation_0.pt") || line.contains("resolve-cache")), "{asked:?}");
    assert_eq!(bench.asked(Site::Store).len(), before.1, "the weights are right: {asked:?}");
    bench.run(&["verify"]).expect(0);
}

#[test]
fn troubles_have_words_and_codes() {
    let bench = Bench::good();
    bench.run(&["lock"]).expect(0);
    bench.hub.gate();
    let ran = bench.run(&["sync"]).expect(4);
    assert!(ran.stderr.contains("gated") && ran.stderr.contains("HF_TOKEN"), "{}", ran.stderr);

    bench.world.edit("manifests/default.toml", "*.powerinfer.gguf", "m.Q4_0.gguf");
    let ran = bench.run(&["lock"]).expect(2);
    assert!(ran.stderr.contains("did you mean `m.Q4_0.powerinfer.gguf`"), "{}", ran.stderr);

    type Bad = fn(Reply) -> Reply;
    let bads: [(Bad, &str); 3] = [
        (|reply| Reply::text(&format!("{:1$}", "<!DOCTYPE html><html>log in</html>", reply.size())), "HTML"),
        (|_| Reply::text(""), "empty"),
        (|reply| reply.flip(100), "the same wrong digest"),
    ];
    for (bad, word) in bads {
        let bench = Bench::new(move |site, _, reply| if site == Site::Store { bad(reply) } else { reply });
        bench.run(&["lock"]).expect(0);
        let ran = bench.run(&["sync"]).expect(3);
        let said = |text: &str| ran.stderr.contains(text);
        assert!(said("expected") && said("actual") && said(word) && said("default.lock:"), "{word}: {}", ran.stderr);
        assert!(!fs::exists(&bench.place("model.powerinfer.gguf")));
    }
}

#[test]
fn all_files_together_must_fit_before_the_first_byte() {
    // Each file would fit on no disk of today; what counts is that both are summed before anything is asked.
    let size = u64::MAX / 8;
    let bench = Bench::new(move |_, seen, reply| match seen.path.contains("/revision/") {
        true => {
            let file = |name: &str| {
                format!(
                    r#"{{"rfilename":"{name}","size":{size},"lfs":{{"sha256":"{}","size":{size}}}}}"#,
                    "1".repeat(64)
                )
            };
            let files = [file("s-00001-of-00002.gguf"), file("s-00002-of-00002.gguf")].join(",");
            Reply::text(&format!(r#"{{"sha":"{}","siblings":[{files}]}}"#, "a".repeat(40)))
        }
        false => reply,
    });
    let text = bench.world.read("manifests/default.toml");
    bench
        .world
        .write("manifests/default.toml", &format!("version = 1\n\n{}", &text[text.find("[models.split]").unwrap()..]));
    bench.run(&["lock"]).expect(0);
    let asked = bench.asked(Site::Hub).len();
    let ran = bench.run(&["sync"]).expect(8);
    let needed = format!("{} bytes and a reserve of 67108864 are needed", size * 2);
    assert!(ran.stderr.contains(&needed) && ran.stderr.contains("are free"), "{needed}: {}", ran.stderr);
    assert_eq!(bench.asked(Site::Hub).len(), asked);
}

/// On a disk of its own, so that what is free there is known.
#[cfg(target_os = "linux")]
#[test]
#[expect(clippy::print_stderr, reason = "whoever runs the tests should know that one was not")]
fn what_came_needs_no_space_again() {
    use std::process::Command;
    if !Command::new("unshare").args(["-rm", "true"]).output().is_ok_and(|ran| ran.status.success()) {
        eprintln!("skipped: this machine lets nobody mount a disk of their own");
        return;
    }
    let go = tempfile::tempdir().unwrap();
    let sign = go.path().join("go");
    let bench = Bench::new({
        let sign = sign.clone();
        move |site, _, reply| if site == Site::Store && !fs::exists(&sign) { reply.stall_after(9 << 20) } else { reply }
    });
    let weights = [world::tiny_gguf(), vec![0; 80 << 20]].concat();
    bench.hub.push("Org/Sparse", "main", &[("m.powerinfer.gguf", &weights), ("activation/a.pt", b"zero")]);
    bench.run(&["lock"]).expect(0);
    let script = r#"mount -t tmpfs -o size=150m none "$HF_HOME" || exit 99
        "$0" "$@" & first=$!
        for _ in $(seq 300); do [ -s "$HF_HOME"/hub/models--Org--Sparse/.aitools/*.json ] && break; sleep .1; done
        kill -9 $first; wait $first; : > "$GO"; exec "$0" "$@""#;
    let ours = bench.world.command(&["sync"]);
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", script]).arg(ours.get_program()).args(ours.get_args());
    command.current_dir(ours.get_current_dir().unwrap()).env_clear().stdin(std::process::Stdio::null());
    command.envs(ours.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.env("GO", &sign).env("HF_ENDPOINT", bench.hub.endpoint()).env("HF_HOME", bench.home());
    fs::create_dir_all(&bench.home()).unwrap();
    Ran::of(command.output().unwrap()).expect(0);
    assert!(fs::exists(&sign));
}

#[test]
fn a_file_that_cannot_be_read_is_damage() {
    let bench = Bench::good();
    bench.run(&["sync"]).expect(0);
    let file = bench.place("activation/activation_0.pt");
    fs::remove_file(&file).unwrap();
    fs::create_dir_all(&file).unwrap();
    let ran = bench.run(&["verify"]).expect(3);
    assert!(ran.stderr.contains("activation_0.pt") && ran.stderr.contains("1 "), "{}", ran.stderr);
}

#[test]
fn partial_files_of_others_are_left_alone() {
    let bench = Bench::good();
    bench.run(&["lock"]).expect(0);
    let blob = Digest::of(&world::tiny_gguf()).hex();
    let foreign = bench.home().join("hub/models--Org--Sparse/blobs").join(format!("{blob}.incomplete"));
    fs::write_atomic(&foreign, b"half").unwrap();
    bench.run(&["sync"]).expect(0);
    assert_eq!(fs::read_bounded(&foreign, 99).unwrap(), b"half");
}

#[test]
fn l5_lock_refuses_what_sync_could_never_place() {
    let bench = Bench::good();
    let gguf = world::tiny_gguf();
    bench.hub.push("Org/Two", "main", &[("a.Q4_0.gguf", &gguf[..]), ("a.Q8_0.gguf", &gguf[..])]);
    bench.hub.push("Org/Case", "main", &[("A.txt", &b"1"[..]), ("a.txt", b"2"), ("w.gguf", &gguf[..])]);
    bench.hub.push("Org/None", "main", &[("README.md", &b"1"[..])]);
    for (repo, said) in [
        ("Org/Two", "2 files match: `a.Q4_0.gguf` (0.0 MB), `a.Q8_0.gguf`"),
        ("Org/Case", "two files would be placed at"),
        ("Org/None", "none of the files is a GGUF file"),
    ] {
        bench
            .world
            .write("manifests/default.toml", &format!("version = 1\n[models.m]\nsource = {{ hf = \"{repo}\" }}\n"));
        let ran = bench.run(&["lock"]).expect(2);
        assert!(ran.stderr.contains(said) && ran.stderr.contains("files = ["), "{}", ran.stderr);
        assert!(!bench.world.project().join("manifests/default.lock").exists());
    }
}

#[test]
fn what_a_manifest_names_in_vain_is_told_by_check() {
    let bench = Bench::good();
    bench.world.write(
        "manifests/default.toml",
        "version = 1\n[policies]\ninclude = [\"configs/*.yaml\", \"nowhere/*.yaml\"]\n",
    );
    bench.run(&["lock"]).expect(0);
    let ran = bench.run(&["check"]).expect(0);
    assert!(ran.stderr.contains("no file matches `nowhere/*.yaml`"), "{}", ran.stderr);
    let engine = "version = 1\n[engines.vllm]\nsource = { git = \"https://example.org/x\" }\n";
    bench.world.write("manifests/default.toml", engine);
    for command in ["check", "lock"] {
        let ran = bench.run(&[command]).expect(2);
        assert!(
            ran.stderr.contains("there is no adapter `vllm`") && ran.stderr.contains("default.toml:3"),
            "{}",
            ran.stderr
        );
    }
    bench.world.write("manifests/default.toml", &engine.replace("vllm", "llamacpp"));
    assert!(bench.run(&["check"]).expect(2).stderr.contains("did you mean `adapter = \"llama-cpp\"`?"));
}

#[test]
fn u3_a_wrong_file_in_the_hub_cache_is_found_and_repaired() {
    let bench = Bench::good();
    bench.run(&["lock"]).expect(0);
    bench.run(&["sync"]).expect(0);
    bench.run(&["verify"]).expect(0);
    // Another inode than the store's and the place's, of the same size.
    let blob = bench.home().join("hub/models--Org--Sparse/blobs").join(Digest::of(&world::tiny_gguf()).hex());
    let size = usize::try_from(fs::metadata(&blob).unwrap().len()).unwrap();
    fs::remove_file(&blob).unwrap();
    fs::write_atomic(&blob, &vec![b'x'; size]).unwrap();
    let found = bench.run(&["verify"]).expect(3).stderr;
    assert!(found.contains("in the Hugging Face cache"), "{found}");
    bench.run(&["verify", "--repair"]).expect(0);
    assert!(!fs::exists(&blob));
    bench.run(&["verify"]).expect(0);
}

#[test]
fn l2_doctor_shows_what_is_left_over() {
    let bench = Bench::good();
    let repo = bench.home().join("hub/models--Org--Sparse");
    assert!(!bench.run(&["doctor"]).stdout.contains("unfinished"));
    fs::write_atomic(&repo.join(".aitools/x.part"), &[0; 2_000_000]).unwrap();
    fs::write_atomic(&repo.join("blobs/x.bad"), &[0; 3_000_000]).unwrap();
    let shown = bench.run(&["doctor"]).stdout;
    assert!(shown.contains("2.00 MB of unfinished") && shown.contains("3.00 MB of damaged files"), "{shown}");
}
