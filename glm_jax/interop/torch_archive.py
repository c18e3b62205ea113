"""The .pt container that torch.save writes, read and written without torch.

It is a zip archive, nothing compressed: `data.pkl` (a pickle of the structure, in which each tensor is a reference),
`data/<key>` (the bytes of one storage), `version`, `byteorder` and an id. The pickle goes through an unpickler that
knows a handful of names and refuses every other, so nothing in a file is ever executed. Tensors stay on disk until a
region of one is read, through a mapping that is dropped again: resident memory does not grow with the file.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import math
import mmap
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import ml_dtypes
import numpy as np

from glm_jax.errors import UserError
from glm_jax.storage.files import open_atomic
from glm_jax.types import Tree

MAP_BYTES = 32 * 2**20  # the longest stretch of a file that is mapped at a time
ALIGNMENT = 64  # of each record's first byte, as torch aligns them

# torch's name of a dtype, and of its storage type
DTYPES: Mapping[str, tuple[str, np.dtype]] = {
    "float32": ("FloatStorage", np.dtype(np.float32)),
    "float16": ("HalfStorage", np.dtype(np.float16)),
    "bfloat16": ("BFloat16Storage", np.dtype(ml_dtypes.bfloat16)),
    "float64": ("DoubleStorage", np.dtype(np.float64)),
    "int8": ("CharStorage", np.dtype(np.int8)),
    "uint8": ("ByteStorage", np.dtype(np.uint8)),
    "int16": ("ShortStorage", np.dtype(np.int16)),
    "int32": ("IntStorage", np.dtype(np.int32)),
    "int64": ("LongStorage", np.dtype(np.int64)),
    "bool": ("BoolStorage", np.dtype(np.bool_)),
}

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file: a strided view of its bytes, which `read` turns into arrays."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    offset: int  # bytes from the start of the file to the first element

    def split(self, axis: int, sizes: tuple[int, ...]) -> StoredTensor:
        """View one axis as several, whose sizes multiply to its own."""
        assert math.prod(sizes) == self.shape[axis], (self.shape, axis, sizes)
        steps = [self.strides[axis] * math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
        shape = self.shape[:axis] + tuple(sizes) + self.shape[axis + 1 :]
        strides = self.strides[:axis] + tuple(steps) + self.strides[axis + 1 :]
        return dataclasses.replace(self, shape=shape, strides=strides)

    def transpose(self, order: tuple[int, ...]) -> StoredTensor:
        """View the axes in another order."""
        shape = tuple(self.shape[axis] for axis in order)
        return dataclasses.replace(self, shape=shape, strides=tuple(self.strides[axis] for axis in order))

    def read(self, index: Index | None = None) -> np.ndarray:
        """Read a region, one slice (of step 1) an axis, or everything, into a new array."""
        bounds = [part.indices(size) for part, size in zip(index or (), self.shape, strict=index is not None)]
        bounds = bounds or [(0, size, 1) for size in self.shape]
        region = np.empty([max(0, stop - start) for start, stop, _ in bounds], self.dtype)
        if region.size:
            offset = self.offset + sum(start * step for (start, _, _), step in zip(bounds, self.strides, strict=True))
            with open(self.file, "rb") as file:
                self._copy(file, offset, region)
        return region

    def _copy(self, file: IO[bytes], offset: int, region: np.ndarray) -> None:
        """Fill `region` from the bytes at `offset`; halves what spans more than MAP_BYTES."""
        extents = [(size - 1) * step for size, step in zip(region.shape, self.strides, strict=True)]
        span = sum(extents) + self.dtype.itemsize
        if span > MAP_BYTES and max(extents) > 0:
            axis = extents.index(max(extents))
            half = region.shape[axis] // 2
            head, tail = np.split(region, [half], axis)  # views
            self._copy(file, offset, head)
            self._copy(file, offset + half * self.strides[axis], tail)
            return
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        # the pages leave resident memory when the mapping is closed
        with mmap.mmap(file.fileno(), offset + span - start, access=mmap.ACCESS_READ, offset=start) as mapping:
            view = np.ndarray(region.shape, self.dtype, mapping, offset - start, self.strides)
            region[...] = view
            del view


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


class _Reference(NamedTuple):
    """What a pickled tensor says of itself: a storage, and in elements, offset, shape and strides."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> _Reference:
    """Stand in for torch._utils._rebuild_tensor_v2."""
    (first,), sizes, steps = _whole_numbers((offset,)), _whole_numbers(shape), _whole_numbers(strides)
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor refers to something other than a storage")
    if len(sizes) != len(steps):
        raise pickle.UnpicklingError("a tensor has more or fewer sizes than strides")
    return _Reference(storage, first, sizes, steps)


