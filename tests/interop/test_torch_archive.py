"""The .pt container: what is written reads back, regions are right, and a bad file gives one clear line."""

import collections
import os
import pickle
import pickletools
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import archives
import numpy as np
import pytest
from archives import Storage, Tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.errors import UserError
from glm_jax.interop import torch_archive
from glm_jax.interop.torch_archive import StoredTensor, TensorStream, read_archive, write_archive

GOLDEN = Path(__file__).parent.parent / "goldens/glm130b/ckpt_tp1/1000/mp_rank_00_model_states.pt"
DTYPES = [dtype for _, dtype in torch_archive.DTYPES.values()]


def stream(array: np.ndarray, rows: int = 1) -> TensorStream:
    """Stream an array in chunks of `rows` rows."""
    chunks = [array[start : start + rows] for start in range(0, len(array), rows)] if array.ndim else [array]
    return TensorStream(array.shape, array.dtype, chunks)


def line(path: Path) -> str:
    """Read a bad archive and give the message; it must be one line that names the file."""
    with pytest.raises(UserError) as caught:
        read_archive(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        f"{dtype.name} {shape}": (random.standard_normal(shape) * 50).astype(dtype)
        for dtype in DTYPES
        for shape in [(), (0,), (5,), (7, 3), (2, 3, 4)]
    }
    write_archive(tmp_path / "a.pt", "module", {name: stream(array) for name, array in arrays.items()})
    assert os.listdir(tmp_path) == ["a.pt"]
    read = read_archive(tmp_path / "a.pt")["module"]
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name].read(), array)
        assert read[name].offset % 64 == 0


def test_the_archive_is_one_that_torch_writes(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    write_archive(path, "module", {"a": stream(np.arange(6, dtype=np.float32)), "b": stream(np.zeros(2, np.int8))})
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(GOLDEN) as theirs:
        assert ours.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in ours.infolist())
        of_newer_torch = {".format_version", ".storage_alignment"}
        expected = {name for name in theirs.namelist() if name.split("/", 1)[1] not in of_newer_torch}
        numbered = {name for name in expected if "/data/" in name}
        assert set(ours.namelist()) == expected - numbered | {f"{path.stem}/data/{key}" for key in (0, 1)}
        assert ours.read(f"{path.stem}/version") == theirs.read(f"{path.stem}/version")
        digits = ours.read(f"{path.stem}/.data/serialization_id")
        assert digits.isdigit() and len(digits) == 40
    ops = {opcode.name for opcode, _, _ in pickletools.genops(read_index(path))}
    assert ops <= {"PROTO", "EMPTY_DICT", "MARK", "BINUNICODE", "GLOBAL", "BINPERSID", "BININT", "TUPLE", "NEWFALSE",
                   "EMPTY_TUPLE", "REDUCE", "SETITEMS", "SETITEM", "STOP"}  # fmt: skip


def read_index(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{path.stem}/data.pkl")


def test_a_large_count_is_pickled(tmp_path: Path) -> None:
    index = torch_archive._pickle("module", {"a": TensorStream((3, 2**31), np.dtype(np.int8), [])})
    assert pickle.LONG1 + b"\x08" + (3 * 2**31).to_bytes(8, "little") in index


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield np.zeros(3, np.float32)
        raise UserError("no more")

    tensor = TensorStream((6,), np.dtype(np.float32), broken())
    with pytest.raises(UserError, match="no more"):
        write_archive(tmp_path / "a.pt", "module", {"a": tensor})
    assert os.listdir(tmp_path) == []


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_regions_of_views_are_those_of_numpy(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=3, max_size=3))
    array = np.arange(np.prod(sizes) * 2, dtype=np.int32).reshape(2 * sizes[0], sizes[1], sizes[2])
    order = tuple(data.draw(st.permutations(range(4))))
    expected = array.reshape(2, *sizes).transpose(order)
    index = []
    for size in expected.shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    with pytest.MonkeyPatch.context() as patch, tempfile.NamedTemporaryFile() as file:
        file.write(bytes(12) + array.tobytes())
        file.flush()
        patch.setattr(torch_archive, "MAP_BYTES", data.draw(st.integers(4, 200)))
        stored = StoredTensor(Path(file.name), array.dtype, array.shape, array.strides, 12)
        view = stored.split(0, (2, sizes[0])).transpose(order)
        np.testing.assert_array_equal(view.read(tuple(index)), expected[tuple(index)])
        np.testing.assert_array_equal(view.read(), expected)


