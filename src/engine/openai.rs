//! The OpenAI API (<https://platform.openai.com/docs/api-reference>), as local engines speak it: the whole conversation with any
//! engine that serves `/v1/chat/completions` and `/v1/completions` as server-sent events.
//!
//! What an engine adds to the API, such as more sampling parameters, is a [`Dialect`]. Fields of responses that only some
//! engines send (`reasoning_content`, llama.cpp's `timings`) are read wherever they occur.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_stream::try_stream;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde_json::{Value as Json, json};

use super::client::Client;
use super::control_tokens::ControlTokens;
use super::conversation::{
    Api, Conversation, Delta, Event, Events, Finish, Format, Message, Part, Piece, Prompt, Request, Sampling, Tool,
    ToolCall, ToolCallDelta, Usage,
};
use super::{Endpoint, EngineError};

/// How long an engine may take to say whether it is ready.
const READY: Duration = Duration::from_secs(2);

/// What one engine's API has beyond OpenAI's.
#[derive(Debug, Clone, Copy)]
pub struct Dialect {
    /// Whether the engine refuses requests without the key that it was started with (401). One that does is told from
    /// other programs that took its port.
    pub checks_key: bool,
    /// Adds the engine's own fields for sampling.
    pub sampling: fn(&Sampling, &mut Json),
    /// Adds the engine's other fields to the body of a request.
    pub extend: fn(&Request, &mut Json),
}

/// A conversation with one engine that speaks the OpenAI API.
#[derive(Debug, Clone)]
pub struct OpenAi {
    client: Client,
    dialect: Dialect,
    /// Whether the model has a chat template.
    chat: bool,
    /// Whether that template has a place for tools.
    tools: bool,
    /// The model to name, where a gateway serves several.
    model: Option<String>,
    /// What must not be in the text of a message.
    control_tokens: Option<Arc<ControlTokens>>,
}

impl OpenAi {
    /// A conversation with the engine that listens there. `chat`: whether it has a chat template for its model; without one,
    /// prompts go to `/v1/completions` as they are.
    pub fn new(endpoint: &Endpoint, dialect: Dialect, chat: bool) -> Self {
        Self { client: Client::new(endpoint), dialect, chat, tools: true, model: None, control_tokens: None }
    }

    /// A conversation with a gateway of ours: it knows the policy, so that only its name and the messages are sent.
    pub fn of_gateway(endpoint: &Endpoint, policy: &str) -> Self {
        let dialect = Dialect { checks_key: false, sampling: |_, _| (), extend: |_, _| () };
        Self { model: Some(policy.to_owned()), ..Self::new(endpoint, dialect, true) }
    }

    /// The same for a model whose chat template passes over tools.
    #[must_use]
    pub fn without_tools(self) -> Self {
        Self { tools: false, ..self }
    }

    /// The same for an engine that reads these texts as control tokens wherever they are: none of them is left in a message.
    #[must_use]
    pub fn without_control_tokens(self, tokens: ControlTokens) -> Self {
        Self { control_tokens: Some(Arc::new(tokens)), ..self }
    }

    async fn is_ready(&self, deadline: Instant) -> Result<bool, EngineError> {
        let foreign = EngineError::Foreign(self.client.endpoint().port);
        match self.models(true, deadline).await? {
            None | Some(503) => Ok(false),
            Some(200) if !self.dialect.checks_key => Ok(true),
            Some(200) => match self.models(false, deadline).await? {
                None => Ok(false),
                Some(401) => Ok(true),
                Some(_) => Err(foreign),
            },
            Some(_) => Err(foreign),
        }
    }

    /// The status of `/v1/models`; None when nothing answers: it is not there yet, busy, or on its way out.
    async fn models(&self, with_key: bool, deadline: Instant) -> Result<Option<u16>, EngineError> {
        let deadline = deadline.min(Instant::now() + READY);
        match self.client.get("/v1/models", with_key, deadline).await {
            Ok(response) => Ok(Some(response.status())),
            Err(error) if error.is_foreign() => Err(EngineError::Foreign(self.client.endpoint().port)),
            Err(_) => Ok(None),
        }
    }

