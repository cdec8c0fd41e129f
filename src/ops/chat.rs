//! `chat`: a conversation of several turns, with a running gateway or an engine of our own.

use std::path::Path;
use std::time::Instant;

use tokio::runtime::Runtime;

use super::run::{self, RunError, Sink};
use super::serve::Running;
use super::{Failure, remote};
use crate::base::cancel::Cancel;
use crate::base::process::GRACE;
use crate::engine::Ready;
use crate::engine::answer::Generated;
use crate::engine::backend::{Backend, Supervision};
use crate::engine::conversation::{self, Conversation as _, Message, Part, Prompt, Request, Role};
use crate::engine::openai::OpenAi;
use crate::report::Task;

/// A conversation under way.
#[derive(Debug)]
pub struct Chat {
    runtime: Runtime,
    talk: Talk,
    ready: Ready,
    /// The turns so far, the system message first when there is one.
    messages: Vec<Message>,
}

/// Who answers.
#[derive(Debug)]
enum Talk {
    Gateway(OpenAi),
    Own(Option<Backend>),
}

impl Chat {
    /// A conversation with the policy's engine: through the gateway when one serves it, else with an engine started here.
    ///
    /// # Errors
    /// When the engine does not start.
    pub fn open(
        ready: Ready,
        gateway: Option<&Running>,
        supervision: &Supervision<'_>,
        task: &Task,
    ) -> Result<Self, RunError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RunError::Runtime)?;
        let talk = match gateway.and_then(remote::endpoint) {
            Some(endpoint) => Talk::Gateway(OpenAi::of_gateway(&endpoint, ready.name.as_str())),
            None => Talk::Own(Some(runtime.block_on(run::start(&ready, supervision, task))?)),
        };
        let mut chat = Self { runtime, talk, messages: Vec::new(), ready };
        chat.reset();
        Ok(chat)
    }

    /// Forgets the turns, and begins with the policy's system prompt again.
    pub fn reset(&mut self) {
        let system = self.ready.policy.generation.system_prompt.as_deref();
        self.messages = system.map(|text| Message::new(Role::System, text)).into_iter().collect();
    }

    /// Replaces the system prompt; the turns stay.
    pub fn set_system(&mut self, text: &str) {
        self.messages.retain(|message| message.role != Role::System);
        self.messages.insert(0, Message::new(Role::System, text));
    }

    /// The turns so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Says something and hears the answer, piece by piece through `sink`. `cancel` ends the answer and not the conversation.
    ///
    /// # Errors
    /// When the engine fails; the turn is forgotten then.
    pub fn say(&mut self, text: &str, cancel: &Cancel, sink: &mut Sink<'_>) -> Result<Generated, RunError> {
        self.messages.push(Message::new(Role::User, text));
        let answered = self.answer(cancel, sink);
        match &answered {
            Ok(answer) => self.messages.push(Message::new(Role::Assistant, &answer.text)),
            Err(_) => drop(self.messages.pop()),
        }
        answered
    }

    fn answer(&self, cancel: &Cancel, sink: &mut Sink<'_>) -> Result<Generated, RunError> {
        let policy = &self.ready.policy;
        let seed = conversation::seed(policy).map_err(RunError::Random)?;
        let mut request = Request::new(policy, "", seed, Instant::now() + policy.runtime.time_limit());
        request.prompt = Prompt::Messages(self.messages.clone());
        let events = match &self.talk {
            Talk::Gateway(api) => api.generate(request),
            Talk::Own(Some(backend)) => backend.generate(request),
            Talk::Own(None) => Box::pin(futures_util::stream::empty()),
        };
        let heard = self.runtime.block_on(run::listen(events, cancel, sink));
        heard.map_err(|error| RunError::Engine { error, status: None, tail: self.tail() })
    }

    fn tail(&self) -> Vec<String> {
        match &self.talk {
            Talk::Own(Some(backend)) => backend.tail(),
            _ => Vec::new(),
        }
    }
}

impl Drop for Chat {
    fn drop(&mut self) {
        if let Talk::Own(backend) = &mut self.talk
            && let Some(backend) = backend.take()
        {
            self.runtime.block_on(backend.stop(GRACE));
        }
    }
}

/// Writes the turns as JSON: an array of messages as the OpenAI API has them.
///
/// # Errors
/// When the file cannot be written.
pub fn save(messages: &[Message], file: &Path) -> Result<(), Failure> {
    let turns: Vec<_> = messages
        .iter()
        .map(|message| {
            let text: String = message
                .content
                .iter()
                .filter_map(|part| match part {
                    Part::Text(text) => Some(text.as_str()),
                    Part::Image { .. } => None,
                })
                .collect();
            serde_json::json!({ "role": message.role, "content": text })
        })
        .collect();
    let text = serde_json::to_string_pretty(&turns).unwrap_or_default() + "\n";
    Ok(crate::base::fs::write_atomic(file, text.as_bytes())?)
}
