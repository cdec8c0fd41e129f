//! Models derived from others, on a sealed project with a real CMake build of an imitation: PowerInfer's adapter, and programs
//! of its names that copy what they are given, well or badly.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use aitools::base::fs;

#[path = "support/tiny_powerinfer.rs"]
mod tiny;
#[path = "support/world.rs"]
mod world;

use world::{Ran, World};

const MANIFEST: &str = r#"version = 1

[engines.sparse]
adapter = "powerinfer"
source = { path = "engine source" }

[models.f16]
source = { path = "poids é", files = ["*.gguf", "activation/**"] }

[models.q4]
weights = "modèle q4.gguf"
[models.q4.derive]
from = "f16"
engine = "sparse"
quantize = "Q4_0"

[models.published]
source = { path = "publié" }

[models.predictor]
source = { path = "prédit" }

[models.converted.derive]
from = "published"
engine = "sparse"
convert = { predictor = "predictor" }

[models.again.derive]
from = "converted"
engine = "sparse"
quantize = "Q4_0"

[policies]
include = ["configs/models/tiny/*.yaml"]
"#;

const CMAKE: &str = "cmake_minimum_required(VERSION 3.14)
project(imitation C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_executable(main main.c)
add_executable(server main.c)
add_executable(quantize quantize.c)
";

/// `quantize IN OUT TYPE THREADS`: as much of IN as it is told to, with another type written at the large matrices, unless
/// something of the user's reached it.
const QUANTIZE: &str = r#"#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int argc, char **argv) {
    if (argc != 5 || strcmp(argv[3], "Q4_0") || getenv("SECRET") || (getenv("PATH") && strstr(getenv("PATH"), "bin"))) return 9;
    FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
    fseek(in, 0, SEEK_END);
    long size = ftell(in), left = size / 100 * PERCENT + size % 100 * PERCENT / 100;
    rewind(in);
    char *bytes = malloc(size);
    if (fread(bytes, 1, size, in) != size) return 8;
    const char *names[] = {"ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight"};
    for (int name = 0; name < 3; name++) {
        size_t length = strlen(names[name]);
        for (char *at = bytes; at + length + 24 < bytes + size; at++)
            // The number of lengths, two lengths, the type.
            if (!memcmp(at, names[name], length)) at[length + 20] = KIND;
    }
    fwrite(bytes, 1, left, out);
    fprintf(stderr, "[   1/   2] blk.0\n[   2/   2] blk.1\n");
    return fclose(out) ? 1 : STATUS;
}
"#;

fn quantize(percent: &str, kind: &str, status: &str) -> String {
    QUANTIZE.replace("PERCENT", percent).replace("KIND", kind).replace("STATUS", status)
}

/// What that makes of the model.
fn quantized() -> Vec<u8> {
    let mut bytes = tiny::Tiny::sparse().to_bytes();
    for name in ["ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight"] {
        let found = |at: &usize| bytes[*at..].starts_with(name.as_bytes());
        for at in (0..bytes.len()).filter(found).collect::<Vec<_>>() {
            bytes[at + name.len() + 20] = 2;
        }
    }
    bytes
}

fn new_world() -> World {
    let world = World::new();
    world.write("manifests/default.toml", MANIFEST);
    world.write("engine source/CMakeLists.txt", CMAKE);
    world.write("engine source/main.c", "int main(void) { return 0; }\n");
    world.write("engine source/common/build-info.cpp.in", "@BUILD_NUMBER@ @BUILD_COMMIT@\n");
    world.write("engine source/quantize.c", &quantize("100", "2", "0"));
    fs::write_atomic(&world.project().join("poids é/m.gguf"), &tiny::Tiny::sparse().to_bytes()).unwrap();
    world.write("poids é/activation/activation_0.pt", "statistics");
    world.write("engine source/convert.py", CONVERT);
    world.write("publié/config.json", "{ \"model_type\": \"llama\" }");
    world.write("publié/tokenizer.model", "pieces");
    world.write("publié/activation/activation_0.pt", "statistics");
    world.write("prédit/model_0.pt", "predictor");
    fs::write_atomic(&world.project().join("publié/model.safetensors"), &tiny::Tiny::sparse().to_bytes()).unwrap();
    world.write("configs/models/tiny/p.yaml", "engine: sparse\nmodel: q4\ngeneration:\n  max_tokens: 8\n");
    world
}

fn steps(ran: &Ran) -> Vec<String> {
    let json = ran.json();
    let word = |step: &serde_json::Value| {
        format!("{} {}", step["step"].as_str().unwrap(), step["model"].as_str().unwrap_or(""))
    };
    json["result"]["plan"]["steps"].as_array().unwrap().iter().map(word).collect()
}

