//! `aitools doctor`.

use crate::cli::failure::exit;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::ops::doctor::{self, Report};
use crate::ops::{Failure, project};

use super::size;

/// Exit code 1 when something is missing without which nothing works.
///
/// # Errors
/// See [`doctor::run`].
pub fn run(session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let root = project::find_root(&session.cwd);
    let host = session.host(&root, None)?;
    let report = doctor::run(&host)?;
    let sound = !report.findings.iter().any(|found| found.needed && found.identity.is_none());
    output.text(&text(&report));
    output.result("doctor", sound, &report);
    Ok(if sound { exit::DONE } else { exit::CONDITION })
}

fn text(report: &Report) -> String {
    let mut text = format!("aitools {} on {}\n", report.version, report.platform);
    let memory = report.memory_bytes.map_or("memory not known".to_owned(), |bytes| format!("{} memory", size(bytes)));
    text += &format!("  machine   {} physical cores, {memory}\n", report.physical_cores);
    let free = report.cache_free_bytes.map_or(String::new(), |bytes| format!(", {} free", size(bytes)));
    text += &format!("  cache     {}{free}\n", report.cache.display());
    for found in &report.findings {
        match (&found.identity, &found.trouble) {
            (Some(identity), _) => text += &format!("  ok        {}: {identity}\n", found.what),
            (None, trouble) => {
                let mark = if found.needed { "MISSING" } else { "absent " };
                text += &format!("  {mark}   {}: {}\n", found.what, trouble.as_deref().unwrap_or_default());
            }
        }
    }
    let Some(accelerators) = &report.accelerators else { return text };
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
