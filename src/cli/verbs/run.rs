//! `aitools run`.

use serde_json::json;

use crate::cli::args;
use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::prompt;
use crate::cli::said::Said;
use crate::cli::settings::Session;
use crate::cli::wording::size;
use crate::engine::Ready;
use crate::engine::conversation::Finish;
use crate::engine::metrics::Metrics;
use crate::ops::answer;
use crate::ops::project::PolicyFile;
use crate::ops::run::Ran;
use crate::ops::sync::{self, Ask};
use crate::ops::{Failure, Host, Project, ready};

/// # Errors
/// What is wrong with policy, model or engine.
pub fn run(ask: &args::Run, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let mut project = super::load(session, output)?;
    let asked = ask.config.as_ref().map(|path| path.display().to_string()).or(ask.policy.clone()).unwrap_or_default();
    let name = project.include(&asked, &session.cwd)?;
    let file = project.policy(&name)?;
    require_named(ask, &project, file)?;
    super::require_text(file)?;
    let prompt = if prompt::is_chat(ask) { None } else { Some(prompt::read(ask, &session.cwd)?) };
    let host = session.host(&project.root, Some(&ask.build))?;
    if ask.sync {
        let names = [file.name.clone()];
        let mode = session.lock_mode(&ask.lock, &project.root)?.value;
        let synced = sync::run(&host, &project, &Ask { policies: &names, mode, dry_run: false })?;
        if !synced.plan.is_empty() {
            super::sync::tell(&synced, &project, output);
        }
    }
    let (ready, warnings) = ready::ready(&host, &project, file)?;
    host.store.save_records()?;
    output.warnings(&warnings);
    let Some(prompt) = prompt else { return super::chat::talk(&host, &project, ready, session, output) };
    let keep_text = session.log_prompts(&project.root, ask.log_prompts)?.value;
    let ran = answer(&host, &project, &ready, &prompt, keep_text, output)?;
    tell(&ran, &ready, output);
    Ok(if ran.answer.finish == Finish::Cancelled { exit::INTERRUPTED } else { exit::DONE })
}

/// `--engine` and `--model` say what the policy must be for.
fn require_named(ask: &args::Run, project: &Project, file: &PolicyFile) -> Result<(), Failure> {
    let resolved = crate::format::policy::resolve(&file.policy, &project.manifest.value)?;
    let differs = |what: &str, asked: &Option<String>, actual: &str| match asked {
        Some(asked) if asked != actual => {
            let text = format!("policy `{}` is for {what} `{actual}`, not `{asked}`", file.name);
            Err(Failure::Usage { what: text, hint: Some(format!("leave out `--{what}`, or name another policy")) })
        }
        _ => Ok(()),
    };
    differs("engine", &ask.engine, resolved.engine.0.as_str())?;
    differs("model", &ask.model, resolved.model.0.as_str())
}

fn answer(
    host: &Host,
    project: &Project,
    ready: &Ready,
    prompt: &str,
    keep_text: bool,
    output: &Output,
) -> Result<Ran, Failure> {
    let mut said = Said::new(output);
    let ran = answer::answer(host, project, ready, prompt, keep_text, &mut |piece| said.piece(piece));
    said.end();
    ran
}

fn tell(ran: &Ran, ready: &Ready, output: &Output) {
    output.say(&summary(&ran.metrics, ran.answer.finish));
    output.result(
        "run",
        ran.answer.finish != Finish::Cancelled,
        &json!({
            "text": ran.answer.text,
            "thought": ran.answer.reasoning,
            "finish": ran.answer.finish,
            "policy": ready.name,
            "policy_sha256": ready.policy_sha256,
            "engine": ready.policy.engine,
            "variant": ready.variant,
            "fingerprint": ready.fingerprint,
            "weights_sha256": ready.weights_sha256,
            "seed": ran.seed,
            "metrics": ran.metrics,
        }),
    );
}

/// One line of measurements after the answer.
fn summary(metrics: &Metrics, finish: Finish) -> String {
    let ms = |value: Option<f64>| value.map_or("?".to_owned(), |ms| format!("{ms:.0} ms"));
    let rate = metrics.tokens_per_second.map_or("?".to_owned(), |rate| format!("{rate:.1}"));
    let memory = metrics.peak_memory_bytes.map_or(String::new(), |bytes| format!(", peak memory {}", size(bytes)));
    let end = match finish {
        Finish::Stop | Finish::ToolCalls => "",
        Finish::Length => ", stopped at max_tokens or the end of the context",
        Finish::Cancelled => ", stopped",
    };
    format!(
        "load {:.0} ms, first token {} after the request, {} prompt + {} answer tokens, {rate} tokens/s after the first{memory}{end}",
        metrics.load_ms,
        ms(metrics.first_token_ms),
        metrics.prompt_tokens,
        metrics.completion_tokens,
    )
}
