//! Errors as clients of the OpenAI API expect them, on every path: `{"error": {"message", "type", "param", "code"}}`
//! (<https://platform.openai.com/docs/guides/error-codes>). `x-should-retry` is what OpenAI's own clients obey.

use std::time::Duration;

use hyper::StatusCode;
use serde_json::{Value as Json, json};

use super::operation::Operation;
use super::scheduler::{Memory, Refusal};
use crate::engine::EngineError;

/// Why a request gets no answer.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    /// The class of the error: `invalid_request_error`, `server_error`, `rate_limit_error`.
    pub kind: &'static str,
    /// Which error it is, for programs: `model_not_found`.
    pub code: Option<&'static str>,
    /// The field of the request that is wrong.
    pub param: Option<String>,
    pub message: String,
    /// Whether trying again can help; None leaves it to the client.
    pub retry: Option<Retry>,
}

/// Whether trying a request again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    Never,
    After(Duration),
}

impl From<getrandom::Error> for ApiError {
    fn from(error: getrandom::Error) -> Self {
        let message = format!("the system gives no random numbers: {error}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, kind, code, param: None, message: message.into(), retry: None }
    }

    /// A request that is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// A field of a request that is wrong.
    pub fn param(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::invalid(message) }
    }

    /// A field that this engine cannot honour.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::param(param, message) }
    }

    /// There is nothing at this address.
    pub fn no_such_path(path: &str) -> Self {
        let message = format!("there is nothing at `{path:.200}`: the API is below `/v1`");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), message)
    }

    /// The address takes other methods.
    pub fn method(allowed: &str) -> Self {
        let message = format!("this address takes {allowed}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", Some("method_not_allowed"), message)
    }

    /// No policy has that name.
    pub fn no_such_model(name: &str, known: &[&str]) -> Self {
        let message = if known.is_empty() {
            format!("the model `{name:.200}` does not exist: no policy is served")
        } else {
            format!("the model `{name:.200}` does not exist: the models are {}", known.join(", "))
        };
        let code = Some("model_not_found");
        Self {
            param: Some("model".to_owned()),
            ..Self::new(StatusCode::NOT_FOUND, "invalid_request_error", code, message)
        }
    }

    /// No key, or a wrong one.
    pub fn unauthorized() -> Self {
        let message = "this server needs a valid API key: send `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", Some("invalid_api_key"), message)
    }

    /// A page of another site, or a name that this server does not have.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", Some("forbidden"), message)
    }

    /// A body that is larger than `limit_bytes`.
    pub fn too_large(limit_bytes: usize) -> Self {
        let message = format!("the body of the request is larger than {limit_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("request_too_large"), message)
    }

    /// A client that sends its request too slowly.
    pub fn too_slow() -> Self {
        let message = "the request did not arrive in time";
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Some("request_timeout"), message)
    }

    /// What this engine has no endpoint for.
    pub fn not_offered(engine: &str, path: &str) -> Self {
        let message = format!("engine `{engine}` does not offer `{path}`");
        let code = Some("unsupported_endpoint");
        Self {
            retry: Some(Retry::Never),
            ..Self::new(StatusCode::NOT_IMPLEMENTED, "invalid_request_error", code, message)
        }
    }

    /// The engine broke off.
    pub fn upstream(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "server_error", Some("upstream_disconnected"), message)
    }

    fn unavailable(code: &'static str, message: String, retry: Retry) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some(code), message);
        Self { retry: Some(retry), ..error }
    }

    /// Why the scheduler refuses a request for a policy.
    pub fn refused(policy: &str, refusal: &Refusal) -> Self {
        match refusal {
            Refusal::Unknown(name) => Self::no_such_model(name, &[]),
            Refusal::QueueFull { waiting } => {
                let message = format!("{waiting} requests already wait for `{policy}`");
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message);
                Self { retry: Some(Retry::After(Duration::from_secs(1))), ..error }
            }
            Refusal::Failed { why, retry } => {
                let message = format!("the engine of `{policy}` does not work: {why}");
                Self::unavailable("engine_failed", message, retry.map_or(Retry::Never, Retry::After))
            }
            Refusal::TooLarge { need, room } => {
                let message = format!("`{policy}` needs {}, and engines may hold {}", words(*need), words(*room));
                Self::unavailable("insufficient_memory", message, Retry::Never)
            }
            Refusal::NoMemory { need, free } => {
                let message = format!("`{policy}` needs {}, and {} are free", words(*need), words(*free));
                Self::unavailable("insufficient_memory", message, Retry::Never)
            }
            Refusal::Draining => {
                let message = "the server is shutting down".to_owned();
                Self::unavailable("shutting_down", message, Retry::After(Duration::from_secs(5)))
            }
        }
    }

    /// What went wrong while an engine worked on a request.
    pub fn of_engine(error: &EngineError) -> Self {
        match error {
            EngineError::TooLong { .. } => {
                Self { code: Some("context_length_exceeded"), ..Self::param("messages", error.to_string()) }
            }
            EngineError::Policy { key, why } => Self::param(key, why.clone()),
            EngineError::Refused(why) => Self::invalid(why.clone()),
            EngineError::Unsupported { engine, what } => {
                Self::unsupported(what, format!("engine `{engine}` does not support {what}"))
            }
            EngineError::Timeout => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "server_error",
                Some("timeout"),
                "the engine gave no answer in time",
            ),
            EngineError::NoVariant { .. }
            | EngineError::Underivable { .. }
            | EngineError::Unanswered(_)
            | EngineError::Foreign(_) => Self::upstream(error.to_string()),
        }
    }

    /// The body, in the words of the API that was asked.
    pub fn json(&self, operation: Option<Operation>) -> Json {
        let code = self.code.map_or(Json::Null, Json::from);
        let body =
            json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": code } });
        worded(body, self.status, operation)
    }
}

