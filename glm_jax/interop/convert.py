"""Official checkpoints to ours and back, in memory for a few chunks whatever the model's size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorstore import TensorStore

from glm_jax.errors import UserError
from glm_jax.interop import arrays, huggingface, sat
from glm_jax.interop.layout import Rule, axis_sizes, rules, tile_shape, tiles
from glm_jax.interop.shards import Parameter, latest_iteration, open_parameters
from glm_jax.model import GLMConfig
from glm_jax.workdir import checkpoint_format
from glm_jax.workdir.checkpoint_format import Chunked, ParamPath

SPLIT_PARTS = 8  # stored chunks end where this many tensor-parallel ranks would


def sat_to_orbax(path: str | Path, cfg: GLMConfig, out: str | Path) -> Path:
    """Convert an official checkpoint into a step of an orbax checkpoint directory.

    Args:
        path: the directory with `latest`.
        cfg: the model that it holds.
        out: the directory of checkpoints, such as WORKDIR/checkpoints; the step is the official iteration.

    Returns:
        The step's folder. It holds the item "params", float32, and appears whole or not at all.

    Raises:
        UserError: the official checkpoint is damaged or of another model, or the step exists already.
    """
    parameters = open_parameters(path, cfg)
    iteration = latest_iteration(path)
    if not iteration.isdigit():
        raise UserError(f"{Path(path) / 'latest'} names {iteration!r}: an orbax step must be a number")
    return _write_orbax(parameters, cfg, out, int(iteration))


def hf_to_orbax(path: str | Path, cfg: GLMConfig, out: str | Path) -> Path:
    """Convert a Hugging Face folder into step 0 of an orbax checkpoint directory, as `sat_to_orbax` does.

    Args:
        path: the folder with config.json.
        cfg: the model that it holds: `huggingface.config(path)`.
        out: as in `sat_to_orbax`.

    Raises:
        UserError: as `huggingface.load`, or the step exists already.
    """
    return _write_orbax(huggingface.open_parameters(path, cfg), cfg, out, 0)


def _write_orbax(parameters: Mapping[ParamPath, Parameter], cfg: GLMConfig, out: str | Path, step: int) -> Path:
    chunked = {rule.path: _chunked(parameters[rule.path], _stored_tile(cfg, rule)) for rule in rules(cfg)}
    return checkpoint_format.write_params(Path(out), step, chunked)


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
        path: a directory of checkpoints, of which the newest step is taken, or the folder of one step.
        cfg: the model that it holds.
        out, tensor_parallel, dtype: as in `sat.save`.
        iteration: the number that `latest` names; the step's if None.

    Raises:
        UserError: as `checkpoint_format.open_params` and `sat.save`, or the checkpoint holds another model.
    """
    step, sources = _open_orbax(path, cfg)
    if iteration is None:
        if not step.name.isdigit():
            raise UserError(f"{step} is not named after its step: give the iteration")
        iteration = int(step.name)
    sat.write(out, cfg, sources, _read_stored, tensor_parallel, iteration, dtype)


def orbax_to_hf(path: str | Path, cfg: GLMConfig, out: str | Path, dtype: str = "float32") -> None:
    """Convert the params of an orbax checkpoint into a Hugging Face folder, in as little memory as `orbax_to_sat`.

    Args:
        path: as in `orbax_to_sat`.
        cfg: the model that it holds.
        out, dtype: as in `huggingface.save`.

    Raises:
        UserError: as `checkpoint_format.open_params` and `huggingface.save`, or the checkpoint holds another model.
    """
    _, sources = _open_orbax(path, cfg)
    huggingface.write(out, cfg, sources, _read_stored, dtype)


def _open_orbax(path: str | Path, cfg: GLMConfig) -> tuple[Path, dict[ParamPath, TensorStore]]:
    """Open the params of a step and check that they are cfg's."""
    step, sources = checkpoint_format.open_params(Path(path))
    shapes = {param_path: tuple(source.shape) for param_path, source in sources.items()}
    arrays.check_shapes(cfg, shapes, str(step / checkpoint_format.PARAMS))
    return step, sources


def _read_stored(source: TensorStore, index: tuple[slice | int, ...]) -> np.ndarray:
    return source[index].read().result()


def _stored_tile(cfg: GLMConfig, rule: Rule) -> tuple[int, ...]:
    """Choose the stored chunks of an array so that both sides read little more than they need.

    A chunk is a run of the official tensor's rows, transposed; chunks end at the borders of tensor-parallel ranks.
    """
    shape = list(rule.view_shape(axis_sizes(cfg)))
    if rule.split:
        axis = rule.view.index(rule.split)
        shape[axis] = -(-shape[axis] // SPLIT_PARTS)
    tile = dict(zip(rule.view, tile_shape(tuple(shape)), strict=True))
    return (1,) * rule.stacked + tuple(tile[axis] for axis in rule.ours)


def _chunked(parameter: Parameter, tile: tuple[int, ...]) -> Chunked:
    regions = tiles(parameter.shape, tile)
    return Chunked(
        parameter.shape, tile, ((region, parameter.read(region, np.dtype(np.float32))) for region in regions)
    )
