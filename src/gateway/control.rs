//! The endpoints about the gateway itself: what is served, what runs, loading and unloading.
//!
//! Lists, load, unload and events have the shape of llama.cpp's router (`tools/server/README.md` of its tree), for which Open
//! WebUI has buttons.

use std::time::Duration;

use async_stream::stream;
use bytes::Bytes;
use futures_util::future::join_all;
use hyper::{Response, StatusCode};
use serde_json::{Value as Json, json};
use tokio::sync::broadcast::error::RecvError;

use super::Context;
use super::body::{self, Body, Fields};
use super::call::{SILENCE, events};
use super::error::ApiError;
use super::forward;
use super::metrics::word;
use super::notice::What;
use super::owner::{Message, Status};
use super::scheduler::{Input, State};
use crate::engine::answer::ms;

/// The process answers.
pub fn health() -> Response<Body> {
    body::json(StatusCode::OK, &json!({ "status": "ok" }))
}

/// Whether requests can be answered: 503 while the gateway ends, or when nothing can be served.
pub async fn ready(context: &Context) -> Result<Response<Body>, ApiError> {
    let snapshot = context.owner.look().await?;
    let usable = snapshot.policies.iter().filter(|status| status.offer.model.is_ok()).count();
    let status = if usable > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok(body::json(
        status,
        &json!({ "status": if usable > 0 { "ok" } else { "no policy can be served" }, "policies": usable }),
    ))
}

fn router_status(status: &Status) -> Json {
    let mut value = json!({ "value": word(&status.view.state) });
    if matches!(status.view.state, State::Failed { .. }) || status.offer.model.is_err() {
        value["failed"] = true.into();
        value["error"] = json!(status.error.as_ref().or(status.offer.model.as_ref().err()));
    }
    value
}

/// Every policy as a model.
pub async fn models(context: &Context) -> Result<Response<Body>, ApiError> {
    let snapshot = context.owner.look().await?;
    let data: Vec<Json> = snapshot.policies.iter().map(|status| status.offer.listed(&router_status(status))).collect();
    Ok(body::json(StatusCode::OK, &json!({ "object": "list", "data": data })))
}

/// One policy as a model. Names may be percent-encoded.
pub async fn model(context: &Context, name: &str) -> Result<Response<Body>, ApiError> {
    let name = percent_encoding::percent_decode_str(name).decode_utf8_lossy().into_owned();
    let offer = context.owner.find(Some(&name))?;
    let snapshot = context.owner.look().await?;
    let status = snapshot.of(&offer.name).ok_or_else(|| ApiError::no_such_model(&name, &[]))?;
    Ok(body::json(StatusCode::OK, &status.offer.listed(&router_status(status))))
}

/// Loads or unloads the engine of the policy that the body names. Answers at once: `/models/sse` tells when it is done.
pub async fn change(context: &Context, fields: &Fields, load: bool) -> Result<Response<Body>, ApiError> {
    let asked: String = fields.get("model")?.ok_or_else(|| ApiError::param("model", "`model` is missing"))?;
    let name = context.owner.find(Some(&asked))?.name.clone();
    let snapshot = context.owner.look().await?;
    let status = snapshot.of(&name).ok_or_else(|| ApiError::no_such_model(&asked, &[]))?;
    if load && let Err(why) = &status.offer.model {
        return Err(ApiError::param("model", format!("`{name}` cannot be loaded: {why}")));
    }
    if !load && !matches!(status.view.state, State::Ready | State::Starting) {
        return Err(ApiError::param("model", format!("`{name}` is not loaded")));
    }
    context.owner.send(Message::Happened(if load { Input::Load(name) } else { Input::Unload(name) }));
    Ok(body::json(StatusCode::OK, &json!({ "success": true })))
}

/// Changes of the models' states as they happen.
pub fn watch(context: &Context) -> Response<Body> {
    let mut news = context.owner.notices();
    events(stream! {
        // Tells the client that it is connected.
        yield Ok(Bytes::from_static(b": connected\n\n"));
        loop {
            let notice = match tokio::time::timeout(SILENCE, news.recv()).await {
                Err(_) => {
                    yield Ok(Bytes::from_static(b": waiting\n\n"));
                    continue;
                }
                Ok(Err(RecvError::Lagged(_))) => continue,
                Ok(Err(RecvError::Closed)) => return,
                Ok(Ok(notice)) => notice,
            };
            let event = match notice.what {
                What::Loading { policy } => status_event(&policy, &json!({ "status": "loading" })),
                What::Loaded { policy, .. } => status_event(&policy, &json!({ "status": "loaded" })),
                What::Unloaded { policy } => status_event(&policy, &json!({ "status": "unloaded" })),
                What::Failed { policy, why } => {
                    status_event(&policy, &json!({ "status": "unloaded", "failed": true, "error": why }))
                }
                What::Policies { .. } => json!({ "model": "*", "event": "models_reload" }),
                What::Draining { .. } => return,
                What::Listening { .. } | What::Request { .. } | What::Problem { .. } => continue,
            };
            yield Ok(format!("data: {event}\n\n").into());
        }
    })
}