def _whole_numbers(values: object) -> tuple[int, ...]:
    """Check what a pickle gives as sizes: whole numbers that are not negative."""
    if not isinstance(values, tuple) or any(type(value) is not int or value < 0 for value in values):
        raise pickle.UnpicklingError("a tensor is described by something other than sizes")
    return values


ALLOWED: Mapping[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{("torch", name): dtype for name, (_, dtype) in DTYPES.items()},
    **{("torch", storage): dtype for storage, dtype in DTYPES.values()},
}


class _Forbidden(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    """Knows the names in ALLOWED and no other."""

    def find_class(self, module_name: str, global_name: str, /) -> object:
        allowed = ALLOWED.get((module_name, global_name))
        if allowed is None:
            raise _Forbidden(f"{module_name}.{global_name}")
        return allowed

    def persistent_load(self, pid: tuple[object, ...]) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"an unknown reference {kind!r}")
        return _Storage(dtype, key)


class _Archive:
    """The members of a zip archive and where their bytes lie."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.zip = zipfile.ZipFile(file)
        self.members = {info.filename: info for info in self.zip.infolist()}
        pickles = [name for name in self.members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip archive without a data.pkl: torch.save did not write it")
        self.prefix = pickles[0].removesuffix("data.pkl")
        if self.prefix + "byteorder" in self.members and self.zip.read(self.prefix + "byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine: save it again on a little-endian one")

    def locate(self, reference: _Reference, name: str) -> StoredTensor:
        """Find the bytes of the tensor `name`."""
        dtype, record = reference.storage.dtype, f"data/{reference.storage.key}"
        info = self.members.get(self.prefix + record)
        if info is None:
            raise UserError(f"{self.path}: {name} refers to the storage {record}, which is not in the archive")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path}: the storage {record} of {name} is compressed: save the file with torch.save")
        start = self._data_offset(info, name)
        extents = [(size - 1) * step for size, step in zip(reference.shape, reference.strides, strict=True)]
        needed = (reference.offset + sum(extents) + 1) * dtype.itemsize if 0 not in reference.shape else 0
        if needed > info.file_size:
            raise UserError(
                f"{self.path}: {name} needs {needed} bytes of its storage {record}, which has {info.file_size}"
            )
        strides = tuple(step * dtype.itemsize for step in reference.strides)
        return StoredTensor(self.path, dtype, reference.shape, strides, start + reference.offset * dtype.itemsize)

    def _data_offset(self, info: zipfile.ZipInfo, name: str) -> int:
        """Return the place of a member's first byte: its local header has a length of its own."""
        self.file.seek(info.header_offset)
        header = self.file.read(30)
        if len(header) == 30 and header[:4] == b"PK\x03\x04":
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            start = info.header_offset + 30 + name_length + extra_length
            if start + info.file_size <= os.fstat(self.file.fileno()).st_size:
                return start
        raise UserError(f"{self.path}: the bytes of {name} are not where the archive says: the file is damaged")


def read_archive(path: Path) -> Tree:
    """Read what torch.save wrote: the pickled object with a StoredTensor in place of each tensor.

    Raises:
        UserError: no such file, not a whole zip archive, a name in the pickle that is not on the list, a storage that
            is missing or too short.
    """
    try:
        with open(path, "rb") as file:
            archive = _Archive(path, file)
            tree = _unpickle(archive.zip.read(archive.prefix + "data.pkl"))
            return _resolve(archive, tree, "")
    except _Forbidden as error:
        raise UserError(
            f"{path}: data.pkl asks for {error}, which no checkpoint of tensors needs: refused, nothing was run"
        ) from error
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:  # the last: a compression zipfile lacks
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read as a torch file (a zip archive): {reason}") from error
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, RuntimeError,
            ArithmeticError, MemoryError, struct.error) as error:  # fmt: skip
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: data.pkl cannot be read: {reason}") from error


