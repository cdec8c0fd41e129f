//! `aitools doctor`.

use std::path::Path;

use serde::Serialize;
use serde_json::json;

use crate::base::platform::Variant;
use crate::build::accelerator::Accelerators;
use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::settings::{Origin, Session, Setting};
use crate::cli::wording::size;
use crate::ops::doctor::{self, Report};
use crate::ops::{Failure, project};

/// Exit code 1 when something is missing that the project needs; without a project, that usual projects need.
///
/// # Errors
/// See [`doctor::run`]; also every problem of the manifest and the settings files.
pub fn run(session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = match super::load(session, output) {
        Ok(project) => Some(project),
        Err(Failure::NoManifest { .. }) => None,
        Err(other) => return Err(other),
    };
    let root = project.as_ref().map_or_else(|| project::find_root(&session.cwd), |project| project.root.clone());
    let host = session.host(&root, None)?;
    let report = doctor::run(&host, project.as_ref().map(|project| &project.manifest.value))?;
    let settings = in_force(session, &root)?;
    let good = !report.findings.iter().any(|found| found.needed && found.identity.is_none());
    output.text(&format!("{}{}{}", head(&report), settings_text(&settings), text(&report)));
    output.result("doctor", good, &json!({ "report": report, "settings": settings }));
    Ok(if good { exit::DONE } else { exit::CONDITION })
}

/// A setting of this run: its key, its value in words, and what set it.
#[derive(Debug, Serialize)]
struct InForce {
    key: &'static str,
    value: String,
    origin: Origin,
}

/// What holds for this run, and what decided it.
fn in_force(session: &Session<'_>, root: &Path) -> Result<Vec<InForce>, Failure> {
    fn line<T>(key: &'static str, set: Setting<T>, words: impl Fn(T) -> String) -> InForce {
        InForce { key, value: words(set.value), origin: set.origin }
    }
    let text = |default: &'static str| move |value: Option<String>| value.unwrap_or_else(|| default.to_owned());
    let variant = |value: Option<Variant>| value.map_or("detected", Variant::as_str).to_owned();
    Ok(vec![
        line("manifest", session.manifest(root)?, text("default")),
        line("cache_dir", session.cache_dir(root)?, |path| path.display().to_string()),
        line("variant", session.variant(root, None)?, variant),
        line("jobs", session.jobs(root, None)?, |jobs| jobs.to_string()),
        line("offline", session.offline(root)?, |offline| offline.to_string()),
        line("python", session.python(root)?, text("the first one found")),
        line("log_prompts", session.log_prompts(root, false)?, |kept| kept.to_string()),
    ])
}

fn settings_text(settings: &[InForce]) -> String {
    let set = settings.iter().filter(|setting| setting.origin != Origin::Default);
    set.map(|InForce { key, value, origin }| format!("  setting   {key} = {value} ({origin})\n")).collect()
}

fn head(report: &Report) -> String {
    let mut text = format!("aitools {} on {}\n", report.version, report.platform);
    let memory = report.memory_bytes.map_or("unknown memory".to_owned(), |bytes| format!("{} memory", size(bytes)));
    text += &format!("  machine   {} physical cores, {memory}\n", report.physical_cores);
    let free = report.cache_free_bytes.map_or(String::new(), |bytes| format!(", {} free", size(bytes)));
    text += &format!("  cache     {}{free}\n", report.cache.display());
    if report.unfinished_bytes > 0 {
        text += &format!("  cache     {} of unfinished downloads and sources\n", size(report.unfinished_bytes));
    }
    if report.set_aside_bytes > 0 {
        let bytes = size(report.set_aside_bytes);
        text += &format!(
            "  cache     {bytes} of damaged files, named `.bad` in the Hugging Face cache: they may be deleted\n"
        );
    }
    text
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for found in &report.findings {
        match (&found.identity, &found.trouble) {
            (Some(identity), _) => text += &format!("  ok        {}: {identity}\n", found.what),
            (None, trouble) => {
                let mark = if found.needed { "MISSING" } else { "absent " };
                text += &format!("  {mark}   {}: {}\n", found.what, trouble.as_deref().unwrap_or_default());
            }
        }
    }
    text += &report.accelerators.as_ref().map_or(String::new(), gpus);
    text.extend(report.notes.iter().map(|note| format!("  note      {note}\n")));
    text.extend(report.install.iter().map(|command| format!("  hint: run `{command}`\n")));
    text
}

fn gpus(accelerators: &Accelerators) -> String {
    let mut text = String::new();
    for gpu in &accelerators.gpus {
        text += &format!("  gpu       {}, {}, driver {}\n", gpu.name, size(gpu.vram_bytes), gpu.driver);
    }
    for name in &accelerators.amd {
        text += &format!("  gpu       AMD {name}\n");
    }
    if accelerators.gpus.is_empty() && accelerators.amd.is_empty() {
        text += &format!(
            "  gpu       none{}\n",
            accelerators.trouble.as_ref().map_or(String::new(), |why| format!(": {why}"))
        );
    }
    text
}
