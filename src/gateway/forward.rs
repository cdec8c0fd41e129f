//! Requests to engines that speak the APIs themselves: the body goes on as it came, but for the model's name and what the policy
//! decides, and the answer comes back as it came.

use std::time::{Duration, Instant};

use async_stream::stream;
use bytes::{Bytes, BytesMut};
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::value::RawValue;
use serde_json::{Value as Json, json};

use super::body::{self, Body, Fields};
use super::call::{Call, SILENCE, error_event, events, ping, refused};
use super::error::{self, ApiError};
use super::measure::Measure;
use super::operation::Operation;
use super::owner::Lease;
use super::responses::Numbering;
use super::tap::{self, Tap};
use crate::engine::client::{HttpError, Response as EngineResponse};
use crate::engine::control_tokens::{CONTEXT, MESSAGES};
use crate::engine::conversation::{self, Api, Sampling};
use crate::format::policy::Policy;

/// Bytes of an answer that is not a stream at most.
const LIMIT_BYTES: usize = 256 << 20;

/// Sends a call to the engine and answers with what it answers.
pub async fn send(
    api: &dyn Api,
    mut call: Call,
    lease: Lease,
    mut measure: Measure,
    deadline: Instant,
) -> Response<Body> {
    let strip_usage = match prepare(api, &mut call, &lease.engine.ready.policy, &mut measure) {
        Ok(strip_usage) => strip_usage,
        Err(error) => return refused(measure, &error),
    };
    // As many as can be of use at a time.
    let kept = lease.engine.ready.policy.runtime.parallel.unwrap_or(1).max(1);
    let response = match request(api, &call, deadline, kept as usize).await {
        Ok(response) => response,
        Err(error) => return refused(measure, &upstream(&error)),
    };
    let status = response.head.status;
    let is_stream = response.head.headers.get(CONTENT_TYPE).is_some_and(is_events);
    measure.answered(status.as_u16());
    if status == StatusCode::OK && is_stream {
        return stream_through(response, call.operation, strip_usage, lease, measure);
    }
    let media_type = response.head.headers.get(CONTENT_TYPE).cloned();
    match whole(response).await {
        Err(error) => refused(measure, &upstream(&error)),
        Ok(body) if status == StatusCode::OK => {
            note(&body, &mut measure);
            measure.complete();
            drop(lease);
            let mut out = Response::new(body::full(body));
            out.headers_mut().insert(CONTENT_TYPE, media_type.unwrap_or(HeaderValue::from_static("application/json")));
            out
        }
        Ok(body) => {
            let error = error::normalized(&body, status);
            measure.error = error["error"]["message"].as_str().map(str::to_owned);
            measure.complete();
            let mut out = body::json(status, &error::worded(error, status, Some(call.operation)));
            if status == StatusCode::NOT_IMPLEMENTED {
                // The engine will not learn it.
                out.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
            }
            out
        }
    }
}

fn is_events(media_type: &HeaderValue) -> bool {
    media_type.as_bytes().starts_with(b"text/event-stream")
}

fn upstream(error: &HttpError) -> ApiError {
    match error {
        HttpError::Timeout => ApiError::of_engine(&crate::engine::EngineError::Timeout),
        other => ApiError::upstream(format!("the engine broke off: {other}")),
    }
}

async fn request(api: &dyn Api, call: &Call, deadline: Instant, kept: usize) -> Result<EngineResponse, HttpError> {
    let body = Full::new(call.fields.to_bytes());
    let request = hyper::Request::post(call.operation.path()).body(body);
    let mut request = request.map_err(|error| HttpError::Malformed(error.to_string()))?;
    let headers = request.headers_mut();
    headers.extend(call.trace.clone());
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    api.client().authorize(&mut request)?;
    api.client().send_kept(request, deadline, kept).await
}

async fn whole(mut response: EngineResponse) -> Result<Bytes, HttpError> {
    let mut all = BytesMut::new();
    while let Some(part) = response.chunk().await? {
        if all.len() + part.len() > LIMIT_BYTES {
            return Err(HttpError::TooLarge(LIMIT_BYTES));
        }
        all.extend_from_slice(&part);
    }
    Ok(all.freeze())
}

/// Notes what a whole answer says about itself.
fn note(body: &[u8], measure: &mut Measure) {
    #[derive(serde::Deserialize)]
    struct Said {
        #[serde(default)]
        usage: Json,
        #[serde(default)]
        timings: Json,
        #[serde(default)]
        choices: Vec<Choice>,
    }
    #[derive(serde::Deserialize)]
    struct Choice {
        finish_reason: Option<String>,
    }
    let Ok(said) = serde_json::from_slice::<Said>(body) else { return };
    tap::count(&mut measure.usage, &json!({ "usage": said.usage, "timings": said.timings }));
    measure.finish = said.choices.into_iter().next().and_then(|choice| choice.finish_reason);
}

