//! Talking to PowerInfer's server (`examples/server/server.cpp`, which is llama.cpp's of November 2023).
//!
//! It does not validate its input: a field of the wrong type ends the process, a missing one means the server's own default, a
//! prompt that is too long is cut in the middle silently, and an answer without a limit fills the context until the server
//! hangs. Therefore every field is checked and sent, every prompt is counted first, and every answer has a limit.
//!
//! | the server | the adapter |
//! |---|---|
//! | has no queue: without a free slot the stream has no event (and a slot becomes free a moment late) | retries |
//! | listens beside another server on its port, which then gets every other connection | checks the model's name in each answer |
//! | stops only when the connection closes, and only while it streams | always streams |
//! | never sends the beginning of a stop text when the answer ends there | looks for stop texts itself |
//! | gives wrong answers to a prompt that it has cached | turns the cache off |
//! | generates at least four tokens, else one more than `n_predict` | requests one less, and counts |
//! | sends a character of several tokens at once, without their number | counts it as one token when it ends an answer |
//! | emits U+FFFD for characters split across BPE tokens | warns in `check` |
//! | loses text after a token that begins a character, when the rest does not follow | cannot detect it |
//! | counts one token less than it generated, and starts its clock for the answer one token late | corrects both |

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_stream::try_stream;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde_json::{Value as Json, json};

use super::chat::{self, Part};
use super::{ID, model};
use crate::base::digest::Digest;
use crate::engine::client::{Client, Response};
use crate::engine::conversation::{
    Conversation, Delta, Event, Events, Finish, Format, Piece, Request, Sampling, Usage,
};
use crate::engine::gguf::Gguf;
use crate::engine::{Endpoint, EngineError};
use crate::format::policy::Policy;

/// Tokens that penalties look back on.
const REPEAT_LAST: u32 = 64;
/// The fewest tokens it generates, unless the text ends before.
const FEWEST: u64 = 4;
const QUICK: Duration = Duration::from_secs(2);
/// Delay before a busy server is tried again: the first one, and the longest.
const PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(320);
const BODY_LIMIT_BYTES: usize = 64 << 20;

/// The model's name on the command line, by which our server is told from another one: it has no keys. (Not the key itself:
/// other users can read arguments.)
pub(super) fn alias(key: &str) -> String {
    format!("aitools-{}", &Digest::of(key.as_bytes()).hex()[..24])
}

/// The sampler, every field of it.
///
/// # Errors
/// When a number is out of range: the server would accept it, and answer nonsense or nothing.
pub(super) fn sampling(own: &Sampling) -> Result<Json, EngineError> {
    let number = |key: &'static str, value: f64, range: std::ops::RangeInclusive<f64>| {
        if range.contains(&value) {
            return Ok(value);
        }
        let why = format!("{value} is not between {} and {}", range.start(), range.end());
        Err(EngineError::Policy { key, why })
    };
    Ok(json!({
        "temperature": number("generation.temperature", own.temperature, 0.0..=10.0)?,
        "top_p": number("generation.top_p", own.top_p, 0.0..=1.0)?,
        "min_p": number("generation.min_p", own.min_p, 0.0..=1.0)?,
        "top_k": own.top_k.min(1_000_000),
        // With 0 it would divide by 0.
        "repeat_penalty": number("generation.repeat_penalty", own.repeat_penalty, 0.01..=10.0)?,
        "presence_penalty": number("generation.presence_penalty", own.presence_penalty, -10.0..=10.0)?,
        "frequency_penalty": number("generation.frequency_penalty", own.frequency_penalty, -10.0..=10.0)?,
        "repeat_last_n": REPEAT_LAST,
        "penalize_nl": false,
        "tfs_z": 1.0,
        "typical_p": 1.0,
        "mirostat": 0,
        "n_keep": 0,
        "n_probs": 0,
        "ignore_eos": false,
        "logit_bias": [],
        "grammar": "",
        // Looked for by the adapter.
        "stop": [],
        "slot_id": -1,
        // Seen to give wrong answers: a prompt that is cached as a whole has its last token twice in the cache.
        "cache_prompt": false,
        "stream": true,
    }))
}

/// A conversation with one server.
#[derive(Debug, Clone)]
pub(super) struct Wire {
    client: Client,
    model: Arc<Gguf>,
    policy: Arc<Policy>,
}

impl Wire {
    pub(super) fn new(endpoint: &Endpoint, model: Arc<Gguf>, policy: &Policy) -> Self {
        Self { client: Client::new(endpoint), model, policy: Arc::new(policy.clone()) }
    }

    fn reader(&self, limit: u64, stops: Vec<String>) -> Reader {
        let endpoint = self.client.endpoint();
        let stops = Stops { stops, held: String::new() };
        let (port, alias) = (endpoint.port, alias(&endpoint.key));
        Reader { port, alias, stops, prompt_tokens: 0, limit, events: 0, ended: false }
    }

