"""`aitools serve` as a process: started, watched and ended."""

import json
import os
import queue
import signal
import subprocess
import threading
import time
import urllib.request

import psutil

# Seconds until a test gives up on something that usually takes a fraction of a second, or on the start of an engine.
LIMIT_S = 120

CHAT = "smollm2-135m-instruct"
BASE = "gemma-3-270m"
EMBEDDINGS = "smollm2-embeddings"
TOOLS = "smollm2-tools"
BROKEN = "cut-off"


def until(what, condition, limit_s=LIMIT_S, pause_s=0.02):
    """Waits until a condition holds, and gives its value."""
    end = time.monotonic() + limit_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"after {limit_s} s still not: {what}")
        time.sleep(pause_s)
    return value


class Gateway:
    """One server of a project. Leaving the `with` block ends it and checks that nothing is left of it."""

    def __init__(self, program, project, *options, env=None):
        command = [program, "-C", project, "serve", "--port", "0", "--json", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, **(env or {})}
        )
        self.seen = []
        self._events = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self.event("listening")["url"]
        self.api = self.url + "/v1"

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            descendants = self.descendants()
            self.process.send_signal(signal.SIGTERM)
            code = self.process.wait(LIMIT_S)
            if kind is None:
                assert code in (0, 130), f"`serve` ended with {code}"
                gone(descendants)

    def _read(self):
        for line in self.process.stdout:
            event = json.loads(line)
            self.seen.append(event)
            self._events.put(event)

    def event(self, name, **fields):
        """The next event of that name and with those fields; those before it are passed over."""
        while True:
            try:
                event = self._events.get(timeout=LIMIT_S)
            except queue.Empty:
                raise AssertionError(f"no event `{name}` {fields}; the last were {self.seen[-5:]}") from None
            if event.get("event") == name and all(event.get(key) == value for key, value in fields.items()):
                return event

    def requests(self):
        """The requests that have ended so far, oldest first."""
        return [event for event in list(self.seen) if event.get("event") == "request"]

    def counted(self, policy, code):
        """How many requests for a policy have ended with that status."""
        start = f'aitools_requests_total{{policy="{policy}",code="{code}"'
        return sum(int(line.split()[-1]) for line in self.get("/metrics").splitlines() if line.startswith(start))

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=LIMIT_S) as response:
            return response.read().decode()

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            return json.load(response)

    def status(self):
        return json.loads(self.get("/aitools/status"))

    def policy(self, name):
        return next(policy for policy in self.status()["policies"] if policy["name"] == name)

    def loaded(self):
        return sorted(policy["name"] for policy in self.status()["policies"] if policy["state"] == "loaded")

    def at_rest(self):
        """No request runs or waits."""
        status = self.status()
        return status["running"] == 0 and all(policy["waiting"] == 0 for policy in status["policies"])

    def rest(self):
        until("no request runs or waits", self.at_rest)

    def engine_idle(self, name):
        """Waits until the engine itself says that it works on nothing."""
        wanted = f'llamacpp:requests_processing{{policy="{name}"}} 0'
        # llama-server looks whether the client of a plain request is still there once it has sent nothing, metrics included,
        # to anybody for a second.
        until(f"the engine of {name} is idle", lambda: wanted in self.get("/metrics"), pause_s=1.5)

    def descendants(self):
        """Every process that the server has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def resident_bytes(self):
        return psutil.Process(self.process.pid).memory_info().rss

    def open_files(self):
        return psutil.Process(self.process.pid).num_fds()


def gone(processes):
    """Waits until these processes have ended, and gives how many seconds that took."""
    def ended(process):
        # One that has ended may wait for a parent that looks after it.
        try:
            return process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    began = time.monotonic()
    until(f"{processes} have ended", lambda: all(map(ended, processes)), limit_s=10)
    return time.monotonic() - began
