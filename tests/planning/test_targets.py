"""What can be compiled for, by name."""

from pathlib import Path

import pytest

from glm_jax.errors import UserError
from glm_jax.planning import targets

BARE = '[mine]\nkinds = ["Accelerator 1"]\npeak = 1e12\nmemory = 8e9\nbandwidth = 1e11\nlink = 1e10\nsource = "hand"\n'


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every compiler look as if it were installed."""
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("installed")
def test_memory_is_that_of_programs() -> None:
    assert targets.find("cpu").memory is None
    assert targets.find("a100-40gb").memory == 31_748_259_840  # XLA's pool, 0.75 of 42,331,013,120
    assert targets.find("v5p:8x8x12").memory == 95 * 2**30


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "name, says",
    [
        ("a100", "no device is named 'a100': there are a100-40gb, "),
        ("v5p", "TPUs are named with their slice, such as v5p:2x2"),
        ("v5p:8by8", "TPUs are named with their slice, such as v5p:2x2"),
        ("v5p:0x4", "TPUs are named with their slice, such as v5p:2x2"),
        ("a100-40gb:8", "a GPU has no slice, write a100-40gb"),
        ("mine", "mine has neither gpu nor topology in its sheet"),
    ],
)
def test_other_names_are_refused(tmp_path: Path, name: str, says: str) -> None:
    sheet = tmp_path / "mine.toml"
    sheet.write_text(BARE)
    with pytest.raises(UserError, match=says):
        targets.find(name, sheet)


def test_slices_are_read_without_a_compiler() -> None:
    sizes = [targets.find(name, compiled=False).slice_devices for name in ("v5p:8x8x12", "v5p", "a100-40gb", "cpu")]
    assert sizes == [768, None, None, None]
    for name in ("v5p:8by8", "a100-40gb:8"):
        with pytest.raises(UserError, match="slice"):
            targets.find(name, compiled=False)


@pytest.mark.parametrize("name, extra", [("a100-40gb", "cuda-aot"), ("v5e:2x2", "tpu-aot")])
def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"--target {name} needs .*: pip install -e '.\[{extra}\]'"):
        targets.find(name)


@pytest.mark.parametrize("text, size", [("40GB", 40_000_000_000), ("31.75 GB", 31_750_000_000), ("16GiB", 16 * 2**30)])
def test_memory_has_a_unit(text: str, size: int) -> None:
    assert targets.memory(text) == size


@pytest.mark.parametrize("text", ["40", "40Gb", "-1GB", "0GB", "GB", "1e9", "nanGB"])
def test_memory_without_one_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write bytes a device with their unit, such as 40GB or 32GiB"):
        targets.memory(text)
