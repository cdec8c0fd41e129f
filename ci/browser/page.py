"""The page of `aitools serve` in a real browser: `page.py URL [--key KEY] [--pictures FOLDER]`

The server at URL serves one policy of a model that knows the capital of France, and it is not loaded. With a key, the server
needs that key. Everything is done with the keyboard. Exits with 0 when all is well, with 1 when not, and with 3 when no Chromium
is installed (Debian: `apt-get install chromium`).
"""

import argparse
import json
import pathlib
import sys

from chromium import Failed, Page, find

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
FACTS = "(document.querySelector('.turn:last-child .facts') || {}).textContent || ''"
SAID = "document.querySelector('.turn:last-child .said').textContent"
CARD = "document.querySelector('.card')"


def hold(condition, text):
    if not condition:
        raise Failed(text)


def give_key(page, key):
    page.until("document.getElementById('key-dialog').open")
    hold(page.evaluate("document.activeElement.id") == "key", "the field for the key has no focus")
    page.write_text("wrong-wrong-wrong-wrong")
    page.press("Enter")
    page.until("document.getElementById('key-wrong').textContent.includes('does not accept')")
    page.write_text(key)
    page.press("Enter")
    page.until("!document.getElementById('key-dialog').open")
    hold(page.evaluate("Object.keys(localStorage).length") == 0, "something is in the local storage")


def load(page):
    page.until(CARD)
    hold(page.evaluate(f"{CARD}.querySelector('.state').textContent") == "unloaded", "the engine is loaded already")
    page.tab_to("at.closest('.card') && at.textContent === 'Load'")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    hold(outline == "solid", f"the focus is not visible: outline {outline}")
    page.press("Enter")
    page.until(f"{CARD}.querySelector('.state').textContent === 'loaded'", patience=120)
    hold(page.evaluate("document.activeElement.textContent") == "Unload", "the button has lost the focus")
    for kind in ["policy", "weights", "engine"]:
        title = page.evaluate(f"document.querySelector('[data-part=\"{kind}-short\"]').title")
        hold(len(title.replace("sha256:", "")) == 64, f"the digest of {kind} is {title!r}")


def chat(page):
    page.tab_to("at.id === 'prompt'")
    page.write_text("What is the capital of France?")
    page.press("Enter")
    page.until(f"/ tokens?, /.test({FACTS})", patience=120)
    hold("Paris" in page.evaluate(SAID), f"the answer is {page.evaluate(SAID)!r}")
    hold(page.evaluate("document.querySelector('[role=log]').getAttribute('aria-live')") == "polite", "the answer is not live")
    page.write_text("Count from one to one thousand in words.")
    page.press("Enter")
    page.until(f"{SAID}.length > 0", patience=120)
    page.press("Escape")
    page.until(f"{FACTS}.startsWith('Stopped')")
    page.until("document.getElementById('running').textContent === '0'")


def stays_text(page):
    page.write_text(HOSTILE)
    page.press("Enter")
    page.until(f"/ tokens?|Stopped|Error/.test({FACTS})", patience=120)
    shown = page.evaluate("[...document.querySelectorAll('.turn.user .said')].pop().textContent")
    hold(shown == HOSTILE, f"the message is shown as {shown!r}")
    hold(page.evaluate("document.querySelectorAll('img, iframe, object').length") == 0, "text has become HTML")
    refused = page.evaluate("(() => { try { document.body.innerHTML = '<b>x</b>'; return ''; } catch (e) { return e.name; } })()")
    hold(refused == "TypeError", "the page can turn text into HTML")
    page.evaluate("document.head.append(Object.assign(document.createElement('style'), { textContent: 'body { opacity: 0 }' }))")
    hold(page.evaluate("getComputedStyle(document.body).opacity") == "1", "the page accepts other styles")
    hold(page.evaluate("document.title") == "aitools", "foreign code ran")


def stays_put(page):
    """Nothing moves while the numbers change each second."""
    polls = "performance.getEntriesByType('resource').filter(e => e.name.endsWith('/aitools/status')).length"
    page.evaluate(
        "window.moved = 0; performance.setResourceTimingBufferSize(5000);"
        "new PerformanceObserver(list => { for (const e of list.getEntries()) window.moved += e.value; })"
        ".observe({ type: 'layout-shift' }); null"
    )
    seen = page.evaluate(polls)
    page.until(f"{polls} >= {seen + 4}")
    moved = page.evaluate("window.moved")
    hold(moved == 0, f"the layout shifted by {moved}")


def fits(page, width):
    wide = page.evaluate("document.documentElement.scrollWidth")
    hold(wide <= width, f"the page is {wide} pixels wide in a window of {width}")


def check(page, url, key, pictures):
    page.size(1200, 900)
    page.open(url)
    if key:
        give_key(page, key)
    load(page)
    chat(page)
    stays_put(page)
    foreign = [address for address in page.addresses() if not address.startswith(url)]
    hold(not foreign, f"the page asks other addresses: {foreign}")
    # A key that is refused is a failed request, which the browser notes.
    complaints = [text for text in page.complaints() if not (key and "401" in text)]
    hold(not complaints, f"the browser complains: {complaints}")
    for width, height in [(1200, 900), (400, 860)]:
        for dark in [False, True]:
            page.size(width, height, dark)
            fits(page, width)
            if pictures:
                name = f"page-{width}-{'dark' if dark else 'light'}.png"
                page.screenshot(str(pathlib.Path(pictures) / name), whole=width < 600)
    # Last: this provokes complaints.
    stays_text(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the page, with a slash at its end")
    parser.add_argument("--key", help="the API key that the server needs")
    parser.add_argument("--pictures", help="a folder for screenshots")
    asked = parser.parse_args()
    program = find()
    if program is None:
        print("no Chromium is installed\n  hint: on Debian, run `apt-get install chromium`", file=sys.stderr)
        return 3
    try:
        with Page(program) as page:
            check(page, asked.url, asked.key, asked.pictures)
    except Failed as failed:
        print(f"the page at {json.dumps(asked.url)} fails in {program}: {failed}", file=sys.stderr)
        return 1
    print("the page works in a browser: load, chat, stop; nothing is asked elsewhere, nothing moves, text stays text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