/// Passes a stream on, event by event.
fn stream_through(
    mut response: EngineResponse,
    operation: Operation,
    strip_usage: bool,
    lease: Lease,
    mut measure: Measure,
) -> Response<Body> {
    events(stream! {
        let mut tap = Tap::new(strip_usage);
        let mut numbering = (operation == Operation::Responses).then(Numbering::default);
        let broken = loop {
            // Dropping the wait for a piece loses nothing.
            match tokio::time::timeout(SILENCE, response.chunk()).await {
                Err(_) => yield Ok(ping(operation)),
                Ok(Ok(None)) => break None,
                Ok(Err(error)) => break Some(upstream(&error)),
                Ok(Ok(Some(bytes))) => match tap.pass(bytes) {
                    Err(error) => break Some(ApiError::upstream(error.to_string())),
                    Ok(bytes) => {
                        take_over(&tap, &mut measure);
                        if !bytes.is_empty() {
                            yield Ok(numbering.as_mut().map_or(bytes.clone(), |numbering| numbering.complete(&bytes)));
                        }
                    }
                },
            }
        };
        let unfinished = || ApiError::upstream("the engine ended the stream in the middle of an answer");
        match broken.or_else(|| (!tap.seen.complete && tap.seen.error.is_none()).then(unfinished)) {
            Some(error) => {
                measure.fail(&error.message);
                // A part of an event would spoil the one that tells of the error.
                yield Ok(error_event(&error.json(Some(operation)), operation));
            }
            None => {
                measure.complete();
                let rest = tap.rest();
                if !rest.is_empty() {
                    yield Ok(rest);
                }
            }
        }
        drop(lease);
    })
}

fn take_over(tap: &Tap, measure: &mut Measure) {
    let seen = &tap.seen;
    (measure.first, measure.last, measure.pieces, measure.usage) = (seen.first, seen.last, seen.pieces, seen.usage);
    measure.count_tokens();
    if measure.finish.is_none() {
        measure.finish.clone_from(&seen.finish);
    }
    if measure.error.is_none() {
        measure.error.clone_from(&seen.error);
    }
}

/// Puts the policy into a request. Gives whether the answer's usage is only for us.
fn prepare(api: &dyn Api, call: &mut Call, policy: &Policy, measure: &mut Measure) -> Result<bool, ApiError> {
    if call.operation.has_messages() {
        has_template_for(api, call)?;
    }
    call.fields.set("model", &call.offer.name.as_str().into());
    if call.operation.generates() {
        measure.seed = Some(seed(policy, &call.fields)?);
        defaults(api, call, policy, measure.seed.unwrap_or_default());
    }
    system_prompt(call, policy)?;
    if call.operation.has_messages() {
        without_control_tokens(api, &mut call.fields)?;
    }
    if !(call.stream && call.operation.has_chunks()) {
        return Ok(false);
    }
    let mut options: Json = call.fields.get("stream_options")?.unwrap_or_else(|| json!({}));
    let asked = options["include_usage"].as_bool().unwrap_or(false);
    if !options.is_object() {
        return Err(ApiError::param("stream_options", "`stream_options` must be an object"));
    }
    options["include_usage"] = true.into();
    call.fields.set("stream_options", &options);
    Ok(!asked)
}

/// Refuses messages and tools that would not reach the model, or in a form that it does not know.
fn has_template_for(api: &dyn Api, call: &Call) -> Result<(), ApiError> {
    if !api.has_chat_template() {
        let field = if call.fields.has("input") { "input" } else { "messages" };
        let message = "this model has no chat template: use `/v1/completions`, or set `generation.chat_template`";
        return Err(ApiError::param(field, message));
    }
    let written = |key: &str| call.fields.raw(key).map_or("", RawValue::get);
    let none = !call.fields.has("tools") || written("tools") == "[]" || written("tool_choice") == "\"none\"";
    if none || api.has_tools() {
        return Ok(());
    }
    let message = "the chat template of this model has no place for tools: send none, or set \
        `generation.chat_template` to one that has";
    Err(ApiError::unsupported("tools", message.to_owned()))
}

