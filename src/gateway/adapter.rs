//! Requests to engines that do not speak the API: read here, put to the engine's own conversation, and answered in the API's
//! words. A field that cannot be honoured is refused by name, never passed over.

use std::time::{Instant, SystemTime};

use async_stream::stream;
use bytes::Bytes;
use futures_util::StreamExt as _;
use hyper::{Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::body::{self, Body, Fields};
use super::call::{Call, SILENCE, error_event, events, ping, refused};
use super::error::ApiError;
use super::measure::Measure;
use super::operation::Operation;
use super::owner::Lease;
use crate::engine::answer::Answer;
use crate::engine::conversation::{
    self, Conversation, Event, Events, Finish, Message, Part, Piece, Prompt, Request, Role, Usage,
};
use crate::format::policy::Policy;

/// Sends a call to the engine and puts its answer into the API's words.
pub async fn send(
    conversation: &dyn Conversation,
    call: Call,
    lease: Lease,
    mut measure: Measure,
    deadline: Instant,
) -> Response<Body> {
    let engine = call.offer.policy.engine.as_str();
    if !call.operation.has_chunks() {
        return refused(measure, &ApiError::not_offered(engine, call.operation.path()));
    }
    let asked = request(&call.fields, call.operation, &lease.engine.ready.policy, engine, deadline);
    let (request, include_usage) = match asked {
        Ok(asked) => asked,
        Err(error) => return refused(measure, &error),
    };
    measure.seed = Some(request.sampling.seed);
    let shape = Shape::new(&call, &lease);
    let events = conversation.generate(request);
    if call.stream {
        return streamed(shape, events, include_usage, lease, measure).await;
    }
    whole(&shape, events, measure).await
}

/// What all objects of one answer have in common.
struct Shape {
    operation: Operation,
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Shape {
    fn new(call: &Call, lease: &Lease) -> Self {
        let prefix = if call.operation == Operation::Chat { "chatcmpl" } else { "cmpl" };
        let mut random = [0; 12];
        // An id that is not unique is better than no answer.
        let _ = getrandom::fill(&mut random);
        Self {
            operation: call.operation,
            id: format!("{prefix}-{}", crate::base::digest::hex(&random)),
            created: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            model: call.offer.name.clone(),
            fingerprint: lease.engine.ready.fingerprint.short(),
        }
    }

    /// An object with these choices. `kind`: of chat answers.
    fn object(&self, kind: &str, choices: &Json) -> Json {
        let kind = if self.operation == Operation::Chat { kind } else { "text_completion" };
        json!({
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        })
    }

    fn chunk(&self, piece: Option<&Piece>, finish: Option<Finish>) -> Json {
        let finish = finish.map(word);
        let choice = match (self.operation, piece) {
            (Operation::Chat, piece) => {
                let delta = match piece {
                    Some(Piece::Text(text)) => json!({ "content": text }),
                    Some(Piece::Reasoning(text)) => json!({ "reasoning_content": text }),
                    Some(Piece::ToolCall(call)) => {
                        let function = json!({ "name": call.name, "arguments": call.arguments });
                        let call =
                            json!({ "index": call.index, "id": call.id, "type": "function", "function": function });
                        json!({ "tool_calls": [call] })
                    }
                    None => json!({}),
                };
                json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish })
            }
            (_, piece) => {
                let text = match piece {
                    Some(Piece::Text(text) | Piece::Reasoning(text)) => text.as_str(),
                    _ => "",
                };
                json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": finish })
            }
        };
        self.object("chat.completion.chunk", &json!([choice]))
    }
}

fn word(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop | Finish::Cancelled => "stop",
        Finish::Length => "length",
        Finish::ToolCalls => "tool_calls",
    }
}

fn usage(prompt: u64, completion: u64, cached: Option<u64>) -> Json {
    let mut usage =
        json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion });
    if let Some(cached) = cached {
        usage["prompt_tokens_details"] = json!({ "cached_tokens": cached });
    }
    usage
}