/// An error's body in the words of the API that was asked: Anthropic's has a member `type` and names for types of its own
/// (<https://docs.anthropic.com/en/api/errors>).
pub fn worded(mut body: Json, status: StatusCode, operation: Option<Operation>) -> Json {
    if operation.is_some_and(Operation::is_anthropic) {
        body["type"] = "error".into();
        body["error"]["type"] = match status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        }
        .into();
    }
    body
}

/// An error object of an engine, as OpenAI has it: llama.cpp gives the status as the code, and no `param`.
pub fn normalized(body: &[u8], status: StatusCode) -> Json {
    let parsed: Option<Json> = serde_json::from_slice(body).ok();
    let Some(Json::Object(mut error)) = parsed.and_then(|mut body| body.get_mut("error").map(Json::take)) else {
        let text: String = String::from_utf8_lossy(body).chars().take(500).collect();
        return ApiError { status, ..ApiError::upstream(format!("the engine answered {status}: {text}")) }.json(None);
    };
    let is_ours = error.get("code").is_some_and(Json::is_string);
    if !is_ours {
        let too_long = error.get("type").is_some_and(|kind| kind == "exceed_context_size_error");
        let code = if too_long { "context_length_exceeded".into() } else { Json::Null };
        error.insert("code".to_owned(), code);
    }
    let field = error.get("message").and_then(Json::as_str).and_then(field_of);
    error.entry("param").or_insert(field.map_or(Json::Null, Json::from));
    error.entry("type").or_insert("server_error".into());
    json!({ "error": error })
}

/// The field that a message of llama-server is about: `Field 'temperature': type must be number, but is string`.
fn field_of(message: &str) -> Option<String> {
    let (field, _) = message.strip_prefix("Field '")?.split_once("':")?;
    Some(field.to_owned())
}

/// `3.2 GiB of memory and 4.0 GiB of GPU memory`
fn words(memory: Memory) -> String {
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    match memory {
        Memory { ram_bytes, gpu_bytes: 0 } => format!("{} of memory", gib(ram_bytes)),
        Memory { ram_bytes: 0, gpu_bytes } => format!("{} of GPU memory", gib(gpu_bytes)),
        Memory { ram_bytes, gpu_bytes } => {
            format!("{} of memory and {} of GPU memory", gib(ram_bytes), gib(gpu_bytes))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_engines_become_those_of_the_api() {
        let long = br#"{"error":{"code":400,"message":"m","type":"exceed_context_size_error","n_ctx":8}}"#;
        let error = &normalized(long, StatusCode::BAD_REQUEST)["error"];
        assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &Json::Null));
        assert_eq!((&error["n_ctx"], &error["message"]), (&json!(8), &json!("m")));
        let typed =
            br#"{"error":{"code":400,"message":"Field 'top_p': type must be number","type":"invalid_request_error"}}"#;
        assert_eq!(normalized(typed, StatusCode::BAD_REQUEST)["error"]["param"], json!("top_p"));
        let page = &normalized(b"<html>", StatusCode::BAD_GATEWAY)["error"];
        assert_eq!(page["code"], json!("upstream_disconnected"));
        assert!(page["message"].as_str().unwrap().contains("<html>"));
    }

    #[test]
    fn errors_of_anthropics_api_have_its_words() {
        let error = ApiError::no_such_model("m", &[]);
        let body = error.json(Some(Operation::Messages));
        assert_eq!((&body["type"], &body["error"]["type"]), (&json!("error"), &json!("not_found_error")));
        assert_eq!(body["error"]["message"], json!(error.message));
        let body = error.json(Some(Operation::Chat));
        assert_eq!((&body["type"], &body["error"]["type"]), (&Json::Null, &json!("invalid_request_error")));
    }

    #[test]
    fn refusals_say_whether_to_try_again() {
        let failed = |retry| ApiError::refused("p", &Refusal::Failed { why: "w".to_owned(), retry });
        assert_eq!(failed(None).retry, Some(Retry::Never));
        assert_eq!(failed(Some(Duration::from_secs(2))).retry, Some(Retry::After(Duration::from_secs(2))));
        let need = Memory { ram_bytes: 3 << 30, gpu_bytes: 1 << 30 };
        let refused = ApiError::refused("p", &Refusal::NoMemory { need, free: Memory::default() });
        assert!(refused.message.contains("3.0 GiB of memory and 1.0 GiB of GPU memory"), "{}", refused.message);
    }
}
