"""Official checkpoints to orbax checkpoints and back, in memory for a few chunks whatever the model's size.

The orbax side is what `CheckpointManager` keeps: `<directory>/<step>/params`, restored by `StandardRestore`. Orbax
itself saves whole arrays, which may be larger than the host; so the arrays are written here, through tensorstore, as
the zarr arrays that orbax reads, and its two metadata files beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from glm_jax.errors import UserError
from glm_jax.interop import sat
from glm_jax.interop.layout import ParamPath, Rule, axis_sizes, rules, tile_shape, tiles
from glm_jax.interop.shards import Parameter, latest_iteration, open_parameters
from glm_jax.model import GLMConfig
from glm_jax.storage import digests
from glm_jax.storage.files import atomic_directory

ITEM = "params"  # the item of a checkpoint that holds params
SPLIT_PARTS = 8  # stored chunks end where this many tensor-parallel ranks would


def sat_to_orbax(path: str | Path, cfg: GLMConfig, out: str | Path) -> Path:
    """Convert an official checkpoint into a step of an orbax checkpoint directory.

    Args:
        path: the directory with `latest`.
        cfg: the model that it holds.
        out: the directory of checkpoints, such as WORKDIR/checkpoints; the step is the official iteration.

    Returns:
        The step's directory. It holds the item "params", float32, and appears whole or not at all.

    Raises:
        UserError: the official checkpoint is damaged or of another model, or the step exists already.
    """
    parameters = open_parameters(path, cfg)
    iteration = latest_iteration(path)
    if not iteration.isdigit():
        raise UserError(f"{Path(path) / 'latest'} names {iteration!r}: an orbax step must be a number")
    step = Path(out) / str(int(iteration))
    if step.exists():
        raise UserError(f"{step} exists already: choose another directory or remove it")
    with atomic_directory(step) as directory:
        item = directory / ITEM
        for rule in rules(cfg):
            _write_array(item / ".".join(rule.path), parameters[rule.path], _stored_tile(cfg, rule))
        _write_metadata(directory, {param_path: parameter.shape for param_path, parameter in parameters.items()})
        digests.seal(directory, digests.files(directory))
    return step


def orbax_to_sat(
    path: str | Path,
    cfg: GLMConfig,
    out: str | Path,
    tensor_parallel: int,
    iteration: int | None = None,
    dtype: str = "float32",
) -> None:
    """Convert the params of an orbax checkpoint into an official checkpoint.

    Memory stays small if the stored chunks are small, as those of `sat_to_orbax` are.

    Args:
        path: a directory of checkpoints, of which the newest step is taken, or the directory of one step.
        cfg: the model that it holds.
        out, tensor_parallel, dtype: as in `sat.save`.
        iteration: the number that `latest` names; the step's if None.

    Raises:
        UserError: no checkpoint there, one that differs from its digests (orbax alone writes none), or one of another
            model; and as `sat.save`.
    """
    step = _find_step(Path(path))
    if any(step.glob("digests-*")) and (damage := digests.damage(step, f"{ITEM}/")):
        raise UserError(f"{step} is damaged ({damage}): bring it back, or name another step's directory")
    item = step / ITEM
    sources = dict(_open_arrays(item))
    sat.check_shapes(cfg, {param_path: tuple(source.shape) for param_path, source in sources.items()}, str(item))
    if iteration is None:
        if not step.name.isdigit():
            raise UserError(f"{step} is not named after its step: give the iteration")
        iteration = int(step.name)
    sat.write(out, cfg, sources, lambda source, index: source[index].read().result(), tensor_parallel, iteration, dtype)


def _stored_tile(cfg: GLMConfig, rule: Rule) -> tuple[int, ...]:
    """Choose the stored chunks of an array so that both sides read little more than they need.

    A chunk is a run of the official tensor's rows, turned; chunks end at the borders of tensor-parallel ranks.
    """
    shape = list(rule.view_shape(axis_sizes(cfg)))
    if rule.split:
        axis = rule.view.index(rule.split)
        shape[axis] = -(-shape[axis] // SPLIT_PARTS)
    tile = dict(zip(rule.view, tile_shape(tuple(shape)), strict=True))
    return (1,) * rule.stacked + tuple(tile[axis] for axis in rule.ours)


def _write_array(directory: Path, parameter: Parameter, tile: tuple[int, ...]) -> None:
    metadata = {"shape": parameter.shape, "chunks": tile, "dtype": "<f4", "compressor": None}
    store = tensorstore.open(
        {"driver": "zarr", "kvstore": _file_store(directory), "metadata": metadata}, create=True
    ).result()
    for region in tiles(parameter.shape, tile):
        store[region].write(parameter.read(region, np.dtype(np.float32))).result()


def _file_store(directory: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{directory.resolve()}/"}


def _write_metadata(directory: Path, shapes: dict[ParamPath, tuple[int, ...]]) -> None:
    """Write what orbax wants to know: the tree of the item, and which handler restores it."""
    tree = {
        str(param_path): {
            "key_metadata": [{"key": name, "key_type": 2} for name in param_path],  # 2: the key of a dict
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape},
        }
        for param_path, shape in shapes.items()
    }
    item = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True, "custom_metadata": None}  # fmt: skip
    handler = ocp.StandardCheckpointHandler
    checkpoint = {"item_handlers": {ITEM: f"{handler.__module__}.{handler.__qualname__}"}, "metrics": {},
                  "performance_metrics": {}, "init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 0,
                  "custom_metadata": {}}  # fmt: skip
    (directory / ITEM / "_METADATA").write_text(json.dumps(item), "utf-8")
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(checkpoint), "utf-8")


def _find_step(path: Path) -> Path:
    """Return `path` itself if it is a step's directory, else the newest step in it."""
    if (path / ITEM).is_dir():
        return path
    steps = [step for step in path.iterdir() if step.name.isdigit()] if path.is_dir() else []
    steps = [step for step in steps if (step / ITEM).is_dir()]
    if not steps:
        raise UserError(f"{path} holds no checkpoint with the item {ITEM!r}")
    return max(steps, key=lambda step: int(step.name))


def _open_arrays(item: Path) -> Iterator[tuple[ParamPath, Any]]:
    """Open every array of an orbax item as a TensorStore, by path."""
    try:
        metadata = json.loads((item / "_METADATA").read_text("utf-8"))
        names = [tuple(key["key"] for key in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()]
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        for param_path in names:
            name = ".".join(param_path)
            store = _file_store(item / name)
            if (item / "manifest.ocdbt").exists():
                store = {"driver": "ocdbt", "base": f"file://{item.resolve()}/", "path": f"{name}/"}
            yield param_path, tensorstore.open({"driver": driver, "kvstore": store}, open=True).result()
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{item} cannot be read as an orbax checkpoint: {str(error).splitlines()[0]}") from error