/// The client's seed, else the policy's, else one that is drawn: the request log has it, so that an answer can be repeated.
fn seed(policy: &Policy, fields: &Fields) -> Result<u32, ApiError> {
    if let Some(seed) = fields.get::<i64>("seed")? {
        return Ok(u32::try_from(seed & 0xFFFF_FFFF).unwrap_or(0));
    }
    Ok(conversation::seed(policy)?)
}

/// What the client leaves open is the policy's, or the same default for every engine.
fn defaults(api: &dyn Api, call: &mut Call, policy: &Policy, seed: u32) {
    let own = &policy.generation;
    let Json::Object(sampling) = api.sampling(&Sampling::new(policy, seed)) else { return };
    let known = |key: &str| match call.operation {
        Operation::Responses => matches!(key, "temperature" | "top_p"),
        Operation::Messages => matches!(key, "temperature" | "top_p" | "top_k"),
        _ => true,
    };
    for (key, value) in sampling.iter().filter(|(key, _)| known(key)) {
        call.fields.set_default(key, value);
    }
    let (stop, limit) = match call.operation {
        Operation::Responses => (None, "max_output_tokens"),
        Operation::Messages => (Some("stop_sequences"), "max_tokens"),
        Operation::Infill => (Some("stop"), "n_predict"),
        _ => (Some("stop"), "max_tokens"),
    };
    if let Some(key) = stop.filter(|_| !own.stop.is_empty()) {
        call.fields.set_default(key, &json!(own.stop));
    }
    if let Some(most) = own.max_tokens.filter(|_| !call.fields.has("max_completion_tokens")) {
        call.fields.set_default(limit, &most.into());
    }
}

/// The policy's system prompt goes before a conversation that has none.
fn system_prompt(call: &mut Call, policy: &Policy) -> Result<(), ApiError> {
    let Some(text) = &policy.generation.system_prompt else { return Ok(()) };
    match call.operation {
        Operation::Messages | Operation::MessagesTokens => call.fields.set_default("system", &text.as_str().into()),
        Operation::Responses | Operation::ResponsesTokens => {
            call.fields.set_default("instructions", &text.as_str().into());
        }
        Operation::Chat | Operation::ApplyTemplate => {
            let messages: Option<Vec<Box<RawValue>>> = call.fields.get("messages")?;
            let mut messages = messages.ok_or_else(|| ApiError::param("messages", "`messages` is missing"))?;
            if messages.first().is_some_and(|first| is_system(first)) {
                return Ok(());
            }
            let own = serde_json::value::to_raw_value(&json!({ "role": "system", "content": text }));
            messages.insert(0, own.map_err(|error| ApiError::invalid(error.to_string()))?);
            call.fields.set("messages", &json!(messages));
        }
        _ => {}
    }
    Ok(())
}

/// No message may forge a control token of the model. What has none stays as it was written.
fn without_control_tokens(api: &dyn Api, fields: &mut Fields) -> Result<(), ApiError> {
    let mut sent = serde_json::Map::new();
    for key in MESSAGES.iter().chain(CONTEXT) {
        if let Some(value) = fields.get::<Json>(key)? {
            sent.insert((*key).to_owned(), value);
        }
    }
    let mut clean = Json::Object(sent.clone());
    api.neutralise(&mut clean);
    for (key, value) in &sent {
        if clean[key] != *value {
            fields.set(key, &clean[key]);
        }
    }
    Ok(())
}

fn is_system(message: &RawValue) -> bool {
    #[derive(serde::Deserialize)]
    struct Role {
        role: String,
    }
    serde_json::from_str::<Role>(message.get()).is_ok_and(|message| matches!(&*message.role, "system" | "developer"))
}

/// How long an engine may take to say how it is.
const QUICK: Duration = Duration::from_secs(1);
const METRICS_LIMIT_BYTES: usize = 4 << 20;

/// An engine's own metrics, where it has some.
pub async fn metrics(api: &dyn Api) -> Option<String> {
    let response = api.client().get("/metrics", true, Instant::now() + QUICK).await.ok()?;
    if response.status() != 200 {
        return None;
    }
    response.text(METRICS_LIMIT_BYTES).await.ok()
}

/// The answer of an engine to a GET, such as `/props`.
///
/// # Errors
/// When it gives none.
pub async fn get(api: &dyn Api, path: &str) -> Result<Response<Body>, ApiError> {
    let response = api.client().get(path, true, Instant::now() + QUICK).await.map_err(|error| upstream(&error))?;
    let status = response.head.status;
    let body = whole(response).await.map_err(|error| upstream(&error))?;
    if status != StatusCode::OK {
        return Ok(body::json(status, &error::normalized(&body, status)));
    }
    Ok(body::typed(status, "application/json", body))
}
