"""The files of a checkpoint as orbax reads them: its metadata, and params written and read in chunks.

Orbax itself saves and restores whole arrays, which may be larger than a host's memory. A conversion therefore writes
zarr arrays chunk by chunk and describes them here as orbax describes its own; `checkpoints` lets orbax write arrays
and takes the rest from here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from glm_jax.errors import UserError
from glm_jax.storage import digests
from glm_jax.storage.files import atomic_directory
from glm_jax.types import Json

if TYPE_CHECKING:
    import tensorstore

PARAMS = "params"  # the item of a checkpoint that holds params
ADAPTERS = "adapters"  # or, with LoRA, the params that are trained, in place of the model's
RUN = "run"  # the item with the numbers of a run, JSON; all other items are trees of arrays

ParamPath = tuple[str, ...]
Index = tuple[slice, ...]


class Chunked(NamedTuple):
    """An array that never is in memory as a whole."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]  # the shape of a chunk on disk
    values: Iterable[tuple[Index, np.ndarray]]  # regions, each read as it is asked for
    dtype: np.dtype = np.dtype(np.float32)


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint, still on disk."""

    store: tensorstore.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return tuple(self.store.shape)

    def read(self, index: Index, dtype: np.dtype | None = None) -> np.ndarray:
        """Read a region, one slice an axis, in the stored dtype or another."""
        region = np.asarray(self.store[index].read().result())
        return region if dtype is None else region.astype(dtype, copy=False)


def describe(folder: Path, items: Iterable[str]) -> None:
    """Write which orbax handler restores each item of a checkpoint."""
    import orbax.checkpoint as ocp  # takes half a second, and readers need only the rest of this module

    handlers = {item: ocp.JsonCheckpointHandler if item == RUN else ocp.StandardCheckpointHandler for item in items}
    names = {item: f"{handler.__module__}.{handler.__qualname__}" for item, handler in handlers.items()}
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": names}), "utf-8")


def write_params(directory: Path, step: int, arrays: Mapping[ParamPath, Chunked], run: Json) -> Path:
    """Write a checkpoint that holds params and a record, and nothing to resume from, in memory for one chunk.

    Args:
        directory: of the checkpoints, such as WORKDIR/checkpoints.
        step: names the checkpoint.
        arrays: params by path.
        run: the record, as a run saves it.

    Returns:
        The folder of the step, which appears whole or not at all, sealed with digests.

    Raises:
        UserError: the step exists already.
    """
    folder = directory / str(step)
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another directory or remove it")
    with atomic_directory(folder) as temporary:
        for path, array in arrays.items():
            _write(temporary / PARAMS / ".".join(path), array)
        _describe_params(temporary / PARAMS, {path: array.shape for path, array in arrays.items()})
        (temporary / RUN).mkdir()
        (temporary / RUN / "metadata").write_text(json.dumps(run), "utf-8")
        describe(temporary, [PARAMS, RUN])
        digests.seal(temporary, digests.files(temporary))
    return folder


def open_params(folder: Path, item: str = PARAMS) -> dict[ParamPath, StoredArray]:
    """Open the params of a step's folder by path, or another item's arrays, without reading them.

    Raises:
        UserError: its files are not those of an orbax checkpoint.
    """
    try:
        return dict(_open(folder / item))
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / item} cannot be read as an orbax checkpoint: {reason}") from error


def _write(directory: Path, array: Chunked) -> None:
    import tensorstore

    metadata = {"shape": array.shape, "chunks": array.chunk, "dtype": array.dtype.str, "compressor": None}
    specification = {"driver": "zarr", "kvstore": _file_store(directory), "metadata": metadata}
    store = tensorstore.open(specification, create=True).result()
    for region, values in array.values:
        store[region].write(values).result()


def _describe_params(item: Path, shapes: Mapping[ParamPath, tuple[int, ...]]) -> None:
    """Write the tree of the item, as orbax does."""
    tree = {
        str(path): {
            "key_metadata": [{"key": name, "key_type": 2} for name in path],  # 2: the key of a dict
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape},
        }
        for path, shape in shapes.items()
    }
    metadata = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True, "custom_metadata": None}  # fmt: skip
    (item / "_METADATA").write_text(json.dumps(metadata), "utf-8")


def _file_store(directory: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{directory.resolve()}/"}


def _open(item: Path) -> Iterator[tuple[ParamPath, StoredArray]]:
    import tensorstore

    metadata = json.loads((item / "_METADATA").read_text("utf-8"))
    paths = [tuple(key["key"] for key in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()]
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    for path in paths:
        name = ".".join(path)
        store = _file_store(item / name)
        if (item / "manifest.ocdbt").exists():
            store = {"driver": "ocdbt", "base": f"file://{item.resolve()}/", "path": f"{name}/"}
        yield path, StoredArray(tensorstore.open({"driver": driver, "kvstore": store}, open=True).result())
