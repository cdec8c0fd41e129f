//! `aitools serve`.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use crate::cli::args;
use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::cli::wording::{counted, size};
use crate::gateway::access::{self, KeyError};
use crate::gateway::catalog::Offer;
use crate::gateway::notice::{Notice, What};
use crate::ops::failure::ServeError;
use crate::ops::serve;
use crate::ops::{Failure, Host, Project};

/// # Errors
/// Why nothing can be served.
pub fn run(ask: &args::Serve, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let mut project = super::load(session, output)?;
    let mut policies = Vec::new();
    for asked in &ask.policies {
        policies.push(project.include(asked, &session.cwd)?);
    }
    let host = session.host(&project.root, Some(&ask.build))?;
    let offers = serve::check(&host, &project, &policies)?;
    if ask.check {
        return Ok(tell_check(&offers, output));
    }
    for offer in &offers {
        if let Err(why) = &offer.model {
            output.say(&format!("{}: not served now: {why}", offer.name));
        }
    }
    let settings = serve::Ask {
        policies,
        address: ask.host,
        port: ask.port,
        keys: keys(ask, session)?,
        insecure: ask.insecure,
        hosts: ask.allow_host.clone(),
        origins: ask.cors_origin.clone(),
        tls: ask.tls_cert.clone().zip(ask.tls_key.clone()).map(|(chain, key)| absolute(session, &chain, &key)),
        queue: usize::try_from(ask.queue).unwrap_or(usize::MAX),
        longest_wait: Duration::from_secs(ask.longest_wait.into()),
        loaded: ask.max_loaded.and_then(|most| usize::try_from(most).ok()),
        groups: session.groups(&project.root)?,
        grace: Duration::from_secs(ask.grace.into()),
    };
    serve_until_stopped(host, &project, settings, output)
}

fn absolute(session: &Session<'_>, chain: &PathBuf, key: &PathBuf) -> (PathBuf, PathBuf) {
    (session.cwd.join(chain), session.cwd.join(key))
}

/// Keys come from a file or the environment: other users can read arguments.
fn keys(ask: &args::Serve, session: &Session<'_>) -> Result<Vec<String>, Failure> {
    let mut keys = match &ask.api_key_file {
        Some(file) => access::keys_in(&session.cwd.join(file)).map_err(ServeError::Key)?,
        None => Vec::new(),
    };
    keys.extend(session.api_key().map(str::to_owned));
    if let Some(short) = keys.iter().find(|key| key.len() < access::SHORTEST_KEY) {
        return Err(ServeError::Key(KeyError::Short(short.chars().count())).into());
    }
    Ok(keys)
}

fn tell_check(offers: &[Offer], output: &Output) -> u8 {
    let sound = offers.iter().all(|offer| offer.model.is_ok());
    for offer in offers {
        let line = match &offer.model {
            Ok(model) => format!(
                "{}: OK ({}, needs {})",
                offer.name,
                model.variant,
                size(model.need.ram_bytes + model.need.gpu_bytes)
            ),
            Err(why) => format!("{}: {why}", offer.name),
        };
        output.text(&format!("{line}\n"));
    }
    let policies: Vec<_> = offers
        .iter()
        .map(|offer| json!({ "name": offer.name, "problem": offer.model.as_ref().err(), "need": offer.model.as_ref().ok().map(|model| model.need) }))
        .collect();
    output.result("serve", sound, &json!({ "policies": policies }));
    if sound { exit::DONE } else { exit::CONDITION }
}

fn serve_until_stopped(host: Host, project: &Project, ask: serve::Ask, output: &Output) -> Result<u8, Failure> {
    let mut count = 0_u64;
    serve::run(host, project, ask, &mut |notice| {
        count += u64::from(matches!(notice.what, What::Request { .. }));
        if output.json {
            output.event("serve", notice);
        } else if let Some(line) = line(notice) {
            output.say(&line);
        }
    })?;
    output.result("serve", true, &json!({ "requests": count }));
    Ok(exit::DONE)
}

/// A notice as a line for a terminal.
fn line(notice: &Notice) -> Option<String> {
    let time = notice.time.get(11..19).unwrap_or_default();
    let text = match &notice.what {
        What::Listening { url } => {
            return Some(format!("serving at {url}/v1 (page: {url}/); Ctrl-C ends the server"));
        }
        What::Policies { names } => format!("policies: {}", names.join(", ")),
        What::Loading { policy } => format!("loading {policy}"),
        What::Loaded { policy, load_ms } => format!("loaded {policy} in {:.1} s", *load_ms as f64 / 1000.0),
        What::Unloaded { policy } => format!("unloaded {policy}"),
        What::Failed { policy, why } => format!("{policy} failed: {why}"),
        What::Request { policy, path, status, duration_ms, completion_tokens, tokens_per_second, .. } => {
            let tokens = completion_tokens.map_or(String::new(), |tokens| format!(", {tokens} tokens"));
            let rate = tokens_per_second.map_or(String::new(), |rate| format!(", {rate:.1} tokens/s"));
            format!("{status} {path} {policy}: {:.2} s{tokens}{rate}", duration_ms / 1000.0)
        }
        What::Problem { text } => format!("warning: {text}"),
        What::Draining { running } => format!("ending: {} to finish", counted(*running, "request")),
    };
    Some(format!("{time} {text}"))
}
