"""A headless Chromium, driven through its debugging pipe: https://chromedevtools.github.io/devtools-protocol/

Needs Chromium and Python's standard library, nothing else. Messages are JSON texts that end with a zero byte, on the file
descriptors 3 and 4 of the browser (`--remote-debugging-pipe`). For Linux and macOS.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]


def find():
    """The browser's path, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Failed(Exception):
    """The browser, or the page in it, did not do what was asked."""


class Page:
    """One tab of a browser of its own."""

    def __init__(self, program):
        self.profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        to_browser, self.write = os.pipe()
        self.read, from_browser = os.pipe()
        command = [
            program, "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--no-sandbox",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
            f"--user-data-dir={self.profile.name}", "about:blank",
        ]

        def become_browser():
            # The pipes may have these numbers already, so they move out of the way first.
            incoming, outgoing = os.dup(to_browser), os.dup(from_browser)
            os.dup2(incoming, 3)
            os.dup2(outgoing, 4)

        self.process = subprocess.Popen(
            command, pass_fds=(3, 4, to_browser, from_browser), preexec_fn=become_browser,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.held = b""
        self.number = 0
        self.session = None
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ["Page", "Runtime", "Log", "Network"]:
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)
        self.profile.cleanup()

    def _message(self, deadline):
        while b"\0" not in self.held:
            ready, _, _ = select.select([self.read], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.read, 1 << 16) if ready else b""
            if not data:
                raise Failed("the browser has ended" if ready else "the browser did not answer in time")
            self.held += data
        text, self.held = self.held.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, patience=60, **params):
        """Calls a method of the protocol. Events that come meanwhile are kept in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + patience
        while True:
            answer = self._message(deadline)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise Failed(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def evaluate(self, expression, patience=60):
        """The value of an expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", patience, expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise Failed(f"{expression[:200]}: {details.get('exception', {}).get('description', details['text'])}")
        return answer["result"].get("value")

    def until(self, condition, patience=60):
        """Waits until a condition holds in the page."""
        expression = f"""new Promise((resolve, reject) => {{
            const end = performance.now() + {patience * 1000};
            const look = () => {{
                if ({condition}) resolve(true);
                else if (performance.now() > end) reject(new Error("did not become true: " + {json.dumps(condition)}));
                else setTimeout(look, 20);
            }};
            look();
        }})"""
        answer = self.call("Runtime.evaluate", patience + 30, expression=expression, awaitPromise=True)
        if "exceptionDetails" in answer:
            text = self.evaluate("document.body.innerText")
            raise Failed(f"{answer['exceptionDetails']['exception']['description']}\nthe page shows:\n{text}")

    def open(self, url):
        """Opens a page and waits until it is parsed."""
        answer = self.call("Page.navigate", url=url)
        if "errorText" in answer:
            raise Failed(f"{url}: {answer['errorText']}")
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def size(self, width, height, dark=False):
        """The size of the window in pixels, and the colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key, text=None, modifiers=0):
        """Presses a key, as a keyboard does. Modifiers: 8 is Shift."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}[key]
        text = {"Enter": "\r", " ": " "}.get(key) if text is None else text
        common = {"key": key, "code": key if key != " " else "Space", "windowsVirtualKeyCode": code, "modifiers": modifiers}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **down, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def write_text(self, text):
        """Types text into what has the focus."""
        self.call("Input.insertText", text=text)

    def tab_to(self, condition, most=40):
        """Presses Tab until a condition about `document.activeElement` (`at`) holds."""
        for _ in range(most):
            self.press("Tab")
            if self.evaluate(f"(at => Boolean({condition}))(document.activeElement)"):
                return
        raise Failed(f"not reached with {most} presses of Tab: {condition}")

    def hover(self, element, patience=60):
        """Moves the mouse to the middle of an element, once it is there, stands still, and nothing covers it."""
        place = f"""new Promise((resolve, reject) => {{
            const end = performance.now() + {patience * 1000};
            let last = "";
            const look = () => {{
                const element = {element};
                if (element) {{
                    element.scrollIntoView({{ block: "nearest" }});
                    const box = element.getBoundingClientRect();
                    const at = [box.x + box.width / 2, box.y + box.height / 2];
                    const top = document.elementFromPoint(...at);
                    if (last === String(at) && top && (element.contains(top) || top.contains(element))) return resolve(at);
                    last = String(at);
                }}
                if (performance.now() > end) reject(new Error("is not there, moves or is covered"));
                else setTimeout(look, 100);
            }};
            look();
        }})"""
        x, y = self.evaluate(place, patience + 30)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return {"x": x, "y": y}

    def click(self, element, patience=60):
        """Clicks with the mouse in the middle of an element."""
        at = self.hover(element, patience)
        self.call("Input.dispatchMouseEvent", type="mousePressed", button="left", clickCount=1, **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **at)

    def reload(self, patience=60):
        """Opens the same page once more, as F5 does."""
        seen, deadline = len(self.events), time.monotonic() + patience
        self.call("Page.reload")
        while not any(event["method"] == "Page.loadEventFired" for event in self.events[seen:]):
            message = self._message(deadline)
            if "method" in message:
                self.events.append(message)

    def screenshot(self, file, whole=False):
        """A picture of the window, or of the whole page, as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        with open(file, "wb") as out:
            out.write(base64.b64decode(data))

    def complaints(self):
        """What the browser complained about so far: errors, exceptions, and what the content security policy refused."""
        found = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['text']} ({params['entry'].get('url', '')})")
        return found

    def addresses(self):
        """The addresses of all requests so far."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]


if __name__ == "__main__":
    # Whether one is installed.
    raise SystemExit(0 if find() else 3)
