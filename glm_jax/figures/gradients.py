"""The embedding's gradient against the layers': over training, and on each of its two paths.

The word embedding is used twice, as the input's table and, tied, as the head's kernel. The embedding gradient shrink
(paper section 3.2) multiplies the gradient of the first use by alpha, and with `train.embedding_shrink.logits` that of
the second use as well. The logged `grad_norm/embedding` is what the optimiser sees: after the shrink, before clipping.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

from glm_jax.figures import style
from glm_jax.figures.depth import logarithmic
from glm_jax.figures.diagnostics import Params, RandomRows, start
from glm_jax.figures.training import labels, legend, where
from glm_jax.model import GLMConfig, transformer
from glm_jax.model.positions import position_terms
from glm_jax.sweeps.results import Row, table

EMBEDDING, BLOCKS = "grad_norm/embedding", "grad_norm/blocks_"


def blocks(result: Row) -> dict[str, np.ndarray]:
    """Return the gradient norms [n] of a member's layer groups, from the bottom up, by names such as `layers 0–1`."""
    found = {}
    for name in sorted((name for name in result["curves"] if name.startswith(BLOCKS)), key=_first_layer):
        first, last = name.removeprefix(BLOCKS).split("_")
        found[f"layer {first}" if first == last else f"layers {first}–{last}"] = result["curves"][name]
    return found


def _first_layer(name: str) -> int:
    return int(name.removeprefix(BLOCKS).split("_")[0])


def share(result: Row) -> np.ndarray:
    """Return the ratio [n] of the embedding's gradient norm to that of all layers together."""
    return result["curves"][EMBEDDING] / np.sqrt(sum(values**2 for values in blocks(result).values()))


def gradient_norms(results: Sequence[Row], axis: str) -> Figure:
    """Draw gradient norms over training, with a panel for each label of an axis: medians over seeds and their range."""
    names = labels(results, axis)
    made, panels = style.figure(1, len(names), 3.5, 3.0)
    for panel, name in zip(panels, names, strict=True):
        mine = where(results, {axis: name})
        steps = mine[0]["curves"]["step"]
        lines = {group: np.stack([blocks(result)[group] for result in mine]) for group in blocks(mine[0])}
        shades = matplotlib.colormaps[style.MAP](np.linspace(0, 0.85, len(lines)))
        drawn = [(group, values, shade, 1.0) for (group, values), shade in zip(lines.items(), shades, strict=True)]
        embedding = np.stack([result["curves"][EMBEDDING] for result in mine])  # [seeds, n]
        for label, values, colour, width in [*drawn, ("embedding", embedding, style.COLOURS[1], 2.0)]:
            panel.plot(steps, np.median(values, axis=0), color=colour, linewidth=width, label=label)
            panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    limits = [limit for panel in panels for limit in panel.get_ylim() if limit > 0]
    lowest = min(float(panel.dataLim.minposy) for panel in panels)
    for panel, name in zip(panels, names, strict=True):
        panel.set_ylim(lowest / 1.3, max(limits) * 1.1)
        logarithmic(panel.yaxis)
        style.finish(panel, "step", "norm of the gradient", name, legend=False)
        panel.label_outer(remove_inner_ticks=True)
    legend(made, panels, "Gradient norms over training")
    return made


def shares(results: Sequence[Row], axis: str) -> Figure:
    """Draw the embedding's share by step (see `share`): a colour for each label, a line for each seed."""
    made, (panel,) = style.figure(1, 1, 6.0, 3.0)
    for name, colour in zip(labels(results, axis), itertools.cycle(style.COLOURS), strict=False):
        for number, result in enumerate(where(results, {axis: name})):
            values = share(result)
            panel.plot(result["curves"]["step"], values, color=colour, linewidth=1.1, alpha=0.85,
                       label=name if number == 0 else "_")  # fmt: skip
    low, high = panel.dataLim.intervaly
    panel.set_ylim(0.9 * low, 1.1 * high)
    logarithmic(panel.yaxis)
    style.finish(panel, "step", "embedding / all layers", "The embedding's share; a line a seed", legend=False)
    legend(made, [panel], "")
    return made


def norms_table(results: Sequence[Row], axis: str) -> str:
    """Return a table with, for each label of an axis, the medians over the steps after the warm-up, and the spike.

    The spike is the largest embedding norm after the warm-up divided by the median: 1 where nothing stands out. A cell
    has the median over seeds, and their range if there are two or more.
    """
    lines = []
    for name in labels(results, axis):
        mine = where(results, {axis: name})
        behind = [result["curves"]["step"] > result["warmup"] for result in mine]
        embedding = [result["curves"][EMBEDDING][kept] for result, kept in zip(mine, behind, strict=True)]
        ratio = [share(result)[kept] for result, kept in zip(mine, behind, strict=True)]
        columns = ([np.median(values) for values in embedding], [np.median(values) for values in ratio],
                   [values.max() / np.median(values) for values in embedding])  # fmt: skip
        lines.append([name, *(_range(column) for column in columns)])
    header = [axis, "embedding's norm", "embedding's over all layers'", "largest over median"]
    return table(header, lines)


def _range(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g} to {max(values):.3g})"


class Paths(NamedTuple):
    """Norms of the word embedding's gradient on each of its two paths and of their sum, and the cosine between them."""

    lookup: float
    head: float
    both: float
    cosine: float


def _loss(cfg: GLMConfig, word: tuple[jax.Array, jax.Array], params: Params, rows: RandomRows) -> jax.Array:
    """Return the mean cross-entropy in nats, with separate tables [V, D] for the lookup and for the head."""
    inside, outside = (params | {"embedding": params["embedding"] | {"word": table}} for table in word)
    x = transformer.embed(cfg, inside, rows.tokens, rows.positions)  # [B, S, D]
    x = transformer.blocks(cfg, params["blocks"], x, rows.allowed, position_terms(cfg, rows.positions, x.dtype))
    logits = transformer.head(cfg, outside, x)  # [B, S, V]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)  # [B, S]
    return jnp.sum(losses * rows.loss_mask) / jnp.sum(rows.loss_mask)


@functools.partial(jax.jit, static_argnums=0)
def _paths(cfg: GLMConfig, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    params, rows = start(cfg, seed)
    word = params["embedding"]["word"]  # [V, D]
    return jax.grad(lambda pair: _loss(cfg, pair, params, rows))((word, word))


def measure_paths(cfg: GLMConfig, seed: int, alpha: float = 1.0, shrink_head: bool = False) -> Paths:
    """Measure the two parts of the word embedding's gradient at initialisation, on random rows.

    Args:
        cfg: of the model.
        seed: of the params and the rows.
        alpha: of the shrink, on the lookup's path.
        shrink_head: whether the head's path is shrunk, too.
    """
    lookup, at_head = (np.asarray(part, np.float64) for part in _paths(cfg, jnp.int32(seed)))  # [V, D]
    lookup, at_head = alpha * lookup, (alpha if shrink_head else 1.0) * at_head
    norms = float(np.linalg.norm(lookup)), float(np.linalg.norm(at_head))
    return Paths(*norms, float(np.linalg.norm(lookup + at_head)), float(np.sum(lookup * at_head) / np.prod(norms)))


def paths_table(measured: Mapping[str, Sequence[Paths]]) -> str:
    """Return a table of the paths by name: medians over seeds, and their range."""
    lines = [[name, *(_range(values) for values in zip(*paths, strict=True))] for name, paths in measured.items()]
    return table(["", "lookup", "head", "both", "cosine"], lines)