    /// Path and body of a request.
    ///
    /// # Errors
    /// When the prompt needs a chat template, and the model has none.
    pub fn body(&self, request: &Request) -> Result<(&'static str, Json), EngineError> {
        let mut body = match &self.model {
            Some(model) => json!({ "model": model }),
            None => {
                let mut fields = self.sampling(&request.sampling);
                fields["max_tokens"] = request.max_tokens.into();
                fields["stop"] = json!(request.stop);
                fields
            }
        };
        body["stream"] = true.into();
        body["stream_options"] = json!({ "include_usage": true });
        if !request.tools.is_empty() {
            let function = |tool: &Tool| {
                let function =
                    json!({ "name": tool.name, "description": tool.description, "parameters": tool.parameters });
                json!({ "type": "function", "function": function })
            };
            body["tools"] = request.tools.iter().map(function).collect();
        }
        match &request.format {
            Format::JsonObject => body["response_format"] = json!({ "type": "json_object" }),
            Format::JsonSchema(schema) => {
                let schema = json!({ "name": "answer", "schema": schema, "strict": true });
                body["response_format"] = json!({ "type": "json_schema", "json_schema": schema });
            }
            // A grammar is no part of the API: the dialect has a field for it.
            Format::Text | Format::Grammar(_) => {}
        }
        (self.dialect.extend)(request, &mut body);
        match &request.prompt {
            Prompt::Messages(messages) if self.chat => {
                body["messages"] = messages.iter().map(message).collect();
                self.neutralise(&mut body);
                Ok(("/v1/chat/completions", body))
            }
            prompt => {
                body["prompt"] = prompt.without_template()?.into();
                Ok(("/v1/completions", body))
            }
        }
    }
}

impl Api for OpenAi {
    fn client(&self) -> &Client {
        &self.client
    }

    fn has_tools(&self) -> bool {
        self.tools
    }

    fn has_chat_template(&self) -> bool {
        self.chat
    }

    fn sampling(&self, sampling: &Sampling) -> Json {
        let mut fields = json!({
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "seed": sampling.seed,
        });
        (self.dialect.sampling)(sampling, &mut fields);
        fields
    }
}

impl Conversation for OpenAi {
    fn ready(&self, deadline: Instant) -> BoxFuture<'_, Result<bool, EngineError>> {
        self.is_ready(deadline).boxed()
    }

    fn generate(&self, request: Request) -> Events {
        let this = self.clone();
        Box::pin(try_stream! {
            let (path, body) = this.body(&request)?;
            let response = this.client.post(path, body.to_string(), request.deadline).await.map_err(EngineError::from)?;
            if response.status() != 200 {
                let status = response.status();
                Err(refusal(status, &response.refusal().await.map_err(EngineError::from)?))?;
                return;
            }
            let (mut events, mut reader) = (response.events(), Reader::default());
            while let Some(data) = events.next().await.map_err(EngineError::from)? {
                if data == "[DONE]" {
                    break;
                }
                for event in reader.read(&data)? {
                    yield event;
                }
            }
        })
    }

    fn openai(&self) -> Option<&dyn Api> {
        Some(self)
    }

    fn neutralise(&self, body: &mut Json) {
        if let Some(tokens) = &self.control_tokens {
            tokens.neutralise_body(body);
        }
    }
}

fn message(message: &Message) -> Json {
    let part = |part: &Part| match part {
        Part::Text(text) => json!({ "type": "text", "text": text }),
        Part::Image { media_type, bytes } => {
            let url = format!("data:{media_type};base64,{}", STANDARD.encode(bytes));
            json!({ "type": "image_url", "image_url": { "url": url } })
        }
    };
    let content: Json = match message.content.as_slice() {
        [] => Json::Null,
        [Part::Text(text)] => text.as_str().into(),
        parts => parts.iter().map(part).collect(),
    };
    let mut out = json!({ "role": message.role.as_str(), "content": content });
    if !message.tool_calls.is_empty() {
        let call = |call: &ToolCall| {
            let function = json!({ "name": call.name, "arguments": call.arguments });
            json!({ "id": call.id, "type": "function", "function": function })
        };
        out["tool_calls"] = message.tool_calls.iter().map(call).collect();
    }
    if let Some(id) = &message.tool_call_id {
        out["tool_call_id"] = id.as_str().into();
    }
    out
}

/// The error of a response whose status is not 200.
fn refusal(status: u16, text: &str) -> EngineError {
    match serde_json::from_str::<Json>(text) {
        Ok(body) if body["error"].is_object() => error_object(&body["error"]),
        _ => EngineError::Refused(format!("status {status}: {}", text.chars().take(500).collect::<String>())),
    }
}

fn error_object(error: &Json) -> EngineError {
    if let (Some(prompt_tokens), Some(context_size)) = (error["n_prompt_tokens"].as_u64(), error["n_ctx"].as_u64()) {
        return EngineError::TooLong { prompt_tokens, context_size };
    }
    EngineError::Refused(error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned))
}

/// What the engine has sent so far.
#[derive(Debug, Default)]
struct Reader {
    usage: Usage,
}

