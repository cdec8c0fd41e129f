"""The page of `aitools serve` in a real browser: `ci/browser/page.py`, once without an API key and once with one."""

import os
import pathlib
import subprocess
import sys

from gateway import CHAT, LIMIT_S, Gateway

PAGE = pathlib.Path(__file__).parents[1] / "browser/page.py"
# What `page.py` ends with where no Chromium is installed.
NO_BROWSER = 3


def page(program, project):
    """A person loads an engine and talks to it, with the keyboard alone; pictures stay in `pictures`."""
    pictures = pathlib.Path(project).parent / "pictures"
    os.makedirs(pictures, exist_ok=True)
    for key in [None, "0123456789abcdef"]:
        with Gateway(program, project, CHAT, env={"AITOOLS_API_KEY": key} if key else None) as gateway:
            command = [sys.executable, PAGE, gateway.url + "/", "--pictures", pictures]
            ended = subprocess.run(command + (["--key", key] if key else []), timeout=5 * LIMIT_S)
            if ended.returncode == NO_BROWSER:
                print("    not tried, because no Chromium is here")
                return
            assert ended.returncode == 0, f"`page.py` ended with {ended.returncode}"


ALL = [page]