async fn whole(shape: &Shape, mut events: Events, mut measure: Measure) -> Response<Body> {
    let mut answer = Answer::new();
    while let Some(event) = events.next().await {
        let pushed = event.and_then(|event| {
            note(&event, &mut measure);
            answer.push(&event)
        });
        if let Err(error) = pushed {
            return refused(measure, &ApiError::of_engine(&error));
        }
    }
    let answer = match answer.into_generated() {
        Ok(answer) => answer,
        Err(error) => return refused(measure, &ApiError::of_engine(&error)),
    };
    let choice = if shape.operation == Operation::Chat {
        let mut message = json!({ "role": "assistant", "content": answer.text, "refusal": null });
        if !answer.reasoning.is_empty() {
            message["reasoning_content"] = answer.reasoning.as_str().into();
        }
        json!({ "index": 0, "message": message, "logprobs": null, "finish_reason": word(answer.finish) })
    } else {
        json!({ "index": 0, "text": answer.text, "logprobs": null, "finish_reason": word(answer.finish) })
    };
    let mut object = shape.object("chat.completion", &json!([choice]));
    object["usage"] = usage(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens);
    measure.usage.completion_tokens = Some(answer.completion_tokens);
    measure.answered(200);
    measure.complete();
    body::json(StatusCode::OK, &object)
}

/// Notes an event in the measurements.
fn note(event: &Event, measure: &mut Measure) {
    let now = Instant::now();
    match event {
        Event::Delta(delta) => {
            measure.first.get_or_insert(now);
            measure.last = Some(now);
            measure.pieces = delta.tokens.unwrap_or(measure.pieces + 1);
            measure.count_tokens();
        }
        Event::Usage(usage) => measure.usage = *usage,
        Event::End(finish) => measure.finish = Some(word(*finish).to_owned()),
    }
}

/// Streams an answer. The first event is waited for, so that an engine that refuses is told by a true status.
async fn streamed(
    shape: Shape,
    mut source: Events,
    include_usage: bool,
    lease: Lease,
    mut measure: Measure,
) -> Response<Body> {
    let first = match source.next().await {
        Some(Ok(event)) => event,
        Some(Err(error)) => return refused(measure, &ApiError::of_engine(&error)),
        None => return refused(measure, &ApiError::upstream("the engine gave no answer")),
    };
    measure.answered(200);
    events(stream! {
        if shape.operation == Operation::Chat {
            let mut role = shape.chunk(None, None);
            role["choices"][0]["delta"] = json!({ "role": "assistant", "content": "" });
            yield Ok(event(&role));
        }
        let (mut ended, mut used) = (false, Usage::default());
        let mut next = Some(Ok(first));
        let failed = loop {
            match next.take() {
                Some(Ok(happened)) => {
                    note(&happened, &mut measure);
                    match &happened {
                        Event::Delta(delta) => yield Ok(event(&shape.chunk(Some(&delta.piece), None))),
                        Event::Usage(usage) => used = *usage,
                        Event::End(finish) => {
                            ended = true;
                            yield Ok(event(&shape.chunk(None, Some(*finish))));
                        }
                    }
                }
                Some(Err(error)) => break Some(ApiError::of_engine(&error)),
                None => {}
            }
            next = match tokio::time::timeout(SILENCE, source.next()).await {
                Ok(Some(event)) => Some(event),
                Ok(None) => break (!ended).then(|| ApiError::upstream("the engine ended in the middle of an answer")),
                Err(_) => {
                    yield Ok(ping(shape.operation));
                    None
                }
            };
        };
        if let Some(error) = failed {
            measure.fail(&error.message);
            yield Ok(error_event(&error.json(Some(shape.operation)), shape.operation));
            return;
        }
        measure.usage.completion_tokens = used.completion_tokens.or(Some(measure.pieces));
        if include_usage {
            let mut last = shape.object("chat.completion.chunk", &json!([]));
            let completion = measure.usage.completion_tokens.unwrap_or(0);
            last["usage"] = usage(used.prompt_tokens.unwrap_or(0), completion, used.cached_tokens);
            yield Ok(event(&last));
        }
        yield Ok(Bytes::from_static(b"data: [DONE]\n\n"));
        measure.complete();
        drop(lease);
    })
}

fn event(json: &Json) -> Bytes {
    format!("data: {json}\n\n").into()
}

