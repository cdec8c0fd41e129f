"""Asks the package index that this machine's pip is set up for; run by `aitools` as `python - COMMAND ...`.

    list NAME VERSION
        {"files": [{"name", "size", "sha256", "yanked"}], "versions": [...]}
    fetch NAME VERSION FILE SHA256 SIZE DEST
        {"done": bytes} now and then, and {"fetched": bytes} at the end; DEST is continued when it has a part already.

Either may answer {"error": KIND, "why": TEXT} instead. One JSON value a line. No package code runs, and nothing
written here names an index: addresses carry credentials. So no exception's own text is passed on, only its type.

pip (20.1 to 26) brings the session: certificates, proxy, netrc, keyring, credentials and client certificate as set up
for it. The protocol is the Simple API (https://packaging.python.org/en/latest/specifications/simple-repository-api/).
"""
import sys

sys.path[:] = [folder for folder in sys.path if folder]  # nothing is imported from the current folder

import errno
import hashlib
import json
import logging
import os
import re
import time
import warnings
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import pathname2url, url2pathname

JSON_TYPE = "application/vnd.pypi.simple.v1+json"
ACCEPT = JSON_TYPE + ", application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
MAX_PAGE = 128 << 20
MAX_FILES = 2000
MAX_ATTEMPTS = 5
CHUNK = 1 << 18


class Failure(Exception):
    def __init__(self, kind, why):
        Exception.__init__(self, why)
        self.kind, self.why = kind, why


def say(**value):
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def cause(error):
    """What went wrong, without the error's own words: those name the index."""
    seen, names, todo = set(), [], [error]
    while todo and len(seen) < 20:
        error = todo.pop(0)
        if id(error) in seen or not isinstance(error, BaseException):
            continue
        seen.add(id(error))
        names.append(type(error).__name__)
        status = re.search(r"too many (\d{3}) error responses", str(error))
        if status:
            return "it keeps answering with status " + status.group(1)
        code = getattr(error, "errno", None)
        if isinstance(code, int) and code in errno.errorcode:
            names.append(errno.errorcode[code])
        todo += [error.__cause__, error.__context__, getattr(error, "reason", None)]
        todo += [arg for arg in error.args if isinstance(arg, BaseException)]
    for name, words in (
        ("ProxyError", "the proxy does not let it through"),
        ("SSLError", "its TLS certificate or protocol was not accepted"),
        ("SSLCertVerificationError", "its TLS certificate was not accepted"),
        ("NameResolutionError", "its name does not resolve"),
        ("gaierror", "its name does not resolve"),
        ("ECONNREFUSED", "it refuses connections"),
        ("ENOSPC", "no space is left on this machine"),
        ("ENETUNREACH", "the network cannot be reached"),
        ("ConnectTimeoutError", "it did not answer in time"),
        ("ReadTimeoutError", "it stopped answering"),
        ("timeout", "it did not answer in time"),
        ("TimeoutError", "it did not answer in time"),
        ("ECONNRESET", "it closed the connection"),
        ("RemoteDisconnected", "it closed the connection"),
        ("IncompleteRead", "it closed the connection"),
        ("TooManyRedirects", "it redirects in circles"),
    ):
        if name in names:
            return words
    return "the request failed (" + ", ".join(names[:6]) + ")"


