"""The .pt container that torch.save writes, read and written without torch.

It is a zip archive, nothing compressed: `data.pkl` (a pickle of the structure, in which each tensor is a reference),
`data/<key>` (the bytes of one storage), `version`, `byteorder` and an id. `pickle_reader` reads the pickle, so nothing
in a file is ever executed. Tensors stay on disk until a region of one is read, through a mapping that is closed again:
resident memory does not grow with the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np

from glm_jax.errors import UserError
from glm_jax.interop import pickle_reader
from glm_jax.storage.files import open_atomic, open_regular
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

STORAGES = {f"torch.{storage}": dtype for storage, dtype in DTYPES.values()}
ALLOWED = frozenset([*STORAGES, *(f"torch.{name}" for name in DTYPES)])
MAX_INDEX_BYTES = 64 * 2**20  # of data.pkl; that of a rank of GLM-130B has 100 kB
MAX_NODES, MAX_DEPTH = 1_000_000, 50  # of the pickled object: parts of it may be shared without end
MAX_MEMBERS = 100_000  # of the archive
MAX_NAME = 200  # characters of a name in a message

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


class _Archive:
    """The members of a zip archive and where their bytes lie."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.zip = zipfile.ZipFile(file)
        self.members = {info.filename: info for info in self.zip.infolist()}
        if len(self.members) > MAX_MEMBERS:
            raise UserError(f"{path} has {len(self.members)} members, at most {MAX_MEMBERS} are read")
        pickles = [name for name in self.members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip archive without a data.pkl: torch.save did not write it")
        self.prefix = pickles[0].removesuffix("data.pkl")
        if self.prefix + "byteorder" in self.members and self._read("byteorder", 16) != b"little":
            raise UserError(f"{path} was written on a big-endian machine: save it again on a little-endian one")

    def index(self) -> bytes:
        """Read the pickle."""
        return self._read("data.pkl", MAX_INDEX_BYTES)

    def _read(self, record: str, limit: int) -> bytes:
        size = self.members[self.prefix + record].file_size
        if size > limit:
            raise UserError(f"{self.path}: {record} has {size} bytes, at most {limit} are read: no checkpoint has more")
        return self.zip.read(self.prefix + record)

    def locate(self, tensor: pickle_reader.Tensor, path: tuple[object, ...]) -> StoredTensor:
        """Find the bytes of the tensor at `path` of the pickled object."""
        record, dtype = f"data/{tensor.storage.key}", STORAGES.get(tensor.storage.kind)
        info = self.members.get(self.prefix + record)
        if dtype is None:
            raise self._bad(path, f"has a storage of the kind {tensor.storage.kind}")
        if info is None:
            raise self._bad(path, f"refers to the storage {record}, which is not in the archive")
        if info.compress_type != zipfile.ZIP_STORED:
            raise self._bad(path, f"has the storage {record}, which is compressed: save the file with torch.save")
        extents = [(size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True)]
        needed = (tensor.offset + sum(extents) + 1) * dtype.itemsize if 0 not in tensor.shape else 0
        # a stride of 0 could make any number of values out of one
        if max(needed, math.prod(tensor.shape) * dtype.itemsize) > info.file_size:
            raise self._bad(path, f"needs {needed} bytes of its storage {record}, which has {info.file_size}")
        start = self._data_offset(info, path)
        strides = tuple(step * dtype.itemsize for step in tensor.strides)
        return StoredTensor(self.path, dtype, tensor.shape, strides, start + tensor.offset * dtype.itemsize)

    def _bad(self, path: tuple[object, ...], reason: str) -> UserError:
        name = ".".join(str(part)[:MAX_NAME] for part in path)
        return UserError(f"{self.path}: {name} {reason[:MAX_NAME]}")

    def _data_offset(self, info: zipfile.ZipInfo, path: tuple[object, ...]) -> int:
        """Return the place of a member's first byte: its local header has a length of its own."""
        self.file.seek(info.header_offset)
        header = self.file.read(30)
        if len(header) == 30 and header[:4] == b"PK\x03\x04":
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            start = info.header_offset + 30 + name_length + extra_length
            if start + info.file_size <= os.fstat(self.file.fileno()).st_size:
                return start
        raise self._bad(path, "is not where the archive says: the file is damaged")


def read_archive(path: Path) -> Tree:
    """Read what torch.save wrote: the pickled object with a StoredTensor in place of each tensor.

    Raises:
        UserError: no such file, not a whole zip archive, a name in the pickle that is not on the list, a storage that
            is missing or too short.
    """
    try:
        with open_regular(path) as file:
            archive = _Archive(path, file)
            tree = pickle_reader.read(archive.index(), ALLOWED)
            return _Resolver(archive).resolve(tree)
    except pickle_reader.Forbidden as error:
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


class _Resolver:
    """Puts StoredTensors in the place of what the pickle says of tensors, within MAX_NODES and MAX_DEPTH."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._nodes = 0

    def resolve(self, tree: object, path: tuple[object, ...] = ()) -> Tree:
        """Return the tree with its tensors found in the archive."""
        self._nodes += 1
        if self._nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise pickle.UnpicklingError(f"it has more than {MAX_NODES} parts, or more than {MAX_DEPTH} in one another")
        if isinstance(tree, pickle_reader.Tensor):
            return self._archive.locate(tree, path)
        if isinstance(tree, dict):
            return {key: self.resolve(part, (*path, key)) for key, part in tree.items()}
        if isinstance(tree, list | tuple):
            return [self.resolve(part, (*path, place)) for place, part in enumerate(tree)]
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

    def buffers(self) -> Iterator[memoryview]:
        """Yield the tensor's bytes, a chunk at a time."""
        for chunk in self.chunks:
            yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data


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
            written = _write_record(archive, file, record, tensor.buffers())
            assert written == tensor.nbytes, (name, written, tensor.nbytes)
            digest.update(archive.getinfo(record).CRC.to_bytes(4, "little"))
        _write_record(archive, file, f"{path.stem}/version", [b"3\n"])
        identity = str(int.from_bytes(digest.digest()[:16], "little")).zfill(40)  # torch's has 40 digits too
        _write_record(archive, file, f"{path.stem}/.data/serialization_id", [identity.encode()])


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
