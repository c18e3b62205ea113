"""The one table between official tensors and our params: names, shapes, the order of axes, the split over ranks.

SAT (SwissArmyTransformer, the training code's) and Hugging Face checkpoints of the original GLM hold the same tensors;
a `Layout` has what their names differ in.

Axes are letters: V vocabulary, T rows of a position table, D hidden, N heads, C the three of q, k and v, K head dim,
G the projections that enter the feed-forward (2 for a GLU, else 1), F feed-forward. An official tensor is [out, in]
with several of our axes flattened into one of its own: "NCK D" is [3D, D] whose rows are head-major. A rank of k holds
the same shape with the split axis divided by k, and every rule of the official re-sharding tool follows from that: the
GLU's "GF D" split on F gives each rank its part of both halves.

A quantised matrix is two tensors: its integers, with d, k or f for half of D, K or F where 4 bits are packed two to a
byte, and its scales [out]. The official tool quantises what a rank holds, so where ranks split the inputs there are
scales for each of R ranks; 1 stands for inputs that have one scale.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from glm_jax.errors import UserError
from glm_jax.model import GLMConfig
from glm_jax.workdir.checkpoint_format import Index, ParamPath

CHUNK_BYTES = 32 * 2**20  # of float32, the most that is read, turned and written at a time
SAT_NORMS = ("deepnorm", "post", "pre", "sandwich")
AXIS_NAMES = {"N": "num_heads", "F": "ffn_size", "V": "vocab_size"}  # the axes that ranks split
KERNEL, VALUES, SCALES, ZEROS = "kernel", "values", "scales", "zeros"  # the last three: of a quantised kernel


class Layout(NamedTuple):
    """What differs between the names of tensors in two kinds of checkpoints."""

    transformer: str  # the prefix of blocks, the final norm and the position table
    word: str  # the word embedding
    block_position: str  # the table of block positions


SAT = Layout("transformer", "transformer.word_embeddings",
             "mixins.block_position_embedding.block_position_embeddings")  # fmt: skip
HUGGING_FACE = Layout("glm.transformer", "glm.word_embeddings", "glm.transformer.block_position_embeddings")


class Rule(NamedTuple):
    """One line of the table: an official tensor, for blocks one in each layer."""

    name: str  # official, with {layer} for blocks
    path: ParamPath  # into params
    official: str  # its axes; a space parts the axes of the torch tensor
    ours: str  # our axes, without the leading L of blocks
    split: str = ""  # the axis divided over tensor-parallel ranks; "" is a copy on each

    @property
    def stacked(self) -> bool:
        """Whether our array has a leading L axis."""
        return self.path[0] == "blocks"

    @property
    def view(self) -> str:
        """The official axes, one by one."""
        return self.official.replace(" ", "")

    def view_shape(self, sizes: dict[str, int], ranks: int = 1) -> tuple[int, ...]:
        """Return the size of each axis of `view` on one rank."""
        return tuple(sizes[axis] // (ranks if axis == self.split else 1) for axis in self.view)

    def torch_shape(self, sizes: dict[str, int], ranks: int = 1) -> tuple[int, ...]:
        """Return the shape of the official tensor on one rank."""
        shape = dict(zip(self.view, self.view_shape(sizes, ranks), strict=True))
        return tuple(math.prod(shape[axis] for axis in group) for group in self.official.split())

    def our_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Return the shape of our array, with L."""
        return tuple(sizes[axis] for axis in ("L" if self.stacked else "") + self.ours)


