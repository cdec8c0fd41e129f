"""Many clients, clients that break off, requests that make no sense, and processes that are killed."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import anthropic
import httpx2 as httpx
import openai
import psutil

from api import ASK, LONG, client, raises
from gateway import BASE, CHAT, LIMIT_S, Gateway, gone, until

CLIENTS = 200
MALFORMED = 10_000
# Memory that a server may hold more after the load than before it.
GROWTH_BYTES = 10_000_000
# The gateway takes clients one after the other: the last of 200 waits for the answers to all others.
PATIENCE_S = 600


async def one(api, chance, leaves):
    """One streaming client. Gives the answer, or None when it left."""
    ask = {"model": CHAT, "messages": ASK, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}}
    request = asyncio.ensure_future(api.chat.completions.create(**ask))
    if leaves and chance.random() < 0.5:
        # Still in the queue, or before the first token.
        await asyncio.wait([request], timeout=chance.uniform(0, 5))
        if not request.done():
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            return None
    stream = await request
    chunks, most = [], chance.randrange(1, 6) if leaves else None
    async for chunk in stream:
        chunks.append(chunk)
        if len(chunks) == most:
            await stream.close()
            return None
    assert chunks[-1].usage.completion_tokens > 0 and chunks[-2].choices[0].finish_reason, chunks[-2:]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])


async def crowd(url, seed):
    chance = random.Random(seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    http = openai.DefaultAsyncHttpxClient(limits=limits)
    async with openai.AsyncOpenAI(
        base_url=url, api_key="none", timeout=PATIENCE_S, max_retries=0, http_client=http
    ) as api:
        clients = [one(api, random.Random(chance.random()), number % 2 == 1) for number in range(CLIENTS)]
        return await asyncio.gather(*clients)


def many_clients(gateway):
    """Half of 200 streaming clients leave at random: the others get whole answers, and nothing stays behind."""
    answer = client(gateway).chat.completions.create(model=CHAT, messages=ASK, max_tokens=8)
    asyncio.run(crowd(gateway.api, 1))
    gateway.rest()
    engines, before, files = gateway.descendants(), gateway.resident_bytes(), gateway.open_files()
    ends = asyncio.run(crowd(gateway.api, 2))
    assert ends[0::2] == [answer.choices[0].message.content] * (CLIENTS // 2), ends
    gateway.rest()
    gateway.engine_idle(CHAT)
    assert gateway.descendants() == engines, "the load changed which processes run"
    until("the connections are closed", lambda: gateway.open_files() <= files + 4)
    after = gateway.resident_bytes()
    print(f"    {CLIENTS} clients, {ends.count(None)} left; {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after")
    assert after - before < GROWTH_BYTES, f"the server grew from {before} to {after} bytes"


def engine_killed(gateway):
    """The client of an engine that dies is told, and the next request starts another one."""
    api = client(gateway, max_retries=0)
    ask = {"model": CHAT, "messages": LONG, "max_tokens": 1500, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = iter(api.chat.completions.create(**ask))
    next(stream)
    engine = gateway.policy(CHAT)["pid"]
    os.kill(engine, signal.SIGKILL)
    error = raises(openai.APIError, lambda: list(stream))
    assert error.code == "upstream_disconnected", error.__dict__
    gateway.event("failed", policy=CHAT)
    # The server says when to come again, and the client does.
    answer = client(gateway, max_retries=5).chat.completions.create(model=CHAT, messages=ASK)
    assert "Paris" in answer.choices[0].message.content
    assert gateway.policy(CHAT)["pid"] != engine
    with anthropic.Anthropic(base_url=gateway.url, api_key="none").messages.stream(
        model=CHAT, messages=LONG, max_tokens=1500
    ) as stream:
        texts = iter(stream.text_stream)
        next(texts)
        os.kill(gateway.policy(CHAT)["pid"], signal.SIGKILL)
        raises(anthropic.APIStatusError, lambda: list(texts))
    gateway.event("failed", policy=CHAT)
    answer = client(gateway, max_retries=8).chat.completions.create(model=CHAT, messages=ASK)
    assert "Paris" in answer.choices[0].message.content
    gateway.rest()


def nonsense(chance):
    """A request that no client should send."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    body = b'{"model": "%s", "messages": [{"role": "user", "content": "hi"}]' % CHAT.encode()
    kinds = [
        lambda: chance.randbytes(chance.randrange(1, 2000)),
        lambda: head + b"content-length: 40\r\n\r\n" + chance.randbytes(40),
        lambda: head + b"content-length: %d\r\n\r\n" % len(body) + body,
        lambda: head + b"content-length: 100000\r\n\r\n" + body,
        lambda: head + b"content-length: -1\r\n\r\n" + body,
        lambda: head + b"transfer-encoding: chunked\r\n\r\n" + chance.randbytes(30) + b"\r\n\r\n",
        lambda: head + b"x-filling: " + b"a" * chance.randrange(1000, 200_000) + b"\r\n\r\n",
        lambda: head + b"".join(b"x-%d: 1\r\n" % number for number in range(chance.randrange(50, 3000))) + b"\r\n",
        lambda: head[: chance.randrange(1, len(head))],
        lambda: head + b"content-length: 200001\r\n\r\n" + b'{"a":' + b"[" * 200_000,
        lambda: b"GET /" + b"a" * chance.randrange(1, 100_000) + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        lambda: b"GET /v1/models HTTP/1.1\r\nhost: evil.example\r\n\r\n",
    ]
    return chance.choice(kinds)()


