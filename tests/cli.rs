//! The command line as a user meets it: exit codes, hints that can be pasted, prompts, settings from the environment. No engine
//! is built and nothing is fetched. Findings are named by the row of the usability review (`u1`) or the security review (`h5b`).
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test passes its own PATH on, and helpers of tests may panic"
)]

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use aitools::base::fs;

const MANIFEST: &str = "version = 1\n[models.m]\nsource = { path = \"weights.gguf\" }\nplace = \"models/m\"\n\
                        [engines.e]\nadapter = \"llama-cpp\"\nsource = { path = \"engine\" }\n\
                        [policies]\ninclude = [\"configs/models/*.yaml\"]\n";

/// A project with a manifest called `other`, and a home of its own.
struct World(tempfile::TempDir);

/// What a run of the program gave.
#[derive(Debug)]
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl World {
    fn new() -> Self {
        let world = Self(tempfile::Builder::new().prefix("a world ").tempdir().unwrap());
        world.write("manifests/other.toml", MANIFEST);
        world.write("configs/models/p.yaml", "engine: e\nmodel: m\n");
        world
    }

    fn project(&self) -> PathBuf {
        self.0.path().join("project")
    }

    fn write(&self, path: &str, text: &str) {
        fs::write_atomic(&self.project().join(path), text.as_bytes()).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aitools"));
        command
            .args(args)
            .current_dir(self.project())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.0.path().join("home"))
            .stdin(Stdio::null());
        if cfg!(windows) {
            command.env("LOCALAPPDATA", self.0.path().join("home"));
            command.env("SystemRoot", std::env::var_os("SystemRoot").unwrap_or_default());
        }
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        finish(self.command(args).output().unwrap())
    }
}