#[test]
fn derived_once_placed_with_what_lies_beside_it_and_found_again() {
    let world = new_world();
    world.run(&["lock"]).expect(0);
    world.run(&["check"]).expect(0);
    let status = world.run(&["status"]).expect(0).stdout;
    assert!(status.contains("derive q4 from f16 (quantize to Q4_0, with sparse)"), "{status}");
    assert!(status.contains("model     q4 not derived, size unknown"), "{status}");
    let ran = Ran::of(world.command(&["sync", "p", "--json"]).env("SECRET", "x").output().unwrap()).expect(0);
    assert_eq!(steps(&ran).last().unwrap(), "derive q4");
    assert!(ran.stderr.contains("model `q4`: running code from"), "{}", ran.stderr);
    let placed = world.project().join("models/q4");
    assert_eq!(fs::read_bounded(&placed.join("modèle q4.gguf"), 64 << 20).unwrap(), quantized());
    assert!(placed.join("activation/activation_0.pt").exists());
    assert!(!world.project().join("models/again").exists());
    let quiet = world.run(&["sync", "p", "--json", "--offline", "--locked"]).expect(0);
    assert_eq!((steps(&quiet), quiet.stderr.as_str()), (vec![], ""));
    let checked = world.run(&["check", "--json"]).expect(0).json();
    assert_eq!(checked["result"]["policies"][0]["weights_checked"], true, "{checked}");
    let why = world.run(&["status", "--why", "q4"]).expect(0).stdout;
    assert!(why.contains("nothing has changed"), "{why}");
    // A chain, and what is not needed any more.
    world.run(&["sync"]).expect(0);
    assert!(world.project().join("models/again/activation/activation_0.pt").exists());
    fs::remove_dir_all(&world.project().join("models/q4")).unwrap();
    // Its last name but the store's is gone: hashed again, but not derived.
    let again = steps(&world.run(&["sync", "p", "--json"]).expect(0));
    assert_eq!(again.first().unwrap(), "hash q4");
    assert!(again.iter().all(|step| ["hash q4", "place q4"].contains(&step.as_str())), "{again:?}");
}

#[test]
fn damage_is_found_and_derived_again_and_no_foreign_record_is_believed() {
    let world = new_world();
    world.run(&["sync"]).expect(0);
    let weights = world.project().join("models/q4/modèle q4.gguf");
    let good = fs::read_bounded(&weights, 64 << 20).unwrap();
    let mut bytes = good.clone();
    *bytes.last_mut().unwrap() ^= 1;
    for blob in fs::read_dir(&world.cache().join("blobs")).unwrap() {
        if fs::read_bounded(&blob, 64 << 20).unwrap() == good {
            fs::remove_file(&blob).unwrap();
        }
    }
    for path in [weights.clone(), world.project().join("models/again/again.gguf")] {
        fs::remove_file(&path).unwrap();
        fs::write_atomic(&path, &bytes).unwrap();
    }
    let ran = world.run(&["verify"]).expect(3);
    assert!(ran.stderr.contains("modèle q4.gguf") && ran.stderr.contains("its record"), "{}", ran.stderr);
    world.run(&["verify", "--repair", "--offline"]).expect(0);
    assert_eq!(fs::read_bounded(&weights, 64 << 20).unwrap(), good);
    let elsewhere =
        world.command(&["sync", "--json", "--dry-run"]).env("AITOOLS_RECEIPT_KEY", "another").output().unwrap();
    let planned = steps(&Ran::of(elsewhere).expect(0));
    assert!(planned.contains(&"derive q4".to_owned()) && planned.contains(&"derive again".to_owned()), "{planned:?}");
}

#[test]
fn another_input_is_another_lock_and_another_derivation() {
    let world = new_world();
    world.run(&["sync"]).expect(0);
    let inputs =
        |text: String| text.lines().filter(|line| line.starts_with("inputs")).map(str::to_owned).collect::<Vec<_>>();
    let before = inputs(world.read("manifests/default.lock"));
    world.write("publié/activation/activation_0.pt", "other statistics");
    world.run(&["lock", "--upgrade", "published"]).expect(0);
    let after = inputs(world.read("manifests/default.lock"));
    // `again`, `converted` and `q4`, which has nothing to do with it.
    let changed: Vec<bool> = before.iter().zip(&after).map(|(before, after)| before != after).collect();
    assert_eq!(changed, [true, true, false], "{before:?} {after:?}");
    let why = world.run(&["status", "--why", "converted"]).expect(0).stdout;
    assert!(why.contains("from:"), "{why}");
    world.write("manifests/default.lock", &world.read("manifests/default.lock").replace(&after[1], &before[1]));
    let stale = world.run(&["sync", "--locked"]).expect(1);
    assert!(stale.stderr.contains("its inputs have changed"), "{}", stale.stderr);
    world.run(&["sync"]).expect(0);
    assert_eq!(world.read("models/again/activation/activation_0.pt"), "other statistics");
    // A lockfile that is older than the manifest.
    world.edit("manifests/default.toml", "sparse", "dense");
    world.edit("configs/models/tiny/p.yaml", "sparse", "dense");
    assert!(world.run(&["run", "p", "--prompt", "x"]).expect(1).stderr.contains("out of date"));
}

