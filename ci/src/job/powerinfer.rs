//! PowerInfer itself, from a copy of its repository: locked, built, checked and run through our program; a sparse model made
//! here answers as its forward pass in plain Rust does; the faults of its server are provoked and survived.

use xshell::Shell;

use crate::sparse::model::{self, Tiny};
use crate::sparse::{Engine, Project, published};
use crate::step::{Job, Result, cargo};

pub const JOB: Job = Job { name: "powerinfer", about: "PowerInfer's own tree builds, runs and is survived", run };

/// One thread: with more, answers of sparse models differ from run to run.
pub const GREEDY: &str =
    "runtime: {threads: 1, context_size: 128}\ngeneration: {temperature: 0, max_tokens: 8, chat_template: none}";

/// Made of the sparse model with PowerInfer's own programs.
const DERIVED: &str = r#"
[models.q4]
place = "models/powerinfer/q4"
weights = "model.gguf"
[models.q4.derive]
from = "sparse"
engine = "powerinfer"
quantize = "Q4_0"

[tools.numpy]
pypi = "numpy"
version = "1.26.4"
[tools.sentencepiece]
pypi = "sentencepiece"
version = "0.2.0"

[models.published]
source = { path = "published/published" }
[models.predictor]
source = { path = "published/predictor" }
[models.converted.derive]
from = "published"
engine = "powerinfer"
convert = { predictor = "predictor", python = ["numpy", "sentencepiece"] }
[models.converted-q4.derive]
from = "converted"
engine = "powerinfer"
quantize = "Q4_0"
"#;

fn run(sh: &Shell) -> Result<()> {
    let engine = Engine::powerinfer(sh)?;
    let mut project = Project::new(sh, "powerinfer")?;
    let (sparse, dense) = (Tiny::sparse(), Tiny::dense());
    project.add_model("sparse", &sparse, GREEDY)?;
    project.add_model("dense", &dense, GREEDY)?;
    project.more = DERIVED.to_owned();
    for name in ["q4", "converted", "converted-q4"] {
        project.add_policy(name, name, GREEDY)?;
    }
    for (folder, files) in [("published", published::model(&sparse)), ("predictor", published::predictor(&sparse))] {
        for (file, bytes) in files {
            project.write(&format!("published/{folder}/{file}"), bytes)?;
        }
    }
    project.write_manifest(&engine, true, "targets = [\"main\", \"server\", \"quantize\"]")?;
    locked(&project, sh)?;
    project.ours(&["sync"]).run()?;
    settled(&project, sh)?;
    for (name, model) in [("sparse", &sparse), ("dense", &dense)] {
        answers(&project, name, model)?;
    }
    derived(&project, sh)?;
    // Published, converted, and read by the engine: still the numbers of the model.
    answers(&project, "converted", &sparse)?;
    refused(&mut project, &engine, &sparse)?;
    let server = project.program("server");
    let _wire = sh.push_env("AITOOLS_TEST_POWERINFER_WIRE_SERVER", &server);
    let _own = sh.push_env("AITOOLS_TEST_POWERINFER_SERVER", &server);
    cargo(sh, "test --workspace --locked --lib engine::powerinfer::real -- --ignored").run()?;
    Ok(())
}

/// Locking twice gives the same bytes.
fn locked(project: &Project<'_>, sh: &Shell) -> Result<()> {
    let path = project.folder.join("manifests/default.lock");
    project.ours(&["lock"]).run()?;
    let first = sh.read_file(&path)?;
    sh.remove_path(&path)?;
    project.ours(&["lock"]).run()?;
    if sh.read_file(&path)? != first {
        return Err("two locks of one manifest differ".into());
    }
    Ok(())
}

/// After a sync there is nothing to do, and what the repository has as a submodule is there.
fn settled(project: &Project<'_>, sh: &Shell) -> Result<()> {
    let again = project.json(&["sync", "--locked", "--offline"])?;
    if again["plan"]["steps"].as_array().is_none_or(|steps| !steps.is_empty()) {
        return Err(format!("a second sync has something to do: {again}").into());
    }
    if !sh.path_exists(project.folder.join("external/powerinfer/CMakeLists.txt")) {
        return Err("the submodule is empty".into());
    }
    project.ours(&["check"]).run()?;
    project.ours(&["verify"]).run()?;
    project.ours(&["status"]).run()?;
    Ok(())
}

/// The greedy answer is the one that the numbers of the model give, every time.
pub fn answers(project: &Project<'_>, name: &str, model: &Tiny) -> Result<()> {
    let expected = model::words(&model::greedy(model, &model::hi(), 8));
    for _ in 0..2 {
        let ran = project.json(&["run", name, "--prompt", "hi"])?;
        println!("{name}: {} {}", ran["text"], ran["metrics"]["tokens_per_second"]);
        if ran["text"] != expected.as_str() || ran["finish"] != "length" {
            return Err(format!("{name}: expected {expected:?}: {ran}").into());
        }
    }
    Ok(())
}

/// What was derived is smaller, has the statistics beside it, and answers the same every time.
fn derived(project: &Project<'_>, sh: &Shell) -> Result<()> {
    let size =
        |name: &str| sh.read_binary_file(project.folder.join("models/powerinfer").join(name)).map(|file| file.len());
    let (whole, small) = (size("sparse/model.gguf")?, size("q4/model.gguf")?);
    println!("derived: {small} bytes of {whole}");
    if small * 2 > whole || size("q4/activation/activation_1.pt")? == 0 {
        return Err("what was derived is not Q4_0".into());
    }
    let answer = |name| project.json(&["run", name, "--prompt", "hi"]).map(|ran| ran["text"].to_string());
    let (first, second, converted) = (answer("q4")?, answer("q4")?, answer("converted-q4")?);
    println!("q4: {first}");
    if first != second || first != converted || first.len() < 8 {
        return Err(format!("q4 answers {first}, then {second}; converted {converted}").into());
    }
    Ok(())
}

/// Weights that PowerInfer would load, and answer nonsense with, do not get there; neither does a prompt that it would cut.
fn refused(project: &mut Project<'_>, engine: &Engine, sparse: &Tiny) -> Result<()> {
    let bytes = sparse.to_bytes();
    project.add_file("cut", &bytes[..bytes.len() * 55 / 100], GREEDY)?;
    // Q8_0 in the place of F16: the type's number lies behind the name and the two lengths of the tensor.
    let (name, mut typed) = (b"blk.1.ffn_down_t.weight", bytes);
    let at = typed.windows(name.len()).position(|part| part == name).ok_or("no such tensor")?;
    let kind = at + name.len() + 4 + 2 * 8;
    typed[kind..kind + 4].copy_from_slice(&8u32.to_le_bytes());
    project.add_file("typed", &typed, GREEDY)?;
    project.write_manifest(engine, true, "targets = [\"main\", \"server\", \"quantize\"]")?;
    project.ours(&["sync"]).run()?;
    let long = "x".repeat(200);
    for (policy, prompt, word) in
        [("cut", "hi", "cut off"), ("typed", "hi", "F16 or Q4_0"), ("sparse", &long, "runtime.context_size")]
    {
        let output = project.ours(&["run", policy, "--prompt", prompt]).ignore_status().output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        println!("{said}");
        if output.status.code() != Some(2) || !said.contains(word) {
            return Err(format!("{policy} is not refused for the right reason").into());
        }
    }
    Ok(())
}
