//! Bundles with a real OCI registry (Debian's `docker-registry`), with packages of the index that this machine is set up for, and
//! on a disk that is really full. The engine is a program of some lines, the weights are a gigabyte of noise.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value as Json;
use xshell::{Shell, cmd};

use crate::quickstart;
use crate::step::{Job, Result, Skip, cargo};

pub const JOB: Job = Job { name: "bundle", about: "a project moves through archives and a real registry", run };

const WEIGHTS_BYTES: usize = 1 << 30;
const MANIFEST: &str = r#"version = 1

[tools]
cmake = { pypi = "cmake", version = "4.4.4" }
ninja = { pypi = "ninja", version = "1.13.2" }

[engines.tiny]
adapter = "llama-cpp"
source = { path = "engine" }

[models.m]
source = { path = "weights/m.gguf" }
place = "models/tiny/m"

[policies]
include = ["configs/*.yaml"]
"#;
const CMAKE: &str = "cmake_minimum_required(VERSION 3.14)
project(tiny C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_executable(llama-server main.c)
";
/// Runs in namespaces of its own, as root there: the cache is a disk of its own, which is filled as soon as something is staged.
/// `$1` is the cache, `$2` its size in MiB; the command follows.
const FULL_DISK: &str = r#"set -e
mkdir -p "$1"
mount -t tmpfs -o "size=$2m" none "$1"
cache=$1
shift 2
"$@" &
import=$!
while kill -0 $import 2>/dev/null && [ -z "$(find "$cache/staging" -name blob 2>/dev/null)" ]; do :; done
head -c 4G /dev/zero > "$cache/filler" 2>/dev/null || true
code=0
wait $import || code=$?
rm "$cache/filler"
find "$cache/blobs" "$cache/trees" "$cache/artifacts" "$cache/staging" -mindepth 1 2>/dev/null | grep . && exit 100
"$@" || exit 101
exit $code
"#;

fn run(sh: &Shell) -> Result<()> {
    if cmd!(sh, "docker-registry --version").quiet().ignore_stdout().ignore_stderr().run().is_err() {
        let how = "on Debian, run `apt-get install docker-registry`";
        return Err(Skip(format!("no `docker-registry` is installed; {how}")).into());
    }
    cargo(sh, "build --release --locked --bin aitools").run()?;
    let place = crate::step::root().join("target/e2e/bundle");
    sh.remove_path(&place)?;
    let registry = Registry::start(sh, &place)?;
    let one = Machine::new(sh, &place, "one", Some("one key"))?;
    one.write_sources()?;
    one.must(&["sync"])?;
    archives(sh, &place, &one)?;
    through_the_registry(sh, &place, &one, &registry)?;
    full_disk(sh, &place, &one)?;
    drop(registry);
    Ok(sh.remove_path(&place)?)
}

/// A machine of its own: a project, a cache and a key.
struct Machine<'a> {
    sh: &'a Shell,
    root: PathBuf,
    key: Option<&'a str>,
}

impl<'a> Machine<'a> {
    fn new(sh: &'a Shell, place: &Path, name: &str, key: Option<&'a str>) -> Result<Self> {
        let machine = Self { sh, root: place.join(name), key };
        machine.write("manifests/default.toml", MANIFEST)?;
        machine.write("configs/p.yaml", "engine: tiny\nmodel: m\n")?;
        Ok(machine)
    }

    /// With the lockfile of another one, and nothing of what it names.
    fn after(of: &Machine<'a>, place: &Path, name: &str, key: Option<&'a str>) -> Result<Self> {
        let machine = Self::new(of.sh, place, name, key)?;
        machine.write("manifests/default.lock", of.sh.read_file(of.project().join("manifests/default.lock"))?)?;
        Ok(machine)
    }

    fn project(&self) -> PathBuf {
        self.root.join("un projet")
    }

    fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    fn write(&self, path: &str, bytes: impl AsRef<[u8]>) -> Result<()> {
        Ok(self.sh.write_file(self.project().join(path), bytes)?)
    }

