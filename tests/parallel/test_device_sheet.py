"""The sheet of accelerators, and files that users add to it."""

from pathlib import Path

import pytest

from glm_jax.errors import UserError
from glm_jax.parallel import device_sheet

# as a user would write one: no link beyond the node, no power, no compiler
MINE = """
[mine]
kinds = ["Accelerator 1"]
peak = 1e12
memory = 8e9
bandwidth = 1e11
link = 1e10
source = "hand"
"""


def test_each_kind_that_jax_names_is_found() -> None:
    kinds = {
        "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200", "NVIDIA B200": "b200", "Tesla V100-SXM2-32GB": "v100-32gb",
        "NVIDIA GeForce RTX 3090": "rtx3090", "NVIDIA GeForce RTX 4090": "rtx4090", "TPU v4": "v4",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    }  # fmt: skip
    found = {kind: device_sheet.of_kind(kind) for kind in kinds}
    assert {kind: device.name for kind, device in found.items() if device} == kinds
    assert set(kinds.values()) == set(device_sheet.sheet())
    assert device_sheet.of_kind("cpu") is None


def test_numbers_of_two_data_sheets() -> None:
    a100, v5p = device_sheet.find("a100-40gb"), device_sheet.find("v5p")
    assert (a100.peak, a100.bandwidth, a100.watts, a100.node) == (312e12, 1555e9, 400, 8)
    assert a100.gpu and a100.gpu.capability == (8, 0) and a100.gpu.cores == 108
    assert (v5p.peak, v5p.memory, v5p.topology, v5p.gpu, v5p.node) == (459e12, 95 * 2**30, "v5p", None, None)


def test_a_file_adds_a_device_and_may_replace_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE + MINE.replace("[mine]", "[v4]"))
    assert device_sheet.find("mine", path).memory == 8_000_000_000
    assert device_sheet.find("v4", path).peak == 1e12 and device_sheet.find("v4").peak == 275e12
    with pytest.raises(UserError, match=r"no device is named 'mine': there are a100-40gb, .*v6e, or add one"):
        device_sheet.find("mine")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("peak = 1e12\n", "", r"mine.toml: \[mine\] lacks peak"),
        ("peak = 1e12", "peak = 0", r"\[mine\] peak must be a positive number, not 0"),
        ("peak = 1e12", "peak = nan", r"\[mine\] peak must be a positive number, not nan"),
        ("peak = 1e12", "peak = true", r"\[mine\] peak must be a number, not True"),
        ("memory = 8e9", 'memory = "8 GB"', r"\[mine\] memory must be a number, not '8 GB'"),
        ("kinds = [", "kind = [", r"\[mine\] has 'kind', which no device has: name, kinds, "),
        ('["Accelerator 1"]', "[1]", r"\[mine\] kinds must be texts"),
        ("[mine]", "[mine", r"mine.toml: not TOML"),
        ('source = "hand"', 'source = "hand"\ngpu = { name = "x" }', r"\[mine.gpu\] lacks capability"),
        ("[mine]", "mine = 3", r"\[mine\] must be a table of numbers"),
    ],
)
def test_wrong_files_name_the_entry_and_the_number(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace(old, new))
    with pytest.raises(UserError, match=says):
        device_sheet.sheet(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.toml: cannot be read"):
        device_sheet.sheet(tmp_path / "absent.toml")