impl Reader {
    /// The events of one chunk.
    fn read(&mut self, data: &str) -> Result<Vec<Event>, EngineError> {
        let chunk: Json = serde_json::from_str(data).map_err(|error| {
            let shown: String = data.chars().take(200).collect();
            EngineError::Unanswered(format!("an event is not JSON ({error}): `{shown}`"))
        })?;
        if let Some(error) = chunk.get("error") {
            return Err(error_object(error));
        }
        let mut events = Vec::new();
        let before = self.usage;
        self.count(&chunk);
        let (choice, tokens) = (&chunk["choices"][0], chunk["timings"]["predicted_n"].as_u64());
        for piece in pieces(choice) {
            events.push(Event::Delta(Delta { piece, tokens }));
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            events.push(Event::End(match reason {
                "length" => Finish::Length,
                "tool_calls" => Finish::ToolCalls,
                _ => Finish::Stop,
            }));
        }
        // While text comes, its own events have the count of tokens: the rest is worth an event when it is new, or final.
        let prompt = |usage: &Usage| (usage.prompt_tokens, usage.cached_tokens);
        let goes_on = matches!(events.last(), Some(Event::Delta(_)));
        if before != self.usage && (!goes_on || prompt(&before) != prompt(&self.usage)) {
            events.push(Event::Usage(self.usage));
        }
        Ok(events)
    }

    /// Reads `usage`, and llama.cpp's `timings`.
    fn count(&mut self, chunk: &Json) {
        let (usage, timings) = (&chunk["usage"], &chunk["timings"]);
        let time = |field: &str| timings[field].as_f64().filter(|ms| *ms >= 0.0);
        if timings.is_object() {
            let evaluated = timings["prompt_n"].as_u64().map(|count| count + timings["cache_n"].as_u64().unwrap_or(0));
            self.usage.prompt_tokens = evaluated.or(self.usage.prompt_tokens);
            self.usage.completion_tokens = timings["predicted_n"].as_u64().or(self.usage.completion_tokens);
            (self.usage.prompt_ms, self.usage.decode_ms) = (time("prompt_ms"), time("predicted_ms"));
        }
        if usage.is_object() {
            let counted = |field: &str, known| usage[field].as_u64().or(known);
            self.usage.prompt_tokens = counted("prompt_tokens", self.usage.prompt_tokens);
            self.usage.completion_tokens = counted("completion_tokens", self.usage.completion_tokens);
            self.usage.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
        }
    }
}

