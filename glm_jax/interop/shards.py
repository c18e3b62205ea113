"""An official checkpoint on disk, opened: its rank files checked against the table and seen as our params.

ROOT/latest                                         the iteration, as text
ROOT/<iteration>/mp_rank_00_model_states.pt ...     {"module": {official name: tensor}}, one file a rank
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm_jax.config.fields import shown
from glm_jax.errors import UserError
from glm_jax.interop import sources
from glm_jax.interop.layout import (
    SAT,
    SCALES,
    VALUES,
    Layout,
    Rule,
    axis_sizes,
    check_ranks,
    official_tensors,
    rules,
)
from glm_jax.interop.sources import Source
from glm_jax.interop.torch_archive import StoredTensor, read_archive
from glm_jax.model import GLMConfig
from glm_jax.model.quantized import WIDTHS
from glm_jax.workdir.checkpoint_format import Index, ParamPath

RANK_FILE = "mp_rank_{:02d}_model_states.pt"
FLOATS = ("float32", "float16", "bfloat16", "float64")
FIRST_KERNEL = f"{SAT.transformer}.layers.0.attention.query_key_value.weight"
# rotary tables, in some files a layer's and in some the model's; they follow from the config
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


class Rank(NamedTuple):
    """The tensors of one tensor-parallel rank, and the file that should name them all."""

    file: Path
    tensors: dict[str, StoredTensor]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of params, still on disk: for each layer (one outside blocks) the views of it in each rank's file."""

    shape: tuple[int, ...]
    stacked: bool
    split: int | None  # the axis, without L, along which the ranks' parts follow one another
    parts: tuple[tuple[StoredTensor, ...], ...]  # [layers][ranks], axes in our order

    @property
    def dtype(self) -> np.dtype:
        """The dtype in the files."""
        return self.parts[0][0].dtype

    def read(self, index: Index, dtype: np.dtype | None = None) -> np.ndarray:
        """Read a region, one slice an axis, in the dtype of the files or another."""
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        region = np.empty([stop - start for start, stop in bounds], dtype or self.dtype)
        if not self.stacked:
            self._read_layer(0, bounds, region)
            return region
        for place, layer in enumerate(range(*bounds[0])):
            self._read_layer(layer, bounds[1:], region[place])
        return region

    def _read_layer(self, layer: int, bounds: list[tuple[int, int]], region: np.ndarray) -> None:
        """Fill `region` with what `bounds` name of one layer, rank by rank."""
        if self.split is None:
            region[...] = self.parts[layer][0].read(tuple(slice(*bound) for bound in bounds))
            return
        low, high = bounds[self.split]
        first = 0  # where the rank's part begins along the split axis
        for part in self.parts[layer]:
            size = part.shape[self.split]
            start, stop = max(low, first), min(high, first + size)
            if start < stop:
                index = [slice(*bound) for bound in bounds]
                index[self.split] = slice(start - first, stop - first)
                target = [slice(None)] * len(bounds)
                target[self.split] = slice(start - low, stop - low)
                region[tuple(target)] = part.read(tuple(index))
            first += size


def latest_iteration(path: str | Path) -> str:
    """Read the file `latest` of a checkpoint.

    Raises:
        UserError: there is none, or it names no directory.
    """
    root = Path(path)
    try:
        name = (root / "latest").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{root / 'latest'} cannot be read: it should hold the iteration, such as 49300") from error
    if not re.fullmatch(r"\w+", name) or not (root / name).is_dir():
        raise UserError(f"{root / 'latest'} names {name!r}, which is not a directory beside it")
    return name


def open_ranks(path: str | Path) -> list[Rank]:
    """Open the rank files of a checkpoint; tensors stay on disk.

    Raises:
        UserError: a missing or damaged file, or one without a "module" of tensors.
    """
    directory = Path(path) / latest_iteration(path)
    found = [int(match[1]) for file in directory.iterdir()
             if (match := re.fullmatch(r"mp_rank_(\d+)_model_states\.pt", file.name))]  # fmt: skip
    ranks = []
    for rank in range(max(found, default=0) + 1):
        file = directory / RANK_FILE.format(rank)
        if not file.is_file():
            raise UserError(f"{file} is missing: every rank from 00 on needs its file")
        content = read_archive(file)
        module = content.get("module") if isinstance(content, dict) else None
        if not isinstance(module, dict):
            raise UserError(f'{file}: there is no "module" in it: is this a SAT checkpoint?')
        ranks.append(Rank(file, check_tensors(file, module)))
    return ranks


def check_tensors(file: Path, content: dict[object, object]) -> dict[str, StoredTensor]:
    """Return a file's table as tensors by name.

    Raises:
        UserError: something in it is not a tensor, or has a number for a name.
    """
    tensors = {}
    for name, value in content.items():
        if not isinstance(value, StoredTensor):
            raise UserError(f"{file}: {shown(name)} is not a tensor but {type(value).__name__}")
        if not isinstance(name, str):
            raise UserError(f"{file}: a tensor has the name {shown(name)}, it must be text")
        tensors[name] = value
    return tensors