    /// Whether the server answers, with our model, and for real: one that answers `/model.json` may still fail at its first
    /// token.
    async fn is_ready(&self, deadline: Instant) -> Result<bool, EngineError> {
        let endpoint = self.client.endpoint();
        let foreign = || EngineError::Foreign(endpoint.port);
        // The server listens only once its model is loaded.
        let settings = match self.client.get("/model.json", false, deadline.min(Instant::now() + QUICK)).await {
            Ok(response) if response.status() == 200 => response.text(BODY_LIMIT_BYTES).await,
            Ok(_) => return Err(foreign()),
            Err(error) => Err(error),
        };
        let settings: Json = match settings {
            Ok(text) => serde_json::from_str(&text).map_err(|_| foreign())?,
            Err(error) if error.is_foreign() => return Err(foreign()),
            // Not there yet, or no longer: whoever started it knows.
            Err(_) => return Ok(false),
        };
        if settings["model"] != alias(&endpoint.key).as_str() {
            return Err(foreign());
        }
        let body = json!({ "prompt": "a", "n_predict": 0, "temperature": 0.0, "stream": true, "stop": [] });
        match self.first_token(body.to_string(), deadline).await {
            Err(EngineError::Timeout | EngineError::Unanswered(_)) => Ok(false),
            other => other,
        }
    }

    /// Whether a whole answer comes to a request.
    async fn first_token(&self, body: String, deadline: Instant) -> Result<bool, EngineError> {
        let mut events = self.complete(body, deadline).await?.events();
        let mut reader = self.reader(FEWEST, Vec::new());
        while let (false, Some(data)) = (reader.ended, events.next().await?) {
            reader.read(&data)?;
        }
        Ok(reader.ended)
    }

    async fn complete(&self, body: String, deadline: Instant) -> Result<Response, EngineError> {
        let response = self.client.post("/completion", body, deadline).await?;
        if response.status() == 200 { Ok(response) } else { Err(refusal(response).await) }
    }

    /// The prompt as token numbers, including the one that begins a text. Special tokens are the adapter's; the server
    /// tokenises texts, and reads no special token in them.
    async fn tokens(&self, request: &Request) -> Result<Vec<u32>, EngineError> {
        let header = self.model.header();
        let mut tokens = Vec::new();
        for part in chat::parts(&self.policy, header, &request.prompt)? {
            match part {
                Part::Token(id) => tokens.push(id),
                Part::Text(text) => tokens.extend(self.tokenize(&text, request.deadline).await?),
            }
        }
        let bos = model::bos(header).filter(|bos| model::adds_bos(header) && tokens.first() != Some(bos));
        if let Some(bos) = bos {
            tokens.insert(0, bos);
        }
        if tokens.is_empty() {
            // The server answers an empty prompt with an empty text.
            return Err(EngineError::Refused("the prompt is empty".to_owned()));
        }
        Ok(tokens)
    }

    async fn tokenize(&self, text: &str, deadline: Instant) -> Result<Vec<u32>, EngineError> {
        #[derive(serde::Deserialize)]
        struct Tokens {
            tokens: Vec<u32>,
        }
        let response = self.client.post("/tokenize", json!({ "content": text }).to_string(), deadline).await?;
        if response.status() != 200 {
            return Err(refusal(response).await);
        }
        let answer = response.text(BODY_LIMIT_BYTES).await?;
        let tokens: Tokens = serde_json::from_str(&answer)
            .map_err(|error| EngineError::Unanswered(format!("`/tokenize` returned no tokens ({error})")))?;
        Ok(tokens.tokens)
    }

    /// The reader of an answer, and the body of its request.
    async fn prepare(&self, request: &Request) -> Result<(Reader, String), EngineError> {
        let unsupported = |what| Err(EngineError::Unsupported { engine: ID, what });
        if !request.tools.is_empty() {
            return unsupported("tools");
        }
        if request.format != Format::Text {
            return unsupported("a response format or grammar");
        }
        let mut body = sampling(&request.sampling)?;
        let tokens = self.tokens(request).await?;
        let context_size = u64::from(model::context_size(&self.policy, self.model.header()));
        let prompt_tokens = tokens.len() as u64;
        let left = context_size.saturating_sub(prompt_tokens);
        if left == 0 {
            return Err(EngineError::TooLong { prompt_tokens, context_size });
        }
        let limit = left.min(request.max_tokens.max(1).into());
        body["n_predict"] = (limit - 1).into();
        body["prompt"] = tokens.into();
        let stops = chat::stops(&request.stop, &self.policy, self.model.header());
        Ok((Reader { prompt_tokens, ..self.reader(limit, stops) }, body.to_string()))
    }
}

