"""Weights of others to workdirs of ours and back, in memory for a few chunks whatever the model's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import DTypeLike

from glm_jax.config import Config, Experiment, resolve, to_json
from glm_jax.config.fields import definitions
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.interop import huggingface, sat, sources
from glm_jax.interop.arrays import PARTS
from glm_jax.interop.layout import VALUES, Rule, axis_sizes, rules, tile_shape, tiles
from glm_jax.interop.sources import QuantizedSource, Source, summary
from glm_jax.interop.weights import Weights
from glm_jax.model import GLMConfig
from glm_jax.model.quantized import Scheme
from glm_jax.storage.files import atomic_directory, check_absent, write_atomic
from glm_jax.workdir import checkpoint_format, folder
from glm_jax.workdir.checkpoint_format import Chunked, ParamPath

SPLIT_PARTS = 8  # stored chunks end where this many tensor-parallel ranks would


def experiment(
    cfg: GLMConfig,
    base: Config | Mapping[str, object] | None = None,
    changes: Mapping[str, object] = MappingProxyType({}),
) -> Experiment:
    """Return the experiment of a workdir that holds given weights.

    Args:
        cfg: the model of the weights.
        base: the result of `get_config()`; None for the defaults, with the model's longest row.
        changes: values by dotted key. Those of the section `model` are cfg's in any case.

    Raises:
        UserError: a key does not exist, or its value is not valid.
    """
    model = {f"model.{one.name}": getattr(cfg, one.name) for one in definitions(GLMConfig)}
    # the original GLM's tables have a row more than its rows have tokens
    longest = {} if base is not None else {"data.seq_length": cfg.max_length - (cfg.position == "learned_2d")}
    return resolve({} if base is None else base, {**longest, **changes, **model})


def to_workdir(weights: Weights, out: str | Path, config: Experiment, tokenizer: Tokenizer | None = None) -> Path:
    """Write a workdir that holds given weights, for generation and `train.init_from`.

    They are float32, but for kernels that are quantised: these stay so, as arrays `kernel.values` (int8),
    `kernel.scales` (float16) and, with zero points, `kernel.zeros` (int32). The checkpoint's record says of how many
    bits they are under `quantized`; config.json, which is of runs, does not.

    Args:
        weights: an official checkpoint, or a Hugging Face folder.
        out: the workdir, which appears whole or not at all.
        config: from `experiment`; its model is that of the weights.
        tokenizer: to write beside them; None for a workdir without.

    Returns:
        The folder of the step, which is the official iteration; 0 for a Hugging Face folder.

    Raises:
        UserError: `out` exists, the iteration is no number, or the tokenizer does not fit the model.
    """
    root = Path(out)
    check_absent(root)
    if weights.step is None:
        raise UserError(f"{weights.files[0]} is not named after its iteration: the name must be a number")
    cfg = config.glm(tokenizer.size if tokenizer else 0)
    arrays: dict[ParamPath, Chunked] = {}
    for rule in rules(cfg):
        arrays |= _stored(cfg, rule, weights.parameters[rule.path])
    record = {"step": weights.step, "source": weights.record(), **folder.identity(config, tokenizer)}
    if found := summary(weights.parameters):
        record["quantized"] = found._asdict()
    with atomic_directory(root) as temporary:
        write_atomic(temporary / folder.CONFIG, to_json(config))
        if tokenizer:
            write_atomic(temporary / folder.TOKENIZER, tokenizer.model)
        checkpoint_format.write_params(temporary / "checkpoints", weights.step, arrays, record)
    return root / "checkpoints" / str(weights.step)


def orbax_to_sat(
    weights: Weights, out: str | Path, tensor_parallel: int, iteration: int | None = None, dtype: str = "float32"
) -> None:
    """Write the weights of a workdir, or of a checkpoint of orbax, as an official checkpoint.

    Memory stays small if the stored chunks are small, as those that `to_workdir` and runs write are.

    Args:
        weights: opened.
        out, tensor_parallel, dtype: as in `sat.save`.
        iteration: the number that `latest` names; the step's if None.

    Raises:
        UserError: as `sat.save`.
    """
    if iteration is None and weights.step is None:
        raise UserError(f"{weights.path} is not named after its step: give --iteration")
    number = weights.step if iteration is None else iteration
    assert number is not None
    sat.write(out, weights.config, weights.parameters, tensor_parallel, number, dtype)


def orbax_to_hf(weights: Weights, out: str | Path, dtype: str = "float32") -> None:
    """Write the weights of a workdir, or of a checkpoint of orbax, as a Hugging Face folder; see `orbax_to_sat`.

    Args:
        weights: opened.
        out, dtype: as in `huggingface.save`.

    Raises:
        UserError: as `huggingface.save`.
    """
    huggingface.write(out, weights.config, weights.parameters, dtype)


def quantize(weights: Weights, scheme: Scheme) -> Weights:
    """Return weights whose kernels of blocks are quantised as they are written or loaded.

    Raises:
        UserError: they are quantised already, or cannot be packed.
    """
    return dataclasses.replace(weights, parameters=sources.quantize(weights.parameters, scheme))


def _stored(cfg: GLMConfig, rule: Rule, source: Source) -> dict[ParamPath, Chunked]:
    """Return what is stored of an array, by path: more than one array for a quantised kernel."""
    if not isinstance(source, QuantizedSource):
        return {rule.path: _chunked(source, _stored_tile(cfg, rule))}
    # what is quantised as it is read needs all inputs of a feature, so its chunks are not cut along the inputs
    tile = list(_stored_tile(cfg, rule, parts=1))
    tile[source.axis] = tile[source.axis] * source.bits // 8
    return {
        (*rule.path, name): _chunked(part, tuple(tile) if name == VALUES else tile_shape(part.shape), PARTS[name])
        for name, part in source.parts().items()
    }


def _stored_tile(cfg: GLMConfig, rule: Rule, parts: int = SPLIT_PARTS) -> tuple[int, ...]:
    """Choose the stored chunks of an array so that both sides read little more than they need.

    A chunk is a run of the official tensor's rows, transposed; chunks end at the borders of tensor-parallel ranks.
    """
    shape = list(rule.view_shape(axis_sizes(cfg)))
    if rule.split:
        axis = rule.view.index(rule.split)
        shape[axis] = -(-shape[axis] // parts)
    tile = dict(zip(rule.view, tile_shape(tuple(shape)), strict=True))
    return (1,) * rule.stacked + tuple(tile[axis] for axis in rule.ours)


def _chunked(source: Source, tile: tuple[int, ...], dtype: DTypeLike = np.float32) -> Chunked:
    regions, kind = tiles(source.shape, tile), np.dtype(dtype)
    return Chunked(source.shape, tile, ((region, source.read(region, kind)) for region in regions), kind)
