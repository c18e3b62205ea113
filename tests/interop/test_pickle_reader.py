"""Hostile pickles: nothing runs, nothing shared changes, and each is refused in one line within a second or so."""

import itertools
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import archives
import pytest
from archives import Storage, Tensor

from glm_jax.errors import UserError
from glm_jax.interop import torch_archive
from glm_jax.interop.torch_archive import read_archive

HEAD = pickle.PROTO + b"\x02"


def name(module: str, attribute: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()


def doubled(levels: int, both: bytes) -> bytes:
    """Make a value that holds the one before twice, `levels` deep: 2 ** levels parts in a few bytes each."""
    put = (pickle.BINPUT + bytes([level]) for level in itertools.count())
    parts = [pickle.EMPTY_TUPLE]
    for level, note in zip(range(levels), put, strict=False):
        parts.append(note + pickle.BINGET + bytes([level]) + both)
    return b"".join(parts)


def long_names() -> bytes:
    """A list of 300,000 parts below a key of 1 MB: whoever names each part copies 300 GB."""
    parts = pickle.NONE * 300_000
    inner = pickle.EMPTY_LIST + pickle.MARK + parts + pickle.APPENDS
    return pickle.EMPTY_DICT + text("x" * 2**20) + inner + pickle.SETITEM


REBUILD = name("torch._utils", "_rebuild_tensor_v2")
NOTE = pickle.EMPTY_DICT + text("names") + pickle.NONE + pickle.SETITEM
REFUSED = {
    "attributes of a dtype": (name("torch", "bfloat16") + NOTE + pickle.BUILD, "sets attributes"),
    "attributes of a storage type": (name("torch", "BFloat16Storage") + NOTE + pickle.BUILD, "sets attributes"),
    "attributes of a function": (REBUILD + NOTE + pickle.BUILD, "sets attributes"),
    "attributes of a class": (name("collections", "OrderedDict") + NOTE + pickle.BUILD, "sets attributes"),
    "a call of a dtype": (name("torch", "float32") + pickle.EMPTY_TUPLE + pickle.REDUCE, "a call"),
    "a new object": (name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.NEWOBJ, "NEWOBJ"),
    "an extension": (pickle.EXT1 + b"\x01", "EXT1"),
    "shared tuples": (doubled(40, pickle.TUPLE2), "parts"),
    "a nested tuple as a key": (
        pickle.EMPTY_DICT + doubled(60, pickle.TUPLE2) + pickle.NONE + pickle.SETITEM,
        "neither text nor a small number",
    ),
    "a list in itself": (pickle.EMPTY_LIST + pickle.BINPUT + b"\0" + pickle.BINGET + b"\0" + pickle.APPEND, "parts"),
    "a deep list": (pickle.EMPTY_LIST * 3000 + pickle.APPEND * 2999, "parts"),
    "many instructions": ((pickle.NONE + pickle.POP) * 600_000, "instructions"),
    "a large note": (pickle.EMPTY_DICT + pickle.LONG_BINPUT + b"\xff" * 4, ""),
    "a tensor of many axes": (
        REBUILD + pickle.MARK + pickle.NONE + pickle.BININT1 + b"\0"
        + 2 * (pickle.MARK + (pickle.BININT1 + b"\1") * 1000 + pickle.TUPLE) + pickle.TUPLE + pickle.REDUCE,
        "up to 32 sizes",
    ),
    "long names": (long_names(), ""),
}  # fmt: skip


@pytest.fixture
def measured() -> Iterator[None]:
    """Fail a test that takes more than 5 s of the processor."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 5


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_pickle_is_refused_in_one_line(case: str, tmp_path: Path, measured: None) -> None:
    body, words = REFUSED[case]
    archives.write(tmp_path / "a.pt", HEAD + body + pickle.STOP, {})
    try:
        read_archive(tmp_path / "a.pt")
    except UserError as error:
        assert words and words in str(error) and "\n" not in str(error)
    else:
        assert not words, "it was read"


def test_versions_of_modules_are_left_out(tmp_path: Path) -> None:
    body = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE + NOTE + pickle.BUILD
    archives.write(tmp_path / "a.pt", HEAD + body + pickle.STOP, {})
    assert read_archive(tmp_path / "a.pt") == {}


def test_a_compressed_pickle_is_not_unpacked(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w") as member,
    ):
        for _ in range(65):
            member.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"data\.pkl has 68157440 bytes, at most 67108864 are read"):
        read_archive(tmp_path / "a.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 2**10


def test_a_tensor_of_strides_0_cannot_ask_for_memory(tmp_path: Path) -> None:
    tree = {"module": {"a": Tensor(Storage("FloatStorage", "0", 1), 0, (2**40,), (0,))}}
    archives.write(tmp_path / "a.pt", archives.dump(tree), {"0": bytes(4)})
    with pytest.raises(UserError, match=r"module\.a needs"):
        read_archive(tmp_path / "a.pt")


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=r"Not a regular file|Is a directory"):
            read_archive(path)


def test_an_archive_of_many_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_archive, "MAX_MEMBERS", 3)
    archives.write(tmp_path / "a.pt", HEAD + pickle.NONE + pickle.STOP, {"0": b""})
    with pytest.raises(UserError, match="has 4 members, at most 3 are read"):
        read_archive(tmp_path / "a.pt")
