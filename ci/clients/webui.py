"""Open WebUI in a browser, with `aitools serve` behind it: see `cargo ci e2e webui`."""

import argparse
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil

from gateway import BASE, CHAT, LIMIT_S, Gateway, gone, until

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "browser"))
from chromium import Page, find

# It loads much of Python before it listens: half a minute on two free cores.
START_LIMIT_S = 400
# Titles, tags and follow-up questions are asked for one after the other, with pauses between them.
QUIET_S = 3
# Texts of a streamed answer that are seen one after the other at least.
STEPS = 5

SETTINGS = {
    "OFFLINE_MODE": "true",
    "HF_HUB_OFFLINE": "1",
    "RAG_EMBEDDING_ENGINE": "openai",
    "ENABLE_OLLAMA_API": "false",
    "OPENAI_API_KEY": "none",
    "OPENAI_API_CONFIGS": json.dumps({"0": {"provider": "llama.cpp"}}),
    "DEFAULT_MODEL_METADATA": json.dumps({"capabilities": {"builtin_tools": False}}),
}

SELECTOR = "document.getElementById('model-selector-model-button')"
ANSWERS = "document.querySelectorAll('.chat-assistant')"
LAST = f"([...{ANSWERS}].pop() || {{}}).innerText || ''"
STORY = "Write a long story about a river."


class OpenWebUi:
    """Its server, with an empty data folder. Leaving the `with` block ends it and checks that nothing is left of it."""

    def __init__(self, program, folder, api):
        data = folder / "data"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = open(folder / "open-webui.log", "wb")
        own = {"DATA_DIR": str(data), "WEBUI_SECRET_KEY": secrets.token_hex(), "OPENAI_API_BASE_URL": api}
        self.process = subprocess.Popen(
            [os.path.abspath(program), "serve", "--host", "127.0.0.1", "--port", str(port)],
            cwd=data, env={**os.environ, **SETTINGS, **own}, stdout=self.log, stderr=subprocess.STDOUT,
        )

    def __enter__(self):
        try:
            until("Open WebUI answers", self.is_up, limit_s=START_LIMIT_S, pause_s=0.5)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            descendants = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(LIMIT_S)
            gone(descendants)
        self.log.close()

    def is_up(self):
        assert self.process.poll() is None, f"Open WebUI ended: see {self.log.name}"
        try:
            return urllib.request.urlopen(self.url + "/health", timeout=LIMIT_S).status == 200
        except urllib.error.URLError:
            return False


class Person:
    """Who sits before the browser."""

    def __init__(self, page, gateway, pictures):
        self.page, self.gateway, self.pictures, self.taken = page, gateway, pictures, 0

    def picture(self, name):
        self.taken += 1
        self.page.screenshot(str(self.pictures / f"{self.taken:02}-{name}.png"))

    def button(self, text):
        return f"[...document.querySelectorAll('button')].find(e => e.innerText.trim() === {json.dumps(text)})"

    def option(self, model):
        return f"document.querySelector('[role=option][data-value={json.dumps(model)}]')"

    def fill(self, field, text):
        self.page.click(f"document.getElementById({json.dumps(field)})")
        self.page.write_text(text)

    def answers(self):
        return self.page.evaluate(f"{ANSWERS}.length")

    def quiet(self):
        """Waits until Open WebUI has asked all that it asks by itself after an answer."""
        def still():
            seen, since = len(self.gateway.requests()), time.monotonic()
            while time.monotonic() < since + QUIET_S:
                if not self.gateway.at_rest() or len(self.gateway.requests()) != seen:
                    return False
                time.sleep(0.1)
            return True

        until("Open WebUI asks no more", still)

    def sign_up(self, url):
        self.page.open(url)
        self.page.click(self.button("Get started"))
        for field, text in [("name", "Ada"), ("email", "ada@example.com"), ("password", secrets.token_hex())]:
            self.fill(field, text)
        self.picture("sign-up")
        self.page.click(self.button("Create Admin Account"))
        self.page.click(self.button("Okay, Let's Go!"))
        self.page.until(SELECTOR)

    def choose(self, model):
        self.page.click(SELECTOR)
        self.page.until(self.option(model))
        self.picture("models")
        self.page.click(self.option(model))
        self.page.until(f"{SELECTOR}.innerText.includes({json.dumps(model)})")

    def ask(self, text, name):
        """Sends a message, and gives the different texts of the answer in the order in which they were shown."""
        before, streamed = self.answers(), self.streamed()
        self.page.click("document.getElementById('chat-input')")
        self.page.write_text(text)
        self.page.evaluate(f"""(() => {{
            window.seen = [];
            window.look = setInterval(() => {{
                const text = {ANSWERS}.length > {before} ? {LAST} : '';
                if (text && text !== window.seen[window.seen.length - 1]) window.seen.push(text);
            }}, 10);
        }})()""")
        self.page.press("Enter")
        self.page.until(f"{ANSWERS}.length > {before} && window.seen.length > 2", LIMIT_S)
        self.picture(f"{name}-streams")
        until("the answer is complete", lambda: self.streamed() > streamed, pause_s=0.1)
        self.quiet()
        self.picture(f"{name}-complete")
        return self.page.evaluate("(clearInterval(window.look), window.seen)")

    def stop(self):
        """Sends a message and stops the answer with the button for it."""
        before, cancelled = self.answers(), self.cancelled()
        self.page.click("document.getElementById('chat-input')")
        self.page.write_text(STORY)
        self.page.press("Enter")
        self.page.until(f"{ANSWERS}.length > {before} && ({LAST}).length > 0", LIMIT_S)
        self.page.click("document.querySelector('[aria-label=Stop]')")
        self.picture("stop")
        until("the gateway has seen the client leave", lambda: self.cancelled() > cancelled)
        self.quiet()
        self.picture("stopped")

    def cancelled(self):
        lines = self.gateway.get("/metrics").splitlines()
        return sum(int(line.split()[-1]) for line in lines if line.startswith("aitools_client_cancelled_total"))

    def streamed(self):
        return sum(event["tokens_per_second"] is not None for event in self.gateway.requests())

    def load(self, model):
        """What the button for it in the connection's settings calls."""
        self.page.evaluate(f"""fetch('/openai/models/0/load', {{
            method: 'POST',
            headers: {{ 'content-type': 'application/json', authorization: `Bearer ${{localStorage.token}}` }},
            body: JSON.stringify({{ model: {json.dumps(model)} }}),
        }}).then(answer => {{ if (!answer.ok) throw new Error(String(answer.status)); }})""")

    def eject(self, model):
        """Unloads a model with the button beside its name."""
        self.page.click(SELECTOR)
        self.page.hover(self.option(model))
        self.picture("loaded")
        self.page.click("document.querySelector('[aria-label=\"Eject model\"]')")
        self.page.until("document.body.innerText.includes('Model unloaded successfully')")
        self.page.until("!document.querySelector('[aria-label=\"Eject model\"]')")
        self.picture("unloaded")
        self.page.press("Escape")
        self.page.until("!document.querySelector('[role=option]')")


