//! A project from a stranger: `lock`, `check`, `status` and their kin run nothing of it, write nothing outside it and the
//! cache, send credentials to nobody and come to an end. Everything hostile that a repository or an unpacked archive can
//! hold is in here; a new idea is one more function.
#![cfg(unix)]
#![expect(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods, reason = "a test that cannot go on fails")]

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aitools::base::fs;

#[path = "support/git_server.rs"]
mod git_server;
#[path = "support/http.rs"]
mod test_server;
#[path = "support/world.rs"]
mod world;

use test_server::{Reply, Server};
use world::{Ran, World};

/// No command may take longer: each of them has almost nothing to do.
const LIMIT: Duration = Duration::from_secs(60);

/// Verbs that promise to run nothing of the project.
const VERBS: &[&[&str]] = &[
    &["lock"],
    &["lock", "--check"],
    &["check"],
    &["status"],
    &["status", "--why", "m"],
    &["sync", "--dry-run"],
    &["doctor"],
];

struct Stranger {
    world: World,
    /// Beside the project and the cache: whatever appears here was run or written by the project.
    outside: tempfile::TempDir,
}

impl Stranger {
    fn new() -> Self {
        let outside = tempfile::tempdir().unwrap();
        fs::create_dir_all(&outside.path().join("ran")).unwrap();
        fs::write_atomic(&outside.path().join("victim/secret"), b"secret\n").unwrap();
        Self { world: World::new(), outside }
    }

    fn victim(&self) -> PathBuf {
        self.outside.path().join("victim")
    }

