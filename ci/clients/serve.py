"""Drives `aitools serve` with official clients: see `cargo ci e2e serve`."""

import argparse
import subprocess
import sys
import time

import api
import browser
import load
from gateway import CHAT, EMBEDDINGS, LIMIT_S, Gateway


def node(folder):
    """OpenAI's client for Node, which is installed in that folder."""

    def node(gateway):
        script = api.__file__.replace("api.py", "openai.mjs")
        subprocess.run(["node", script, folder, gateway.api, CHAT, EMBEDDINGS], check=True, timeout=LIMIT_S)
        gateway.rest()
        gateway.engine_idle(CHAT)

    return node


def run(check, *arguments):
    began = time.monotonic()
    check(*arguments)
    print(f"  {check.__name__.replace('_', ' ')}: passed in {time.monotonic() - began:.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", help="aitools")
    parser.add_argument("project", help="its folder, synced")
    parser.add_argument("names", nargs="*", help="which checks; all when not given")
    parser.add_argument("--node", metavar="FOLDER", help="where OpenAI's client for Node is installed")
    ask = parser.parse_intermixed_args()
    shared = api.ALL + ([node(ask.node)] if ask.node else []) + load.ON_ONE
    own = browser.ALL + load.OWN
    unknown = set(ask.names) - {check.__name__ for check in shared + own}
    if unknown:
        sys.exit(f"there is no check {', '.join(sorted(unknown))}")
    chosen = lambda checks: [check for check in checks if not ask.names or check.__name__ in ask.names]
    if checks := chosen(shared):
        with Gateway(ask.program, ask.project) as gateway:
            for check in checks:
                run(check, gateway)
    for check in chosen(own):
        run(check, ask.program, ask.project)


if __name__ == "__main__":
    main()