def test_tensors_that_share_a_storage_are_views_of_it(tmp_path: Path) -> None:
    storage, values = Storage("FloatStorage", "0", 12), np.arange(12, dtype=np.float32)
    tree = {
        "rows": Tensor(storage, 4, (2, 4), (4, 1)),
        "turned": Tensor(storage, 0, (4, 3), (1, 4)),
        "spread": Tensor(storage, 3, (5, 2), (0, 1)),
        "scalar": Tensor(storage, 11, (), ()),
        "list": [Tensor(storage, 1, (1,), (1,)), 7],
    }
    archives.write(tmp_path / "a.pt", archives.dump(collections.OrderedDict(tree)), {"0": values.tobytes()})
    read = read_archive(tmp_path / "a.pt")
    np.testing.assert_array_equal(read["rows"].read(), values[4:].reshape(2, 4))
    np.testing.assert_array_equal(read["turned"].read(), values.reshape(3, 4).T)
    np.testing.assert_array_equal(read["spread"].read(), [[3, 4]] * 5)
    assert read["scalar"].read() == 11
    assert read["list"][0].read() == [1] and read["list"][1] == 7


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "function, arguments, name",
    [
        (os.mkdir, ("{}",), f"{os.mkdir.__module__}.mkdir"),
        (eval, ("__import__('os').mkdir({!r})",), "eval"),
        (getattr, (os, "mkdir"), "getattr"),
        (np.dtype, ("float32",), "numpy.dtype"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_forbidden_name_is_refused_and_not_run(
    tmp_path: Path, function: Any, arguments: tuple[Any, ...], name: str, protocol: int
) -> None:
    trap = tmp_path / "trap"
    arguments = tuple(a.format(str(trap)) if isinstance(a, str) else str(a) for a in arguments)
    index = pickle.dumps({"module": Call(function, *arguments)}, protocol)
    archives.write(tmp_path / "a.pt", index, {})
    assert name in line(tmp_path / "a.pt")
    assert not trap.exists()
    if function in (os.mkdir, eval):  # the trap works when it is sprung
        pickle.loads(index)
        assert trap.exists()


def test_other_names_of_torch_are_refused(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        torch, utils = archives.fake_torch(patch)
        for forbidden in (torch.ComplexFloatStorage, utils._rebuild_parameter):
            index = pickle.dumps({"module": forbidden}, 2)
            archives.write(tmp_path / "a.pt", index, {})
            assert f"{forbidden.__module__}.{forbidden.__qualname__}" in line(tmp_path / "a.pt")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = GOLDEN.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.pt").write_bytes(whole[:length])
        assert "zip" in line(tmp_path / "a.pt")
    assert "No such file" in line(tmp_path / "absent.pt")


def test_storages_must_be_there_and_long_enough(tmp_path: Path) -> None:
    path, storage = tmp_path / "a.pt", Storage("HalfStorage", "5", 6)
    index = archives.dump({"module": {"first.weight": Tensor(storage, 2, (2, 2), (2, 1))}})
    archives.write(path, index, {"5": bytes(12)})
    assert read_archive(path)["module"]["first.weight"].read().shape == (2, 2)
    archives.write(path, index, {"6": bytes(12)})
    assert "module.first.weight refers to the storage data/5, which is not" in line(path)
    archives.write(path, index, {"5": bytes(11)})
    assert "module.first.weight needs 12 bytes of its storage data/5, which has 11" in line(path)


def test_what_is_not_plain_is_refused(tmp_path: Path) -> None:
    path, storage = tmp_path / "a.pt", Storage("FloatStorage", "0", 4)
    index = archives.dump({"a": Tensor(storage, 0, (4,), (1,))})
    archives.write(path, index, {"0": bytes(16)}, byteorder=b"big")
    assert "big-endian" in line(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", index)
        archive.writestr("archive/data/0", bytes(16))
    assert "compressed" in line(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", b"no checkpoint")
    assert "without a data.pkl" in line(path)
    for shape, strides in [((-1,), (1,)), ((2,), (-1,)), ((2, 2), (1,)), (("2",), (1,))]:
        archives.write(path, archives.dump({"a": Tensor(storage, 0, shape, strides)}), {"0": bytes(16)})
        assert "data.pkl cannot be read" in line(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_pickle_gives_one_line_or_a_tree(data: st.DataObject) -> None:
    index = bytearray(archives.dump({"module": {"a": Tensor(Storage("FloatStorage", "0", 4), 0, (2, 2), (2, 1))}}))
    for _ in range(data.draw(st.integers(1, 3))):
        index[data.draw(st.integers(0, len(index) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.pt"
        archives.write(path, bytes(index), {"0": bytes(16)})
        try:
            tree = read_archive(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert not callable(tree)