    /// A program that leaves a trace when it runs, at a path of the project.
    fn trap(&self, path: &str) {
        let at = self.world.project().join(path);
        fs::create_dir_all(fs::parent(&at)).unwrap();
        std::fs::write(&at, format!("#!/bin/sh\ntouch '{}'\n", self.trace(path).display())).unwrap();
        std::fs::set_permissions(&at, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A line of shell that leaves a trace.
    fn shell(&self, name: &str) -> String {
        format!("touch '{}'", self.trace(name).display())
    }

    fn trace(&self, name: &str) -> PathBuf {
        self.outside.path().join("ran").join(name.replace('/', "_"))
    }

    /// A git configuration in which every key that can run something does.
    fn git_config(&self, name: &str, insteadof: &str) -> String {
        let run = |key: &str| format!("\"{}\"", self.shell(&format!("{name} {key}")));
        format!(
            "[core]\n\trepositoryformatversion = 0\n\tfsmonitor = {}\n\tsshCommand = {}\n\thooksPath = hooks\n\tpager = {}\n\
             \teditor = {}\n\taskPass = {}\n\tgitProxy = {}\n[credential]\n\thelper = \"!{}\"\n[protocol]\n\tallow = always\n\
             [protocol \"ext\"]\n\tallow = always\n[url \"ext::sh -c {}% \"]\n\tinsteadOf = {insteadof}\n[remote \"origin\"]\n\
             \turl = ext::sh -c {}\n\tuploadpack = {}\n[filter \"x\"]\n\tsmudge = {}\n\tprocess = {}\n[uploadpack]\n\
             \tpackObjectsHook = {}\n",
            run("fsmonitor"),
            run("sshCommand"),
            run("pager"),
            run("editor"),
            run("askPass"),
            run("gitProxy"),
            self.shell(&format!("{name} helper")),
            self.shell(&format!("{name} insteadOf")).replace(' ', "% "),
            self.shell(&format!("{name} remote")).replace(' ', "% "),
            run("uploadpack"),
            run("smudge"),
            run("process"),
            run("packObjectsHook"),
        )
    }

    /// Makes a folder of the project a git repository that runs things.
    fn repository(&self, folder: &str, insteadof: &str) {
        let at = |path: &str| format!("{folder}/{path}");
        self.world.write(&at("HEAD"), "ref: refs/heads/main\n");
        self.world.write(&at("config"), &self.git_config(folder, insteadof));
        self.world.write(&at("objects/info/packs"), "");
        self.world.write(&at("refs/heads/.keep"), "");
        self.world.write(&at("info/attributes"), "* filter=x\n");
        for hook in [
            "post-checkout",
            "post-merge",
            "reference-transaction",
            "pre-auto-gc",
            "fsmonitor-watchman",
            "post-index-change",
        ] {
            self.trap(&at(&format!("hooks/{hook}")));
        }
    }

    fn run(&self, args: &[&str], env: &[(&str, &str)]) -> Ran {
        let mut command = self.world.command(args);
        command.envs(env.iter().copied());
        finish(command, args)
    }

    /// Runs every verb, whatever each says to the project, and looks for traces.
    #[track_caller]
    fn survive(&self, env: &[(&str, &str)]) -> Vec<Ran> {
        let before = self.outside_files();
        let ran: Vec<Ran> = VERBS.iter().map(|args| self.run(args, env)).collect();
        for (args, ran) in VERBS.iter().zip(&ran) {
            assert!(!ran.stderr.contains("panicked"), "{args:?}: {}", ran.stderr);
            assert!((0..=8).contains(&ran.code), "{args:?} ended with {}: {}", ran.code, ran.stderr);
        }
        let after = self.outside_files();
        assert_eq!(before, after, "something outside the project has changed");
        ran
    }

    fn outside_files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        self.world.snapshot(self.outside.path())
    }
}

/// The result of a command that must end by itself.
#[track_caller]
fn finish(mut command: Command, args: &[&str]) -> Ran {
    let (stdout, stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    command.stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap()).stdin(Stdio::null());
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill().unwrap();
                panic!("{args:?} does not end");
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let text = |mut file: std::fs::File| {
        use std::io::{Read as _, Seek as _};
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    Ran { code: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
}

/// A git server of ours with one repository, `engine.git`; gives its folder, too.
fn upstream() -> (tempfile::TempDir, git_server::Server) {
    let root = tempfile::tempdir().unwrap();
    let bare = root.path().join("engine.git");
    fs::create_dir_all(&bare).unwrap();
    git_server::git(&bare, &["init", "-q"]);
    fs::write_atomic(&bare.join("CMakeLists.txt"), b"project(x)\n").unwrap();
    git_server::git(&bare, &["add", "CMakeLists.txt"]);
    git_server::git(&bare, &["commit", "-qm", "one"]);
    let server = git_server::Server::start(root.path(), |_| git_server::Reply::Serve);
    (root, server)
}

fn git_manifest(url: &str, more: &str) -> String {
    format!(
        "version = 1\n[engines.tiny]\nadapter = \"llama-cpp\"\nsource = {{ git = \"{url}/engine.git/.git\", branch = \"main\"{more} }}\n\
         [models.m]\nsource = {{ path = \"weights/modèle.gguf\" }}\n[policies]\ninclude = [\"configs/models/tiny/*.yaml\"]\n"
    )
}

#[test]
fn git_settings_and_hooks_of_the_project_do_nothing() {
    let stranger = Stranger::new();
    let (_root, server) = upstream();
    stranger.world.write("manifests/default.toml", &git_manifest(&server.url, ""));
    // The project's own repository, one in the open, and ones under every name that a careless program might pick.
    for folder in [".git", ".", "aitools-none", "none", "manifests", "external", "git", "GIT_DIR", "scratch"] {
        stranger.repository(folder, &server.url);
    }
    stranger.world.write(".gitattributes", "* filter=x\n");
    let ran = stranger.survive(&[]);
    assert_eq!(ran[0].code, 0, "the project itself is fine: {}", ran[0].stderr);
}

#[test]
fn a_submodule_of_a_hostile_project_runs_nothing() {
    let stranger = Stranger::new();
    let (_root, server) = upstream();
    stranger.world.write("manifests/default.toml", &git_manifest(&server.url, ", submodule = \"external/engine\""));
    stranger.repository(".git", &server.url);
    stranger.repository(".git/modules/external/engine", &server.url);
    stranger.world.write("external/engine/.git", "gitdir: ../../.git/modules/external/engine\n");
    let upload = stranger.shell("upload-pack");
    for url in
        [format!("--upload-pack={upload}"), format!("ext::sh -c {upload}"), format!("-u{upload}"), server.url.clone()]
    {
        let modules = format!("[submodule \"e\"]\n\tpath = external/engine\n\turl = {url}\n\tupdate = !{upload}\n");
        stranger.world.write(".gitmodules", &modules);
        stranger.survive(&[]);
    }
}

#[test]
fn addresses_that_are_options_or_commands_are_refused() {
    let upload = "touch x";
    for url in [
        format!("--upload-pack={upload}"),
        format!("ext::sh -c {upload}"),
        "fd::7".to_owned(),
        "ssh://-oProxyCommand=touch%20x/y".to_owned(),
        "-oProxyCommand=touch x:y".to_owned(),
        "https://example.invalid/a\\nhost=github.com".to_owned(),
        "https://x%0ahost=github.com@example.invalid/a.git".to_owned(),
    ] {
        let stranger = Stranger::new();
        let manifest = git_manifest("", "").replace("/engine.git/.git", &url);
        stranger.world.write("manifests/default.toml", &manifest);
        let ran = stranger.survive(&[]);
        assert_eq!(ran[0].code, 2, "`{url}`: {}", ran[0].stderr);
        assert!(!stranger.world.project().join("x").exists(), "`{url}` was run");
    }
}

#[test]
fn programs_and_packages_of_the_project_are_not_found() {
    let stranger = Stranger::new();
    stranger.world.edit(
        "manifests/default.toml",
        "version = 1\n",
        "version = 1\n[tools]\ncmake = { pypi = \"cmake\", version = \"4.4.4\" }\n",
    );
    for name in ["git", "python", "python3", "uv", "cmake", "ninja", "cc", "nvcc", "ssh", "p"] {
        for folder in ["", "bin/", "manifests/"] {
            stranger.trap(&format!("{folder}{name}"));
        }
    }
    // `python -m pip` would look in the working folder first.
    for module in [
        "pip/__init__.py",
        "pip/__main__.py",
        "sitecustomize.py",
        "usercustomize.py",
        "json.py",
        "encodings/__init__.py",
    ] {
        let code = format!("open({:?}, 'w')\n", stranger.trace(module).display().to_string());
        stranger.world.write(module, &code);
    }
    stranger.world.write("pip.conf", "[global]\nindex-url = http://127.0.0.1:9/\n");
    stranger.survive(&[
        ("PIP_INDEX_URL", "http://127.0.0.1:9/simple"),
        ("PIP_RETRIES", "0"),
        ("UV_INDEX_URL", "http://127.0.0.1:9/simple"),
    ]);
}

#[test]
fn h5b_settings_of_the_project_name_no_program() {
    let stranger = Stranger::new();
    stranger.trap("p");
    stranger.world.edit(
        "manifests/default.toml",
        "version = 1\n",
        "version = 1\n[tools]\ncmake = { pypi = \"cmake\", version = \"4.4.4\" }\n",
    );
    for python in ["./p", "p", "../un projet/p"] {
        stranger.world.write("configs/settings.toml", &format!("python = \"{python}\"\n"));
        stranger.survive(&[("PIP_INDEX_URL", "http://127.0.0.1:9/simple"), ("PIP_RETRIES", "0")]);
    }
}

#[test]
fn the_cache_of_a_strangers_settings_is_no_folder_of_the_user() {
    let stranger = Stranger::new();
    let victim = stranger.victim();
    for folder in [victim.display().to_string(), "../../../../../../tmp".to_owned()] {
        stranger.world.write("configs/settings.toml", &format!("cache_dir = {folder:?}\n"));
        let before = stranger.outside_files();
        for args in VERBS {
            let mut command = stranger.world.command(args);
            command.env_remove("AITOOLS_CACHE_DIR");
            finish(command, args);
        }
        assert_eq!(before, stranger.outside_files(), "`{folder}` was written to");
        assert_eq!(fs::read_dir(&victim).unwrap().len(), 1, "`{folder}` was written to");
    }
}

#[test]
fn links_out_of_the_project_are_not_written_through() {
    for link in
        ["manifests/default.lock", "manifests", "models", "build", "external", ".aitools", "models/tiny", "configs"]
    {
        let stranger = Stranger::new();
        let at = stranger.world.project().join(link);
        if at.is_dir() {
            // The folder itself lies outside, with its files.
            let moved = stranger.outside.path().join(link);
            fs::rename(&at, &moved).unwrap();
            symlink(&moved, &at).unwrap();
        } else {
            fs::create_dir_all(fs::parent(&at)).unwrap();
            let target = if link.ends_with(".lock") { stranger.victim().join("secret") } else { stranger.victim() };
            symlink(target, &at).unwrap();
        }
        let before = stranger.outside_files();
        stranger.survive(&[]);
        assert_eq!(before, stranger.outside_files(), "written through `{link}`");
    }
}

#[test]
fn h5c_places_outside_models_are_refused() {
    for place in [
        ".git/hooks",
        ".git",
        "build/x",
        "manifests",
        "external/engine",
        ".github/workflows",
        ".vscode",
        "configs/models/tiny",
        "../victim",
        "/tmp/x",
        "models/../.git",
    ] {
        let stranger = Stranger::new();
        stranger.world.edit("manifests/default.toml", "place = \"models/tiny/m\"", &format!("place = \"{place}\""));
        let ran = stranger.survive(&[]);
        assert_eq!(ran[0].code, 2, "`{place}`: {}", ran[0].stderr);
    }
}

#[test]
fn special_files_do_not_hang() {
    let fifo = |path: &Path| {
        fs::create_dir_all(fs::parent(path)).unwrap();
        let _ = std::fs::remove_file(path);
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    };
    for path in [
        "manifests/default.toml",
        "manifests/default.lock",
        "configs/settings.toml",
        "configs/models/tiny/p.yaml",
        "weights/modèle.gguf",
        "engine source/pipe",
        "models/tiny/m/model.gguf",
        ".gitmodules",
    ] {
        let stranger = Stranger::new();
        if path.starts_with("models") {
            stranger.run(&["lock"], &[]).expect(0);
        }
        fifo(&stranger.world.project().join(path));
        stranger.survive(&[]);
    }
    // An endless device behind a link.
    for (path, target) in [
        ("manifests/default.lock", "/dev/zero"),
        ("configs/models/tiny/p.yaml", "/dev/zero"),
        ("weights/modèle.gguf", "/dev/zero"),
    ] {
        let stranger = Stranger::new();
        let at = stranger.world.project().join(path);
        let _ = std::fs::remove_file(&at);
        symlink(target, &at).unwrap();
        stranger.survive(&[]);
    }
}

#[test]
fn huge_and_deep_files_are_refused() {
    let deep = "[".repeat(200_000);
    let keys = "a.".repeat(100_000) + "b = 1\n";
    let yaml = "- ".repeat(100_000);
    let alias = "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\n";
    let huge = "# comment\n".repeat(10_000_000);
    for (path, text) in [
        ("manifests/default.toml", format!("version = {deep}")),
        ("manifests/default.toml", keys.clone()),
        ("manifests/default.toml", huge.clone()),
        ("manifests/default.lock", format!("version = 2\nx = {deep}")),
        ("manifests/default.lock", huge),
        ("configs/settings.toml", format!("jobs = {deep}")),
        ("configs/settings.toml", keys),
        ("configs/models/tiny/p.yaml", deep.clone()),
        ("configs/models/tiny/p.yaml", yaml),
        ("configs/models/tiny/p.yaml", alias.to_owned()),
        ("configs/models/tiny/p.yaml", format!("metadata: {}", "{a: ".repeat(100_000))),
    ] {
        let stranger = Stranger::new();
        stranger.world.write(path, &text);
        let ran = stranger.survive(&[]);
        assert!(ran.iter().any(|ran| ran.code == 2), "`{path}` beginning with `{:.40}` is accepted: {:?}", text, ran);
    }
    // A folder tree deeper than a path may be long.
    let stranger = Stranger::new();
    let mut folder = stranger.world.project().join("engine source");
    for _ in 0..12 {
        folder.push("d".repeat(250));
        fs::create_dir_all(&folder).unwrap();
    }
    stranger.survive(&[]);
}

#[test]
fn variables_and_homes_in_the_manifest_are_only_text() {
    for path in ["$HOME/x.gguf", "~/x.gguf", "%USERPROFILE%/x.gguf", "${HF_TOKEN}/x.gguf", "`touch x`", "$(touch x)"] {
        let stranger = Stranger::new();
        stranger.world.edit("manifests/default.toml", "weights/modèle.gguf", path);
        let ran = stranger.run(&["lock"], &[("HF_TOKEN", "hf_secret")]);
        assert_ne!(ran.code, 0, "`{path}`");
        assert!(!(ran.stdout + &ran.stderr).contains("hf_secret"), "`{path}` was expanded");
        assert!(!stranger.world.project().join("x").exists());
    }
}

#[test]
fn credentials_go_to_nobody_that_a_manifest_names() {
    let stranger = Stranger::new();
    let server = Server::start(|_, _| Reply::text("").status(401));
    let home = tempfile::tempdir().unwrap();
    // The user's own helper would give a password to whoever is asked for.
    let asked = home.path().join("asked");
    let helper = format!(
        "[credential]\n\thelper = \"!cat >> '{}'; echo username=u; echo password=hunter2; :\"\n",
        asked.display()
    );
    fs::write_atomic(&home.path().join(".gitconfig"), helper.as_bytes()).unwrap();
    fs::write_atomic(&home.path().join(".netrc"), b"machine github.com login u password hunter2\n").unwrap();
    let url = server.url("");
    let url = url.trim_end_matches('/');
    let host = url.strip_prefix("http://").unwrap();
    let sources = [
        format!("{{ hf = \"Org/Model\", files = [\"*.gguf\"] }}\n[mirrors]\n\"https://huggingface.co\" = \"{url}\""),
        format!("{{ url = \"{url}/w.gguf\" }}"),
        format!("{{ url = \"http://huggingface.co@{host}/w.gguf\" }}"),
        format!("{{ git = \"http://x%0ahost=github.com%0aprotocol=https@{host}/x.git\", branch = \"main\" }}"),
    ];
    for source in sources {
        let manifest = format!("version = 1\n[models.m]\nsource = {source}\n");
        stranger.world.write("manifests/default.toml", &manifest);
        let home = home.path().display().to_string();
        stranger.survive(&[("HF_TOKEN", "hf_secret"), ("HOME", &home), ("HF_HOME", &home)]);
    }
    for seen in server.seen() {
        assert!(!format!("{seen:?}").contains("hf_secret"), "the token was sent: {seen:?}");
        assert_eq!(seen.header("authorization"), None, "{seen:?}");
    }
    let asked = std::fs::read_to_string(asked).unwrap_or_default();
    assert!(!asked.contains("github.com"), "the user's helper was asked for a host that nobody named: {asked}");
}
