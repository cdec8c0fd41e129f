//! Requests to a running engine and the events of its answers: the one interface for `run` and for a gateway.
//!
//! Every engine's protocol is an implementation of [`Conversation`]. A request is a value of its own that owns everything it
//! needs, so several may be under way at a time. Dropping the stream of its events cancels one request and no other.

use std::time::Instant;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde::Serialize;
use serde_json::Value as Json;

use super::EngineError;
use super::client::Client;
use crate::format::policy::Policy;

/// What a policy leaves open is the same for every engine, and sent with every request: a new version of an engine cannot
/// change it. llama.cpp's defaults, but for the number of tokens, which has no limit there.
mod default {
    pub const MAX_TOKENS: u32 = 512;
    pub const TEMPERATURE: f64 = 0.8;
    pub const TOP_K: u32 = 40;
    pub const TOP_P: f64 = 0.95;
    pub const MIN_P: f64 = 0.05;
    pub const REPEAT_PENALTY: f64 = 1.0;
    pub const PRESENCE_PENALTY: f64 = 0.0;
    pub const FREQUENCY_PENALTY: f64 = 0.0;
}

/// The events of one answer: [`Event::Delta`]s, one [`Event::End`], and [`Event::Usage`] whenever more is known. An error, or the
/// end of the stream without [`Event::End`], means that the answer is incomplete.
pub type Events = BoxStream<'static, Result<Event, EngineError>>;

/// How a running engine is talked to: its protocol, bound to one endpoint, model and policy.
pub trait Conversation: std::fmt::Debug + Send + Sync {
    /// Whether the engine answers requests for its model yet. Called every few milliseconds until it does.
    ///
    /// # Errors
    /// [`EngineError::Foreign`] when another program listens on the port; other errors when the engine will never be ready.
    fn ready(&self, deadline: Instant) -> BoxFuture<'_, Result<bool, EngineError>>;

    /// Sends a request once the stream is polled. Dropping the stream closes the connection, which stops the engine's work.
    fn generate(&self, request: Request) -> Events;

    /// The engine's API, where it speaks OpenAI's itself, so that whole request bodies can be forwarded. None for an engine that
    /// needs its adapter.
    fn openai(&self) -> Option<&dyn Api> {
        None
    }

    /// Changes the body of a request that is to be forwarded to [`Conversation::openai`], so that no text in its messages is
    /// read as a control token of the model. [`Conversation::generate`] does that itself.
    fn neutralise(&self, _body: &mut Json) {}
}

/// An engine that speaks the OpenAI API itself, as a gateway needs it.
pub trait Api: Conversation {
    /// Sends requests to the engine.
    fn client(&self) -> &Client;

    /// Whether messages can be sent: the model has a chat template.
    fn has_chat_template(&self) -> bool;

    /// Whether the chat template has a place for tools.
    fn has_tools(&self) -> bool;

    /// The fields of a request that say how tokens are chosen.
    fn sampling(&self, sampling: &Sampling) -> Json;
}

/// One request for an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What to answer or continue.
    pub prompt: Prompt,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens of the answer at most.
    pub max_tokens: u32,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Functions that the model may call.
    pub tools: Vec<Tool>,
    /// The form that the answer must have.
    pub format: Format,
    /// When the request fails with [`EngineError::Timeout`].
    pub deadline: Instant,
}

impl Request {
    /// A request under a policy, with its system prompt before `prompt`.
    pub fn new(policy: &Policy, prompt: &str, seed: u32, deadline: Instant) -> Self {
        let own = &policy.generation;
        let system = own.system_prompt.as_ref().map(|text| Message::new(Role::System, text));
        Self {
            prompt: Prompt::Messages(system.into_iter().chain([Message::new(Role::User, prompt)]).collect()),
            sampling: Sampling::new(policy, seed),
            max_tokens: own.max_tokens.unwrap_or(default::MAX_TOKENS),
            stop: own.stop.clone(),
            tools: Vec::new(),
            format: Format::Text,
            deadline,
        }
    }
}

/// What the model is to continue or to answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Rendered by the model's chat template. A model without one takes a single user message as plain text.
    Messages(Vec<Message>),
    /// Sent as it is, without a chat template.
    Text(String),
}

impl Prompt {
    /// The text of a prompt that needs no chat template: plain text, or one user message of text.
    ///
    /// # Errors
    /// [`EngineError::Policy`] for anything else.
    pub fn without_template(&self) -> Result<&str, EngineError> {
        let why = match self {
            Self::Text(text) => return Ok(text),
            Self::Messages(messages) => match messages.as_slice() {
                [Message { role: Role::User, content, .. }] => match content.as_slice() {
                    [Part::Text(text)] => return Ok(text),
                    _ => "a model without a chat template takes plain text only",
                },
                [Message { role: Role::System, .. }, ..] => {
                    let why = "without a chat template there is no place for a system message".to_owned();
                    return Err(EngineError::Policy { key: "generation.system_prompt", why });
                }
                _ => "a model without a chat template takes a single user message",
            },
        };
        Err(EngineError::Policy { key: "generation.chat_template", why: why.to_owned() })
    }
}

