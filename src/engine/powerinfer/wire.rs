//! Talking to PowerInfer's server (`examples/server/server.cpp`, which is llama.cpp's of November 2023).
//!
//! It trusts its clients: a field of the wrong type ends the process, a missing one means a default nobody asked for, a
//! prompt that is too long is cut in the middle without a word, and an answer without a limit fills the context until the
//! server hangs. So every field is checked and sent, every prompt is counted first, and every answer is bounded.
//!
//! | it | so we |
//! |---|---|
//! | has no queue: without a free slot the stream has no event (and a slot is free a moment late) | ask again |
//! | listens beside another server on its port, which gets every other connection then | look whose each answer was |
//! | stops only for connections that close, and only while it streams | always stream |
//! | withholds the beginning of a stop text for good when the answer ends there | look for stop texts ourselves |
//! | gives wrong answers to a prompt that it remembers | never let it |
//! | makes four tokens at least, else one more than `n_predict` | ask for one less, and count |
//! | sends a character of several tokens at once, without their number | count it as one where we end an answer |
//! | breaks characters of which BPE tokens have two or three bytes, and no field of an event has these | warn in `check` |
//! | loses text after a token that begins a character, when the rest does not come | get less, and cannot tell |
//! | counts one token less than it made, and starts its clock for the answer one token late | put both right |

use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use super::chat::{self, Part};
use super::{launch, model};
use crate::engine::answer::{Answer, Sink};
use crate::engine::http::{self, HttpError, Patience, Request, Response};
use crate::engine::stream::Events;
use crate::engine::{Endpoint, EngineError, Finish, GenerateRequest, Generated, Piece};
use crate::format::policy::Policy;

/// What a policy leaves open. PowerInfer's own defaults but for the penalties (its own are 1.1 and newlines included) and
/// the number of tokens (its own has no end).
mod default {
    pub const MAX_TOKENS: u32 = 512;
    pub const TEMPERATURE: f64 = 0.8;
    pub const TOP_K: u32 = 40;
    pub const TOP_P: f64 = 0.95;
    pub const MIN_P: f64 = 0.05;
    pub const REPEAT_PENALTY: f64 = 1.0;
    /// Tokens that penalties look back on.
    pub const REPEAT_LAST: u32 = 64;
}

/// The fewest tokens it makes, unless the text ends before.
const FEWEST: u64 = 4;
const QUICK: Duration = Duration::from_secs(2);
/// How soon a busy server is asked again: first, and at most.
const PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(320);
const BODY_LIMIT_BYTES: usize = 64 << 20;

/// The sampler, every field of it.
///
/// # Errors
/// When a number is not in its range: the server would take it, and make nonsense or nothing of it.
pub(super) fn sampling(policy: &Policy) -> Result<Json, EngineError> {
    let own = &policy.generation;
    let number = |key: &'static str, value: Option<f64>, default: f64, range: std::ops::RangeInclusive<f64>| {
        let value = value.unwrap_or(default);
        if range.contains(&value) {
            return Ok(value);
        }
        let why = format!("{value} is not between {} and {}", range.start(), range.end());
        Err(EngineError::Policy { key, why })
    };
    // With 0 it would divide by 0.
    let repeat = number("generation.repeat_penalty", own.repeat_penalty, default::REPEAT_PENALTY, 0.01..=10.0)?;
    Ok(json!({
        "temperature": number("generation.temperature", own.temperature, default::TEMPERATURE, 0.0..=10.0)?,
        "top_p": number("generation.top_p", own.top_p, default::TOP_P, 0.0..=1.0)?,
        "min_p": number("generation.min_p", own.min_p, default::MIN_P, 0.0..=1.0)?,
        "top_k": own.top_k.unwrap_or(default::TOP_K).min(1_000_000),
        "repeat_penalty": repeat,
        "presence_penalty": number("generation.presence_penalty", own.presence_penalty, 0.0, -10.0..=10.0)?,
        "frequency_penalty": number("generation.frequency_penalty", own.frequency_penalty, 0.0, -10.0..=10.0)?,
        "repeat_last_n": default::REPEAT_LAST,
        "penalize_nl": false,
        "tfs_z": 1.0,
        "typical_p": 1.0,
        "mirostat": 0,
        "n_keep": 0,
        "n_probs": 0,
        "ignore_eos": false,
        "logit_bias": [],
        "grammar": "",
        // Looked for here, not there.
        "stop": [],
        "slot_id": -1,
        // Seen to give wrong answers: a prompt that it remembers as a whole has its last token twice in the cache.
        "cache_prompt": false,
        "stream": true,
    }))
}