def _unpickle(index: bytes) -> Tree:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a damaged string may hold an escape of no meaning
        for opcode, number, _ in pickletools.genops(index):
            # the unpickler would set aside memory for as many notes
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(number or 0) < len(index):
                raise pickle.UnpicklingError(f"a note has the number {number}")
        return _Unpickler(io.BytesIO(index), encoding="utf-8").load()


def _resolve(archive: _Archive, tree: Tree, name: str) -> Tree:
    if isinstance(tree, _Reference):
        return archive.locate(tree, name)
    if isinstance(tree, dict):
        return {key: _resolve(archive, value, f"{name}.{key}".lstrip(".")) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_resolve(archive, value, f"{name}[{place}]") for place, value in enumerate(tree)]
    return tree


@dataclasses.dataclass(frozen=True)
class TensorStream:
    """A tensor to be written: its shape and dtype, and its elements in row-major order, in chunks."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Iterable[np.ndarray]

    @property
    def nbytes(self) -> int:
        """The size of the tensor's bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_archive(path: Path, group: str, tensors: Mapping[str, TensorStream]) -> None:
    """Write {group: {name: tensor}} as torch.save would, one chunk in memory at a time.

    The file appears whole or not at all; `torch.load(path, weights_only=True)` reads it.
    """
    index = _pickle(group, tensors)
    digest = hashlib.sha256(index)
    with open_atomic(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, file, f"{path.stem}/data.pkl", [index])
        _write_record(archive, file, f"{path.stem}/byteorder", [b"little"])
        for key, (name, tensor) in enumerate(tensors.items()):
            record = f"{path.stem}/data/{key}"
            written = _write_record(archive, file, record, map(_as_bytes, tensor.chunks))
            assert written == tensor.nbytes, (name, written, tensor.nbytes)
            digest.update(archive.getinfo(record).CRC.to_bytes(4, "little"))
        _write_record(archive, file, f"{path.stem}/version", [b"3\n"])
        identity = str(int.from_bytes(digest.digest()[:16], "little")).zfill(40)  # torch's has 40 digits too
        _write_record(archive, file, f"{path.stem}/.data/serialization_id", [identity.encode()])


def _as_bytes(chunk: np.ndarray) -> memoryview:
    return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data


def _write_record(archive: zipfile.ZipFile, file: IO[bytes], name: str, chunks: Iterable[bytes | memoryview]) -> int:
    """Write one member, its first byte at a multiple of ALIGNMENT; returns its size."""
    info = zipfile.ZipInfo(name)
    # The local header: 30 bytes, the name, this padding field ("FB" as torch has it), 20 bytes of 64-bit sizes.
    head = file.tell() + 30 + len(name.encode()) + 4 + 20
    padding = -head % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    written = 0
    with archive.open(info, "w", force_zip64=True) as member:
        for chunk in chunks:
            written += member.write(chunk)
    return written


def _pickle(group: str, tensors: Mapping[str, TensorStream]) -> bytes:
    """Pickle {group: {name: tensor}} (protocol 2) by hand: pickle would import torch to name its functions."""
    storages = {dtype: storage for storage, dtype in DTYPES.values()}
    parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, _text(group), pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, tensor) in enumerate(tensors.items()):
        count = math.prod(tensor.shape)
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        storage = _tuple(_text("storage"), _global("torch", storages[tensor.dtype]), _text(str(key)),
                         _text("cpu"), _integer(count))  # fmt: skip
        hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = _tuple(storage + pickle.BINPERSID, _integer(0), _tuple(*map(_integer, tensor.shape)),
                           _tuple(*map(_integer, strides)), pickle.NEWFALSE, hooks)  # fmt: skip
        parts += [_text(name), _global("torch._utils", "_rebuild_tensor_v2"), arguments, pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.SETITEM, pickle.STOP])


def _text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