#[test]
fn what_an_engine_cannot_make_is_refused_before_anything_is_built() {
    let world = new_world();
    for (kind, why) in [("Q4_K_M", "wrong results"), ("F16", "makes the output Q8_0"), ("Q8_0", "wrong results")] {
        world.write("manifests/default.toml", &MANIFEST.replace("Q4_0", kind));
        for command in ["check", "lock", "sync"] {
            let ran = world.run(&[command]).expect(2);
            assert!(ran.stderr.contains(why) && ran.stderr.contains("default.toml:15:12"), "{}", ran.stderr);
        }
    }
    world.write(
        "manifests/default.toml",
        &MANIFEST.replace("\"engine source\" }", "\"engine source\" }\ntargets = [\"main\"]"),
    );
    assert!(world.run(&["check"]).expect(2).stderr.contains("add `quantize`"));
    world.write("manifests/default.toml", &MANIFEST.replace("\"powerinfer\"", "\"llama-cpp\""));
    assert!(world.run(&["check"]).expect(2).stderr.contains("has no step to quantize"));
}

#[test]
fn what_came_out_wrong_is_not_kept() {
    let world = new_world();
    for (percent, kind, status, said) in [
        ("60", "2", "0", "blk.1"),
        ("0", "2", "0", "cannot be used"),
        ("100", "2", "3", "`quantize` failed (exit status: 3)"),
        ("100", "1", "0", "is F16, not Q4_0"),
    ] {
        world.write("engine source/quantize.c", &quantize(percent, kind, status));
        world.run(&["lock", "--upgrade"]).expect(0);
        let ran = world.run(&["sync", "p"]).expect(5);
        assert!(ran.stderr.contains(said) && ran.stderr.contains(".log"), "{said}: {}", ran.stderr);
        assert!(!world.project().join("models/q4").exists());
        assert!(fs::read_dir(&world.cache().join("staging")).unwrap().is_empty());
        assert!(!world.cache().join("derived").exists());
    }
}

#[test]
fn two_at_once_derive_once() {
    let world = new_world();
    world.run(&["sync", "p", "--dry-run"]).expect(1);
    world.run(&["lock"]).expect(0);
    let start = || {
        let mut command = world.command(&["sync", "p"]);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let started = [start(), start(), start()];
    let ran = started.map(|child| Ran::of(child.wait_with_output().unwrap()).expect(0));
    assert_eq!(ran.iter().filter(|ran| ran.stderr.contains("deriving q4")).count(), 1, "{ran:#?}");
}

#[cfg(unix)]
#[test]
fn killed_while_deriving_nothing_runs_on_and_the_next_sync_finishes() {
    let world = new_world();
    let slow = quantize("100", "2", "0")
        .replace("int main", "#include <unistd.h>\nint main")
        .replace("rewind(in)", "sleep(2); rewind(in)");
    world.write("engine source/quantize.c", &slow);
    world.run(&["lock"]).expect(0);
    let started = || {
        let mut command = world.command(&["sync", "p", "--json"]);
        let mut child =
            command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().unwrap();
        let lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
        assert!(lines.map(Result::unwrap).any(|line| line.contains("\"deriving\"")), "it never derives");
        child
    };
    let runs = || {
        let listed = std::process::Command::new("pgrep").arg("-f").arg(world.cache().join("artifacts")).output();
        listed.unwrap().status.success()
    };
    let mut killed = started();
    killed.kill().unwrap();
    killed.wait().unwrap();
    let gone = (0..200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        !runs()
    });
    assert!(gone, "the program runs on");
    let mut interrupted = started();
    rustix::process::kill_process(rustix::process::Pid::from_child(&interrupted), rustix::process::Signal::INT)
        .unwrap();
    assert_eq!(interrupted.wait().unwrap().code(), Some(130));
    assert!(!runs() && !world.cache().join("derived").exists());
    world.run(&["sync", "p"]).expect(0);
    world.run(&["verify", "p"]).expect(0);
    assert!(fs::read_dir(&world.cache().join("staging")).unwrap().is_empty());
}

