"""Every endpoint, as the official clients of OpenAI and Anthropic use it."""

import base64
import json
import struct
import threading
import urllib.request

import anthropic
import openai
from prometheus_client.parser import text_string_to_metric_families

from gateway import BASE, BROKEN, CHAT, EMBEDDINGS, LIMIT_S, TOOLS, until

ASK = [{"role": "user", "content": "What is the capital of France?"}]
LONG = [{"role": "user", "content": "Write a long story about a river."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["city", "population"],
    "additionalProperties": False,
}


def client(gateway, **options):
    return openai.OpenAI(base_url=gateway.api, api_key="none", timeout=LIMIT_S, **options)


def claude(gateway, **options):
    return anthropic.Anthropic(base_url=gateway.url, api_key="none", timeout=LIMIT_S, **options)


def raises(kind, call):
    """The exception of exactly this class that a call ends with."""
    try:
        result = call()
    except Exception as error:
        assert type(error) is kind, f"expected {kind.__name__}, got {error!r}"
        return error
    raise AssertionError(f"expected {kind.__name__}, got {result!r}")


def models(gateway):
    api = client(gateway)
    listed = {model.id: model for model in api.models.list()}
    assert listed.keys() >= {CHAT, BASE, EMBEDDINGS, TOOLS, BROKEN}, listed.keys()
    assert api.models.retrieve(CHAT) == listed[CHAT]
    assert listed[CHAT].object == "model" and listed[CHAT].owned_by == "aitools" and listed[CHAT].created > 0
    assert listed[BROKEN].status["failed"] is True, listed[BROKEN]
    error = raises(openai.NotFoundError, lambda: api.models.retrieve("no/such"))
    assert error.code == "model_not_found" and error.request_id is None, error


def chat(gateway):
    api = client(gateway)
    answer = api.chat.completions.create(model=CHAT, messages=ASK)
    choice = answer.choices[0]
    assert "Paris" in choice.message.content and choice.finish_reason == "stop", answer
    assert answer.model == CHAT and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-"), answer
    usage = answer.usage
    assert usage.prompt_tokens > 0 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    assert answer._request_id.startswith("req-"), answer._request_id
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    again = api.chat.completions.create(model=CHAT, messages=parts, max_completion_tokens=3)
    assert again.choices[0].finish_reason == "length" and again.usage.completion_tokens == 3, again


def chat_stream(gateway):
    api = client(gateway)
    whole = api.chat.completions.create(model=CHAT, messages=ASK).choices[0].message.content
    chunks = list(api.chat.completions.create(model=CHAT, messages=ASK, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole, chunks
    assert len({(chunk.id, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"
    assert not any(chunk.usage for chunk in chunks), "usage that was not asked for"
    options = {"include_usage": True}
    chunks = list(api.chat.completions.create(model=CHAT, messages=ASK, stream=True, stream_options=options))
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True], "usage comes once, at the end"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    with api.chat.completions.stream(model=CHAT, messages=ASK) as stream:
        kinds = {event.type for event in stream}
    assert kinds >= {"chunk", "content.delta", "content.done"}, kinds


def json_schema(gateway):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    answer = client(gateway).chat.completions.create(model=CHAT, messages=ASK, response_format=form)
    value = json.loads(answer.choices[0].message.content)
    assert value.keys() == {"city", "population"} and type(value["population"]) is int, value


def tools(gateway):
    """The model is too small to call one by itself: what matters is that definitions, calls and results reach its template."""
    api = client(gateway)
    ask = [{"role": "user", "content": "What is the weather in Paris?"}]

    def prompt_tokens(messages, **options):
        answer = api.chat.completions.create(model=TOOLS, messages=messages, max_tokens=1, **options)
        return answer.usage.prompt_tokens

    plain, defined = prompt_tokens(ask), prompt_tokens(ask, tools=[WEATHER])
    assert defined > plain + 20, (plain, defined)
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 21 degrees"}
    told = prompt_tokens([*ask, {"role": "assistant", "tool_calls": [call]}, result], tools=[WEATHER])
    assert told > defined + 20, (defined, told)
    chunks = list(api.chat.completions.create(model=TOOLS, messages=ask, tools=[WEATHER], max_tokens=4, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length", chunks
    error = raises(openai.BadRequestError, lambda: api.chat.completions.create(model=CHAT, messages=ask, tools=[WEATHER]))
    assert error.param == "tools" and error.code == "unsupported_parameter", error


def logprobs(gateway):
    answer = client(gateway).chat.completions.create(
        model=CHAT, messages=ASK, max_tokens=4, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 4 and all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens), tokens


def seeds(gateway):
    def told(seed):
        answer = client(gateway).chat.completions.create(
            model=CHAT, messages=LONG, max_tokens=24, temperature=1.2, seed=seed, extra_body={"cache_prompt": False}
        )
        return answer.choices[0].message.content

    assert told(7) == told(7)
    assert told(7) != told(8)


def completions(gateway):
    api = client(gateway)
    for model in [CHAT, BASE]:
        ask = {"model": model, "prompt": "One, two, three, four,", "max_tokens": 8, "temperature": 0}
        answer = api.completions.create(**ask)
        assert "five" in answer.choices[0].text and answer.object == "text_completion", answer
        chunks = list(api.completions.create(**ask, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text, chunks
        cut = api.completions.create(**ask, stop=[" five"]).choices[0]
        assert "five" not in cut.text and cut.finish_reason == "stop", cut
    error = raises(openai.BadRequestError, lambda: api.chat.completions.create(model=BASE, messages=ASK))
    assert error.param == "messages" and "chat template" in error.message, error


def embeddings(gateway):
    api = client(gateway)
    texts = ["a cat", "a dog", "the price of steel"]
    # Without a format the client asks for base64 and decodes it.
    vectors = [item.embedding for item in api.embeddings.create(model=EMBEDDINGS, input=texts).data]
    assert len(vectors) == 3 and len({len(vector) for vector in vectors}) == 1 and len(vectors[0]) > 100
    floats = api.embeddings.create(model=EMBEDDINGS, input=texts[0], encoding_format="float")
    assert all(abs(a - b) < 1e-4 for a, b in zip(floats.data[0].embedding, vectors[0])), "the two formats differ"
    raw = gateway.post("/v1/embeddings", {"model": EMBEDDINGS, "input": texts[0], "encoding_format": "base64"})
    assert len(base64.b64decode(raw["data"][0]["embedding"])) == struct.calcsize("<f") * len(vectors[0])
    assert raw["usage"]["total_tokens"] > 0, raw["usage"]
    raises(openai.InternalServerError, lambda: api.embeddings.create(model=CHAT, input="a cat"))
    assert gateway.counted(CHAT, 501) == 1, "the client tried again what cannot succeed"


def responses(gateway):
    api = client(gateway)
    answer = api.responses.create(model=CHAT, input="What is the capital of France?")
    assert "Paris" in answer.output_text and answer.status == "completed" and answer.usage.output_tokens > 0, answer
    with api.responses.stream(model=CHAT, input="What is the capital of France?") as stream:
        kinds = [event.type for event in stream]
        assert "Paris" in stream.get_final_response().output_text
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds
    short = api.responses.create(model=CHAT, input="Tell a story.", max_output_tokens=16)
    assert short.usage.output_tokens == 16, short
    assert api.responses.input_tokens.count(model=CHAT, input="Hello").input_tokens > 0


def messages(gateway):
    api = claude(gateway)
    ask = {"model": CHAT, "max_tokens": 32, "messages": ASK}
    answer = api.messages.create(**ask)
    assert "Paris" in answer.content[0].text and answer.stop_reason == "end_turn" and answer.role == "assistant", answer
    with api.messages.stream(**ask) as stream:
        told = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert told == answer.content[0].text and final.usage.output_tokens == answer.usage.output_tokens, (told, final)
    counted = api.messages.count_tokens(model=CHAT, messages=ASK).input_tokens
    usage = answer.usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0), (counted, usage)
    assert api.messages.create(**{**ask, "max_tokens": 2}).stop_reason == "max_tokens"
    error = raises(anthropic.NotFoundError, lambda: api.messages.create(**{**ask, "model": "no-such"}))
    assert error.body["type"] == "error" and error.body["error"]["type"] == "not_found_error", error.body
    raises(anthropic.BadRequestError, lambda: api.messages.create(**{**ask, "max_tokens": "many"}))


def cancel(gateway):
    """A client that leaves ends the work of the engine, whatever it had asked for."""
    api = client(gateway, max_retries=0)
    ask = {"model": CHAT, "messages": LONG, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    stream = api.chat.completions.create(**ask, stream=True)
    next(iter(stream))
    assert gateway.policy(CHAT)["running"] == 1
    stream.close()
    gateway.event("request", status=499, path="/v1/chat/completions")
    gateway.rest()
    gateway.engine_idle(CHAT)
    raises(openai.APITimeoutError, lambda: api.with_options(timeout=0.5).chat.completions.create(**ask))
    gateway.event("request", status=499, path="/v1/chat/completions")
    gateway.engine_idle(CHAT)
    with claude(gateway).messages.stream(model=CHAT, messages=LONG, max_tokens=1500) as stream:
        next(iter(stream.text_stream))
    gateway.event("request", status=499, path="/v1/messages")
    gateway.rest()
    gateway.engine_idle(CHAT)


def errors(gateway):
    api = client(gateway)
    error = raises(openai.NotFoundError, lambda: api.chat.completions.create(model="gpt-4", messages=ASK))
    assert error.code == "model_not_found" and error.param == "model" and CHAT in error.message, error
    wrong = {"stream": "yes", "stream_options": 3, "seed": "x", "temperature": "hot", "max_tokens": [], "messages": 7}
    for field, value in wrong.items():
        extra = {"stream": True} if field == "stream_options" else {}
        ask = {"model": CHAT, "messages": ASK, **extra, field: value}
        error = raises(openai.BadRequestError, lambda: api.post("/chat/completions", cast_to=object, body=ask))
        assert error.param == field, (field, error)
        assert error.type == "invalid_request_error", error
    long = [{"role": "user", "content": "river " * 5000}]
    error = raises(openai.BadRequestError, lambda: api.chat.completions.create(model=CHAT, messages=long))
    assert error.code == "context_length_exceeded", error
    error = raises(openai.NotFoundError, lambda: api.post("/no/such/path", cast_to=object, body={}))
    assert error.code == "unknown_url", error


def no_retry(gateway):
    """Clients try again what the gateway says may succeed, and nothing else."""
    error = raises(
        openai.InternalServerError, lambda: client(gateway).completions.create(model=BROKEN, prompt="x", max_tokens=1)
    )
    assert error.status_code == 503 and error.code == "engine_failed", error
    assert error.response.headers["x-should-retry"] == "false"
    assert gateway.counted(BROKEN, 503) == 1, "the client tried again what cannot succeed"


def load_and_unload(gateway):
    """As Open WebUI's buttons do it, with the events by which it follows."""
    watched, states = urllib.request.urlopen(gateway.url + "/models/sse", timeout=LIMIT_S), []
    assert watched.readline() == b": connected\n"

    def watch():
        for line in watched:
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                states.append((event["model"], event.get("data", {}).get("status")))
                if states[-1] == (BASE, "unloaded"):
                    return

    watcher = threading.Thread(target=watch)
    if BASE in gateway.loaded():
        gateway.post("/models/unload", {"model": BASE})
        until("the model is unloaded", lambda: BASE not in gateway.loaded())
        gateway.event("unloaded", policy=BASE)
        assert watched.readline() == b"\n" and json.loads(watched.readline()[6:])["data"]["status"] == "unloaded"
    watcher.start()
    assert gateway.post("/models/load", {"model": BASE}) == {"success": True}
    until("the model is loaded", lambda: client(gateway).models.retrieve(BASE).status["value"] == "loaded")
    assert {"model": BASE, "state": "ready"} in json.loads(gateway.get("/running"))["running"]
    assert gateway.post("/models/unload", {"model": BASE}) == {"success": True}
    watcher.join(LIMIT_S)
    assert states == [(BASE, "loading"), (BASE, "loaded"), (BASE, "unloaded")], states
    error = raises(
        openai.BadRequestError, lambda: client(gateway).post("/../models/unload", cast_to=object, body={"model": BASE})
    )
    assert error.param == "model", error


def metrics(gateway):
    """Prometheus' own parser reads them, and they say what happened."""
    list(client(gateway).chat.completions.create(model=CHAT, messages=ASK, stream=True))
    gateway.rest()
    families = {family.name: family for family in text_string_to_metric_families(gateway.get("/metrics"))}
    untyped = [name for name, family in families.items() if family.type in ("unknown", "untyped")]
    assert not untyped, f"metrics without a type: {untyped}"
    assert families["aitools_requests"].type == "counter"
    counted = sum(sample.value for sample in families["aitools_requests"].samples if sample.labels["policy"] == CHAT)
    told = lambda: sum(event["policy"] == CHAT for event in gateway.requests())
    until(f"{counted:.0f} requests are told as events, too", lambda: told() == counted)
    for name in ["gen_ai_server_request_duration_seconds", "gen_ai_server_time_to_first_token_seconds"]:
        assert families[name].type == "histogram", name
    in_flight = families["aitools_requests_in_flight"].samples
    assert in_flight and all(sample.value == 0 for sample in in_flight), in_flight
    engines = {sample.labels["policy"] for sample in families["llamacpp:requests_processing"].samples}
    assert engines == set(gateway.loaded()), engines


ALL = [
    models, chat, chat_stream, json_schema, tools, logprobs, seeds, completions, embeddings, responses, messages, cancel,
    errors, no_retry, load_and_unload, metrics,
]