/// The pieces of a choice, without empty ones.
fn pieces(choice: &Json) -> Vec<Piece> {
    let delta = &choice["delta"];
    let text = |value: &Json| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let mut pieces: Vec<Piece> = text(&delta["reasoning_content"]).map(Piece::Reasoning).into_iter().collect();
    pieces.extend(text(&delta["content"]).or_else(|| text(&choice["text"])).map(Piece::Text));
    for (at, call) in delta["tool_calls"].as_array().into_iter().flatten().enumerate() {
        let index = call["index"].as_u64().and_then(|index| usize::try_from(index).ok()).unwrap_or(at);
        pieces.push(Piece::ToolCall(ToolCallDelta {
            index,
            id: text(&call["id"]),
            name: text(&call["function"]["name"]),
            arguments: call["function"]["arguments"].as_str().unwrap_or_default().to_owned(),
        }));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::answer::{Answer, Generated};
    use crate::engine::conversation::Role;
    use crate::format::policy;

    fn heard(events: &[&str]) -> Result<Generated, EngineError> {
        let (mut reader, mut answer) = (Reader::default(), Answer::new());
        for data in events {
            for event in reader.read(data)? {
                answer.push(&event)?;
            }
        }
        answer.into_generated()
    }

    #[test]
    fn streams_become_answers_or_errors() {
        let text = r#"{"choices":[{"delta":{"content":"é"}}],"timings":{"predicted_n":2}}"#;
        let thought = r#"{"choices":[{"delta":{"reasoning_content":"hm"}}]}"#;
        let end = r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#;
        let usage = r#"{"choices":[],"usage":{"completion_tokens":3,"prompt_tokens":4},"timings":{"prompt_ms":1.5,"predicted_ms":null}}"#;
        let answer = heard(&[thought, text, end, usage]).unwrap();
        assert_eq!((&*answer.text, &*answer.reasoning, answer.finish), ("é", "hm", Finish::Length));
        assert_eq!(
            (answer.completion_tokens, answer.prompt_tokens, answer.prompt_ms, answer.decode_ms),
            (3, 4, Some(1.5), None)
        );
        for bad in [&[][..], &[text], &[text, usage], &[end], &["{"], &["[1"], &[r#"{"error":{"message":"no"}}"#]] {
            assert!(heard(bad).is_err(), "{bad:?}");
        }
        let long = r#"{"error":{"n_prompt_tokens":9,"n_ctx":8,"message":"x"}}"#;
        assert!(matches!(heard(&[long]), Err(EngineError::TooLong { prompt_tokens: 9, context_size: 8 })));
    }

    #[test]
    fn tool_calls_come_in_pieces() {
        let first =
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"id":"c1","function":{"name":"f","arguments":"{"}}]}}]}"#;
        let second = r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"}"}}]}}]}"#;
        let end = r#"{"choices":[{"delta":{},"finish_reason":"tool_calls"}],"usage":{"completion_tokens":3}}"#;
        let answer = heard(&[first, second, end]).unwrap();
        let call = ToolCall { id: "c1".to_owned(), name: "f".to_owned(), arguments: "{}".to_owned() };
        assert_eq!((answer.tool_calls, answer.finish), (vec![call], Finish::ToolCalls));
    }

    fn request(prompt: Prompt) -> Request {
        let policy = policy::parse("p.yaml", b"engine: e\nmodel: m\n").unwrap().0.value;
        let request = Request::new(&policy, "", 7, Instant::now());
        assert_eq!(request.sampling, Sampling::new(&policy, 7));
        Request { prompt, ..request }
    }

    fn body(request: &Request, chat: bool) -> Result<(&'static str, Json), EngineError> {
        let dialect = Dialect { checks_key: false, sampling: |_, _| (), extend: |_, _| () };
        OpenAi::new(&Endpoint { port: 1, key: String::new() }, dialect, chat).body(request)
    }

    #[test]
    fn messages_tools_and_formats_are_those_of_the_api() {
        let image = Part::Image { media_type: "image/png".to_owned(), bytes: vec![1, 2, 3] };
        let call = ToolCall { id: "c".to_owned(), name: "f".to_owned(), arguments: "{}".to_owned() };
        let mut asked = Message::new(Role::User, "what is this?");
        asked.content.push(image);
        let called = Message { role: Role::Assistant, content: vec![], tool_calls: vec![call], tool_call_id: None };
        let result = Message { tool_call_id: Some("c".to_owned()), ..Message::new(Role::Tool, "4") };
        let mut request = request(Prompt::Messages(vec![Message::new(Role::System, "S"), asked, called, result]));
        request.tools =
            vec![Tool { name: "f".to_owned(), description: "d".to_owned(), parameters: json!({"type": "object"}) }];
        request.format = Format::JsonSchema(json!({"type": "array"}));
        let (path, body) = body(&request, true).unwrap();
        assert_eq!(path, "/v1/chat/completions");
        let called = json!({ "id": "c", "type": "function", "function": { "name": "f", "arguments": "{}" } });
        let picture = json!({ "type": "image_url", "image_url": { "url": "data:image/png;base64,AQID" } });
        let expected = json!([
            { "role": "system", "content": "S" },
            { "role": "user", "content": [{ "type": "text", "text": "what is this?" }, picture] },
            { "role": "assistant", "content": null, "tool_calls": [called] },
            { "role": "tool", "content": "4", "tool_call_id": "c" },
        ]);
        assert_eq!(body["messages"], expected);
        let function = json!({ "name": "f", "description": "d", "parameters": { "type": "object" } });
        assert_eq!(body["tools"], json!([{ "type": "function", "function": function }]));
        assert_eq!(body["response_format"]["json_schema"]["schema"], json!({ "type": "array" }));
        assert_eq!((&body["stream"], &body["seed"], &body["stop"]), (&true.into(), &7.into(), &json!([])));
    }

    #[test]
    fn without_a_template_there_is_plain_text_only() {
        let user = Message::new(Role::User, "P");
        for prompt in [Prompt::Messages(vec![user.clone()]), Prompt::Text("P".to_owned())] {
            let (path, body) = body(&request(prompt), false).unwrap();
            assert_eq!((path, &body["prompt"], body.get("messages")), ("/v1/completions", &json!("P"), None));
        }
        let system = Message::new(Role::System, "S");
        let refused = body(&request(Prompt::Messages(vec![system, user.clone()])), false);
        assert!(matches!(refused, Err(EngineError::Policy { key: "generation.system_prompt", .. })));
        let refused = body(&request(Prompt::Messages(vec![user.clone(), user])), false);
        assert!(matches!(refused, Err(EngineError::Policy { key: "generation.chat_template", .. })));
    }
}
