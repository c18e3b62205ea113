"""Official checkpoints, as SwissArmyTransformer (SAT) writes them, to and from params.

shards.py has the directory, layout.py the table of names and shapes. Nothing here needs torch; tensors pass in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from glm_jax.config.fields import build
from glm_jax.errors import UserError
from glm_jax.interop import arrays, describe
from glm_jax.interop.layout import axis_sizes, check_ranks, official_tensors
from glm_jax.interop.shards import RANK_FILE, Rank, bits, gather, open_parameters, open_ranks
from glm_jax.interop.sources import Source, summary
from glm_jax.interop.torch_archive import write_archive
from glm_jax.model import GLMConfig
from glm_jax.model.transformer import Params
from glm_jax.storage.files import atomic_directory, check_absent
from glm_jax.types import Tree
from glm_jax.workdir.checkpoint_format import ParamPath


def load(path: str | Path, cfg: GLMConfig) -> Params:
    """Load an official checkpoint onto the default device.

    Args:
        path: the directory with `latest`; any number of tensor-parallel ranks.
        cfg: the model that it holds.

    Returns:
        float32 params as `glm_jax.model.init` gives them, with a `Quantized` in the place of each quantised kernel.

    Raises:
        UserError: a missing or damaged file, a tensor that is missing, unknown or of another shape than cfg's.
    """
    return arrays.load(open_parameters(path, cfg))


def load_sharded(path: str | Path, cfg: GLMConfig, shardings: Tree) -> Params:
    """Load an official checkpoint onto a mesh, reading of the files what this process's devices hold.

    Beyond the arrays themselves the host needs memory for one chunk.

    Args:
        path, cfg: as in `load`.
        shardings: a jax Sharding for each array, nested as params.

    Raises:
        UserError: as in `load`.
    """
    return arrays.load(open_parameters(path, cfg), shardings)


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read an official checkpoint as it is: official names to arrays in the files' dtype, merged to one rank.

    Rotary tables (`inv_freq`) are left out. Of a quantised matrix whose inputs the ranks split, the scales of the ranks
    follow one another.

    Raises:
        UserError: as in `load`.
    """
    ranks = open_ranks(path)
    cfg = _merged(ranks)
    sizes = axis_sizes(cfg, len(ranks))
    parameters = gather(ranks, cfg)
    tensors = {}
    for name, rule, layer in official_tensors(cfg, bits=bits(ranks)):
        parameter = parameters[rule.path]
        bounds = [slice(0, size) for size in parameter.shape]
        if layer is not None:
            bounds[0] = slice(layer, layer + 1)
        ours = parameter.read(tuple(bounds)).reshape([sizes[axis] for axis in rule.ours])
        view = ours.transpose([rule.ours.index(axis) for axis in rule.view])
        tensors[name] = np.ascontiguousarray(view).reshape(rule.torch_shape(sizes))
    return tensors


def _merged(ranks: list[Rank]) -> GLMConfig:
    """Return a config under which the ranks merge as they must; any count of heads that they divide does."""
    file, tensors = ranks[0]
    facts = describe.shapes(file, tensors, len(ranks), bits(ranks))
    values: dict[str, object] = {key: fact.default for key, fact in facts.items()}
    values |= {"num_heads": len(ranks), "norm": values["norm"] or "deepnorm"}
    if values["position"] != "learned_2d":
        values["position"] = "alibi"  # rotary positions would need an even width of a head
    return build(GLMConfig, values, f"{file}: the shapes do not fit one another: ")


def save(
    path: str | Path,
    cfg: GLMConfig,
    params: Params,
    *,
    tensor_parallel: int,
    iteration: int,
    dtype: str = "float32",
) -> None:
    """Write params as an official checkpoint, which appears whole or not at all.

    Args:
        path: a directory that does not exist yet (or is empty).
        cfg: the model.
        params: as `glm_jax.model.init` gives them; kernels that are quantised stay so.
        tensor_parallel: the number of rank files.
        iteration: the number that `latest` names.
        dtype: "float32" or "float16", of what is not quantised.

    Raises:
        UserError: the path is taken, params do not fit cfg, the ranks do not divide it, or a value does not fit dtype.
    """
    write(path, cfg, arrays.sources(params), tensor_parallel, iteration, dtype)


def write(
    path: str | Path,
    cfg: GLMConfig,
    sources: Mapping[ParamPath, Source],
    tensor_parallel: int,
    iteration: int,
    dtype: str,
) -> None:
    """Do the work of `save` for anything that is read region by region."""
    root = Path(path)
    check_absent(root)
    if dtype not in ("float32", "float16"):
        raise UserError(f"dtype is {dtype!r}, it must be float32 or float16")
    if iteration < 0:
        raise UserError(f"iteration is {iteration}, it must not be negative")
    found = summary(sources)
    check_ranks(cfg, tensor_parallel, root, found.bits if found else 0)
    ranks = [arrays.streams(cfg, sources, dtype, ranks=tensor_parallel, rank=rank)
             for rank in range(tensor_parallel)]  # fmt: skip
    with atomic_directory(root) as directory:
        (directory / "latest").write_text(str(iteration), "ascii")
        (directory / str(iteration)).mkdir()
        for rank, tensors in enumerate(ranks):
            write_archive(directory / str(iteration) / RANK_FILE.format(rank), "module", tensors)