fn finish(output: Output) -> Ran {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[track_caller]
fn check(ran: &Ran, code: i32, said: &str) {
    assert_eq!(ran.code, code, "{ran:?}");
    assert!(ran.stderr.contains(said), "`{said}` is not in {ran:?}");
}

#[test]
fn u1_hints_name_the_manifest_and_folder_of_this_run() {
    let world = World::new();
    check(&world.run(&["-m", "other", "lock", "--check"]), 1, "run `aitools -m other lock`");
    let folder = world.project().display().to_string();
    let ran = world.run(&["-C", &folder, "-m", "other", "run", "p", "-p", "hi"]);
    check(&ran, 1, &format!("`aitools -C '{folder}' -m other lock`"));
    let json = world.run(&["-m", "other", "--json", "lock", "--check"]);
    assert!(json.stdout.contains("run `aitools -m other lock`"), "{json:?}");
    check(&world.run(&["init", "a b"]), 0, "next: aitools -C 'a b' run smollm2-135m-instruct --sync");
}

#[test]
fn u3_an_empty_prompt_is_a_usage_error() {
    let world = World::new();
    for args in [&["-p", ""][..], &["-p", "  "], &[], &["-p", "-"], &["-f", "-"]] {
        check(&world.run(&[&["-m", "other", "run", "p"], args].concat()), 2, "the prompt is empty");
    }
}

#[test]
fn u2_piped_text_is_read_beside_a_prompt() {
    let world = World::new();
    let piped = world.project().join("text");
    fs::write_atomic(&piped, &[0xff, 0xfe]).unwrap();
    let mut command = world.command(&["-m", "other", "run", "p", "-p", "Summarise this."]);
    let ran = finish(command.stdin(Stdio::from(fs::open(&piped).unwrap())).output().unwrap());
    // It was read: that it is not text is noticed.
    check(&ran, 2, "the prompt is not UTF-8");
}

#[test]
fn u23_a_mistyped_file_is_a_usage_error() {
    let world = World::new();
    check(&world.run(&["-m", "other", "run", "p", "-f", "no such file"]), 2, "there is no prompt file");
    check(&world.run(&["-m", "other", "check", "nope.yaml"]), 2, "there is no policy file `nope.yaml`");
    check(&world.run(&["-m", "other", "run", "--config", "nope.yaml", "-p", "hi"]), 2, "there is no policy file");
}

#[cfg(target_os = "linux")]
#[test]
fn u22_output_that_is_lost_is_an_error() {
    let world = World::new();
    for args in [&["completions", "bash"][..], &["schema", "policy"], &["--help"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let ran = finish(world.command(args).stdout(Stdio::from(full)).output().unwrap());
        assert_eq!(ran.code, 8, "{args:?}: {ran:?}");
    }
}

#[test]
fn a_policy_for_another_engine_or_model_is_refused() {
    let world = World::new();
    let run = |option: &str, name: &str| world.run(&["-m", "other", "run", "p", option, name, "-p", "hi"]);
    check(&run("--engine", "x"), 2, "policy `p` is for engine `e`, not `x`");
    check(&run("--model", "x"), 2, "policy `p` is for model `m`, not `x`");
    check(&run("--engine", "e"), 1, "there is no lockfile");
}

#[test]
fn the_environment_locks_and_takes_the_network_away() {
    let world = World::new();
    let sync = |variable: &str, value: &str| {
        finish(world.command(&["-m", "other", "sync", "--dry-run"]).env(variable, value).output().unwrap())
    };
    check(&sync("AITOOLS_LOCKED", "1"), 1, "there is no lockfile");
    check(&sync("CI", "true"), 1, "there is no lockfile");
    world.write(
        "manifests/other.toml",
        "version = 1\n[models.m]\nsource = { url = \"http://127.0.0.1:9/x.gguf\" }\nplace = \"models/m\"\n",
    );
    let lock = finish(world.command(&["-m", "other", "lock"]).env("AITOOLS_OFFLINE", "1").output().unwrap());
    check(&lock, 4, "`--offline`");
}

#[test]
fn h5b_a_project_cannot_name_a_program() {
    let world = World::new();
    world.write("configs/settings.toml", "python = \"./p\"\n");
    for verb in ["lock", "check", "status", "doctor"] {
        check(&world.run(&["-m", "other", verb]), 2, "a project cannot choose a program to run");
    }
}

#[test]
fn u25_doctor_shows_settings_and_a_python_that_is_not_there() {
    let world = World::new();
    world.write("manifests/other.toml", "version = 1\n[tools]\ncmake = { pypi = \"cmake\", version = \"4.0.0\" }\n");
    world.write("configs/settings.toml", "jobs = 3\n");
    let missing = world.project().join("no python").display().to_string();
    let ran = finish(world.command(&["-m", "other", "doctor"]).env("AITOOLS_PYTHON", &missing).output().unwrap());
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stdout.contains("jobs = 3 (configs/settings.toml)"), "{ran:?}");
    assert!(ran.stdout.contains("MISSING   Python 3 with pip"), "{ran:?}");
}

/// A `git` that does not end when it is asked to: the first signal waits for it, the second one does not.
#[cfg(unix)]
#[test]
fn a_second_interrupt_ends_everything_at_once() {
    let world = World::new();
    let (programs, asked) = (world.0.path().join("programs"), world.0.path().join("asked"));
    let script =
        "#!/bin/sh\ntrap 'echo $$ >>\"$ASKED\"' TERM\necho $$ >\"$ASKED.started\"\nwhile :; do sleep 0.05; done\n";
    fs::write_atomic(&programs.join("git"), script.as_bytes()).unwrap();
    fs::set_executable(&programs.join("git")).unwrap();
    let engine =
        "version = 1\n[engines.e]\nadapter = \"llama-cpp\"\nsource = { git = \"https://example.invalid/e\" }\n";
    world.write("manifests/other.toml", engine);
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let mut command = world.command(&["-m", "other", "lock"]);
    let child = command.env("PATH", path).env("ASKED", &asked).stderr(Stdio::piped()).stdout(Stdio::null()).spawn();
    let child = child.unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let signal = || rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    wait_for(&asked.with_extension("started"));
    signal();
    wait_for(&asked);
    signal();
    let ran = finish(child.wait_with_output().unwrap());
    check(&ran, 130, "ended at once");
    let git = String::from_utf8(fs::read_bounded(&asked.with_extension("started"), 99).unwrap()).unwrap();
    let stat = fs::read_bounded(&PathBuf::from(format!("/proc/{}/stat", git.trim())), 4096).unwrap_or_default();
    let stat = String::from_utf8_lossy(&stat).into_owned();
    assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
}

/// Until another process has made a file.
#[cfg(unix)]
fn wait_for(path: &std::path::Path) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while fs::read_bounded(path, 99).unwrap_or_default().is_empty() {
        assert!(std::time::Instant::now() < deadline, "nothing wrote `{}`", path.display());
        std::thread::yield_now();
    }
}