class Pip:
    """pip's options and session: indexes in the order in which pip asks them."""

    def __init__(self):
        try:
            import pip
        except ImportError:
            raise Failure("no-pip", "it has no pip")
        self.version = getattr(pip, "__version__", "?")
        try:
            from pip._internal.commands import create_command

            command = create_command("download")
            options, _ = command.parse_args([])
            options.cache_dir = None  # what is fetched is kept by `aitools`
            self.session = command._build_session(options)
            self.indexes = [] if options.no_index else [options.index_url] + list(options.extra_index_urls or [])
            self.folders = list(options.find_links or [])
        except Exception as error:
            raise Failure("no-pip", "pip %s works otherwise than expected (%s)" % (self.version, type(error).__name__))
        auth = getattr(self.session, "auth", None)
        if hasattr(auth, "_prompt_for_password"):  # keyring and netrc yes, questions no
            auth._prompt_for_password = lambda netloc: (None, None, False)

    def get(self, address, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers.setdefault("Accept-Encoding", "identity")
        try:
            return self.session.get(address, headers=headers, stream=True)
        except Exception as error:
            raise Failure("network", cause(error))


def refuse(status):
    if status in (401, 403, 407):
        raise Failure("denied", "it answers with status %d: it wants other credentials" % status)
    if status >= 400:
        raise Failure("network", "it answers with status %d" % status)


def chunks(response):
    """The body as it comes. The name of the exception that a broken connection gives differs between versions."""
    raw = response.raw
    try:
        if hasattr(raw, "stream"):
            for chunk in raw.stream(CHUNK, decode_content=False):
                yield chunk
        else:
            for chunk in iter(lambda: raw.read(CHUNK), b""):
                yield chunk
    except Exception as error:
        raise Failure("network", cause(error))


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def same_version(one, other):
    def key(text):
        text = text.strip().lower()
        try:
            from pip._vendor.packaging.version import Version

            return str(Version(text))
        except Exception:
            return text

    one, other = key(one), key(other)
    strip = lambda text: re.sub(r"^(\d+(?:\.\d+)*?)(?:\.0)+(?![.\d])", r"\1", text)
    return strip(one) == strip(other)


def version_of(filename, project):
    """The version in the name of a wheel or sdist of `project`; None for anything else."""
    if filename.endswith(".whl"):
        parts = filename[:-4].split("-")
        fits = len(parts) in (5, 6) and normalised(parts[0]) == project
        return parts[1].replace("_", "-") if fits else None
    for ending in (".tar.gz", ".zip", ".tar.bz2", ".tar.xz", ".tgz"):
        if filename.endswith(ending):
            stem = filename[: -len(ending)]
            for at in (match.start() for match in re.finditer("-", stem)):
                if normalised(stem[:at]) == project:
                    return stem[at + 1 :]
    return None


class Anchors(HTMLParser):
    def __init__(self):
        HTMLParser.__init__(self)
        self.base, self.found = None, []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "base" and attrs.get("href") and self.base is None:
            self.base = attrs["href"]
        if tag == "a" and attrs.get("href"):
            yanked = (attrs["data-yanked"] or True) if "data-yanked" in attrs else False
            self.found.append((attrs["href"], yanked))


def from_html(text, address):
    parser = Anchors()
    parser.feed(text)
    base = urljoin(address, parser.base or "")
    for href, yanked in parser.found:
        target = urljoin(base, href)
        parts = urlsplit(target)
        digest = re.match(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
        yield {
            "name": unquote(parts.path.rsplit("/", 1)[-1]),
            "url": target.split("#")[0],
            "sha256": digest.group(1).lower() if digest else None,
            "size": None,
            "yanked": yanked,
        }


def from_json(text, address):
    for item in json.loads(text)["files"]:
        digest = (item.get("hashes") or {}).get("sha256")
        size = item.get("size")
        yield {
            "name": str(item["filename"]),
            "url": urljoin(address, str(item["url"]).split("#")[0]),
            "sha256": digest.lower() if isinstance(digest, str) else None,
            "size": size if isinstance(size, int) and size >= 0 else None,
            "yanked": item.get("yanked") or False,
        }


def from_folder(folder):
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            yield {"name": name, "url": None, "path": path, "sha256": None, "size": os.path.getsize(path), "yanked": False}


def page(pip, address, project):
    """The files that one page lists; None where the index does not know the project."""
    response = pip.get(address, Accept=ACCEPT, Cache_Control="max-age=0", Accept_Encoding="gzip, identity")
    if response.status_code in (404, 410):
        return None
    refuse(response.status_code)
    text = b""
    try:
        for chunk in response.iter_content(CHUNK):
            text += chunk
            if len(text) > MAX_PAGE:
                raise Failure("network", "its page is larger than %d bytes" % MAX_PAGE)
    except Failure:
        raise
    except Exception as error:
        raise Failure("network", cause(error))
    kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    local = urlsplit(address).scheme == "file"
    try:
        text = text.decode("utf-8", "replace")
        if kind == JSON_TYPE:
            found = list(from_json(text, response.url))
        elif local or kind in ("text/html", "application/vnd.pypi.simple.v1+html"):
            found = list(from_html(text, response.url))
        else:
            raise Failure("network", "it answers with `%s`, which is no index page" % re.sub(r"[^a-z0-9.+/-]", "", kind))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Failure("network", "it answers with a damaged index page")
    allowed = ("http", "https", "file") if local else ("http", "https")
    return [entry for entry in found if urlsplit(entry["url"]).scheme in allowed and version_of(entry["name"], project)]


def local_path(address):
    parts = urlsplit(address)
    if parts.scheme == "file":
        return url2pathname(parts.path)
    # A drive letter looks like a scheme.
    return address if len(parts.scheme) < 2 else None


def listing(pip, link, project, is_index):
    """What one index, or one `find-links` page or folder, has of the project."""
    folder = local_path(link)
    if folder is None:
        return page(pip, link.rstrip("/") + "/" + project + "/" if is_index else link, project)
    if is_index:
        folder = os.path.join(folder, project)
    index = os.path.join(folder, "index.html")
    if is_index and os.path.isfile(index):
        folder = index
    if os.path.isfile(folder):
        return page(pip, "file://" + pathname2url(os.path.abspath(folder)), project)
    return list(from_folder(folder)) if os.path.isdir(folder) else None


def everything(pip, name, strict):
    """Every file of the project by name, the first index's first.

    `strict`: an index that fails is an error, as what is locked must not depend on which index is up today.
    Otherwise the others may still have the file, whose digest is known.
    """
    project, problem, found = normalised(name), None, {}
    links = [(link, True) for link in pip.indexes] + [(link, False) for link in pip.folders]
    for link, is_index in links:
        try:
            entries = listing(pip, link, project, is_index)
        except Failure as failure:
            if strict:
                raise
            problem = problem or failure
            continue
        for entry in entries or []:
            entry["version"] = version_of(entry["name"], project)
            if entry["version"]:
                found.setdefault(entry["name"], []).append(entry)
    if problem and not found:
        raise problem
    if not found:
        raise Failure("no-project", "no index that pip is set up for has it")
    return found


def list_version(name, version):
    pip = Pip()
    found = everything(pip, name, True)
    files = []
    for filename in sorted(found):
        entry = found[filename][0]
        if not same_version(entry["version"], version):
            continue
        if len(files) >= MAX_FILES:
            raise Failure("network", "it lists more than %d files for one version" % MAX_FILES)
        if entry.get("path"):
            entry["sha256"] = digest_of(entry["path"])
        elif entry["size"] is None:
            entry["size"] = size_of(pip, entry["url"])
        files.append({key: entry[key] for key in ("name", "size", "sha256", "yanked")})
    versions = sorted({entry["version"] for entries in found.values() for entry in entries}, key=order)
    say(files=files, versions=versions[-500:])


def order(version):
    return [(0, int(part), "") if part.isdigit() else (-1, 0, part) for part in re.split(r"[.\-+]|(?<=\d)(?=[a-z])", version)]


def digest_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def size_of(pip, address):
    try:
        response = pip.session.head(address, headers={"Accept-Encoding": "identity"}, allow_redirects=True)
    except Exception as error:
        raise Failure("network", cause(error))
    refuse(response.status_code)
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def fetch(name, version, filename, sha256, size, dest):
    pip = Pip()
    entries = [entry for entry in everything(pip, name, False).get(filename, []) if same_version(entry["version"], version)]
    if not entries:
        raise Failure("no-file", "no index that pip is set up for has it")
    named = [entry for entry in entries if entry["sha256"] == sha256]
    entry = (named or entries)[0]
    size = int(size)
    if entry.get("path"):
        copy(entry["path"], dest, size)
    else:
        download(pip, entry["url"], dest, size)
    say(fetched=os.path.getsize(dest))


def copy(path, dest, limit):
    with open(path, "rb") as source, open(dest, "wb") as target:
        for chunk in iter(lambda: source.read(CHUNK), b""):
            target.write(chunk)
            if target.tell() > limit:
                return


def download(pip, address, dest, size):
    """Appends until `dest` has `size` bytes or the server has no more. More than `size` is never asked for."""
    failure = None
    for attempt in range(MAX_ATTEMPTS):
        have = os.path.getsize(dest) if os.path.exists(dest) else 0
        if have >= size and have > 0:
            return
        if attempt:
            time.sleep(min(0.2 * 2**attempt, 5))
        response = pip.get(address, **({"Range": "bytes=%d-" % have} if have else {}))
        if have and response.status_code == 416:
            os.remove(dest)
            continue
        refuse(response.status_code)
        expected = "bytes %d-" % have
        resumed = have and response.status_code == 206 and response.headers.get("Content-Range", "").startswith(expected)
        if have and response.status_code == 206 and not resumed:
            os.remove(dest)
            continue
        try:
            receive(response, dest, have if resumed else 0, size)
        except Failure as error:
            failure = error
            continue
        if os.path.getsize(dest) >= size or "Content-Length" not in response.headers:
            return
        length = response.headers["Content-Length"]
        if length.isdigit() and os.path.getsize(dest) >= (have if resumed else 0) + int(length):
            return  # the server means it: the caller will say that the size is wrong
        failure = Failure("network", "it closed the connection")
    raise failure or Failure("network", "it does not deliver the whole file")


def receive(response, dest, have, size):
    told = 0.0
    with open(dest, "ab" if have else "wb") as target:
        for chunk in chunks(response):
            target.write(chunk)
            have += len(chunk)
            if have > size:
                return
            if time.time() - told > 0.1:
                told = time.time()
                say(done=have)


def main(arguments):
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    command, rest = arguments[0], arguments[1:]
    try:
        {"list": list_version, "fetch": fetch}[command](*rest)
    except Failure as failure:
        say(error=failure.kind, why=failure.why)
    except (IOError, OSError) as error:
        say(error="machine", why=cause(error))


main(sys.argv[1:])
