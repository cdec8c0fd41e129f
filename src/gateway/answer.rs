//! One request about a model: waits until it is let through, and answers it by forwarding it or through the engine's adapter.
//!
//! A client that leaves drops the future, or the body, of its response: that takes it out of the queue, or ends the engine's work.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_stream::stream;
use futures_util::StreamExt as _;
use http_body_util::BodyExt as _;
use hyper::header::HeaderValue;
use hyper::{Response, StatusCode};

use super::Context;
use super::body::{Body, Fields};
use super::call::{Call, SILENCE, error_event, events, ping, refused};
use super::error::ApiError;
use super::measure::Measure;
use super::operation::Operation;
use super::{adapter, forward};
use crate::format::policy::{Policy, Tools};

/// How long the status of a stream is held back: an engine that cannot start is told by a true status.
const GRACE: Duration = Duration::from_secs(2);

/// Members of requests that say what is asked, not how it is sampled: clients may send them whatever the policy says.
const ALWAYS: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "input",
    "query",
    "documents",
    "top_n",
    "stream",
    "stream_options",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "text",
    "system",
    "instructions",
    "user",
    "metadata",
    "store",
    "encoding_format",
    "dimensions",
    "content",
    "tokens",
    "add_special",
    "with_pieces",
    "input_prefix",
    "input_suffix",
    "input_extra",
    "suffix",
    "n",
    "chat_template_kwargs",
    "reasoning_effort",
    "reasoning",
    "thinking",
    "continue_final_message",
    "add_generation_prompt",
    "include",
    "previous_response_id",
    "service_tier",
    "truncation",
    "return_progress",
];

/// Members that are about tools.
const TOOLS: &[&str] = &["tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"];

/// The response to a call.
pub async fn answer(context: Arc<Context>, call: Call) -> Response<Body> {
    let measure = Measure::new(&context, &call.offer, call.operation, call.began, call.stream);
    let (stream, operation, request_id) = (call.stream, call.operation, measure.request_id.clone());
    let policy = call.offer.name.clone();
    let work = work(context, call, measure);
    let mut response = if stream { held_back(Box::pin(work), operation).await } else { work.await };
    for (name, value) in [("x-request-id", request_id), ("x-aitools-policy", policy)] {
        if let Ok(value) = HeaderValue::try_from(value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

async fn work(context: Arc<Context>, mut call: Call, mut measure: Measure) -> Response<Body> {
    if call.offer.policy.serve.tools == Some(Tools::Ignore) {
        call.fields.remove(TOOLS);
    }
    if let Err(error) = allowed(&call.offer.policy, call.operation, &call.fields) {
        return refused(measure, &error);
    }
    let lease = match context.owner.lease(&call.offer.name, &call.client, call.operation.takes_slot()).await {
        Ok(lease) => lease,
        Err(error) => return refused(measure, &error),
    };
    measure.sent(&lease);
    let deadline = Instant::now() + call.offer.policy.runtime.time_limit();
    let conversation = Arc::clone(&lease.engine.conversation);
    match conversation.openai() {
        Some(api) => forward::send(api, call, lease, measure, deadline).await,
        None => adapter::send(conversation.as_ref(), call, lease, measure, deadline).await,
    }
}

/// Refuses what the policy does not let clients decide.
fn allowed(policy: &Policy, operation: Operation, fields: &Fields) -> Result<(), ApiError> {
    let Some(open) = policy.serve.overrides.as_ref().filter(|_| operation.generates()) else { return Ok(()) };
    let fixed =
        fields.keys().find(|key| fields.has(key) && !ALWAYS.contains(key) && !open.iter().any(|name| name == key));
    match fixed {
        None => Ok(()),
        Some(key) => Err(ApiError::unsupported(
            key,
            format!("`{key}` is set by the policy: its `serve.override` does not list it"),
        )),
    }
}

/// The response, if it is there soon; else a stream that begins with comments, and then goes on with the response's body.
async fn held_back(
    mut work: Pin<Box<impl Future<Output = Response<Body>> + Send + 'static>>,
    operation: Operation,
) -> Response<Body> {
    if let Ok(response) = tokio::time::timeout(GRACE, &mut work).await {
        return response;
    }
    events(stream! {
        yield Ok(ping(operation));
        let response = loop {
            match tokio::time::timeout(SILENCE, &mut work).await {
                Ok(response) => break response,
                Err(_) => yield Ok(ping(operation)),
            }
        };
        let (head, body) = response.into_parts();
        if head.status == StatusCode::OK {
            let mut pieces = body.into_data_stream();
            while let Some(piece) = pieces.next().await {
                yield piece;
            }
        } else if let Ok(body) = body.collect().await {
            yield Ok(error_event(&serde_json::from_slice(&body.to_bytes()).unwrap_or_default(), operation));
        }
    })
}