/// Fields that change the answer and that engines with an adapter do not have; what they may be all the same.
const UNSUPPORTED: &[(&str, &[&str])] = &[
    ("tools", &["[]"]),
    ("functions", &["[]"]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("logprobs", &["false", "0"]),
    ("top_logprobs", &["0"]),
    ("logit_bias", &["{}"]),
    ("n", &["1"]),
    ("best_of", &["1"]),
    ("echo", &["false"]),
    ("suffix", &["\"\""]),
    ("response_format", &[r#"{"type":"text"}"#]),
    ("grammar", &["\"\""]),
    ("audio", &[]),
    ("prediction", &[]),
];

/// The request as the engine's conversation takes it, and whether the client wants to know the usage of a stream.
fn request(
    fields: &Fields,
    operation: Operation,
    policy: &Policy,
    engine: &str,
    deadline: Instant,
) -> Result<(Request, bool), ApiError> {
    for (key, harmless) in UNSUPPORTED {
        let Some(raw) = fields.raw(key) else { continue };
        let written: String = raw.get().chars().filter(|c| !c.is_whitespace()).collect();
        if !harmless.contains(&written.as_str()) {
            return Err(ApiError::unsupported(key, format!("engine `{engine}` does not support `{key}`")));
        }
    }
    let seed = match fields.get::<u32>("seed")? {
        Some(seed) => seed,
        None => conversation::seed(policy)?,
    };
    let mut request = Request::new(policy, "", seed, deadline);
    request.prompt = match operation {
        Operation::Chat => Prompt::Messages(messages(fields, policy)?),
        _ => Prompt::Text(prompt(fields)?),
    };
    let sampling = &mut request.sampling;
    set(fields, "temperature", &mut sampling.temperature)?;
    set(fields, "top_k", &mut sampling.top_k)?;
    set(fields, "top_p", &mut sampling.top_p)?;
    set(fields, "min_p", &mut sampling.min_p)?;
    set(fields, "repeat_penalty", &mut sampling.repeat_penalty)?;
    set(fields, "presence_penalty", &mut sampling.presence_penalty)?;
    set(fields, "frequency_penalty", &mut sampling.frequency_penalty)?;
    set(fields, "max_tokens", &mut request.max_tokens)?;
    set(fields, "max_completion_tokens", &mut request.max_tokens)?;
    if request.max_tokens == 0 {
        return Err(ApiError::param("max_tokens", "`max_tokens` must be at least 1"));
    }
    if let Some(stop) = fields.get::<OneOrMany>("stop")? {
        request.stop = stop.into_vec();
    }
    #[derive(Deserialize)]
    struct Options {
        #[serde(default)]
        include_usage: bool,
    }
    let options: Option<Options> = fields.get("stream_options")?;
    Ok((request, options.is_some_and(|options| options.include_usage)))
}

fn set<'a, T: Deserialize<'a>>(fields: &'a Fields, key: &str, value: &mut T) -> Result<(), ApiError> {
    if let Some(new) = fields.get(key)? {
        *value = new;
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

fn prompt(fields: &Fields) -> Result<String, ApiError> {
    let prompts = fields.get::<OneOrMany>("prompt")?.map(OneOrMany::into_vec).unwrap_or_default();
    match <[String; 1]>::try_from(prompts) {
        Ok([text]) => Ok(text),
        Err(_) => Err(ApiError::param("prompt", "`prompt` must be one text")),
    }
}

#[derive(Deserialize)]
struct SentMessage {
    role: String,
    content: Option<Content>,
    #[serde(default)]
    tool_calls: Vec<Json>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<SentPart>),
}

#[derive(Deserialize)]
struct SentPart {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

fn messages(fields: &Fields, policy: &Policy) -> Result<Vec<Message>, ApiError> {
    let sent: Vec<SentMessage> =
        fields.get("messages")?.ok_or_else(|| ApiError::param("messages", "`messages` is missing"))?;
    if sent.is_empty() {
        return Err(ApiError::param("messages", "`messages` is empty"));
    }
    let mut messages = sent.into_iter().map(message).collect::<Result<Vec<_>, _>>()?;
    let has_system = messages.first().is_some_and(|first| first.role == Role::System);
    if let Some(text) = policy.generation.system_prompt.as_ref().filter(|_| !has_system) {
        messages.insert(0, Message::new(Role::System, text));
    }
    Ok(messages)
}

fn message(sent: SentMessage) -> Result<Message, ApiError> {
    let refuse = |why: String| Err(ApiError::unsupported("messages", why));
    let role = match sent.role.as_str() {
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" if sent.tool_calls.is_empty() => Role::Assistant,
        "assistant" | "tool" | "function" => return refuse("this engine does not support tools".to_owned()),
        other => return refuse(format!("`messages`: there is no role `{other:.50}`")),
    };
    let text = match sent.content {
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => {
            let mut texts = Vec::new();
            for part in parts {
                match (part.kind.as_str(), part.text) {
                    ("text", Some(text)) => texts.push(text),
                    (kind, _) => return refuse(format!("this engine does not take parts of type `{kind:.50}`")),
                }
            }
            texts.join("\n")
        }
    };
    Ok(Message { role, content: vec![Part::Text(text)], tool_calls: Vec::new(), tool_call_id: None })
}