    fn write_sources(&self) -> Result<()> {
        self.write("engine/CMakeLists.txt", CMAKE)?;
        self.write("engine/main.c", "int main(void) { return 0; }\n")?;
        let mut noise = Vec::with_capacity(WEIGHTS_BYTES);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        while noise.len() < WEIGHTS_BYTES {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            noise.extend(state.to_le_bytes());
        }
        self.write("weights/m.gguf", noise)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(quickstart::program());
        command.current_dir(self.project()).args(args).env_remove("CI").env_remove("AITOOLS_MANIFEST");
        command.env("AITOOLS_CACHE_DIR", self.cache()).env("AITOOLS_STATE_DIR", self.root.join("state"));
        command.envs(self.key.map(|key| ("AITOOLS_RECEIPT_KEY", key)));
        command
    }

    /// The exit code, and what it printed as JSON.
    fn json(&self, args: &[&str]) -> Result<(i32, Json)> {
        let output = self.command(args).arg("--json").stderr(Stdio::null()).output()?;
        let said = serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("{args:?}: {error}: {}", String::from_utf8_lossy(&output.stdout)))?;
        Ok((output.status.code().unwrap_or(-1), said))
    }

    fn must(&self, args: &[&str]) -> Result<Json> {
        match self.json(args)? {
            (0, mut said) => Ok(said["result"].take()),
            (code, said) => Err(format!("{args:?} ended with exit code {code}: {said}").into()),
        }
    }

    /// `sync` without a network: the steps that it took.
    fn synced(&self) -> Result<Vec<String>> {
        let done = self.must(&["sync", "--offline", "--locked"])?;
        self.must(&["verify"])?;
        let steps = done["plan"]["steps"].as_array().cloned().unwrap_or_default();
        Ok(steps.iter().filter_map(|step| Some(step["step"].as_str()?.to_owned())).collect())
    }

    /// Says how long a command took.
    fn timed(&self, what: &str, args: &[&str]) -> Result<Json> {
        let began = Instant::now();
        let done = self.must(args)?;
        tell(what, began.elapsed());
        Ok(done)
    }
}

fn tell(what: &str, took: Duration) {
    let rate = WEIGHTS_BYTES as f64 / 1e6 / took.as_secs_f64();
    println!("{what:<28} {:>6.2} s {rate:>7.0} MB/s", took.as_secs_f64());
}

fn expect(steps: &[String], is_built: bool) -> Result<()> {
    println!("sync --offline --locked: {}", steps.join(", "));
    if steps.iter().any(|step| step == "build") == is_built {
        Ok(())
    } else {
        Err("that is not what it should do".into())
    }
}

/// An archive and a folder, beside `cp` of the same bytes.
fn archives(sh: &Shell, place: &Path, one: &Machine<'_>) -> Result<()> {
    let (tar, folder, copy) = (place.join("b.tar"), place.join("b"), place.join("copy"));
    let weights = one.project().join("weights/m.gguf");
    // Twice: the first one fetches the packages that the build has used up.
    one.must(&["bundle", "export", "--output", &tar.display().to_string()])?;
    let copied = |from: &Path| -> Result<()> {
        let began = Instant::now();
        cmd!(sh, "cp {from} {copy}").quiet().run()?;
        cmd!(sh, "sync {copy}").quiet().run()?;
        tell("cp and sync", began.elapsed());
        Ok(())
    };
    for _ in 0..3 {
        copied(&weights)?;
        one.timed("export to an archive", &["bundle", "export", "--output", &tar.display().to_string()])?;
    }
    one.timed("export to a folder", &["bundle", "export", "--output", &folder.display().to_string()])?;
    for (round, from) in [&tar, &folder, &tar, &folder].into_iter().enumerate() {
        let two = Machine::after(one, place, "two", Some("one key"))?;
        copied(&weights)?;
        let done = two.timed(&format!("import {}", round + 1), &["bundle", "import", &from.display().to_string()])?;
        if done["left_out"].as_array().is_none_or(|left_out| !left_out.is_empty()) {
            return Err(format!("something is left out: {done}").into());
        }
        expect(&two.synced()?, false)?;
        sh.remove_path(&two.root)?;
    }
    sh.remove_path(&copy)?;
    Ok(())
}

