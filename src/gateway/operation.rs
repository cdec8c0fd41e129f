//! The endpoints that are about a model, and what they are called elsewhere.

/// What a client wants of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    Chat,
    Completion,
    Embeddings,
    Rerank,
    /// OpenAI's newer API.
    Responses,
    ResponsesTokens,
    /// Anthropic's API.
    Messages,
    MessagesTokens,
    Tokenize,
    Detokenize,
    ApplyTemplate,
    Infill,
}

impl Operation {
    /// The operation at a path of the gateway. As llama-server has it, `/v1` may be left out where that is common.
    pub fn at(path: &str) -> Option<Self> {
        Some(match path {
            "/v1/chat/completions" | "/chat/completions" => Self::Chat,
            "/v1/completions" | "/completions" => Self::Completion,
            "/v1/embeddings" | "/embeddings" => Self::Embeddings,
            "/v1/rerank" | "/rerank" | "/v1/reranking" | "/reranking" => Self::Rerank,
            "/v1/responses" | "/responses" => Self::Responses,
            "/v1/responses/input_tokens" => Self::ResponsesTokens,
            "/v1/messages" => Self::Messages,
            "/v1/messages/count_tokens" => Self::MessagesTokens,
            "/tokenize" => Self::Tokenize,
            "/detokenize" => Self::Detokenize,
            "/apply-template" => Self::ApplyTemplate,
            "/infill" => Self::Infill,
            _ => return None,
        })
    }

    /// The path at an engine that speaks these APIs.
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completion => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Rerank => "/v1/rerank",
            Self::Responses => "/v1/responses",
            Self::ResponsesTokens => "/v1/responses/input_tokens",
            Self::Messages => "/v1/messages",
            Self::MessagesTokens => "/v1/messages/count_tokens",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
            Self::ApplyTemplate => "/apply-template",
            Self::Infill => "/infill",
        }
    }

    /// OpenTelemetry's `gen_ai.operation.name`, or a name of ours where it has none.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat | Self::Responses | Self::Messages => "chat",
            Self::Completion | Self::Infill => "text_completion",
            Self::Embeddings => "embeddings",
            Self::Rerank => "rerank",
            Self::ResponsesTokens | Self::MessagesTokens => "count_tokens",
            Self::Tokenize => "tokenize",
            Self::Detokenize => "detokenize",
            Self::ApplyTemplate => "apply_template",
        }
    }

    /// Whether the engine computes with the model, for which it has a limited number of slots.
    pub fn takes_slot(self) -> bool {
        use Operation as O;
        matches!(self, O::Chat | O::Completion | O::Embeddings | O::Rerank | O::Responses | O::Messages | O::Infill)
    }

    /// Whether it generates text, so that sampling applies.
    pub fn generates(self) -> bool {
        matches!(self, Self::Chat | Self::Completion | Self::Responses | Self::Messages | Self::Infill)
    }

    /// Whether it has messages, which a chat template renders.
    pub fn has_messages(self) -> bool {
        use Operation as O;
        matches!(self, O::Chat | O::ApplyTemplate | O::Responses | O::ResponsesTokens | O::Messages | O::MessagesTokens)
    }

    /// Whether it is of Anthropic's API, which words errors in its own way.
    pub fn is_anthropic(self) -> bool {
        matches!(self, Self::Messages | Self::MessagesTokens)
    }

    /// Whether its stream is OpenAI's older one: chunks with choices, usage on request, `[DONE]` at the end.
    pub fn has_chunks(self) -> bool {
        matches!(self, Self::Chat | Self::Completion)
    }
}