impl Conversation for Wire {
    fn ready(&self, deadline: Instant) -> BoxFuture<'_, Result<bool, EngineError>> {
        self.is_ready(deadline).boxed()
    }

    /// Retries until a slot is free: the server says that none is by a stream without any event.
    fn generate(&self, request: Request) -> Events {
        let this = self.clone();
        Box::pin(try_stream! {
            let (mut reader, body) = this.prepare(&request).await?;
            yield Event::Usage(reader.usage(&Json::Null));
            let mut pause = PAUSE;
            loop {
                let mut events = this.complete(body.clone(), request.deadline).await?.events();
                while let (false, Some(data)) = (reader.ended, events.next().await.map_err(EngineError::from)?) {
                    for event in reader.read(&data)? {
                        yield event;
                    }
                }
                if reader.events > 0 || reader.ended {
                    break;
                }
                if Instant::now() + pause >= request.deadline {
                    Err(EngineError::Timeout)?;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        })
    }
}

/// The text of a response that is not 200: plain text there.
async fn refusal(response: Response) -> EngineError {
    let status = response.status();
    let shown = |text: String| text.chars().take(500).collect::<String>();
    match response.refusal().await {
        Err(error) => error.into(),
        Ok(text) => EngineError::Refused(format!("status {status}: {}", shown(text))),
    }
}

/// What the server has sent so far.
#[derive(Debug)]
struct Reader {
    port: u16,
    alias: String,
    stops: Stops,
    prompt_tokens: u64,
    /// Tokens of the answer at most.
    limit: u64,
    /// Events with a token. A character of several tokens is one event, and counts as one token in an answer that we end.
    events: u64,
    ended: bool,
}

impl Reader {
    /// The events that one event of the server means.
    fn read(&mut self, data: &str) -> Result<Vec<Event>, EngineError> {
        let invalid = || {
            let shown: String = data.chars().take(200).collect();
            EngineError::Unanswered(format!("unexpected event: `{shown}`"))
        };
        let event: Json = serde_json::from_str(data).map_err(|_| invalid())?;
        let text = event["content"].as_str().ok_or_else(invalid)?;
        if event["stop"].as_bool().ok_or_else(invalid)? {
            return self.last(&event);
        }
        if self.limit < FEWEST && self.events == self.limit {
            return Ok(self.end(Finish::Length, &Json::Null));
        }
        self.events += 1;
        let (said, stopped) = self.stops.push(text);
        let mut events = Vec::from_iter(self.delta(said));
        if stopped {
            events.extend(self.end(Finish::Stop, &Json::Null));
        } else if self.limit < FEWEST && self.events == self.limit && !text.is_empty() {
            // One without text may be the token that ends an answer: the next event tells.
            events.extend(self.end(Finish::Length, &Json::Null));
        }
        Ok(events)
    }

    /// The server's own last event.
    fn last(&mut self, event: &Json) -> Result<Vec<Event>, EngineError> {
        let unanswered = |why: &str| Err(EngineError::Unanswered(why.to_owned()));
        if event["model"] != self.alias.as_str() {
            return Err(EngineError::Foreign(self.port));
        }
        let finish = match (event["stopped_eos"] == true, event["stopped_limit"] == true) {
            (true, _) => Finish::Stop,
            (_, true) => Finish::Length,
            _ => return unanswered("the engine does not say why the answer ended"),
        };
        if event["truncated"] == true {
            return unanswered("the engine left out a part of the prompt");
        }
        Ok(self.end(finish, event))
    }

    fn delta(&self, text: String) -> Option<Event> {
        let piece = Some(text).filter(|text| !text.is_empty()).map(Piece::Text)?;
        Some(Event::Delta(Delta { piece, tokens: Some(self.events.min(self.limit)) }))
    }

    /// Ends the answer: the text held back for a stop text that did not come, the end, and the numbers.
    fn end(&mut self, finish: Finish, event: &Json) -> Vec<Event> {
        self.ended = true;
        let rest = std::mem::take(&mut self.stops.held);
        let mut events = Vec::from_iter(self.delta(rest));
        events.extend([Event::End(finish), Event::Usage(self.usage(event))]);
        events
    }

    /// What is known of the answer by now, and by the server's last event.
    fn usage(&self, event: &Json) -> Usage {
        let made = event["tokens_predicted"].as_u64().map(|counted| counted + 1);
        let timings = &event["timings"];
        let time = |field: &str| timings[field].as_f64().filter(|ms| *ms >= 0.0);
        // The clock for the prompt runs until the second token: one step of the answer is moved to where it belongs.
        let steps = made.and_then(|made| made.checked_sub(2)).filter(|steps| *steps > 0);
        let step_ms = steps.and_then(|steps| Some(time("predicted_ms")? / steps as f64));
        Usage {
            prompt_tokens: Some(self.prompt_tokens),
            // It may go on to its fourth token within a character.
            completion_tokens: Some(made.unwrap_or(self.events).min(self.limit)),
            cached_tokens: Some(0),
            prompt_ms: step_ms.and_then(|step| Some((time("prompt_ms")? - step).max(0.0))),
            decode_ms: step_ms.and_then(|step| Some(time("predicted_ms")? + step)),
        }
    }
}

/// Looks for stop texts, also ones that come in several pieces.
#[derive(Debug)]
struct Stops {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop text.
    held: String,
}

impl Stops {
    /// The text that is certain to be part of the answer, and whether a stop text followed it.
    fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let begins = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest);
        let cut =
            self.held.char_indices().map(|(at, _)| at).filter(|at| *at >= first).find(|at| begins(&self.held[*at..]));
        let rest = self.held.split_off(cut.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, rest), false)
    }
}