fn through_the_registry(sh: &Shell, place: &Path, one: &Machine<'_>, registry: &Registry) -> Result<()> {
    let reference = format!("127.0.0.1:{}/team/bundle:v1", registry.port);
    let pushed = one.timed("push", &["bundle", "push", &reference])?;
    one.timed("push again", &["bundle", "push", &reference])?;
    let friend = Machine::after(one, place, "friend", Some("one key"))?;
    let pulled = friend.timed("pull", &["bundle", "pull", &reference])?;
    if pulled["manifest"] != pushed["manifest"] {
        return Err(format!("another bundle came: {pulled}").into());
    }
    expect(&friend.synced()?, false)?;
    // Without the key the engine is built, with the packages that were bundled.
    let stranger = Machine::after(one, place, "stranger", None)?;
    let digest = pushed["manifest"].as_str().unwrap_or_default();
    stranger.must(&["bundle", "pull", &reference.replace(":v1", &format!("@{digest}"))])?;
    expect(&stranger.synced()?, true)?;

    let lock = sh.read_file(one.project().join("manifests/default.lock"))?;
    let model =
        lock.split("[[model").nth(1).and_then(|model| model.split("sha256:").nth(1)).ok_or("no weights are locked")?;
    let (digest, sum) = (&model[..64], registry.blobs.join(&model[..2]));
    let blob = sum.join(digest).join("data");
    let mut bytes = sh.read_binary_file(&blob)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    sh.write_file(&blob, bytes)?;
    let victim = Machine::after(one, place, "victim", Some("one key"))?;
    let (code, said) = victim.json(&["bundle", "pull", &reference])?;
    println!("a byte changed on the registry's disk: exit code {code}, {}", said["error"]["message"]);
    let admitted =
        ["blobs", "trees", "artifacts"].map(|folder| victim.cache().join(folder)).iter().any(|path| path.exists());
    if code != 3 || admitted {
        return Err("the changed byte was taken".into());
    }
    Ok(())
}

fn full_disk(sh: &Shell, place: &Path, one: &Machine<'_>) -> Result<()> {
    if cmd!(sh, "unshare -rm true").quiet().ignore_stderr().run().is_err() {
        println!("not tried, because this system allows no user namespaces: a full disk");
        return Ok(());
    }
    let two = Machine::after(one, place, "full", Some("one key"))?;
    let tar = place.join("b.tar").display().to_string();
    let import = two.command(&["bundle", "import", &tar]);
    // The bundle, the reserve, and some more, which the filler takes while the bundle is written.
    let size = (WEIGHTS_BYTES >> 20) + 150;
    let mut full = Command::new("unshare");
    full.args(["-rm", "sh", "-c", FULL_DISK, "sh"]).arg(two.cache()).arg(size.to_string());
    full.arg(import.get_program()).args(import.get_args()).current_dir(two.project());
    full.envs(import.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let code = full.status()?.code();
    println!("a disk that fills up: exit code {code:?}, and then 0");
    if code == Some(8) { Ok(()) } else { Err("expected exit code 8, and nothing admitted".into()) }
}

/// A real registry on a loopback port. Ends when dropped.
struct Registry {
    process: Child,
    port: u16,
    /// Where it keeps the bytes.
    blobs: PathBuf,
}

impl Registry {
    fn start(sh: &Shell, place: &Path) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let storage = place.join("registry");
        let root = storage.display();
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: '{root}'}}}}\n\
             http: {{addr: '127.0.0.1:{port}'}}\n"
        );
        sh.write_file(place.join("registry.yml"), config)?;
        let mut command = Command::new("docker-registry");
        let process =
            command.arg("serve").arg(place.join("registry.yml")).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let registry = Self { process, port, blobs: storage.join("docker/registry/v2/blobs/sha256") };
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if began.elapsed() > Duration::from_secs(20) {
                return Err("the registry does not listen".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