/// One folder whose name is not Unicode does not hide the others.
#[cfg(target_os = "linux")]
#[test]
fn a_path_with_a_folder_that_is_not_unicode_is_used() {
    use std::os::unix::ffi::OsStringExt as _;
    let world = World::new();
    let programs = world.0.path().join("programs");
    fs::write_atomic(&programs.join("git"), b"#!/bin/sh\necho git version 99.9.9\n").unwrap();
    fs::set_executable(&programs.join("git")).unwrap();
    let path = [b"/no/\xff:".to_vec(), programs.into_os_string().into_vec(), b":/usr/bin:/bin".to_vec()].concat();
    let mut command = world.command(&["-m", "other", "doctor"]);
    let ran = finish(command.env("PATH", std::ffi::OsString::from_vec(path)).output().unwrap());
    assert!(ran.stdout.contains("99.9.9"), "{ran:?}");
}

#[test]
fn u21_a_placeholder_is_only_told_by_check() {
    let world = World::new();
    world.write("weights.gguf", "w");
    world.write("engine/CMakeLists.txt", "");
    world.write("configs/models/p.yaml", "engine: e\nmodel: m\naudit: { checksum: \"sha256:...\" }\n");
    let status = world.run(&["-m", "other", "status"]);
    assert_eq!((status.code, status.stderr.as_str()), (0, ""), "{status:?}");
    check(&world.run(&["-m", "other", "check"]), 1, "the checksum is a placeholder");
}

#[test]
fn u24_a_conflict_in_a_manifest_or_policy_is_one_error() {
    let world = World::new();
    let conflict = "<<<<<<< HEAD\nmodel: m\n=======\nmodel: n\n>>>>>>> other\n";
    world.write("configs/models/p.yaml", &format!("engine: e\n{conflict}"));
    let policy = world.run(&["-m", "other", "check"]);
    check(&policy, 2, "git checkout --ours configs/models/p.yaml");
    assert_eq!(policy.stderr.matches("error: ").count(), 1, "{policy:?}");
    world.write("manifests/other.toml", &format!("version = 1\n{}", conflict.replace(": ", " = ")));
    let manifest = world.run(&["-m", "other", "check"]);
    check(&manifest, 2, "the file contains git conflict markers");
    assert_eq!(manifest.stderr.matches("error: ").count(), 1, "{manifest:?}");
}

#[cfg(unix)]
#[test]
fn u24_a_broken_link_among_the_policies_does_not_stop_the_others() {
    let world = World::new();
    world.write("weights.gguf", "w");
    world.write("engine/CMakeLists.txt", "");
    let link = world.project().join("configs/models/gone.yaml");
    fs::write_link("nowhere", &link).unwrap();
    let ran = world.run(&["-m", "other", "check"]);
    check(&ran, 1, "policy file `configs/models/gone.yaml` is skipped");
    assert!(ran.stderr.contains("policy p: OK"), "{ran:?}");
    check(&world.run(&["-m", "other", "check", "gone"]), 2, "there is no policy `gone`");
}
