"""Crafts .pt files the way torch does, with Python's own pickler and stand-ins for torch's classes."""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
import sys
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest


@dataclasses.dataclass(frozen=True)
class Storage:
    """A storage as torch pickles it: the name of its type, its record's key and its number of elements."""

    type_name: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as torch pickles it; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def fake_torch(patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Put modules `torch` and `torch._utils` in place that hold the names which pickles refer to."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for module, name in [(utils, "_rebuild_tensor_v2"), (utils, "_rebuild_parameter"), (torch, "FloatStorage"),
                         (torch, "HalfStorage"), (torch, "ComplexFloatStorage")]:  # fmt: skip
        setattr(module, name, type(name, (), {"__module__": module.__name__, "__qualname__": name}))
    torch.__dict__["_utils"] = utils
    patch.setitem(sys.modules, "torch", torch)
    patch.setitem(sys.modules, "torch._utils", utils)
    return torch, utils


def dump(tree: Any) -> bytes:
    """Pickle a tree of Tensors as torch.save would."""
    with pytest.MonkeyPatch.context() as patch:
        torch, utils = fake_torch(patch)

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> Any:
                if isinstance(obj, Storage):
                    return "storage", getattr(torch, obj.type_name), obj.key, "cpu", obj.count
                return None

            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, Tensor):
                    hooks = collections.OrderedDict()
                    arguments = (obj.storage, obj.offset, obj.shape, obj.strides, False, hooks)
                    return utils._rebuild_tensor_v2, arguments
                return NotImplemented

        stream = io.BytesIO()
        Pickler(stream, protocol=2).dump(tree)
        return stream.getvalue()


def write(path: Path, index: bytes, storages: Mapping[str, bytes], **records: bytes) -> None:
    """Write an archive from its pickle and the bytes of its storages."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", index)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in {"version": b"3\n", "byteorder": b"little", **records}.items():
            archive.writestr(f"archive/{name}", content)