/// A `convert.py` that takes the model's file for the result, if it was started as it should be.
const CONVERT: &str = r#"
import os, pickle, shutil, socket, sys
assert sys.flags.isolated and sys.flags.no_site and sys.flags.dont_write_bytecode, sys.flags
assert not any("site-packages" in path or "dist-packages" in path for path in sys.path), sys.path
assert "SECRET" not in os.environ and os.listdir(os.environ["PATH"]) == ["model", "predictor"] or os.name == "nt", os.environ
class Reader(pickle.Unpickler):
    pass
try:
    Reader(__import__("io").BytesIO(b"cos\nsystem\n(S'exit 0'\ntR.")).load()
    sys.exit("a pickle ran a program")
except pickle.UnpicklingError:
    pass
kind, out, model, predictor = sys.argv[2], sys.argv[4], sys.argv[5], sys.argv[6]
assert kind == "f16" and os.path.exists(os.path.join(predictor, "model_0.pt"))
shutil.copyfile(os.path.join(model, "model.safetensors"), out)
print("[1/1] done")
"#;

#[test]
fn converted_by_a_script_of_the_source_in_a_python_that_has_nothing_else() {
    let world = new_world();
    world.write("configs/models/tiny/p.yaml", "engine: sparse\nmodel: converted\ngeneration:\n  max_tokens: 8\n");
    world.write("publié/config.json", "{ \"model_type\": \"mistral\" }");
    let refused = world.run(&["sync", "p"]).expect(2);
    assert!(refused.stderr.contains("converts llama and bamboo, not `mistral`"), "{}", refused.stderr);
    world.write("publié/config.json", "{ \"model_type\": \"llama\", \"hidden_act\": \"silu\" }");
    world.run(&["lock", "--upgrade", "published"]).expect(0);
    assert!(world.run(&["sync", "p"]).expect(2).stderr.contains("`silu`"));
    world.write("publié/config.json", "{ \"model_type\": \"llama\", \"hidden_act\": \"fatrelu\" }");
    world.run(&["lock", "--upgrade", "published"]).expect(0);
    Ran::of(world.command(&["sync", "p"]).env("SECRET", "x").output().unwrap()).expect(0);
    let made = world.project().join("models/converted/converted.gguf");
    assert_eq!(fs::read_bounded(&made, 64 << 20).unwrap(), tiny::Tiny::sparse().to_bytes());
    assert_eq!(steps(&world.run(&["sync", "p", "--json"]).expect(0)), [""; 0]);
    // The script's words are shown when it fails, and no Python is said to be none.
    world.write("engine source/convert.py", "raise SystemExit('out of sorts')");
    world.run(&["lock", "--upgrade", "sparse"]).expect(0);
    assert!(world.run(&["sync", "p"]).expect(5).stderr.contains("out of sorts"));
    let none = world.command(&["sync", "p"]).env("AITOOLS_PYTHON", world.project().join("no python")).output().unwrap();
    assert!(Ran::of(none).expect(8).stderr.contains("no CPython 3"));
    // A predictor is an input, too.
    world.write("prédit/model_0.pt", "another");
    world.run(&["lock", "--upgrade", "predictor"]).expect(0);
    assert!(world.run(&["status", "--why", "converted"]).expect(0).stdout.contains("predictor:"));
}

#[test]
fn a_bundle_takes_derived_models_along_when_their_receipts_are_believed() {
    let from = new_world();
    let with_key = |world: &World, args: &[&str]| {
        Ran::of(world.command(args).env("AITOOLS_RECEIPT_KEY", "one key").output().unwrap())
    };
    with_key(&from, &["sync", "p"]).expect(0);
    with_key(&from, &["bundle", "export", "-o", "b.tar", "p"]).expect(0);
    let bundle = from.project().join("b.tar").display().to_string();
    let importer = || {
        let world = new_world();
        for folder in ["engine source", "poids é", "publié", "prédit"] {
            fs::remove_dir_all(&world.project().join(folder)).unwrap();
        }
        world.write("manifests/default.lock", &from.read("manifests/default.lock"));
        world
    };
    let friend = importer();
    with_key(&friend, &["bundle", "import", &bundle]).expect(0);
    let synced = steps(&with_key(&friend, &["sync", "p", "--offline", "--locked", "--json"]).expect(0));
    assert!(!synced.iter().any(|step| step.starts_with("derive") || step.starts_with("build")), "{synced:?}");
    let stranger = importer();
    let said = stranger.run(&["bundle", "import", &bundle]).expect(0).stderr;
    assert!(said.contains("left out model q4: its receipt was sealed by another machine"), "{said}");
    let synced = steps(&stranger.run(&["sync", "p", "--offline", "--locked", "--json"]).expect(0));
    assert_eq!(synced.last().unwrap(), "derive q4");
    for world in [&friend, &stranger] {
        let placed = world.project().join("models/q4/modèle q4.gguf");
        assert_eq!(fs::read_bounded(&placed, 64 << 20).unwrap(), quantized());
    }
}