def send(port, data):
    """Sends bytes and reads what comes back until the server has nothing more to say. Gives the first line."""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as connection:
        heard = b""
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                heard += piece
        except TimeoutError:
            raise
        except OSError:
            pass  # The server may break off as soon as it has read enough.
        return heard.split(b"\r\n")[0].decode("latin-1")


def malformed_requests(gateway):
    """10,000 of them: each gets a 4xx or a closed connection, and the server is as it was."""
    port = int(gateway.url.rsplit(":", 1)[1])
    client(gateway).chat.completions.create(model=CHAT, messages=ASK)
    files, engine = gateway.open_files(), gateway.policy(CHAT)["pid"]
    with ThreadPoolExecutor(16) as pool:
        lines = list(pool.map(lambda number: send(port, nonsense(random.Random(number))), range(MALFORMED)))
    statuses = {}
    for line in lines:
        status = line.split(" ")[1] if line.startswith("HTTP/1.1 ") else line or "closed"
        statuses[status] = statuses.get(status, 0) + 1
    print(f"    {MALFORMED} requests: {dict(sorted(statuses.items()))}")
    assert all(status == "closed" or status[0] == "4" for status in statuses), statuses
    gateway.rest()
    until("the connections are closed", lambda: gateway.open_files() <= files + 4)
    answer = client(gateway, max_retries=0).chat.completions.create(model=CHAT, messages=ASK)
    assert "Paris" in answer.choices[0].message.content
    assert gateway.policy(CHAT)["pid"] == engine, "nonsense reached the engine and ended it"


def swaps(program, project):
    """Clients of two models take turns where one engine may be loaded."""
    with Gateway(program, project, "--max-loaded", "1") as gateway:
        api = client(gateway)

        def ask(model):
            return api.completions.create(model=model, prompt="One, two, three,", max_tokens=4, temperature=0)

        for model in [CHAT, BASE, CHAT]:
            assert ask(model).choices[0].finish_reason == "length"
            assert gateway.loaded() == [model]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, [CHAT, BASE] * 6))
        assert len({(answer.model, answer.choices[0].text) for answer in answers}) == 2, answers
        assert len(gateway.loaded()) == 1
        print(f"    {sum(event['event'] == 'loaded' for event in gateway.seen)} starts for 15 requests")