def open_parameters(path: str | Path, cfg: GLMConfig) -> dict[ParamPath, Source]:
    """Open a checkpoint as params that are still on disk, by path; everything that can be checked is.

    Raises:
        UserError: as in `load`.
    """
    return join(open_ranks(path), cfg)


def join(ranks: list[Rank], cfg: GLMConfig) -> dict[ParamPath, Source]:
    """Return what `gather` does, with the arrays of each quantised kernel as one source.

    Raises:
        UserError: as `gather`.
    """
    sizes = axis_sizes(cfg)
    shapes = {rule.path: rule.our_shape(sizes) for rule in rules(cfg)}
    return sources.join(gather(ranks, cfg), shapes, str(ranks[0].file))


def bits(ranks: list[Rank]) -> int:
    """Return of how many bits the kernels of a checkpoint are; 0 if they are floats.

    Raises:
        UserError: the first is of integers of neither 8 nor 4 bits.
    """
    file, tensors = ranks[0]
    first, table = tensors.get(FIRST_KERNEL), tensors.get(f"{SAT.word}.weight")
    if first is None or table is None or first.dtype != np.int8 or len(first.shape) != 2 or len(table.shape) != 2:
        return 0
    hidden, stored = table.shape[1], first.shape[1]
    for width in WIDTHS:
        if stored * 8 == hidden * width:
            return width
    raise UserError(f"{file}: {FIRST_KERNEL} has {stored} bytes for {hidden} input features, which is neither 8 nor 4 "
                    "bits each: quantise the model again")  # fmt: skip


def gather(ranks: list[Rank], cfg: GLMConfig, layout: Layout = SAT) -> dict[ParamPath, Parameter]:
    """Check each rank's tensors against the table and view them as our params, by path.

    A quantised kernel is two arrays, with `values` and `scales` at the end of their paths.

    Raises:
        UserError: a tensor that is missing, unknown, of another shape than cfg's or not of floats, or of int8 where
            the kernels are quantised.
    """
    width = bits(ranks)
    check_ranks(cfg, len(ranks), ranks[-1].file, width)
    sizes = axis_sizes(cfg, len(ranks))
    names = {name for name, _, _ in official_tensors(cfg, layout, width)}
    for rank in ranks:
        for name, tensor in rank.tensors.items():
            if name not in names and not IGNORED.fullmatch(name):
                raise UserError(f"{tensor.file}: {shown(name)} is not a tensor of this model: does the config fit it?")
    layers: dict[ParamPath, list[tuple[StoredTensor, ...]]] = {}
    for name, rule, _ in official_tensors(cfg, layout, width):
        dtype = next((rank.tensors[name].dtype for rank in ranks if name in rank.tensors), None)
        views = tuple(_view(rank, name, rule, sizes, len(ranks), dtype) for rank in ranks)
        layers.setdefault(rule.path, []).append(views)
    return {
        rule.path: Parameter(
            rule.our_shape(sizes), rule.stacked, rule.ours.index(rule.split) if rule.split else None,
            tuple(layers[rule.path])
        )
        for rule in rules(cfg, layout, width)
    }  # fmt: skip


def _view(rank: Rank, name: str, rule: Rule, sizes: dict[str, int], ranks: int, dtype: np.dtype | None) -> StoredTensor:
    """Check one rank's tensor and view it with our axes."""
    tensor = rank.tensors.get(name)
    if tensor is None:
        lost = ": quantise the model again, with its scales" if rule.path[-1] == SCALES else ""
        raise UserError(f"{rank.file}: {name} is missing{lost}")
    wanted = rule.torch_shape(sizes, ranks)
    if tensor.shape != wanted:
        raise UserError(
            f"{tensor.file}: {name} has shape {list(tensor.shape)}, the config wants {list(wanted)}"
            f"{f' on each of {ranks} ranks' * (ranks > 1)}: is it of another model, or is a file missing?"
        )
    kinds, called = (("int8",), "int8") if rule.path[-1] == VALUES else (FLOATS, "of floats")
    if tensor.dtype.name not in kinds or tensor.dtype != dtype:
        raise UserError(f"{tensor.file}: {name} is {tensor.dtype.name}, it must be {called} and alike on all ranks")
    shape = dict(zip(rule.view, rule.view_shape(sizes, ranks), strict=True))
    for axis, group in reversed(list(enumerate(rule.official.split()))):
        tensor = tensor.split(axis, tuple(shape[letter] for letter in group))
    return tensor.transpose(tuple(rule.view.index(axis) for axis in rule.ours))