/// Whether the server answers, with our model, for real: what answers `/model.json` may still fail at its first word.
///
/// # Errors
/// [`EngineError::Foreign`] when something else listens there; [`EngineError::Cancelled`].
pub(super) fn ready(endpoint: &Endpoint, patience: Patience<'_>) -> Result<bool, EngineError> {
    let foreign = || EngineError::Foreign(endpoint.port);
    let request = Request { path: "/model.json", key: None, json: None };
    // The server listens only once its model is loaded.
    let settings = match http::send(endpoint.port, request, patience.at_most(QUICK)) {
        Ok(response) if response.status == 200 => response.text(BODY_LIMIT_BYTES),
        Ok(_) => return Err(foreign()),
        Err(error) => Err(error),
    };
    let settings: Json = match settings {
        Ok(text) => serde_json::from_str(&text).map_err(|_| foreign())?,
        Err(HttpError::Cancelled(cancelled)) => return Err(cancelled.into()),
        Err(HttpError::Malformed(_) | HttpError::TooLarge(_)) => return Err(foreign()),
        // Not there yet, or no longer: whoever started it knows.
        Err(_) => return Ok(false),
    };
    if settings["model"] != launch::alias(&endpoint.key).as_str() {
        return Err(foreign());
    }
    let body = json!({ "prompt": "a", "n_predict": 0, "temperature": 0.0, "stream": true, "stop": [] }).to_string();
    let request = Request { path: "/completion", key: None, json: Some(&body) };
    let mut stream = Stream::new(endpoint, FEWEST, Vec::new());
    let received = match http::send(endpoint.port, request, patience) {
        Ok(response) if response.status == 200 => stream.receive(response, &mut |_| true),
        Ok(response) => Err(refusal(response)),
        Err(error) => Err(error.into()),
    };
    match received {
        Ok(()) => Ok(stream.end.is_some()),
        Err(EngineError::Timeout | EngineError::Unanswered(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) fn generate(
    endpoint: &Endpoint,
    ask: &GenerateRequest<'_>,
    sink: &mut Sink<'_>,
) -> Result<Generated, EngineError> {
    let mut body = sampling(ask.policy)?;
    let patience = Patience { cancel: ask.cancel, deadline: ask.deadline };
    let mut stream = Stream::new(endpoint, 0, chat::stops(ask.policy, ask.header));
    let received = tokens(endpoint, ask, patience).and_then(|tokens| {
        let context = u64::from(model::context_size(ask.policy, ask.header));
        stream.prompt_tokens = tokens.len() as u64;
        let left = context.saturating_sub(stream.prompt_tokens);
        if left == 0 {
            return Err(EngineError::TooLong { prompt_tokens: stream.prompt_tokens, context_size: context });
        }
        stream.limit = left.min(ask.policy.generation.max_tokens.unwrap_or(default::MAX_TOKENS).max(1).into());
        body["n_predict"] = (stream.limit - 1).into();
        body["prompt"] = tokens.into();
        ask_until_free(endpoint, &body.to_string(), patience, &mut stream, sink)
    });
    match received {
        Err(EngineError::Cancelled(_)) => stream.end = Some(End::Ours(Finish::Cancelled)),
        other => other?,
    }
    stream.generated()
}

/// The prompt as token numbers, the one that begins a text included. Special tokens are ours; texts are cut by the server,
/// which reads no special token in them.
fn tokens(endpoint: &Endpoint, ask: &GenerateRequest<'_>, patience: Patience<'_>) -> Result<Vec<u32>, EngineError> {
    let mut tokens = Vec::new();
    for part in chat::parts(ask.policy, ask.header, ask.prompt)? {
        match part {
            Part::Token(id) => tokens.push(id),
            Part::Text(text) => tokens.extend(tokenize(endpoint, &text, patience)?),
        }
    }
    let bos = model::bos(ask.header).filter(|bos| model::adds_bos(ask.header) && tokens.first() != Some(bos));
    if let Some(bos) = bos {
        tokens.insert(0, bos);
    }
    if tokens.is_empty() {
        // The server answers an empty prompt with an empty text at once.
        return Err(EngineError::Refused("the prompt is empty".to_owned()));
    }
    Ok(tokens)
}

fn tokenize(endpoint: &Endpoint, text: &str, patience: Patience<'_>) -> Result<Vec<u32>, EngineError> {
    #[derive(serde::Deserialize)]
    struct Tokens {
        tokens: Vec<u32>,
    }
    let body = json!({ "content": text }).to_string();
    let response = http::send(endpoint.port, Request { path: "/tokenize", key: None, json: Some(&body) }, patience)?;
    if response.status != 200 {
        return Err(refusal(response));
    }
    let answer = response.text(BODY_LIMIT_BYTES)?;
    let tokens: Tokens = serde_json::from_str(&answer)
        .map_err(|error| EngineError::Unanswered(format!("`/tokenize` does not give tokens ({error})")))?;
    Ok(tokens.tokens)
}

/// Asks until a slot is free: a stream without any event is how the server says that none is.
fn ask_until_free(
    endpoint: &Endpoint,
    body: &str,
    patience: Patience<'_>,
    stream: &mut Stream<'_>,
    sink: &mut Sink<'_>,
) -> Result<(), EngineError> {
    let mut pause = PAUSE;
    loop {
        let request = Request { path: "/completion", key: None, json: Some(body) };
        let response = http::send(endpoint.port, request, patience)?;
        if response.status != 200 {
            return Err(refusal(response));
        }
        stream.receive(response, sink)?;
        if stream.events > 0 || stream.end.is_some() {
            return Ok(());
        }
        patience.cancel.check()?;
        if Instant::now() + pause >= patience.deadline {
            return Err(EngineError::Timeout);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// What an answer that is not 200 says: plain text there.
fn refusal(response: Response<'_>) -> EngineError {
    const LIMIT_BYTES: usize = 64 * 1024;
    let status = response.status;
    match response.text(LIMIT_BYTES) {
        Err(error) => error.into(),
        Ok(text) => EngineError::Refused(format!("status {status}: {}", text.chars().take(500).collect::<String>())),
    }
}

/// How an answer ended.
enum End {
    /// We closed the connection.
    Ours(Finish),
    /// The server's last event.
    Theirs(Json),
}

/// What the server has said so far.
struct Stream<'a> {
    endpoint: &'a Endpoint,
    answer: Answer,
    stops: Stops,
    prompt_tokens: u64,
    /// Tokens that may come.
    limit: u64,
    /// Events with a token. A character of several tokens is one event, and counts as one token in an answer that we end.
    events: u64,
    end: Option<End>,
}

impl<'a> Stream<'a> {
    fn new(endpoint: &'a Endpoint, limit: u64, stops: Vec<String>) -> Self {
        let stops = Stops { stops, held: String::new() };
        Self { endpoint, answer: Answer::new(), stops, prompt_tokens: 0, limit, events: 0, end: None }
    }

    /// Reads to the end of the stream, or until there is enough; then lets go of the connection.
    fn receive(&mut self, mut response: Response<'_>, sink: &mut Sink<'_>) -> Result<(), EngineError> {
        let (mut events, mut part) = (Events::default(), [0; 8192]);
        loop {
            let count = response.read(&mut part)?;
            let whole = events.push(&part[..count]).map_err(|error| EngineError::Unanswered(error.to_string()))?;
            for data in &whole {
                self.take(data, sink)?;
                if self.end.is_some() {
                    return Ok(());
                }
            }
            if count == 0 {
                return Ok(());
            }
        }
    }

    fn take(&mut self, data: &str, sink: &mut Sink<'_>) -> Result<(), EngineError> {
        let strange = || {
            let shown: String = data.chars().take(200).collect();
            EngineError::Unanswered(format!("an event is not what it should be: `{shown}`"))
        };
        let event: Json = serde_json::from_str(data).map_err(|_| strange())?;
        let text = event["content"].as_str().ok_or_else(strange)?;
        if event["stop"].as_bool().ok_or_else(strange)? {
            if event["model"] != launch::alias(&self.endpoint.key).as_str() {
                return Err(EngineError::Foreign(self.endpoint.port));
            }
            self.answer.ended();
            let rest = std::mem::take(&mut self.stops.held);
            let more = self.answer.push(Piece::Text(&rest), sink)?;
            self.end = Some(if more { End::Theirs(event) } else { End::Ours(Finish::Cancelled) });
            return Ok(());
        }
        if self.limit < FEWEST && self.events == self.limit {
            return self.cut(sink);
        }
        self.events += 1;
        let (said, stopped) = self.stops.push(text);
        if !self.answer.push(Piece::Text(&said), sink)? {
            self.end = Some(End::Ours(Finish::Cancelled));
        } else if stopped {
            self.answer.ended();
            self.end = Some(End::Ours(Finish::Stop));
        } else if self.limit < FEWEST && self.events == self.limit && !text.is_empty() {
            // One without text may be the token that ends an answer: the next event tells.
            return self.cut(sink);
        }
        Ok(())
    }

    /// Ends an answer that the server would go on with.
    fn cut(&mut self, sink: &mut Sink<'_>) -> Result<(), EngineError> {
        self.answer.ended();
        let rest = std::mem::take(&mut self.stops.held);
        self.answer.push(Piece::Text(&rest), sink)?;
        self.end = Some(End::Ours(Finish::Length));
        Ok(())
    }

    /// What became of it. An answer whose end was never said is none.
    fn generated(self) -> Result<Generated, EngineError> {
        let unanswered = |why: &str| Err(EngineError::Unanswered(why.to_owned()));
        let Some(end) = self.end else { return unanswered("the stream ended in the middle of the answer") };
        let (finish, event) = match end {
            End::Ours(finish) => (finish, Json::Null),
            End::Theirs(event) if event["stopped_eos"] == true => (Finish::Stop, event),
            End::Theirs(event) if event["stopped_limit"] == true => (Finish::Length, event),
            End::Theirs(_) => return unanswered("the engine does not say why the answer ended"),
        };
        if event["truncated"] == true {
            return unanswered("the engine left out a part of the prompt");
        }
        let made = event["tokens_predicted"].as_u64().map(|counted| counted + 1);
        let timings = &event["timings"];
        let time = |field: &str| timings[field].as_f64().filter(|ms| *ms >= 0.0);
        // The clock for the prompt runs until the second token: one step of the answer is moved to where it belongs.
        let steps = made.and_then(|made| made.checked_sub(2)).filter(|steps| *steps > 0);
        let step_ms = steps.and_then(|steps| Some(time("predicted_ms")? / steps as f64));
        Ok(Generated {
            finish,
            prompt_tokens: self.prompt_tokens,
            // It may go on to its fourth token within a character.
            completion_tokens: made.unwrap_or(self.events).min(self.limit),
            first_tokens: 1,
            cached_tokens: Some(0),
            prompt_ms: step_ms.and_then(|step| Some((time("prompt_ms")? - step).max(0.0))),
            decode_ms: step_ms.and_then(|step| Some(time("predicted_ms")? + step)),
            first_token_ms: self.answer.first_token_ms(),
            streaming_ms: self.answer.streaming_ms(),
            text: self.answer.text,
            thought: self.answer.thought,
        })
    }
}

/// Looks for texts that end an answer, also ones that come in several pieces.
struct Stops {
    stops: Vec<String>,
    /// The beginning of a stop text, perhaps.
    held: String,
}

impl Stops {
    /// What can be told of what came so far, and whether a stop text was in it: then that is all.
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
