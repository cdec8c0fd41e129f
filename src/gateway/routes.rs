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
    if !matches!(path, "/" | "/health" | "/v1/health") {
        context.access.authorize(&head.headers)?;
    }
    let method = method(path).ok_or_else(|| ApiError::no_such_path(path))?;
    if head.method != method && !(method == Method::GET && head.method == Method::HEAD) {
        return Err(ApiError::method(method.as_str()));
    }
    if let Some(operation) = Operation::at(path) {
        let body = body::read(body).await?;
        return model_request(context, head, operation, &body, peer, began).await;
    }
    match path {
        "/" => Ok(page::index()),
        "/health" | "/v1/health" => Ok(control::health()),
        "/models/load" | "/models/unload" => {
            let fields = Fields::parse(&body::read(body).await?)?;
            control::change(context, &fields, path == "/models/load").await
        }
        "/aitools/shutdown" => {
            context.access.require_control(&head.headers)?;
            context.stop.cancel();
            Ok(control::health())
        }
        "/v1/models" | "/models" => control::models(context).await,
        "/models/sse" => Ok(control::watch(context)),
        "/ready" => control::ready(context).await,
        "/running" => control::running(context).await,
        "/aitools/status" => control::status(context).await,
        "/metrics" => control::metrics(context).await,
        "/props" => control::props(context, head.uri.query().unwrap_or_default(), &client(&head.headers, peer)).await,
        _ => control::model(context, path.strip_prefix(MODEL).unwrap_or_default()).await,
    }
}

/// What comes before the name of one model.
const MODEL: &str = "/v1/models/";

/// The method of an address (HEAD goes with GET); None when there is nothing.
fn method(path: &str) -> Option<Method> {
    match path {
        "/models/load" | "/models/unload" | "/aitools/shutdown" => Some(Method::POST),
        "/" | "/health" | "/v1/health" | "/v1/models" | "/models" | "/models/sse" | "/ready" | "/running"
        | "/aitools/status" | "/metrics" | "/props" => Some(Method::GET),
        _ if Operation::at(path).is_some() => Some(Method::POST),
        _ => path.starts_with(MODEL).then_some(Method::GET),
    }
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
