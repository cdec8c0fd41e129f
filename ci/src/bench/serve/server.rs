//! The servers that are measured, as processes: `aitools serve` with its engines, an engine by hand, llama-server as a router, and a
//! gateway from the npm registry.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value as Json;
use xshell::{Shell, cmd};

use super::load::Target;
use crate::bench::ground::Ground;
use crate::step::Result;

const PATIENCE: Duration = Duration::from_secs(120);
/// A gateway of the npm registry.
const PORTKEY: &str = "@portkey-ai/gateway@1.15.2";

/// A process that ends with its value.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    pub fn start(command: &mut Command) -> Result<Self> {
        Ok(Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until there is a value.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(value) = look() {
            return Ok(value);
        }
        if begun.elapsed() > PATIENCE {
            return Err(format!("after {} s still not: {what}", PATIENCE.as_secs()).into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// Resident memory of a process in MiB (Linux).
pub fn resident_mib(sh: &Shell, pid: u32) -> Result<f64> {
    let status = sh.read_file(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).ok_or("no number")?.parse::<f64>()? / 1024.0)
}

/// A running `aitools serve`.
#[derive(Debug)]
pub struct Gateway<'a> {
    sh: &'a Shell,
    process: Child,
    pub target: Target,
    control: Target,
}

impl<'a> Gateway<'a> {
    /// Starts one for a synced project.
    pub fn start(ground: &Ground<'a>, project: &Path, options: &[&str]) -> Result<Self> {
        let mut command = ground.ours(project, None);
        command.args(["serve", "--port", "0"]).args(options);
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let file = project.join(".aitools/serve.json");
        let running = until("`aitools serve` listens", || {
            let running: Json = serde_json::from_str(&ground.sh.read_file(&file).ok()?).ok()?;
            (running["pid"] == process.id()).then_some(running)
        })?;
        let address =
            running["url"].as_str().and_then(|url| url.strip_prefix("http://")).ok_or("no address")?.parse()?;
        let target = Target::new("aitools serve", address);
        let key = format!("Bearer {}", running["key"].as_str().unwrap_or_default());
        let control = target.clone().header("authorization", &key);
        until("it answers", || control.once("/health", None).ok())?;
        Ok(Self { sh: ground.sh, process, target, control })
    }

    pub fn resident_mib(&self) -> Result<f64> {
        resident_mib(self.sh, self.process.id())
    }

    fn policy(&self, name: &str) -> Result<Json> {
        let status: Json = serde_json::from_str(&self.control.once("/aitools/status", None)?)?;
        let policies = status["policies"].as_array().cloned().unwrap_or_default();
        Ok(policies.into_iter().find(|policy| policy["name"] == name).ok_or("no such policy")?)
    }

    /// The engine of a policy that is loaded.
    pub fn engine(&self, policy: &str) -> Result<Engine> {
        let pid = self.policy(policy)?["pid"].as_u64().ok_or("the engine is not loaded")?;
        let words = |file: &str| -> Result<Vec<String>> {
            let text = self.sh.read_file(format!("/proc/{pid}/{file}"))?;
            Ok(text.trim_end_matches('\0').split('\0').map(str::to_owned).collect())
        };
        let environment = words("environ")?;
        let pairs = environment.iter().filter_map(|word| word.split_once('='));
        let environment = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Ok(Engine { words: words("cmdline")?, environment })
    }

    /// Ends the engine of a policy.
    pub fn unload(&self, policy: &str) -> Result<()> {
        self.control.once("/models/unload", Some(&serde_json::json!({ "model": policy }).to_string()))?;
        until("the engine has ended", || (self.policy(policy).ok()?["state"] == "unloaded").then_some(()))
    }
}

impl Drop for Gateway<'_> {
    fn drop(&mut self) {
        if self.control.once("/aitools/shutdown", Some("{}")).is_err() {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}

/// How an engine was started: enough to ask it, and to start another one by hand.
#[derive(Debug, Clone)]
pub struct Engine {
    words: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Engine {
    fn option(&self, name: &str) -> Option<&str> {
        let at = self.words.iter().position(|word| word == name)?;
        self.words.get(at + 1).map(String::as_str)
    }

    fn key(&self) -> &str {
        let key = self.environment.iter().find(|(name, _)| name == "LLAMA_API_KEY");
        key.map_or("", |(_, key)| key)
    }

    /// The engine itself.
    pub fn target(&self) -> Result<Target> {
        let port: u16 = self.option("--port").ok_or("no `--port` among the engine's options")?.parse()?;
        let address = (Ipv4Addr::LOCALHOST, port).into();
        Ok(Target::new("engine direct", address).header("authorization", &format!("Bearer {}", self.key())))
    }

    /// Another one with the same options, started by hand.
    pub fn again(&self) -> Result<(Command, Target)> {
        let mut words = self.words.clone();
        let address = free_address()?;
        let at = words.iter().position(|word| word == "--port").ok_or("no `--port`")?;
        words[at + 1] = address.port().to_string();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env_clear().envs(self.environment.iter().map(|(name, value)| (name, value)));
        let target = Target::new("engine by hand", address).header("authorization", &format!("Bearer {}", self.key()));
        Ok((command, target))
    }

    /// llama-server without a model, which starts one with the same options when it is asked for.
    pub fn router(&self, sh: &Shell, program: &Path, folder: &Path, policy: &str) -> Result<(Process, Target)> {
        let weights = self.option("--model").ok_or("no `--model` among the engine's options")?;
        let preset = folder.join("models.ini");
        sh.write_file(&preset, format!("version = 1\n[{policy}]\nmodel = {weights}\n"))?;
        let address = free_address()?;
        let mut command = Command::new(program);
        let mut words = self.words.iter().skip(1);
        while let Some(word) = words.next() {
            if matches!(word.as_str(), "--model" | "--port") {
                words.next();
            } else {
                command.arg(word);
            }
        }
        command.args(["--port", &address.port().to_string(), "--models-preset"]).arg(preset).env_clear();
        let own = |name: &str| !matches!(name, "LLAMA_API_KEY" | "LLAMA_ARG_ALIAS");
        command.envs(self.environment.iter().filter(|(name, _)| own(name)).map(|(name, value)| (name, value)));
        let process = Process::start(command.current_dir(folder))?;
        let target = Target::new("llama-server as router", address);
        until("the router answers", || target.once("/health", None).ok())?;
        Ok((process, target))
    }
}

/// Ends the model of llama-server as a router, and waits for it.
pub fn unload_from_router(router: &Target, policy: &str) -> Result<()> {
    router.once("/models/unload", Some(&serde_json::json!({ "model": policy }).to_string()))?;
    until("the router has ended its model", || {
        let listed: Json = serde_json::from_str(&router.once("/models", None).ok()?).ok()?;
        let models = listed["data"].as_array()?;
        let own = models.iter().find(|model| model["id"] == policy)?;
        (own["status"]["value"] == "unloaded").then_some(())
    })
}

/// Portkey's gateway in front of an engine; None where there is no Node.
pub fn portkey(ground: &Ground<'_>, engine: &Target) -> Result<Option<(Process, Target)>> {
    if !(ground.has("node") && ground.has("npm")) {
        return Ok(None);
    }
    let program = install_portkey(ground)?;
    let address = free_address()?;
    let mut command = Command::new("node");
    command.arg(program).args(["--headless", &format!("--port={}", address.port())]).env("NODE_ENV", "production");
    let process = Process::start(command.current_dir(&ground.scratch))?;
    let target = Target { name: "Portkey gateway", address, headers: engine.headers.clone() }
        .header("x-portkey-provider", "openai")
        .header("x-portkey-custom-host", &format!("http://{}/v1", engine.address));
    until("Portkey's gateway listens", || std::net::TcpStream::connect(address).ok())?;
    Ok(Some((process, target)))
}

fn install_portkey(ground: &Ground<'_>) -> Result<PathBuf> {
    let sh = ground.sh;
    let folder = crate::step::root().join("target/bench-tools/node");
    let stamp = folder.join("installed.txt");
    if sh.read_file(&stamp).is_ok_and(|installed| installed == PORTKEY) {
        return Ok(folder.join("node_modules/@portkey-ai/gateway/build/start-server.js"));
    }
    sh.create_dir(&folder)?;
    cmd!(sh, "npm install --silent --no-fund --no-audit --prefix {folder} {PORTKEY}").run()?;
    sh.write_file(stamp, PORTKEY)?;
    Ok(folder.join("node_modules/@portkey-ai/gateway/build/start-server.js"))
}
