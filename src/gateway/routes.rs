//! Which address does what. Errors are those of the OpenAI API on every path.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use hyper::body::Incoming;
use hyper::header::{HeaderMap, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};

use super::answer;
use super::body::{self, Body, Fields};
use super::call::Call;
use super::error::ApiError;
use super::operation::Operation;
use super::{Context, control, page};

/// Answers one request.
pub async fn respond(
    context: Arc<Context>,
    request: Request<Incoming>,
    peer: SocketAddr,
    began: Instant,
) -> Response<Body> {
    let (head, body) = request.into_parts();
    let shared = context.access.is_preflight(&head.method, &head.headers).then(preflight);
    let mut response = match shared {
        Some(response) => response,
        None => match route(&context, &head, body, peer, began).await {
            Ok(response) => response,
            Err(error) => body::refusal(&error, Operation::at(head.uri.path())),
        },
    };
    let headers = response.headers_mut();
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    context.access.share(&head.headers, headers);
    response
}

fn preflight() -> Response<Body> {
    let mut response = body::typed(StatusCode::NO_CONTENT, "text/plain", "");
    let headers = response.headers_mut();
    headers.insert("access-control-allow-methods", HeaderValue::from_static("GET, POST"));
    let allowed = "authorization, content-type, x-api-key, anthropic-version, openai-organization, openai-project";
    headers.insert("access-control-allow-headers", HeaderValue::from_static(allowed));
    headers.insert("access-control-max-age", HeaderValue::from_static("600"));
    response
}

async fn route(
    context: &Arc<Context>,
    head: &Parts,
    body: Incoming,
    peer: SocketAddr,
    began: Instant,
) -> Result<Response<Body>, ApiError> {
    context.access.admit(&head.headers)?;
    let path = head.uri.path();
    // What tells nothing needs no key.
    match path {
        "/health" | "/v1/health" => return only(Method::GET, head, || Ok(control::health())),
        "/" => return only(Method::GET, head, || Ok(page::index())),
        _ => {}
    }
    context.access.authorize(&head.headers)?;
    if let Some(operation) = Operation::at(path) {
        only(Method::POST, head, || Ok(()))?;
        let body = body::read(body).await?;
        return model_request(context, head, operation, &body, peer, began).await;
    }
    match path {
        "/models/load" | "/models/unload" => {
            only(Method::POST, head, || Ok(()))?;
            let fields = Fields::parse(&body::read(body).await?)?;
            control::change(context, &fields, path == "/models/load").await
        }
        "/aitools/shutdown" => {
            only(Method::POST, head, || Ok(()))?;
            context.access.require_control(&head.headers)?;
            context.stop.cancel();
            Ok(control::health())
        }
        "/v1/models" | "/models" => {
            only(Method::GET, head, || Ok(()))?;
            control::models(context).await
        }
        "/models/sse" => only(Method::GET, head, || Ok(control::watch(context))),
        "/ready" => {
            only(Method::GET, head, || Ok(()))?;
            control::ready(context).await
        }
        "/running" => {
            only(Method::GET, head, || Ok(()))?;
            control::running(context).await
        }
        "/aitools/status" => {
            only(Method::GET, head, || Ok(()))?;
            control::status(context).await
        }
        "/metrics" => {
            only(Method::GET, head, || Ok(()))?;
            control::metrics(context).await
        }
        "/props" => {
            only(Method::GET, head, || Ok(()))?;
            control::props(context, head.uri.query().unwrap_or_default(), &client(&head.headers, peer)).await
        }
        _ => match path.strip_prefix("/v1/models/") {
            Some(name) => {
                only(Method::GET, head, || Ok(()))?;
                control::model(context, name).await
            }
            None => Err(ApiError::no_such_path(path)),
        },
    }
}

/// Refuses other methods.
fn only<T>(method: Method, head: &Parts, then: impl FnOnce() -> Result<T, ApiError>) -> Result<T, ApiError> {
    let is_head = method == Method::GET && head.method == Method::HEAD;
    if head.method == method || is_head { then() } else { Err(ApiError::method(method.as_str())) }
}

async fn model_request(
    context: &Arc<Context>,
    head: &Parts,
    operation: Operation,
    body: &[u8],
    peer: SocketAddr,
    began: Instant,
) -> Result<Response<Body>, ApiError> {
    let fields = Fields::parse(body)?;
    let stream = fields.get::<bool>("stream")?.unwrap_or(false) && operation.generates();
    let asked: Option<String> = fields.get("model")?;
    let offer = context.owner.find(asked.as_deref())?;
    let mut trace = HeaderMap::new();
    for name in ["traceparent", "tracestate"] {
        if let Some(value) = head.headers.get(name) {
            trace.insert(name, value.clone());
        }
    }
    let client = client(&head.headers, peer);
    let call = Call { offer, operation, fields, stream, client, trace, began };
    Ok(answer::answer(Arc::clone(context), call).await)
}

/// Who takes turns with others: a user that Open WebUI names, else the address.
fn client(headers: &HeaderMap, peer: SocketAddr) -> String {
    let user = headers.get("x-openwebui-user-id").and_then(|user| user.to_str().ok());
    user.map_or_else(|| peer.ip().to_string(), |user| format!("{user:.100}"))
}