def axis_sizes(cfg: GLMConfig, ranks: int = 1) -> dict[str, int]:
    """Return the size of each axis of the table; ranks are those of a quantised checkpoint."""
    sizes = {"L": cfg.num_layers, "V": cfg.vocab_size, "T": cfg.max_length, "D": cfg.hidden_size, "N": cfg.num_heads,
             "C": 3, "K": cfg.head_dim, "G": cfg.up_projections, "F": cfg.ffn_size, "R": ranks, "1": 1}  # fmt: skip
    return sizes | {axis.lower(): sizes[axis] // 2 for axis in "DKF"}


def rules(cfg: GLMConfig, layout: Layout = SAT, bits: int = 0) -> list[Rule]:
    """Return the table for one model, with the names of one layout; of quantised kernels if they have 8 or 4 `bits`.

    The original GLM (learned_2d positions) packs q, k and v as three blocks on each rank; GLM-130B's code packs them
    head by head.

    Raises:
        UserError: the model has norms for which SAT has no names.
    """
    if cfg.embedding_norm:
        raise UserError("official checkpoints have no embedding norm: model.embedding_norm must be off")
    if cfg.qk_norm:
        raise UserError("official checkpoints have no norms on queries and keys: model.qk_norm must be off")
    if cfg.norm not in SAT_NORMS:
        listed = ", ".join(SAT_NORMS)
        raise UserError(f"official checkpoints have no norm scheme {cfg.norm!r}: model.norm must be one of {listed}")
    qkv = "CNK" if cfg.position == "learned_2d" else "NCK"
    table = [Rule(f"{layout.word}.weight", ("embedding", "word"), "V D", "VD", "V")]
    if cfg.position == "learned_2d":
        positions = f"{layout.transformer}.position_embeddings.weight"
        table += [Rule(positions, ("embedding", "position"), "T D", "TD"),
                  Rule(f"{layout.block_position}.weight", ("embedding", "block_position"), "T D", "TD")]  # fmt: skip
    block = layout.transformer + ".layers.{layer}."
    table += _norm(block + "input_layernorm", ("blocks", "attention_norm"))
    table += _affine(
        block + "attention.query_key_value", ("attention", "qkv"), (f"{qkv} D", "DNCK"), (qkv, "NCK", "N"), "N"
    )
    table += _affine(block + "attention.dense", ("attention", "output"), ("D NK", "NKD"), ("D", "D", ""), "N")
    table += _norm(block + "post_attention_layernorm", ("blocks", "feedforward_norm"))
    table += _affine(block + "mlp.dense_h_to_4h", ("feedforward", "up"), ("GF D", "DGF"), ("GF", "GF", "F"), "F")
    table += _affine(block + "mlp.dense_4h_to_h", ("feedforward", "down"), ("D F", "FD"), ("D", "D", ""), "F")
    if cfg.norm == "sandwich":
        table += _norm(block + "third_layernorm", ("blocks", "attention_output_norm"))
        table += _norm(block + "fourth_layernorm", ("blocks", "feedforward_output_norm"))
    table += _norm(f"{layout.transformer}.final_layernorm", ("final_norm",))
    if bits == 0:
        return table
    return [part for rule in table for part in (_quantised(rule, bits) if rule.path[-1] == KERNEL else [rule])]


def _quantised(rule: Rule, bits: int) -> list[Rule]:
    """Return the rules for the integers and the scales of a kernel."""
    outputs, inputs = rule.official.split()
    packed = inputs[-1]
    half = packed.lower() if bits == 4 else packed
    values = rule._replace(path=(*rule.path, VALUES), official=f"{outputs} {inputs.replace(packed, half)}",
                           ours=rule.ours.replace(packed, half), split=rule.split.replace(packed, half))  # fmt: skip
    groups = "".join("R" if axis == rule.split else "1" for axis in inputs)
    scales = Rule(f"{rule.name}_scale", (*rule.path, SCALES), groups + outputs, groups + rule.ours[len(inputs) :],
                  "R" if "R" in groups else rule.split)  # fmt: skip
    return [values, scales]


def _norm(name: str, path: ParamPath) -> list[Rule]:
    return [Rule(f"{name}.weight", (*path, "scale"), "D", "D"), Rule(f"{name}.bias", (*path, "bias"), "D", "D")]


def _affine(name: str, path: ParamPath, kernel: tuple[str, str], bias: tuple[str, str, str], split: str) -> list[Rule]:
    return [Rule(f"{name}.weight", ("blocks", *path, "kernel"), *kernel, split),
            Rule(f"{name}.bias", ("blocks", *path, "bias"), *bias)]  # fmt: skip


def official_tensors(cfg: GLMConfig, layout: Layout = SAT, bits: int = 0) -> Iterator[tuple[str, Rule, int | None]]:
    """Yield (official name, rule, layer) for every tensor of a checkpoint, layer None outside the blocks."""
    table = rules(cfg, layout, bits)
    blocks = [rule for rule in table if rule.stacked]
    first = table.index(blocks[0])
    for rule in table[:first]:
        yield rule.name, rule, None
    for layer in range(cfg.num_layers):
        for rule in blocks:
            yield rule.name.format(layer=layer), rule, layer
    for rule in table[first + len(blocks) :]:
        yield rule.name, rule, None


def check_ranks(cfg: GLMConfig, ranks: int, where: Path, bits: int = 0) -> None:
    """Check that a tensor-parallel count divides what it splits, and that 4 bits can be packed on each rank.

    Raises:
        UserError: it does not, or they cannot; the message starts with `where`.
    """
    if ranks < 1:
        raise UserError(f"{where}: tensor_parallel is {ranks}, it must be at least 1")
    for rule in rules(cfg):
        size = axis_sizes(cfg)[rule.split] if rule.split else 0
        if size % ranks:
            raise UserError(
                f"{where}: {ranks} tensor-parallel ranks do not divide {AXIS_NAMES[rule.split]} {size}, along which "
                f"{rule.name.format(layer=0)} is split"
            )
    for name, size in (("hidden_size", cfg.hidden_size), ("head_dim", cfg.head_dim), ("ffn_size", cfg.ffn_size)):
        on_rank = size // (ranks if name == "ffn_size" else 1)
        if bits == 4 and on_rank % 2:
            raise UserError(f"{where}: 4 bits are packed in pairs, and {name} is {on_rank} on a rank: use 8 bits")


def tile_shape(shape: tuple[int, ...], itemsize: int = 4) -> tuple[int, ...]:
    """Halve `shape` from the first axis on until it has at most CHUNK_BYTES."""
    tile = list(shape)
    for axis in range(len(tile)):
        while math.prod(tile) * itemsize > CHUNK_BYTES and tile[axis] > 1:
            tile[axis] = -(-tile[axis] // 2)
    return tuple(tile)


def tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> Iterator[Index]:
    """Yield the regions of `shape` that tiles of shape `tile` cover, in row-major order."""
    ranges = [
        [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for size, step in zip(shape, tile, strict=True)
    ]
    return itertools.product(*ranges)