def use(person, gateway, url):
    person.sign_up(url)
    person.choose(CHAT)
    texts = person.ask("What is the capital of France?", "capital")
    assert "Paris" in texts[-1], texts[-1:]
    gateway.event("loaded", policy=CHAT)
    grows(person.ask(STORY, "story"))
    shown = person.page.evaluate(LAST)
    person.page.reload()
    person.page.until(f"{ANSWERS}.length === 2 && {LAST} === {json.dumps(shown)}")
    assert "Paris" in person.page.evaluate(f"{ANSWERS}[0].innerText")
    person.picture("reloaded")
    print("  signed up, chose a model, saw the answer stream in, and again after a reload", flush=True)
    # A new chat: the first answer in one is long.
    person.page.open(url)
    person.choose(CHAT)
    person.stop()
    print("  stopped an answer: the engine works no more", flush=True)
    person.eject(CHAT)
    gateway.event("unloaded", policy=CHAT)
    assert gateway.loaded() == []
    person.load(CHAT)
    gateway.event("loaded", policy=CHAT)
    print("  unloaded and loaded", flush=True)
    person.choose(BASE)
    grows(person.ask("Name three colours.", "other"))
    gateway.event("unloaded", policy=CHAT)
    gateway.event("loaded", policy=BASE)
    assert gateway.loaded() == [BASE]
    person.page.click(SELECTOR)
    person.page.until(f"{person.option(BASE)}.querySelector('[aria-label=\"Eject model\"]')")
    person.picture("swapped")
    print("  chose the other model: the gateway swapped engines", flush=True)
    failed = [event for event in gateway.requests() if event["status"] not in (200, 499)]
    assert not failed, failed


def grows(texts):
    lengths = [len(text) for text in texts]
    assert len(texts) >= STEPS and lengths == sorted(lengths), texts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", help="aitools")
    parser.add_argument("project", help="its folder, synced")
    parser.add_argument("webui", help="Open WebUI")
    parser.add_argument("folder", type=pathlib.Path, help="for Open WebUI's data, its log, and pictures")
    ask = parser.parse_args()
    pictures = ask.folder / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    with Gateway(ask.program, ask.project, "--max-loaded", "1", CHAT, BASE) as gateway:
        with OpenWebUi(ask.webui, ask.folder, gateway.api) as webui:
            with Page(find()) as page:
                page.size(1280, 900)
                person = Person(page, gateway, pictures)
                try:
                    use(person, gateway, webui.url)
                except Exception:
                    person.picture("failed")
                    raise
    print("  ended, and nothing is left of it", flush=True)


if __name__ == "__main__":
    main()