fn status_event(policy: &str, data: &Json) -> Json {
    json!({ "model": policy, "event": "model_status", "data": data })
}

/// What runs, as llama-swap tells it.
pub async fn running(context: &Context) -> Result<Response<Body>, ApiError> {
    let snapshot = context.owner.look().await?;
    let active = snapshot.policies.iter().filter_map(|status| {
        let state = match status.view.state {
            State::Ready => "ready",
            State::Starting => "starting",
            State::Stopping => "stopping",
            State::Stopped | State::Failed { .. } => return None,
        };
        Some(json!({ "model": status.offer.name, "state": state }))
    });
    Ok(body::json(StatusCode::OK, &json!({ "running": active.collect::<Vec<_>>() })))
}

/// Everything about the gateway, for its page, `aitools ps` and scripts. Sizes in bytes, times in milliseconds.
pub async fn status(context: &Context) -> Result<Response<Body>, ApiError> {
    let snapshot = context.owner.look().await?;
    let policies: Vec<Json> = snapshot.policies.iter().map(|status| policy(context, status)).collect();
    let body = json!({
        "version": 1,
        "pid": std::process::id(),
        "uptime_ms": ms(snapshot.uptime),
        "running": snapshot.running,
        "free": snapshot.free,
        "budget": snapshot.budget,
        "policies": policies,
        "errors": snapshot.errors.iter().collect::<Vec<_>>(),
    });
    Ok(body::json(StatusCode::OK, &body))
}

fn policy(context: &Context, status: &Status) -> Json {
    let state = match &status.view.state {
        State::Stopped => "unloaded",
        State::Starting => "loading",
        State::Ready => "loaded",
        State::Stopping => "unloading",
        State::Failed { .. } => "failed",
    };
    let (model, engine) = (status.offer.model.as_ref(), status.engine.as_ref());
    json!({
        "name": status.offer.name,
        "aliases": status.offer.aliases,
        "description": status.offer.policy.metadata.description,
        "engine": status.offer.policy.engine,
        "variant": model.ok().map(|model| model.variant),
        "policy_sha256": status.offer.policy_sha256,
        "fingerprint": model.ok().map(|model| model.fingerprint),
        "weights_sha256": model.ok().map(|model| model.weights_sha256),
        "size_bytes": model.ok().map(|model| model.size_bytes),
        "context": model.ok().and_then(|model| model.context).map(|(context, _)| context),
        "problem": model.err(),
        "state": state,
        "running": status.view.running,
        "waiting": status.view.waiting,
        "slots": status.offer.policy.runtime.parallel.unwrap_or(1),
        "completion_tokens": context.metrics.generated(&status.offer.name).get(),
        "pid": engine.map(|engine| engine.pid),
        "load_ms": engine.map(|engine| ms(engine.load)),
        "idle_ms": (status.view.state == State::Ready).then(|| ms(status.idle)),
        "estimate": model.ok().map(|model| model.need),
        "measured": status.peak,
        "error": status.error,
    })
}

/// Everything for Prometheus: the gateway's own metrics, and those of the engines that are loaded.
pub async fn metrics(context: &Context) -> Result<Response<Body>, ApiError> {
    let snapshot = context.owner.look().await?;
    let loaded = snapshot.policies.iter().filter(|status| status.view.state == State::Ready);
    let scraped = join_all(loaded.map(|status| async move {
        let engine = status.engine.as_ref()?;
        let text = forward::metrics(engine.conversation.openai()?).await?;
        Some((status.offer.name.clone(), text))
    }));
    let engines: Vec<(String, String)> = scraped.await.into_iter().flatten().collect();
    let text = context.metrics.text(&snapshot, &engines);
    Ok(body::typed(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text))
}

/// Properties of a policy's engine: `?model=` says whose, and loads it.
pub async fn props(context: &Context, query: &str, client: &str) -> Result<Response<Body>, ApiError> {
    let asked = url::form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == "model").map(|(_, name)| name);
    let offer = context.owner.find(asked.as_deref())?;
    let lease = tokio::time::timeout(Duration::from_secs(600), context.owner.lease(&offer.name, client, false));
    let lease = lease.await.map_err(|_| ApiError::of_engine(&crate::engine::EngineError::Timeout))??;
    match lease.engine.conversation.openai() {
        Some(api) => forward::get(api, "/props").await,
        None => Err(ApiError::not_offered(offer.policy.engine.as_str(), "/props")),
    }
}