/// Who a message is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions of the application.
    System,
    /// A person who talks to the model.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The name in chat templates and in the OpenAI API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who it is from.
    pub role: Role,
    /// Its parts, in order.
    pub content: Vec<Part>,
    /// The calls that an assistant's message made.
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool's message is the result of.
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A message of one text.
    pub fn new(role: Role, text: &str) -> Self {
        Self { role, content: vec![Part::Text(text.to_owned())], tool_calls: Vec::new(), tool_call_id: None }
    }
}

/// A part of a message's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Plain text.
    Text(String),
    /// An image file's bytes, such as a PNG, with their media type.
    Image {
        /// For example `image/png`.
        media_type: String,
        /// The file.
        bytes: Vec<u8>,
    },
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// The name by which the model calls it.
    pub name: String,
    /// When to call it and what it does, for the model.
    pub description: String,
    /// JSON Schema of the arguments.
    pub parameters: Json,
}

/// A call of a tool by the model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ToolCall {
    /// Identifies the call in the message with its result.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// JSON, as the model wrote it: possibly invalid.
    pub arguments: String,
}

/// The form that an answer must have.
#[derive(Debug, Clone, PartialEq)]
pub enum Format {
    /// Plain text without constraints.
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON that this schema accepts.
    JsonSchema(Json),
    /// llama.cpp's grammar format, GBNF.
    Grammar(String),
}

/// How tokens are chosen; every value is set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 is greedy decoding.
    pub temperature: f64,
    /// Only the most likely tokens are considered, this many; 0 = no limit.
    pub top_k: u32,
    /// Only the most likely tokens with this total probability are considered; 1 = no limit.
    pub top_p: f64,
    /// Only tokens are considered that are at least this likely relative to the most likely one; 0 = no limit.
    pub min_p: f64,
    /// 1 is no penalty.
    pub repeat_penalty: f64,
    /// Penalty for tokens that occurred; 0 is none.
    pub presence_penalty: f64,
    /// Penalty for tokens by how often they occurred; 0 is none.
    pub frequency_penalty: f64,
    /// The seed of the random choice.
    pub seed: u32,
}

/// A policy's seed, or one that is drawn: 31 bits, since the largest numbers mean "draw one" to some engines.
///
/// # Errors
/// When the system gives no random numbers.
pub fn seed(policy: &Policy) -> Result<u32, getrandom::Error> {
    policy.generation.seed.map_or_else(|| getrandom::u32().map(|seed| seed >> 1), Ok)
}

impl Sampling {
    /// A policy's values, and defaults for what it leaves open. The seed is the caller's: drawn ones are recorded.
    pub fn new(policy: &Policy, seed: u32) -> Self {
        let own = &policy.generation;
        Self {
            temperature: own.temperature.unwrap_or(default::TEMPERATURE),
            top_k: own.top_k.unwrap_or(default::TOP_K),
            top_p: own.top_p.unwrap_or(default::TOP_P),
            min_p: own.min_p.unwrap_or(default::MIN_P),
            repeat_penalty: own.repeat_penalty.unwrap_or(default::REPEAT_PENALTY),
            presence_penalty: own.presence_penalty.unwrap_or(default::PRESENCE_PENALTY),
            frequency_penalty: own.frequency_penalty.unwrap_or(default::FREQUENCY_PENALTY),
            seed,
        }
    }
}

/// One event of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The next piece of the answer.
    Delta(Delta),
    /// What is known by now; each one replaces the one before.
    Usage(Usage),
    /// No more text follows.
    End(Finish),
}

/// The next piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    /// The piece.
    pub piece: Piece,
    /// Tokens generated so far, this piece included, where the engine tells.
    pub tokens: Option<u64>,
}

/// A piece of an answer. Text is never cut inside a character.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// The answer itself.
    Text(String),
    /// What a reasoning model writes before its answer.
    Reasoning(String),
    /// A part of a tool call.
    ToolCall(ToolCallDelta),
}

/// A piece of a tool call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToolCallDelta {
    /// Which of the answer's calls it belongs to, from 0.
    pub index: usize,
    /// In the first piece of a call.
    pub id: Option<String>,
    /// In the first piece of a call.
    pub name: Option<String>,
    /// The next part of the arguments.
    pub arguments: String,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The end-of-text token, or a stop text.
    Stop,
    /// `max_tokens` or the context size was reached.
    Length,
    /// The model called tools and waits for their results.
    ToolCalls,
    /// The user stopped it.
    Cancelled,
}

/// An engine's own numbers about one answer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer.
    pub completion_tokens: Option<u64>,
    /// Prompt tokens that were taken from a cache.
    pub cached_tokens: Option<u64>,
    /// Milliseconds spent on the prompt.
    pub prompt_ms: Option<f64>,
    /// Milliseconds spent on the answer.
    pub decode_ms: Option<f64>,
}