def queue_full(program, project):
    """A full queue is refused with the time to come again, and the client comes again by itself."""
    with Gateway(program, project, "--queue", "1") as gateway:
        api = client(gateway, max_retries=100)
        with ThreadPoolExecutor(6) as pool:
            asked = lambda _: api.chat.completions.create(model=CHAT, messages=LONG, max_tokens=60)
            answers = list(pool.map(asked, range(6)))
        assert all(answer.usage.completion_tokens > 0 for answer in answers)
        statuses = [event["status"] for event in gateway.requests()]
        assert 429 in statuses and statuses.count(200) == 6, statuses


def keys(program, project):
    """With a key, clients without it are refused, on every path that tells something."""
    key = "0123456789abcdef"
    with Gateway(program, project, env={"AITOOLS_API_KEY": key}) as gateway:
        raises(openai.AuthenticationError, client(gateway).models.list)
        raises(anthropic.AuthenticationError, anthropic.Anthropic(base_url=gateway.url, api_key="x").models.list)
        good = openai.OpenAI(base_url=gateway.api, api_key=key)
        assert len(list(good.models.list())) == 5
        claude = anthropic.Anthropic(base_url=gateway.url, api_key=key)
        assert claude.messages.create(model=CHAT, messages=ASK, max_tokens=4).usage.output_tokens == 4


def terminated(program, project):
    """SIGTERM lets a request that runs come to its end."""
    gateway = Gateway(program, project)
    ask = {"model": CHAT, "messages": LONG, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    stream = iter(client(gateway).chat.completions.create(**ask, stream=True))
    next(stream)
    descendants = gateway.descendants()
    assert descendants, "no engine runs"
    waiting = ThreadPoolExecutor(1).submit(
        lambda: raises(openai.InternalServerError, lambda: client(gateway, max_retries=0).chat.completions.create(**ask))
    )
    until("the second request waits", lambda: gateway.policy(CHAT)["waiting"] == 1)
    gateway.process.send_signal(signal.SIGTERM)
    assert waiting.result(LIMIT_S).code == "shutting_down"
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length", chunks[-1]
    code = gateway.process.wait(LIMIT_S)
    assert code in (0, 130), f"`serve` ended with {code}"
    gone(descendants)
    print(f"    {len(chunks)} chunks after SIGTERM; exit code {code}")


def gateway_killed(program, project):
    """No engine outlives a server that is killed."""
    gateway = Gateway(program, project)
    stream = iter(client(gateway).chat.completions.create(model=CHAT, messages=LONG, max_tokens=1500, stream=True))
    next(stream)
    descendants = gateway.descendants()
    assert any("llama-server" in process.name() for process in descendants), descendants
    gateway.process.kill()
    print(f"    the engine ended {gone(descendants):.2f} s after the server")
    raises_any(stream)
    gateway.process.wait(LIMIT_S)
    with Gateway(program, project) as again:
        assert "Paris" in client(again).chat.completions.create(model=CHAT, messages=ASK).choices[0].message.content


def synced_meanwhile(program, project):
    """A policy that could not be started is served once `sync` has put right what was wrong with it."""
    weights = os.path.join(project, "models", "llama-cpp", CHAT, "model.gguf")
    with Gateway(program, project) as gateway:
        api = client(gateway, max_retries=0)
        ask = {"model": CHAT, "messages": ASK, "max_tokens": 8}
        os.rename(weights, weights + ".gone")
        error = raises(openai.InternalServerError, lambda: api.chat.completions.create(**ask))
        assert "run `aitools sync`" in error.message, error.message
        os.rename(weights + ".gone", weights)
        subprocess.run([program, "-C", project, "sync"], check=True, timeout=LIMIT_S)

        def answered():
            try:
                return api.chat.completions.create(**ask)
            except openai.InternalServerError:
                return None

        assert "Paris" in until("it is served again", answered, pause_s=0.5).choices[0].message.content


def raises_any(stream):
    """The stream breaks off with an error of the client's transport."""
    try:
        list(stream)
    except (openai.APIError, httpx.TransportError):
        return
    raise AssertionError("a stream of a killed server ended as if it were complete")


ON_ONE = [many_clients, malformed_requests, engine_killed]
OWN = [swaps, queue_full, keys, terminated, synced_meanwhile, gateway_killed]
