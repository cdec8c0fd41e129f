//! Open WebUI in a real browser, with `aitools serve` and two real models behind it. What a person does there is in
//! `ci/clients/webui.py`; here is what it needs. Pictures of the main steps stay in `target/e2e/webui/pictures/`.
//!
//! One step does not go through the page: a model is loaded through the address that the button for it in the connection's
//! settings calls.

use std::path::{Path, PathBuf};

use xshell::{Shell, cmd};

use super::serve;
use crate::quickstart;
use crate::step::{Job, Result, Skip, cargo};

pub const JOB: Job = Job { name: "webui", about: "Open WebUI in a browser: sign up, chat, unload, swap", run };

const WEBUI: &str = "open-webui==0.12.4";
/// uv installs Open WebUI, which brings 7 GB of packages, in a minute; pip takes several.
const PYTHON: &[&str] = &["uv==0.13.9", "psutil==7.2.2"];
/// Those that Open WebUI runs on.
const VERSIONS: &[&str] = &["3.11", "3.12"];

/// The second model is a base model without a chat template: a dialogue as plain text.
const GEMMA: &str = r#"engine: llama-cpp
model: gemma-3-270m
generation:
  temperature: 0
  max_tokens: 64
  chat_template: |
    {%- for message in messages %}{{ message.role }}: {{ message.content }}
    {% endfor %}
    {%- if add_generation_prompt %}assistant:{% endif %}
runtime:
  threads: 1
  context_size: 2048
"#;

fn run(sh: &Shell) -> Result<()> {
    if !cfg!(target_os = "linux") {
        return Err(Skip("the checks look for processes as Linux has them".to_owned()).into());
    }
    let base = base(sh)?;
    let browser = crate::step::root().join("ci/browser/chromium.py");
    if cmd!(sh, "{base} {browser}").quiet().run().is_err() {
        return Err(Skip("no Chromium is installed; on Debian, run `apt-get install chromium`".to_owned()).into());
    }
    let place = crate::step::root().join("target/e2e/webui");
    sh.create_dir(&place)?;
    let python = webui(sh, base, &place.join("python"))?;
    cargo(sh, "build --release --locked --bin aitools").run()?;
    let program = quickstart::program();
    let weights = serve::weights(sh, &python, &place.join("weights"))?;
    let project = serve::project(sh, &program, &place, &weights)?;
    sh.write_file(project.join("configs/models/llama-cpp/gemma-3-270m.yaml"), GEMMA)?;
    cmd!(sh, "{program} -C {project} sync").run()?;
    let clients = crate::step::root().join("ci/clients/webui.py");
    let webui = python.with_file_name("open-webui");
    cmd!(sh, "{python} {clients} {program} {project} {webui} {place}").run()?;
    Ok(())
}

/// A Python that Open WebUI runs on.
fn base(sh: &Shell) -> Result<&'static str> {
    let version = "import sys; print('%d.%d' % sys.version_info[:2])";
    let fits = |base: &&str| {
        let found = cmd!(sh, "{base} -c {version}").quiet().ignore_stderr().read();
        found.is_ok_and(|found| VERSIONS.contains(&&*found))
    };
    let found = ["python3.12", "python3.11", "python3"].into_iter().find(fits);
    found.ok_or_else(|| Skip("Open WebUI needs Python 3.11 or 3.12".to_owned()).into())
}

/// A Python with Open WebUI.
fn webui(sh: &Shell, base: &str, folder: &Path) -> Result<PathBuf> {
    let python = serve::python(sh, base, folder, PYTHON)?;
    let stamp = folder.join("webui.txt");
    if sh.read_file(&stamp).is_ok_and(|installed| installed == WEBUI) {
        return Ok(python);
    }
    cmd!(sh, "{python} -m uv pip install --quiet --python {python} {WEBUI}").run()?;
    sh.write_file(stamp, WEBUI)?;
    Ok(python)
}
